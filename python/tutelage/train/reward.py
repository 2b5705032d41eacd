"""Reward models: a number for an answer, learned from which answers people prefer.

The second stage of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155): a scalar head in the place of the language
model's, all pairs of a prompt in one element of the batch, K forwards for its K responses, one epoch, cosine decay
to 10 % of the peak. At last a bias is set so that demonstrations score 0 on average.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tutelage.batch import PackedBatch, pack
from tutelage.data.examples import Batches, ExampleSet, Ranking, load_rankings, load_sft
from tutelage.data.packing import Cursor
from tutelage.data.tokenizer import Tokenizer
from tutelage.evaluate import sequence_rewards
from tutelage.files import DISK, Disk
from tutelage.model import Model
from tutelage.objectives import RankingPairs, ranking_metrics, ranking_pairs, reward_ranking
from tutelage.train.configs import RewardConfig
from tutelage.train.run import Run, ignore, learning_rate, open_run
from tutelage.train.tuning import Best, TuningResult, base_model, check_rows, conclude, content, save, size, split


@dataclass(frozen=True)
class RewardResult(TuningResult):
    """What a finished run has come to. Losses are −log σ of the preferred response's lead, weighted mean over pairs;
    examples are prompts."""

    eval_accuracy: float | None
    """Share of the held-out pairs whose preferred response has the higher reward; None where nothing is held out."""
    reward_bias: float
    """What `Model.values` subtracts: the mean reward of the demonstrations before."""


def reward(config: RewardConfig, *, disk: Disk = DISK, fault: Callable[[str], None] = ignore) -> RewardResult:
    """Trains the model as `config` says and saves it in output_dir/model.

    disk, fault: for tests, see `open_run`.

    Raises as `open_run`, `Model.from_pretrained`, `load_rankings`, `load_sft`, `Run.start` and `Run.accumulate`;
    ValueError for a folder without a tokenizer, and for a prompt whose responses, or a demonstration that, does
    not fit into micro_batch_tokens.
    """
    if not config.data:
        raise ValueError("there is nothing to learn from; pass rankings, as in `tutelage reward --data rows.jsonl`")
    with open_run(config, disk, fault) as run:
        model, tokenizer = base_model(config, "scalar")
        model.reward_bias = 0.0  # a reward model's own, until the new one is known
        examples, held_out = _examples(run, config, model, tokenizer)
        demonstrations, fingerprint = _demonstrations(run, config, model, tokenizer, examples)
        data = Batches(examples, config.seed)
        optimizer = run.optimizer(model, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
        last = config.max_steps or math.ceil(config.num_train_epochs * len(data) / config.batch_size)
        responses = sum(len(example.responses) for example in examples.examples)
        run.say(
            f"model: {size(model)}; {len(data)} prompts with {responses} responses to learn from, "
            f"{len(held_out)} held out; {last} steps of {config.batch_size} prompts on {torch.get_num_threads()} threads"
        )

        state = run.start(model, optimizer, f"{data.fingerprint} {held_out.fingerprint} {fingerprint}", base=content(model))
        cursor = Cursor(**state.get("cursor", {}))
        tokens, loss, measured = state.get("tokens", 0), state.get("loss", math.nan), state.get("measured", {})
        best = Best(config, state)
        for step in run.steps(last):
            optimizer.lr = learning_rate(config, step, last)
            taken, cursor = data.take(cursor, config.batch_size)
            batch, counts = _packed(taken), [len(prompt.responses) for prompt in taken]
            firsts = [0, *itertools.accumulate(counts)]
            rewards: list[torch.Tensor] = []

            def share(
                part: PackedBatch,
                _: int,
                sequences: range,
                prompts: Sequence[Ranking] = taken,
                firsts: list[int] = firsts,
                rewards: list[torch.Tensor] = rewards,
            ) -> torch.Tensor:
                found = part.last(model.values(part))
                rewards.append(found.detach())
                own = prompts[firsts.index(sequences.start) : firsts.index(sequences.stop)]
                return _loss(found, own, config, len(prompts))

            optimizer.zero_grad()
            loss = run.accumulate(model, batch, config.micro_batch_tokens, share, counts)
            grad_norm = run.update(optimizer)
            count = batch.tokens.numel()
            tokens += count
            run.log(
                loss,
                count,
                learning_rate=optimizer.lr,
                grad_norm=grad_norm,
                num_tokens=tokens,
                epoch=cursor.epoch + cursor.index / len(data),
                **ranking_metrics(run.gather(rewards), _pairs(taken)),
            )
            if len(held_out) and (step % config.eval_steps == 0 or step == last):
                measured = _measure(run, model, held_out.examples, config)
                run.write_metrics(measured)
                run.say(
                    f"step {step}: {measured['eval_accuracy']:.1%} of the held-out pairs in the right order, "
                    f"loss {measured['eval_loss']:.3f}"
                )
                best.offer(model, step, measured)
            state = {"cursor": dataclasses.asdict(cursor), "tokens": tokens, "loss": loss, "measured": measured}
            run.end_step(model, optimizer, {**state, **best.state})

        selected, measured = best.restore(model, last, measured)
        most = config.micro_batch_tokens
        scores = run.share(pack(demonstrations), lambda part: sequence_rewards(model, part, most)).tolist()
        model.reward_bias = math.fsum(scores) / len(scores)
        figures = {**measured, "reward_bias": model.reward_bias}
        folder = save(run, model, config, "reward", steps=selected, examples=len(data), tokens=tokens, loss=loss, **figures)
        result = RewardResult(
            folder=folder,
            steps=last,
            selected_step=selected,
            examples=len(data),
            tokens=tokens,
            loss=loss,
            eval_loss=measured.get("eval_loss"),
            eval_accuracy=measured.get("eval_accuracy"),
            reward_bias=model.reward_bias,
            seconds=run.seconds,
            tokens_per_second=run.tokens / run.seconds if run.tokens else 0.0,
        )
        conclude(run, result, config, "reward", "nats per pair")
        if result.eval_accuracy is not None:
            run.say(f"{result.eval_accuracy:.1%} of the held-out pairs are in the right order")
        whose = "the best responses of the training data" if config.demonstrations is None else "the demonstrations"
        run.say(f"reward_bias {result.reward_bias:.4g} is subtracted, so that {whose} score 0 on average")
        return result


def _examples(
    run: Run, config: RewardConfig, model: Model, tokenizer: Tokenizer
) -> tuple[ExampleSet[Ranking], ExampleSet[Ranking]]:
    """(training, held out), and a report to the reader."""
    loaded = load_rankings(
        config.data,
        tokenizer,
        config.max_length or model.config.max_position_embeddings,
        config.on_bad_row,
        config.on_long,
    )
    run.say(str(loaded.report))
    check_rows(loaded, config.micro_batch_tokens)
    return split(loaded, config)


def _demonstrations(
    run: Run, config: RewardConfig, model: Model, tokenizer: Tokenizer, training: ExampleSet[Ranking]
) -> tuple[list[npt.NDArray[np.int32]], str]:
    """What is to score 0 on average, each ending where its reward is read; and the fingerprint of a file of them."""
    if config.demonstrations is None:
        return [prompt.responses[best].tokens for prompt in training.examples for best in prompt.ranking[0]], ""
    loaded = load_sft(
        config.demonstrations,
        tokenizer,
        config.max_length or model.config.max_position_embeddings,
        config.on_bad_row,
        config.on_long,
    )
    run.say(f"demonstrations: {loaded.report}")
    check_rows(loaded, config.micro_batch_tokens)
    # A template may write a line break behind the last turn's stop token, where no ranked response has one.
    return [example.tokens[: np.flatnonzero(example.mask)[-1] + 1] for example in loaded.examples], loaded.fingerprint


def _packed(prompts: Sequence[Ranking]) -> PackedBatch:
    return pack([response.tokens for prompt in prompts for response in prompt.responses])


def _pairs(prompts: Sequence[Ranking]) -> RankingPairs:
    return ranking_pairs([prompt.ranking for prompt in prompts])


def _loss(rewards: torch.Tensor, prompts: Sequence[Ranking], config: RewardConfig, denominator: int) -> torch.Tensor:
    """The share of these prompts in a mean over `denominator` of them; rewards [R], of all their responses in order."""
    pairs, margin = _pairs(prompts), None
    if config.margin and any(prompt.margin for prompt in prompts):
        margins = [prompt.margin or 0.0 for prompt in prompts for _ in prompt.responses]
        margin = torch.tensor([margins[winner] for winner in pairs.winners.tolist()], dtype=rewards.dtype)
    return reward_ranking(rewards, pairs, margin, config.center_rewards_coefficient, denominator)


def _measure(run: Run, model: Model, prompts: Sequence[Ranking], config: RewardConfig) -> dict[str, float]:
    rewards = run.share(_packed(prompts), lambda part: sequence_rewards(model, part, config.micro_batch_tokens))
    return {
        "eval_loss": _loss(rewards, prompts, config, len(prompts)).item(),
        "eval_accuracy": ranking_metrics(rewards, _pairs(prompts))["accuracy"],
    }
