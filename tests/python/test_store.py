"""The file of feedback: events are only added, each whole or not at all, and give the same state again."""

from __future__ import annotations

import datetime
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labelling_for_tests import items, new_store
from tutelage import files
from tutelage.feedback.desk import Desk
from tutelage.feedback.state import Settings
from tutelage.feedback.store import Store, StoreError, create
from tutelage.feedback.tasks import Item


def judge(desk: Desk, labeller: str, number: int, submission: str) -> Any:
    """Ranks an item as it is shown."""
    answer = {"ranking": [["A"], ["B"], ["C"], ["D"]]}
    return desk.submit({"labeller": labeller, "item": number, "submission": submission, "seconds": 2, "answer": answer})


def whole_state(store: Store) -> dict[str, Any]:
    """What the state looks like to everybody."""
    with store.locked() as state:
        return {
            "labellers": state.labellers,
            "answers": state.answers(),
            "progress": {name: state.progress(name) for name in state.labellers},
            "agreement": state.agreement(),
            "open": {name: state.open_item(name) for name in state.labellers},
            "last": {name: state.last(name) for name in state.labellers},
            "orders": {(name, item): state.order(name, item) for name in state.labellers for item in state.items},
            "drafts": {(name, item): state.draft(name, item) for name in state.labellers for item in state.items},
            "items": state.items,
            "complete": state.is_complete,
        }


def test_the_same_state_again(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db", count=4, overlap=2, order="shuffled", seed=3)
    desk = Desk(store)
    for labeller in ("Ann", "Bob"):
        found = desk.next({"labeller": labeller})
        for step in range(3):
            number = found["item"]["id"]
            found = judge(desk, labeller, number, f"{labeller}-submission-{step}")
        assert desk.undo({"labeller": labeller})["item"]["id"] == number
    request = {"labeller": "Bob", "item": number, "submission": "Bob-skips-it", "reason": "other", "comment": "why not"}
    desk.skip(request)
    before = whole_state(store)
    store.close()
    again = Store(tmp_path / "f.db")
    assert whole_state(again) == before
    assert before["progress"]["Bob"].skipped_by_me == 1 and before["progress"]["Ann"].done_by_me == 2
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.db"]  # one file again


def test_nothing_can_be_changed_or_removed(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db", order="spread")
    store.add_spreads({0: 1.0})
    Desk(store).next({"labeller": "Ann"})
    connection = sqlite3.connect(tmp_path / "f.db")
    for table in ("session", "item", "answers", "spread", "event"):
        (column, *_) = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        assert connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] > 0
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET {column} = {column}"):
            with pytest.raises(sqlite3.IntegrityError, match=f"rows of {table} are only ever added"):
                connection.execute(statement)
        # the negative control: without the trigger it goes
        connection.execute(f"DROP TRIGGER {table}_delete")
        connection.execute("PRAGMA foreign_keys=OFF")
        connection.execute(f"DELETE FROM {table}")
        connection.rollback()
    connection.close()
    store.close()


def test_a_submission_is_taken_once_by_the_file_itself(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db")
    store.add("answer", "Ann", 0, {"ranking": [[0, 1, 2, 3]]}, submission="one-and-only")
    with pytest.raises(StoreError, match=r"UNIQUE constraint failed: event\.submission"):
        store.add("answer", "Ann", 1, {"ranking": [[0, 1, 2, 3]]}, submission="one-and-only")
    assert [event.item for event in store.state.answers()] == [0]
    store.close()


def test_durable(tmp_path: Path) -> None:
    """The file's own setting, and the connection's: a commit returns when the log has been synced."""
    store = new_store(tmp_path / "f.db")
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    store.add("shown", "Ann", 0, {"order": [0, 1, 2, 3]})
    assert (tmp_path / "f.db-wal").stat().st_size > 0  # it lies in the log already
    store.close()


class Full:
    """A connection to a disk that has no room at one kind of statement."""

    def __init__(self, connection: Any, statement: str) -> None:
        self._connection, self._statement = connection, statement

    def execute(self, sql: str, *arguments: Any) -> Any:
        if sql.startswith(self._statement):
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(sql, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT", "COMMIT"])
def test_a_full_disk_changes_nothing(tmp_path: Path, statement: str) -> None:
    store = new_store(tmp_path / "f.db")
    desk = Desk(store)
    desk.next({"labeller": "Ann"})
    before, good = whole_state(store), store._connection
    store._connection = Full(good, statement)  # type: ignore[assignment]
    with pytest.raises(StoreError, match=r"f\.db: database or disk is full \(free some space on this file system\)"):
        judge(desk, "Ann", 0, "first-try")
    assert whole_state(store) == before
    store._connection = good
    assert judge(desk, "Ann", 0, "first-try")["item"]["id"] == 1
    after = whole_state(store)
    store.close()
    again = Store(tmp_path / "f.db")
    assert whole_state(again) == after and len(after["answers"]) == 1
    again.close()


def test_a_start_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Any:
        yield items(1)[0]
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        create(tmp_path / "deep" / "f.db", Settings("rank", 4), broken())
    assert list((tmp_path / "deep").iterdir()) == []

    def fail(operation: files.Operation) -> None:
        if operation.name == "rename":
            raise OSError(28, "No space left on device")

    with pytest.raises(files.FileError, match="No space left"):
        create(tmp_path / "f.db", Settings("rank", 4), items(1), disk=files.Disk(fail))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]
    # what a start that was killed has left is replaced
    (tmp_path / ".tmp-f.db").write_bytes(b"half")
    create(tmp_path / "f.db", Settings("rank", 4), items(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "f.db"]
    with pytest.raises(StoreError, match=r"f\.db exists already"):
        create(tmp_path / "f.db", Settings("rank", 4), items(1))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"f\.db does not exist: begin a session with"):
        Store(tmp_path / "f.db")
    text = tmp_path / "text.db"
    text.write_text("no database at all, but long enough to look at as if it were one\n" * 20)
    with pytest.raises(StoreError, match=r"text\.db is no file of feedback: file is not a database"):
        Store(text)
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE theirs (a)")
    connection.close()
    content = other.read_bytes()
    with pytest.raises(StoreError, match=r"other\.db is no file of feedback, so nothing in it was touched"):
        Store(other)
    assert other.read_bytes() == content and sorted(p.name for p in tmp_path.iterdir()) == ["other.db", "text.db"]
    empty = tmp_path / "empty.db"
    empty.write_bytes(b"")
    with pytest.raises(StoreError, match=r"empty\.db is no file of feedback"):
        Store(empty)
    newer = tmp_path / "newer.db"
    create(newer, Settings("rank", 4), items(1))
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version=2")
    connection.close()
    with pytest.raises(StoreError, match=r"newer\.db has format 2, but this tutelage reads up to 1: update it"):
        Store(newer)


def test_readers_come_and_go(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db")
    desk = Desk(store)
    desk.next({"labeller": "Ann"})
    judge(desk, "Ann", 0, "a-submission")
    reader = Store(tmp_path / "f.db", read_only=True)  # while the server goes on
    assert len(reader.state.answers()) == 1
    with pytest.raises(StoreError, match="readonly"):
        reader.add("skip", "Ann", 1, {"reason": "other"})
    reader.close()
    judge(desk, "Ann", 1, "another-submission")
    store.close()


def test_texts_come_back_as_they_were(tmp_path: Path) -> None:
    chat = ({"role": "user", "content": "Ünïcødé \u2028 \U0001f600 </script>"},)
    answers = (({"role": "assistant", "content": "a\r\nb"},), ({"role": "assistant", "content": ""},))
    create(tmp_path / "f.db", Settings("compare", 2), [Item(0, chat, answers, None, {"n": 1.5, "deep": [{"a": None}]})])
    store = Store(tmp_path / "f.db")
    assert store.state.items[0] == Item(0, chat, answers, None, {"n": 1.5, "deep": [{"a": None}]})
    store.close()
    create(
        tmp_path / "dates.db", Settings("compare", 2), [Item(0, "?", (" a", " b"), None, {"on": datetime.date(2024, 2, 29)})]
    )
    store = Store(tmp_path / "dates.db")
    assert store.state.items[0].columns == {"on": "2024-02-29"}
    store.close()


def test_a_second_holder_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    code = (
        "import sys; from pathlib import Path; from tutelage.files import lock_file\n"
        "with lock_file(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                files.RunFolderError, match=rf"f\.db is in use by process {holder.pid} on {os.uname().nodename}: wait"
            ),
            files.lock_file(path),
        ):
            pass
        holder.kill()
        holder.wait()
        with files.lock_file(path):  # the kernel has freed it
            pass


def test_answers_and_spreads_arrive(tmp_path: Path) -> None:
    waiting = [Item(number, f"{number}?", None, None, {}) for number in range(3)]
    create(tmp_path / "f.db", Settings("compare", 2, order="spread"), waiting)
    store = Store(tmp_path / "f.db")
    desk = Desk(store)
    assert desk.next({"labeller": "Ann"})["waiting"]
    for number in (0, 2):
        store.add_answers(number, [f" {number}.0", f" {number}.1"])
    assert desk.next({"labeller": "Ann"})["waiting"]  # not scored yet
    store.add_spreads({0: 0.5, 2: 1.5})
    assert desk.next({"labeller": "Ann"})["item"]["id"] == 2
    before = whole_state(store)
    store.close()
    again = Store(tmp_path / "f.db")
    assert whole_state(again) == before and json.loads(json.dumps(again.source)) == {}
    with pytest.raises(StoreError, match="UNIQUE"):
        again.add_answers(0, [" other", " answers"])
    assert again.state.items[0].responses == (" 0.0", " 0.1")
    again.close()
