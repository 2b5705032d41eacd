"""tutelage bench: contenders compute the same thing, counts are right, reports are whole."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gguf
import pytest
import torch

from tutelage import _core, bench
from tutelage import model as model_module
from tutelage.batch import pack
from tutelage.bench import (
    KernelsConfig,
    LoopsConfig,
    RolloutConfig,
    TrainConfig,
    ceilings,
    kernels,
    llama_cpp,
    loops,
    measure,
    memory,
    peers,
    rollout,
    train,
    trl,
)
from tutelage.bench.measure import Case, Plan
from tutelage.config import ModelConfig
from tutelage.data.examples import Batches, load_preferences, load_prompts, load_sft
from tutelage.data.tokenizer import Tokenizer
from tutelage.model import Model
from tutelage.optimizer import AdamW
from tutelage.rollouts import Generation
from tutelage.train import ppo as ppo_module
from tutelage.train.run import Run

TINY: dict[str, tuple[int, ...]] = {
    "matmul": (19, 40, 24),
    "matmul_gelu": (19, 40, 24),
    "flash_attention": (33, 2, 16),
    "linear_logprob": (17, 24, 301),
    "rms_norm": (9, 40),
    "layer_norm": (9, 40),
    "rope": (9, 2, 16),
    "swiglu": (9, 40),
    "gelu": (9, 40),
    "embedding": (23, 40, 11),
    "adamw": (1000,),
    "total": (70, 33),
}
TINY_PLAN = Plan(rounds=1, seconds=1e-3, settle=0)
TINY_GPT2 = train.TrainShape(train.gpt2(97, 48, 2, 2, positions=16), 3, 16)
TINY_LLAMA = train.TrainShape(
    ModelConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        rope_theta=1e5,
    ),
    3,
    16,
)
TINY_LOOPS = {
    loop: loops.LoopShape(
        dataclasses.replace(TINY_LLAMA.config, vocab_size=300, max_position_embeddings=32), rows, length, prompt
    )
    for loop, rows, length, prompt in (("sft", 2, 32, 8), ("dpo", 3, 24, 6), ("ppo", 4, 24, 12))
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands as they are, on shapes and samples that take no time."""
    monkeypatch.setattr(kernels, "KERNELS", {name: (kernels.KERNELS[name][0], [TINY[name]]) for name in TINY})
    monkeypatch.setattr(kernels, "QUICK", TINY_PLAN)
    monkeypatch.setattr(kernels, "Plan", lambda rounds: TINY_PLAN)
    monkeypatch.setattr(train, "SHAPES", {"gpt2": TINY_GPT2, "llama": TINY_LLAMA})
    monkeypatch.setattr(train, "Plan", lambda rounds: TINY_PLAN)
    monkeypatch.setattr(loops, "SHAPES", TINY_LOOPS)
    monkeypatch.setattr(loops, "Plan", lambda rounds: dataclasses.replace(TINY_PLAN, rounds=rounds))
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**16)
    for module in (kernels, train, loops):  # a process each; tested by itself below
        monkeypatch.setattr(module, "peak_bytes", lambda prepare, *arguments, threads: len(arguments) * 2**20)
    yield


# ---- every contender of a case computes the same thing


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_contenders_agree(name: str) -> None:
    assert TINY.keys() == kernels.KERNELS.keys()
    for case in kernels.KERNELS[name][0](*TINY[name]):
        outputs = {contender: run() for contender, run in case.contenders.items()}
        assert set(outputs) >= {"ours", "torch"}, case
        for contender, output in outputs.items():
            assert len(output) == len(outputs["ours"]) >= 1
            for mine, its in zip(outputs["ours"], output, strict=True):
                assert mine.abs().sum() > 0, (case.phase, contender)
                torch.testing.assert_close(mine.view(its.shape), its, rtol=1e-4, atol=1e-4)


def torch_names(name: str) -> str:
    return name.removeprefix("transformer.").removeprefix("model.")


def copy_into(peer: torch.nn.Module, model: Model) -> None:
    """Our weights into the peer; GPT-2's matrices are [in, out] in ours."""
    state = peer.state_dict()
    for name, tensor in model.named_parameters():
        its = state[torch_names(name)]
        turned = model.config.position == "learned" and ".c_" in name and tensor.dim() == 2
        its.copy_(tensor.T if turned else tensor)


@pytest.mark.parametrize("shape", [TINY_GPT2, TINY_LLAMA], ids=["gpt2", "llama"])
def test_the_torch_model_learns_the_same_steps(shape: train.TrainShape) -> None:
    model, peer = Model(shape.config, seed=3), peers.build(shape.config)
    with torch.no_grad():
        copy_into(peer, model)
    assert sum(p.numel() for p in peer.parameters()) == model.params.numel()
    tokens = torch.randint(97, (shape.sequences, shape.length), generator=torch.Generator().manual_seed(1))
    ours = train.our_step(model, tokens)
    its = peers.training_step(peer, tokens, train.LR, train.BETAS, train.WEIGHT_DECAY)
    losses = [(ours()[0].item(), its()[0].item()) for _ in range(4)]
    for mine, other in losses:
        assert mine == pytest.approx(other, abs=2e-4)
    assert losses[3][0] < losses[0][0]
    assert losses[0][0] == pytest.approx(-model_logprob_mean(shape, tokens), abs=1e-5)


def model_logprob_mean(shape: train.TrainShape, tokens: torch.Tensor) -> float:
    batch = pack(list(tokens))
    with torch.no_grad():
        logprobs = Model(shape.config, seed=3).score(batch).logprobs
    return float(logprobs[batch.completion_mask].mean())


def test_the_torch_models_refuse_what_they_do_not_have() -> None:
    config = ModelConfig(32, 16, 32, 1, 2, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="have no untied heads, q/k norm, sliding windows or rope_scaling"):
        peers.build(config)


# ---- counts


@pytest.mark.parametrize(
    ("name", "shape", "work"),
    [
        ("matmul", (2, 3, 5), [60, 60, 60]),
        ("flash_attention", (4, 2, 8), [2 * 16 * 2 * 8, 7 * 16 * 2 * 8]),
        ("linear_logprob", (2, 8, 5), [480, 480]),
        ("rms_norm", (2, 16), [256, 384]),
        ("swiglu", (2, 16), [384, 640]),
        ("adamw", (10,), [280]),
        ("total", (2, 3), [24, 24, 24]),
    ],
)
def test_work_by_hand(name: str, shape: tuple[int, ...], work: list[int]) -> None:
    assert [case.work for case in kernels.KERNELS[name][0](*shape)] == work


def test_model_flops_by_hand() -> None:
    parameters = Model(TINY_GPT2.config).params.numel()
    embeddings = (97 + 16) * 48
    block = 4 * 48 + (48 * 144 + 144) + (48 * 48 + 48) + (48 * 192 + 192) + (192 * 48 + 48)
    assert parameters == embeddings + 2 * block + 2 * 48
    by_hand = (6 * parameters + 6 * 2 * 48 * 16) * 3 * 16
    assert train.model_flops(TINY_GPT2.config, parameters, 3, 16) == by_hand


def test_gpt2_and_smollm2_have_their_published_sizes() -> None:
    def size(config: Any) -> int:
        return _core.Transformer(config.core_fields("lm")).size

    assert size(train.GPT2_124M) == 124_439_808
    assert size(train.SMOLLM2_135M) == 134_515_008
    assert round(size(train.SMALL_12M) / 1e6) == 12


# ---- ceilings and measuring


def test_ceilings_are_positive_and_name_bad_arguments() -> None:
    assert _core.fma_peak(1, 1e-3) > 0 and _core.fma_peak(2, 1e-3) > 0
    assert _core.read_bandwidth(torch.ones(2**14), 2, 1e-3) > 0
    with pytest.raises(ValueError, match="threads must be at least 1, but it is 0"):
        _core.fma_peak(0)
    with pytest.raises(ValueError, match="seconds must lie in"):
        _core.fma_peak(1, 0.0)
    with pytest.raises(ValueError, match="x must have at least 1024 elements, but it has 8"):
        _core.read_bandwidth(torch.ones(8), 1)
    with pytest.raises(ValueError, match="argument 'x' must be float32, but it is float64"):
        _core.read_bandwidth(torch.ones(1024, dtype=torch.float64), 1)


def test_contenders_and_ceilings_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    peaks = iter([100.0, 200.0, 100.0, 200.0, 100.0])

    def gauge(*_: Any) -> Any:
        def ceiling() -> float:
            order.append("ceiling")
            return next(peaks)

        return ceiling

    def contender(name: str) -> Any:
        def run() -> tuple[torch.Tensor, ...]:
            order.append(name)
            return ()

        return run

    clock = iter(range(10**6))
    monkeypatch.setattr(measure, "gauge", gauge)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))  # every timing: 1 s
    case = Case("k", "p", "s", "GFLOP/s", 75e9, {"ours": contender("ours"), "torch": contender("torch")})
    m = measure.measure(case, Plan(rounds=2, seconds=0.1, settle=0), 1)
    assert order == ["ours", "torch", "ceiling"] + ["ours", "ceiling", "torch", "ceiling"] * 2
    assert m.rates["ours"].median == 75 and m.fractions["ours"] == measure.Spread(0.5, 0.5, 0.5)
    assert m.ratios == {"torch": measure.Spread(1, 1, 1)}
    assert m.ceiling == measure.Spread(100, 100, 200)


def test_work_is_repeated_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    runs = 0

    def run() -> None:
        nonlocal now, runs
        runs += 1
        now += 0.03

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    assert measure.runs_per_second(run, 0.2) == pytest.approx(1 / 0.03) and runs == 7
    assert measure.runs_per_second(run, 0.01) == pytest.approx(1 / 0.03) and runs == 8


def test_spread() -> None:
    assert measure.Spread.of([3.0, 1.0, 2.0]) == measure.Spread(1.0, 2.0, 3.0)
    assert measure.Spread(1.0, 2.0, 3.0).scaled(2) == measure.Spread(2.0, 4.0, 6.0)
    with pytest.raises(ValueError, match="there must be at least 1 round to measure, but there are 0"):
        Plan(rounds=0)


# ---- memory


def hungry(mebibytes: int) -> Any:
    held = torch.ones(2**23)  # 32 MiB that do not count
    return lambda: (torch.ones(mebibytes * 2**18), held)


def failing() -> Any:
    raise ValueError("this cannot be measured")


def test_peak_memory_of_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(hungry, "__module__", "test_bench")
    here = torch.ones(2**26)  # 256 MiB in this process must not count in the other
    # Linux counts pages a thread and a few dozen at a time, hence not exactly 64.
    assert 60 < memory.peak_bytes(hungry, 64, threads=1) / 2**20 < 64 + 24
    assert here.numel() == 2**26
    monkeypatch.setattr(failing, "__module__", "test_bench")
    with pytest.raises(RuntimeError, match=r"(?s)test_bench:failing failed.*this cannot be measured"):
        memory.peak_bytes(failing, threads=1)


@pytest.mark.parametrize("contender", ["ours", "torch"])
def test_what_the_other_process_runs(contender: str) -> None:
    arguments = json.loads(json.dumps([contender, TINY_LLAMA.config.to_dict(), 3, 16]))
    train.two_steps(*arguments)()
    loss, *gradients = kernels.head_step("kept" if contender == "ours" else contender, 17, 24, 301)()
    assert loss > 0 and [g.shape for g in gradients] == [(17, 24), (301, 24)]


# ---- the commands


def check(result: dict[str, Any], printed: str) -> None:
    assert json.loads(printed.splitlines()[-1]) == result
    for unit in ("GFLOP/s", "GB/s"):
        assert all(value > 0 for value in result["ceilings"][unit].values())
    assert result["level"] == _core.active_level() and result["threads"] == torch.get_num_threads()
    for row in result["results"]:
        assert row["ceiling"]["low"] > 0
        assert row["rates"].keys() == row["fractions"].keys() == {"ours", *row["ratios"]}
        for numbers in (*row["rates"].values(), *row["fractions"].values(), *row["ratios"].values()):
            assert 0 < numbers["low"] <= numbers["median"] <= numbers["high"] < math.inf


def test_bench_kernels(tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    result = bench.run(KernelsConfig(json=output))
    printed = capsys.readouterr().out
    check(result, printed)
    assert output.read_text() == printed.splitlines()[-1] + "\n"
    assert list(dict.fromkeys(row["kernel"] for row in result["results"])) == list(TINY)
    assert {row["phase"] for row in result["results"] if row["kernel"] == "matmul"} == {"forward", "dX", "dW"}
    extra = [row["extra"] for row in result["results"] if row["kernel"] == "linear_logprob"]
    assert extra == [{"peak MiB": {"ours": 4, "torch": 4}}] * 2


def test_bench_kernels_only_and_quick(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench.run(KernelsConfig(only=("gelu", "total"), quick=True))
    check(result, capsys.readouterr().out)
    assert {row["kernel"] for row in result["results"]} == {"gelu", "total"}


def test_bench_train(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench.run(TrainConfig())
    check(result, capsys.readouterr().out)
    for row, shape in zip(result["results"], (TINY_GPT2, TINY_LLAMA), strict=True):
        parameters = Model(shape.config).params.numel()
        flops = train.model_flops(shape.config, parameters, shape.sequences, shape.length)
        for name in ("ours", "torch"):
            tokens_per_second = row["extra"]["tokens/s"][name]["median"]
            flops_per_second = tokens_per_second / (shape.sequences * shape.length) * flops
            assert flops_per_second == pytest.approx(1e9 * row["rates"][name]["median"])
        assert row["extra"]["peak GiB"] == {"ours": 4 / 1024, "torch": 4 / 1024}


def test_bench_train_without_peers(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench.run(TrainConfig(shapes=("llama",), peers=False, memory=False))
    check(result, capsys.readouterr().out)
    (row,) = result["results"]
    assert row["shape"] == "llama" and row["ratios"] == {} and "peak GiB" not in row["extra"]


class FakeLlamaCpp:
    """Where the peer itself is not installed: whether the file is there, and how it is asked."""

    def __init__(self, path: Path, batch: int, context: int, threads: int) -> None:
        assert path.stat().st_size > 1000 and context == 194 and threads == torch.get_num_threads()
        self.batch = batch

    def __enter__(self) -> FakeLlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def rate(self, prompts: list[list[int]], new_tokens: int, seconds: float, least: int) -> float:
        assert (len(prompts), len(prompts[0]), new_tokens, seconds) == (self.batch, 64, 128, 0.01)
        return 2.0


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_gguf_of_the_same_weights(kind: str, tmp_path: Path) -> None:
    model = Model(dataclasses.replace(TINY_LLAMA.config, num_attention_heads=4, num_key_value_heads=2, head_dim=8), seed=2)
    llama_cpp.write_gguf(model, tmp_path / "m.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    ours = dict(model.named_parameters())
    assert len(tensors) == len(ours)
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    assert torch.equal(tensors["output_norm.weight"], ours["model.norm.weight"])
    down = ours["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(tensors["blk.1.ffn_down.weight"], down.to(stored).float())
    # Feature i of a head's first half stands beside its partner i + 4: rows 0, 4, 1, 5, 2, 6, 3, 7
    for name, theirs in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        rows = ours[f"model.layers.0.self_attn.{name}.weight"].to(stored).float()
        assert torch.equal(tensors[f"blk.0.{theirs}.weight"][8:16], rows[8:16][[0, 4, 1, 5, 2, 6, 3, 7]])
    assert int(reader.fields["llama.attention.head_count_kv"].contents()) == 2


def test_bench_rollout(tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "SMOLLM2_135M", dataclasses.replace(TINY_LLAMA.config, max_position_embeddings=1024))
    monkeypatch.setattr(rollout, "WINDOW_SECONDS", 0.01)
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "LlamaCpp", FakeLlamaCpp)
    line = bench.run(RolloutConfig(batch=(1, 3), rounds=2, lora_rank=2))
    check(line, capsys.readouterr().out)
    cases = [(m["phase"], m["shape"], m["unit"]) for m in line["results"]]
    assert cases == [
        (phase, f"{what} {weights}", unit)
        for weights in ("float32", "bfloat16")
        for phase, what, unit in (
            ("prefill", "4x512", "GFLOP/s"),
            ("decode", "batch 1", "tokens/s"),
            ("decode", "batch 3", "tokens/s"),
        )
    ]
    for m in line["results"]:
        half = m["shape"].endswith("bfloat16")
        llama = {"llama.cpp F16", "llama.cpp BF16"} if half else {"llama.cpp F32"}
        peers = {"transformers", "adapter of rank 2", *llama}
        assert set(m["ratios"]) == (peers if m["phase"] == "decode" else set())
        assert m["rates"]["ours"]["median"] > 0 and m["fractions"]["ours"]["median"] > 0
    with pytest.raises(ValueError, match=r"each at least 1, but it is \(0,\)"):
        bench.run(RolloutConfig(batch=(0,)))


def test_work_of_a_decoding_step_by_hand() -> None:
    model = Model(rollout.SMOLLM2_135M)
    # 30 layers x (576 x 960 + 576 x 576 + 3 x 576 x 1536) + 49152 x 576 weights; 9 heads of 64, 3 of keys and values
    weights = 30 * (576 * 960 + 576 * 576 + 3 * 576 * 1536) + 49152 * 576
    assert rollout.flops_of_token(model, 100) == 2 * weights + 4 * 30 * 9 * 64 * 100
    assert rollout.bytes_of_step(model, 8, 100) == 4 * weights + 8 * 100 * 30 * 2 * 3 * 64 * 4


# ---- the loops


@pytest.mark.parametrize("loop", TINY_LOOPS)
def test_rows_of_the_loops_have_the_tokens_that_are_counted(loop: str, tmp_path: Path) -> None:
    shape = TINY_LOOPS[loop]
    loops.write_material(tmp_path, loop, shape)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    if loop == "ppo":
        prompts = load_prompts(tmp_path / "rows.jsonl", tokenizer, shape.length, answer=shape.answer).examples
        assert [len(prompt.tokens) for prompt in prompts] == [shape.prompt] * shape.rows
        assert tokenizer.vocab_size == shape.config.vocab_size
        reward = Model.from_pretrained(tmp_path / "reward")
        assert reward.head == "scalar" and reward.params.numel() == Model(shape.config).params.numel() + 48
        return
    if loop == "sft":
        sequences = list(load_sft(tmp_path / "rows.jsonl", tokenizer, shape.length).examples)
    else:
        pairs = load_preferences(tmp_path / "rows.jsonl", tokenizer, shape.length).examples
        sequences = [sequence for pair in pairs for sequence in (pair.chosen, pair.rejected)]
    assert len(sequences) == shape.rows * loops.WIDTH[loop]
    for sequence in sequences:
        assert len(sequence.tokens) == shape.length and sequence.mask.sum() == shape.answer


def later(function: Any, seconds: float) -> Any:
    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments, **options)

    return slow


@pytest.mark.parametrize(
    ("loop", "owner", "name", "part"),
    [
        ("sft", Model, "score", {"forward"}),
        ("sft", model_module._Score, "backward", {"backward"}),
        ("sft", AdamW, "step", {"optimizer"}),
        ("sft", Batches, "take", {"other"}),
        ("ppo", Model, "score", {"forward", "score"}),
        ("ppo", Model, "values", {"forward", "score"}),
        ("ppo", model_module._Score, "backward", {"backward"}),
        ("ppo", model_module._Values, "backward", {"backward"}),
        ("ppo", AdamW, "grad_norm", {"optimizer"}),
        ("ppo", Model, "generate", {"rollout"}),
        ("ppo", Model, "free_caches", {"rollout"}),
        ("ppo", ppo_module, "advantages_of", {"other"}),
    ],
)
def test_a_slow_part_of_a_step_shows_as_itself(
    loop: str, owner: Any, name: str, part: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = TINY_LOOPS[loop]
    loops.write_material(tmp_path, loop, shape)
    slow = later(getattr(owner, name), 0.1)
    monkeypatch.setattr(owner, name, staticmethod(slow) if name == "backward" else slow)
    clock, steps = loops.Clock(lambda: (1.0, 1.0)), list[dict[str, float]]()

    def done(seconds: float) -> None:
        own = {name: clock.parts[name] for name in loops.PARTS[loop]}
        steps.append({**own, "other": seconds - sum(own.values())})

    loops.run_loop(loop, tmp_path, shape, 2, 8192, clock, done)
    assert len(steps) == 2 and clock.reference is None
    for parts in steps[1:]:  # the first one warms up
        assert {name for name, seconds in parts.items() if seconds > 0.1} == part  # of a model that takes a millisecond


def test_answers_of_ppo_have_their_full_length_and_old_logprobs_cost_a_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = TINY_LOOPS["ppo"]
    loops.write_material(tmp_path, "ppo", shape)
    monkeypatch.setattr(ppo_module, "stops", lambda *_: range(300))  # whatever is drawn would end an answer
    noted, told = list[dict[str, float]](), list[dict[str, float]]()
    log = Run.log
    monkeypatch.setattr(Run, "log", lambda self, *a, **k: (told.append(k), log(self, *a, **k)))
    slow = later(loops.token_logprobs, 0.2)
    monkeypatch.setattr(loops, "token_logprobs", slow)  # as the bench calls it, not the loop
    clock = loops.Clock(lambda: (1.0, 1.0))
    for again in (False, True):
        noted.clear()
        loops.run_loop(
            "ppo", tmp_path, shape, 2, 8192, clock, lambda seconds: noted.append({"step": seconds, **clock.parts}), again=again
        )
        assert all((loops.AGAIN in parts) == again and parts["step"] < 0.2 for parts in noted)
        assert not again or all(parts[loops.AGAIN] > 0.2 > parts["score"] for parts in noted)
        assert all(0 < parts["prefill"] + parts["decode"] < parts["rollout"] for parts in noted)
    for figures in told:
        assert figures["completions/min_length"] == figures["completions/max_length"] == shape.answer
        assert figures["val/ratio"] == 1.0
    assert told[:2] == told[2:]  # what is computed again changes nothing


def test_work_of_a_step_of_ppo_by_hand() -> None:
    shape = TINY_LOOPS["ppo"]
    work = loops.works("ppo", shape)
    lm, vocabulary = Model(shape.config).params.numel(), 300 * 48
    attention, tokens = 6 * 2 * 48 * 24, 4 * 24
    policy, critic = ((6 * n + attention) * tokens for n in (lm, lm - vocabulary + 48))
    policy -= 6 * vocabulary * 4 * 12  # prompts need no head
    assert work["forward"].amount * 3 == policy + critic and work["backward"].amount == 2 * work["forward"].amount
    assert work["score"].amount * 3 == policy + critic and work[loops.AGAIN].amount * 3 == policy
    assert work["optimizer"].amount == 32 * (2 * lm + 48)
    matrices = lm - 5 * 48  # without the norms
    prompts = 4 * 12 * (2 * (matrices - vocabulary) + 4 * 2 * 48 * 6) + 4 * 2 * vocabulary
    assert work["prefill"].amount == prompts
    # Behind 12 tokens in the first step and 22 in the last.
    read = 11 * rollout.bytes_of_step(Model(shape.config), 4, 17)
    decode = work["decode"]
    assert decode.amount == 4 * 11 and work["rollout"].amount == work["step"].amount == 4 * 12
    assert decode.limit(1e30, 1e9) == pytest.approx(1e-9 * read)
    assert decode.limit(1e9, 1e30) == pytest.approx(1e-9 * 4 * 11 * (2 * matrices + 4 * 2 * 48 * 17))
    assert work["rollout"].limit(1e9, 1e9) == pytest.approx(1e-9 * prompts + decode.limit(1e9, 1e9))
    parts = [work[part] for part in loops.PARTS["ppo"]]
    assert work["step"].limit(2e9, 1e9) == pytest.approx(sum(part.limit(2e9, 1e9) for part in parts))


class FakeTrainer:
    """Where TRL would take ten seconds to import: which one is asked for, and how often."""

    made: ClassVar[list[str]] = []
    steps: ClassVar[list[str]] = []

    def __init__(self, name: str, folder: Path, rows: Path, batch_size: int, max_length: int) -> None:
        assert len(rows.read_text().splitlines()) == batch_size and (folder / "model.safetensors").exists()
        self.name = name
        self.made.append(name)

    def seconds(self) -> float:
        self.steps.append(self.name)
        return 2.0


def patched() -> list[Any]:
    """What the clock is put around."""
    functions = [scored.__dict__["backward"] for scored in (model_module._Score, model_module._Values)]
    methods = [Model.score, Model.values, Model.generate, Model.free_caches, Generation.step, Run.steps, Run.update]
    return [*functions, *methods, ppo_module.gather]


def test_bench_loops(tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "installed", lambda: True)
    monkeypatch.setattr(trl, "offers", lambda name: True)
    monkeypatch.setattr(trl, "Trainer", FakeTrainer)
    FakeTrainer.made.clear()
    FakeTrainer.steps.clear()
    before = patched()
    line = bench.run(LoopsConfig(rounds=2))
    assert patched() == before
    check(line, capsys.readouterr().out)
    parts = ["step", "forward", "backward", "optimizer"]
    trying = ["step", "rollout", "score", *parts[1:], "prefill", "decode", "old log-probs again"]
    cases = [(m["kernel"], m["phase"], m["shape"]) for m in line["results"]]
    assert cases == (
        [("sft", part, "2x32") for part in parts]
        + [("dpo", part, "6x24") for part in (*parts, "reference")]
        + [("ppo", part, "4x24") for part in trying]
    )
    assert FakeTrainer.made == ["sft", "dpo", "dpo cached", "ppo"]
    # Two of each to warm up, in turn with ours.
    assert FakeTrainer.steps == ["sft"] * 4 + ["dpo", "dpo cached"] * 4 + ["ppo"] * 4
    for m in line["results"]:
        if m["phase"] == "old log-probs again":
            assert 0 < m["extra"].pop("% of the step")["saved"]["low"] < 100
        if m["phase"] != "step":
            assert m["ratios"] == m["extra"] == {}
            continue
        assert set(m["ratios"]) == set(loops.PEERS[m["kernel"]])
        shape = TINY_LOOPS[m["kernel"]]
        sequences = shape.rows * loops.WIDTH[m["kernel"]]
        flops = train.model_flops(shape.config, Model(shape.config).params.numel(), sequences, shape.length)
        flops -= 6 * 300 * 48 * sequences * shape.prompt
        amount = shape.rows * shape.answer if m["kernel"] == "ppo" else 1e-9 * flops
        assert m["rates"]["TRL"]["median"] == pytest.approx(amount / 2)
        assert m["ratios"]["TRL"]["median"] == pytest.approx(2 / m["extra"]["seconds"]["ours"]["median"], rel=0.5)
        shares = m["extra"]["% of the step"]
        assert all(share["low"] > 0 for share in shares.values())
        assert sum(share["low"] for share in shares.values()) <= 100 <= sum(share["high"] for share in shares.values())
        assert m["extra"]["peak GiB"]["ours"] == 5 / 1024


def test_bench_loops_alone(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    line = bench.run(LoopsConfig(loops=("dpo",), rounds=1, peers=False, memory=False, micro_batch_tokens=50))
    check(line, capsys.readouterr().out)
    assert [m["phase"] for m in line["results"]] == ["step", "forward", "backward", "optimizer", "reference"]
    assert line["results"][0]["ratios"] == {} and "peak GiB" not in line["results"][0]["extra"]
    with pytest.raises(ValueError, match="micro_batch_tokens must be at least 1, but it is 0"):
        bench.run(LoopsConfig(micro_batch_tokens=0))


def test_a_trl_without_a_ppo_trainer_is_said_and_no_error(
    tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "trl"
    (package / "experimental").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('not to be imported')")
    (tmp_path / "trl-1.16.0.dist-info").mkdir()
    (tmp_path / "trl-1.16.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.16.0\n")
    monkeypatch.delitem(sys.modules, "trl", raising=False)  # the real one, where another test has used it
    monkeypatch.syspath_prepend(str(tmp_path))
    assert trl.installed() and trl.offers("sft") and trl.offers("dpo cached") and not trl.offers("ppo")
    line = bench.run(LoopsConfig(loops=("ppo",), rounds=1, memory=False))
    printed = capsys.readouterr()
    check(line, printed.out)
    assert line["results"][0]["ratios"] == {}
    assert "TRL 1.16.0 has no trainer for ppo (the last with PPO is 1.12): ours is measured alone\n" in printed.err
    (package / "experimental" / "ppo").mkdir()
    assert trl.offers("ppo")


@pytest.mark.parametrize("loop", TINY_LOOPS)
def test_what_the_other_process_runs_of_the_loops(loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "Trainer", FakeTrainer)
    shape, steps = TINY_LOOPS[loop], list[int]()
    loops.write_material(tmp_path, loop, shape)
    fields = {**dataclasses.asdict(shape), "config": shape.config.to_dict()}
    arguments = json.loads(json.dumps([loop, fields, str(tmp_path), 8192]))
    log = Run.log
    monkeypatch.setattr(Run, "log", lambda self, *a, **k: (steps.append(self.step), log(self, *a, **k)))
    monkeypatch.setattr(Run, "_save", None)  # nothing is saved
    loops.two_steps("ours", *arguments)()
    assert steps == [1, 2]
    FakeTrainer.steps.clear()
    loops.two_steps("TRL", *arguments)()
    assert FakeTrainer.steps == [loop, loop]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"there is no kernel 'mamba' to measure; there are matmul, .*total"):
        bench.run(KernelsConfig(only=("mamba",)))
    with pytest.raises(ValueError, match=r"there is no shape 'gpt5' to train; there are gpt2-124m-4x64"):
        bench.run(TrainConfig(shapes=("gpt5",)))


def test_the_configurations_import_no_torch() -> None:
    code = "import sys; from tutelage.bench import KernelsConfig; KernelsConfig(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tutelage.bench import label

    monkeypatch.setattr(label, "SMOLLM2_135M", ModelConfig(64, 16, 32, 1, 2))
    output = tmp_path / "label.json"
    found = bench.run(bench.LabelConfig(items=40, rounds=5, folder=tmp_path, json=output))
    assert json.loads(output.read_text()) == json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert [*found["milliseconds"]] == [
        "open the file",
        "the page",
        "the session",
        "answer to next item",
        "answer to next item: 4 KiB synced",
        "the same while generating",
        "the same while generating: 4 KiB synced",
        "first paint (Chromium)",
        "key pressed to next item on the screen (Chromium)",
    ]
    for times in found["milliseconds"].values():
        assert 0 < times["low"] <= times["median"] <= times["p95"] <= times["high"]
    assert [path.name for path in tmp_path.iterdir()] == ["label.json"]
    monkeypatch.setattr(label, "_BROWSERS", ())
    fewer = bench.run(bench.LabelConfig(items=40, rounds=5, folder=tmp_path))
    assert [*fewer["milliseconds"]] == [*found["milliseconds"]][:-2]
    assert "no browser is measured: that takes `pip install playwright` and a Chromium" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there must be more than 15 items for 5 rounds, but items is 15"):
        bench.run(bench.LabelConfig(items=15, rounds=5))
