"""How long a person waits for the labelling page's server: ``tutelage bench label``.

The server is the real one, on a file on disk, asked over HTTP on this machine: the page and what it asks for once, and then
an answer sent and the next item received, alone and while the engine generates answers. What is sent is synced to the disk
before it is confirmed, so beside it stands what the disk itself takes: 4 KiB written and synced, before each of them.

Where Playwright and a Chromium are installed, a browser is asked too: when it painted first, and how long it is from the key
that submits to the next item on the screen.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tutelage.feedback.desk import Desk
from tutelage.feedback.server import Gate, label_api, listen, make_app, make_server
from tutelage.feedback.state import Event, Settings
from tutelage.feedback.store import Store, create
from tutelage.feedback.tasks import Item
from tutelage.files import write_file_atomic
from tutelage.model import Model

from . import LabelConfig
from .ceilings import environment
from .measure import Spread
from .train import SMOLLM2_135M

_ANSWERS = 4
_TEXT = "An answer of some length, as people read them: three hundred characters or so, which is what a small model says. " * 3
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Milliseconds from the beginning of the navigation to the first text on the screen.
_PAINTED = """() => new Promise(done => new PerformanceObserver((list) => {
    for (const entry of list.getEntriesByName('first-contentful-paint')) done(entry.startTime);
}).observe({type: 'paint', buffered: true}))"""
# Presses Enter; milliseconds until another item is there and the frame that shows it has been made.
_SUBMIT = """() => new Promise(done => {
    const number = document.getElementById('item-number'), before = number.textContent, begin = performance.now();
    new MutationObserver((_, observer) => {
        if (number.textContent === before) return;
        observer.disconnect();
        requestAnimationFrame(() => setTimeout(() => done(performance.now() - begin)));
    }).observe(number, {childList: true, characterData: true, subtree: true});
    document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', ctrlKey: true, bubbles: true}));
})"""
_SYNCED = b"\0" * 4096


def run(config: LabelConfig) -> dict[str, Any]:
    """``tutelage bench label``; see :func:`tutelage.bench.run`."""
    if config.rounds < 1 or config.items <= 3 * config.rounds:
        raise ValueError(
            f"there must be more than {3 * config.rounds} items for {config.rounds} rounds, but items is {config.items}"
        )
    results: dict[str, Any] = {"bench": "label", **environment(), "items": config.items, "milliseconds": {}}
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        for name, taken in measurements(config, Path(folder)):
            p95 = sorted(taken)[int(0.95 * len(taken))]
            results["milliseconds"][name] = {**asdict(Spread.of(taken)), "p95": p95}
    grid = Table("what", "ms, median", "least", "95 of 100 below", "greatest", title=f"{config.items:,} items")
    for name, times in results["milliseconds"].items():
        grid.add_row(name, *(f"{times[column]:.1f}" for column in ("median", "low", "p95", "high")))
    Console().print(grid)
    line = json.dumps(results)
    print(line)
    if config.json is not None:
        write_file_atomic(config.json, f"{line}\n".encode())
    return results


def measurements(config: LabelConfig, folder: Path) -> Iterator[tuple[str, list[float]]]:
    """(what, milliseconds of each)."""
    path = folder / "feedback.db"
    texts = tuple(f"{place} {_TEXT}" for place in range(_ANSWERS))
    create(path, Settings("rank", _ANSWERS), (Item(number, f"{number} {_TEXT}", texts) for number in range(config.items)))
    begin = time.perf_counter()
    store = Store(path)
    yield "open the file", [1e3 * (time.perf_counter() - begin)]
    with _serving(store) as ask:
        yield "the page", [ask("GET", "/")[0] for _ in range(config.rounds)]
        yield "the session", [ask("GET", "/api/session")[0] for _ in range(config.rounds)]
        # Most of a session lies behind: the next item is far down in the list.
        labeller = {"labeller": "bench"}
        _judge(store, labeller["labeller"], config.items - 2 * config.rounds - 1)
        item = ask("POST", "/api/next", labeller)[1]["item"]
        for name, beside in (("answer to next item", nullcontext()), ("the same while generating", _generating())):
            synced, submitted = [], []
            with beside:
                for round_number in range(config.rounds):
                    synced.append(_sync(folder / "synced"))
                    letters = [[answer["id"]] for answer in item["answers"]]
                    request = {
                        "item": item["id"],
                        "submission": f"{name[:3]}-{round_number:08}",
                        "answer": {"ranking": letters},
                    }
                    milliseconds, found = ask("POST", "/api/submit", {**labeller, **request, "seconds": 1})
                    submitted.append(milliseconds)
                    item = found["item"]
            yield name, submitted
            yield f"{name}: 4 KiB synced", synced
    if config.browser:
        yield from _in_chromium(config, folder, texts)


def _in_chromium(config: LabelConfig, folder: Path, texts: tuple[str, ...]) -> Iterator[tuple[str, list[float]]]:
    """The same as a browser has it, in a session of its own; nothing where there is no browser to drive."""
    chromium = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("no browser is measured: that takes `pip install playwright` and a Chromium")
        return
    path = folder / "browser.db"
    create(path, Settings("rank", _ANSWERS), (Item(number, f"{number} {_TEXT}", texts) for number in range(config.items)))
    store = Store(path)
    rounds = min(config.rounds, 40)
    _judge(store, "bench", config.items - rounds - 1)
    with _listening(store) as host, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"])
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://{host}/?token=token")
        page.fill("#name", "bench")
        page.press("#name", "Enter")
        page.locator("#item").wait_for()
        painted, shown = [], []
        for _ in range(rounds):  # a new tab each time, of a session that goes on
            page.goto(f"http://{host}/")
            painted.append(float(page.evaluate(_PAINTED)))
            page.locator("#item").wait_for()
            for letter in "ABCD":
                page.keyboard.press(letter)
            shown.append(float(page.evaluate(_SUBMIT)))
        browser.close()
    yield "first paint (Chromium)", painted
    yield "key pressed to next item on the screen (Chromium)", shown


def _judge(store: Store, labeller: str, count: int) -> None:
    """The first items were judged, in the state only: on the disk nothing depends on them."""
    with store.locked() as state:
        for number in range(count):
            state.apply(Event(0, 0.0, "shown", labeller, number, body={"order": range(_ANSWERS)}))
            body = {"ranking": [[place] for place in range(_ANSWERS)]}
            state.apply(Event(0, 0.0, "answer", labeller, number, f"before-{number}", 1.0, body))


@contextmanager
def _listening(store: Store) -> Iterator[str]:
    """A server of the store; its host, with the port."""
    with listen("127.0.0.1", 0) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        server = make_server(make_app(label_api(Desk(store)), Gate(["token"], "bench"), [host]))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield host
        finally:
            server.should_exit = True
            thread.join()
            store.close()


@contextmanager
def _serving(store: Store) -> Iterator[Callable[..., tuple[float, Any]]]:
    """A function (method, path, body) -> (milliseconds, what came)."""
    with _listening(store) as host:
        connection = http.client.HTTPConnection(host)
        headers = {"Origin": f"http://{host}", "Content-Type": "application/json"}

        def ask(method: str, path: str, body: Any = None) -> tuple[float, Any]:
            begin = time.perf_counter()
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            data = response.read()
            milliseconds = 1e3 * (time.perf_counter() - begin)
            if cookie := response.getheader("Set-Cookie"):
                headers["Cookie"] = cookie.partition(";")[0]
            elif response.status != 200:
                raise RuntimeError(f"{method} {path} was answered by {response.status}: {data[:200]!r}")
            return milliseconds, json.loads(data) if path.startswith("/api/") else data

        try:
            ask("GET", "/?token=token")
            yield ask
        finally:
            connection.close()


@contextmanager
def _generating() -> Iterator[None]:
    """The engine answers prompts, as many at a time as while people judge, on all cores."""
    model, stop = Model(SMOLLM2_135M), threading.Event()

    def generate() -> None:
        while not stop.is_set():
            for _ in model.generate_stream([[1 + number, 2, 3] for number in range(16)], 64, samples_per_prompt=_ANSWERS):
                if stop.is_set():
                    return

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        time.sleep(1)
        yield
    finally:
        stop.set()
        thread.join()


def _sync(path: Path) -> float:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        begin = time.perf_counter()
        os.write(descriptor, _SYNCED)
        os.fsync(descriptor)
        return 1e3 * (time.perf_counter() - begin)
    finally:
        os.close(descriptor)
