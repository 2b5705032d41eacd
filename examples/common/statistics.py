"""What the figures of the worked cases are computed with: numpy only, each a formula that can be checked by hand.

Win rates and accuracies over answers, with their Wilson intervals, are `tutelage.evaluate.rate`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """A share of pairs with its 95 % interval, and how many pairs there are."""

    rate: float
    low: float
    high: float
    count: int


def pair_accuracy(scores: Sequence[float], means: Sequence[float], gap: float, resamples: int = 1000, seed: int = 0) -> Share:
    """Share of the pairs of texts whose mean ratings lie at least `gap` apart that the scores put in the same order.

    All pairs count; a tie of the scores is half right. The interval is a percentile bootstrap over texts (Efron & Tibshirani,
    1993), not over pairs: pairs that share a text are not independent. With weights w, how often each text was drawn, the
    share is Σ w_i w_j right_ij / Σ w_i w_j counted_ij.

    Raises ValueError where no two texts lie so far apart.
    """
    score, mean = np.asarray(scores, np.float64), np.asarray(means, np.float64)
    apart = mean[:, None] - mean[None, :]
    counted = (apart >= gap).astype(np.float64)  # each pair once: the higher rated text's row
    lead = score[:, None] - score[None, :]
    right = counted * np.where(lead > 0, 1.0, np.where(lead == 0, 0.5, 0.0))
    pairs = int(counted.sum())
    if pairs == 0:
        raise ValueError(f"no two of these {len(mean)} texts have ratings {gap} apart")
    chance = np.random.default_rng(seed)
    drawn = chance.multinomial(len(mean), np.full(len(mean), 1 / len(mean)), size=resamples).astype(np.float64)
    tops, bottoms = ((drawn @ matrix * drawn).sum(1) for matrix in (right, counted))
    low, high = np.quantile(tops[bottoms > 0] / bottoms[bottoms > 0], [0.025, 0.975])
    return Share(float(right.sum()) / pairs, float(low), float(high), pairs)


def rater_agreement(ratings: Sequence[Sequence[int]], means: Sequence[float], gap: float) -> float:
    """How often a single rating of each of two texts puts them in the order of their mean ratings, at least `gap` apart.

    The k-th ratings of both are compared, for every k that both have; equal ones say nothing and are left out. It is what one
    person's word is worth, and so about the most that a model can reach that has to predict the crowd's.
    """
    width = min(map(len, ratings))
    given = np.array([row[:width] for row in ratings], np.float64)
    mean = np.asarray(means, np.float64)
    counted = (mean[:, None] - mean[None, :]) >= gap
    right = wrong = 0
    for column in given.T:
        lead = column[:, None] - column[None, :]
        right += int((counted & (lead > 0)).sum())
        wrong += int((counted & (lead < 0)).sum())
    return right / (right + wrong)


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words in all texts together, as a share of all their n-grams (Li et al. 2016, arXiv 1510.03055).

    It falls when a model repeats itself, within an answer or from one to the next. Comparable only for as many texts of about
    one length. 0 where no text has n words.
    """
    counted: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        split = words(text)
        counted.update(zip(*(split[start:] for start in range(n)), strict=False))
    return len(counted) / total if (total := sum(counted.values())) else 0.0


def words(text: str) -> list[str]:
    """Its words in lower case: letters, digits and apostrophes; everything else only separates them."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


class Ridge:
    """Ridge regression of a number on which words a text has (bag of words): the classical way to score a text.

    min Σ (x_i·w + b − y_i)² + penalty ‖w‖², where x has 1/√k for each of a text's k different known words, less its mean over
    the training texts; b is the mean of y. Solved in the dual, (X Xᵀ + penalty I) a = y − b, w = Xᵀ a: there are fewer texts
    than one would want, and as many words.
    """

    def __init__(self, texts: Sequence[str], targets: Sequence[float], penalty: float = 0.5, fewest: int = 2) -> None:
        """fewest: texts that a word must stand in to be known. Raises ValueError where no word stands in so many."""
        bags = [set(words(text)) for text in texts]
        counts = Counter(word for bag in bags for word in bag)
        self.vocabulary = {
            word: place for place, word in enumerate(sorted(w for w, count in counts.items() if count >= fewest))
        }
        if not self.vocabulary:
            raise ValueError(f"no word stands in {fewest} of these {len(texts)} texts, so there is nothing to fit")
        x, y = self._features(bags), np.asarray(targets, np.float32)
        self._centre = x.mean(0)
        self._intercept = float(y.mean(dtype=np.float64))
        x -= self._centre
        gram = x @ x.T
        gram[np.diag_indices_from(gram)] += penalty
        self._weights = x.T @ np.linalg.solve(gram, y - np.float32(self._intercept))

    def _features(self, bags: Sequence[set[str]]) -> npt.NDArray[np.float32]:
        x = np.zeros((len(bags), len(self.vocabulary)), np.float32)
        for row, bag in enumerate(bags):
            places = [self.vocabulary[word] for word in bag if word in self.vocabulary]
            x[row, places] = 1 / math.sqrt(max(len(places), 1))
        return x

    def predict(self, texts: Sequence[str]) -> list[float]:
        """The number of each text."""
        x = self._features([set(words(text)) for text in texts])
        found: list[float] = ((x - self._centre) @ self._weights + self._intercept).tolist()
        return found
