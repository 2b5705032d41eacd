"""Real human feedback: 10,603 snippets of film reviews, each rated by about 18 people from −4 to +4.

From the source distribution of vaderSentiment 3.3.2 (Hutto & Gilbert, ICWSM 2014; MIT). People said how positive a text is, not
which of two answers they would prefer. So what is learned from it is sentiment steering, towards what people rated as positive
(the task of Ziegler et al. 2019, arXiv 1909.08593): it says nothing of which answer is better.

Every text belongs to one part only, decided by a hash of its normalised text:

    held_out   never learned from: what the reward model and the baselines are measured with
    judge      the judge is fitted on them, which compares the answers of two models; the reward model never sees them
    prompts    their beginnings are the prompts of PPO and DPO, and of the exam; their ratings are not used
    reward     SFT reads some of them, the reward model learns the ratings of some of them
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.packages import VADER, fetch, read_nested
from common.statistics import words

Part = Literal["held_out", "judge", "prompts", "reward"]
Row = dict[str, Any]

#: Stands before every text, so that all texts answer one prompt, and the first word has something before it.
LEAD = "Film review:"

_TEXTS = "movieReviewSnippets_GroundTruth.txt"
_RATINGS = "movieReviewSnippets_anonDataRatings.txt"


@dataclass(frozen=True)
class Rated:
    """A snippet and what people said of it."""

    id: str
    text: str
    """As published."""
    mean: float
    """Of its ratings, −4 … +4."""
    ratings: tuple[int, ...]

    @property
    def clean(self) -> str:
        """One line, with the dashes that the publication has lost (it has runs of blanks for them) and one kind of quotes."""
        return " ".join(re.sub(r"\s{2,}", " - ", self.text.strip()).replace("''", '"').split())


def rated_texts(packages: Path) -> list[Rated]:
    """All of them; of those that say the same once normalised, the first. Raises as `fetch`, `read_nested` and `parse`."""
    archive, inner = fetch(VADER, packages), "hutto_ICWSM_2014.tar.gz"
    texts, ratings = (read_nested(archive, inner, name).decode() for name in (_TEXTS, _RATINGS))
    return without_duplicates(parse(texts, ratings))


def parse(texts: str, ratings: str) -> list[Rated]:
    """From the two files: lines of (id, mean, text) and of (id, mean, standard deviation, list of ratings), tab between.

    Raises ValueError naming the line that is something else, and the id that is in one file only or whose mean is not its
    ratings'.
    """
    given: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(ratings.splitlines(), 1):
        fields = line.split("\t")
        try:
            key, _, _, listed = fields
            numbers = json.loads(listed)
            given[key] = tuple(int(rating) for rating in numbers)
        except (ValueError, TypeError):
            raise ValueError(
                f"{_RATINGS}:{number}: it is not an id, a mean, a deviation and a list of ratings: {line!r:.80}"
            ) from None
        if not given[key] or not all(-4 <= rating <= 4 for rating in given[key]):
            raise ValueError(f"{_RATINGS}:{number}: ratings must lie in -4 .. 4, and there must be one: {line!r:.80}")
    found = []
    for number, line in enumerate(texts.splitlines(), 1):
        fields = line.split("\t")
        if len(fields) != 3 or not fields[2].strip():
            raise ValueError(f"{_TEXTS}:{number}: it is not an id, a mean and a text: {line!r:.80}")
        key, mean, text = fields
        if key not in given:
            raise ValueError(f"{_TEXTS}:{number}: {_RATINGS} has no ratings of id {key!r}")
        own = given.pop(key)
        if abs(float(mean) - sum(own) / len(own)) > 1e-6:
            raise ValueError(f"{_TEXTS}:{number}: the mean of id {key!r} is {mean}, but its ratings' is {sum(own) / len(own)}")
        found.append(Rated(key, text, float(mean), own))
    if given:
        raise ValueError(f"{_TEXTS} has no text of id {next(iter(given))!r}")
    return found


def normalised(text: str) -> str:
    """What two texts have in common that say the same: their words."""
    return " ".join(words(text))


def without_duplicates(texts: Sequence[Rated]) -> list[Rated]:
    """The first of all that say the same."""
    first: dict[str, Rated] = {}
    for rated in texts:
        first.setdefault(normalised(rated.text), rated)
    return list(first.values())


def split(texts: Sequence[Rated], sizes: Mapping[Part, int], seed: int) -> dict[Part, list[Rated]]:
    """The parts: so many of each, and of the last what is left. In each the order is the hash's, so a beginning of a part is a
    random sample of it. Texts that say the same stay together in one part.

    Raises ValueError where there are not enough.
    """
    order = sorted(texts, key=lambda rated: (_digest(seed, normalised(rated.text)), rated.id))
    parts: dict[Part, list[Rated]] = {}
    begin = 0
    for name, size in sizes.items():
        end = begin + size
        while begin < end < len(order) and normalised(order[end].text) == normalised(order[end - 1].text):
            end += 1
        parts[name], begin = order[begin:end], end
    if begin >= len(order):
        raise ValueError(f"there are {len(order)} texts, too few for parts of {sum(sizes.values())} and one more")
    return {**parts, "reward": order[begin:]}


def _digest(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed} {key}".encode(), digest_size=16).digest()


# ---- rows of the loops' schemas


def beginning(rated: Rated, seed: int, fewest: int = 3, most: int = 6) -> tuple[str, str] | None:
    """(the first three to six words, the rest, with the blank before it); None for a text with fewer than three words more.

    Cut at a blank, where the tokens of the whole text are cut as well.
    """
    pieces = rated.clean.split(" ")
    count = fewest + int.from_bytes(_digest(seed, f"beginning {rated.id}")[:4], "big") % (most - fewest + 1)
    if len(pieces) < count + 3:
        return None
    return " ".join(pieces[:count]), " " + " ".join(pieces[count:])


def demonstrations(texts: Sequence[Rated], seed: int, longest: int) -> list[Row]:
    """`{"prompt", "completion"}`: the beginnings of texts of at most `longest` words, and how they went on."""
    cut = [beginning(rated, seed) for rated in texts if len(rated.clean.split(" ")) <= longest]
    return [{"prompt": f"{LEAD} {begun}", "completion": rest} for begun, rest in filter(None, cut)]


def prompts(texts: Sequence[Rated], seed: int) -> list[Row]:
    """`{"prompt"}`: real beginnings. Of texts that begin the same, the first only: no two prompts are one."""
    found: dict[str, Row] = {}
    for rated in texts:
        if (cut := beginning(rated, seed)) is not None:
            found.setdefault(normalised(cut[0]), {"prompt": f"{LEAD} {cut[0]}"})
    return list(found.values())


def rankings(texts: Sequence[Rated], responses: int, seed: int) -> list[Row]:
    """`{"prompt", "responses", "ranking"}`: each text once, among `responses` of them, best rated first.

    The texts are sorted by mean rating and cut into as many equal parts; the j-th of every part make a ranking. So its
    members lie evenly spread over the scale, about as far apart as can be, and no order is decided by noise. What does not
    fill a ranking is left out. Equal means are tied.
    """
    order = sorted(texts, key=lambda rated: (rated.mean, rated.id))
    count = len(order) // responses
    rows = []
    for row in range(count):
        members = [order[row + part * count] for part in range(responses)]
        members.sort(key=lambda rated: _digest(seed, f"response {rated.id}"))  # the place says nothing of the rating
        by_mean: dict[float, list[int]] = {}
        for place, rated in enumerate(members):
            by_mean.setdefault(rated.mean, []).append(place)
        ranking = [by_mean[mean] for mean in sorted(by_mean, reverse=True)]
        rows.append({"prompt": LEAD, "responses": [f" {rated.clean}" for rated in members], "ranking": ranking})
    return rows
