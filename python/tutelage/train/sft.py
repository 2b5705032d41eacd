"""Supervised fine-tuning: answer as the examples do; mean of −log p over the tokens of the answers, AdamW.

The first stage of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155): cosine decay to 10 % of the peak, no
warm-up. Its dropout is left out: with it a sequence's bits would depend on what it is batched with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tutelage.batch import PackedBatch
from tutelage.data.examples import Batches, Example, ExampleSet, load_sft
from tutelage.data.packing import Cursor
from tutelage.data.tokenizer import Tokenizer
from tutelage.evaluate import held_out_loss, load_reward_model, mean_reward
from tutelage.files import DISK, Disk
from tutelage.model import Model
from tutelage.objectives import cross_entropy, load_objective
from tutelage.train.configs import SftConfig
from tutelage.train.run import Run, ignore, learning_rate, open_run
from tutelage.train.sharing import answers
from tutelage.train.tuning import (
    Best,
    TuningResult,
    UserObjective,
    base_model,
    check_rows,
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

DENOMINATOR = "denominator"


@dataclass(frozen=True)
class SftResult(TuningResult):
    """What a finished run has come to. Losses are in nats per token; eval_loss is the mean negative log-likelihood."""

    eval_reward: float | None
    """Mean reward of the answers to the held-out prompts of the model in `folder`; None without a reward model."""


def sft(
    config: SftConfig,
    objective: UserObjective | None = None,
    *,
    disk: Disk = DISK,
    fault: Callable[[str], None] = ignore,
) -> SftResult:
    """Trains the model as `config` says and saves it in output_dir/model.

    objective: a loss of the caller's own, in the place of config.objective. Its "denominator" is the number of
        learned tokens in the whole step, its columns have an entry for each sequence. The held-out loss is the
        mean negative log-likelihood, whatever is trained on.
    disk, fault: for tests, see `open_run`.

    Raises as `open_run`, `load_objective`, `Model.from_pretrained`, `load_sft`, `Run.start` and `Run.accumulate`;
    ValueError for a folder that holds no language model with a tokenizer, for a reward model that has another
    tokenizer, for an example that does not fit
    into micro_batch_tokens, and for an objective that returns no scalar with a gradient.
    """
    if not config.data:
        raise ValueError("there is nothing to learn from; pass examples, as in `tutelage sft --data rows.jsonl`")
    if objective is None and config.objective is not None:
        objective = load_objective(config.objective)
    with open_run(config, disk, fault) as run:
        model, tokenizer = base_model(config)
        examples, held_out = _examples(run, config, model, tokenizer, objective is not None)
        data = Batches(examples, config.seed)
        judge = (
            None
            if config.reward_model is None
            else load_reward_model(config.reward_model, tokenizer, model.base, model.device_name)
        )
        model.eos_token_ids = stops(model, tokenizer, examples)
        optimizer = run.optimizer(model, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
        last = config.max_steps or math.ceil(config.num_train_epochs * len(data) / config.batch_size)
        run.say(
            f"model: {size(model)}; {len(data)} examples to learn from, {len(held_out)} held out; "
            f"{last} steps of {config.batch_size} examples on {torch.get_num_threads()} threads"
        )

        state = run.start(model, optimizer, f"{data.fingerprint} {held_out.fingerprint}", base=content(model))
        cursor = Cursor(**state.get("cursor", {}))
        tokens, loss, measured = state.get("tokens", 0), state.get("loss", math.nan), state.get("measured", {})
        best = Best(config, state)
        for step in run.steps(last):
            optimizer.lr = learning_rate(config, step, last)
            taken, cursor = data.take(cursor, config.batch_size)
            batch = packed(taken)
            entropies: list[torch.Tensor] = []

            def share(
                part: PackedBatch,
                denominator: int,
                sequences: range,
                rows: Sequence[Example] = taken,
                entropies: list[torch.Tensor] = entropies,
            ) -> torch.Tensor:
                out = model.score(part, completion_only=objective is None)
                entropies.append(part.sum(out.entropy.detach()))
                if objective is None:
                    return cross_entropy(out.logprobs, part.completion_mask, denominator)
                columns = {DENOMINATOR: denominator, **columns_of([rows[index] for index in sequences])}
                return checked(objective(out, part, columns))

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
                entropy=math.fsum(run.gather(entropies).tolist()) / count,
            )
            if len(held_out) and (step % config.eval_steps == 0 or step == last):
                measured = _measure(run, model, judge, held_out.examples, config)
                run.write_metrics(measured)
                liked = f", reward {measured['eval_reward']:.3f}" if judge else ""
                run.say(f"step {step}: loss {measured['eval_loss']:.3f}{liked} on the held-out examples")
                best.offer(model, step, measured)
            state = {"cursor": dataclasses.asdict(cursor), "tokens": tokens, "loss": loss, "measured": measured}
            run.end_step(model, optimizer, {**state, **best.state})

        selected, measured = best.restore(model, last, measured)
        folder = save(run, model, config, "sft", steps=selected, examples=len(data), tokens=tokens, loss=loss, **measured)
        result = SftResult(
            folder=folder,
            steps=last,
            selected_step=selected,
            examples=len(data),
            tokens=tokens,
            loss=loss,
            eval_loss=measured.get("eval_loss"),
            seconds=run.seconds,
            tokens_per_second=run.tokens / run.seconds if run.tokens else 0.0,
            eval_reward=measured.get("eval_reward"),
        )
        conclude(run, result, config, "sft", "nats per token")
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
    check_rows(loaded, config.micro_batch_tokens, (DENOMINATOR,) if custom else ())
    return split(loaded, config)


def _measure(run: Run, model: Model, judge: Model | None, held_out: Sequence[Example], config: SftConfig) -> dict[str, float]:
    measured = {"eval_loss": held_out_loss(model, packed(held_out), config.micro_batch_tokens, run.share)}
    if judge is not None:
        # Up to the first token that is learned.
        prompts = [example.tokens[: int(np.argmax(example.mask))].tolist() for example in held_out]
        given = answers(run.ranks, model, prompts, config.max_completion_length, temperature=0.0)
        measured["eval_reward"] = mean_reward(judge, given, config.micro_batch_tokens, run.share)
    return measured
