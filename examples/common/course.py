"""A worked case is a list of stages in one folder. A finished stage has left its figures in done/NAME.json, which is written
last, so whatever instant a course is killed at, each stage is finished, goes on from its newest checkpoint, or begins again.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.rule import Rule

from common.page import Results, page, table
from common.stage import Figures, Stage, Taken
from tutelage import files
from tutelage.files import RunFolderError
from tutelage.train.picture import read_metrics
from tutelage.train.run import METRICS, write_json

_DONE, _COURSE = "done", "course.json"


@dataclass(frozen=True)
class CourseConfig:
    """What every worked case can be told."""

    output_dir: str = "runs/course"
    """Folder of the course: report.html, figures.json, a folder for each stage."""
    packages: str = "runs/packages"
    """Folder of the downloaded packages, which all examples share."""
    quick: bool = False
    """Only see that everything runs: a few steps of each stage. The figures then mean nothing."""
    seed: int = 0
    """Of everything random. The same command gives the same models, bit for bit."""
    resume: Literal["auto"] | None = None
    """auto: go on with the course in output_dir; what is finished stays as it is."""
    overwrite: bool = False
    """Remove an earlier course in output_dir and start again."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in 0 .. 2^64 - 1, but it is {self.seed}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other: pass one of them")


class Course:
    """The folder of a worked case, and which of its stages are finished."""

    def __init__(self, config: CourseConfig, name: str) -> None:
        self.folder = Path(config.output_dir)
        self.console = Console()
        self._name, self._config = name, config

    def model(self, stage: str) -> str:
        """Folder of the model that a stage makes."""
        return str(self.folder / stage / "model")

    def data(self, name: str) -> str:
        """A file of rows."""
        return str(self.folder / "data" / f"{name}.jsonl")

    def run(self, stage: str) -> dict[str, Any]:
        """What all loops of all courses are told."""
        return {
            "output_dir": str(self.folder / stage),
            "seed": self._config.seed,
            "logging_steps": 1 if self._config.quick else 5,
            "save_steps": 10,
            "save_total_limit": 1,
            "eval_fraction": 0.0,  # the exam measures, on what no loop is given
            "plot": False,  # the report draws them together
        }

    def say(self, text: str, style: str = "") -> None:
        """One line to the reader."""
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Locks the folder for a `with`.

        Raises RunFolderError for one that is in use or holds something else, or an earlier course without resume or overwrite;
        ValueError for one with other options.
        """
        config = self._config
        resume = None if config.overwrite else "auto"
        with files.claim_run_folder(self.folder, resume, config.overwrite):
            known = self.folder / _COURSE
            identity = {"course": self._name, "seed": config.seed, "quick": config.quick}
            if known.exists():
                found = json.loads(known.read_bytes())
                files.check_version(known, found.get("format_version"))
                if not config.resume:
                    raise RunFolderError(
                        f"{self.folder} holds an earlier course: pass --resume auto to go on with it, --overwrite to remove "
                        "it, or another --output_dir"
                    )
                for key, value in identity.items():
                    if found.get(key) != value:
                        raise ValueError(
                            f"the course in {self.folder} has {key} {found.get(key)}, not {value}: "
                            "give the same, or another --output_dir"
                        )
            elif (self.folder / files.CHECKPOINTS).exists():
                raise RunFolderError(
                    f"{self.folder} holds a run that is no course, so nothing in it was touched: pass another --output_dir"
                )
            else:
                write_json(known, identity)
            files.make_folder(self.folder / "data")
            yield

    def take(self, stages: Sequence[Stage]) -> dict[str, Taken]:
        """Does those stages that are not finished, in their order; what all of them have come to."""
        taken = {}
        for place, stage in enumerate(stages, 1):
            done = self.folder / _DONE / f"{stage.name}.json"
            if not done.exists():
                self.console.print()
                self.console.print(Rule(f"{place}/{len(stages)}  {stage.name}: {stage.title}", align="left"))
                self.say(stage.told, "dim")
                if stage.command is not None:
                    self.say(f"$ {stage.command}", "bold")
                begin = time.monotonic()
                figures = stage.do()
                gc.collect()  # its models, before the next stage loads its own
                write_json(done, {"seconds": time.monotonic() - begin, "figures": dict(figures)})
            # Read again rather than kept: what a resumed course reports is what an uninterrupted one does.
            record = json.loads(done.read_bytes())
            taken[stage.name] = Taken(stage, record["seconds"], record["figures"], self._curve(stage))
        return taken

    def conclude(self, results: Results, sizes: Figures) -> Figures:
        """Prints the table, writes figures.json and report.html; the figures."""
        self.console.print()
        self.console.print(table(results))
        for fact in results.facts:
            self.say(fact)
        figures = {
            "seed": self._config.seed,
            "quick": self._config.quick,
            "sizes": dict(sizes),
            "seconds": {name: stage.seconds for name, stage in results.taken.items()},
            "stages": {name: dict(stage.figures) for name, stage in results.taken.items()},
        }
        write_json(self.folder / "figures.json", figures)
        report = self.folder / "report.html"
        files.write_file_atomic(report, page(results).encode())
        self.say(f"the whole story: {report}")
        return figures

    def _curve(self, stage: Stage) -> list[tuple[float, float]]:
        path = self.folder / stage.name / METRICS
        if not path.exists():
            return []
        return [(record["step"], record[stage.curve]) for record in read_metrics(path) if stage.curve in record]
