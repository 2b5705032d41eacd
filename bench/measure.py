"""Alternating measurement: A B A B …, with a sample of the machine's ceiling between any two.

Machines change their speed while one watches (other tenants, clocks, memory), so no time means anything by
itself. Every sample of a contender is divided by the mean of the ceiling before and after it, and by that of
its peer in the same round; medians and extremes are taken of those quotients.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tutelage.files import write_file_atomic

from .ceilings import Unit, ceilings, environment, gauge

OURS = "ours"
FILE_WIDTH = 160  # columns of the table where it goes to a file


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Args:
        rounds: samples of each contender.
        seconds: a sample of a contender or ceiling repeats its work for at least so long.
        settle: seconds of idling before each sample; the idle threads of a BLAS or OpenMP library spin on for
            some 30 ms and would take the next contender's cores.
    """

    rounds: int = 5
    seconds: float = 0.2
    settle: float = 0.05

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"there must be at least 1 round to measure, but there are {self.rounds}")


QUICK = Plan(rounds=2, seconds=0.05)


@dataclass(frozen=True)
class Case:
    """One piece of work and who does it.

    Args:
        kernel, phase, shape: what it is called.
        unit: "GFLOP/s" where arithmetic is the limit, "GB/s" where memory is.
        work: flops or bytes of one run. Bytes count every element read or written once.
        contenders: name -> one run, which returns what it computed, as tensors that a later run may
            overwrite. Ours is "ours".
    """

    kernel: str
    phase: str
    shape: str
    unit: Unit
    work: float
    contenders: Mapping[str, Callable[[], tuple[torch.Tensor, ...]]]


@dataclass(frozen=True)
class Spread:
    """Least, median and greatest of some samples."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        return cls(min(samples), statistics.median(samples), max(samples))

    def scaled(self, factor: float) -> Spread:
        return Spread(self.low * factor, self.median * factor, self.high * factor)


@dataclass(frozen=True)
class Measurement:
    """What came out of one case.

    Attributes:
        unit: of the rates: the case's, or "tokens/s".
        ceiling: of the machine, in ``unit``, during this case.
        rates: contender -> work a second, in ``unit``.
        fractions: contender -> rate / ceiling beside it.
        ratios: peer -> our rate / its rate in the same round.
        extra: further numbers, by name (tokens a second, bytes of memory), of each contender.
    """

    kernel: str
    phase: str
    shape: str
    unit: str
    ceiling: Spread
    rates: dict[str, Spread]
    fractions: dict[str, Spread]
    ratios: dict[str, Spread]
    extra: dict[str, dict[str, Any]]


def measure(case: Case, plan: Plan, threads: int) -> Measurement:
    """Runs the case's contenders in turn, ``plan.rounds`` times over, with a ceiling sample between."""
    ceiling = gauge(case.unit, threads, plan.seconds)
    for run in case.contenders.values():
        run()  # warm up
    rates: dict[str, list[float]] = {name: [] for name in case.contenders}
    fractions: dict[str, list[float]] = {name: [] for name in case.contenders}
    gc.collect()
    peaks = [ceiling()]
    for _ in range(plan.rounds):
        for name, run in case.contenders.items():
            time.sleep(plan.settle)
            rate = 1e-9 * case.work * runs_per_second(run, plan.seconds)
            time.sleep(plan.settle)
            peaks.append(ceiling())
            rates[name].append(rate)
            fractions[name].append(rate / statistics.mean(peaks[-2:]))
    return Measurement(
        case.kernel,
        case.phase,
        case.shape,
        case.unit,
        Spread.of(peaks),
        {name: Spread.of(samples) for name, samples in rates.items()},
        {name: Spread.of(samples) for name, samples in fractions.items()},
        {
            name: Spread.of([mine / its for mine, its in zip(rates[OURS], samples, strict=True)])
            for name, samples in rates.items()
            if name != OURS
        },
        {},
    )


def runs_per_second(run: Callable[[], object], seconds: float) -> float:
    """Repeats ``run`` until so many seconds have passed."""
    runs, start = 0, time.perf_counter()
    while True:
        run()
        runs += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return runs / elapsed


def report(name: str, plan: Plan, measurements: Iterable[Measurement], output: Path | None) -> dict[str, Any]:
    """Takes the measurements one by one, prints a table and one line of JSON; returns what that line says."""
    progress = Console(stderr=True)
    results: dict[str, Any] = {
        "bench": name,
        **environment(),
        "ceilings": ceilings(torch.get_num_threads(), plan.seconds),
    }
    taken = []
    for m in measurements:
        done = f"{m.kernel} {m.phase} {m.shape}: {m.fractions[OURS].median:.2f} of the ceiling"
        progress.print(done, highlight=False)
        taken.append(m)
    results["results"] = [asdict(m) for m in taken]
    line = json.dumps(results)
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table(taken))
    print(line)
    if output is not None:
        write_file_atomic(output, f"{line}\n".encode())
    return results


def table(measurements: list[Measurement]) -> Table:
    """One row a case: medians, with [least–greatest] for what is claimed."""
    peers = list(dict.fromkeys(peer for m in measurements for peer in m.ratios))
    extras = list(dict.fromkeys(extra for m in measurements for extra in m.extra))
    grid = Table("what", "shape", "unit", "ceiling", "ours", "ours / ceiling")
    for peer in peers:
        grid.add_column(f"{peer} / ceiling")
        grid.add_column(f"ours / {peer}")
    for extra in extras:
        grid.add_column(extra)
    for m in measurements:
        row = [
            f"{m.kernel} {m.phase}",
            m.shape,
            m.unit,
            f"{m.ceiling.median:.1f}",
            f"{m.rates[OURS].median:.1f}",
        ]
        row.append(_shown(m.fractions[OURS]))
        for peer in peers:
            row += [f"{m.fractions[peer].median:.2f}", _shown(m.ratios[peer])] if peer in m.ratios else ["", ""]
        for extra in extras:
            values = m.extra.get(extra, {})
            row.append(", ".join(f"{name} {_plain(value)}" for name, value in values.items()))
        grid.add_row(*row)
    return grid


def _shown(spread: Spread) -> str:
    return f"{spread.median:.2f} [{spread.low:.2f}–{spread.high:.2f}]".replace("[", r"\[")


def _plain(value: Any) -> str:
    return f"{value.median:.1f}" if isinstance(value, Spread) else f"{value:.2f}"
