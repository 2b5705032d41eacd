"""GRPO, Dr. GRPO and RLOO: several answers to a prompt, each compared with the others, in the place of a critic.

Shao et al. 2024 (arXiv 2402.03300), Liu et al. 2025 (arXiv 2503.20783), Ahmadian et al. 2024 (arXiv 2402.14740), and the token
mean of DAPO (Yu et al. 2025, arXiv 2503.14476). As in `ppo`, the log-probs of the rollout are not computed again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tutelage import kernels
from tutelage.batch import PackedBatch
from tutelage.data.examples import Batches, ExampleSet, Prompt
from tutelage.data.packing import Cursor
from tutelage.files import DISK, Disk
from tutelage.model import Model
from tutelage.objectives import grpo_advantages, kl_estimate, ppo_policy, rloo_advantages
from tutelage.train.configs import GrpoConfig
from tutelage.train.experience import (
    Episodes,
    Judge,
    Moves,
    Tokens,
    TryingResult,
    average,
    check_finite,
    conclude,
    gather,
    load,
    longest_sequence,
    measure,
    mini_batches,
    show_sample,
    steps_of,
    token_logprobs,
)
from tutelage.train.reference import load_reference
from tutelage.train.run import Run, ignore, learning_rate, open_run
from tutelage.train.tuning import Best, base_model, before, check_same, content, save, size, stops

SCORE = "reward"


def grpo(config: GrpoConfig, *, disk: Disk = DISK, fault: Callable[[str], None] = ignore) -> TryingResult:
    """Trains the model as `config` says and saves it in output_dir/model.

    A step is an iteration, as in `ppo`. A prompt of whose answers fewer than two have a score is left out.

    disk, fault: for tests, see `open_run`; besides its points "rollout" and "scored".

    Raises as `open_run`, `Model.from_pretrained`, `load`, `Judge`, `gather`, `load_reference`, `Run.start` and
    `Run.accumulate`; NonFiniteError for a log-prob of the reference or an advantage that is no number; ValueError for a
    folder that holds no language model with a tokenizer.
    """
    if not config.data:
        raise ValueError("there is nothing to learn from; pass prompts, as in `tutelage grpo --data prompts.jsonl`")
    with open_run(config, disk, fault) as run:
        model, tokenizer = base_model(config)
        prompts, held_out = load(run, config, model, tokenizer)
        model.eos_token_ids = stops(model, tokenizer, prompts)
        with Judge(run, config, model, tokenizer, [*prompts.examples, *held_out.examples], disk) as judge:
            return _learn(run, config, model, prompts, held_out, judge)


def _learn(
    run: Run, config: GrpoConfig, model: Model, prompts: ExampleSet[Prompt], held_out: ExampleSet[Prompt], judge: Judge
) -> TryingResult:
    tokenizer, most = model.tokenizer, config.micro_batch_tokens
    assert tokenizer is not None
    data, reference = Batches(prompts, config.seed), _reference(config, model)
    options = {"eps": config.adam_epsilon, "weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm}
    optimizer = run.optimizer(model, **options)
    last = steps_of(config, len(data))
    run.say(
        f"model: {size(model)}; {len(data)} prompts, {len(held_out)} held out; {last} steps of "
        f"{config.batch_size} prompts with {config.num_generations} answers on {torch.get_num_threads()} threads"
    )

    keys = {"reference": "" if reference is None else content(reference), "reward_model": judge.key}
    state = run.start(model, optimizer, f"{data.fingerprint} {held_out.fingerprint}", content(model))
    check_same(run, state, "reference", keys["reference"], "the reference model")
    check_same(run, state, "reward_model", keys["reward_model"], "the reward model")
    cursor = Cursor(**state.get("cursor", {}))
    tokens, episodes = state.get("tokens", 0), state.get("episodes", 0)
    loss, score, measured = state.get("loss", math.nan), state.get("score", math.nan), state.get("measured", {})
    best = Best(config, state)
    for step in run.steps(last):
        optimizer.lr = learning_rate(config, step, last)
        taken, cursor = data.take(cursor, config.batch_size)
        answers = _comparable(gather(run, config, model, judge, taken, f"step {step}", config.num_generations))
        if answers is None:
            run.say(f"step {step}: no prompt has two answers with a score, so nothing is learned")
        else:
            batch, known = answers.batch, None
            with run.timed("score"):
                if reference is not None:
                    known = run.share(batch, lambda part: token_logprobs(reference, part, most, config.temperature))
                    check_finite(run, "reference's log-prob", known, batch)
                whole, figures = advantages_of(config, answers, known)
                check_finite(run, "advantage", whole.columns["advantages"], batch)
            with run.timed("train"):
                moves, losses, norm = Moves(), [], 0.0
                for epoch in range(config.num_iterations):
                    for part in mini_batches(len(batch), config.num_mini_batches, f"{config.seed} {step} {epoch}"):
                        mini, noted = whole.select(part), len(moves.logs)
                        optimizer.zero_grad()
                        losses.append(run.accumulate(model, mini.batch, most, _share(config, model, mini, moves)))
                        moves.share(run, noted)
                        norm = run.update(optimizer)
            count, loss, score = int(batch.completion_mask.sum()), math.fsum(losses) / len(losses), figures[SCORE]
            tokens, episodes = tokens + count, episodes + len(answers)
            run.log(
                loss,
                count,
                f"reward {score:.3f}",
                learning_rate=optimizer.lr,
                grad_norm=norm,
                num_tokens=tokens,
                episode=episodes,
                epoch=cursor.epoch + cursor.index / len(data),
                **answers.figures,
                **figures,
                **moves.figures(),
            )
            if run.logs:
                show_sample(run, tokenizer, answers)
        if len(held_out) and (step % config.eval_steps == 0 or step == last):
            measured = measure(run, config, model, judge, held_out)
            if measured:
                best.offer(model, step, measured)
        state = {"cursor": dataclasses.asdict(cursor), "tokens": tokens, "episodes": episodes, "loss": loss, "score": score}
        run.end_step(model, optimizer, {**state, "measured": measured, **keys, **best.state})

    selected, measured = best.restore(model, last, measured)
    folder = save(run, model, config, "grpo", steps=selected, episodes=episodes, tokens=tokens, score=score, **measured)
    result = TryingResult(
        folder=folder,
        steps=last,
        selected_step=selected,
        examples=len(data),
        tokens=tokens,
        loss=loss,
        eval_loss=None,
        seconds=run.seconds,
        tokens_per_second=run.tokens / run.seconds if run.tokens else 0.0,
        episodes=episodes,
        score=score,
        eval_reward=measured.get("eval_reward"),
        times=run.shares(),
    )
    conclude(run, result, config, "grpo", SCORE)
    return result


def _reference(config: GrpoConfig, model: Model) -> Model | None:
    if not config.beta:
        return None
    return (
        before(model) if config.ref_model is None else load_reference(config.ref_model, model, longest_sequence(config, model))
    )


def _comparable(answers: Episodes | None) -> Episodes | None:
    """Without the prompts that have a single answer left, which can be compared with nothing."""
    if answers is None:
        return None
    kept = [row for row, group in enumerate(answers.groups) if answers.groups.count(group) > 1]
    return answers.select(kept) if kept else None


def advantages_of(config: GrpoConfig, answers: Episodes, known: Tensor | None) -> tuple[Tokens, dict[str, float]]:
    """What a step's answers teach: for each token its advantage (of its answer, the same for all) and its weight; and TRL's
    figures. known: the reference's log-probs [N], None where there is none."""
    batch, drawn = answers.batch, answers.batch.logprobs
    assert drawn is not None  # a rollout has them
    rewards, kl = answers.scores, torch.zeros_like(answers.scores)
    if known is not None:
        kl = batch.sum(drawn.double() - known.double())
        if config.loss_type == "rloo":
            rewards = rewards - config.beta * kl
    sizes = [len(list(members)) for _, members in itertools.groupby(answers.groups)]
    scale = config.scale_rewards or ("group" if config.loss_type in ("grpo", "dapo") else "none")
    found, spreads = [], []
    for group in torch.split(rewards, sizes):
        if config.loss_type == "rloo":
            found.append(rloo_advantages(group, len(group)))
        else:
            found.append(grpo_advantages(group, len(group), "group" if scale == "group" else "none"))
        spreads.append(_deviation(group))
    advantages = torch.cat(found)
    if scale == "batch":
        advantages = advantages / (_deviation(rewards) + 1e-4)
    lengths = torch.tensor(batch.completion_counts, dtype=torch.float64)
    weights = 1 / lengths if config.loss_type == "grpo" else torch.ones_like(lengths)
    figures = {
        SCORE: average(answers.scores),
        "reward_std": math.fsum(spreads) / len(spreads),
        "frac_reward_zero_std": spreads.count(0.0) / len(spreads),
        **({} if known is None else {"kl": average(kl)}),
    }
    columns = {"advantages": _spread(batch, advantages), "weights": _spread(batch, weights)}
    return Tokens(batch, columns if known is None else {**columns, "known": known}), figures


def _deviation(x: Tensor) -> float:
    """Of n − 1, as TRL's."""
    centred = x - average(x)
    return math.sqrt(kernels.total(centred * centred).item() / max(x.numel() - 1, 1))


def _spread(batch: PackedBatch, x: Tensor) -> Tensor:
    """float32 [N]: each sequence's entry of x [S] at all its tokens."""
    return torch.repeat_interleave(x.float(), torch.tensor(batch.lengths))


def _share(config: GrpoConfig, model: Model, mini: Tokens, moves: Moves) -> Callable[[PackedBatch, int, range], Tensor]:
    """A micro-batch's share of the loss of a mini-batch."""
    answers = len(mini.batch)

    def share(part: PackedBatch, count: int, sequences: range) -> Tensor:
        out, own, mask = model.score(part, config.temperature, completion_only=True), mini.of(sequences), part.completion_mask
        assert part.logprobs is not None
        if config.loss_type == "rloo":
            given = _whole_answers(part, out.logprobs, own)
            moves.note(*given, config.epsilon, out.entropy[mask])
            return ppo_policy(*given, config.epsilon, answers)
        moves.note(out.logprobs, part.logprobs, own["advantages"], mask, config.epsilon, out.entropy[mask])
        denominator = {"grpo": answers, "dapo": count, "dr_grpo": answers * config.max_completion_length}[config.loss_type]
        weighted = own["advantages"] * own["weights"]
        loss = ppo_policy(out.logprobs, part.logprobs, weighted, mask, config.epsilon, denominator)
        if config.beta:
            apart = kl_estimate(torch.where(mask, out.logprobs, 0), torch.where(mask, own["known"], 0), "k3")
            loss = loss + config.beta * (kernels.total(apart * own["weights"], mask) / denominator)
        return loss

    return share


def _whole_answers(part: PackedBatch, logprobs: Tensor, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, old ones, advantages, mask), an entry for each answer."""
    assert part.logprobs is not None
    advantages = part.last(own["advantages"])
    return part.sum(logprobs), part.sum(part.logprobs), advantages, torch.ones_like(advantages, dtype=torch.bool)
