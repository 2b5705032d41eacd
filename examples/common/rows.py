"""JSONL files of rows; `tutelage.school.data.write_rows` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, in order."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
