"""Judgements as rows: what each task gives, and that the loops' loaders read it as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from chats_for_tests import CHATML, save_tokenizer
from tutelage import Tokenizer, cli, load_preferences, load_prompts, load_rankings, load_sft, load_unpaired
from tutelage.data.rows import read_rows
from tutelage.feedback.desk import Desk
from tutelage.feedback.export import TASKS, Exported, Form, export_rows
from tutelage.feedback.state import Event, Settings, State
from tutelage.feedback.store import Store, create
from tutelage.feedback.tasks import Item, Task

ASKED = "Where?\nAnswer:"
ANSWERS = (" Oslo.", " Rome!", " Oslo?", " Go away.")


def state_of(task: Task, *bodies: Any, items: list[Item] | None = None, comment: str = "", overlap: int = 1) -> State:
    """A session in which Ann has said one thing about each of the items."""
    state = State(Settings(task, 4, overlap=overlap))
    responses = {"rank": ANSWERS, "compare": ANSWERS[:2], "rate": ANSWERS[:3], "write": ()}[task]
    items = [Item(number, ASKED, responses) for number in range(len(bodies))] if items is None else items
    for item in items:
        state.add_item(item)
    for number, body in enumerate(bodies):
        state.apply(Event(number + 1, 0.0, "answer", "Ann", number, f"submission-{number}", 1.0, body, comment))
    return state


def rated(*scores: int) -> dict[str, Any]:
    return {"ratings": [{"score": score, "flags": ["opinion"] if score == 1 else []} for score in scores]}


def bare(exported: Exported) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("labeller", "item", "comment")} for row in exported.rows]


RANKED = {"ranking": [[1], [0, 2], [3]]}


def test_rankings() -> None:
    row = {"prompt": ASKED, "responses": list(ANSWERS), "ranking": [[1], [0, 2], [3]]}
    assert bare(export_rows(state_of("rank", RANKED), "ranking")) == [row]
    assert bare(export_rows(state_of("rate", rated(2, 7, 2)), "ranking"))[0]["ranking"] == [[1], [0, 2]]
    assert bare(export_rows(state_of("compare", {"choice": 1}), "ranking"))[0]["ranking"] == [[1], [0]]
    found = export_rows(state_of("compare", {"choice": "tie"}, {"choice": 0}, {"choice": "both_bad"}), "ranking")
    assert len(found.rows) == 1 and found.judgements == 3 and found.left_out == {"everything was tied": 2}


def test_preferences() -> None:
    found = export_rows(state_of("rank", RANKED), "preference")
    pairs = [(row["chosen"], row["rejected"]) for row in found.rows]
    one, two, three, four = ANSWERS
    assert pairs == [(two, one), (two, three), (two, four), (one, four), (three, four)]
    implicit = export_rows(state_of("rank", RANKED), "preference_implicit")
    assert [(row["chosen"], row["rejected"]) for row in implicit.rows] == [(ASKED + a, ASKED + b) for a, b in pairs]
    assert all("prompt" not in row for row in implicit.rows)
    same = [Item(0, ASKED, (" a", " a", " b"))]
    found = export_rows(state_of("rank", {"ranking": [[0], [1], [2]]}, items=same), "preference")
    assert len(found.rows) == 2 and found.left_out == {"the two answers are the same text": 1}


def test_unpaired() -> None:
    def labels(task: Task, *bodies: Any) -> tuple[list[tuple[str, bool]], dict[str, int]]:
        found = export_rows(state_of(task, *bodies), "unpaired")
        return [(row["completion"], row["label"]) for row in found.rows], {k: v for k, v in found.left_out.items() if v}

    one, two, three, four = ANSWERS
    assert labels("rank", RANKED) == ([(two, True), (four, False)], {"neither good nor bad": 2})
    assert labels("rank", RANKED, {"ranking": [[0, 1, 2, 3]]})[1] == {"neither good nor bad": 2, "everything was tied": 1}
    assert labels("compare", {"choice": 0}, {"choice": "tie"}) == ([(one, True), (two, False)], {"everything was tied": 1})
    assert labels("compare", {"choice": "both_bad"}) == ([(one, False), (two, False)], {})
    assert labels("rate", rated(1, 4, 5)) == ([(one, False), (three, True)], {"neither good nor bad": 1})


def test_demonstrations_and_ratings() -> None:
    def written(text: str, prompt: Any = ASKED) -> Any:
        state = state_of("write", {"text": text}, items=[Item(0, prompt, ())])
        return bare(export_rows(state, "demonstrations"))[0]["completion"]

    assert written("In Oslo.\n") == " In Oslo." and written(" In Oslo.") == " In Oslo." and written("\nOslo") == "\nOslo"
    assert written("Oslo", "Where? ") == "Oslo" and written("Oslo", "") == "Oslo"
    assert written(" Oslo ", ({"role": "user", "content": "Where?"},)) == [{"role": "assistant", "content": "Oslo"}]
    assert bare(export_rows(state_of("rate", rated(1, 4, 7)), "ratings"))[0] == {
        "prompt": ASKED,
        "response": ANSWERS[0],
        "score": 1,
        "flags": ["opinion"],
    }


def test_what_goes_along() -> None:
    columns = {"source": "web", "label": True, "ranking": [[0], [1]], "comment": "theirs", "tools": [{"name": "add"}]}
    state = state_of("compare", {"choice": 0}, items=[Item(0, ASKED, ANSWERS[:2], None, columns)], comment="close")
    (row,) = export_rows(state, "preference").rows
    about = {"labeller": "Ann", "item": 0, "comment": "close", "source": "web", "tools": [{"name": "add"}]}
    assert row == {"prompt": ASKED, "chosen": ANSWERS[0], "rejected": ANSWERS[1], **about}


def test_what_does_not_stand_is_not_exported() -> None:
    state = state_of("compare", {"choice": 0}, {"choice": 1})
    state.apply(Event(3, 0.0, "undo", "Ann", 1, body={"event": 2}))
    state.apply(Event(4, 0.0, "skip", "Ann", 1, "skip-it-now", body={"reason": "other"}))
    assert [row["item"] for row in export_rows(state, "preference").rows] == [0]


def test_several_labellers() -> None:
    state = state_of("compare", {"choice": 0}, overlap=2)
    state.apply(Event(2, 0.0, "answer", "Bob", 0, "bob-says-this", 1.0, {"choice": 1}))
    assert [(row["labeller"], row["chosen"]) for row in export_rows(state, "preference").rows] == [
        ("Ann", ANSWERS[0]),
        ("Bob", ANSWERS[1]),
    ]
    assert [row["labeller"] for row in export_rows(state, "preference", ("Bob",)).rows] == ["Bob"]
    with pytest.raises(ValueError, match="there is no labeller 'Cem'; there are Ann, Bob"):
        export_rows(state, "preference", ("Cem",))


def test_what_cannot_be_exported() -> None:
    with pytest.raises(
        ValueError, match="judgements of the task rank, which give no demonstrations: export them to ranking or pre"
    ):
        export_rows(state_of("rank", RANKED), "demonstrations")
    with pytest.raises(ValueError, match="judgements of the task write, which give no ranking: export them to demonstrations"):
        export_rows(state_of("write", {"text": "a"}), "ranking")
    with pytest.raises(ValueError, match=r"there is no row to write \(nothing was judged yet\)"):
        export_rows(state_of("rank"), "ranking")
    with pytest.raises(ValueError, match=r"there is no row to write \(everything was tied: 1\)"):
        export_rows(state_of("compare", {"choice": "tie"}), "ranking")
    assert set(TASKS) == set(get_args(Form))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, CHATML)
    return Tokenizer.from_pretrained(folder)


CHAT = ({"role": "user", "content": "Where?"},)
CHAT_ANSWERS = tuple(({"role": "assistant", "content": text.strip()},) for text in ANSWERS)


@pytest.mark.parametrize("conversational", [False, True])
def test_the_loops_read_what_is_written(tmp_path: Path, tokenizer: Tokenizer, conversational: bool) -> None:
    """From judging to the loaders of the loops, through files and the command line."""
    prompt, answers = (CHAT, CHAT_ANSWERS) if conversational else (ASKED, ANSWERS)
    counts = {"rank": 4, "compare": 2, "rate": 4, "write": 0}
    said: dict[Task, Any] = {
        "rank": {"ranking": [["C"], ["A", "B"], ["D"]]},
        "compare": {"choice": "A"},
        "rate": {
            "ratings": {letter: {"score": score, "flags": []} for letter, score in zip("ABCD", (1, 4, 6, 6), strict=True)}
        },
        "write": {"text": "In Oslo."},
    }
    loaders: dict[Form, Any] = {
        "ranking": load_rankings,
        "preference": load_preferences,
        "preference_implicit": load_preferences,
        "unpaired": load_unpaired,
        "demonstrations": load_sft,
    }
    kinds = {"ranking": "ranking", "unpaired": "unpaired_preference", "demonstrations": "prompt_completion"}
    for task, answer in said.items():
        path = tmp_path / f"{task}.db"
        create(path, Settings(task, counts[task]), [Item(0, prompt, answers[: counts[task]])])
        store = Store(path)
        Desk(store).next({"labeller": "Ann"})
        Desk(store).submit({"labeller": "Ann", "item": 0, "submission": "a-submission", "seconds": 1, "answer": answer})
        for form, load in loaders.items():
            output = tmp_path / task / f"{form}.jsonl"
            status = cli.main(["label", "export", str(path), "--to", form, str(output)])
            assert status == (0 if task in TASKS[form] else 2)
            if not status:
                loaded = load(str(output), tokenizer, 96)
                assert len(loaded.examples) >= 1 and set(loaded.report.counts) <= {"note"}, (task, form, str(loaded.report))
                (schema,) = read_rows(str(output)).schemas.values()
                assert (schema.kind, schema.conversational) == (kinds.get(form, "preference"), conversational)
                if form != "preference_implicit":  # and PPO takes the prompts
                    assert len(load_prompts(str(output), tokenizer, 96)) == len(loaded.examples)
        store.close()
    # implicit and explicit pairs are the same tokens
    explicit, implicit = (
        load_preferences(str(tmp_path / "compare" / f"{form}.jsonl"), tokenizer, 96).examples[0]
        for form in ("preference", "preference_implicit")
    )
    assert explicit.chosen.tokens.tolist() == implicit.chosen.tokens.tolist()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.db"
    assert cli.main(["label", "export", str(path), str(tmp_path / "o.jsonl")]) == 2
    assert "f.db does not exist: begin a session with `tutelage label" in capsys.readouterr().err
    for arguments, message in (
        (["--to", "ranking"], "there is no output: tutelage label export feedback.db --to ranking rankings.jsonl"),
        (["--to", "ranking", "o.json"], "output is o.json: it must be a .jsonl file"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["label", "export", str(path), *arguments])
        assert message in " ".join(capsys.readouterr().err.split())
    create(path, Settings("rank", 4), [Item(0, ASKED, ANSWERS)])
    store = Store(path)
    Desk(store).next({"labeller": "Ann"})
    answer = {"ranking": [["A", "B"], ["C", "D"]]}
    Desk(store).submit({"labeller": "Ann", "item": 0, "submission": "a-submission", "seconds": 1, "answer": answer})
    for arguments in (["--to", "ranking", "o.jsonl"], ["o.jsonl"], ["--output", "o.jsonl"], ["--labellers", "Ann", "o.jsonl"]):
        arguments = [str(tmp_path / word) if word == "o.jsonl" else word for word in arguments]
        assert cli.main(["label", "export", str(path), *arguments]) == 0  # while the server holds the file
        assert "o.jsonl: 1 rows (ranking) of 1 judgements" in capsys.readouterr().out
        (row,) = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
        assert row["labeller"] == "Ann" and sorted(map(sorted, row["ranking"])) != [[0, 1, 2, 3]]
        (tmp_path / "o.jsonl").unlink()
    store.close()
    assert cli.main(["label", "export", str(path), str(tmp_path / "o.jsonl")]) == 0  # and when nobody does
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(("-wal", "-shm"))) == ["f.db", "o.jsonl"]
