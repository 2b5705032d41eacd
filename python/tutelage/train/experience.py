"""What the loops share that learn from the model's own answers: prompts, answers, their scores, and what is told of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage import kernels
from tutelage.batch import PackedBatch
from tutelage.data.examples import ExampleSet, Prompt, load_prompts
from tutelage.data.packing import hashes
from tutelage.data.tokenizer import Tokenizer
from tutelage.evaluate import load_reward_model, sequence_rewards
from tutelage.files import DISK, Disk
from tutelage.model import Model
from tutelage.objectives import mean_std
from tutelage.rewards import RewardFunctions, RewardLimits
from tutelage.rollouts import Rollouts
from tutelage.train import picture
from tutelage.train.configs import TryingConfig
from tutelage.train.run import METRICS, NonFiniteError, Run, write_json
from tutelage.train.sharing import answers
from tutelage.train.tuning import TuningResult, columns_of, content, split


@dataclass(frozen=True)
class TryingResult(TuningResult):
    """What a finished run has come to. The examples are prompts, the tokens those of answers; eval_loss is None."""

    episodes: int
    """Answers that were learned from."""
    score: float
    """Mean over the last step's answers."""
    eval_reward: float | None
    """Mean score of the answers of the model in `folder` to the held-out prompts; None where nothing is held out."""
    times: Mapping[str, float]
    """Share of this process's steps that each part took: rollout, score, train, other."""


# ---- prompts, answers, scores


def longest_sequence(config: TryingConfig, model: Model) -> int:
    """Tokens that a prompt and its answer may have together."""
    return config.max_length or model.config.max_position_embeddings


def load(run: Run, config: TryingConfig, model: Model, tokenizer: Tokenizer) -> tuple[ExampleSet[Prompt], ExampleSet[Prompt]]:
    """(prompts to learn from, held out), and a report to the reader.

    Raises ValueError where nothing would be learned, naming what does not fit; otherwise as `load_prompts`.
    """
    if not config.reward_model and not config.reward_funcs:
        raise ValueError("nothing would judge the answers: give a reward_model, reward_funcs, or both")
    longest, answer = longest_sequence(config, model), config.max_completion_length
    if answer >= longest:
        raise ValueError(f"max_completion_length is {answer}, which leaves no room for a prompt in {longest} tokens: lower it")
    loaded = load_prompts(config.data, tokenizer, longest, config.on_bad_row, config.on_long, answer)
    run.say(str(loaded.report))
    for prompt in loaded.examples:
        needed = len(prompt.tokens) + answer
        if needed > config.micro_batch_tokens:
            raise ValueError(
                f"{prompt.where}: the prompt and its answer may have {needed} tokens, more than "
                f"micro_batch_tokens = {config.micro_batch_tokens}: raise it, or lower max_completion_length"
            )
    return split(loaded, config)


class Judge:
    """What answers score: a reward model's value at the last token, functions of the text, or both. For a `with`."""

    def __init__(
        self,
        run: Run,
        config: TryingConfig,
        model: Model,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        disk: Disk = DISK,
    ) -> None:
        """model: whose answers these will be. prompts: all that there will be, for the names of their columns.

        Raises ValueError for a reward model that cannot read the longest sequences, otherwise as `load_reward_model` and
        `RewardFunctions`.
        """
        self._run, self._config = run, config
        self.model = (
            None
            if config.reward_model is None
            else load_reward_model(config.reward_model, tokenizer, model.base, model.device_name)
        )
        longest = longest_sequence(config, model)
        if self.model is not None and self.model.config.max_position_embeddings < longest:
            raise ValueError(
                f"the reward model {config.reward_model} reads at most {self.model.config.max_position_embeddings} tokens, "
                f"but max_length is {longest}: lower it"
            )
        self.key = "" if self.model is None else content(self.model)
        """Equal means the same reward model."""
        self._names = tuple(columns_of(prompts)) if config.reward_funcs else ()
        self._functions: RewardFunctions | None = None
        if config.reward_funcs:
            self._functions = RewardFunctions(
                config.reward_funcs,
                run.folder,
                config.reward_weights or None,
                self._names,
                RewardLimits(seconds=config.reward_timeout),
                config.reward_failure,
                disk,
            )
        self._stack = ExitStack()

    def __enter__(self) -> Judge:
        if self._functions is not None and self._run.ranks.leads:
            self._stack.enter_context(self._functions)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def scores(self, prompts: Sequence[Prompt], rollouts: Rollouts) -> tuple[list[float | None], dict[str, float]]:
        """Of each answer its score, None: it has none; and what there is to measure of the functions.

        prompts: one for each answer. Raises NonFiniteError for a reward model that gives no number, otherwise as
        `RewardFunctions`.
        """
        scores: list[float | None] = [None] * len(rollouts)
        figures: dict[str, float] = {}
        if self._functions is not None:
            scores, figures = self._told(self._functions, prompts, rollouts)
        judge, most = self.model, self._config.micro_batch_tokens
        if judge is not None:
            values = self._run.share(rollouts.pack(), lambda part: sequence_rewards(judge, part, most))
            check_finite(self._run, "reward", values)
            # An answer that a function leaves out stays out; without functions there is the reward model alone.
            own = [0.0] * len(values) if self._functions is None else scores
            scores = [None if given is None else given + value for given, value in zip(own, values.tolist(), strict=True)]
        ended = [reason == "stop" for reason in rollouts.finish_reasons]
        return [self._with_end(score, end) for score, end in zip(scores, ended, strict=True)], figures

    def _told(
        self, functions: RewardFunctions, prompts: Sequence[Prompt], rollouts: Rollouts
    ) -> tuple[list[float | None], dict[str, float]]:
        """What the functions say. One rank asks them for all answers of a step at once, for they may compare them."""
        given = None
        if self._run.ranks.leads:
            found = functions(
                [_plain(prompt) for prompt in prompts],
                [_completion(prompt, text) for prompt, text in zip(prompts, rollouts.texts or [], strict=True)],
                {name: [prompt.columns.get(name) for prompt in prompts] for name in self._names},
                self._run.step,
            )
            given = found.totals, found.metrics()
        scores, figures = self._run.ranks.exchange(given)[0]
        return scores, figures

    def _with_end(self, score: float | None, ended: bool) -> float | None:
        if score is None or ended:
            return score
        if self._config.missing_eos_score is not None:
            return self._config.missing_eos_score
        return score - self._config.missing_eos_penalty


def _plain(prompt: Prompt) -> Any:
    return prompt.prompt if isinstance(prompt.prompt, str) else [dict(message) for message in prompt.prompt]


def _completion(prompt: Prompt, text: str) -> Any:
    """As TRL gives it to a function: text after text, a message after messages."""
    return text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]


@dataclass(frozen=True)
class Episodes:
    """Answers that have a score."""

    prompts: list[Prompt]
    """[S]"""
    rollouts: Rollouts
    batch: PackedBatch
    """Prompt and answer; the answers are its mask, `logprobs` the policy's when it drew them."""
    scores: Tensor
    """float64 [S]"""
    groups: list[int]
    """[S] which of the step's prompts each answers; they ascend."""
    figures: dict[str, float]
    """What there is to measure of them, by TRL's names."""

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> Episodes:
        """These answers only, at least one."""
        rollouts = self.rollouts.select(rows)
        prompts, groups = [self.prompts[row] for row in rows], [self.groups[row] for row in rows]
        return Episodes(prompts, rollouts, rollouts.pack(), self.scores[list(rows)], groups, self.figures)


def gather(
    run: Run, config: TryingConfig, model: Model, judge: Judge, prompts: Sequence[Prompt], purpose: str, samples: int = 1
) -> Episodes | None:
    """The model's answers to the prompts and their scores, without those that have none; None where no answer has one.

    What is drawn depends on the weights, each prompt, config.seed and `purpose` alone. samples: of each prompt, which then
    stand one after another. Raises as `Judge.scores`.
    """
    with run.timed("rollout"):
        rollouts = answers(
            run.ranks,
            model,
            [prompt.tokens.tolist() for prompt in prompts],
            config.max_completion_length,
            samples,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            seed=int(hashes(f"rollout {config.seed} {purpose}", 1)[0] >> np.uint64(1)),
        )
        if model.base is None:  # the copy of the weights that generation made is stale after the next update; not of a base
            model.free_caches(keep_memory=True)
    run.fault("rollout")
    with run.timed("score"):
        rows = [prompt for prompt in prompts for _ in range(samples)]
        scores, figures = judge.scores(rows, rollouts)
    run.fault("scored")
    kept = [row for row, score in enumerate(scores) if score is not None]
    if not kept:
        return None
    chosen, groups = rollouts.select(kept), [row // samples for row in kept]
    found = torch.tensor([scores[row] for row in kept], dtype=torch.float64)
    return Episodes([rows[row] for row in kept], chosen, chosen.pack(), found, groups, {**figures, **_lengths(rollouts)})


def _lengths(rollouts: Rollouts) -> dict[str, float]:
    lengths, ended = rollouts.lengths, rollouts.finish_reasons.count("stop")
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - ended / len(lengths),
        "val/num_eos_tokens": ended,
    }


def check_finite(run: Run, what: str, found: Tensor, batch: PackedBatch | None = None) -> None:
    """Raises NonFiniteError naming the step and the first answer whose `found` is no number.

    found: [S], or [N] with the batch that its tokens are of.
    """
    wrong = torch.nonzero(~torch.isfinite(found)).flatten().tolist()
    if not wrong:
        return
    answer = wrong[0] if batch is None else int(torch.searchsorted(batch.cu_seqlens, wrong[0], right=True)) - 1
    raise NonFiniteError(
        f"step {run.step}: the {what} of answer {answer} is {found[wrong[0]].item()}; "
        f"the update was not applied. {run.advice()}"
    )


# ---- tokens


def token_logprobs(model: Model, batch: PackedBatch, max_tokens: int, temperature: float) -> Tensor:
    """float32 [N], of the answers, without gradient; `max_tokens` changes no bit."""
    with torch.no_grad():
        scored = [model.score(part, temperature, completion_only=True) for part in batch.split(max_tokens)]
        return torch.cat([out.logprobs for out in scored])


def token_values(critic: Model, batch: PackedBatch, max_tokens: int) -> Tensor:
    """float32 [N], read after each token, without gradient; `max_tokens` changes no bit."""
    with torch.no_grad():
        return torch.cat([critic.values(part) for part in batch.split(max_tokens)])


@dataclass(frozen=True)
class Tokens:
    """A batch, and columns that have an entry for each of its tokens."""

    batch: PackedBatch
    columns: Mapping[str, Tensor]

    def select(self, sequences: Sequence[int]) -> Tokens:
        """These sequences, in their order."""
        places = self.batch.places(sequences)
        return Tokens(self.batch.select(sequences), {name: column[places] for name, column in self.columns.items()})

    def of(self, sequences: range) -> dict[str, Tensor]:
        """The columns of consecutive sequences, a micro-batch's."""
        begin, end = (int(self.batch.cu_seqlens[place]) for place in (sequences.start, sequences.stop))
        return {name: column[begin:end] for name, column in self.columns.items()}


def mini_batches(count: int, parts: int, purpose: str) -> Iterator[list[int]]:
    """0 .. count − 1 in an order that `purpose` decides, in as many parts as nearly of one size; none is empty."""
    order = np.argsort(hashes(f"mini-batches {purpose}", count), kind="stable").tolist()
    parts = min(parts, count)
    for part in range(parts):
        yield order[count * part // parts : count * (part + 1) // parts]


@dataclass
class Moves:
    """What the updates of a step have measured of the policy: a vector for each micro-batch, an entry for each token of an
    answer, or for each answer."""

    logs: list[Tensor] = field(default_factory=list)
    """log ρ, since the answers were drawn."""
    clipped: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)

    def note(self, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip_range: float, entropy: Tensor) -> None:
        """As `ppo_policy` is given them. entropy: of the tokens of the answers."""
        with torch.no_grad():
            moved = logprobs - old
            ratio, low, high = torch.exp(moved), 1 - clip_range, 1 + clip_range
            clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
            self.logs.append(moved[mask])
            self.clipped.append(clipped[mask])
            self.entropy.append(entropy.detach())

    def share(self, run: Run, first: int) -> None:
        """Puts what all ranks have noted of an update in the place of what this one has, from the first-th micro-batch on."""
        for noted in (self.logs, self.clipped, self.entropy):
            noted[first:] = [run.gather(noted[first:])]

    def approximate_kl(self, first: int = 0) -> float:
        """Mean of ½ (log ρ)² from the first-th micro-batch on (Schulman 2020's k2)."""
        moved = torch.cat(self.logs[first:])
        return average(0.5 * moved * moved)

    def figures(self) -> dict[str, float]:
        """By TRL's names; empty where the policy was not updated."""
        if not self.logs:
            return {}
        ratio = torch.exp(torch.cat(self.logs).double())
        mean, deviation = mean_std(ratio, torch.ones_like(ratio, dtype=torch.bool))
        return {
            "policy/approxkl_avg": self.approximate_kl(),
            "policy/clipfrac_avg": average(torch.cat(self.clipped)),
            "policy/entropy_avg": average(torch.cat(self.entropy)),
            "val/ratio": mean,
            "val/ratio_var": deviation**2,
        }


def average(x: Tensor) -> float:
    """Mean of all entries, in an order that no number of threads changes."""
    return kernels.total(x.double()).item() / x.numel()


def measure(run: Run, config: TryingConfig, model: Model, judge: Judge, held_out: ExampleSet[Prompt]) -> dict[str, float]:
    """What the model's answers to the held-out prompts score, always of the same draws; empty where none has a score."""
    with run.timed("evaluate"):
        episodes = gather(run, config, model, judge, held_out.examples, "evaluate")
    if episodes is None:
        return {}
    measured = {"eval_reward": average(episodes.scores), "eval_mean_length": episodes.figures["completions/mean_length"]}
    run.write_metrics(measured)
    run.say(f"step {run.step}: score {measured['eval_reward']:.3f} of the answers to the held-out prompts")
    return measured


# ---- what the reader sees


def steps_of(config: TryingConfig, prompts: int, total_episodes: int = 0) -> int:
    """Steps of the whole run."""
    if total_episodes:
        return math.ceil(total_episodes / config.batch_size)
    return config.max_steps or math.ceil(config.num_train_epochs * prompts / config.batch_size)


def show_sample(run: Run, tokenizer: Tokenizer, episodes: Episodes) -> None:
    """The first answer of the step, with its score."""
    prompt = episodes.prompts[0]
    told = prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1]["content"]
    assert episodes.rollouts.texts is not None
    run.say(f"  {told!r} → {episodes.rollouts.texts[0]!r} (score {episodes.scores[0].item():.3f})")


def conclude(run: Run, result: TryingResult, config: TryingConfig, command: str, score: str) -> None:
    """Draws the scores, says what the run has come to, and writes the figures for `--json`. score: its name in the metrics."""
    if not run.ranks.leads:
        return
    if config.plot and (run.folder / METRICS).exists():  # not where a finished run was resumed in another folder
        run.say(picture.show(run.folder / METRICS, run.folder / "score.png", "", "mean of a step", score))
    measured = "" if result.eval_reward is None else f", {result.eval_reward:.3f} of answers to the held-out prompts"
    split = ", ".join(f"{part} {share:.0%}" for part, share in result.times.items())
    run.say(f"score {result.score:.3f}{measured}; {result.tokens_per_second:,.0f} tokens of answers/s ({split})")
    run.say(f"model and tokenizer, of step {result.selected_step}: {result.folder}")
    if config.json is not None:
        figures: Mapping[str, Any] = {**dataclasses.asdict(result), "folder": str(result.folder)}
        write_json(Path(config.json), {"command": command, **figures})
