"""Preference pairs as another tool publishes them, as rows of TRL's schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.packages import LLAMAFACTORY, fetch, read

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def pairs(packages: Path) -> list[dict[str, Any]]:
    """`{"prompt", "chosen", "rejected"}`, lists of messages each: 300 pairs from the source distribution of llamafactory 0.9.5.

    Judged by a model, or of mixed origin: no claim about what people prefer can rest on them. Raises as `fetch`, `read`
    and `parse`.
    """
    return parse(read(fetch(LLAMAFACTORY, packages), "/data/dpo_en_demo.json"))


def parse(content: bytes) -> list[dict[str, Any]]:
    """The rows. Raises ValueError naming the pair that has another form."""
    rows = []
    for number, pair in enumerate(json.loads(content)):
        try:
            rows.append(
                {
                    "prompt": [_message(turn) for turn in pair["conversations"]],
                    "chosen": [_message(pair["chosen"])],
                    "rejected": [_message(pair["rejected"])],
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"pair {number} is not conversations, chosen and rejected of (from, value): {error!r}") from None
    return rows


def _message(turn: dict[str, str]) -> dict[str, str]:
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}
