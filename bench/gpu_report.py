"""Everything that is to be known of a GPU, in one run of under eight minutes: `python -m tutelage.bench.gpu_report`.

Checks the kernels against float64, whole models against theirs in float64, and the promises bit for bit; times the kernels, a
training step and generation. Writes report.json and report.txt into --output and prints the table. What time does not
suffice for is left out, and named. The exit status is 1 where something is wrong.

    --device cuda-sim runs all checks on the emulator, at small shapes, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tutelage import AdamW, Model, ModelConfig, devices, objectives, pack
from tutelage.files import write_file_atomic

from . import gpu
from .train import SMOLLM2_135M, model_flops

SECONDS = 450.0
SMALL = {
    "llama": ModelConfig(275, 64, 96, 2, 4, num_key_value_heads=2, max_position_embeddings=640),
    "gpt2": ModelConfig(
        275,
        64,
        96,
        2,
        4,
        max_position_embeddings=640,
        norm="layernorm",
        position="learned",
        mlp="gelu",
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
}


@dataclass
class Report:
    """What has come out so far.

    Attributes:
        failures: one sentence each. left_out: what there was no time for.
    """

    environment: dict[str, Any]
    checks: list[str] = field(default_factory=list)
    kernels: list[gpu.Result] = field(default_factory=list)
    speeds: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def model_on(kind: str, device: str, head: Any = "lm") -> Model:
    """A model whose attention and logits are far from uniform."""
    model = Model(SMALL[kind], head=head)
    with torch.no_grad():
        model.params += 0.1 * torch.randn(model.params.numel(), generator=torch.Generator().manual_seed(1))
    return model.to(device)


def _bits(*tensors: Tensor) -> bytes:
    return b"".join(x.detach().cpu().contiguous().numpy().tobytes() for x in tensors)


def _sequences(lengths: list[int], vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def _each(model: Model, seqs: list[list[int]]) -> list[bytes]:
    """The bits of every sequence of one batch."""
    batch = pack(seqs)
    with torch.no_grad():
        out = model.score(batch)
    parts = zip(*(torch.split(x, batch.lengths) for x in (out.logprobs, out.entropy)), strict=True)
    return [_bits(logprobs, entropies) for logprobs, entropies in parts]


def _grads(model: Model, seqs: list[list[int]], cuts: list[tuple[int, int]]) -> bytes:
    model.zero_grad()
    for first, last in cuts:
        out = model.score(pack(seqs[first:last]))
        torch.autograd.backward([out.logprobs.sum() + 0.1 * out.entropy.sum()])
    return _bits(model.grads)


def model_checks(kind: str, device: str, long: bool) -> Iterator[tuple[str, bool]]:
    """(what must hold, whether it does), one after the other. long: at lengths of several tiles."""
    model = model_on(kind, device)
    vocab = model.config.vocab_size
    seqs = _sequences([200, 1, 513, 64, 2, 129] if long else [9, 1, 21, 2], vocab)
    whole, back = _each(model, seqs), _each(model, seqs[::-1])[::-1]
    alone = [_each(model, [seq])[0] for seq in seqs]
    yield f"{kind}: a sequence has the same bits alone, in a batch, and in another order (P1)", whole == alone == back

    every = [(0, len(seqs))]
    expected = _grads(model, seqs, every)
    cut = _grads(model, seqs, [(0, 1), (1, 3), (3, len(seqs))])
    yield f"{kind}: gradients do not depend on micro-batches (P4)", cut == expected
    other = _grads(model, seqs, [(1, len(seqs)), (0, 1)])
    yield f"{kind}: but on their order, so the comparison sees something", other != expected
    model.recompute, model.logits_budget = True, 0
    yield f"{kind}: blocks and logits computed again have the same bits", _grads(model, seqs, every) == expected
    model.recompute, model.logits_budget = False, 2**28

    prompts = _sequences([1, 130, 511, 40] if long else [1, 20, 6], vocab)
    made = model.generate(prompts, 4, temperature=0.7, seed=3, stop_token_ids=())
    batch = made.pack()
    with torch.no_grad():
        scored = model.score(batch, temperature=0.7).logprobs
    assert batch.logprobs is not None
    mask = batch.completion_mask
    yield f"{kind}: generation has the bits of score (P2)", _bits(scored[mask]) == _bits(batch.logprobs[mask])
    chunks = model.generate(prompts, 4, temperature=0.7, seed=3, stop_token_ids=(), prefill_chunk=7, share_prefixes=False)
    same = _bits(*chunks.tokens, *chunks.logprobs) == _bits(*made.tokens, *made.logprobs)
    yield f"{kind}: chunks of prompts change no bit (P3)", same

    # With the head's matrix zero all logits are equal, and what is left of a draw is the noise.
    cpu = model_on(kind, "cpu")
    with torch.no_grad():
        dict(cpu.named_parameters())["lm_head.weight" if kind == "llama" else "transformer.wte.weight"].zero_()
    ours, theirs = (m.generate(prompts[:1], 20, seed=1, stop_token_ids=()) for m in (cpu.to(device), cpu))
    yield f"{kind}: the noise of draws is the CPU's, bit for bit", _bits(*ours.tokens) == _bits(*theirs.tokens)

    cpu, truth, rounded = model_on(kind, "cpu"), model_on(kind, "cpu").double(), model_on(kind, "cpu").double()
    with torch.no_grad():
        rounded.params.copy_(cpu.params.bfloat16())
        mine, exact, base = (m.score(pack(seqs)).logprobs.double() for m in (model, truth, rounded))
    error, allowed = float((mine - exact).square().mean().sqrt()), float((base - exact).square().mean().sqrt())
    yield (
        f"{kind}: log-probs are {error / allowed:.2f} times as far off as rounded weights alone; at most 4",
        error <= 4 * allowed,
    )

    twin, optimizers = cpu.to(device), []
    cpu_grads = torch.randn(cpu.params.numel(), generator=torch.Generator().manual_seed(5))
    for one in (cpu, twin):
        one.grads.copy_(cpu_grads)
        optimizers.append(AdamW(one, 1e-2, weight_decay=0.1))
        optimizers[-1].step()
    yield f"{kind}: AdamW has the CPU's bits", _bits(cpu.params) == _bits(twin.params)


def training_speed(device: str, config: ModelConfig, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of forward, backward and AdamW, and the share of the peak that the model's flops are."""
    model = Model(config, device=device)
    optimizer = AdamW(model, 1e-4, max_grad_norm=1.0)
    data = pack(_sequences([length] * batch, config.vocab_size))
    tokens = int(data.completion_mask.sum())

    def step() -> None:
        optimizer.zero_grad()
        loss = objectives.cross_entropy(model.score(data).logprobs, data.completion_mask, denominator=tokens)
        torch.autograd.backward([loss])
        optimizer.step()  # waits: the gradient's norm comes to the host

    step()
    begin = time.perf_counter()
    for _ in range(rounds):
        step()
    seconds = (time.perf_counter() - begin) / rounds
    _, peak = gpu.clock(device)
    flops = model_flops(config, model.params.numel(), batch, length)
    return {
        "what": f"training step of {model.params.numel():,} parameters, {batch} × {length} tokens",
        "tokens/s": batch * length / seconds,
        "of the peak": None if peak is None else 1e-12 * flops / seconds / peak.tflops,
    }


def generation_speed(device: str, config: ModelConfig, batch: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of prompts of 64 tokens and what follows them."""
    model = Model(config, device=device)
    prompts = _sequences([64] * batch, config.vocab_size)
    model.generate(prompts, 2, stop_token_ids=())
    begin = time.perf_counter()
    model.generate(prompts, tokens, stop_token_ids=())
    seconds = time.perf_counter() - begin
    what = f"generation by {model.params.numel():,} parameters, {batch} at a time, {tokens} tokens"
    return {"what": what, "tokens/s": batch * tokens / seconds}


def make(device: str, seconds: float, say: Callable[[str], None]) -> Report:
    """The report; nothing new is begun after so many seconds."""
    devices.find(device)  # says why not, before anything else
    begin = time.monotonic()
    report = Report(gpu.environment(device))

    def time_for(what: str) -> bool:
        if time.monotonic() - begin < seconds:
            return True
        report.left_out.append(what)
        return False

    for kind in SMALL:
        if not time_for(f"the checks of {kind}"):
            continue
        try:
            for what, holds in model_checks(kind, device, long=device == "cuda"):
                say(f"{'holds' if holds else 'WRONG'}: {what}")
                (report.checks if holds else report.failures).append(what)
        except RuntimeError as error:  # of the device, or of a check that could not go on
            report.failures.append(f"the checks of {kind} ended early: {error}")
    timer, peak = gpu.clock(device)
    for case in gpu.cases(device):
        name = f"{case.kernel} {case.phase} {case.shape}"
        if not time_for(name):
            continue
        try:
            result = gpu.measure(case, timer, 15, peak)
        except (gpu.WrongResultError, RuntimeError) as error:
            say(f"WRONG: {error}")
            report.failures.append(f"{name}: {error}")
            continue
        report.kernels.append(result)
        say(f"{name}: {gpu.said(result)}")
    if device == "cuda":
        for batch, length in ((16, 1024), (2, 512)):
            if time_for(f"the training step of {batch} × {length} tokens"):
                report.speeds.append(training_speed(device, SMOLLM2_135M, batch, length, 5))
        for batch in (1, 32, 256):
            if time_for(f"generation of {batch} at a time"):
                report.speeds.append(generation_speed(device, SMOLLM2_135M, batch, 64))
    return report


def tables(report: Report) -> list[Table]:
    """Of kernels and of speeds."""
    speeds = Table("what", "tokens/s", "of the peak")
    for speed in report.speeds:
        share = speed.get("of the peak")
        speeds.add_row(speed["what"], f"{speed['tokens/s']:,.0f}", "" if share is None else f"{share:.2f}")
    return [gpu.table(report.kernels), *([speeds] if report.speeds else [])]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cuda-sim"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="folder for report.json and report.txt")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin nothing new after so many seconds")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        report = make(options.device, options.seconds, lambda line: console.print(line, highlight=False, markup=False))
    except ValueError as error:
        console.print(str(error), highlight=False, markup=False)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    text = Console(record=True, width=160, file=(options.output / "report.txt").open("w", encoding="utf-8"))
    for printer in (text, Console(width=160)):
        printer.print(", ".join(f"{name} {value}" for name, value in report.environment.items()), markup=False)
        for table in tables(report):
            printer.print(table)
        printer.print(f"{len(report.checks)} checks hold, {len(report.failures)} things are wrong")
        for line in (*report.failures, *(f"left out for want of time: {what}" for what in report.left_out)):
            printer.print(line, markup=False)
    text.file.close()
    write_file_atomic(options.output / "report.json", f"{json.dumps(asdict(report), indent=1)}\n".encode())
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
