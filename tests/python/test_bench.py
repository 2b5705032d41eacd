"""tutelage bench: contenders compute the same thing, counts are right, reports are whole."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tutelage import _core, bench
from tutelage.batch import pack
from tutelage.bench import (
    KernelsConfig,
    RolloutConfig,
    TrainConfig,
    ceilings,
    kernels,
    llama_cpp,
    measure,
    memory,
    peers,
    rollout,
    train,
)
from tutelage.bench.measure import Case, Plan
from tutelage.config import ModelConfig
from tutelage.model import Model

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


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands as they are, on shapes and samples that take no time."""
    monkeypatch.setattr(kernels, "KERNELS", {name: (kernels.KERNELS[name][0], [TINY[name]]) for name in TINY})
    monkeypatch.setattr(kernels, "QUICK", TINY_PLAN)
    monkeypatch.setattr(kernels, "Plan", lambda rounds: TINY_PLAN)
    monkeypatch.setattr(train, "SHAPES", {"gpt2": TINY_GPT2, "llama": TINY_LLAMA})
    monkeypatch.setattr(train, "Plan", lambda rounds: TINY_PLAN)
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**16)
    for module in (kernels, train):  # a process each; tested by itself below
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
    assert _core.read_bandwidth(2, 2**16, 1e-3) > 0
    with pytest.raises(ValueError, match="threads must be at least 1, but it is 0"):
        _core.fma_peak(0)
    with pytest.raises(ValueError, match="seconds must lie in"):
        _core.fma_peak(1, 0.0)
    with pytest.raises(ValueError, match="bytes must be at least 4096, but it is 8"):
        _core.read_bandwidth(1, 8)


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

    def rate(self, prompts: list[list[int]], new_tokens: int, seconds: float) -> float:
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
    line = bench.run(RolloutConfig(batch=(1, 3), rounds=2))
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
        assert set(m["ratios"]) == ({"transformers", *llama} if m["phase"] == "decode" else set())
        assert m["rates"]["ours"]["median"] > 0 and m["fractions"]["ours"]["median"] > 0
    with pytest.raises(ValueError, match=r"each at least 1, but it is \(0,\)"):
        bench.run(RolloutConfig(batch=(0,)))


def test_work_of_a_decoding_step_by_hand() -> None:
    model = Model(rollout.SMOLLM2_135M)
    # 30 layers x (576 x 960 + 576 x 576 + 3 x 576 x 1536) + 49152 x 576 weights; 9 heads of 64, 3 of keys and values
    weights = 30 * (576 * 960 + 576 * 576 + 3 * 576 * 1536) + 49152 * 576
    assert rollout.flops_of_token(model, 100) == 2 * weights + 4 * 30 * 9 * 64 * 100
    assert rollout.bytes_of_step(model, 8, 100) == 4 * weights + 8 * 100 * 30 * 2 * 3 * 64 * 4


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"there is no kernel 'mamba' to measure; there are matmul, .*total"):
        bench.run(KernelsConfig(only=("mamba",)))
    with pytest.raises(ValueError, match=r"there is no shape 'gpt5' to train; there are gpt2-124m-4x64"):
        bench.run(TrainConfig(shapes=("gpt5",)))


def test_the_configurations_import_no_torch() -> None:
    code = "import sys; from tutelage.bench import KernelsConfig; KernelsConfig(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
