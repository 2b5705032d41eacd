"""The course of a run as a picture: a line of blocks in the terminal, and a PNG where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tutelage import files

_BLOCKS = "▁▂▃▄▅▆▇█"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The values as at most `width` blocks: the lowest is ▁, the highest █. Each block is the mean of its
    share of them."""
    width = min(width, len(values))
    cuts = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def show(metrics: Path, image: Path, measured: str, unit: str = "nats per token", what: str = "loss") -> str:
    """The training loss of a metrics.jsonl as a line of text; draws `image` too where matplotlib is installed.

    measured: what was measured on what is held out, with its unit. unit: of the training loss. what: another figure of
    the training to draw in the loss's place.
    """
    records = read_metrics(metrics)
    if can_draw():
        draw(records, image, measured, unit, what)
    values = [record[what] for record in records if what in record]
    name = what.rpartition("/")[2]
    return f"{name} {values[0]:.2f} {sparkline(values)} {values[-1]:.2f}" if values else f"{name}: there is none"


def can_draw() -> bool:
    """Is matplotlib installed?"""
    return importlib.util.find_spec("matplotlib") is not None


def draw(records: Sequence[Mapping[str, float]], path: Path, measured: str, unit: str, what: str = "loss") -> None:
    """Writes a PNG: training loss (or `what`), and what was measured on what is held out (eval_…), over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    left = figure.add_subplot()
    training = [record for record in records if what in record]
    label = f"training {what.rpartition('/')[2]}"
    left.plot([r["step"] for r in training], [r[what] for r in training], color="0.6", label=label)
    left.set_xlabel("step")
    left.set_ylabel(f"{label} ({unit})")
    right = left.twinx()
    names = sorted({name for record in records for name in record if name.startswith("eval_")})
    for name in names:
        those = [record for record in records if name in record]
        label = name.removeprefix("eval_").replace("_", " ")
        right.plot([r["step"] for r in those], [r[name] for r in those], marker="o", label=label)
    right.set_ylabel(f"held-out {measured}")
    figure.legend(loc="outside upper right")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    files.write_file_atomic(path, image.getvalue())
