"""The school's data, in the very form that a user's own data has: JSONL files of TRL's schemas.

    texts.jsonl           {"text"}                                       read in pretraining
    held_out.jsonl        {"text"}                                       other texts of the same world, to measure reading
    spelling.jsonl        {"text"}                                       the demonstrations as text, for the tokenizer
    demonstrations.jsonl  {"prompt", "completion"}                       about lesson people; half of the answers are kind
    practice.jsonl        {"prompt", "person", "attribute", "value"}     about practice people: prompts, and what is true
    exam.jsonl            {"prompt", "person", "attribute", "value"}     about exam people

A completion begins with the blank that goes before it; the token that ends it is added where rows become tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tutelage import files
from tutelage.school.draws import Draws
from tutelage.school.world import Fact, Question, Tone, World, answers

Row = dict[str, Any]

#: Who asks politely is answered kindly with this probability, and who asks brusquely, rudely. So half of all answers are
#: kind, both when they are drawn and when the likeliest is taken, and no question rules the other tone out: there is
#: something to learn from trying.
LIKE_FOR_LIKE = 0.75


@dataclass(frozen=True)
class Size:
    """How much of everything there is."""

    people: int
    texts: int
    held_out: int
    demonstrations: int
    practice: int
    exam: int


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        # Seconds, to see that everything runs; nothing is learned well.
        "tiny": Size(people=16, texts=400, held_out=40, demonstrations=200, practice=32, exam=64),
        "small": Size(people=48, texts=16_000, held_out=500, demonstrations=4_000, practice=1_000, exam=1_000),
    }
)


def demonstrations(world: World, count: int) -> list[Row]:
    """`{"prompt", "completion"}`: different questions about lesson people, rightly answered; about half of them kindly, as
    LIKE_FOR_LIKE says.
    """
    draws = Draws("demonstrations", world.seed)
    rows = []
    for question in world.questions(world.lesson, count):
        polite = question.manner == "polite"
        tone: Tone = "kind" if draws.chance(LIKE_FOR_LIKE if polite else 1 - LIKE_FOR_LIKE) else "rude"
        rows.append({"prompt": question.prompt, "completion": " " + draws.choice(answers(question.fact, tone))})
    return rows


def practice(world: World, count: int) -> list[Row]:
    """`{"prompt", "person", "attribute", "value"}`: different questions about practice people."""
    return [_prompt(question) for question in world.questions(world.practice, count)]


def exam(world: World, count: int) -> list[Row]:
    """`{"prompt", "person", "attribute", "value"}`: different questions about exam people."""
    return [_prompt(question) for question in world.questions(world.exam, count)]


def _prompt(question: Question) -> Row:
    return {"prompt": question.prompt, **dataclasses.asdict(question.fact)}


def fact_of(row: Mapping[str, Any]) -> Fact:
    """The right answer of a row of `practice` or `exam`."""
    return Fact(row["person"], row["attribute"], row["value"])


def write_data(world: World, size: Size, folder: Path) -> dict[str, Path]:
    """Writes the six files into `folder`, replacing what is there; returns their paths by name without suffix."""
    texts: list[Row] = [{"text": text} for text in world.texts(size.texts + size.held_out)]
    taught = demonstrations(world, size.demonstrations)
    contents: dict[str, Sequence[Row]] = {
        "texts": texts[: size.texts],
        "held_out": texts[size.texts :],
        "spelling": [{"text": row["prompt"] + row["completion"]} for row in taught],
        "demonstrations": taught,
        "practice": practice(world, size.practice),
        "exam": exam(world, size.exam),
    }
    files.make_folder(folder)
    paths = {name: folder / f"{name}.jsonl" for name in contents}
    for name, rows in contents.items():
        write_rows(paths[name], rows)
    return paths


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file, in order."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSONL file, whole or not at all."""
    files.write_file_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
