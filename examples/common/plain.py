"""Plain text of another kind than what is learned: what a model knew before, and may forget."""

from __future__ import annotations

from pathlib import Path

from common.packages import LLAMAFACTORY, fetch, read


def articles(packages: Path) -> list[str]:
    """30 encyclopedia articles (CC-BY-SA), one a line of a file in the package. Raises as `fetch` and `read`."""
    text = read(fetch(LLAMAFACTORY, packages), "/data/wiki_demo.txt").decode()
    return [line for line in text.splitlines() if line.strip()]
