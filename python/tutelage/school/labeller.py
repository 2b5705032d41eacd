"""The simulated labeller: a program in the place of the people who say which answers they like better.

It stands for InstructGPT's labellers (Ouyang et al. 2022), who ranked several answers to one prompt. It knows what is true
and sees the tone, prefers any right answer to any wrong one, and among equally right ones the kinder. Like people, it errs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.school.data import fact_of
from tutelage.school.draws import Draws
from tutelage.school.world import Fact, right, tone

_NICENESS = {"rude": 0, "neither": 1, "kind": 2}


@dataclass(frozen=True)
class SimulatedLabeller:
    """Ranks answers.

    noise: of each answer it makes two judgements, right or wrong and kind or rude, and each of them is turned around with
        this probability, independently. The draw depends on seed, prompt and answer alone: the order of the answers changes
        nothing, and equal answers are always tied.

    Raises ValueError where noise is not 0 … 1/2.
    """

    seed: int
    noise: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 0.5:
            raise ValueError(f"noise is a probability of 0 to 0.5, but it is {self.noise}")

    def judge(self, prompt: str, answer: str, fact: Fact) -> tuple[bool, int]:
        """(right, niceness 0 … 2) as this labeller sees it; the higher pair is the better answer."""
        draws = Draws("labeller", self.seed, prompt, answer)
        is_right, niceness = right(answer, fact), _NICENESS[tone(answer)]
        if draws.chance(self.noise):
            is_right = not is_right
        if draws.chance(self.noise):
            niceness = 2 - niceness
        return is_right, niceness

    def rank(self, prompt: str, responses: Sequence[str], fact: Fact) -> list[list[int]]:
        """Groups of indices into `responses`, best first; responses between which it sees no difference are tied."""
        judged = [self.judge(prompt, response, fact) for response in responses]
        return [[i for i, found in enumerate(judged) if found == level] for level in sorted(set(judged), reverse=True)]

    def label(self, row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, Any] | None:
        """A row `{"prompt", "responses", "ranking"}` for responses to a practice row; None where it ties them all, from
        which nothing can be learned.
        """
        ranking = self.rank(row["prompt"], responses, fact_of(row))
        return {"prompt": row["prompt"], "responses": list(responses), "ranking": ranking} if len(ranking) > 1 else None


def preference_rows(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """`{"prompt", "chosen", "rejected"}` of every two responses of a ranking row that are not tied, each pair of texts once."""
    pairs: dict[tuple[str, str], None] = {}
    for better, worse in itertools.combinations(row["ranking"], 2):
        for chosen, rejected in itertools.product(better, worse):
            pairs[row["responses"][chosen], row["responses"][rejected]] = None
    return [{"prompt": row["prompt"], "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
