"""The exam: a model goes on with real beginnings of reviews that nobody learned from, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.measures import MICRO_BATCH_TOKENS, perplexity
from common.statistics import Ridge, distinct
from movies.data import LEAD
from tutelage import Model, PackedBatch
from tutelage.evaluate import kl_divergence, rate, sequence_rewards


@dataclass(frozen=True)
class Sheet:
    """What every model is asked."""

    prompts: Sequence[str]
    plain: PackedBatch
    """Held-out text of another kind."""
    longest: int
    """Answer, in tokens."""
    seed: int


def sit(
    model: Model, sheet: Sheet, taught: Model, reward_model: Model, judge: Ridge
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, `{"prompt", "answer", "reward", "judged"}` of each prompt). taught: the model after SFT.

    Answers are drawn at temperature 1 with the same seed for every model: it is the distribution that learned, not its
    likeliest word.
    """
    rollouts = model.generate(list(sheet.prompts), sheet.longest, seed=sheet.seed)
    model.free_caches()
    assert rollouts.texts is not None  # the model has a tokenizer
    rewards = sequence_rewards(reward_model, rollouts.pack(), MICRO_BATCH_TOKENS).tolist()
    whole = [prompt.removeprefix(LEAD) + text for prompt, text in zip(sheet.prompts, rollouts.texts, strict=True)]
    judged = judge.predict(whole)
    divergence = kl_divergence(rollouts, taught, 1.0, MICRO_BATCH_TOKENS)
    figures = {
        "reward": math.fsum(rewards) / len(rewards),
        "judged": math.fsum(judged) / len(judged),
        "kl": divergence.per_sequence,
        "kl_error": divergence.standard_error,
        "length": math.fsum(rollouts.lengths) / len(rollouts),
        "ended": rollouts.finish_reasons.count("stop") / len(rollouts),
        "distinct2": distinct(rollouts.texts),
        "perplexity": perplexity(model, sheet.plain),
    }
    rows = [
        {"prompt": prompt, "answer": text, "reward": reward, "judged": mark}
        for prompt, text, reward, mark in zip(sheet.prompts, rollouts.texts, rewards, judged, strict=True)
    ]
    return figures, rows


def wins(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How often the judge finds the first model's answer more positive than the other's to the same prompt; ties count half.
    With its 95 % Wilson interval."""
    scores = [
        0.5 if ours["judged"] == theirs["judged"] else float(ours["judged"] > theirs["judged"])
        for ours, theirs in zip(rows, others, strict=True)
    ]
    found = rate(scores)
    return {"win_rate": found.rate, "win_rate_low": found.low, "win_rate_high": found.high}
