"""PPO: answer, hear what the answer is worth, and make the better tokens likelier; with --ptx_coef PPO-ptx.

The third stage of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155), in the details of Huang et al. 2024 ("The N+
implementation details of RLHF with PPO", arXiv 2403.17031). The log-probs of the rollout are the bits that training sees, so
they are not computed again: in a step's first update every ratio is exactly 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tutelage.batch import PackedBatch, pack
from tutelage.data.corpus import Corpus
from tutelage.data.examples import Batches, ExampleSet, Prompt
from tutelage.data.packing import Cursor, PackedEpochs
from tutelage.files import DISK, Disk
from tutelage.model import Model
from tutelage.objectives import (
    adaptive_kl_coef,
    baselines,
    cross_entropy,
    gae,
    kl_estimate,
    mean_std,
    ppo_policy,
    ppo_value,
    whiten,
)
from tutelage.train.configs import PpoConfig
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
    token_values,
)
from tutelage.train.reading import read_text
from tutelage.train.reference import load_reference
from tutelage.train.run import Run, ignore, learning_rate, open_run
from tutelage.train.tuning import Best, base_model, before, check_same, content, save, size, start, stops, with_adapter

SCORE = "objective/scores"


@dataclass(frozen=True)
class PpoResult(TryingResult):
    """What a finished run has come to. loss: policy + vf_coef · critic + ptx_coef · text, of the last step."""

    kl: float
    """KL(policy ‖ reference) of an answer in nats, mean over the last step's."""
    kl_coef: float
    """At the end."""


def ppo(config: PpoConfig, *, disk: Disk = DISK, fault: Callable[[str], None] = ignore) -> PpoResult:
    """Trains the model as `config` says and saves it in output_dir/model.

    A step is an iteration: answers, scores and all updates made with them. A checkpoint lies between two steps, so what is
    interrupted in between is done again, with the same draws.

    disk, fault: for tests, see `open_run`; besides its points "rollout" and "scored".

    Raises as `open_run`, `Model.from_pretrained`, `load`, `Judge`, `gather`, `load_reference`, `Run.start` and
    `Run.accumulate`; NonFiniteError for a log-prob of the reference, a value or an advantage that is no number; ValueError
    for a folder that holds no language model with a tokenizer, and a ptx_length that does not fit.
    """
    if not config.data:
        raise ValueError("there is nothing to learn from; pass prompts, as in `tutelage ppo --data prompts.jsonl`")
    with open_run(config, disk, fault) as run:
        model, tokenizer = base_model(config)
        prompts, held_out = load(run, config, model, tokenizer)
        model.eos_token_ids = stops(model, tokenizer, prompts)
        with Judge(run, config, model, tokenizer, [*prompts.examples, *held_out.examples], disk) as judge:
            return _learn(run, config, model, prompts, held_out, judge)


def _learn(
    run: Run, config: PpoConfig, model: Model, prompts: ExampleSet[Prompt], held_out: ExampleSet[Prompt], judge: Judge
) -> PpoResult:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    data, text = Batches(prompts, config.seed), _text(run, config, model)
    longest, most = longest_sequence(config, model), config.micro_batch_tokens
    reference = before(model) if config.ref_model is None else load_reference(config.ref_model, model, longest)
    learner = _Learner(run, config, model, _critic(config, judge, model), text)
    averaged = model.clone() if config.ema_decay else None
    chosen = averaged or model
    last = steps_of(config, len(data), config.total_episodes)
    run.say(
        f"model: {size(model)}; critic: {size(learner.critic)}; {len(data)} prompts, {len(held_out)} held out; "
        f"{last} steps of {config.batch_size} answers on {torch.get_num_threads()} threads"
    )

    fingerprint = f"{data.fingerprint} {held_out.fingerprint} {text.fingerprint if text else ''}"
    others = {"critic": learner.critic_optimizer}
    keys = {"reference": content(reference), "reward_model": judge.key}
    state = run.start(model, learner.optimizer, fingerprint, content(model), others)
    check_same(run, state, "reference", keys["reference"], "the reference model")
    check_same(run, state, "reward_model", keys["reward_model"], "the reward model")
    cursor, learner.cursor = Cursor(**state.get("cursor", {})), Cursor(**state.get("ptx_cursor", {}))
    if averaged is not None and state:
        _set(averaged, state["ema"])
    tokens, episodes, kl_coef = state.get("tokens", 0), state.get("episodes", 0), state.get("kl_coef", config.kl_coef)
    loss, score, kl = (state.get(name, math.nan) for name in ("loss", "score", "kl"))
    measured, best = state.get("measured", {}), Best(config, state)
    for step in run.steps(last):
        learner.set_rates(step, last)
        taken, cursor = data.take(cursor, config.batch_size)
        answers = gather(run, config, model, judge, taken, f"step {step}")
        if answers is None:
            run.say(f"step {step}: no answer has a score, so nothing is learned")
        else:
            with run.timed("score"):
                batch = answers.batch
                known = run.share(batch, lambda part: token_logprobs(reference, part, most, config.temperature))
                values = learner.values(batch, step)
                check_finite(run, "reference's log-prob", known, batch)
                check_finite(run, "critic's value", values, batch)
                whole, figures = advantages_of(config, answers, known, values, kl_coef)
                check_finite(run, "advantage", whole.columns["advantages"], batch)
            with run.timed("train"):
                loss, updated = learner.update(whole, step)
                if averaged is not None:
                    # Separate operations: a fused one would not give the same bits everywhere.
                    _set(averaged, averaged.params * config.ema_decay + model.params * (1 - config.ema_decay))
            count, score, kl = int(batch.completion_mask.sum()), figures[SCORE], figures["objective/kl"]
            tokens, episodes = tokens + count, episodes + len(answers)
            run.log(
                loss,
                count,
                f"score {score:.3f}  KL {kl:.3f}",
                learning_rate=learner.optimizer.lr,
                num_tokens=tokens,
                episode=episodes,
                epoch=cursor.epoch + cursor.index / len(data),
                **answers.figures,
                **figures,
                **updated,
            )
            if run.logs:
                show_sample(run, tokenizer, answers)
            if config.adap_kl_ctrl:
                kl_coef = adaptive_kl_coef(kl_coef, kl, config.target, config.horizon, len(answers))
        if len(held_out) and (step % config.eval_steps == 0 or step == last):
            measured = measure(run, config, chosen, judge, held_out)
            if measured:
                best.offer(chosen, step, measured)
        state = {"cursor": dataclasses.asdict(cursor), "ptx_cursor": dataclasses.asdict(learner.cursor), "tokens": tokens}
        state |= {"episodes": episodes, "kl_coef": kl_coef, "loss": loss, "score": score, "kl": kl, "measured": measured}
        ema = {} if averaged is None else {"ema": averaged.params}
        run.end_step(model, learner.optimizer, {**state, **keys, **ema, **best.state})

    selected, measured = best.restore(chosen, last, measured)
    folder = save(run, chosen, config, "ppo", steps=selected, episodes=episodes, tokens=tokens, score=score, kl=kl, **measured)
    result = PpoResult(
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
        kl=kl,
        kl_coef=kl_coef,
    )
    conclude(run, result, config, "ppo", SCORE)
    run.say(f"KL to the reference: {result.kl:.3f} nats an answer")
    return result


def _set(model: Model, params: Tensor) -> None:
    with torch.no_grad():
        model.params.copy_(params)


def _critic(config: PpoConfig, judge: Judge, model: Model) -> Model:
    """The reward model, as InstructGPT has it; or else the policy with a head that says 0 everywhere.

    With adapters neither has weights of its own: the critic is an adapter on the reward model, or on the policy's base.
    """
    if judge.model is not None:
        if not config.lora_rank:
            return judge.model.clone() if judge.model.base is None else judge.model.merge()
        return with_adapter(judge.model, config) if judge.model.base is None else judge.model.clone()
    if model.base is None or model.lora is None:
        critic = start(config, "scalar")
    else:
        lora = model.lora
        critic = model.base.with_lora(lora.rank, lora.alpha, lora.target_modules, "scalar", use_rslora=lora.use_rslora)
    with torch.no_grad():
        own = critic.state_dict()
        for name, view in model.named_parameters() if critic.base is not None else ():
            own[name].copy_(view)
        own["score.weight"].zero_()
    return critic


def _text(run: Run, config: PpoConfig, model: Model) -> PackedEpochs | None:
    """What PPO-ptx reads, packed as for pretraining."""
    if not config.ptx_coef:
        return None
    longest = longest_sequence(config, model)
    length = config.ptx_length or longest
    if length > min(longest, config.micro_batch_tokens):
        raise ValueError(
            f"ptx_length is {length}, but at most {min(longest, config.micro_batch_tokens)} tokens are read at once: lower it"
        )
    assert model.tokenizer is not None
    documents = read_text(config.ptx_data, False, 0.0, config.on_bad_row)
    tokenizer = model.tokenizer
    corpus = run.led(lambda: Corpus.build(documents, tokenizer, run.folder / "corpus"))
    run.say(f"pretraining text: {sum(source.tokens or 0 for source in corpus.sources):,} tokens")
    return PackedEpochs(corpus, length, config.seed)


def advantages_of(
    config: PpoConfig, answers: Episodes, known: Tensor, values: Tensor, kl_coef: float
) -> tuple[Tokens, dict[str, float]]:
    """What a step's answers teach: for each token advantage, return and old baseline; and TRL's figures.

    known: the reference's log-probs; values: the critic's, read after each token; both [N] and of before the first update.
    """
    batch = answers.batch
    mask, drawn, ends = batch.completion_mask, batch.logprobs, (batch.cu_seqlens[1:] - 1).long()
    assert drawn is not None  # a rollout has them
    kl = torch.where(mask, kl_estimate(drawn, known, config.kl_estimator), 0)
    penalty = -kl_coef * kl
    rewards = penalty.clone()
    rewards[ends] += answers.scores.to(rewards.dtype)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, *mean_std(rewards, mask), shift_mean=False)
    advantages, returns = gae(rewards, values, batch, config.gamma, config.lam)
    old = torch.where(mask, baselines(values, batch), 0)
    spread, unexplained = (mean_std(x, mask)[1] for x in (returns, returns - old))
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, *mean_std(advantages, mask))
    score, non_score = average(answers.scores), average(batch.sum(penalty.double()))
    figures = {
        "objective/kl": average(batch.sum(kl.double())),
        "objective/kl_coef": kl_coef,
        "objective/entropy": average(batch.sum(-drawn.double())),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": score + non_score,
        SCORE: score,
        "val/explained_variance": 1 - (unexplained / spread) ** 2 if spread else 0.0,
    }
    return Tokens(batch, {"advantages": advantages, "returns": returns, "old_values": old}), figures


@dataclass
class _Noted:
    """What the updates of a step have measured."""

    moves: Moves = field(default_factory=Moves)
    value_clipped: list[Tensor] = field(default_factory=list)
    """A vector for each micro-batch, an entry for each token of an answer."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of each update."""
    norms: list[float] = field(default_factory=list)
    stopped: bool = False

    def add(self, name: str, loss: float) -> float:
        self.losses.setdefault(name, []).append(loss)
        return loss

    def figures(self) -> dict[str, float]:
        losses = {f"loss/{name}_avg": math.fsum(found) / len(found) for name, found in self.losses.items()}
        return {
            **losses,
            **self.moves.figures(),
            "val/clipfrac_avg": average(torch.cat(self.value_clipped)),
            "grad_norm": self.norms[-1],
            "policy/stopped_early": float(self.stopped),
        }


class _Learner:
    """Policy and critic, each with its optimizer, and what an update is."""

    def __init__(self, run: Run, config: PpoConfig, model: Model, critic: Model, text: PackedEpochs | None) -> None:
        self._run, self._config = run, config
        self.model, self.critic, self._text = model, critic, text
        self.cursor = Cursor()
        """In the pretraining text."""
        self._ahead: Tensor | None = None
        """The critic's values that the next update begins with."""
        options: Mapping[str, Any] = {
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
            "max_grad_norm": config.max_grad_norm,
        }
        self.optimizer, self.critic_optimizer = run.optimizer(model, **options), run.optimizer(critic, **options)

    def set_rates(self, step: int, last: int) -> None:
        config = self._config
        self.optimizer.lr = learning_rate(config, step, last)
        own = dataclasses.replace(config, learning_rate=config.critic_learning_rate or config.learning_rate)
        self.critic_optimizer.lr = learning_rate(own, step, last)

    def values(self, batch: PackedBatch, step: int) -> Tensor:
        """float32 [N]: the critic's, read after each token, of before the step's first update.

        Where that update reads all answers at once, in one process, the forward is already its own: nothing changes in between.
        """
        order, most = next(self._mini_batches(len(batch), step, 0)), self._config.micro_batch_tokens
        if len(order) < len(batch) or batch.tokens.numel() > most or self._config.exact or self._run.ranks.count > 1:
            return self._run.share(batch, lambda part: token_values(self.critic, part, most))
        self._ahead = self.critic.values(batch.select(order))
        values = torch.empty_like(self._ahead.detach())
        values[batch.places(order)] = self._ahead.detach()
        return values

    def _mini_batches(self, count: int, step: int, epoch: int) -> Iterator[list[int]]:
        return mini_batches(count, self._config.num_mini_batches, f"{self._config.seed} {step} {epoch}")

    def update(self, whole: Tokens, step: int) -> tuple[float, dict[str, float]]:
        """All updates with a step's answers; (mean loss of an update, figures)."""
        noted = _Noted()
        for epoch in range(self._config.num_ppo_epochs):
            for part in self._mini_batches(len(whole.batch), step, epoch):
                if not self._update(whole.select(part), step > self._config.critic_warmup_steps, noted):
                    noted.stopped = True
                    return self._told(noted)
        return self._told(noted)

    def _told(self, noted: _Noted) -> tuple[float, dict[str, float]]:
        figures = noted.figures()
        weights = {"policy": 1.0, "value": self._config.vf_coef, "ptx": self._config.ptx_coef}
        return math.fsum(weight * figures.get(f"loss/{name}_avg", 0.0) for name, weight in weights.items()), figures

    def _update(self, mini: Tokens, policy: bool, noted: _Noted) -> bool:
        """One update of the critic and, if `policy`, of the policy. False: it is not made, the policy has moved too far."""
        config, run, most = self._config, self._run, self._config.micro_batch_tokens
        optimizers = [self.optimizer, self.critic_optimizer] if policy else [self.critic_optimizer]
        for optimizer in optimizers:
            optimizer.zero_grad()
        before, clipped = len(noted.moves.logs), len(noted.value_clipped)
        # The critic first: its values may wait for it, with all that their backward needs.
        value = run.accumulate(
            self.critic, mini.batch, most, lambda part, count, own: self._value(part, count, mini.of(own), noted)
        )
        noted.value_clipped[clipped:] = [run.gather(noted.value_clipped[clipped:])]
        if policy:
            loss = run.accumulate(
                self.model, mini.batch, most, lambda part, count, own: self._policy(part, count, mini.of(own), noted)
            )
            noted.moves.share(run, before)
            if config.target_kl and noted.moves.approximate_kl(before) > config.target_kl:
                return False
            noted.add("policy", loss)
            if self._text is not None:
                bins, self.cursor = self._text.take(self.cursor, max(1, round(config.ptx_ratio * len(mini.batch))))
                text = pack([piece for pieces in bins for piece in pieces])
                noted.add("ptx", run.accumulate(self.model, text, most, self._ptx) / config.ptx_coef)
        noted.add("value", value / config.vf_coef)
        noted.norms.append(run.update(*optimizers))
        return True

    def _policy(self, part: PackedBatch, count: int, own: Mapping[str, Tensor], noted: _Noted) -> Tensor:
        out = self.model.score(part, self._config.temperature, completion_only=True)
        assert part.logprobs is not None
        given = out.logprobs, part.logprobs, own["advantages"], part.completion_mask, self._config.cliprange
        noted.moves.note(*given, out.entropy[part.completion_mask])
        return ppo_policy(*given, count)

    def _ptx(self, part: PackedBatch, count: int, _: range) -> Tensor:
        # At temperature 1: this is reading, as in pretraining.
        return self._config.ptx_coef * cross_entropy(self.model.score(part).logprobs, part.completion_mask, count)

    def _value(self, part: PackedBatch, count: int, own: Mapping[str, Tensor], noted: _Noted) -> Tensor:
        read = self.critic.values(part) if self._ahead is None else self._ahead
        self._ahead = None
        values, old, returns = baselines(read, part), own["old_values"], own["returns"]
        span = self._config.cliprange_value
        with torch.no_grad():
            near = torch.clamp(values, old - span, old + span)
            clipped = (near - returns) ** 2 > (values - returns) ** 2
            noted.value_clipped.append(clipped[part.completion_mask])
        loss = ppo_value(values, old, returns, part.completion_mask, span, count)
        return self._config.vf_coef * loss
