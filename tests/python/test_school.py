"""The school: its table, its report, and that a course ends in the same bits through any kill (P5)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import shlex
import signal
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from forked import Forker, forker
from labelling_for_tests import Page, address_of
from models_for_tests import threads
from runs_for_tests import kill_rounds
from tutelage import Model, cli, files
from tutelage.school.course import school
from tutelage.school.data import fact_of, read_rows
from tutelage.school.drawing import bars, curve
from tutelage.school.exam import Grades, printable
from tutelage.school.labeller import SimulatedLabeller
from tutelage.school.report import Examined, Report, Taken, bar, page, picture, table
from tutelage.school.stages import EXAMINED, STAGES, Plan, SchoolConfig, StageName, command_line, followers

FIGURES = [field.name for field in dataclasses.fields(Grades)]


# --- the table ----------------------------------------------------------------------------------------------


def test_a_stage_comes_after_what_it_needs() -> None:
    names = list(STAGES)
    assert all(names.index(other) < names.index(name) for name, stage in STAGES.items() for other in stage.needs)
    assert EXAMINED == ("pretrain", "sft", "ppo", "ppo_ptx", "dpo", "orpo")


def test_only_the_world_and_the_labeller_are_no_commands() -> None:
    assert [name for name, stage in STAGES.items() if stage.command is None] == ["world", "labels"]
    labels = STAGES["labels"]
    assert "simulated" in labels.title and "simulated" in labels.told


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if stage.command])
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_what_is_printed_is_what_runs(name: StageName, size: Any) -> None:
    stage, plan = STAGES[name], Plan(Path("a folder/it's"), size, 3)
    assert stage.command is not None and stage.config is not None
    config = stage.config(plan)
    line = command_line(stage.command, config)
    words = shlex.split(line)
    assert words[:2] == ["tutelage", stage.command]
    typed = cli.parse(stage.command, words[2:])
    assert typed == (dataclasses.replace(config, overwrite=False) if hasattr(config, "overwrite") else config)
    assert set(stage.reads) <= {Path(word).stem for word in words}
    # What it says is needed: of a model and of nothing else that a stage makes.
    read = {place for place in STAGES for word in words if word == plan.model(place)}
    assert read <= set(stage.needs)


def test_what_follows_from_a_stage() -> None:
    assert followers({"dpo"}) == {"dpo"}
    assert followers({"reward"}) == {"reward", "ppo", "ppo_ptx"}
    assert followers({"sft"}) == set(STAGES) - {"world", "tokenizer", "pretrain"}
    assert followers({"world"}) == set(STAGES)
    assert followers(set()) == set()


# --- the report ---------------------------------------------------------------------------------------------


def told(seed: float) -> Examined:
    grades = {name: seed / 7 + place / 100 for place, name in enumerate(FIGURES)}
    row = {"prompt": "Question: Who <is> it?\nAnswer:", "person": "Ada & Co", "attribute": "pet", "value": "goat"}
    return Examined(grades, [{**row, "answer": " A <b>goat</b>\x07 & more.", "right": True, "kind": False}])


@pytest.fixture
def report() -> Report:
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0)]
    taken = {name: Taken(stage, f"tutelage <{name}>", 2.5, {"training": points}) for name, stage in STAGES.items()}
    return Report("tiny", 4, taken, {"sft": told(1), "dpo": told(2)})


class Reader(HTMLParser):
    """Every element that is opened must be closed; collects what a page refers to, its ids and its figures."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.figures: dict[str, float] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        found = {name: value or "" for name, value in attributes}
        self.attributes += found.items()
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "data":
            self.figures[found["id"]] = float(found["value"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    """What a page holds. Fails where it is no well-formed page, or asks for anything from outside."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert text.startswith("<!DOCTYPE html>\n") and not reader.open
    assert len(reader.ids) == len(set(reader.ids))
    assert not set(reader.seen) & {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
    outside = {"src", "href", "srcset", "xlink:href", "action", "poster"}
    assert not outside & {name for name, _ in reader.attributes}
    assert "http:" not in text and "https:" not in text and "//" not in text
    assert not re.search(r"@import|url\(", text)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    return reader


def test_a_page(report: Report) -> None:
    text = page(report)
    reader = read(text)
    assert reader.figures == {f"{name}.{key}": exam.grades[key] for name, exam in report.exams.items() for key in FIGURES}
    assert "simulated labeller" in reader.text and "seed 4" in reader.text
    assert "A <b>goat</b>· & more." in reader.text and "Who <is> it?" in reader.text and "tutelage <dpo>" in reader.text
    assert reader.seen.count("svg") == 1 + len(STAGES)
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    "wrong",
    [
        "<p>",
        "</p>",
        '<img src="x.png">',
        '<a href="https://example.com">x</a>',
        "<script>1</script>",
        "\x07",
        '<i id="a"></i><i id="a"></i>',
    ],
)
def test_a_page_that_is_wrong_is_seen(report: Report, wrong: str) -> None:
    with pytest.raises(AssertionError):
        read(page(report).replace("<h2>", f"{wrong}<h2>", 1))


def test_a_page_without_exams(report: Report) -> None:
    assert not read(page(dataclasses.replace(report, exams={}))).figures


def test_drawings() -> None:
    drawn = bars({"sft": {"right": 0.5, "kind": 0.25}})
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([0-9.]+)"', drawn)]
    assert widths[0] == 2 * widths[1] > 0 and "50.0% right" in drawn
    line = re.search(r'points="([^"]+)"', curve({"training": [(0, 2.0), (5, 1.0), (10, 1.5)]}, "nats"))
    assert line is not None
    (x0, y0), (x1, y1), (x2, y2) = ([float(number) for number in point.split(",")] for point in line[1].split())
    assert x1 - x0 == x2 - x1 > 0 and y1 - y0 == 2 * (y1 - y2) > 0  # down the page is down in value
    assert "points" in curve({"training": [(0, 1.0)]}, "nats")  # a single value


def test_in_the_terminal(report: Report) -> None:
    assert [bar(x, 4) for x in (0, 0.25, 0.5625, 1)] == ["····", "█···", "██▎·", "████"]
    assert len(picture(report).plain.splitlines()) == 4
    assert table(report).row_count == 2


def test_what_cannot_be_printed() -> None:
    assert printable("  a\n b\x07\x1b[31m ") == "a b··[31m"


# --- what is refused ----------------------------------------------------------------------------------------


def begun(folder: Path, *done: str, seed: int = 0) -> dict[str, Any]:
    """A school that has come so far, as the markers say."""
    (folder / "done").mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "school.json").write_text(json.dumps({"format_version": 1, "size": "tiny", "seed": seed}))
    for name in done:
        (folder / "done" / f"{name}.json").write_text("{}")
    return {"output_dir": str(folder), "size": "tiny", "seed": seed}


def test_errors(tmp_path: Path) -> None:
    folder = tmp_path / "school"
    options = begun(folder, "world", "tokenizer", "pretrain", "sft")

    def refused(error: type[Exception], message: str, **others: Any) -> None:
        def everything() -> list[Path]:  # but for the lock's own file, which comes with the first claim
            return [path for path in sorted(folder.rglob("*")) if path.name != ".lock-guard"]

        before = everything()
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            school(SchoolConfig(**{**options, **others}))
        assert everything() == before

    refused(
        files.RunFolderError,
        f"{folder} holds an earlier school: pass --resume auto to go on with it, --overwrite to remove it, "
        "or another --output_dir",
    )
    refused(
        ValueError,
        f"the school in {folder} has seed 0, not 1: give the same, or another --output_dir",
        seed=1,
        resume="auto",
    )
    refused(
        ValueError,
        f"the school in {folder} has size tiny, not small: give the same, or another --output_dir",
        size="small",
        stages=("dpo",),
    )
    refused(
        ValueError,
        f"stage dpo needs labels, which {folder} does not hold yet: pass --stages labels dpo, "
        "or leave --stages out for the whole course",
        stages=("dpo",),
    )
    refused(
        files.RunFolderError,
        "stage sft is finished: pass --overwrite to do it, and what follows from it, again",
        stages=("sft",),
    )
    refused(
        ValueError,
        f"stage answers reads {folder}/data/practice.jsonl, which is not there; a finished school leaves its data only with "
        "--keep: hold it again with --overwrite --keep",
        stages=("answers",),
    )
    (folder / "school.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(files.CheckpointError, match="it was written by a newer release"):
        school(SchoolConfig(**options, resume="auto"))


def test_the_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(files.RunFolderError, match="is not empty and not the folder of a run"):
        school(SchoolConfig(output_dir=str(tmp_path), overwrite=True))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".lock").touch()
    with pytest.raises(files.RunFolderError, match="holds a run that is no school, so nothing in it was touched"):
        school(SchoolConfig(output_dir=str(run), resume="auto"))
    assert sorted(path.name for path in run.iterdir() if path.name != ".lock-guard") == [".lock", "checkpoints"]


def test_options() -> None:
    with pytest.raises(ValueError, match=r"^seed must lie in 0 .. 2\^64 - 1, but it is -1$"):
        SchoolConfig(seed=-1)
    with pytest.raises(ValueError, match=r"^resume and overwrite contradict each other: pass one of them$"):
        SchoolConfig(resume="auto", overwrite=True)


# --- a whole course -----------------------------------------------------------------------------------------


def tiny(folder: Path, **others: Any) -> dict[str, Any]:
    return {"output_dir": str(folder / "school"), "json": str(folder / "school.json"), "size": "tiny", "keep": True, **others}


def digest(folder: Path) -> str:
    """SHA-256 of all that a school must end with: models, metrics, exams, figures."""
    content = hashlib.sha256((folder / "school.json").read_bytes())
    models = [name for name, stage in STAGES.items() if stage.config and (folder / "school" / name / "model").exists()]
    assert len(models) == 7
    paths = [path for name in models for path in [*(folder / "school" / name / "model").iterdir()]]
    paths += [folder / "school" / name / "metrics.jsonl" for name in models]
    for path in sorted([*paths, *(folder / "school" / "exam").iterdir()]):
        content.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return content.hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny school, and of its figures."""
    folder = tmp_path_factory.mktemp("whole")
    with threads(1):
        school(SchoolConfig(**tiny(folder)))
    return folder


def test_a_tiny_school(whole: Path) -> None:
    document = json.loads((whole / "school.json").read_text())
    assert list(document) == ["format_version", "command", "size", "seed", *EXAMINED]
    assert all(list(document[name]) == FIGURES for name in EXAMINED)
    for name in EXAMINED:
        grades = document[name]
        assert all(0 <= grades[key] <= 1 for key in ("right", "kind", "win_rate")) and grades["bpb"] > 0
        rows = [json.loads(line) for line in (whole / "school" / "exam" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 64
        assert (
            sum(row["right"] for row in rows) / 64 == grades["right"]
            and sum(row["kind"] for row in rows) / 64 == grades["kind"]
        )
    # Against itself.
    assert document["sft"]["kl"] == 0 and document["sft"]["win_rate"] == 0.5
    assert all(document[name]["kl"] != 0 for name in EXAMINED if name != "sft")


def test_the_report_of_a_school(whole: Path) -> None:
    document = json.loads((whole / "school.json").read_text())
    reader = read((whole / "school" / "report.html").read_text())
    assert reader.figures == {f"{name}.{key}": document[name][key] for name in EXAMINED for key in FIGURES}
    assert [name for name in reader.ids if name.startswith("stage-")] == [f"stage-{name}" for name in STAGES]
    # One of the exam, and one of each stage that has a loop.
    assert reader.seen.count("svg") == 1 + 7


def test_a_stage_is_what_its_command_makes(whole: Path, tmp_path: Path) -> None:
    plan = Plan(whole / "school", "tiny", 0)
    config = STAGES["dpo"].config
    assert config is not None
    words = shlex.split(command_line("dpo", config(plan)))
    words[words.index("--output_dir") + 1] = str(tmp_path / "mine")
    with threads(1):
        assert cli.main(words[1:]) == 0
    ours = Path(plan.model("dpo")) / "model.safetensors"
    assert (tmp_path / "mine" / "model" / "model.safetensors").read_bytes() == ours.read_bytes()
    Model.from_pretrained(plan.model("dpo"))


def test_stages_alone_and_again(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(whole)
    with threads(1):
        school(SchoolConfig(**tiny(whole), stages=("dpo",), overwrite=True))
    printed = capsys.readouterr().out
    assert "10/11  dpo" in printed and "11/11" not in printed and "exam of dpo" in printed and "exam of ppo" not in printed
    assert digest(whole) == before
    with threads(1):
        school(SchoolConfig(**tiny(whole), resume="auto"))  # there is nothing left to do
    assert "dpo:" not in capsys.readouterr().out
    assert digest(whole) == before


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("children"), "children") as found:
        yield found


@pytest.mark.slow
def test_one_seed_the_same_bits(whole: Path, tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    with threads(2):
        school(SchoolConfig(**tiny(first, keep=False)))
        school(SchoolConfig(**tiny(other, seed=1)))
    assert digest(first) == digest(whole)
    assert digest(other) != digest(whole)
    # Without --keep what only serves to go on is gone, and the school is still a finished one.
    left = {path.name for path in (first / "school").rglob("*") if path.is_dir()}
    assert not left & {"data", "checkpoints", "corpus", "reference"}
    school(SchoolConfig(**tiny(first, keep=False, resume="auto")))
    assert digest(first) == digest(whole)


@kill_rounds(3, 10)
def test_killed_and_resumed(children: Forker, whole: Path, tmp_path: Path, rounds: int) -> None:
    status, output = children.run("children:passed", loop="school", config=tiny(tmp_path / "counted"))
    assert status == 0, output
    _, operations = map(int, output.splitlines()[-1].split())
    places = random.Random(5).sample(range(1, operations), rounds)
    for place in places:
        folder = tmp_path / str(place)
        status, output = children.run("children:train", loop="school", config=tiny(folder), operation=place)
        assert status == -signal.SIGKILL, output
        assert not (folder / "school.json").exists()
        status, output = children.run("children:train", loop="school", config=tiny(folder, resume="auto"))
        assert status == 0, output
        assert digest(folder) == digest(whole), f"killed at operation {place} of {operations}"


@pytest.mark.slow
def test_the_school_teaches(tmp_path: Path) -> None:
    """The whole course of five minutes keeps what README promises."""
    assert cli.main(["school", "--output_dir", str(tmp_path / "school"), "--json", str(tmp_path / "school.json")]) == 0
    found = json.loads((tmp_path / "school.json").read_text())
    sft = found["sft"]
    assert sft["right"] > 0.70 and 0.35 < sft["kind"] < 0.65
    assert all(found[name]["kind"] > 0.90 for name in ("ppo", "ppo_ptx", "dpo", "orpo"))
    assert all(found[name]["right"] >= sft["right"] - 0.02 for name in ("ppo", "dpo"))
    # What reading while trying is for.
    assert found["ppo_ptx"]["bpb"] < found["ppo"]["bpb"] / 2


# --- judged by a person ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_person_judges(children: Forker, tmp_path: Path) -> None:
    """`tutelage school --human`: left in the middle, gone on with, and what was said on the page is what is learned from."""
    folder = tmp_path / "school"
    options = tiny(tmp_path, human=True, human_questions=12, browser=False)
    judge, said = SimulatedLabeller(0, noise=0.0), list[Any]()

    def rank(item: dict[str, Any]) -> dict[str, Any]:
        facts = {row["prompt"]: fact_of(row) for row in read_rows(folder / "data" / "practice.jsonl")}
        prompt, texts = item["prompt"][0]["content"], [answer["text"] for answer in item["answers"]]
        fact = facts[prompt]
        assert item["note"].startswith("What is true: ") and fact.person in item["note"] and fact.value in item["note"]
        ranking = judge.rank(prompt, texts, fact)
        said.append((prompt, [sorted(texts[place] for place in group) for group in ranking]))
        return {"ranking": [[item["answers"][place]["id"] for place in group] for group in ranking]}

    child = children.start("children:command", loop="school", config=options)
    page = Page(address_of(child.output, 120))
    assert "Half of its answers are kind" in page.get("session")["guidelines"]
    item = page.next()["item"]
    page.submit(item["id"], rank(item))
    page.close()
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130, child.output.read_text()
    assert "feedback.db holds 1 judgements of 12 prompts" in child.output.read_text()
    with pytest.raises(ValueError, match="has human 12, not 0: give the same"):
        school(SchoolConfig(**tiny(tmp_path, resume="auto")))
    child = children.start("children:command", loop="school", config={**options, "resume": "auto"})
    page = Page(address_of(child.output, 120))
    page.judge_all(rank)
    page.close()
    assert child.wait() == 0, child.output.read_text()
    written = read_rows(folder / "data" / "rankings.jsonl")
    learned = [(row["prompt"], [sorted(row["responses"][at] for at in group) for group in row["ranking"]]) for row in written]
    assert learned == [entry for entry in said if len(entry[1]) > 1] and learned
    assert "A person has said which answers are better, of 12 questions" in (folder / "report.html").read_text()
    assert "$ tutelage label --out" in child.output.read_text()
