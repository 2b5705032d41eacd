"""What a course has come to: a table in the terminal, and a web page that is complete in itself."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from common.stage import Taken
from tutelage.school.drawing import bars, curve
from tutelage.school.exam import printable
from tutelage.school.report import document

# The school's page colours two kinds of bars; these have other names.
_STYLE = """svg .wins, svg .right { fill: var(--right); } svg .judged { fill: var(--kind); }
.said { grid-template-columns: 6.5rem 1fr max-content; }
pre span { white-space: nowrap; }
td { vertical-align: top; } td:first-child { white-space: normal; min-width: 13rem; max-width: 20rem; }
td small { display: block; color: var(--soft); } td:first-child small { text-wrap: pretty; }
"""


@dataclass(frozen=True)
class Measure:
    """A figure of the results: a row, in which each model has its place."""

    key: str
    name: str
    told: str
    """What it says."""
    written: Callable[[float], str]
    interval: tuple[str, str] | None = None
    """Keys of the figures between which it lies with 95 %."""


@dataclass(frozen=True)
class Sample:
    """What each model said to one prompt."""

    prompt: str
    said: Mapping[str, tuple[str, str]]
    """(answer, a remark on it) by model."""


@dataclass(frozen=True)
class Results:
    """All that there is to tell."""

    title: str
    opening: str
    measures: Sequence[Measure]
    models: Mapping[str, Mapping[str, float | None]]
    """Figures by model; None: it has no such figure."""
    bars: Mapping[str, Mapping[str, float]]
    """Fractions in 0 .. 1, by model."""
    facts: Sequence[str]
    """Sentences with the figures that are in no table, each beside what it is to be compared with."""
    samples: Sequence[Sample]
    taken: Mapping[str, Taken]


def _written(measure: Measure, value: float | None) -> str:
    return "–" if value is None else measure.written(value)


def _interval(measure: Measure, figures: Mapping[str, float | None]) -> str:
    if measure.interval is None:
        return ""
    low, high = (figures[key] for key in measure.interval)
    return "" if low is None or high is None else f"{measure.written(low).rstrip('%')}–{measure.written(high).rstrip('%')}"


def table(results: Results) -> Table:
    """A row for each figure and a column for each model, so that it fits on a narrow terminal."""
    shown = Table(title=results.title, title_justify="left")
    shown.add_column("")
    for name in results.models:
        shown.add_column(name, justify="right", no_wrap=True)
    for measure in results.measures:
        shown.add_row(measure.name, *(_written(measure, figures[measure.key]) for figures in results.models.values()))
        if measure.interval is not None:
            shown.add_row("  95 % interval", *(_interval(measure, figures) for figures in results.models.values()))
    return shown


def page(results: Results) -> str:
    """HTML without anything from outside."""
    minutes = sum(taken.seconds for taken in results.taken.values()) / 60
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in results.models)
    rows = "".join(
        f"<tr><td>{html.escape(measure.name)}<small>{html.escape(measure.told)}</small></td>"
        + "".join(f"<td>{_data(name, measure, figures)}</td>" for name, figures in results.models.items())
        + "</tr>\n"
        for measure in results.measures
    )
    facts = "".join(f"<p>{html.escape(fact)}</p>\n" for fact in results.facts)
    drawn = f'<div class="card">{bars(results.bars)}</div>\n' if results.bars else ""
    stages = "".join(_stage(place, taken) for place, taken in enumerate(results.taken.values(), 1))
    return document(
        results.title,
        f"""<header>
<h1>{html.escape(results.title)}</h1>
<p>{html.escape(results.opening)}</p>
<p class="soft">The stages took {minutes:.1f} minutes.</p>
</header>
<section>
<h2>The figures</h2>
{drawn}<div class="card"><div class="wide"><table>
<thead><tr><th></th>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
{facts}</div>
</section>
{_samples(results.samples)}<section>
<h2>The stages</h2>
{stages}</section>
""",
        _STYLE,
    )


def _data(name: str, measure: Measure, figures: Mapping[str, float | None]) -> str:
    value, interval = figures[measure.key], html.escape(_interval(measure, figures))
    shown = html.escape(_written(measure, value))
    if value is not None:
        shown = f'<data id="{html.escape(name)}.{measure.key}" value="{value!r}">{shown}</data>'
    return f"{shown}<small>{interval}</small>" if interval else shown


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    cards = "".join(
        f'<div class="card">\n<h3>{html.escape(sample.prompt)} …</h3>\n'
        + "".join(
            f'<div class="said"><strong>{html.escape(name)}</strong><span>{html.escape(printable(text)) or "…"}</span>'
            f'<span class="mark">{html.escape(remark)}</span></div>\n'
            for name, (text, remark) in sample.said.items()
        )
        + "</div>\n"
        for sample in samples
    )
    return f"<section>\n<h2>What they say</h2>\n{cards}</section>\n"


def _command(line: str) -> str:
    """No line ends within the name of an option."""
    return re.sub(r"--\w+", r"<span>\g<0></span>", html.escape(line))


def _stage(place: int, taken: Taken) -> str:
    stage = taken.stage
    drawn = curve({"training": taken.curve}, stage.unit) if len(taken.curve) > 1 else ""
    command = f"<pre>{_command(stage.command)}</pre>\n" if stage.command else ""
    return f"""<article class="card" id="stage-{html.escape(stage.name)}">
<h3>{place}. {html.escape(stage.title)} <span class="soft">· {html.escape(stage.name)}, {taken.seconds:.0f} s</span></h3>
<p>{html.escape(stage.told)}</p>
{command}{drawn}
</article>
"""
