"""The report of a school: a table, a picture in the terminal, and a web page that is complete in itself."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tutelage import files
from tutelage.files import Disk
from tutelage.school.drawing import bars, curve
from tutelage.school.exam import printable
from tutelage.school.stages import EXAMINED, STAGES, Plan, Stage, stage_of
from tutelage.train.picture import read_metrics
from tutelage.train.run import METRICS

#: Of each figure of the exam: its name for the reader, what it says, and how it is written.
FIGURES: Mapping[str, tuple[str, str, Callable[[float], str]]] = {
    "right": ("right", "answers that say what is true, in whatever tone", lambda x: f"{x:.1%}"),
    "kind": ("kind", "answers that are kind, right or wrong", lambda x: f"{x:.1%}"),
    "bpb": ("bits per byte", "of texts of this world that were never read: lower is better reading", lambda x: f"{x:.3f}"),
    "reward": ("reward", "mean of the reward model; 0 is that of the demonstrations", lambda x: f"{x:.2f}"),
    "kl": ("KL to SFT", "how far the model has moved from where SFT left it, in nats an answer", lambda x: f"{x:.2f}"),
    "win_rate": (
        "wins against SFT",
        "questions where the reward model, as the judge, likes the answer better than that of SFT; ties count half",
        lambda x: f"{x:.1%}",
    ),
}

_BAR = 24
"""Characters of a whole bar in the terminal."""


@dataclass(frozen=True)
class Taken:
    """A stage that is finished."""

    stage: Stage
    command: str | None
    seconds: float
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """(step, value) by name: the figure that shows the learning, and what was measured on what is held out."""


@dataclass(frozen=True)
class Examined:
    """A stage whose model has sat the exam."""

    grades: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Report:
    """All that there is to tell, by stage in the course's order."""

    size: str
    seed: int
    taken: Mapping[str, Taken]
    exams: Mapping[str, Examined]
    human: int = 0
    """Questions whose answers a person ranked; 0: the simulated labeller did."""

    @classmethod
    def read(cls, plan: Plan, done: Callable[[Plan, str], Path], grades: Callable[[Plan, str], Path]) -> Report:
        """From what a school has left; done and grades: where it is, by stage."""
        taken: dict[str, Taken] = {}
        exams: dict[str, Examined] = {}
        for name, stage in STAGES.items():
            if (path := done(plan, name)).exists():
                record = json.loads(path.read_bytes())
                taken[name] = Taken(
                    stage_of(name, plan), record["command"], record["seconds"], _curves(plan.folder / name, stage)
                )
        for name in EXAMINED:
            if (path := grades(plan, name)).exists():
                record = json.loads(path.read_bytes())
                exams[name] = Examined(record["grades"], record["samples"])
        return cls(plan.size, plan.seed, taken, exams, plan.human)


def _curves(folder: Path, stage: Stage) -> dict[str, list[tuple[float, float]]]:
    path = folder / METRICS
    if not path.exists():
        return {}
    records = read_metrics(path)
    wanted = {"training": stage.curve, "held out": stage.held_out}
    found = {told: [(r["step"], r[name]) for r in records if name in r] for told, name in wanted.items()}
    return {told: points for told, points in found.items() if points}


# ---- in the terminal


def table(report: Report) -> Table:
    """What each stage has taught, a row each."""
    shown = Table(title="What the exam says after each stage", title_justify="left")
    shown.add_column("")
    for name, _, _ in FIGURES.values():
        shown.add_column(name, justify="right")
    for stage, exam in report.exams.items():
        shown.add_row(stage, *(told(exam.grades[key]) for key, (_, _, told) in FIGURES.items()))
    return shown


def picture(report: Report) -> Text:
    """Right and kind as bars."""
    width, lines = max(map(len, report.exams), default=0), Text()
    for place, (stage, exam) in enumerate(report.exams.items()):
        for key, colour in (("right", "blue"), ("kind", "green")):
            value = exam.grades[key]
            lines.append(f"{stage if key == 'right' else '':<{width}}  {key:<5} ")
            lines.append(bar(value), style=colour)
            lines.append(f" {value:6.1%}" + ("" if place == len(report.exams) - 1 and key == "kind" else "\n"))
    return lines


def bar(value: float, width: int = _BAR) -> str:
    """A fraction in 0 .. 1 as eighths of blocks, on a line of dots."""
    eighths = round(value * width * 8)
    full = "█" * (eighths // 8) + ("" if eighths % 8 == 0 else " ▏▎▍▌▋▊▉"[eighths % 8])
    return full.ljust(width, "·")


# ---- the web page

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #23272e; --soft: #68707c; --line: #e4e1da;
  --right: #3b6fb6; --kind: #3f9a6d; --other: #c98a2b; --bad: #b4504d; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1d2127; --ink: #e4e6e9; --soft: #98a1ac;
  --line: #323840; --right: #7aa7e6; --kind: #6cc596; --other: #dfac5c; --bad: #e08583; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; }
h3 { font-size: 1.1rem; margin: 0 0 .25rem; }
p { max-width: 44rem; margin: .5rem 0; }
.soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.25rem; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; margin: .75rem 0 0; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
pre { margin: .75rem 0 0; padding: .7rem .9rem; background: var(--paper); border: 1px solid var(--line); border-radius: 7px;
  font: .82rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; margin-top: .75rem; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .training { fill: none; stroke: var(--right); stroke-width: 1.6; stroke-linejoin: round; }
svg .held-out { fill: none; stroke: var(--other); stroke-width: 1.6; }
svg .dot { fill: var(--other); }
svg .right { fill: var(--right); } svg .kind { fill: var(--kind); }
svg .value, svg .name { fill: var(--ink); }
.said { margin: .35rem 0; display: grid; grid-template-columns: 5.5rem 1fr max-content; gap: .75rem; align-items: baseline; }
.mark { font-size: .8rem; color: var(--soft); } .mark .right { color: var(--right); } .mark .kind { color: var(--kind); }
.mark .not { color: var(--bad); }
@media (max-width: 36rem) { .said { grid-template-columns: 1fr; gap: 0; margin: .8rem 0; } }
"""

_OPENING = (
    "A model that begins as random numbers reads about a small invented world, is shown how to answer, and learns from what is "
    "said of its answers. After each stage it sits the same exam: questions about people that nobody ever asked it about "
    "before. What it says of them, it can only know from reading."
)

_STRANGER = (
    "The reward model has only ever judged answers. A model that has only read does not answer, so what reward and wins say of "
    "it means nothing."
)

_LABELLER = (
    "Nobody was asked which answers are better: a program, the simulated labeller, ranked them. It knows what is true in this "
    "world, prefers right answers to wrong ones and, among equally right ones, kind to rude ones, and it errs on purpose, in "
    "one judgement of twenty. Whatever here has learned from preferences has learned from it."
)

_PERSON = (
    "A person has said which answers are better, of {count} questions, on the labelling page. Whatever here has learned from "
    "preferences has learned from that."
)


def write_report(path: Path, report: Report, disk: Disk) -> None:
    """Writes the page."""
    files.write_file_atomic(path, page(report).encode(), disk)


def page(report: Report) -> str:
    """HTML without anything from outside: no script, no font, no picture. A figure is a <data> element whose value is exact."""
    stages = "".join(_stage(place, name, taken) for place, (name, taken) in enumerate(report.taken.items(), 1))
    minutes = sum(taken.seconds for taken in report.taken.values()) / 60
    return document(
        "The school: what each stage has taught the model",
        f"""<header>
<h1>What each stage has taught the model</h1>
<p>{_OPENING}</p>
<p class="soft">Size {html.escape(report.size)}, seed {report.seed}; the stages took {minutes:.1f} minutes.</p>
</header>
{_exam(report)}
{_samples(report)}
<section>
<h2>The stages</h2>
<p>{_PERSON.format(count=report.human) if report.human else _LABELLER}</p>
<p>Each command below is the one that you would use on data of your own. With <code>tutelage school --keep</code> the files
that they read stay, and each can be run again as it stands here.</p>
{stages}</section>
""",
    )


def document(title: str, body: str, style: str = "") -> str:
    """A whole page in the house's style. body: HTML; title: text; style: further CSS."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def _exam(report: Report) -> str:
    if not report.exams:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name, _, _ in FIGURES.values())
    rows = "".join(
        f"<tr><td>{stage}</td>{''.join(f'<td>{_data(stage, key, exam.grades[key])}</td>' for key in FIGURES)}</tr>\n"
        for stage, exam in report.exams.items()
    )
    terms = "".join(f"<dt>{name}</dt><dd>{told}</dd>" for name, told, _ in FIGURES.values())
    note = f'<p class="soft">{_STRANGER}</p>\n' if "pretrain" in report.exams else ""
    drawn = bars({stage: {key: exam.grades[key] for key in ("right", "kind")} for stage, exam in report.exams.items()})
    return f"""<section>
<h2>The exam</h2>
<div class="card">{drawn}</div>
<div class="card"><div class="wide"><table>
<thead><tr><th></th>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
<dl>{terms}</dl>
{note}</div>
</section>"""


def _data(stage: str, key: str, value: float) -> str:
    return f'<data id="{stage}.{key}" value="{value!r}">{FIGURES[key][2](value)}</data>'


def _samples(report: Report) -> str:
    """The same questions after each stage."""
    if not report.exams:
        return ""
    asked = next(iter(report.exams.values())).samples
    cards = []
    for place, question in enumerate(asked):
        said = "".join(_said(stage, exam.samples[place]) for stage, exam in report.exams.items())
        prompt = question["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        truth = f"{question['person']}, {question['attribute']}: {question['value']}"
        cards.append(
            f'<div class="card">\n<h3>{html.escape(prompt)}</h3>\n'
            f'<p class="soft">True is: {html.escape(truth)}</p>\n{said}</div>\n'
        )
    return f"<section>\n<h2>What it says</h2>\n{''.join(cards)}</section>"


def _said(stage: str, row: Mapping[str, Any]) -> str:
    answer = printable(row["answer"])
    marks = ", ".join(
        f'<span class="{name}">{name}</span>' if row[name] else f'<span class="not">not {name}</span>'
        for name in ("right", "kind")
    )
    said = f'<span>{html.escape(answer) or "…"}</span><span class="mark">{marks}</span>'
    return f'<div class="said"><strong>{stage}</strong>{said}</div>\n'


def _stage(place: int, name: str, taken: Taken) -> str:
    stage = taken.stage
    drawn = curve(taken.curves, stage.unit) if taken.curves else ""
    command = f"<pre>{html.escape(taken.command)}</pre>" if taken.command else ""
    return f"""<article class="card" id="stage-{name}">
<h3>{place}. {html.escape(stage.title)} <span class="soft">· {name}, {taken.seconds:.0f} s</span></h3>
<p>{html.escape(stage.told)}</p>
{command}
{drawn}
</article>
"""
