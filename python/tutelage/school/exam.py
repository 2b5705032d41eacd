"""The exam: what a model says to questions about people that it was never asked about, and what that is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.data.corpus import HeldOut
from tutelage.data.documents import Source, read_documents
from tutelage.data.examples import Prompt, load_prompts
from tutelage.evaluate import documents_to_score, held_out_bits_per_byte, kl_divergence, rate, sequence_rewards
from tutelage.model import Model
from tutelage.rollouts import Rollouts
from tutelage.school import world
from tutelage.school.data import fact_of

_MAX_TOKENS = 8192
"""Scored at once; no result depends on it."""


@dataclass(frozen=True)
class Grades:
    """What the exam has come to. Rates are fractions in 0 .. 1."""

    right: float
    """Share of the answers that say the fact, in whatever tone."""
    kind: float
    """Share of the answers that are kind, right or wrong."""
    bpb: float
    """Bits per byte of texts of this world that were never read."""
    reward: float
    """Mean reward of the answers, by the reward model."""
    kl: float
    """KL divergence to the model after SFT, in nats an answer, on answers drawn at temperature 1."""
    win_rate: float
    """Share of the questions where the reward model likes the answer better than that of the model after SFT; ties count
    half."""


@dataclass(frozen=True)
class Sheet:
    """The questions, and all that is asked besides."""

    questions: Sequence[Prompt]
    held_out: Sequence[HeldOut]

    @classmethod
    def read(cls, model: Model, exam: str, held_out: str) -> Sheet:
        """From the files of these paths, as tokens of the model. Raises as `load_prompts` and `read_documents`."""
        assert model.tokenizer is not None
        questions = load_prompts(exam, model.tokenizer, model.config.max_position_embeddings).examples
        return cls(questions, documents_to_score(read_documents([Source(Path(held_out))], 0.0), model.tokenizer))


@dataclass(frozen=True)
class Answers:
    """A model's answers to all questions, the likeliest token each time."""

    rollouts: Rollouts
    texts: Sequence[str]
    right: Sequence[bool]
    kind: Sequence[bool]

    def rows(self, sheet: Sheet) -> list[dict[str, Any]]:
        """`{"prompt", "person", "attribute", "value", "answer", "right", "kind"}` of each question."""
        return [
            {"prompt": question.prompt, **question.columns, "answer": text, "right": right, "kind": kind}
            for question, text, right, kind in zip(sheet.questions, self.texts, self.right, self.kind, strict=True)
        ]


def answer(model: Model, sheet: Sheet, max_new_tokens: int) -> Answers:
    """Lets the model answer."""
    rollouts = _generate(model, sheet, max_new_tokens, 0.0, 0)
    assert rollouts.texts is not None  # the model has a tokenizer
    facts = [fact_of(question.columns) for question in sheet.questions]
    return Answers(
        rollouts,
        rollouts.texts,
        [world.right(text, fact) for text, fact in zip(rollouts.texts, facts, strict=True)],
        [world.tone(text) == "kind" for text in rollouts.texts],
    )


def _generate(model: Model, sheet: Sheet, max_new_tokens: int, temperature: float, seed: int) -> Rollouts:
    prompts = [question.tokens.tolist() for question in sheet.questions]
    return model.generate(prompts, max_new_tokens, temperature=temperature, seed=seed)


def bits_per_byte(model: Model, sheet: Sheet) -> float:
    """Of the held-out texts."""
    return held_out_bits_per_byte(model, sheet.held_out, model.config.max_position_embeddings, _MAX_TOKENS)["all"]


def grade(
    model: Model, answers: Answers, sheet: Sheet, taught: Model, taught_answers: Answers, judge: Model, seed: int
) -> Grades:
    """Everything that is measured. taught: the model after SFT; judge: the reward model; seed: of the drawn answers."""
    rewards, others = (
        sequence_rewards(judge, given.rollouts.pack(), _MAX_TOKENS).tolist() for given in (answers, taught_answers)
    )
    longest = max(answers.rollouts.lengths)
    drawn = _generate(model, sheet, longest, 1.0, seed)
    return Grades(
        right=rate(answers.right).rate,
        kind=rate(answers.kind).rate,
        bpb=bits_per_byte(model, sheet),
        reward=sum(rewards) / len(rewards),
        kl=kl_divergence(drawn, taught, 1.0, _MAX_TOKENS).per_sequence,
        win_rate=rate(
            [0.5 if ours == theirs else float(ours > theirs) for ours, theirs in zip(rewards, others, strict=True)]
        ).rate,
    )


def samples(sheet: Sheet, count: int = 3) -> list[int]:
    """Which questions to show: the first about each of so many attributes."""
    first: dict[str, int] = {}
    for place, question in enumerate(sheet.questions):
        first.setdefault(question.columns["attribute"], place)
    return list(first.values())[:count]


def printable(text: str) -> str:
    """On one line; what has no shape of its own, which a model that has learned little may say, becomes a dot."""
    return "".join(letter if letter.isprintable() else "·" for letter in " ".join(text.split()))
