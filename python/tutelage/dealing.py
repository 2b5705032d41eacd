"""How a step's work is dealt to ranks, and in which order partial results are added up.

A rank's share is a run of consecutive sequences, so results of all ranks, one rank's after the other's, stand in the order
of the whole. Shares are alike in tokens, not in sequences.

Two ways. `deal` cuts as evenly as it can for a number of ranks: a sum over shares then depends on that number. `tree` cuts
without knowing the number: in two halves again and again, by tokens alone. Dealt from its root (`share_out`), the tree's
upper part lies between the ranks and its lower part within them, so a sum along it has the same order for 1, 2, 3 … ranks.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def middle(first: int, last: int) -> int:
    """Where the ranks first … last − 1, two at least, are cut in two; the left half is the larger."""
    return (first + last + 1) // 2


def deal(costs: Sequence[int], ranks: int) -> list[range]:
    """Consecutive units for each rank, as alike in cost as cuts between units allow; where there are enough, all have one."""
    sums = [0, *itertools.accumulate(costs)]

    def cut(first: int, last: int, count: int) -> Iterator[range]:
        if count == 1:
            yield range(first, last)
            return
        left = middle(0, count)
        at = _nearest(sums, sums[first] + (sums[last] - sums[first]) * left / count, first, last)
        if last - first >= count:
            at = min(max(at, first + left), last - (count - left))
        yield from cut(first, at, left)
        yield from cut(at, last, count - left)

    return list(cut(0, len(costs), ranks))


@dataclass(frozen=True)
class Node:
    """The units first … last − 1, cut in two halves where they are several."""

    first: int
    last: int
    halves: tuple[Node, Node] | None = None


def tree(costs: Sequence[int]) -> Node:
    """All units, at least one, halved by cost until each stands alone. It depends on the costs and on nothing else."""
    sums = [0, *itertools.accumulate(costs)]

    def grow(first: int, last: int) -> Node:
        if last - first == 1:
            return Node(first, last)
        at = _nearest(sums, (sums[first] + sums[last]) / 2, first + 1, last - 1)
        return Node(first, last, (grow(first, at), grow(at, last)))

    return grow(0, len(costs))


def _nearest(sums: Sequence[int], wanted: float, first: int, last: int) -> int:
    """The index in first … last whose sum is nearest to `wanted`; the first of equals."""
    at = bisect.bisect_left(sums, wanted, first, last + 1)
    return min((index for index in (at - 1, at) if first <= index <= last), key=lambda index: abs(sums[index] - wanted))


def share_out(node: Node, ranks: int) -> list[Node | None]:
    """A node for each rank, from the root down; None for a rank that a single unit leaves without one."""
    if ranks == 1:
        return [node]
    if node.halves is None:
        return [node, *[None] * (ranks - 1)]
    left = middle(0, ranks)
    return [*share_out(node.halves[0], left), *share_out(node.halves[1], ranks - left)]


def fold(values: Sequence[T | None], add: Callable[[T, T], T]) -> T | None:
    """The sum of what the ranks have, in the order of the tree's upper part; None counts as nothing, not as zero."""
    if len(values) == 1:
        return values[0]
    at = middle(0, len(values))
    left, right = fold(values[:at], add), fold(values[at:], add)
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)


def fold_tree(node: Node, values: Sequence[T], add: Callable[[T, T], T]) -> T:
    """The sum of values[unit] along the whole tree."""
    if node.halves is None:
        return values[node.first]
    left, right = node.halves
    return add(fold_tree(left, values, add), fold_tree(right, values, add))


def leaves(groups: Sequence[int], size: int) -> list[range]:
    """Consecutive sequences, at least `size` of them together (the last ones may be fewer) and no group cut apart.

    groups: how many sequences each group has.
    """
    found, first, last = [], 0, 0
    for count in groups:
        last += count
        if last - first >= size:
            found.append(range(first, last))
            first = last
    return [*found, range(first, last)] if last > first else found
