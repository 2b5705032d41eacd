"""`tutelage play` without a browser: two answers as they come, judged, kept, exported; what goes wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from chats_for_tests import CHATML
from forked import Forker, forker
from labelling_for_tests import Json, Page, Refused, Served, address_of, new_store, serving
from test_chat_command import save_model
from tutelage import Model
from tutelage.cli import main
from tutelage.data.examples import load_preferences
from tutelage.feedback.desk import Conflict
from tutelage.feedback.server import play_api
from tutelage.feedback.state import Settings
from tutelage.feedback.store import Store, StoreError, create
from tutelage.feedback.table import Table
from tutelage.talker import Talker
from tutelage.train.configs import PlayConfig

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("one", "two")
WANTED: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.9}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return two_models(tmp_path_factory)


def two_models(tmp_path_factory: pytest.TempPathFactory, context: int = 96) -> list[str]:
    """Folders of two models of different weights."""
    paths = [save_model(tmp_path_factory.mktemp(name), CHATML, context=context) for name in NAMES]
    other = Model.from_pretrained(paths[1])
    other.params.mul_(1.5)
    other.save_pretrained(paths[1])
    return [str(path) for path in paths]


def new_table(path: Path, folders: list[str], **options: Any) -> tuple[Table, Store]:
    if not path.exists():
        create(path, Settings("compare", 2), [], {})
    store = Store(path)
    settings = {**WANTED, **options.pop("settings", {})}
    talkers = [Talker(folder, options.get("system"), **settings) for folder in folders]
    options.pop("system", None)
    return Table(store, talkers, NAMES[: len(folders)], "Ann", **options), store


@contextmanager
def playing(path: Path, folders: list[str], **options: Any) -> Iterator[tuple[Page, Store, Served]]:
    table, store = new_table(path, folders, **options)
    with serving(store, api=play_api(table)) as served:
        page = Page(served.address)
        try:
            yield page, store, served
        finally:
            page.close()


def turns(*texts: str) -> list[Json]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def say(page: Page, *texts: str) -> list[Json]:
    return page.lines("say", messages=turns(*texts), conversation="conversation-1")


def judge(page: Page, item: int, choice: str, submission: str = "submission-1") -> Json:
    return page.post("judge", item=item, submission=submission, answer={"choice": choice}, seconds=2.5)


def texts_of(lines: list[Json]) -> dict[str, str]:
    """The answers by letter, put together from their pieces."""
    found = {"A": "", "B": ""}
    for line in lines[:-1]:
        found[line["id"]] += line.get("text", "")
    return found


# ---- answers


@pytest.mark.parametrize("count", [1, 2])
def test_answers_are_those_of_generate(tmp_path: Path, folders: list[str], count: int) -> None:
    """Of both models, or two draws of one; the second message draws with the next seed, after the one that was picked."""
    models = [Model.from_pretrained(folder) for folder in folders[:count]]
    with playing(tmp_path / "f.db", folders[:count], seed=7, system="be") as (page, store, _):
        conversation = ["hello"]
        for number in range(2):
            lines = say(page, *conversation)
            messages = [{"role": "system", "content": "be"}, *turns(*conversation)]
            expected = []
            for place in range(2):
                model = models[place % count]
                assert model.tokenizer is not None
                prompt = model.tokenizer.chat_ids(messages, add_generation_prompt=True)
                drawn = model.generate([prompt], stop_token_ids=[0, 3], seed=7 + number, first_sample=place, **WANTED)
                assert drawn.texts is not None
                expected.append(drawn.texts[0])
            last = lines[-1]
            assert last["item"] == number
            answers = {answer["id"]: answer["text"] for answer in last["answers"]}
            assert sorted(answers.values()) == sorted(expected)
            shown = texts_of(lines)
            for letter, text in answers.items():  # a broken character at the very end is only in the whole
                assert text.startswith(shown[letter]) and set(text[len(shown[letter]) :]) <= {"\ufffd"}
            item = store.state.items[number]
            assert item.prompt == tuple(messages)
            assert [response[0]["content"] for response in item.responses or ()] == expected  # type: ignore[index]
            assert item.columns["models"] == list((NAMES[:count] * 2)[:2])
            order = store.state.order("Ann", number)
            assert order is not None and [answers[letter] for letter in "AB"] == [expected[place] for place in order]
            conversation += [answers["A"], "and then"]
    assert len({*expected}) == 2  # two draws, or two models


def test_letters_say_nothing_of_the_model(tmp_path: Path, folders: list[str]) -> None:
    with playing(tmp_path / "f.db", folders, settings={"max_new_tokens": 1}) as (page, store, _):
        for _ in range(24):
            say(page, "hello")
        orders = [store.state.order("Ann", number) for number in range(24)]
        assert 6 <= sum(order == (0, 1) for order in orders) <= 18


def test_lines_come_as_they_are_computed(tmp_path: Path, folders: list[str]) -> None:
    """The first arrives while the last is still to be computed."""
    table, store = new_table(tmp_path / "f.db", folders)
    turn = table.say({"messages": turns("hello"), "conversation": "conversation-1"})
    first = turn.step()
    assert first and all(line.keys() <= {"id", "text", "finish_reason"} for line in first)
    assert len(store.state.items) == 0  # and nothing is kept yet
    turn.close()
    store.close()


# ---- judgements


def test_a_judgement_is_kept_and_told_and_taken_back(tmp_path: Path, folders: list[str]) -> None:
    with playing(tmp_path / "f.db", folders) as (page, store, _):
        item = say(page, "hello")[-1]["item"]
        order = store.state.order("Ann", item)
        assert order is not None
        found = judge(page, item, "A")
        better = NAMES[order[0]]
        assert found["names"] == {"A": NAMES[order[0]], "B": NAMES[order[1]]}
        assert found["tally"] == {"judged": 1, "ties": 0, "better": {name: int(name == better) for name in NAMES}}
        assert judge(page, item, "A") == found  # sent again: nothing twice
        (event,) = store.state.answers()
        assert (event.labeller, event.item, event.body, event.seconds) == ("Ann", item, {"choice": order[0]}, 2.5)
        with pytest.raises(Refused, match="you have answered this item already") as refused:
            judge(page, item, "B", "submission-2")
        assert refused.value.status == 409
        with pytest.raises(Refused, match="this submission was used before, for something else"):
            page.post("undo", item=item, submission="submission-1")
        assert page.post("undo", item=item, submission="submission-3")["tally"]["judged"] == 0
        assert page.post("undo", item=item, submission="submission-3")["tally"]["judged"] == 0
        with pytest.raises(Refused, match="there is nothing to take back"):
            page.post("undo", item=item, submission="submission-4")
        assert judge(page, item, "tie", "submission-5")["tally"] == {"judged": 1, "ties": 1, "better": {"one": 0, "two": 0}}
        other = say(page, "hello")[-1]["item"]
        judge(page, other, "both_bad", "submission-6")
        with pytest.raises(Refused, match="something else was judged since then"):
            page.post("undo", item=item, submission="submission-7")
        assert page.get("session")["tally"] == {"judged": 2, "ties": 2, "better": {"one": 0, "two": 0}}


def test_a_blind_session_tells_no_names(tmp_path: Path, folders: list[str]) -> None:
    with playing(tmp_path / "f.db", folders, reveal=False) as (page, _, _):
        item = say(page, "hello")[-1]["item"]
        assert judge(page, item, "A") == {"names": {}, "tally": {"judged": 1}}
        assert page.get("session")["blind"] and page.get("session")["tally"] == {"judged": 1}


def test_what_is_judged_becomes_preferences(tmp_path: Path, folders: list[str]) -> None:
    path = tmp_path / "f.db"
    with playing(path, folders) as (page, store, _):
        first = say(page, "hello")[-1]
        judge(page, first["item"], "B")
        picked = first["answers"][1]["text"]
        second = say(page, "hello", picked, "more")[-1]
        judge(page, second["item"], "A", "submission-2")
        unjudged = say(page, "hello", picked, "other")[-1]["item"]
        assert unjudged == 2 and len(store.state.items) == 3
    output = tmp_path / "preferences.jsonl"
    assert main(["label", "export", str(path), "--to", "preference", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [turns("hello"), turns("hello", picked, "more")]
    assert [row["chosen"][0]["content"] for row in rows] == [picked, second["answers"][0]["text"]]
    assert [row["rejected"][0]["content"] for row in rows] == [first["answers"][0]["text"], second["answers"][1]["text"]]
    assert all(row["models"] == list(NAMES) and row["labeller"] == "Ann" for row in rows)
    tokenizer = Model.from_pretrained(folders[0]).tokenizer
    assert tokenizer is not None
    assert len(load_preferences(output, tokenizer, 96).examples) == 2


# ---- what goes wrong


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": "hello"}, "messages must be those of a user and the answers between them"),
        ({"messages": []}, "messages must be those of a user"),
        ({"messages": turns("a", "b")}, "messages must be those of a user"),
        ({"messages": turns(*["a"] * 1001)}, "messages must be those of a user"),
        ({"messages": [{"role": "system", "content": "a"}]}, 'message 0 must be {"role": "user", "content": ...}'),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, 'message 0 must be {"role": "user"'),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0 is int, not a text"),
        ({"messages": turns("x" * 200_001)}, "message 0 has 200,001 characters, more than 200,000"),
        ({"messages": turns("a\0")}, "message 0 holds the character 0"),
        ({"messages": turns(" \n")}, "the message is empty"),
        ({"conversation": "?"}, "submission must be 8 to 64 letters"),
        ({"messages": turns("z" * 99)}, "reads at most 96, its answer included; the message was left out"),
    ],
)
def test_messages_that_cannot_be_answered(tmp_path: Path, folders: list[str], body: Json, message: str) -> None:
    with playing(tmp_path / "f.db", folders) as (page, store, _):
        with pytest.raises(Refused) as refused:
            page.lines("say", **{"messages": turns("hello"), "conversation": "conversation-1", **body})
        assert refused.value.status == 422 and message in str(refused.value)
        assert not store.state.items and say(page, "hello")[-1]["item"] == 0  # and it goes on


def test_a_judgement_of_nothing(tmp_path: Path, folders: list[str]) -> None:
    with playing(tmp_path / "f.db", folders) as (page, _, _):
        with pytest.raises(Refused, match="item 5 was not given to Ann"):
            judge(page, 5, "A")
        for item in (None, "0", True):
            with pytest.raises(Refused, match="item must be the number of an item"):
                page.post("undo", item=item, submission="submission-1")
        item = say(page, "hello")[-1]["item"]
        with pytest.raises(Refused, match="choice must be one of"):
            judge(page, item, "C")


def test_only_the_page_may_speak(tmp_path: Path, folders: list[str]) -> None:
    """As for every change: no cookie, another origin, another site, another type."""
    with playing(tmp_path / "f.db", folders) as (page, store, served):
        body = {"messages": turns("hello"), "conversation": "conversation-1"}
        origin = f"http://127.0.0.1:{served.port}"
        cookies = dict(page.client.cookies)
        honest = {"Origin": origin, "Sec-Fetch-Site": "same-origin"}
        for headers, jar, status in (
            (honest, {}, 403),
            ({}, cookies, 403),
            ({"Origin": "http://evil.test"}, cookies, 403),
            ({**honest, "Sec-Fetch-Site": "cross-site"}, cookies, 403),
            ({**honest, "Content-Type": "text/plain"}, cookies, 415),
            ({**honest, "Host": f"evil.test:{served.port}"}, cookies, 421),
        ):
            with httpx.Client(cookies=jar) as client:
                answer = client.post(f"{origin}/api/say", json=body, headers=headers)
            assert answer.status_code == status and not store.state.items
        with httpx.Client(cookies=cookies) as client:  # the control: the same without the attack
            assert client.post(f"{origin}/api/say", json=body, headers=honest).status_code == 200
        assert len(store.state.items) == 1


def test_who_stops_listening_ends_the_answers(tmp_path: Path, folders: list[str]) -> None:
    """Nothing of them is kept, and the next message is answered: with the same draws."""
    with playing(tmp_path / "f.db", folders, settings={"max_new_tokens": 60}) as (page, store, _):
        expected = say(page, "hello")[-1]["answers"]
        for _ in range(5):
            body = {"messages": turns("once more"), "conversation": "conversation-1"}
            with page.client.stream("POST", "/api/say", json=body) as response:
                next(response.iter_lines())
        # The last lines of a short answer may have been kept before the server saw that nobody listens.
        kept = len(store.state.items)
        assert kept < 6 and expected
        assert say(page, "once more")[-1]["item"] == kept


def test_a_second_tab_waits_for_its_turn(tmp_path: Path, folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table, store = new_table(tmp_path / "f.db", folders)
    request = {"messages": turns("hello"), "conversation": "conversation-1"}
    first, second = table.say(request), table.say(request)
    first.step()
    monkeypatch.setattr("tutelage.feedback.table._PATIENCE", 0.05)
    with pytest.raises(Conflict, match="the models are answering in another tab"):
        second.step()
    second.close()
    monkeypatch.setattr("tutelage.feedback.table._PATIENCE", 10.0)
    third = table.say(request)
    waiting = threading.Thread(target=third.step)
    waiting.start()
    while first.step() is not None:
        pass
    first.close()
    waiting.join(10)
    assert not waiting.is_alive()
    while third.step() is not None:
        pass
    third.close()
    assert sorted(store.state.items) == [0, 1]
    store.close()


def test_an_error_of_the_engine_is_told(tmp_path: Path, folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise StoreError("the disk is full")

    with playing(tmp_path / "f.db", folders) as (page, store, _):
        with monkeypatch.context() as patched:
            patched.setattr(Store, "add_item", broken)
            assert say(page, "hello")[-1] == {"error": "the disk is full; nothing was kept of this, so say it again"}
        with monkeypatch.context() as patched:
            patched.setattr("tutelage.feedback.table.Table.answers", lambda *_: 1 / 0)
            assert say(page, "hello") == [{"error": "division by zero"}]
        assert not store.state.items and say(page, "hello")[-1]["item"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("a", "b", "c")}, "models takes one folder or two, but here are 3"),
        ({"models": ()}, "models takes one folder or two, but here are 0"),
        ({"models": ("a", "a"), "temperature": 0.0}, "at temperature 0 one model gives one answer twice"),
        ({"port": 65536}, "port must lie in 0 .. 65535, but it is 65536"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlayConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labeller", " "], "labeller is empty"),
        (["--models", "nothing"], "nothing"),
        (["--top_p", "2"], "top_p"),
    ],
)
def test_what_cannot_be_played_is_told(
    tmp_path: Path, folders: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.db"
    models = [] if "--models" in options else ["--models", *folders]
    assert main(["play", *models, "--out", str(path), "--no-browser", *options]) == 2
    assert message in capsys.readouterr().err and not path.exists()


def test_a_file_of_another_task_is_refused(tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    new_store(tmp_path / "f.db", "rank").close()
    before = (tmp_path / "f.db").read_bytes()
    assert main(["play", *folders, "--out", str(tmp_path / "f.db"), "--no-browser"]) == 2
    assert "holds judgements of the task rank, not of two answers: give another --out" in capsys.readouterr().err
    assert (tmp_path / "f.db").read_bytes() == before


# ---- the command


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("forks"), "children", "tutelage.feedback.server") as found:
        yield found


def test_the_command_goes_on_where_it_was_left(tmp_path: Path, folders: list[str], children: Forker) -> None:
    """Ended by Ctrl-C, which says who was better; killed, which loses nothing; and its file is one of the labelling page's."""
    path = tmp_path / "new" / "play.db"
    config = {"models": folders, "out": str(path), "browser": False, "max_new_tokens": 4, "labeller": "Ann"}

    def start() -> tuple[Any, Page]:
        child = children.start("children:play_page", config=config)
        return child, Page(address_of(child.output))

    child, page = start()
    judge(page, say(page, "hello")[-1]["item"], "A")
    page.close()
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130
    told = child.output.read_text()
    assert "holds 1 judgements of 1 answered messages" in told and "was better 1 times" in told and "neither 0 times" in told

    child, page = start()
    item = say(page, "again")[-1]["item"]
    assert item == 1
    judge(page, item, "tie", "submission-2")
    last = say(page, "unjudged")[-1]["item"]
    page.close()
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL

    store = Store(path)
    assert [event.item for event in store.state.answers()] == [0, 1] and last == 2 and len(store.state.items) == 3
    with serving(store) as served:  # `tutelage label` shows what was not judged
        labelling = Page(served.address)
        found = labelling.next()["item"]
        assert found["id"] == 2 and found["prompt"] == [{"role": "user", "content": "unjudged"}]
        labelling.close()
