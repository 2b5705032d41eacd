"""What a course has come to: a table in the terminal, and a web page that is complete in itself."""

from __future__ import annotations

import html
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
"""


@dataclass(frozen=True)
class Column:
    """A figure of the results."""

    key: str
    name: str
    told: str
    """What it says."""
    written: Callable[[float], str]


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
    columns: Sequence[Column]
    rows: Mapping[str, Mapping[str, float | None]]
    """By model; None: it has no such figure."""
    bars: Mapping[str, Mapping[str, float]]
    """Fractions in 0 .. 1, by model."""
    facts: Sequence[str]
    """Sentences with the figures that no column has, each beside what it is to be compared with."""
    samples: Sequence[Sample]
    taken: Mapping[str, Taken]


def _written(column: Column, value: float | None) -> str:
    return "–" if value is None else column.written(value)


def table(results: Results) -> Table:
    """The figures, a row for each model."""
    shown = Table(title=results.title, title_justify="left")
    shown.add_column("")
    for column in results.columns:
        shown.add_column(column.name, justify="right")
    for name, row in results.rows.items():
        shown.add_row(name, *(_written(column, row.get(column.key)) for column in results.columns))
    return shown


def page(results: Results) -> str:
    """HTML without anything from outside."""
    minutes = sum(taken.seconds for taken in results.taken.values()) / 60
    head = "".join(f'<th scope="col">{html.escape(column.name)}</th>' for column in results.columns)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{_data(name, column, row.get(column.key))}</td>" for column in results.columns)
        + "</tr>\n"
        for name, row in results.rows.items()
    )
    terms = "".join(f"<dt>{html.escape(column.name)}</dt><dd>{html.escape(column.told)}</dd>" for column in results.columns)
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
<dl>{terms}</dl>
{facts}</div>
</section>
{_samples(results.samples)}<section>
<h2>The stages</h2>
{stages}</section>
""",
        _STYLE,
    )


def _data(name: str, column: Column, value: float | None) -> str:
    shown = html.escape(_written(column, value))
    return shown if value is None else f'<data id="{html.escape(name)}.{column.key}" value="{value!r}">{shown}</data>'


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


def _stage(place: int, taken: Taken) -> str:
    stage = taken.stage
    drawn = curve({"training": taken.curve}, stage.unit) if len(taken.curve) > 1 else ""
    command = f"<pre>{html.escape(stage.command)}</pre>\n" if stage.command else ""
    return f"""<article class="card" id="stage-{html.escape(stage.name)}">
<h3>{place}. {html.escape(stage.title)} <span class="soft">· {html.escape(stage.name)}, {taken.seconds:.0f} s</span></h3>
<p>{html.escape(stage.told)}</p>
{command}{drawn}
</article>
"""
