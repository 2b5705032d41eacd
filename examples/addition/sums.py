"""All sums of two two-digit numbers. A sum and the same one the other way round are always in one part."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

Row = dict[str, str]


@dataclass(frozen=True)
class Sums:
    """`{"prompt": "47+35=", "completion": "82", "answer": "82"}` each; the parts have no sum in common."""

    exam: list[Row]
    shown: list[Row]
    tried: list[Row]


def sums(exam: int, shown: int, seed: int) -> Sums:
    """The parts: so many sums, or one more, of the first two, and all others. In each the order is random.

    Raises ValueError where nothing would be left.
    """
    order = sorted(
        ((a, b) for a in range(10, 100) for b in range(10, 100)), key=lambda pair: (_digest(seed, *sorted(pair)), pair)
    )

    def end_of(place: int) -> int:
        while 0 < place < len(order) and sorted(order[place]) == sorted(order[place - 1]):
            place += 1
        return place

    first = end_of(exam)
    second = end_of(first + shown)
    if second >= len(order):
        raise ValueError(f"there are {len(order)} sums, too few for {exam} and {shown} and one more")
    return Sums(_rows(order[:first]), _rows(order[first:second]), _rows(order[second:]))


def _rows(pairs: list[tuple[int, int]]) -> list[Row]:
    # The answer twice: as what SFT learns, and as a column for the reward, which is not given a "completion".
    return [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a, b in pairs]


def _digest(seed: int, small: int, large: int) -> bytes:
    return hashlib.blake2b(f"{seed} {small}+{large}".encode(), digest_size=16).digest()
