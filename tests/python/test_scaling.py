"""docs/scaling.md: its table is what the code counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tutelage.sharding import BUCKET_BYTES, Layout, buckets

ROWS = [
    [cell.strip() for cell in line.strip("| ").split("|")]
    for line in (Path(__file__).parents[2] / "docs" / "scaling.md").read_text().splitlines()
    if re.match(r"\| \d", line)
]
BLOCKS = {134_515_008: 30, 1_711_376_384: 24, 8_030_261_248: 32}


def computed(size: int, ranks: int) -> list[str]:
    """The cells behind the first two."""
    starts = [size * block // BLOCKS[size] for block in range(BLOCKS[size])]
    layout = Layout(size, buckets(size, starts, BUCKET_BYTES // 4), ranks)
    summed, spread = layout.bytes_summed(0), layout.bytes_spread(0)
    memory = [(8 * size + 12 * size / ranks) / 2**30, 16 * size / 2**30]
    seconds = (summed + spread) / 50e9
    return [f"{summed / 1e9:.2f} GB", f"{spread / 1e9:.2f} GB", *(f"{x:.2f} GiB" for x in memory), f"{seconds:.2f} s"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_table_is_what_the_code_counts(row: list[str]) -> None:
    size, ranks = (int(cell.replace(",", "")) for cell in row[:2])
    assert row[2:] == computed(size, ranks)


def test_the_table_is_there() -> None:
    assert len(ROWS) == 9
    assert computed(134_515_008, 8) != computed(134_515_008, 4)  # the control: ranks show
