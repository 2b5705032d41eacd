"""What a stage of a worked case is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.school.stages import command_line

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of a course."""

    name: str
    title: str
    told: str
    """What it does, to somebody who hears of it for the first time."""
    do: Callable[[], Figures]
    """Does it; what it returns can be written as JSON. Called again after a kill, it goes on or begins again."""
    command: str | None = None
    """The same as a command line."""
    curve: str = "loss"
    """The figure of the run's metrics that shows its learning, if it has any."""
    unit: str = ""


@dataclass(frozen=True)
class Taken:
    """A finished stage."""

    stage: Stage
    seconds: float
    figures: Figures
    curve: Sequence[tuple[float, float]]
    """(step, value)"""


def loop(
    name: str, title: str, told: str, command: str, run: Callable[..., Any], config: Any, curve: str = "loss", unit: str = ""
) -> Stage:
    """A stage that is a command of tutelage: `run(config)`, which goes on with what an interrupted course has left of it."""

    def do() -> Figures:
        result = run(dataclasses.replace(config, resume="auto"))
        values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        return {key: value for key, value in values.items() if value is None or isinstance(value, (int, float))}

    return Stage(name, title, told, do, command_line(command, config), curve, unit)
