"""A page without a browser: what it sends to the server, and servers to send it to."""

from __future__ import annotations

import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tutelage.feedback.desk import Desk
from tutelage.feedback.server import Api, Gate, label_api, listen, make_app, make_server
from tutelage.feedback.state import Settings
from tutelage.feedback.store import Store, create
from tutelage.feedback.tasks import Item, Task

Json = dict[str, Any]


def items(count: int, answers: int = 4) -> list[Item]:
    """Items of different prompts and answers."""
    return [
        Item(number, f"question {number}?", tuple(f" answer {number}.{place}" for place in range(answers)))
        for number in range(count)
    ]


def new_store(path: Path, task: Task = "rank", count: int = 3, answers: int | None = None, **options: Any) -> Store:
    """A new session of some items; options: of `Settings`, and clock or fault of `Store`."""
    of_store = {name: options.pop(name) for name in ("clock", "fault") if name in options}
    if answers is None:
        answers = {"rank": 4, "compare": 2, "rate": 3, "write": 1}[task]
    create(path, Settings(task, answers, **options), items(count, answers))
    return Store(path, **of_store)


class Refused(Exception):  # noqa: N818
    """The server's word that it was not so."""

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(body.get("error"))
        self.status, self.body = status, body


class Page:
    """One person at one address."""

    def __init__(self, address: str, labeller: str = "Ann") -> None:
        self.origin = address.partition("/?")[0]
        self.labeller = labeller
        self.client = httpx.Client(base_url=self.origin, headers={"Origin": self.origin}, timeout=30)
        response = self.client.get(address)
        assert response.status_code == 303, response.text

    def close(self) -> None:
        self.client.close()

    def post(self, verb: str, **fields: Any) -> Json:
        response = self.client.post(f"/api/{verb}", json={"labeller": self.labeller, **fields})
        body: Json = response.json()
        if response.status_code != 200:
            raise Refused(response.status_code, body)
        return body

    def lines(self, verb: str, **fields: Any) -> list[Json]:
        """What an answer tells that comes in lines."""
        response = self.client.post(f"/api/{verb}", json=fields)
        if response.status_code != 200:
            raise Refused(response.status_code, response.json())
        return [json.loads(line) for line in response.text.splitlines()]

    def get(self, what: str, **query: str) -> Json:
        response = self.client.get(f"/api/{what}", params=query)
        assert response.status_code == 200, response.text
        found: Json = response.json()
        return found

    def next(self) -> Json:
        return self.post("next")

    def submit(self, item: int, answer: Json, submission: str | None = None, **fields: Any) -> Json:
        fields = {"seconds": 1.0, "comment": "", **fields}
        return self.post("submit", item=item, answer=answer, submission=submission or str(uuid.uuid4()), **fields)

    def skip(self, item: int, reason: str = "unclear", submission: str | None = None, **fields: Any) -> Json:
        return self.post("skip", item=item, reason=reason, submission=submission or str(uuid.uuid4()), **fields)

    def undo(self) -> Json:
        return self.post("undo")

    def judge_all(self, judge: Callable[[Json], Json]) -> int:
        """Answers whatever comes until there is nothing left; how many that were."""
        found = self.next()
        for number in itertools.count():
            while "waiting" in found:
                assert found["problem"] is None, found["problem"]
                time.sleep(0.02)
                found = self.next()
            if "finished" in found:
                return number
            found = self.submit(found["item"]["id"], judge(found["item"]))
        raise AssertionError


def in_order(item: Json) -> Json:
    """Ranks by the texts, which are numbered."""
    answers = sorted(item["answers"], key=lambda answer: str(answer["text"]))
    return {"ranking": [[answer["id"]] for answer in answers]}


@dataclass
class Served:
    """A server in a thread."""

    address: str
    """With a token."""
    host: str
    port: int
    store: Store
    gate: Gate


@contextmanager
def serving(
    store: Store, hosts: Sequence[str] = (), problem: Callable[[], str | None] = lambda: None, api: Api | None = None
) -> Iterator[Served]:
    """Serves a store on a free port, for a `with`; the labelling page, or another."""
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        gate = Gate(["the-token", "another-token"], f"tutelage-{port}")
        names = [f"{name}:{port}" for name in ("127.0.0.1", "localhost", *hosts)]
        server = make_server(make_app(api or label_api(Desk(store, problem)), gate, names))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{port}/?token=the-token", "127.0.0.1", port, store, gate)
        finally:
            server.should_exit = True
            thread.join()
            store.close()


def address_of(output: Path, seconds: float = 60) -> str:
    """The address that a server has printed, first of all, into this file."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if output.exists():
            lines = output.read_text().splitlines(keepends=True)
            found = [line.strip() for line in lines if line.startswith("http://") and line.endswith("\n")]
            if found:
                return found[0]
        time.sleep(0.01)
    raise AssertionError(f"no address was printed: {output.read_text() if output.exists() else 'nothing'}")
