"""Supervised fine-tuning: answer as the examples do; mean of −log p over the tokens of the answers, AdamW.

The first stage of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155): cosine decay to 10 % of the peak, no
warm-up. Its dropout is left out: with it a sequence's bits would depend on what it is batched with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage.batch import PackedBatch, pack
from tutelage.data.examples import Batches, Example, ExampleSet, load_sft, split_examples
from tutelage.data.packing import Cursor
from tutelage.data.tokenizer import Tokenizer
from tutelage.evaluate import held_out_loss
from tutelage.files import DISK, Disk
from tutelage.model import Model
from tutelage.objectives import cross_entropy, load_objective
from tutelage.optimizer import AdamW
from tutelage.train import picture
from tutelage.train.base_model import base_model, check_fits, content
from tutelage.train.configs import SftConfig
from tutelage.train.run import METRICS, Run, ignore, learning_rate, open_run, write_json

UserObjective = Callable[..., torch.Tensor]
"""f(out, batch, columns) -> a micro-batch's share of the step's loss, a scalar.

out: what `model.score(batch)` returns. columns: "denominator", the number of learned tokens in the whole step,
and every other field of the rows by its name, a list with one entry for each sequence of the micro-batch (None
where the row has no such field). A mean over the step is a sum over the micro-batch, divided by the denominator.
"""

DENOMINATOR = "denominator"


@dataclass(frozen=True)
class SftResult:
    """What a finished run has come to."""

    folder: Path
    """The model and its tokenizer: `Model.from_pretrained(folder)`."""
    steps: int
    selected_step: int
    """Whose weights the model in `folder` has."""
    examples: int
    """Trained on."""
    tokens: int
    """Learned, all processes of the run together; a token that is seen twice counts twice."""
    loss: float
    """Of the last step, in nats per token."""
    eval_loss: float | None
    """Of the model in `folder` on the held-out examples, in nats per token; None where nothing is held out."""
    seconds: float
    """Of this process's steps."""
    tokens_per_second: float


def sft(
    config: SftConfig,
    objective: UserObjective | None = None,
    *,
    disk: Disk = DISK,
    fault: Callable[[str], None] = ignore,
) -> SftResult:
    """Trains the model as `config` says and saves it in output_dir/model.

    objective: a loss of the caller's own, in the place of config.objective. The held-out loss is the mean
        negative log-likelihood, whatever is trained on.
    disk, fault: for tests, see `open_run`.

    Raises as `open_run`, `load_objective`, `Model.from_pretrained`, `load_sft`, `Run.start` and `Run.accumulate`;
    ValueError for a folder that holds no language model with a tokenizer, for an example that does not fit
    into micro_batch_tokens, and for an objective that returns no scalar with a gradient.
    """
    if not config.data:
        raise ValueError("there is nothing to learn from; pass examples, as in `tutelage sft --data rows.jsonl`")
    if objective is None and config.objective is not None:
        objective = load_objective(config.objective)
    with open_run(config, disk, fault) as run:
        model, tokenizer = base_model(config, "lm")
        examples, held_out = _examples(run, config, model, tokenizer, objective is not None)
        data = Batches(examples, config.seed)
        eval_batch = _packed(held_out.examples) if len(held_out) else None
        model.eos_token_ids = _stops(model, tokenizer, examples)
        optimizer = AdamW(model, 0.0, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
        last = config.max_steps or math.ceil(config.num_train_epochs * len(data) / config.batch_size)
        run.say(
            f"model: {model.params.numel():,} parameters; {len(data)} examples to learn from, {len(held_out)} held out; "
            f"{last} steps of {config.batch_size} examples on {torch.get_num_threads()} threads"
        )

        state = run.start(model, optimizer, f"{data.fingerprint} {held_out.fingerprint}", base=content(model))
        cursor = Cursor(**state.get("cursor", {}))
        tokens, loss, eval_loss = state.get("tokens", 0), state.get("loss", math.nan), state.get("eval_loss")
        best = {name: state[name] for name in ("best_eval_loss", "best_step", "best_params") if name in state}
        for step in run.steps(last):
            optimizer.lr = learning_rate(config, step, last)
            taken, cursor = data.take(cursor, config.batch_size)
            batch = _packed(taken)
            entropies: list[float] = []

            def share(
                part: PackedBatch,
                denominator: int,
                sequences: range,
                rows: Sequence[Example] = taken,
                entropies: list[float] = entropies,
            ) -> torch.Tensor:
                out = model.score(part)
                entropies += part.sum(out.entropy.detach()).tolist()
                if objective is None:
                    return cross_entropy(out.logprobs, part.completion_mask, denominator)
                columns = _columns([rows[index] for index in sequences], denominator)
                return _checked(objective(out, part, columns))

            optimizer.zero_grad()
            loss = run.accumulate(model, batch, config.micro_batch_tokens, share)
            grad_norm = run.update(optimizer)
            count = int(batch.completion_mask.sum())
            tokens += count
            run.log(
                loss,
                count,
                learning_rate=optimizer.lr,
                grad_norm=grad_norm,
                num_tokens=tokens,
                epoch=cursor.epoch + cursor.index / len(data),
                entropy=math.fsum(entropies) / count,
            )
            if eval_batch is not None and (step % config.eval_steps == 0 or step == last):
                eval_loss = held_out_loss(model, eval_batch, config.micro_batch_tokens)
                run.write_metrics({"eval_loss": eval_loss})
                run.say(f"step {step}: loss {eval_loss:.3f} on the held-out examples")
                if config.select_by == "eval_loss" and eval_loss < best.get("best_eval_loss", math.inf):
                    best = {"best_eval_loss": eval_loss, "best_step": step, "best_params": model.params.clone()}
            state = {"cursor": dataclasses.asdict(cursor), "tokens": tokens, "loss": loss, "eval_loss": eval_loss}
            run.end_step(model, optimizer, {**state, **best})

        if best:
            with torch.no_grad():
                model.params.copy_(best["best_params"])
        model.save_pretrained(run.folder / "model")
        result = SftResult(
            folder=run.folder / "model",
            steps=last,
            selected_step=best.get("best_step", last),
            examples=len(data),
            tokens=tokens,
            loss=loss,
            eval_loss=best.get("best_eval_loss", eval_loss),
            seconds=run.seconds,
            tokens_per_second=run.tokens / run.seconds if run.tokens else 0.0,
        )
        _conclude(run, result, config)
        return result


def _examples(
    run: Run, config: SftConfig, model: Model, tokenizer: Tokenizer, custom: bool
) -> tuple[ExampleSet[Example], ExampleSet[Example]]:
    """(training, held out), and a report to the reader."""
    loaded = load_sft(
        config.data,
        tokenizer,
        config.max_length or model.config.max_position_embeddings,
        config.on_bad_row,
        config.on_long,
        config.completion_only_loss,
        config.assistant_only_loss,
    )
    run.say(str(loaded.report))
    for example in loaded.examples:
        check_fits(example.where, "the row has", len(example.tokens), config)
        if custom and DENOMINATOR in example.columns:
            raise ValueError(f"{example.where}: the field {DENOMINATOR!r} has a meaning to objectives: give it another name")
    training, held_out = split_examples(loaded, config.eval_fraction, config.seed)
    if config.select_by == "eval_loss" and not len(held_out):
        raise ValueError("select_by eval_loss needs held-out examples, but there is only one prompt: use select_by last")
    return training, held_out


def _stops(model: Model, tokenizer: Tokenizer, examples: ExampleSet[Example]) -> tuple[int, ...]:
    """What ends a completion: what already does, the end of text, and the end of a turn that is learned here."""
    learned = [tokenizer.eos_token_id, None if examples.turn is None else examples.turn.stop_token_id]
    return tuple(dict.fromkeys([*model.eos_token_ids, *(number for number in learned if number is not None)]))


def _packed(examples: Sequence[Example]) -> PackedBatch:
    return pack([example.tokens for example in examples], [example.mask for example in examples])


def _columns(rows: Sequence[Example], denominator: int) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {DENOMINATOR: denominator, **{name: [row.columns.get(name) for row in rows] for name in names}}


def _checked(loss: Any) -> torch.Tensor:
    """What a user's objective has returned. Raises ValueError where that is no scalar with a gradient."""
    if not isinstance(loss, torch.Tensor):
        raise ValueError(f"the objective must return a scalar tensor, but it returned {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"the objective must return a scalar, but the shape of its loss is {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("the objective's loss has no gradient: compute it from out.logprobs or out.entropy")
    return loss


def _conclude(run: Run, result: SftResult, config: SftConfig) -> None:
    if config.plot and (run.folder / METRICS).exists():  # not where a finished run was resumed in another folder
        run.say(picture.show(run.folder / METRICS, run.folder / "loss.png", "loss (nats per token)"))
    measured = "" if result.eval_loss is None else f", {result.eval_loss:.3f} on the held-out examples"
    run.say(f"loss {result.loss:.3f}{measured}, in nats per token; {result.tokens_per_second:,.0f} tokens/s")
    run.say(f"model and tokenizer, of step {result.selected_step}: {result.folder}")
    if config.json is not None:
        figures: dict[str, Any] = {**dataclasses.asdict(result), "folder": str(result.folder)}
        write_json(Path(config.json), {"command": "sft", **figures})
