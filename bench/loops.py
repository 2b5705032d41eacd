"""Steps of the real loops, part by part: ``tutelage bench loops``.

The loops are what users run, `tutelage.train.sft.sft`, `tutelage.train.dpo.dpo` and `tutelage.train.ppo.ppo`, on a folder
and a file. Their parts are timed from outside, by putting a clock around `Model.score`, `Model.values`, their backward,
`Model.generate` and `Run.update` while they run; "other" is the rest of the step: Python, torch, data, logging. A checkpoint
every `save_steps` steps is not part of a step.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from rich.console import Console

from tutelage import _core
from tutelage import model as model_module
from tutelage.config import ModelConfig
from tutelage.data.tokenizer import train_tokenizer
from tutelage.model import Model
from tutelage.rollouts import Generation
from tutelage.train import ppo as ppo_module
from tutelage.train.configs import DpoConfig, PpoConfig, SftConfig
from tutelage.train.dpo import dpo
from tutelage.train.experience import Episodes, gather, token_logprobs
from tutelage.train.run import Run
from tutelage.train.sft import sft

from . import LoopsConfig, trl
from .ceilings import gauge
from .measure import OURS, Measurement, Plan, Spread, report
from .memory import peak_bytes
from .rollout import bytes_of_step, flops_of_prompts, flops_of_token
from .train import SMOLLM2_135M, model_flops

FORWARD, BACKWARD, OPTIMIZER, REFERENCE = "forward", "backward", "optimizer", "reference"
ROLLOUT, PREFILL, DECODE, SCORE = "rollout", "prefill", "decode", "score"
AGAIN = "old log-probs again"
"""What a loop whose rollout is not exact has to do besides: the policy reads its own answers before it learns from them."""

LEARNING = (FORWARD, BACKWARD, OPTIMIZER)
PARTS = {"sft": LEARNING, "dpo": LEARNING, "ppo": (ROLLOUT, SCORE, *LEARNING)}
"""Into which a step falls, but for what is "other"."""

# The norm reads the gradient (4 bytes a parameter); AdamW reads gradient, parameter and two moments and writes three (28).
OPTIMIZER_BYTES = 32.0

WARM_UP = 2  # steps of each contender that do not count: memory that is touched for the first time is slow


@dataclass(frozen=True)
class LoopShape:
    """A model, and what one step reads."""

    config: ModelConfig
    rows: int
    """Of a step: sequences of sft, pairs of dpo, prompts of ppo."""
    length: int
    """Tokens of a sequence."""
    prompt: int
    """How many of them are the prompt."""

    @property
    def answer(self) -> int:
        return self.length - self.prompt


SHAPES = {
    "sft": LoopShape(SMOLLM2_135M, 2, 512, 128),
    "dpo": LoopShape(SMOLLM2_135M, 4, 256, 64),
    "ppo": LoopShape(SMOLLM2_135M, 8, 128, 64),
}
WIDTH = {"sft": 1, "dpo": 2, "ppo": 1}  # sequences of a row
ANSWERS: dict[str, tuple[str, ...]] = {"sft": ("completion",), "dpo": ("chosen", "rejected"), "ppo": ()}  # fields of a row
REWARD = "reward"  # folder of ppo's reward model
PEERS = {"sft": {"TRL": "sft"}, "dpo": {"TRL": "dpo", "TRL, reference cached": "dpo cached"}, "ppo": {"TRL": "ppo"}}


def run(config: LoopsConfig) -> dict[str, Any]:
    """``tutelage bench loops``; see :func:`tutelage.bench.run`."""
    if config.micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, but it is {config.micro_batch_tokens}")
    plan = Plan(rounds=config.rounds)
    return report("loops", plan, measurements(config, plan), config.json)


def measurements(config: LoopsConfig, plan: Plan) -> Iterator[Measurement]:
    """The whole step of each loop, its parts, dpo's reference, and what ppo need not do."""
    for loop in config.loops:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_material(folder, loop, SHAPES[loop])
            yield from _measured(config, plan, loop, folder)


# ---- what the loops read


def write_material(folder: Path, loop: str, shape: LoopShape) -> None:
    """A model, its tokenizer and the rows of one step; a letter is a token, so that lengths are known. For ppo also a reward
    model, in `folder / "reward"`."""
    ends = ["<|endoftext|>"]
    if loop == "ppo":  # every token that the model may draw has a text
        ends += [f"<{number}>" for number in range(shape.config.vocab_size - 257)]
    tokenizer = train_tokenizer([string.ascii_lowercase], 256 + len(ends), ends)
    model = Model(shape.config)
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    if loop == "ppo":
        model = Model(shape.config, seed=1, head="scalar")
        model.tokenizer = tokenizer
        model.save_pretrained(folder / REWARD)
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=tokens))

    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(shape.rows):
            row = {"prompt": text(shape.prompt)} | {name: text(shape.answer - 1) for name in ANSWERS[loop]}
            file.write(json.dumps(row) + "\n")  # each answer is followed by the end token


# ---- ours


Ceilings = tuple[float, float]
"""(flops a second, bytes a second)"""


def _mean(before: Ceilings, after: Ceilings) -> Ceilings:
    return (before[0] + after[0]) / 2, (before[1] + after[1]) / 2


class Enough(Exception):  # noqa: N818 (no error)
    """Ends a loop after the steps that were asked for, before it saves anything."""


@dataclass
class Clock:
    """Seconds of the parts of the step in progress, and of the reference's pass before the first one."""

    beside: Callable[[], Ceilings]
    """One sample of both ceilings, for the reference."""
    parts: dict[str, float] = field(default_factory=dict)
    reference: tuple[float, Ceilings] | None = None
    """(seconds, the ceilings beside it)"""

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, with its time added to `part`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - begin

        return timed

    def of_reference(self, score: Callable[..., Any]) -> Callable[..., Any]:
        """`Model.score` over all that dpo reads, with a sample of the ceilings before and after."""
        reference = self.around(REFERENCE, score)

        def timed(*arguments: Any, **options: Any) -> Any:
            before = self.beside()
            result = reference(*arguments, **options)
            self.reference = self.parts[REFERENCE], _mean(before, self.beside())
            return result

        return timed

    def stepping(self, step: Callable[[Generation], bool]) -> Callable[[Generation], bool]:
        """`Generation.step`: one that reads prompts, or one in which every sequence gets a token."""

        def timed(generation: Generation) -> bool:
            before, begin = generation.prefilled, time.perf_counter()
            result = step(generation)
            part = DECODE if generation.prefilled == before else PREFILL
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - begin
            return result

        return timed

    def scoring_again(self, collect: Callable[..., Episodes | None]) -> Callable[..., Episodes | None]:
        """`gather`, and then the policy's log-probs of the answers, computed as a loop must that has none or others."""

        def timed(run: Run, config: PpoConfig, model: Model, *arguments: Any) -> Episodes | None:
            answers = collect(run, config, model, *arguments)
            assert answers is not None  # a reward model scores every answer
            parts, begin = dict(self.parts), time.perf_counter()
            token_logprobs(model, answers.batch, config.micro_batch_tokens, config.temperature)
            self.parts = {**parts, AGAIN: time.perf_counter() - begin}  # no part of the step, and no "score"
            return answers

        return timed


def _graded(learning: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The first where gradients are kept, the second elsewhere."""
    return lambda *arguments, **options: (learning if torch.is_grad_enabled() else otherwise)(*arguments, **options)


def _to_the_end(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`Model.generate` with answers of full length: a model that knows nothing may draw the end token at any time."""
    return lambda *arguments, **options: generate(*arguments, **options, stop_token_ids=[])


def run_loop(
    loop: str,
    folder: Path,
    shape: LoopShape,
    steps: int,
    micro_batch_tokens: int,
    clock: Clock,
    done: Callable[[float], None],
    again: bool = False,
) -> None:
    """So many steps of the loop; `done` is told the seconds of each when it is over, and `clock` has its parts then.

    again: compute ppo's old log-probs again in each step, which `clock` has as AGAIN; the seconds are without it.
    """
    original = Run.steps

    def counted(self: Run, last: int) -> Iterator[int]:
        for step in original(self, last):
            clock.parts.clear()
            begin = time.perf_counter()
            yield step
            done(time.perf_counter() - begin - clock.parts.get(AGAIN, 0.0))
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
        "overwrite": True,
    }
    score, values = Model.score, Model.values
    ungraded = clock.of_reference(score) if loop == "dpo" else clock.around(SCORE, score)
    places: list[tuple[Any, str, Any]] = [
        (Run, "steps", counted),
        (Run, "update", clock.around(OPTIMIZER, Run.update)),
        (Model, "score", _graded(clock.around(FORWARD, score), ungraded)),
        (Model, "values", _graded(clock.around(FORWARD, values), clock.around(SCORE, values))),
        (Model, "generate", clock.around(ROLLOUT, _to_the_end(Model.generate))),
        (Model, "free_caches", clock.around(ROLLOUT, Model.free_caches)),
        (Generation, "step", clock.stepping(Generation.step)),
    ]
    for function in (model_module._Score, model_module._Values):
        places.append((function, "backward", staticmethod(clock.around(BACKWARD, function.backward))))
    if again:
        places.append((ppo_module, "gather", clock.scoring_again(gather)))
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for owner, name, timed in places:
            stack.enter_context(patch.object(owner, name, timed))
        stack.enter_context(contextlib.suppress(Enough))
        if loop == "sft":
            sft(SftConfig(output_dir=output, **options))
        elif loop == "dpo":
            dpo(DpoConfig(output_dir=output, **options))
        else:
            reward = str(folder / REWARD)
            ppo_module.ppo(PpoConfig(output_dir=output, reward_model=reward, max_completion_length=shape.answer, **options))


# ---- memory


def two_steps(name: str, loop: str, shape_fields: dict[str, Any], folder: str, micro_batch_tokens: int) -> Callable[[], None]:
    """For the peak of memory: the loop from its beginning, or TRL's trainer, and two steps of it."""
    shape = LoopShape(**{**shape_fields, "config": ModelConfig.from_dict(shape_fields["config"])})

    def ours() -> None:
        clock = Clock(lambda: (0.0, 0.0))
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
    """Without AGAIN."""
    parts: Mapping[str, float]
    ceilings: Ceilings
    """Beside it."""
    peers: dict[str, tuple[float, Ceilings]] = field(default_factory=dict)
    """Name -> (seconds of its step, the ceilings beside it)."""


def _rounds(
    config: LoopsConfig, plan: Plan, loop: str, folder: Path, peers: Sequence[str]
) -> tuple[list[Round], tuple[float, Ceilings] | None]:
    """Steps of ours and of the peers in turn, a sample of the ceilings between any two; and the reference's pass."""
    shape, threads = SHAPES[loop], torch.get_num_threads()
    peak, read = gauge("GFLOP/s", threads, plan.seconds), gauge("GB/s", threads, plan.seconds)
    trainers = {name: _trainer(name, loop, folder, shape) for name in peers}

    def sample() -> Ceilings:
        return 1e9 * peak(), 1e9 * read()

    clock, rounds, samples = Clock(sample), list[Round](), list[Ceilings]()

    def beside() -> Ceilings:
        """Takes another sample; the ceilings as they were around what happened since the one before."""
        time.sleep(plan.settle)
        samples.append(sample())
        time.sleep(plan.settle)
        return _mean(samples[-2], samples[-1]) if len(samples) > 1 else samples[-1]

    def done(seconds: float) -> None:
        own = Round(seconds, dict(clock.parts), beside())
        for name, trainer in trainers.items():
            own.peers[name] = trainer.seconds(), beside()
        rounds.append(own)

    run_loop(loop, folder, shape, WARM_UP + plan.rounds, config.micro_batch_tokens, clock, done, again=loop == "ppo")
    return rounds[WARM_UP:], clock.reference


def _peers(loop: str) -> list[str]:
    """Those of TRL's trainers that the TRL at hand has; says so where it has none."""
    if not trl.installed():
        return []
    offered = [name for name, trainer in PEERS[loop].items() if trl.offers(trainer)]
    if not offered:
        told = f"TRL {trl.version()} has no trainer for {loop} (the last with PPO is 1.12): ours is measured alone"
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)
    return offered


@dataclass(frozen=True)
class Work:
    """What is done in a step, or a part of it.

    Args:
        unit: of the rates.
        amount: flops, bytes or tokens.
        limit: (flops a second, bytes a second) -> seconds that it takes at least.
    """

    unit: Literal["GFLOP/s", "GB/s", "tokens/s"]
    amount: float
    limit: Callable[[float, float], float]

    @classmethod
    def of_flops(cls, flops: float) -> Work:
        return cls("GFLOP/s", flops, lambda flops_s, _: flops / flops_s)

    @classmethod
    def of_bytes(cls, count: float) -> Work:
        return cls("GB/s", count, lambda _, bytes_s: count / bytes_s)

    @classmethod
    def of_tokens(cls, tokens: int, parts: Sequence[Work]) -> Work:
        """So many tokens, made by all the parts one after the other."""
        return cls("tokens/s", tokens, lambda *ceilings: sum(part.limit(*ceilings) for part in parts))

    @classmethod
    def of_steps(cls, model: Model, batch: int, context: int, steps: int) -> Work:
        """Steps in each of which every sequence gets a token, in the first one behind `context` others."""
        average = context + (steps - 1) / 2
        flops, count = batch * flops_of_token(model, average), bytes_of_step(model, batch, average)
        return cls("tokens/s", batch * steps, lambda flops_s, bytes_s: steps * max(flops / flops_s, count / bytes_s))

    @property
    def scale(self) -> float:
        return 1.0 if self.unit == "tokens/s" else 1e-9


def works(loop: str, shape: LoopShape) -> dict[str, Work]:
    """The step, its parts, and what is measured beside them."""
    sequences = WIDTH[loop] * shape.rows
    size = {head: _core.Transformer(shape.config.core_fields(head)).size for head in ("lm", "scalar")}
    # The head works for the answers only.
    spared = 6.0 * shape.config.vocab_size * shape.config.hidden_size * sequences * shape.prompt
    flops = model_flops(shape.config, size["lm"], sequences, shape.length) - spared
    if loop != "ppo":
        return {
            "step": Work.of_flops(flops),
            FORWARD: Work.of_flops(flops / 3),
            BACKWARD: Work.of_flops(flops * 2 / 3),
            OPTIMIZER: Work.of_bytes(OPTIMIZER_BYTES * size["lm"]),
            REFERENCE: Work.of_flops(flops / 3),
        }
    # Of a model with a scalar head the embedding is looked up only: no product.
    products = size["scalar"] - shape.config.vocab_size * shape.config.hidden_size
    scalar = model_flops(shape.config, products, sequences, shape.length)
    model = Model(shape.config)
    prefill = Work.of_flops(flops_of_prompts(model, shape.rows, shape.prompt))
    decode = Work.of_steps(model, shape.rows, shape.prompt, shape.answer - 1)  # reading the prompts gives the first token
    parts = {
        ROLLOUT: Work.of_tokens(shape.rows * shape.answer, [prefill, decode]),
        SCORE: Work.of_flops((flops + scalar) / 3),  # reference and reward model; the critic's is the update's own
        FORWARD: Work.of_flops((flops + scalar) / 3),
        BACKWARD: Work.of_flops((flops + scalar) * 2 / 3),
        OPTIMIZER: Work.of_bytes(OPTIMIZER_BYTES * (size["lm"] + size["scalar"])),
    }
    whole = Work.of_tokens(shape.rows * shape.answer, list(parts.values()))
    return {"step": whole, **parts, PREFILL: prefill, DECODE: decode, AGAIN: Work.of_flops(flops / 3)}


def _measured(config: LoopsConfig, plan: Plan, loop: str, folder: Path) -> Iterator[Measurement]:
    shape, threads = SHAPES[loop], torch.get_num_threads()
    peers = _peers(loop) if config.peers else []
    rounds, reference = _rounds(config, plan, loop, folder, peers)
    what = f"{WIDTH[loop] * shape.rows}x{shape.length}"
    work = works(loop, shape)
    whole = _whole(loop, what, work["step"], rounds, peers)
    if config.memory:
        arguments = (loop, asdict(shape) | {"config": shape.config.to_dict()}, str(folder), config.micro_batch_tokens)
        whole.extra["peak GiB"] = {n: peak_bytes(two_steps, n, *arguments, threads=threads) / 2**30 for n in (OURS, *peers)}
    yield whole
    for part in (*PARTS[loop], *((PREFILL, DECODE, AGAIN) if loop == "ppo" else ())):
        ceilings = [r.ceilings for r in rounds]
        extra = {} if part != AGAIN else {"% of the step": {"saved": _shares(rounds, part)}}
        yield _part(loop, part, what, work[part], [r.parts[part] for r in rounds], ceilings, extra)
    if reference is not None:
        taken, limits = reference
        yield _part(loop, REFERENCE, what, work[REFERENCE], [taken], [limits], {})


def _whole(loop: str, shape: str, work: Work, rounds: Sequence[Round], peers: Sequence[str]) -> Measurement:
    """The step, ours and the peers'; how much of ours each part takes; and its seconds."""
    seconds = {OURS: [r.seconds for r in rounds]} | {name: [r.peers[name][0] for r in rounds] for name in peers}
    limits = {OURS: [r.ceilings for r in rounds]} | {name: [r.peers[name][1] for r in rounds] for name in peers}
    each = {name: _part(loop, "step", shape, work, seconds[name], limits[name], {}) for name in seconds}
    shares = {part: _shares(rounds, part) for part in PARTS[loop]}
    rest = [100 - sum(100 * r.parts[part] / r.seconds for part in PARTS[loop]) for r in rounds]
    return Measurement(
        loop,
        "step",
        shape,
        work.unit,
        each[OURS].ceiling,
        {name: m.rates[OURS] for name, m in each.items()},
        {name: m.fractions[OURS] for name, m in each.items()},
        {name: Spread.of([its / mine for its, mine in zip(seconds[name], seconds[OURS], strict=True)]) for name in peers},
        {
            "seconds": {name: Spread.of(taken) for name, taken in seconds.items()},
            "% of the step": {**shares, "other": Spread.of(rest)},
        },
    )


def _shares(rounds: Sequence[Round], part: str) -> Spread:
    """The part's seconds in percent of the step's."""
    return Spread.of([100 * r.parts[part] / r.seconds for r in rounds])


def _part(
    loop: str,
    part: str,
    shape: str,
    work: Work,
    seconds: Sequence[float],
    ceilings: Sequence[Ceilings],
    extra: dict[str, dict[str, Any]],
) -> Measurement:
    """Ours alone. ceilings: beside each of the seconds."""
    limits = [work.limit(*ceiling) for ceiling in ceilings]
    amount = work.scale * work.amount
    return Measurement(
        loop,
        part,
        shape,
        work.unit,
        Spread.of([amount / limit for limit in limits]),
        {OURS: Spread.of([amount / s for s in seconds])},
        {OURS: Spread.of([limit / s for limit, s in zip(limits, seconds, strict=True)])},
        {},
        extra,
    )
