"""Whole models through the CUDA kernels, on the emulator: as exact as bfloat16 allows, and P1 to P4 bit for bit."""

from __future__ import annotations

import functools
import gc
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from models_for_tests import (
    KINDS,
    backward,
    batch_for,
    bits,
    forward_bits,
    gradient_bits,
    lora_model,
    randn,
    sequences,
    tiny_model,
)
from runs_for_tests import save_model, weights, write_rows
from trying_for_tests import save_judge, save_policy, save_prompts
from tutelage import AdamW, Model, ModelConfig, PackedBatch, devices, pack
from tutelage.doctor import device_finding
from tutelage.train.configs import PpoConfig, SftConfig
from tutelage.train.picture import read_metrics
from tutelage.train.ppo import ppo
from tutelage.train.sft import sft

pytestmark = pytest.mark.usefixtures("one_thread")

SIM = os.environ.get("TUTELAGE_TEST_DEVICE", "cuda-sim")  # cuda: the same tests on a GPU
OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in ("llama", "gpt2")]
# Grouped queries, RMSNorm, SwiGLU, RoPE; LayerNorm, GELU, biases, learned positions, a tied head; the others in the slow tier.
EVERY_KIND = ["llama", "gpt2", *OTHERS]
PAIR = ["llama", "gpt2"]


@functools.cache
def shared(kind: str, head: Any = "lm") -> Model:
    """Read only: tests share it."""
    return tiny_model(kind, head=head, device=SIM)


# ---- as exact as bfloat16 allows


def torch_outputs(
    model: Model, batch: PackedBatch, folder: Path, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """transformers' model of the same weights, computed by torch in `dtype`, a sequence at a time: log-probs, entropies, and
    the gradients of what `backward` differentiates."""
    model.save_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    logprobs, entropies = [], []
    for tokens in batch.tokens.long().split(batch.lengths):
        rows = torch.log_softmax(theirs(tokens[None]).logits[0].float(), -1)[:-1]
        nothing = torch.zeros(1)
        logprobs.append(torch.cat([nothing, rows.gather(1, tokens[1:, None])[:, 0]]))
        entropies.append(torch.cat([nothing, -(rows.exp() * rows).sum(-1)]))
    logprob, entropy = torch.cat(logprobs), torch.cat(entropies)
    torch.autograd.backward([logprob, entropy], [randn(logprob, 0), randn(entropy, 1)])
    grads = {name: p.grad.double() for name, p in theirs.named_parameters() if p.grad is not None}
    return logprob.detach(), entropy.detach(), grads


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("kind", [*PAIR, *(kind for kind in OTHERS if kind.values != ("layernorm",))])  # torch has no such
def test_a_model_is_at_most_twice_as_far_from_the_truth_as_torchs_bfloat16(kind: str, tmp_path: Path) -> None:
    cpu = tiny_model(kind)
    sim, truth = cpu.to(SIM), cpu.double()
    batch = batch_for(cpu, [33, 1, 2, 21])
    logprobs, entropies, grads = torch_outputs(cpu, batch, tmp_path, torch.bfloat16)
    with torch.no_grad():
        exact, ours = truth.score(batch), sim.score(batch)
    for mine, theirs, right in ((ours.logprobs, logprobs, exact.logprobs), (ours.entropy, entropies, exact.entropy)):
        assert rms(mine - right) <= 2 * rms(theirs - right)
        assert float((mine - right).abs().max()) <= 2 * float((theirs - right).abs().max())
        assert rms(theirs - right) < 0.2 * rms(right)  # it is the same model that torch computes
    backward(sim, batch)
    backward(truth, batch)
    right_grads, mine_grads = dict(truth.named_grads()), {name: grad.cpu() for name, grad in sim.named_grads()}
    assert set(grads) == set(right_grads)
    for name, right in right_grads.items():
        assert rms(mine_grads[name] - right) <= 2 * rms(grads[name] - right), name


def test_the_rule_would_find_a_wrong_model(tmp_path: Path) -> None:
    cpu = tiny_model()
    batch = batch_for(cpu, [33, 1, 2, 21])
    logprobs, _, _ = torch_outputs(cpu, batch, tmp_path, torch.bfloat16)
    with torch.no_grad():
        exact = cpu.double().score(batch).logprobs
        for name, view in cpu.named_parameters():
            if name.endswith("1.input_layernorm.weight"):
                view[7] += 0.5
        wrong = cpu.to(SIM).score(batch).logprobs
    assert rms(wrong - exact) > 2 * rms(logprobs - exact)


@pytest.mark.parametrize("kind", PAIR)
def test_a_scalar_head_and_its_gradients(kind: str) -> None:
    """Against rounding the weights and nothing else: the error of the rest may be as large again, three times over."""
    cpu = tiny_model(kind, head="scalar")
    sim, truth, rounded = cpu.to(SIM), cpu.double(), cpu.double()
    rounded.params.copy_(cpu.params.bfloat16())
    batch = batch_for(cpu, [17, 1, 9])
    with torch.no_grad():
        values, right, base = (model.values(batch) for model in (sim, truth, rounded))
    assert rms(values - right) <= 4 * rms(base - right)
    for model in (sim, truth, rounded):
        backward(model, batch)
    assert rms(sim.grads.cpu() - truth.grads) <= 4 * rms(rounded.grads - truth.grads)


def test_an_adapter_learns_on_the_device() -> None:
    cpu = lora_model()
    sim, truth, rounded = cpu.to(SIM), cpu.double(), cpu.double()
    assert sim.base is not None and sim.base.device_name == SIM and truth.base is not None and rounded.base is not None
    assert cpu.base is not None
    rounded.params.copy_(cpu.params.bfloat16())
    rounded.base.params.copy_(cpu.base.params.bfloat16())
    batch = batch_for(cpu, [17, 1, 9])
    for model in (sim, truth, rounded):
        backward(model, batch)
    assert rms(sim.grads.cpu() - truth.grads) <= 4 * rms(rounded.grads - truth.grads)
    merged = sim.merge()
    assert merged.device_name == SIM and bits(merged.params) == bits(cpu.merge().params)


# ---- P1, P4: the same bits however a batch is made and cut


def each(model: Model, seqs: list[list[int]]) -> list[bytes]:
    batch = pack(seqs)
    with torch.no_grad():
        if model.head == "scalar":
            return [bits(part) for part in model.values(batch).split(batch.lengths)]
        out = model.score(batch)
    return [bits(*parts) for parts in zip(*(x.split(batch.lengths) for x in (out.logprobs, out.entropy)), strict=True)]


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_sequence_has_its_bits_alone_and_in_any_batch_and_order(kind: str, head: str) -> None:
    model = shared(kind, head)
    seqs = sequences([5, 1, 70, 17, 2], model.config.vocab_size)
    expected = [each(model, [seq])[0] for seq in seqs]
    assert each(model, seqs) == expected
    order = random.Random(0).sample(range(5), 5)
    assert each(model, [seqs[i] for i in order]) == [expected[i] for i in order]
    seqs[2][0] ^= 1  # the comparison finds a sequence that is another, and no other than that
    assert [a == b for a, b in zip(each(model, seqs), expected, strict=True)] == [True, True, False, True, True]


@pytest.mark.slow
def test_a_long_sequence_has_its_bits_in_any_batch() -> None:
    """Across tiles of keys and queries, and several panels of rows."""
    model = shared("llama")
    seqs = sequences([127, 1, 128, 129, 3, 300], model.config.vocab_size)
    assert each(model, seqs) == [each(model, [seq])[0] for seq in seqs]


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_gradients_do_not_depend_on_micro_batches(kind: str, head: Any) -> None:
    model = tiny_model(kind, head=head, device=SIM)
    seqs = sequences([5, 1, 33, 17, 2, 40], model.config.vocab_size)
    batch = pack(seqs)

    def learn(*cuts: tuple[int, int]) -> bytes:
        model.zero_grad()
        starts = batch.cu_seqlens.tolist()
        for first, last in cuts:
            part, places = pack(seqs[first:last]), slice(starts[first], starts[last])
            outputs = (model.values(part),) if head == "scalar" else (lambda s: (s.logprobs, s.entropy))(model.score(part))
            torch.autograd.backward(outputs, [randn(batch.tokens.float(), i)[places] for i in range(len(outputs))])
        return bits(model.grads)

    whole = learn((0, 6))
    assert learn((0, 1), (1, 3), (3, 6)) == whole
    assert learn((0, 4), (4, 6)) == whole
    assert learn((4, 6), (0, 4)) != whole  # another order is another chain


@pytest.mark.parametrize("kind", PAIR)
def test_what_is_kept_between_forward_and_backward_changes_no_bit(kind: str) -> None:
    model = tiny_model(kind, device=SIM)
    batch = batch_for(model, [5, 1, 33])
    expected = gradient_bits(model, batch)
    model.recompute, model.logits_budget = True, 0
    assert gradient_bits(model, batch) == expected
    model.logits_budget = 20 * model.config.vocab_size * 4
    assert gradient_bits(model, batch) == expected
    assert gradient_bits(model, batch, seed=5) != expected


def test_masked_tokens_cost_nothing_and_change_no_bit() -> None:
    model = shared("llama")
    seqs = sequences([9, 12], model.config.vocab_size)
    masks = [[i > 4 for i in range(len(seq))] for seq in seqs]
    with torch.no_grad():
        every, some = model.score(pack(seqs, masks)), model.score(pack(seqs, masks), completion_only=True)
    mask = pack(seqs, masks).completion_mask
    assert bits(some.logprobs[mask]) == bits(every.logprobs[mask])
    assert not some.logprobs[~mask].any() and every.logprobs[~mask].any()


# ---- P2, P3: generation


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_generation_has_the_bits_of_score(kind: str) -> None:
    model = shared(kind)
    prompts = sequences([1, 6, 20, 131], model.config.vocab_size)
    rows = model.generate(prompts, max_new_tokens=[9, 3, 5, 4], temperature=0.7, seed=5, stop_token_ids=())
    batch = rows.pack()
    with torch.no_grad():
        scored, other = model.score(batch, temperature=0.7), model.score(batch, temperature=0.8)
    assert batch.logprobs is not None
    mask = batch.completion_mask
    assert bits(scored.logprobs[mask]) == bits(batch.logprobs[mask])
    assert bits(other.logprobs[mask]) != bits(batch.logprobs[mask])


@pytest.mark.parametrize("kind", PAIR)
def test_generation_does_not_depend_on_chunks_shared_prefixes_or_the_other_rows(kind: str) -> None:
    model = shared(kind)
    prompts = sequences([1, 6, 20], model.config.vocab_size)
    prompts.append([*prompts[2][:15], 3, 2])

    def made(rows: list[int], seed: int = 5, **settings: Any) -> list[bytes]:
        out = model.generate(
            [prompts[row] for row in rows], max_new_tokens=5, seed=seed, stop_token_ids=(), min_p=0.01, **settings
        )
        return [bits(*row) for row in zip(out.tokens, out.logprobs, out.support_logprobs, strict=True)]

    expected = made([0, 1, 2, 3])
    assert made([0, 1, 2, 3], prefill_chunk=1) == expected
    assert made([0, 1, 2, 3], prefill_chunk=7, share_prefixes=False) == expected
    assert made([3, 1]) == [expected[3], expected[1]]
    assert made([0, 1, 2, 3], seed=6) != expected


@pytest.mark.parametrize("kind", PAIR)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.3}, {"top_k": 40}, {"top_p": 0.6}, {"min_p": 0.5}], ids=str)
def test_the_draws_are_the_cpus(kind: str, settings: dict[str, float]) -> None:
    """With a head of zeros the logits are the same on both, so what is left is the noise."""
    cpu = tiny_model(kind)
    if kind == "gpt2":  # tied: a look-up of zeros, which LayerNorm makes its bias
        with torch.no_grad():
            dict(cpu.named_parameters())["transformer.wte.weight"].zero_()
    else:
        with torch.no_grad():
            dict(cpu.named_parameters())["lm_head.weight"].zero_()
    prompts = sequences([2, 5], cpu.config.vocab_size)
    options: dict[str, Any] = {"max_new_tokens": 12, "samples_per_prompt": 2, "stop_token_ids": (), **settings}
    ours, theirs = cpu.to(SIM).generate(prompts, seed=1, **options), cpu.generate(prompts, seed=1, **options)
    assert bits(*ours.tokens, *ours.logprobs, *ours.support_logprobs) == bits(
        *theirs.tokens, *theirs.logprobs, *theirs.support_logprobs
    )
    assert bits(*ours.tokens) != bits(*cpu.generate(prompts, seed=2, **options).tokens)
    assert len(torch.cat(ours.tokens).unique()) > 20


def test_greedy_takes_the_likeliest() -> None:
    model = shared("llama")
    rows = model.generate([[1, 2, 3]], max_new_tokens=2, temperature=0, stop_token_ids=())
    with torch.no_grad():
        for at, token in enumerate(rows.tokens[0].tolist()):
            before = [1, 2, 3, *rows.tokens[0][:at].tolist()]
            every = model.score(pack([[*before, other] for other in range(model.config.vocab_size)])).logprobs
            ends = every[len(before) :: len(before) + 1]
            assert int(ends.argmax()) == token and bits(ends[token]) == bits(rows.logprobs[0][at])


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = tiny_model(device=SIM)
    dict(model.named_parameters())["model.norm.weight"][3] = math.nan
    with pytest.raises(RuntimeError, match="the logits after position 2 of prompt 0 are not finite"):
        model.generate([[1, 2, 3]], max_new_tokens=2)


# ---- the optimizer, and the copy that the kernels read


@pytest.mark.parametrize("kind", PAIR)
def test_the_optimizer_has_the_cpus_bits_and_keeps_the_copy(kind: str) -> None:
    sim, cpu = tiny_model(kind, device=SIM), tiny_model(kind)
    batch = batch_for(sim, [9, 4])
    ours, theirs = (AdamW(model, 1e-2, weight_decay=0.1) for model in (sim, cpu))
    for step in range(2):
        ours.zero_grad()
        backward(sim, batch, seed=step)
        cpu.grads.copy_(sim.grads)
        assert ours.step() == pytest.approx(theirs.step(), rel=1e-6)
        assert bits(sim.params, ours.exp_avg, ours.exp_avg_sq) == bits(cpu.params, theirs.exp_avg, theirs.exp_avg_sq)
        assert sim._rounded is not None and sim._rounded[0] == sim.params._version  # nothing is rounded again
        assert bits(sim._rounded[1].float()) == bits(sim.params.bfloat16().float())
    assert forward_bits(sim, batch) == forward_bits(cpu.to(SIM), batch)


def test_a_change_of_the_parameters_is_seen() -> None:
    model = tiny_model(device=SIM)
    batch = batch_for(model, [9])
    before, rows = forward_bits(model, batch), model.generate([[1, 2]], max_new_tokens=6)
    with torch.no_grad():
        model.params.mul_(1.5)
    assert forward_bits(model, batch) != before
    assert bits(*model.generate([[1, 2]], max_new_tokens=6).logprobs) != bits(*rows.logprobs)
    with torch.no_grad():
        model.params.div_(1.5)
    model.free_caches()
    assert forward_bits(model, batch) == before


def test_a_backward_after_a_step_is_refused() -> None:
    model = tiny_model(device=SIM)
    optimizer = AdamW(model, 1e-2)
    batch = batch_for(model, [9])
    kept = model.score(batch)
    backward(model, batch)
    optimizer.step()
    with pytest.raises(RuntimeError, match="the parameters changed between the forward and its backward"):
        kept.logprobs.sum().backward()


# ---- folders, memory


def test_a_folder_is_the_same_from_either_device(tmp_path: Path) -> None:
    cpu = tiny_model("gpt2")
    cpu.save_pretrained(tmp_path / "cpu")
    sim = Model.from_pretrained(tmp_path / "cpu", device=SIM)
    sim.save_pretrained(tmp_path / "sim")
    assert (
        sim.device_name == SIM and sim.clone().device_name == SIM and sim.to(SIM) is sim and sim.to("cpu").device_name == "cpu"
    )
    file = "model.safetensors"
    assert (tmp_path / "sim" / file).read_bytes() == (tmp_path / "cpu" / file).read_bytes()
    assert bits(Model(cpu.config, seed=3, device=SIM).params) == bits(Model(cpu.config, seed=3).params)


def test_nothing_is_kept_that_nobody_needs() -> None:
    from tutelage import _cuda_sim

    def in_use() -> int:
        return int(_cuda_sim.memory_use()["in_use"]) if SIM == "cuda-sim" else torch.cuda.memory_allocated()

    gc.collect()
    before = in_use()
    model = tiny_model(device=SIM)
    kept = model.score(batch_for(model, [9, 4]))
    assert in_use() > before
    kept.logprobs.sum().backward()
    model.generate([[1, 2]], max_new_tokens=3)
    del model, kept
    gc.collect()
    assert in_use() == before


# ---- training loops


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("world")
    pairs = [{"prompt": f"say {i}", "completion": f" it is {i * 7 % 10}"} for i in range(12)]
    return SimpleNamespace(
        base=save_model(folder / "base"),
        rows=write_rows(folder / "rows.jsonl", pairs),
        policy=save_policy(folder / "policy"),
        judge=save_judge(folder / "judge"),
        prompts=save_prompts(folder),
    )


def tuned(world: SimpleNamespace, folder: Path, **options: Any) -> list[float]:
    """The losses of a short fine-tuning."""
    fields: dict[str, Any] = {
        "max_steps": 3,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "plot": False,
        **options,
    }
    sft(SftConfig(output_dir=str(folder), model=str(world.base), data=(str(world.rows),), eval_fraction=0.0, **fields))
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def test_fine_tuning(world: SimpleNamespace, tmp_path: Path) -> None:
    losses, cpu = tuned(world, tmp_path / "sim", device=SIM), tuned(world, tmp_path / "cpu")
    assert losses == pytest.approx(cpu, rel=0.01) and losses != cpu
    assert losses[-1] < losses[0]
    cut = tuned(world, tmp_path / "cut", device=SIM, micro_batch_tokens=40)
    assert weights(tmp_path / "cut" / "model") == weights(tmp_path / "sim" / "model") != weights(tmp_path / "cpu" / "model")
    assert cut == pytest.approx(losses, rel=1e-6)  # sums of other parts


def test_ppo(world: SimpleNamespace, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> tuple[Any, bytes]:
        fields: dict[str, Any] = {"batch_size": 4, "num_mini_batches": 2, "num_ppo_epochs": 1, "max_steps": 1, **options}
        result = ppo(
            PpoConfig(
                output_dir=str(tmp_path / name),
                model=str(world.policy),
                reward_model=str(world.judge),
                data=(str(world.prompts),),
                eval_fraction=0.0,
                max_completion_length=6,
                learning_rate=5e-3,
                device=SIM,
                plot=False,
                **fields,
            )
        )
        return result, bits(Model.from_pretrained(result.folder).params)

    result, learned = run("whole")
    assert math.isfinite(result.loss) and math.isfinite(result.score) and result.episodes == 4
    assert learned != bits(Model.from_pretrained(world.policy).params)
    assert run("cut", micro_batch_tokens=30)[1] == learned
    assert run("seed", seed=1)[1] != learned


# ---- what is refused, and why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or 'cuda-sim', but it is 'tpu'"),
        (
            {"device": SIM, "dtype": torch.float64},
            f"dtype=torch.float64 and level go with device='cpu', but device is '{SIM}'",
        ),
        ({"device": SIM, "level": "scalar"}, f"dtype=torch.float64 and level go with device='cpu', but device is '{SIM}'"),
    ],
    ids=str,
)
def test_a_device_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(KINDS["llama"], **options)


def cuda_module(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    monkeypatch.setattr(devices.importlib, "import_module", lambda name: SimpleNamespace(problem=lambda: problem))


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(devices.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"device 'cuda' does not work here: this build has no CUDA kernels; install tutelage"):
        devices.find("cuda")
    assert "install tutelage again" in devices.problem("cuda-sim")
    assert (
        device_finding("cuda-sim", devices.problem("cuda-sim")).problem
        and not device_finding("cuda", devices.problem("cuda")).problem
    )

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: x", name=name)

    monkeypatch.setattr(devices.importlib, "import_module", broken)
    assert devices.problem("cuda") == "tutelage._cuda cannot be imported: undefined symbol: x"
    cuda_module(monkeypatch, "there is no NVIDIA driver")
    assert devices.problem("cuda") == "there is no NVIDIA driver"
    cuda_module(monkeypatch, "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install a torch that has it" in devices.problem("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.problem("cuda") == "torch finds no CUDA device (torch.cuda.is_available() is False)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.problem("cuda") == ""


def test_weights_of_another_kind_are_refused() -> None:
    model = shared("llama")
    batch = batch_for(model, [3])
    out = torch.empty(3, device=model.device)
    with pytest.raises(ValueError, match="argument 'params' must be bfloat16, but it is float32"):
        model._engine.score((model.params, None), batch.tokens, batch.cu_seqlens, None, out, out, 1.0, False, False, 0, 1)
    cpu, optimizer = tiny_model(), torch.zeros(0)
    with pytest.raises(ValueError, match="argument 'copy' is for a device that computes in bfloat16"):
        cpu._engine.adamw(
            cpu.params, cpu.grads, optimizer, optimizer, 0.1, 0.9, 0.9, 1e-8, 0.0, 1, 1.0, cpu.params.bfloat16(), 1
        )


def test_a_model_says_where_it_is() -> None:
    assert f"device='{SIM}'" in repr(shared("llama")) and "device='cpu'" in repr(tiny_model())
    place = torch.device("cpu" if SIM == "cuda-sim" else "cuda")
    assert isinstance(shared("llama").config, ModelConfig) and shared("llama").device == place
