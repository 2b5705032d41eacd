"""Steps of the real loops, part by part: ``tutelage bench loops``.

The loops are what users run, `tutelage.train.sft.sft` and `tutelage.train.dpo.dpo`, on a folder and a file. Their parts are
timed from outside, by putting a clock around `Model.score`, its backward and `AdamW.step` while they run; "other" is the
rest of the step: Python, torch, data, logging. A checkpoint every `save_steps` steps is not part of a step.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tutelage import _core
from tutelage import model as model_module
from tutelage.config import ModelConfig
from tutelage.data.tokenizer import train_tokenizer
from tutelage.model import Model
from tutelage.optimizer import AdamW
from tutelage.train.configs import DpoConfig, SftConfig
from tutelage.train.dpo import dpo
from tutelage.train.run import Run
from tutelage.train.sft import sft

from . import LoopsConfig, trl
from .ceilings import Unit, gauge
from .measure import OURS, Measurement, Plan, Spread, report
from .memory import peak_bytes
from .train import SMOLLM2_135M, model_flops

FORWARD, BACKWARD, OPTIMIZER, REFERENCE = "forward", "backward", "optimizer", "reference"
PARTS = (FORWARD, BACKWARD, OPTIMIZER)

# The norm reads the gradient (4 bytes a parameter); AdamW reads gradient, parameter and two moments and writes three (28).
OPTIMIZER_BYTES = 32.0

WARM_UP = 2  # steps of each contender that do not count: memory that is touched for the first time is slow


@dataclass(frozen=True)
class LoopShape:
    """A model, and what one step reads."""

    config: ModelConfig
    rows: int
    """Of a step: sequences of sft, pairs of dpo."""
    length: int
    """Tokens of a sequence; a quarter of them is the prompt."""

    @property
    def prompt(self) -> int:
        return self.length // 4


SHAPES = {"sft": LoopShape(SMOLLM2_135M, 2, 512), "dpo": LoopShape(SMOLLM2_135M, 4, 256)}
WIDTH = {"sft": 1, "dpo": 2}  # sequences of a row
PEERS = {"sft": {"TRL": "sft"}, "dpo": {"TRL": "dpo", "TRL, reference cached": "dpo cached"}}


def run(config: LoopsConfig) -> dict[str, Any]:
    """``tutelage bench loops``; see :func:`tutelage.bench.run`."""
    if config.micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, but it is {config.micro_batch_tokens}")
    plan = Plan(rounds=config.rounds)
    return report("loops", plan, measurements(config, plan), config.json)


def measurements(config: LoopsConfig, plan: Plan) -> Iterator[Measurement]:
    """The whole step of each loop, its parts, and dpo's reference."""
    for loop in config.loops:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_material(folder, loop, SHAPES[loop])
            yield from _measured(config, plan, loop, folder)


# ---- what the loops read


def write_material(folder: Path, loop: str, shape: LoopShape) -> None:
    """A model, its tokenizer and the rows of one step; every byte is a token, so that lengths are known."""
    model = Model(shape.config)
    model.tokenizer = train_tokenizer([string.ascii_lowercase], 257)
    model.save_pretrained(folder)
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=tokens))

    answers = ("completion",) if loop == "sft" else ("chosen", "rejected")
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(shape.rows):
            row = {"prompt": text(shape.prompt)} | {name: text(shape.length - shape.prompt - 1) for name in answers}
            file.write(json.dumps(row) + "\n")  # each answer is followed by the end token


# ---- ours


class Enough(Exception):  # noqa: N818 (no error)
    """Ends a loop after the steps that were asked for, before it saves anything."""


@dataclass
class Clock:
    """Seconds of the parts of the step in progress, and of the reference's pass before the first one."""

    beside: Callable[[], float]
    """One sample of the FMA peak, for the reference."""
    parts: dict[str, float] = field(default_factory=dict)
    reference: tuple[float, float] | None = None
    """(seconds, FMA peak beside it)"""

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, with its time added to `part`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - begin

        return timed

    def scoring(self, score: Callable[..., Any]) -> Callable[..., Any]:
        """`Model.score`: a forward, or without gradient the reference's."""
        forward, reference = self.around(FORWARD, score), self.around(REFERENCE, score)

        def timed(*arguments: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():
                return forward(*arguments, **options)
            before = self.beside()
            result = reference(*arguments, **options)
            self.reference = self.parts[REFERENCE], statistics.mean((before, self.beside()))
            return result

        return timed


def run_loop(
    loop: str, folder: Path, shape: LoopShape, steps: int, micro_batch_tokens: int, clock: Clock, done: Callable[[float], None]
) -> None:
    """So many steps of the loop; `done` is told the seconds of each when it is over, and `clock` has its parts then."""
    original = Run.steps

    def counted(self: Run, last: int) -> Iterator[int]:
        for step in original(self, last):
            clock.parts.clear()
            begin = time.perf_counter()
            yield step
            done(time.perf_counter() - begin)
            if step == steps:
                raise Enough

    options: dict[str, Any] = {
        "model": str(folder),
        "data": (str(folder / "rows.jsonl"),),
        "eval_fraction": 0.0,
        "batch_size": shape.rows,
        "micro_batch_tokens": micro_batch_tokens,
        "max_steps": steps + 1,  # the last step saves
        "save_steps": steps + 1,
        "learning_rate": 1e-5,
        "plot": False,
    }
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(patch.object(Run, "steps", counted))
        stack.enter_context(patch.object(Model, "score", clock.scoring(Model.score)))
        backward = staticmethod(clock.around(BACKWARD, model_module._Score.backward))
        stack.enter_context(patch.object(model_module._Score, "backward", backward))
        stack.enter_context(patch.object(AdamW, "step", clock.around(OPTIMIZER, AdamW.step)))
        stack.enter_context(contextlib.suppress(Enough))
        if loop == "sft":
            sft(SftConfig(output_dir=output, overwrite=True, **options))
        else:
            dpo(DpoConfig(output_dir=output, overwrite=True, **options))


# ---- memory


def two_steps(name: str, loop: str, shape_fields: dict[str, Any], folder: str, micro_batch_tokens: int) -> Callable[[], None]:
    """For the peak of memory: the loop from its beginning, or TRL's trainer, and two steps of it."""
    shape = LoopShape(**{**shape_fields, "config": ModelConfig.from_dict(shape_fields["config"])})

    def ours() -> None:
        clock = Clock(lambda: 0.0)
        run_loop(loop, Path(folder), shape, 2, micro_batch_tokens, clock, lambda seconds: None)

    def theirs() -> None:
        trainer = _trainer(name, loop, Path(folder), shape)
        trainer.seconds()
        trainer.seconds()

    return ours if name == OURS else theirs


def _trainer(name: str, loop: str, folder: Path, shape: LoopShape) -> trl.Trainer:
    return trl.Trainer(PEERS[loop][name], folder, folder / "rows.jsonl", shape.rows, shape.length)


# ---- measuring


@dataclass
class Round:
    """A step of ours and what was measured beside it."""

    seconds: float
    parts: Mapping[str, float]
    flops_s: float
    peers: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> (seconds of its step, flops a second beside it)."""


def _rounds(
    config: LoopsConfig, plan: Plan, loop: str, folder: Path, peers: Sequence[str]
) -> tuple[list[Round], tuple[float, float] | None]:
    """Steps of ours and of the peers in turn, a sample of the FMA peak between any two; and the reference's pass."""
    shape = SHAPES[loop]
    peak = gauge("GFLOP/s", torch.get_num_threads(), plan.seconds)
    trainers = {name: _trainer(name, loop, folder, shape) for name in peers}
    clock, rounds, samples = Clock(peak), list[Round](), list[float]()

    def beside() -> float:
        """Takes another sample; the peak in flops a second as it was around what happened since the one before."""
        time.sleep(plan.settle)
        samples.append(1e9 * peak())
        time.sleep(plan.settle)
        return statistics.mean(samples[-2:])

    def done(seconds: float) -> None:
        own = Round(seconds, dict(clock.parts), beside())
        for name, trainer in trainers.items():
            own.peers[name] = trainer.seconds(), beside()
        rounds.append(own)

    run_loop(loop, folder, shape, WARM_UP + plan.rounds, config.micro_batch_tokens, clock, done)
    return rounds[WARM_UP:], clock.reference


def _measured(config: LoopsConfig, plan: Plan, loop: str, folder: Path) -> Iterator[Measurement]:
    shape, threads = SHAPES[loop], torch.get_num_threads()
    peers = list(PEERS[loop]) if config.peers and trl.installed() else []
    # Not between the steps: what it reads, 256 MiB, would push the loop's own memory out of the core's store, and the next
    # step would pay for fresh pages.
    read = gauge("GB/s", threads, plan.seconds)
    before = read()
    rounds, reference = _rounds(config, plan, loop, folder, peers)
    bytes_s = 1e9 * statistics.mean((before, read()))
    parameters = _core.Transformer(shape.config.core_fields("lm")).size
    flops = model_flops(shape.config, parameters, WIDTH[loop] * shape.rows, shape.length)
    what = f"{WIDTH[loop] * shape.rows}x{shape.length}"
    whole = _whole(loop, what, flops, rounds, peers)
    if config.memory:
        arguments = (loop, asdict(shape) | {"config": shape.config.to_dict()}, str(folder), config.micro_batch_tokens)
        whole.extra["peak GiB"] = {n: peak_bytes(two_steps, n, *arguments, threads=threads) / 2**30 for n in (OURS, *peers)}
    yield whole
    flops_s = [r.flops_s for r in rounds]
    cases: list[tuple[str, Unit, float, list[float]]] = [
        (FORWARD, "GFLOP/s", flops / 3, flops_s),
        (BACKWARD, "GFLOP/s", flops * 2 / 3, flops_s),
        (OPTIMIZER, "GB/s", OPTIMIZER_BYTES * parameters, [bytes_s] * len(rounds)),
    ]
    for part, unit, work, ceiling in cases:
        yield _part(loop, part, what, unit, work, [r.parts[part] for r in rounds], ceiling)
    if reference is not None:
        taken, peak = reference
        yield _part(loop, REFERENCE, what, "GFLOP/s", flops / 3, [taken], [1e9 * peak])


def _whole(loop: str, shape: str, flops: float, rounds: Sequence[Round], peers: Sequence[str]) -> Measurement:
    """The step, ours and the peers'; how much of ours each part takes; and its seconds."""
    seconds = {OURS: [r.seconds for r in rounds]} | {name: [r.peers[name][0] for r in rounds] for name in peers}
    ceilings = {OURS: [r.flops_s for r in rounds]} | {name: [r.peers[name][1] for r in rounds] for name in peers}
    shares = {part: [100 * r.parts[part] / r.seconds for r in rounds] for part in PARTS}
    shares["other"] = [100 - sum(each) for each in zip(*shares.values(), strict=True)]
    return Measurement(
        loop,
        "step",
        shape,
        "GFLOP/s",
        Spread.of([1e-9 * peak for peak in ceilings[OURS]]),
        {name: Spread.of([1e-9 * flops / s for s in taken]) for name, taken in seconds.items()},
        {name: _fractions(flops, taken, ceilings[name]) for name, taken in seconds.items()},
        {name: Spread.of([its / mine for its, mine in zip(seconds[name], seconds[OURS], strict=True)]) for name in peers},
        {
            "seconds": {name: Spread.of(taken) for name, taken in seconds.items()},
            "% of the step": {part: Spread.of(share) for part, share in shares.items()},
        },
    )


def _part(
    loop: str, part: str, shape: str, unit: Unit, work: float, seconds: Sequence[float], ceiling: Sequence[float]
) -> Measurement:
    return Measurement(
        loop,
        part,
        shape,
        unit,
        Spread.of([1e-9 * peak for peak in ceiling]),
        {OURS: Spread.of([1e-9 * work / s for s in seconds])},
        {OURS: _fractions(work, seconds, ceiling)},
        {},
        {},
    )


def _fractions(work: float, seconds: Sequence[float], ceiling: Sequence[float]) -> Spread:
    return Spread.of([work / s / peak for s, peak in zip(seconds, ceiling, strict=True)])
