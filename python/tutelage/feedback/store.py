"""Where judgements are kept: one SQLite file, to which events are only ever added.

Tables: `session` (its settings, one row), `item` (prompts and their columns), `answers` (of an item, when they are there) and
`event`. Triggers refuse to change or remove a row of any. WAL with synchronous=FULL: what was confirmed to the page has been
synced to the disk, and a server that is killed at any instant leaves each event whole or not at all. A submission has an
identity that the page gives it, and the file takes each identity once: sent again, it changes nothing.

A file is made under another name and renamed when it is whole, so a start that fails leaves none. One server at a time holds
it (`files.lock_file`); readers may come and go.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tutelage import files
from tutelage.data.rows import Text
from tutelage.feedback.state import Event, Kind, Settings, State
from tutelage.feedback.tasks import Item

FORMAT_VERSION = 1
APPLICATION_ID = 0x7475746C  # "tutl": says in the file's header whose it is

_SCHEMA = """
CREATE TABLE session (settings TEXT NOT NULL, source TEXT NOT NULL);
CREATE TABLE item (id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, columns TEXT NOT NULL);
CREATE TABLE answers (item INTEGER PRIMARY KEY REFERENCES item, responses TEXT NOT NULL);
CREATE TABLE spread (item INTEGER PRIMARY KEY REFERENCES item, value REAL NOT NULL);
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, kind TEXT NOT NULL, labeller TEXT NOT NULL,
    item INTEGER NOT NULL REFERENCES item, submission TEXT UNIQUE, seconds REAL NOT NULL, body TEXT NOT NULL,
    comment TEXT NOT NULL
);
"""
_EVENT = "at, kind, labeller, item, submission, seconds, body, comment"
_TABLES = ("session", "item", "answers", "spread", "event")
_APPEND_ONLY = "".join(
    f"CREATE TRIGGER {table}_{what.lower()} BEFORE {what} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, 'rows of {table} are only ever added'); END;\n"
    for table in _TABLES
    for what in ("UPDATE", "DELETE")
)


class StoreError(files.FileError):
    """The file cannot be used, or does not take an event: what, and what to do."""


def create(
    path: Path,
    settings: Settings,
    items: Iterable[Item],
    source: Mapping[str, Any] | None = None,
    disk: files.Disk = files.DISK,
) -> None:
    """Makes the file of a new session, whole or not at all; `path` must not exist.

    source: where the items and their answers come from, kept for the one who goes on with the session.
    """
    if path.exists():
        raise StoreError(f"{path} exists already")
    temporary = path.with_name(files.TEMPORARY + path.name)
    files.make_folder(path.parent, disk)
    files.remove(temporary, disk)
    try:
        with _connected(temporary) as connection:
            connection.executescript(
                f"PRAGMA journal_mode=DELETE; PRAGMA synchronous=FULL; PRAGMA application_id={APPLICATION_ID};"
            )
            connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")
            connection.executescript("BEGIN;" + _SCHEMA + _APPEND_ONLY)
            connection.execute(
                "INSERT INTO session VALUES (?, ?)", (_json(dataclasses.asdict(settings)), _json(dict(source or {})))
            )
            for item in items:
                connection.execute(
                    "INSERT INTO item VALUES (?, ?, ?)", (item.id, _json(item.prompt), _json(dict(item.columns)))
                )
                if item.responses is not None:
                    connection.execute("INSERT INTO answers VALUES (?, ?)", (item.id, _json(list(item.responses))))
                if item.spread is not None:
                    connection.execute("INSERT INTO spread VALUES (?, ?)", (item.id, item.spread))
            connection.execute("COMMIT")
        disk.rename(temporary, path)
    except BaseException:
        files.remove(temporary, disk)
        raise
    disk.fsync(path.parent)


@contextmanager
def _connected(path: Path, mode: str = "rwc") -> Iterator[sqlite3.Connection]:
    with _explained(path):
        connection = _connect(path, mode)
        try:
            yield connection
        finally:
            connection.close()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    # Transactions are begun and ended by name; one connection, guarded by a lock of ours, serves all threads.
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=10
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        full = isinstance(error, sqlite3.OperationalError) and "full" in str(error)
        advice = "free some space on this file system" if full else "look at the disk, and whether you may write there"
        raise StoreError(f"cannot use {path}: {error} ({advice})") from error


def _json(value: object) -> str:
    # A field of a row may be something of parquet's that JSON has no word for, a date: it is kept as its text.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _text(value: object) -> Text:
    return value if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]


class Store:
    """An open file and the state that its events come to. Every method may be called from any thread.

    Raises StoreError for a file that is missing, no SQLite file, another program's, of a newer version or damaged.
    """

    def __init__(
        self,
        path: Path,
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
        fault: Callable[[str], None] = lambda point: None,
    ) -> None:
        if not path.exists():
            raise StoreError(f"{path} does not exist: begin a session with `tutelage label --responses FILE --out {path}`")
        self.path = path
        self._clock, self._fault = clock, fault
        self._lock = threading.RLock()
        with _explained(path):
            self._connection = _connect(path, "ro" if read_only else "rw")
        try:
            with _explained(path):
                self._check()
                if not read_only:
                    self._connection.execute("PRAGMA journal_mode=WAL")
                    self._connection.execute("PRAGMA synchronous=FULL")
                    self._connection.execute("PRAGMA foreign_keys=ON")
                settings, source = self._connection.execute("SELECT settings, source FROM session").fetchone()
                self.settings = Settings(**json.loads(settings))
                self.source: dict[str, Any] = json.loads(source)
                self.state = State(self.settings)
                self._read()
        except BaseException:
            self._connection.close()
            raise

    def _check(self) -> None:
        try:
            (owner,) = self._connection.execute("PRAGMA application_id").fetchone()
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{self.path} is no file of feedback: {error}") from error
        if owner != APPLICATION_ID:
            raise StoreError(f"{self.path} is no file of feedback, so nothing in it was touched: give another --out")
        if version > FORMAT_VERSION:
            raise StoreError(f"{self.path} has format {version}, but this tutelage reads up to {FORMAT_VERSION}: update it")

    def _read(self) -> None:
        rows = self._connection.execute(
            "SELECT item.id, prompt, columns, responses, value FROM item "
            "LEFT JOIN answers ON answers.item = item.id LEFT JOIN spread ON spread.item = item.id ORDER BY item.id"
        )
        for number, prompt, columns, responses, spread in rows:
            given = None if responses is None else tuple(map(_text, json.loads(responses)))
            self.state.add_item(Item(number, _text(json.loads(prompt)), given, spread, json.loads(columns)))
        for number, at, kind, labeller, item, submission, seconds, body, comment in self._connection.execute(
            f"SELECT id, {_EVENT} FROM event ORDER BY id"
        ):
            self.state.apply(Event(number, at, kind, labeller, item, submission, seconds, json.loads(body), comment))

    def close(self) -> None:
        """Ends the connection; a file that was written is then one file again."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def locked(self) -> Iterator[State]:
        """The state, for looking at several things of one instant and adding events in the same breath."""
        with self._lock:
            yield self.state

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._fault("written")
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._fault("committed")

    def add(
        self,
        kind: Kind,
        labeller: str,
        item: int,
        body: Mapping[str, Any],
        *,
        submission: str | None = None,
        seconds: float = 0.0,
        comment: str = "",
    ) -> Event:
        """Adds an event; when this returns, it survives a power loss. Raises StoreError, and nothing has changed."""
        with self._lock:
            at = self._clock()
            self._fault("begin")
            with self._transaction():
                cursor = self._connection.execute(
                    f"INSERT INTO event ({_EVENT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (at, kind, labeller, item, submission, seconds, _json(dict(body)), comment),
                )
            assert cursor.lastrowid is not None
            event = Event(cursor.lastrowid, at, kind, labeller, item, submission, seconds, body, comment)
            self.state.apply(event)
            return event

    def add_item(self, prompt: Text, responses: Sequence[Text], columns: Mapping[str, Any]) -> int:
        """One more item, with its answers; its number."""
        with self._lock:
            item = Item(len(self.state.items), prompt, tuple(responses), None, dict(columns))
            with self._transaction():
                self._connection.execute("INSERT INTO item VALUES (?, ?, ?)", (item.id, _json(prompt), _json(item.columns)))
                self._connection.execute("INSERT INTO answers VALUES (?, ?)", (item.id, _json(list(responses))))
            self.state.add_item(item)
            return item.id

    def add_answers(self, item: int, responses: Sequence[Text]) -> None:
        """The answers of an item that had none. They are kept from then on."""
        with self._lock:
            with self._transaction():
                self._connection.execute("INSERT INTO answers VALUES (?, ?)", (item, _json(list(responses))))
            self.state.add_item(dataclasses.replace(self.state.items[item], responses=tuple(responses)))

    def add_spreads(self, spreads: Mapping[int, float]) -> None:
        """How far the rewards of the answers of some items lie apart."""
        with self._lock:
            with self._transaction():
                self._connection.executemany("INSERT INTO spread VALUES (?, ?)", list(spreads.items()))
            for item, spread in spreads.items():
                self.state.add_item(dataclasses.replace(self.state.items[item], spread=spread))

    def now(self) -> float:
        """Seconds since 1970, by the clock that events are stamped with."""
        return self._clock()
