"""Reward functions. Nothing heavy is imported here: every worker does it anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def letters(prompts: Sequence[Any], completions: Sequence[str], number: Sequence[int]) -> list[float]:
    """How many letters a the answer has, and a little for the row's number."""
    return [text.count("a") + n / 100 for text, n in zip(completions, number, strict=True)]


def ascii_only(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """The share of the answer that is ASCII: what a short training learns."""
    return [sum(c.isascii() and c.isprintable() for c in text) / max(len(text), 1) for text in completions]


def some(prompts: Sequence[Any], completions: Sequence[str], number: Sequence[int]) -> list[float | None]:
    """No reward for every third row."""
    return [None if n % 3 == 0 else float(n % 5) for n in number]


def odd_lengths(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """The share of letters a, but no reward for a text of an even length."""
    return [text.count("a") / len(text) if len(text) % 2 else None for text in completions]


def always_one(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def none(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


def not_a_number(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    return [float("nan")] * len(completions)


def talk(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Of messages."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float(len(completion[0]["content"])) for completion in completions if completion[0]["role"] == "assistant"]
