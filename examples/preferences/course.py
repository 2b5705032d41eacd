"""DPO and ORPO on 32 public preference pairs: conversations through the chat template, answers of usual lengths.

It shows that format and lengths work on the real model. 32 pairs teach nothing that would carry over to other prompts, and no
figure here claims so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.course import Course, CourseConfig
from common.model import smollm2
from common.page import Measure, Results
from common.stage import Figures, Stage, Taken, loop
from preferences.pairs import pairs
from tutelage import Tokenizer, files, load_preferences
from tutelage.school.data import write_rows
from tutelage.train.configs import DpoConfig, OrpoConfig
from tutelage.train.dpo import dpo, orpo


@dataclass(frozen=True)
class PreferencesConfig(CourseConfig):
    """DPO and ORPO on 32 public preference pairs, from SmolLM2-135M-Instruct.

    The pairs are conversations with answers of some hundred tokens, judged by a model or of mixed origin. Some minutes on
    two cores; every stage can be resumed.
    """

    output_dir: str = "runs/preferences"
    """Folder of the course: report.html, figures.json, a folder for each stage."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    pairs: int = 32
    longest: int = 512
    """Tokens of a prompt and an answer: the first pairs that fit are taken."""
    batch: int = 8
    steps: int = 8
    lora_rank: int = 16


QUICK = Sizes(pairs=8, longest=256, batch=4, steps=2)


@dataclass(frozen=True)
class Sources:
    """What a course begins with; tests give their own."""

    model: Callable[[Path], None]
    """Makes the folder of the model to start from."""
    pairs: Callable[[], list[dict[str, Any]]]


def packaged(packages: Path) -> Sources:
    """From the public packages."""
    return Sources(lambda folder: smollm2(packages, folder), lambda: pairs(packages))


def preferences(config: PreferencesConfig, sources: Sources | None = None, sizes: Sizes | None = None) -> Mapping[str, Any]:
    """Holds the course as `config` says; prints a table, writes figures.json and report.html into output_dir. The figures.

    Raises as `Course.open`, as the packages, and as the commands of the stages.
    """
    case = _Preferences(config, sources or packaged(Path(config.packages)), sizes or (QUICK if config.quick else Sizes()))
    with case.course.open():
        taken = case.course.take(case.stages())
        return case.conclude(taken)


class _Preferences:
    def __init__(self, config: PreferencesConfig, sources: Sources, sizes: Sizes) -> None:
        self.course = Course(config, "preferences")
        self._sources, self._sizes = sources, sizes

    def _run(self, stage: str) -> dict[str, Any]:
        return {
            **self.course.run(stage),
            "logging_steps": 1,
            "model": self.course.model("base"),
            "data": (self.course.data("pairs"),),
            "max_length": self._sizes.longest,
            "micro_batch_tokens": 2 * self._sizes.longest,
            "batch_size": self._sizes.batch,
            "max_steps": self._sizes.steps,
            "learning_rate": 2e-4,
            "warmup_ratio": 0.1,
            "lora_rank": self._sizes.lora_rank,
        }

    def stages(self) -> list[Stage]:
        """In their order: each reads only what those before it have left."""
        return [
            Stage(
                "base",
                "A real model",
                "SmolLM2-135M-Instruct from its package, with its tokenizer and chat template.",
                self._base,
            ),
            Stage(
                "pairs",
                "Preference pairs",
                f"Of 300 public pairs the first {self._sizes.pairs} whose answers have at most {self._sizes.longest} tokens "
                "with their prompt. A model judged them, or nobody knows who.",
                self._pairs,
            ),
            loop(
                "dpo", "DPO", "Direct preference optimisation.", "dpo", dpo, DpoConfig(**self._run("dpo")), unit="nats per pair"
            ),
            loop(
                "orpo",
                "ORPO",
                "Odds-ratio preference optimisation.",
                "orpo",
                orpo,
                OrpoConfig(**self._run("orpo")),
                unit="per pair",
            ),
        ]

    def _base(self) -> Figures:
        files.make_folder(self.course.folder / "base")
        self._sources.model(Path(self.course.model("base")))
        return {}

    def _pairs(self) -> Figures:
        tokenizer = Tokenizer.from_pretrained(self.course.model("base"))
        rows, lengths, found = [], [], self._sources.pairs()
        for row in found:
            (pair,) = load_preferences([row], tokenizer, 2**31 - 1).examples
            own = [len(pair.chosen.tokens), len(pair.rejected.tokens)]
            if max(own) <= self._sizes.longest:
                rows.append(row)
                lengths += own
            if len(rows) == self._sizes.pairs:
                break
        write_rows(Path(self.course.data("pairs")), rows)
        self.course.say(f"{len(rows)} of {len(found)} pairs; sequences of {min(lengths)} to {max(lengths)} tokens")
        return {"pairs": len(rows), "of": len(found), "shortest": min(lengths), "longest": max(lengths)}

    def conclude(self, taken: Mapping[str, Taken]) -> Mapping[str, Any]:
        """Prints and writes what the course has come to."""
        rows = {
            name: {"first": taken[name].curve[0][1], "last": taken[name].curve[-1][1], "seconds": taken[name].seconds}
            for name in ("dpo", "orpo")
        }
        results = Results(
            title="DPO and ORPO on public preference pairs",
            opening="It shows that the format and the lengths work on a real model; 32 pairs teach nothing that carries over.",
            measures=MEASURES,
            models=rows,
            bars={},
            facts=(
                "At the first step DPO's loss is log 2 = 0.693: nothing is learned yet, and the model is its own reference.",
            ),
            samples=(),
            taken=taken,
        )
        return self.course.conclude(results, dataclasses.asdict(self._sizes))


MEASURES = (
    Measure("first", "loss, first step", "before anything is learned", lambda x: f"{x:.3f}"),
    Measure("last", "loss, last step", "on other pairs, or the same ones again", lambda x: f"{x:.3f}"),
    Measure("seconds", "seconds", "of the stage", lambda x: f"{x:.0f}"),
)
