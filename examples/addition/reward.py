"""The reward: 1 for the right sum in exact form, 0 for everything else. TRL's signature; it runs in a process of its own."""

from collections.abc import Sequence
from typing import Any


def exact_match(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where a completion is the row's `answer` and nothing more."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]
