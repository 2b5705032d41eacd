"""`tutelage school`: a model from nothing through all stages, and what each has taught it.

The course is the table in `stages`, one entry after the other. What a stage has come to is a file in output_dir/done, written
last, so whatever instant a school is killed at, a stage is finished, goes on from its newest checkpoint, or begins again: the
models and the figures are the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.rule import Rule

from tutelage import files
from tutelage.evaluate import load_reward_model
from tutelage.feedback.export import export_rows
from tutelage.feedback.store import Store
from tutelage.files import DISK, Disk, RunFolderError
from tutelage.model import Model
from tutelage.school import exam
from tutelage.school.data import SIZES, fact_of, read_rows, write_data, write_rows
from tutelage.school.labeller import SimulatedLabeller, preference_rows
from tutelage.school.report import Report, picture, table, write_report
from tutelage.school.stages import (
    ANSWER_TOKENS,
    ANSWERS_PER_PROMPT,
    EXAMINED,
    STAGES,
    Plan,
    SchoolConfig,
    Stage,
    StageName,
    command_line,
    followers,
    judged,
    stage_of,
)
from tutelage.school.world import World, clauses
from tutelage.train.dpo import dpo, orpo
from tutelage.train.generate import generate
from tutelage.train.label import label
from tutelage.train.ppo import ppo
from tutelage.train.pretrain import pretrain
from tutelage.train.reward import reward
from tutelage.train.run import ignore, write_json
from tutelage.train.sft import sft
from tutelage.train.tokenizer import tokenizer

#: What a command of the table is.
_COMMANDS: Mapping[str, Callable[..., Any]] = MappingProxyType({"tokenizer": tokenizer, "generate": generate})
#: The same, of those that can be resumed.
_LOOPS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "orpo": orpo}
)

_SCHOOL, _DONE, _EXAM, _DATA, REPORT = "school.json", "done", "exam", "data", "report.html"

_GUIDELINES = """Which answers should the model learn to give?

Put the best answer first. Answers between which you see no difference may stand side by side.

What is true is told beside each question; the model knows it from reading, or not. Half of its answers are kind and half
are rude, because it was shown both. Who prefers right answers to wrong ones, and among those the kind ones, teaches it to be
right and kind. You may of course want something else.
"""

# Folders of a stage that only serve to go on with it.
_SCAFFOLDING = ("checkpoints", "corpus", "reference")


@dataclass(frozen=True)
class SchoolResult:
    """What a school has come to."""

    report: Path
    """A web page, complete in itself."""
    grades: Mapping[str, exam.Grades]
    """By stage, of those that have sat the exam."""


def school(config: SchoolConfig, *, disk: Disk = DISK, fault: Callable[[str], None] = ignore) -> SchoolResult:
    """Holds the school as `config` says; prints a table and writes output_dir/report.html.

    disk, fault: for tests, see `open_run`.

    Raises RunFolderError for an output_dir that is in use or holds something else, or an earlier school without resume or
    overwrite; ValueError for an earlier school of another size or seed, and for a stage whose data or whose earlier stages
    are not there.
    """
    with _claim(config, disk):
        course = _Course(config, disk, fault)
        for name in STAGES:
            if name in config.stages or not config.stages:
                course.take(name)
        course.hold_exams()
        result = course.conclude()
        if not config.stages and not config.keep:
            course.tidy()
        return result


@contextmanager
def _claim(config: SchoolConfig, disk: Disk) -> Iterator[None]:
    """Locks the folder, and removes what is to be done again."""
    folder, again = Path(config.output_dir), config.overwrite and not config.stages
    with files.claim_run_folder(folder, None if again else "auto", again, disk):
        plan = _plan(config)
        known = folder / _SCHOOL
        identity = {"size": config.size, "seed": config.seed, "human": plan.human}
        if known.exists():
            found = json.loads(known.read_bytes())
            files.check_version(known, found.get("format_version"))
            if not (config.resume or config.overwrite or config.stages):
                raise RunFolderError(
                    f"{folder} holds an earlier school: pass --resume auto to go on with it, --overwrite to remove it, "
                    "or another --output_dir"
                )
            for name, value in identity.items():
                # A school of before there were people in it says nothing of them.
                if found.get(name, 0) != value:
                    raise ValueError(
                        f"the school in {folder} has {name} {found.get(name, 0)}, not {value}: "
                        "give the same, or another --output_dir"
                    )
        else:
            if (folder / files.CHECKPOINTS).exists():
                raise RunFolderError(
                    f"{folder} holds a run that is no school, so nothing in it was touched: pass another --output_dir"
                )
            write_json(known, identity)
        if config.overwrite:
            _forget(plan, set(config.stages), disk)
        yield


def _plan(config: SchoolConfig) -> Plan:
    human = min(config.human_questions, SIZES[config.size].practice) if config.human else 0
    return Plan(Path(config.output_dir), config.size, config.seed, human)


def _forget(plan: Plan, names: set[StageName], disk: Disk) -> None:
    """Removes what these stages have come to, and what follows from them."""
    gone = followers(names)
    sit_again = EXAMINED if gone & {"sft", "reward"} else [name for name in EXAMINED if name in gone]
    # What follows from a stage is forgotten before the stage itself, so that nothing ever rests on what is not there.
    for place in [
        *(_grades(plan, name) for name in sit_again),
        *(_done(plan, name) for name in reversed(list(STAGES)) if name in gone),
    ]:
        files.remove(place, disk)
    files.discard([path for name in STAGES if name in gone and (path := plan.folder / name).exists()], disk)


def _done(plan: Plan, name: str) -> Path:
    return plan.folder / _DONE / f"{name}.json"


def _grades(plan: Plan, name: str) -> Path:
    return plan.folder / _EXAM / f"{name}.json"


class _Course:
    """The stages, the exams and the conclusion, in one folder."""

    def __init__(self, config: SchoolConfig, disk: Disk, fault: Callable[[str], None]) -> None:
        self._config, self._disk, self._fault = config, disk, fault
        self._plan = _plan(config)
        self._console = Console()

    def say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    # ---- the stages

    def take(self, name: StageName) -> None:
        """Does a stage, if it is not done, and holds the exams that are due."""
        stage = stage_of(name, self._plan)
        if self._is_done(name):
            if self._config.stages and not (self._config.resume or self._config.overwrite):
                raise RunFolderError(f"stage {name} is finished: pass --overwrite to do it, and what follows from it, again")
            return
        self._check(name, stage)
        place = f"{list(STAGES).index(name) + 1}/{len(STAGES)}"
        self._console.print()
        self._console.print(Rule(f"{place}  {name}: {stage.title}", align="left"))
        self.say(stage.told, "dim")
        command = None
        if stage.command is not None and stage.config is not None:
            command = command_line(stage.command, stage.config(self._plan))
            self.say(f"$ {command}", "bold")
        begin = time.monotonic()
        figures = self._run(name, stage)
        record = {"command": command, "seconds": time.monotonic() - begin, "figures": figures}
        write_json(_done(self._plan, name), record)
        self._fault("stage")
        if stage.examined and not (self._is_done("sft") and self._is_done("reward")):
            self._preview(name)
        self.hold_exams()

    def _is_done(self, name: StageName) -> bool:
        return _done(self._plan, name).exists()

    def _check(self, name: StageName, stage: Stage) -> None:
        missing = [other for other in stage.needs if not self._is_done(other)]
        if missing:
            raise ValueError(
                f"stage {name} needs {' and '.join(missing)}, which {self._plan.folder} does not hold yet: "
                f"pass --stages {' '.join([*missing, name])}, or leave --stages out for the whole course"
            )
        lost = [path for path in map(self._plan.data, stage.reads) if not Path(path).exists()]
        if lost:
            raise ValueError(
                f"stage {name} reads {lost[0]}, which is not there; a finished school leaves its data only with --keep: "
                "hold it again with --overwrite --keep"
            )

    def _run(self, name: StageName, stage: Stage) -> dict[str, Any]:
        """The figures that the stage has come to."""
        if name == "world":
            return self._world()
        if name == "labels":
            return self._label_by_hand() if self._plan.human else self._label()
        assert stage.command is not None and stage.config is not None
        config = stage.config(self._plan)
        if stage.command in _LOOPS:
            # Whatever an interrupted school has left of it, it goes on with.
            config = dataclasses.replace(config, resume="auto")
            result = _LOOPS[stage.command](config, disk=self._disk, fault=self._fault)
        else:
            result = _COMMANDS[stage.command](config)
        return _figures(result)

    def _world(self) -> dict[str, Any]:
        size = SIZES[self._plan.size]
        world = World(self._plan.seed, size.people)
        write_data(world, size, self._plan.folder / _DATA)
        self.say(
            f"{size.people} people, {size.texts:,} texts; {len(world.lesson)} people for lessons, "
            f"{len(world.practice)} for practice, {len(world.exam)} for the exam. For example:"
        )
        self.say(f"  {world.texts(1)[0]}", "italic")
        return {"people": size.people, "texts": size.texts}

    def _label(self) -> dict[str, Any]:
        """The simulated labeller ranks the answers."""
        prompts, answers = (read_rows(Path(self._plan.data(name))) for name in ("practice", "answers"))
        labeller = SimulatedLabeller(self._plan.seed)
        texts = [row["text"] for row in answers]
        found = [
            labeller.label(prompt, texts[number * ANSWERS_PER_PROMPT :][:ANSWERS_PER_PROMPT])
            for number, prompt in enumerate(prompts)
        ]
        rankings = [row for row in found if row is not None]
        return {**self._conclude_labels("the simulated labeller has", rankings, len(prompts)), "noise": labeller.noise}

    def _label_by_hand(self) -> dict[str, Any]:
        """A person ranks them, on the labelling page."""
        prompts, answers = (read_rows(Path(self._plan.data(name))) for name in ("practice", "answers"))
        texts = [row["text"] for row in answers]
        config = judged(self._plan)
        assert config.responses is not None and config.guidelines is not None
        rows = [
            {
                "prompt": prompt["prompt"],
                "responses": texts[number * ANSWERS_PER_PROMPT :][:ANSWERS_PER_PROMPT],
                "note": f"What is true: {clauses(fact_of(prompt), spoken=True)[0]}.",
            }
            for number, prompt in enumerate(prompts[: self._plan.human])
        ]
        write_rows(Path(config.responses), rows)
        files.write_file_atomic(Path(config.guidelines), _GUIDELINES.encode())
        label(dataclasses.replace(config, browser=self._config.browser, port=self._config.port))
        store = Store(self._plan.feedback, read_only=True)
        try:
            said = export_rows(store.state, "ranking").rows
        finally:
            store.close()
        rankings = [{name: row[name] for name in ("prompt", "responses", "ranking")} for row in said]
        return self._conclude_labels("you have", rankings, len(rows))

    def _conclude_labels(self, who: str, rankings: list[dict[str, Any]], asked: int) -> dict[str, Any]:
        pairs = [pair for row in rankings for pair in preference_rows(row)]
        write_rows(Path(self._plan.data("rankings")), rankings)
        write_rows(Path(self._plan.data("preferences")), pairs)
        self.say(
            f"{who} ranked the answers to {len(rankings):,} questions (of {asked:,}; the others were tied or skipped), which "
            f"makes {len(pairs):,} pairs of a better and a worse answer"
        )
        if pairs:
            for side in ("chosen", "rejected"):
                self.say(f"  {side}: {exam.printable(pairs[0][side])}", "italic")
        return {"rankings": len(rankings), "pairs": len(pairs)}

    # ---- the exams

    @functools.cached_property
    def _sheet(self) -> exam.Sheet:
        return exam.Sheet.read(self._taught, self._plan.data("exam"), self._plan.data("held_out"))

    @functools.cached_property
    def _taught(self) -> Model:
        """The model after SFT."""
        return Model.from_pretrained(self._plan.model("sft"))

    @functools.cached_property
    def _taught_answers(self) -> exam.Answers:
        return exam.answer(self._taught, self._sheet, ANSWER_TOKENS)

    @functools.cached_property
    def _judge(self) -> Model:
        tokenizer = self._taught.tokenizer
        assert tokenizer is not None
        return load_reward_model(self._plan.model("reward"), tokenizer)

    def _preview(self, name: StageName) -> None:
        """What can be said before there is a reward model."""
        with self._console.status(f"exam of {name}"):
            model = Model.from_pretrained(self._plan.model(name))
            sheet = exam.Sheet.read(model, self._plan.data("exam"), self._plan.data("held_out"))
            answers, bits = exam.answer(model, sheet, ANSWER_TOKENS), exam.bits_per_byte(model, sheet)
        self.say(
            f"exam of {name}: {_told(sum(answers.right), sum(answers.kind), len(answers.texts))}, {bits:.3f} bits per byte"
        )
        for place in exam.samples(sheet):
            self.say(f"  {exam.printable(f'{sheet.questions[place].prompt} {answers.texts[place]}')}", "italic")

    def hold_exams(self) -> None:
        """All that are due: of stages that are done, once there are a taught model and a judge to compare with."""
        if not (self._is_done("sft") and self._is_done("reward")):
            return
        for name in EXAMINED:
            if self._is_done(name) and not _grades(self._plan, name).exists():
                self._examine(name)

    def _examine(self, name: StageName) -> None:
        with self._console.status(f"exam of {name}"):
            model = Model.from_pretrained(self._plan.model(name))
            answers = exam.answer(model, self._sheet, ANSWER_TOKENS)
            grades = exam.grade(model, answers, self._sheet, self._taught, self._taught_answers, self._judge, self._plan.seed)
        files.make_folder(self._plan.folder / _EXAM, self._disk)
        rows = answers.rows(self._sheet)
        write_rows(self._plan.folder / _EXAM / f"{name}.jsonl", rows)
        record = {"grades": dataclasses.asdict(grades), "samples": [rows[place] for place in exam.samples(self._sheet)]}
        write_json(_grades(self._plan, name), record)
        self._fault("exam")
        self.say(
            f"exam of {name}: {_told(sum(answers.right), sum(answers.kind), len(rows))}, {grades.bpb:.3f} bits per byte, "
            f"reward {grades.reward:.2f}, KL {grades.kl:.2f}, better than after SFT {grades.win_rate:.1%}"
        )

    # ---- the end

    def conclude(self) -> SchoolResult:
        """Prints and writes what all stages and exams so far have come to."""
        report = Report.read(self._plan, _done, _grades)
        path = self._plan.folder / REPORT
        write_report(path, report, self._disk)
        grades = {name: exam.Grades(**found.grades) for name, found in report.exams.items()}
        if grades:
            self._console.print()
            self._console.print(table(report))
            self._console.print(picture(report))
        self.say(f"the whole story: {path}")
        if self._config.json is not None:
            figures = {name: dataclasses.asdict(found) for name, found in grades.items()}
            write_json(
                Path(self._config.json), {"command": "school", "size": self._plan.size, "seed": self._plan.seed, **figures}
            )
        return SchoolResult(path, grades)

    def tidy(self) -> None:
        """Leaves report, models, metrics and exams."""
        for path in [self._plan.folder / _DATA, *(self._plan.folder / n / part for n in STAGES for part in _SCAFFOLDING)]:
            files.remove(path, self._disk)


def _told(right: int, kind: int, count: int) -> str:
    return f"{right / count:.1%} of {count:,} answers right, {kind / count:.1%} kind"


def _figures(result: object) -> dict[str, Any]:
    """The numbers of a stage's result."""
    if not dataclasses.is_dataclass(result):
        return {}
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) or value is None}
