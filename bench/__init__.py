"""``tutelage bench kernels|train``: speeds as fractions of the machine's ceilings, as ratios to peers.

Ceilings, peers and ours are measured in one run, alternating, because machines change their speed by the
hour. Nothing here imports torch before :func:`run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["KernelsConfig", "TrainConfig", "run"]


@dataclass(frozen=True)
class KernelsConfig:
    """Every kernel, forward and backward, on transformer shapes, against torch (matmul: numpy too).

    Args:
        only: names of kernels (none: all).
        quick: the first shape of each kernel, short samples, two rounds.
        rounds: samples of each contender.
        json: a file to write the JSON line to as well.
    """

    only: tuple[str, ...] = ()
    quick: bool = False
    rounds: int = 5
    json: Path | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Whole training steps, forward, backward and AdamW, against plain torch modules of the same shapes.

    Args:
        shapes: names of shapes (none: all).
        steps: steps of each contender.
        peers: measure torch too.
        memory: measure the peak memory of each, in a process of its own.
        json: a file to write the JSON line to as well.
    """

    shapes: tuple[str, ...] = ()
    steps: int = 3
    peers: bool = True
    memory: bool = True
    json: Path | None = None


def run(config: KernelsConfig | TrainConfig) -> dict[str, Any]:
    """Measures, prints a table and one line of JSON, and returns what that line says.

    Raises:
        ValueError: naming a kernel or shape that there is none of; fewer than one round or step.
    """
    from . import kernels, train

    return kernels.run(config) if isinstance(config, KernelsConfig) else train.run(config)
