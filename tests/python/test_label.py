"""`tutelage label` as a whole: begun, killed, gone on with; answers of a model; what is refused before anything is written."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import tutelage.feedback
from chats_for_tests import CHATML
from forked import Child, Forker, forker
from labelling_for_tests import Json, Page, Refused, address_of, in_order
from runs_for_tests import overflow, save_model
from tutelage import Model, cli, pack
from tutelage.data.examples import load_sft
from tutelage.evaluate import sequence_rewards
from tutelage.feedback.store import Store
from tutelage.files import RunFolderError
from tutelage.train.configs import LabelConfig
from tutelage.train.label import label


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("forks"), "children", "tutelage.feedback.server") as found:
        yield found


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def responses(path: Path, count: int, answers: int = 4) -> str:
    rows = [{"prompt": f"{n}?", "responses": [f" {n}.{place}" for place in range(answers)]} for n in range(count)]
    return write(path, rows)


class Server:
    """`tutelage label` in a child process."""

    def __init__(self, forks: Forker, config: Json, labeller: str = "Ann", **options: Any) -> None:
        self.child: Child = forks.start("children:serve", config=config, **options)
        self._status: int | None = None
        try:
            self.page = Page(address_of(self.child.output), labeller)
        except BaseException:
            os.kill(self.child.pid, signal.SIGKILL)
            raise

    def wait(self) -> int:
        """Its exit status, once it has ended by itself."""
        self.page.close()
        if self._status is None:
            self._status = self.child.wait()
        return self._status

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Its exit status after this signal, and what it has printed."""
        if self._status is None:
            os.kill(self.child.pid, number)
        return self.wait(), self.child.output.read_text()


Start = Callable[..., Server]


@pytest.fixture
def start(forks: Forker) -> Iterator[Start]:
    """Starts servers, of which none is left behind."""
    servers: list[Server] = []

    def begin(config: Json, labeller: str = "Ann", **options: Any) -> Server:
        servers.append(Server(forks, config, labeller, **options))
        return servers[-1]

    yield begin
    for server in servers:
        server.end(signal.SIGKILL)


def answers_in(path: Path) -> list[Any]:
    store = Store(path, read_only=True)
    try:
        return store.state.answers()
    finally:
        store.close()


def test_begun_ended_and_gone_on_with(tmp_path: Path, start: Start) -> None:
    out = tmp_path / "deep" / "feedback.db"
    (tmp_path / "guidelines.txt").write_text("Kind before rude.\n")
    config = {
        "out": str(out),
        "responses": responses(tmp_path / "r.jsonl", 3),
        "guidelines": str(tmp_path / "guidelines.txt"),
        "title": "T",
    }
    server = start(config)
    session = server.page.get("session")
    assert (session["guidelines"], session["title"], session["k"]) == ("Kind before rude.\n", "T", 4)
    item = server.page.next()["item"]
    shown = server.page.submit(item["id"], in_order(item))["item"]
    status, output = server.end()
    assert status == 130 and f"tutelage label: {out} holds 1 judgements of 3 prompts" in output
    for again in (config, {"out": str(out)}):  # the same command, and the file alone
        server = start(again)
        assert server.page.next()["item"] == shown
        assert server.page.get("session")["guidelines"] == "Kind before rude.\n"
        assert server.end()[0] == 130
    server = start({"out": str(out), "stop_when_complete": True, "title": "Another"})
    assert server.page.get("session")["title"] == "Another"
    server.page.judge_all(in_order)
    assert server.wait() == 0
    assert [event.body["ranking"] for event in answers_in(out)] == [[[0], [1], [2], [3]]] * 3
    label(LabelConfig(out=str(out), stop_when_complete=True, browser=False))  # there is nothing left to wait for


def test_a_polite_end(tmp_path: Path, start: Start) -> None:
    config = {"out": str(tmp_path / "f.db"), "responses": responses(tmp_path / "r.jsonl", 1)}
    assert start(config).end(signal.SIGTERM)[0] == -signal.SIGTERM  # which a shell calls 143
    assert start(config).page.next()["item"]["id"] == 0


def test_a_second_server_is_refused_by_name(tmp_path: Path, start: Start, forks: Forker) -> None:
    config = {"out": str(tmp_path / "f.db"), "responses": responses(tmp_path / "r.jsonl", 1)}
    server = start(config)
    status, output = forks.run("children:serve", config=config)
    assert status == 2
    assert f"f.db is in use by process {server.child.pid} on {os.uname().nodename}: wait for it to end, or stop it" in output
    server.end(signal.SIGKILL)
    assert start(config).end()[0] == 130  # the kernel has freed the file


# --- killed -------------------------------------------------------------------------------------------------------------

_POINTS = ("begin", "written", "committed")


def judge_through_kills(start: Start, config: Json, kills: int, seed: int) -> list[str]:
    """Judges everything while the server is killed `kills` times in mid-submit, half of them at named points, half from outside
    at random times; what got no answer is sent again, the same. The submissions in their order."""
    chance, sent, left = random.Random(seed), list[str](), kills
    pending: tuple[int, Json, str] | None = None

    def another() -> Server:
        """The next server; an answer and the item that is shown next pass the points once each."""
        if left % 2:
            return start(config, name=chance.choice(_POINTS), point=chance.randrange(2, 6))
        return start(config)

    server = another()
    while True:
        try:
            if pending is None:
                shown = server.page.next()
                if "finished" in shown:
                    break
                pending = shown["item"]["id"], in_order(shown["item"]), str(uuid.uuid4())
            killer = None
            if left and not left % 2 and chance.random() < 0.5:
                killer = threading.Timer(chance.random() * 0.006, os.kill, (server.child.pid, signal.SIGKILL))
                killer.start()
            server.page.submit(*pending)
            sent.append(pending[2])
            pending = None
            if killer is not None:
                killer.join()
                server.page.next()
        except httpx.TransportError:
            assert server.wait() == -signal.SIGKILL
            left -= 1
            server = another()
    assert left == 0, "there were not enough items for all the kills"
    assert server.end()[0] == 130
    return sent


def check_whole(out: Path, sent: list[str]) -> None:
    """Nothing is lost and nothing is there twice."""
    events = answers_in(out)
    assert [event.submission for event in events] == sent
    assert len({event.item for event in events}) == len(sent)
    assert all(event.body["ranking"] == [[0], [1]] for event in events)
    connection = sqlite3.connect(out)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("SELECT count(*) FROM event WHERE kind = 'answer'").fetchone() == (len(sent),)
    connection.close()


@pytest.mark.parametrize("sessions", [1, pytest.param(25, marks=pytest.mark.soak)])
def test_killed_twenty_times_nothing_is_lost_and_nothing_twice(tmp_path: Path, start: Start, sessions: int) -> None:
    rows = responses(tmp_path / "r.jsonl", 100, 2)
    for seed in range(sessions):
        out = tmp_path / f"{seed}.db"
        sent = judge_through_kills(start, {"out": str(out), "responses": rows}, kills=20, seed=seed)
        assert len(sent) == 100
        check_whole(out, sent)


def test_control_confirmed_before_it_is_stored(tmp_path: Path, start: Start) -> None:
    out = tmp_path / "f.db"
    config = {"out": str(out), "responses": responses(tmp_path / "r.jsonl", 10, 2)}
    sent: list[str] = []
    for without in ("", "commit"):
        server = start(config, without=without)
        for _ in range(2):
            item = server.page.next()["item"]
            sent.append(str(uuid.uuid4()))
            server.page.submit(item["id"], in_order(item), sent[-1])
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        if without:
            with pytest.raises(AssertionError):
                check_whole(out, sent)
        else:
            check_whole(out, sent)


def test_control_an_identity_that_is_forgotten(tmp_path: Path, start: Start) -> None:
    """Killed when the answer is stored and the page has not been told."""
    for without in ("", "identity"):
        out = tmp_path / f"f{without}.db"
        config = {"out": str(out), "responses": responses(tmp_path / "r.jsonl", 3, 2)}
        server = start(config, name="committed", point=2)
        item = server.page.next()["item"]
        pending = item["id"], in_order(item), str(uuid.uuid4())
        with pytest.raises(httpx.TransportError):
            server.page.submit(*pending)
        assert server.wait() == -signal.SIGKILL
        server = start(config, without=without)
        if without:
            with pytest.raises(Refused, match="you have answered this item already"):
                server.page.submit(*pending)
        else:
            assert server.page.submit(*pending)["item"]["number"] == 2
        server.end()
        check_whole(out, [pending[2]])


# --- answers of a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", CHATML)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("judge") / "model", CHATML, seed=1, head="scalar")


PROMPTS = [{"prompt": text} for text in ("one two", "three", "one two", "four five six", "seven", "eight nine")]


def generated(path: Path) -> list[Any]:
    store = Store(path, read_only=True)
    try:
        return [item.responses for item in store.state.items.values()]
    finally:
        store.close()


def begun(tmp_path: Path, model: Path, **options: Any) -> Json:
    prompts = write(tmp_path / "p.jsonl", PROMPTS)
    return {"out": str(tmp_path / "f.db"), "model": str(model), "prompts": prompts, "k": 3, "max_new_tokens": 12, **options}


def wait_for(page: Page, what: Callable[[Json], bool]) -> Json:
    end = time.monotonic() + 60
    while True:
        found = page.get("progress")
        assert found["problem"] is None and time.monotonic() < end, found
        if what(found["progress"]):
            return found
        time.sleep(0.01)


def test_answers_come_while_people_judge(tmp_path: Path, start: Start, model: Path) -> None:
    server = start(begun(tmp_path, model, seed=5, stop_when_complete=True))
    assert server.page.judge_all(in_order) == len(PROMPTS)
    assert server.wait() == 0
    found = generated(tmp_path / "f.db")
    whole = Model.from_pretrained(model)
    # equal prompts have answers of their own: the second draws with the next seed
    for number, seed in ((0, 5), (1, 5), (2, 6), (3, 5)):
        texts = whole.generate([PROMPTS[number]["prompt"]], 12, samples_per_prompt=3, seed=seed).texts
        assert list(found[number]) == texts
    assert found[0] != found[2] and len(set(found[0])) == 3


def test_a_killed_session_goes_on_with_the_same_answers(tmp_path: Path, start: Start, forks: Forker, model: Path) -> None:
    (tmp_path / "whole").mkdir()
    server = start(begun(tmp_path / "whole", model))
    wait_for(server.page, lambda progress: progress["ready"] == len(PROMPTS))
    server.end()
    expected = generated(tmp_path / "whole" / "f.db")
    out = tmp_path / "f.db"
    counts = []
    for point in (2, 3, 3, 0):  # killed when it has so many answers, less one
        config = begun(tmp_path, model) if point == 2 else {"out": str(out)}
        child = forks.start("children:serve", config=config, name="written", point=point)
        if point:
            assert child.wait() == -signal.SIGKILL
        else:
            page = Page(address_of(child.output))
            wait_for(page, lambda progress: progress["ready"] == len(PROMPTS))
            page.close()
            os.kill(child.pid, signal.SIGINT)
            assert child.wait() == 130
        counts.append(sum(answers is not None for answers in generated(out)))
    assert counts == [1, 3, 5, 6]
    assert generated(out) == expected


def test_another_model_is_refused_while_answers_are_missing(tmp_path: Path, forks: Forker, model: Path) -> None:
    own = save_model(tmp_path / "own", CHATML)
    config = begun(tmp_path, own)
    child = forks.start("children:serve", config=config, name="written", point=2)
    assert child.wait() == -signal.SIGKILL
    save_model(own, CHATML, seed=7)
    before = generated(tmp_path / "f.db")
    with pytest.raises(ValueError, match=r"own is not the model that .*f\.db was begun with, and its answers are not all"):
        label(LabelConfig(out=config["out"], browser=False))
    assert generated(tmp_path / "f.db") == before and before.count(None) == len(PROMPTS) - 1


def test_messages(tmp_path: Path, start: Start, model: Path) -> None:
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in ("one", "two")]
    config = begun(tmp_path, model, prompts=write(tmp_path / "chats.jsonl", chats), task="compare", k=2)
    server = start(config)
    found = server.page.next()
    while "waiting" in found:
        found = server.page.next()
    assert found["item"]["prompt"] == [{"role": "user", "content": "one"}] and len(found["item"]["answers"]) == 2
    wait_for(server.page, lambda progress: progress["ready"] == 2)
    server.end()
    for answers in generated(tmp_path / "f.db"):
        assert [[message["role"] for message in answer] for answer in answers] == [["assistant"], ["assistant"]]


def test_write_with_and_without_a_model(tmp_path: Path, start: Start, model: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", PROMPTS)
    server = start({"out": str(tmp_path / "bare.db"), "prompts": prompts, "task": "write"})
    item = server.page.next()["item"]
    assert item["answers"] == [] and server.page.submit(item["id"], {"text": "An answer."})["item"]["number"] == 2
    server.end()
    server = start(begun(tmp_path, model, task="write", k=1))
    wait_for(server.page, lambda progress: progress["ready"] > 0)
    assert len(server.page.next()["item"]["answers"]) == 1
    server.end()


def test_the_most_unlike_answers_come_first(tmp_path: Path, start: Start, judge: Path) -> None:
    rows = [{"prompt": f"{n}", "responses": [" ab" * (n + 1), f" c {n * 7 % 5}", " d"]} for n in range(8)]
    config = {
        "out": str(tmp_path / "f.db"),
        "responses": write(tmp_path / "r.jsonl", rows),
        "order": "spread",
        "reward_model": str(judge),
    }
    server = start(config)
    wait_for(server.page, lambda progress: progress["ready"] == 8)
    met: list[int] = []
    server.page.judge_all(lambda item: met.append(item["id"]) or in_order(item))  # type: ignore[func-returns-value]
    server.end()
    reward_model = Model.from_pretrained(judge)
    assert reward_model.tokenizer is not None
    spreads = []
    for row in rows:
        pairs = [{"prompt": row["prompt"], "completion": response} for response in row["responses"]]
        read = load_sft(pairs, reward_model.tokenizer, 96)
        rewards = sequence_rewards(reward_model, pack([example.tokens for example in read.examples]), 8192)
        spreads.append(float(rewards.max() - rewards.min()))
    assert met == sorted(range(8), key=lambda n: -spreads[n]) != list(range(8))


def test_a_reward_that_is_no_number_is_told(tmp_path: Path, start: Start, judge: Path) -> None:
    broken = Model.from_pretrained(judge)
    overflow(broken)
    broken.save_pretrained(tmp_path / "broken")
    rows = responses(tmp_path / "r.jsonl", 2)
    config = {"out": str(tmp_path / "f.db"), "responses": rows, "order": "spread", "reward_model": str(tmp_path / "broken")}
    server = start(config)
    end = time.monotonic() + 60
    while (found := server.page.next())["problem"] is None:
        assert time.monotonic() < end
    assert "broken gives an answer to item 0 a reward that is no number" in found["problem"]


def test_a_model_that_fails_is_told_to_who_waits(tmp_path: Path, start: Start, model: Path) -> None:
    broken = Model.from_pretrained(model)
    overflow(broken)
    broken.save_pretrained(tmp_path / "broken")
    server = start(begun(tmp_path, tmp_path / "broken"))
    end = time.monotonic() + 60
    while (found := server.page.next())["problem"] is None:
        assert time.monotonic() < end
    assert found["waiting"] and found["problem"].startswith("no more answers come: the logits")
    assert server.page.get("progress")["problem"] == found["problem"]
    status, output = server.end()
    assert status == 130 and found["problem"] in output


# --- what is refused --------------------------------------------------------------------------------------------------------

ROW = {"prompt": "?", "responses": [" a", " b", " c"]}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([ROW, "{"], {}, r"r\.jsonl, line 2: no valid JSON"),
        ([ROW, {"prompt": "?"}], {}, r"r\.jsonl, line 2: field 'responses' is missing"),
        ([ROW, {"prompt": "?", "responses": " a"}], {}, r"r\.jsonl, line 2: field 'responses' is str, not a list"),
        ([ROW, {"prompt": "?", "responses": []}], {}, r"r\.jsonl, line 2: field 'responses' is empty"),
        (
            [ROW, {"prompt": "?", "responses": [1, 2]}],
            {},
            r"r\.jsonl, line 2: field 'responses', response 0 is int, not a string",
        ),
        (
            [ROW, {"prompt": "?", "responses": [" a"]}],
            {},
            r"r\.jsonl, line 2: field 'responses' has 1, but the task rank takes 2 to",
        ),
        ([ROW], {"task": "compare"}, r"r\.jsonl, line 1: field 'responses' has 3, but the task compare takes 2"),
        ([{"prompt": "?", "responses": [" a"] * 10}], {}, "has 10, but the task rank takes 2 to 9"),
        ([ROW], {"task": "write"}, "has 3, but the task write takes 0 to 1"),
        ([{"prompt": [], "responses": [[], []]}], {}, r"r\.jsonl, line 1: field 'prompt' is an empty list"),
        ([ROW], {"guidelines": "nowhere.txt"}, "nowhere.txt"),
        ([ROW], {"order": "spread"}, "order spread needs a judge: give the folder of a reward_model"),
        ([ROW], {"order": "spread", "reward_model": "nowhere"}, "nowhere"),
        ([ROW], {"host": "0.0.0.0"}, "every address of this machine: name those that browsers use with --allowed_hosts"),
        ([ROW], {"host": "192.0.2.1"}, r"cannot listen on 192\.0\.2\.1 port 0 .*: give another --port"),
        ([], {}, "there is no row to use"),
        (None, {}, "there is nothing to judge: pass --responses FILE, or --model FOLDER --prompts FILE, to begin"),
        (None, {"prompts": "r.jsonl"}, "r.jsonl"),
    ],
)
def test_a_start_that_fails_leaves_nothing(tmp_path: Path, rows: Any, options: Json, message: str) -> None:
    if rows is not None:
        options = {"responses": write(tmp_path / "r.jsonl", rows), **options}
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message):
        label(LabelConfig(out=str(tmp_path / "new" / "f.db"), browser=False, **options))
    assert sorted(tmp_path.iterdir()) == before


def test_more_starts_that_fail(tmp_path: Path, model: Path, judge: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", PROMPTS)
    long = write(tmp_path / "long.jsonl", [*PROMPTS, {"prompt": "many words " * 60}])
    mixed = write(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "a"}], "responses": []}])
    (tmp_path / "both").mkdir()
    write(tmp_path / "both" / "a.jsonl", [ROW])
    write(tmp_path / "both" / "b.jsonl", [{"prompt": [{"role": "user", "content": "a"}], "responses": [[ANSWER], [ANSWER]]}])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    before = sorted(tmp_path.iterdir())
    for options, message in (
        ({"prompts": prompts}, r"who answers the prompts\? Pass --model FOLDER; without answers there is nothing to rank"),
        (
            {"prompts": long, "model": str(model)},
            r"long\.jsonl, line 7: the prompt has \d+ tokens, more than max_length = 96 less 1",
        ),
        ({"prompts": prompts, "model": str(judge)}, "this is a reward model, and answers come from a language model"),
        ({"responses": mixed}, r"chats\.jsonl, line 1: field 'responses' is empty"),
        ({"responses": str(tmp_path / "both")}, r"b\.jsonl has messages: label them apart"),
        ({"prompts": prompts, "model": str(model), "guidelines": str(tmp_path / "latin.txt")}, "latin.txt is no UTF-8 text"),
    ):
        with pytest.raises(ValueError, match=message):
            label(LabelConfig(out=str(tmp_path / "f.db"), browser=False, **options))
        assert sorted(tmp_path.iterdir()) == before
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}"):
            label(LabelConfig(out=str(tmp_path / "f.db"), responses=str(tmp_path / "both"), port=port))
    assert sorted(tmp_path.iterdir()) == before


ANSWER = {"role": "assistant", "content": "b"}


def test_options_that_contradict_each_other() -> None:
    for options, message in (
        (
            {"responses": "a.jsonl", "prompts": "b.jsonl"},
            "responses holds prompts and their answers: leave prompts and model out",
        ),
        ({"k": 4}, "k is the number of a model's answers: give a model too"),
        ({"k": 10, "model": "m"}, "the task rank takes 2 to 9 answers, but k is 10"),
        ({"k": 1, "model": "m"}, "the task rank takes 2 to 9 answers, but k is 1"),
        ({"k": 3, "model": "m", "task": "compare"}, "the task compare takes 2 answers, but k is 3"),
        ({"k": 2, "model": "m", "task": "write"}, "the task write takes 1 answers, but k is 2"),
        ({"order": "spread", "task": "write"}, "order spread compares answers"),
        ({"reward_model": "m"}, "reward_model is for the order spread: give that too"),
        ({"overlap": 0}, "overlap must be at least 1, but it is 0"),
        ({"port": 65536}, "port must lie in 0 .. 65535, but it is 65536"),
    ):
        with pytest.raises(ValueError, match=message):
            LabelConfig(**options)


def test_a_session_of_another_kind_is_not_gone_on_with(tmp_path: Path, start: Start) -> None:
    rows = responses(tmp_path / "r.jsonl", 2, 2)
    config = {"out": str(tmp_path / "f.db"), "responses": rows, "task": "compare", "overlap": 2, "seed": 3}
    assert start(config).end()[0] == 130
    before = (tmp_path / "f.db").read_bytes()
    other = responses(tmp_path / "other.jsonl", 3, 2)
    for change, message in (
        ({"task": "rank"}, "f.db was begun with task compare, not rank: give the same, or another --out"),
        ({"overlap": 1}, "f.db was begun with overlap 2, not 1"),
        ({"seed": 4}, "f.db was begun with seed 3, not 4"),
        ({"order": "shuffled"}, "f.db was begun with order given, not shuffled"),
        ({"responses": other}, "f.db was begun with other rows than those of .*other.jsonl"),
        ({"responses": None, "task": "rate"}, "f.db was begun with task compare, not rate"),
    ):
        with pytest.raises(ValueError, match=message):
            label(LabelConfig(browser=False, **{**config, **change}))
    assert (tmp_path / "f.db").read_bytes() == before
    (tmp_path / "no.db").write_text("something of somebody's")
    with pytest.raises(OSError, match=r"no\.db is no file of feedback"):
        label(LabelConfig(out=str(tmp_path / "no.db"), responses=rows, browser=False))
    assert (tmp_path / "no.db").read_text() == "something of somebody's"


def test_other_settings_of_the_model_are_refused(tmp_path: Path, start: Start, model: Path) -> None:
    config = begun(tmp_path, model)
    assert start(config).end()[0] == 130
    with pytest.raises(ValueError, match=r"f\.db was begun with other settings of the model .*'max_new_tokens': 12"):
        label(LabelConfig(browser=False, **{**config, "max_new_tokens": 13}))


def test_bad_rows_may_be_left_out(tmp_path: Path, start: Start) -> None:
    rows = write(tmp_path / "r.jsonl", [ROW, "{", ROW])
    server = start({"out": str(tmp_path / "f.db"), "responses": rows, "on_bad_row": "skip:1"})
    assert server.page.get("session")["progress"]["total"] == 2
    assert "left out: " in server.end()[1]


def test_other_names_and_addresses(tmp_path: Path, start: Start) -> None:
    rows = responses(tmp_path / "r.jsonl", 1)
    config = {"out": str(tmp_path / "f.db"), "responses": rows, "addresses": 2, "allowed_hosts": ["labels.example"]}
    server = start(config)
    one, two = [line for line in server.child.output.read_text().splitlines() if line.startswith("http")]
    assert one != two
    other = Page(two, "Bob")
    port = two.split(":")[2].split("/")[0]
    named = {"Host": f"labels.example:{port}", "Origin": f"http://labels.example:{port}"}
    assert other.client.post("/api/next", json={"labeller": "Bob"}, headers=named).status_code == 200
    assert (
        other.client.post("/api/next", json={"labeller": "Bob"}, headers={"Host": f"other.example:{port}"}).status_code == 421
    )
    other.close()
    server.end()


def test_another_address_is_warned_of(tmp_path: Path, start: Start, forks: Forker) -> None:
    rows, warning = responses(tmp_path / "r.jsonl", 1), "This address can be reached over the network, unencrypted"
    config = {"out": str(tmp_path / "f.db"), "responses": rows, "host": "0.0.0.0", "allowed_hosts": ["labels.example"]}
    child = forks.start("children:serve", config=config)
    address = address_of(child.output)
    assert address.startswith("http://labels.example:")
    port = int(address.split(":")[2].split("/")[0])
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.get("/").status_code == 421  # reached, and not by a name that was allowed
        assert client.get("/", headers={"Host": f"labels.example:{port}"}).status_code == 403
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130 and warning in child.output.read_text()
    assert warning not in start({**config, "host": "127.0.0.1"}).end()[1]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        cli.main(["label", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for words in ("--responses", "--model", "--prompts", "--no-browser", "label export", "works once", "Ctrl-C ends it"):
        assert words in told.replace("--no_browser", "--no-browser"), words
    with contextlib.suppress(SystemExit):
        cli.main(["label", "export", "--help"])
    assert "tutelage reward" in capsys.readouterr().out


def test_without_starlette_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tutelage.feedback, "server", raising=False)
    monkeypatch.delitem(sys.modules, "tutelage.feedback.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"needs starlette and uvicorn: pip install 'tutelage\[label\]'"):
        label(LabelConfig(out=str(tmp_path / "f.db"), responses=responses(tmp_path / "r.jsonl", 1)))


def test_a_file_that_is_in_use_is_not_touched(tmp_path: Path) -> None:
    from tutelage.files import lock_file

    rows = responses(tmp_path / "r.jsonl", 1)
    with lock_file(tmp_path / "f.db"), pytest.raises(RunFolderError, match=f"f.db is in use by process {os.getpid()}"):
        label(LabelConfig(out=str(tmp_path / "f.db"), responses=rows, browser=False))
    assert not (tmp_path / "f.db").exists()
    assert torch.get_num_threads() >= 1
