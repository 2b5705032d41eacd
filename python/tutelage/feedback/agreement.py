"""How far several people agree: the share of equal judgements, and Krippendorff's alpha.

Alpha (K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011, section C) compares the disagreement that was seen
with the one that chance would give:

    α = 1 − D_o / D_e = 1 − (n − 1) · Σ_{c<k} o_ck δ²_ck / Σ_{c<k} n_c n_k δ²_ck

A *unit* is what several people judged; of m values that it got, every ordered pair of values of different people adds
1 / (m − 1) to the coincidences o_ck. n_c = Σ_k o_ck, n = Σ_c n_c. Units with one value do not count. δ² is the metric:

    nominal    δ²_ck = 1 for c ≠ k
    ordinal    δ²_ck = (Σ_{g=c}^{k} n_g − (n_c + n_k) / 2)²       of values in their order

α is 1 for perfect agreement, 0 for chance, below 0 for less than chance; it is not defined where all values are equal.

Which units and values a task has:

    rank       a unit is an answer, its value the rank it got, 1 the best, tied answers the mean of theirs; ordinal
    rate       a unit is an answer, its value the score; ordinal
    compare    a unit is an item, its value the choice; nominal

The percentage: rank: of all pairs of answers, and pairs of people who ranked them, the share that was put in the same order
(or tied by both), which is how InstructGPT's labellers agreed in 72.6 ± 1.5 %; rate: the share of pairs of equal scores;
compare: of equal choices. Texts (write) are not compared.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from tutelage.feedback.tasks import Task

Metric = Literal["nominal", "ordinal"]
Body = Mapping[str, Any]


@dataclass(frozen=True)
class Agreement:
    """How far the labellers agree."""

    items: int
    """Items with the judgements of two labellers or more."""
    percent: float | None
    """0 … 100; None where nothing can be compared."""
    alpha: float | None
    """Krippendorff's; None where it is not defined."""


class Coincidences:
    """Pairs of values of one unit each, to which units can be added and from which they can be taken: exact, in integers."""

    def __init__(self) -> None:
        self._pairs: dict[int, Counter[tuple[Any, Any]]] = {}  # number of a unit's values → ordered pairs of values

    def add(self, values: Sequence[Any], times: int = 1) -> None:
        """The values of one unit; times = -1 takes it out again. One value alone does not count."""
        if len(values) < 2:
            return
        pairs = self._pairs.setdefault(len(values), Counter())
        for pair in itertools.permutations(values, 2):
            pairs[pair] += times
            if not pairs[pair]:
                del pairs[pair]

    def alpha(self, metric: Metric) -> float | None:
        """Krippendorff's alpha; None where there is no pair, or all values are equal. Values must be sortable for ordinal."""
        observed: dict[tuple[Any, Any], Fraction] = {}
        for values, pairs in self._pairs.items():
            for pair, count in pairs.items():
                observed[pair] = observed.get(pair, Fraction(0)) + Fraction(count, values - 1)
        totals: dict[Any, Fraction] = {}
        for (one, _), share in observed.items():
            totals[one] = totals.get(one, Fraction(0)) + share
        categories = sorted(totals) if metric == "ordinal" else list(totals)
        seen, expected = Fraction(0), Fraction(0)
        for (i, one), (j, other) in itertools.combinations(enumerate(categories), 2):
            distance = Fraction(1)
            if metric == "ordinal":
                between = sum((totals[category] for category in categories[i : j + 1]), Fraction(0))
                distance = (between - (totals[one] + totals[other]) / 2) ** 2
            seen += observed.get((one, other), Fraction(0)) * distance
            expected += totals[one] * totals[other] * distance
        if not expected:
            return None
        return float(1 - (sum(totals.values(), Fraction(-1))) * seen / expected)


def krippendorff_alpha(units: Sequence[Sequence[Any]], metric: Metric) -> float | None:
    """Alpha of units, each the values that it got (of different people; who they were does not matter).

    See the formula above. None where no unit has two values, or all values are equal.
    """
    coincidences = Coincidences()
    for values in units:
        coincidences.add(values)
    return coincidences.alpha(metric)


def ranks(ranking: Sequence[Sequence[int]]) -> dict[int, float]:
    """The rank of each answer, 1 the best; tied answers have the mean of the ranks that they share."""
    found, above = {}, 0
    for group in ranking:
        found.update(dict.fromkeys(group, above + (len(group) + 1) / 2))
        above += len(group)
    return found


class AgreementCounter:
    """The agreement of a session, kept up to date as judgements come and go."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._units = Coincidences()
        self._items = self._same = self._compared = 0
        self._known: Agreement | None = None

    def replace(self, before: Sequence[Body], after: Sequence[Body]) -> None:
        """The judgements of one item, by different people, as they were and as they are."""
        if self._task == "write":
            return
        for bodies, times in ((before, -1), (after, 1)):
            if len(bodies) < 2:
                continue
            self._known = None
            self._items += times
            for values in _units(self._task, bodies):
                self._units.add(values, times)
            same, compared = _same(self._task, bodies)
            self._same += times * same
            self._compared += times * compared

    def agreement(self) -> Agreement:
        if self._known is None:
            percent = 100 * self._same / self._compared if self._compared else None
            metric: Metric = "nominal" if self._task == "compare" else "ordinal"
            self._known = Agreement(self._items, percent, self._units.alpha(metric))
        return self._known


def _units(task: Task, bodies: Sequence[Body]) -> list[list[Any]]:
    """Of one item: the values of each of its units."""
    if task == "compare":
        return [[body["choice"] for body in bodies]]
    if task == "rate":
        return [[rating["score"] for rating in ratings] for ratings in zip(*(body["ratings"] for body in bodies), strict=True)]
    ranked = [ranks(body["ranking"]) for body in bodies]
    return [[found[place] for found in ranked] for place in ranked[0]]


def _same(task: Task, bodies: Sequence[Body]) -> tuple[int, int]:
    """(equal, all) comparisons of two people's judgements of one item."""
    if task == "rank":
        ranked = [ranks(body["ranking"]) for body in bodies]
        signs = [
            [
                (found[one] > found[other]) - (found[one] < found[other])
                for one, other in itertools.combinations(range(len(found)), 2)
            ]
            for found in ranked
        ]
    else:
        signs = [[unit[person] for unit in _units(task, bodies)] for person in range(len(bodies))]
    compared = [a == b for one, other in itertools.combinations(signs, 2) for a, b in zip(one, other, strict=True)]
    return sum(compared), len(compared)
