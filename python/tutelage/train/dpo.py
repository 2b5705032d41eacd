"""Learning from preferences without a reward model: DPO, cDPO, IPO, SimPO, KTO, and ORPO, which is the same loop with
another loss and no reference.

Rafailov et al. 2023 (arXiv 2305.18290) and the papers that `objectives` names. The log-probs of the reference are
computed once, before the first step. Where the reference is the model that training starts from, they are the bits that
the model itself gives then: at step 0 every margin is exactly 0, and DPO's loss of a pair log 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tutelage import kernels, objectives
from tutelage.batch import PackedBatch
from tutelage.data.examples import Batches, Example, ExampleSet, Preference, Unpaired, load_preferences, load_unpaired
from tutelage.data.packing import Cursor
from tutelage.data.tokenizer import Tokenizer
from tutelage.files import DISK, Disk
from tutelage.model import Model
from tutelage.objectives import load_objective
from tutelage.train.configs import DpoConfig, OrpoConfig
from tutelage.train.reference import load_reference, logps, reference_logps
from tutelage.train.run import Run, ignore, learning_rate, open_run
from tutelage.train.tuning import (
    Best,
    TuningResult,
    UserObjective,
    base_model,
    before,
    check_rows,
    check_same,
    checked,
    columns_of,
    conclude,
    content,
    packed,
    save,
    size,
    split,
    stops,
)

RESERVED = ("denominator", "ref_chosen", "ref_rejected", "margin", "ref_logps", "desirable", "z0")
"""Columns that an objective gets besides the rows' own fields, see `dpo`."""

Config = DpoConfig | OrpoConfig
Row = Preference | Unpaired
Item = TypeVar("Item", Preference, Unpaired)


@dataclass(frozen=True)
class PreferenceResult(TuningResult):
    """What a finished run has come to. Losses are those of the loss_type."""

    eval_accuracy: float | None
    """Share of the held-out pairs of which the model in `folder` gives the chosen answer the higher reward; None where
    nothing is held out, and for kto."""


def dpo(
    config: DpoConfig,
    objective: UserObjective | None = None,
    *,
    disk: Disk = DISK,
    fault: Callable[[str], None] = ignore,
) -> PreferenceResult:
    """Trains the model as `config` says and saves it in output_dir/model.

    KTO's z0 is that of the whole step. Its mismatched pairs are each prompt with the completion of the nearest row before it
    that has another prompt, cut to max_length (TRL: of the row before it in the batch, whatever its prompt).

    objective: a loss of the caller's own, in the place of config.objective; what is held out is measured by loss_type. The
        sequences of its batch are chosen, rejected, chosen, rejected, …; of kto one completion after the other. Its columns:
        "denominator" (pairs, or completions, of the whole step); of pairs "margin" (a list, None where a row has none) and
        "ref_chosen", "ref_rejected" (float32 [P], sums over a completion; not for simpo and orpo); of kto "ref_logps"
        (float32 [P]), "desirable" (bool [P]), "z0"; and the other fields of the rows.
    disk, fault: for tests, see `open_run`.

    Raises as `open_run`, `load_objective`, `Model.from_pretrained`, `load_preferences` or `load_unpaired`,
    `reference_logps`, `Run.start` and `Run.accumulate`; ValueError for a folder that holds no language model with a
    tokenizer, a reference of another vocabulary or shorter context, a pair that does not fit into micro_batch_tokens, kto
    on a single prompt, and an objective that returns no scalar with a gradient.
    """
    if config.loss_type == "kto":
        return _learn(config, "dpo", load_unpaired, objective, disk, fault)
    return _learn(config, "dpo", load_preferences, objective, disk, fault)


def orpo(
    config: OrpoConfig,
    objective: UserObjective | None = None,
    *,
    disk: Disk = DISK,
    fault: Callable[[str], None] = ignore,
) -> PreferenceResult:
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691); otherwise as `dpo`."""
    return _learn(config, "orpo", load_preferences, objective, disk, fault)


def _learn(
    config: Config,
    command: str,
    load: Callable[..., ExampleSet[Item]],
    objective: UserObjective | None,
    disk: Disk,
    fault: Callable[[str], None],
) -> PreferenceResult:
    if not config.data:
        raise ValueError(f"there is nothing to learn from; pass preferences, as in `tutelage {command} --data rows.jsonl`")
    if objective is None and config.objective is not None:
        objective = load_objective(config.objective)
    with open_run(config, disk, fault) as run:
        model, tokenizer = base_model(config)
        examples, held_out = _examples(run, config, load, model, tokenizer, objective is not None)
        data = Batches(examples, config.seed)
        fingerprint, base = f"{data.fingerprint} {held_out.fingerprint}", content(model)
        reference = _Reference(run, config, model, examples.examples, held_out.examples, disk)
        model.eos_token_ids = stops(model, tokenizer, examples)
        optimizer = run.optimizer(model, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
        last = config.max_steps or math.ceil(config.num_train_epochs * len(data) / config.batch_size)
        run.say(
            f"model: {size(model)}; {len(data)} examples to learn from, {len(held_out)} held out; "
            f"{last} steps of {config.batch_size} examples on {torch.get_num_threads()} threads"
        )

        state = run.start(model, optimizer, fingerprint, base)
        check_same(run, state, "reference", reference.key, "the reference model")
        cursor = Cursor(**state.get("cursor", {}))
        tokens, loss = state.get("tokens", 0), state.get("loss", math.nan)
        measured: dict[str, float] = dict(state.get("measured", {}))
        best = Best(config, state)
        for step in run.steps(last):
            optimizer.lr = learning_rate(config, step, last)
            taken, cursor = data.take(cursor, config.batch_size)
            compared: _Compared = reference.compare(model, taken)
            sums: list[Tensor] = []

            def share(
                part: PackedBatch,
                _: int,
                sequences: range,
                whole: _Compared = compared,
                sums: list[Tensor] = sums,
            ) -> Tensor:
                out = model.score(part, completion_only=objective is None)
                totals = part.sum(out.logprobs)
                sums.append(totals.detach())
                here = whole.of(part, sequences)
                if objective is None:
                    return _loss(config, here, totals, len(whole.rows))
                return checked(objective(out, part, here.columns(len(whole.rows))))

            optimizer.zero_grad()
            loss = run.accumulate(model, compared.batch, config.micro_batch_tokens, share, [compared.width] * len(taken))
            grad_norm = run.update(optimizer)
            totals = run.gather(sums)
            count = int(compared.batch.completion_mask.sum())
            tokens += count
            run.log(
                loss,
                count,
                learning_rate=optimizer.lr,
                grad_norm=grad_norm,
                num_tokens=tokens,
                epoch=cursor.epoch + cursor.index / len(data),
                **_figures(config, compared, totals),
            )
            if len(held_out) and (step % config.eval_steps == 0 or step == last):
                apart = reference.compare(model, held_out.examples)
                found = run.share(apart.batch, lambda part: logps(model, part, config.micro_batch_tokens))
                figures = {"loss": _loss(config, apart, found, len(held_out)).item(), **_figures(config, apart, found)}
                measured = {f"eval_{name}": value for name, value in figures.items()}
                run.write_metrics(measured)
                run.say(f"step {step}: {_told(measured)} on the held-out examples")
                best.offer(model, step, measured)
            state = {"cursor": dataclasses.asdict(cursor), "tokens": tokens, "loss": loss, "measured": measured}
            run.end_step(model, optimizer, {**state, **best.state, "reference": reference.key})

        selected, found_best = best.restore(model, last, measured)
        folder = save(run, model, config, command, steps=selected, examples=len(data), tokens=tokens, loss=loss, **found_best)
        result = PreferenceResult(
            folder=folder,
            steps=last,
            selected_step=selected,
            examples=len(data),
            tokens=tokens,
            loss=loss,
            eval_loss=found_best.get("eval_loss"),
            seconds=run.seconds,
            tokens_per_second=run.tokens / run.seconds if run.tokens else 0.0,
            eval_accuracy=found_best.get(_ACCURACY),
        )
        conclude(run, result, config, command, "per example")
        return result


_ACCURACY = "eval_rewards/accuracies"


def _told(measured: dict[str, float]) -> str:
    accuracy = measured.get(_ACCURACY)
    return f"loss {measured['eval_loss']:.3f}" + ("" if accuracy is None else f", {accuracy:.1%} of the pairs right")


def _examples(
    run: Run,
    config: Config,
    load: Callable[..., ExampleSet[Item]],
    model: Model,
    tokenizer: Tokenizer,
    custom: bool,
) -> tuple[ExampleSet[Item], ExampleSet[Item]]:
    """(training, held out), and a report to the reader."""
    longest = config.max_length or model.config.max_position_embeddings
    loaded = load(config.data, tokenizer, longest, config.on_bad_row, config.on_long)
    run.say(str(loaded.report))
    check_rows(loaded, config.micro_batch_tokens, RESERVED if custom else ())
    return split(loaded, config)


# ---- what is compared


@dataclass(frozen=True)
class _Compared:
    """The rows of a micro-batch, of a step or of all that is held out."""

    rows: Sequence[Row]
    batch: PackedBatch
    """Chosen, rejected, chosen, rejected, …; of kto one completion after the other."""
    ref_logps: Tensor | None
    """float32 [S], sums over a completion."""
    z0: float | None
    """Of the whole step; kto only."""

    @property
    def width(self) -> int:
        """Sequences of a row."""
        return len(self.batch) // len(self.rows)

    @property
    def desirable(self) -> Tensor:
        """bool [S], of kto."""
        return torch.tensor([isinstance(row, Unpaired) and row.label for row in self.rows])

    def of(self, part: PackedBatch, sequences: range) -> _Compared:
        """The micro-batch of these sequences."""
        rows = self.rows[sequences.start // self.width : sequences.stop // self.width]
        ref_logps = None if self.ref_logps is None else self.ref_logps[sequences.start : sequences.stop]
        return _Compared(rows, part, ref_logps, self.z0)

    def columns(self, denominator: int) -> dict[str, Any]:
        """What a user's objective is told."""
        columns: dict[str, Any] = {"denominator": denominator, **columns_of(self.rows)}
        if self.z0 is not None:
            return {**columns, "ref_logps": self.ref_logps, "desirable": self.desirable, "z0": self.z0}
        columns["margin"] = [row.margin if isinstance(row, Preference) else None for row in self.rows]
        if self.ref_logps is not None:
            columns |= {"ref_chosen": self.ref_logps[0::2], "ref_rejected": self.ref_logps[1::2]}
        return columns


class _Reference:
    """What is known of every row before the first step: its sequences, and the reference's log-probs of them.

    A row has two: chosen and rejected; for kto its completion, and its prompt with another row's completion.
    """

    key: str = ""
    """Equal means the same log-probs; empty where the loss needs none."""

    def __init__(
        self, run: Run, config: Config, model: Model, training: Sequence[Row], held_out: Sequence[Row], disk: Disk
    ) -> None:
        self._run, self._max_tokens = run, config.micro_batch_tokens
        self._mismatched = isinstance(config, DpoConfig) and config.loss_type == "kto"
        longest = config.max_length or model.config.max_position_embeddings
        rows: list[Row] = [*training, *held_out]
        # A mismatch of what is trained on must not come from what is held out.
        pairs = [*_pairs(training, 0, longest), *_pairs(rows, len(training), longest)]
        self._pairs = dict(zip(rows, pairs, strict=True))
        self._logps: dict[Row, list[float]] = {}
        if isinstance(config, DpoConfig) and config.loss_type != "simpo":
            reference = model if model.base is None else before(model)
            if config.ref_model is not None:
                reference = load_reference(config.ref_model, model, longest)
            batch = packed([sequence for pair in pairs for sequence in pair])
            self.key, found = reference_logps(run, reference, batch, self._max_tokens, disk)
            self._logps = dict(zip(rows, found.view(-1, 2).tolist(), strict=True))

    def compare(self, model: Model, rows: Sequence[Row]) -> _Compared:
        """The rows, with z0 of all of them where that is needed."""
        pairs = [self._pairs[row] for row in rows]
        known = torch.tensor([self._logps[row] for row in rows]) if self._logps else None
        if not self._mismatched:
            batch = packed([sequence for pair in pairs for sequence in pair])
            return _Compared(rows, batch, None if known is None else known.view(-1), None)
        assert known is not None  # kto has a reference
        mismatched = packed([other for _, other in pairs])
        others = self._run.share(mismatched, lambda part: logps(model, part, self._max_tokens))
        z0 = objectives.kto_z0(others, known[:, 1].contiguous())
        return _Compared(rows, packed([own for own, _ in pairs]), known[:, 0].contiguous(), z0)


def _pairs(rows: Sequence[Row], first: int, longest: int) -> list[tuple[Example, Example]]:
    """The two sequences of each of rows[first:]."""
    pairs = []
    for index in range(first, len(rows)):
        row = rows[index]
        if isinstance(row, Preference):
            pairs.append((row.chosen, row.rejected))
            continue
        before = (rows[index - back] for back in range(1, len(rows)))  # over the beginning to the end
        other = next((found for found in before if found.prompt_key != row.prompt_key), None)
        if other is None:
            raise ValueError("kto compares a prompt with the completions of others, but there is only one prompt: add rows")
        assert isinstance(other, Unpaired)
        pairs.append((row.example, _mismatched(row.example, other.example, longest)))
    return pairs


def _mismatched(own: Example, other: Example, longest: int) -> Example:
    """The prompt of the one and the completion of the other."""
    end, begin = int(np.argmax(own.mask)), int(np.argmax(other.mask))  # the first token that is learned
    tokens = np.concatenate([own.tokens[:end], other.tokens[begin:]])[:longest]
    mask = np.concatenate([own.mask[:end], other.mask[begin:]])[:longest]
    return Example(tokens, mask, where=own.where)


# ---- losses and figures


def _compared_values(config: Config, compared: _Compared, sums: Tensor) -> Tensor:
    """What the loss works on, [S]: the sums themselves, or the means per token."""
    if isinstance(config, DpoConfig) and config.loss_type not in ("ipo", "simpo"):
        return sums
    return sums / torch.tensor(compared.batch.completion_counts, dtype=sums.dtype)


def _loss(config: Config, compared: _Compared, sums: Tensor, denominator: int) -> Tensor:
    """The share of the step's loss; sums: [S], log-probs of completions."""
    values = _compared_values(config, compared, sums)
    chosen, rejected = values[0::2], values[1::2]
    if isinstance(config, OrpoConfig):
        return objectives.orpo(chosen, rejected, config.beta, denominator)
    if config.loss_type == "simpo":
        return objectives.simpo(chosen, rejected, config.beta, config.simpo_gamma, denominator)
    assert compared.ref_logps is not None
    reference = _compared_values(config, compared, compared.ref_logps)
    if config.loss_type == "kto":
        assert compared.z0 is not None
        return objectives.kto(
            values,
            reference,
            compared.desirable,
            compared.z0,
            config.beta,
            config.desirable_weight,
            config.undesirable_weight,
            denominator,
        )
    ref_chosen, ref_rejected = reference[0::2], reference[1::2]
    if config.loss_type == "ipo":
        return objectives.ipo(chosen, rejected, ref_chosen, ref_rejected, config.beta, denominator)
    return objectives.dpo(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing, denominator)


def _figures(config: Config, compared: _Compared, sums: Tensor) -> dict[str, float]:
    """TRL's figures: rewards are β · (what the loss compares, less the reference's where there is one), logps what the
    loss compares: sums over a completion, or means per token of ipo, simpo and orpo."""
    values = _compared_values(config, compared, sums)
    known = torch.zeros_like(sums) if compared.ref_logps is None else compared.ref_logps
    rewards = objectives.implicit_rewards(values, _compared_values(config, compared, known), config.beta)
    if compared.z0 is None:
        figures = objectives.preference_metrics(rewards[0::2], rewards[1::2])
        return {**figures, "logps/chosen": _average(values[0::2]), "logps/rejected": _average(values[1::2])}
    figures = {"kl": compared.z0}
    for name, side in {"chosen": compared.desirable, "rejected": ~compared.desirable}.items():
        if bool(side.any()):  # a step may have none of a kind
            figures |= {f"rewards/{name}": _average(rewards[side]), f"logps/{name}": _average(values[side])}
    if "rewards/chosen" in figures and "rewards/rejected" in figures:
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    return figures


def _average(x: Tensor) -> float:
    return kernels.total(x.double()).item() / x.numel()
