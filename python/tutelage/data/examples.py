"""Rows to examples: tokens, and which of them are learned, for every stage that learns from people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from tutelage.data.packing import Cursor
from tutelage.data.tokenizer import Tokenizer

Data = str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]]
OnLong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence."""

    tokens: npt.NDArray[np.int32]
    """[T]"""
    mask: npt.NDArray[np.bool_]
    """[T] the tokens that are learned; never the first, which nothing predicts."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other fields."""
    where: str = ""
    """File and line, for messages."""
    prompt_key: str = ""
    """Hash of the prompt: equal for equal prompts."""


@dataclass(frozen=True, eq=False)
class Preference:
    chosen: Example
    rejected: Example
    margin: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    prompt_key: str = ""


@dataclass(frozen=True, eq=False)
class Unpaired:
    example: Example
    label: bool
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    prompt_key: str = ""


@dataclass(frozen=True, eq=False)
class Ranking:
    responses: tuple[Example, ...]
    ranking: tuple[tuple[int, ...], ...]
    """Groups of indices into `responses`, best first; one group is a tie."""
    margin: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    prompt_key: str = ""


@dataclass(frozen=True, eq=False)
class Prompt:
    tokens: npt.NDArray[np.int32]
    """[T], the generation prompt included."""
    prompt: Any = None
    """As it stands in the row: a string or messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    prompt_key: str = ""


Item = TypeVar("Item", Example, Preference, Unpaired, Ranking, Prompt)


@dataclass(frozen=True)
class Finding:
    kind: str
    message: str


@dataclass(frozen=True)
class Report:
    rows: int
    examples: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class ExampleSet(Generic[Item]):
    examples: tuple[Item, ...]
    report: Report
    fingerprint: str

    def __len__(self) -> int:
        return len(self.examples)


def load_sft(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: OnLong = "error",
    completion_only_loss: bool = True,
    assistant_only_loss: bool = True,
) -> ExampleSet[Example]:
    raise NotImplementedError


def load_preferences(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: OnLong = "error",
    completion_only_loss: bool = True,
) -> ExampleSet[Preference]:
    raise NotImplementedError


def load_unpaired(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: OnLong = "error",
    completion_only_loss: bool = True,
) -> ExampleSet[Unpaired]:
    raise NotImplementedError


def load_rankings(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: OnLong = "error",
    completion_only_loss: bool = True,
) -> ExampleSet[Ranking]:
    raise NotImplementedError


def load_prompts(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: Literal["error", "drop"] = "error",
) -> ExampleSet[Prompt]:
    raise NotImplementedError


def split_examples(examples: ExampleSet[Item], fraction: float, seed: int = 0) -> tuple[ExampleSet[Item], ExampleSet[Item]]:
    """(training, held out)"""
    raise NotImplementedError


class Batches(Generic[Item]):
    """Endless examples in a fresh order every epoch: `take(cursor, count)` gives the next `count`."""

    def __init__(self, examples: ExampleSet[Item], seed: int = 0) -> None:
        raise NotImplementedError

    def take(self, cursor: Cursor, count: int) -> tuple[list[Item], Cursor]:
        raise NotImplementedError
