"""The labelling page in Chromium: by keyboard alone, dragged, in two tabs, through kills; attacked, enlarged, in the dark."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from playwright.sync_api import Browser, BrowserContext

from browser_for_tests import Person, chrome
from forked import Forker, forker
from hostile_texts import HOSTILE
from labelling_for_tests import Json, address_of, new_store, serving
from runs_for_tests import write_rows
from test_label import answers_in, check_whole
from tutelage.feedback.state import Event, Settings
from tutelage.feedback.store import Store, create
from tutelage.feedback.tasks import Item, Task

TASKS: tuple[Task, ...] = get_args(Task)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chrome("--host-resolver-rules=MAP rebound.test 127.0.0.1") as found:
        yield found


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    found = browser.new_context(viewport={"width": 1240, "height": 780}, reduced_motion="reduce")
    yield found
    found.close()


def answers(store: Store) -> list[tuple[int, Any, str]]:
    with store.locked() as state:
        return [(event.item, dict(event.body), event.comment) for event in state.answers()]


# --- by keyboard alone ------------------------------------------------------------------------------------------------------


def judge(person: Person, task: Task, item: int) -> None:
    """Answers an item by keys: the answers in the order of their numbers, the last two tied; the first one; scores from 7 down
    and a flag for the first; or a text. Then submits."""
    count = {"rank": 4, "compare": 2, "rate": 3, "write": 1}[task]
    letters = [] if task == "write" else person.letters([f" answer {item}.{place}" for place in range(count)])
    if task == "rank":
        person.press(*letters, "=", "Enter")
    elif task == "compare":
        person.press(letters[0], "Enter")
    elif task == "rate":
        for place, letter in enumerate(letters):
            person.press(letter, str(7 - place), *(["Q"] if place == 0 else []))
        person.press("Enter")
    else:
        person.press("Control+A")
        person.type(f"Better {item}.")
        person.press("Control+Enter")


def judged(task: Task, item: int) -> Json:
    """What `judge` says."""
    ratings = [{"score": 7, "flags": ["fails_instruction"]}, {"score": 6, "flags": []}, {"score": 5, "flags": []}]
    bodies: dict[Task, Json] = {
        "rank": {"ranking": [[0], [1], [2, 3]]},
        "compare": {"choice": 0},
        "rate": {"ratings": ratings},
        "write": {"text": f"Better {item}."},
    }
    return bodies[task]


@pytest.mark.parametrize("task", TASKS)
def test_a_whole_session_by_keyboard_alone(tmp_path: Path, context: BrowserContext, task: Task) -> None:
    store = new_store(tmp_path / "f.db", task, 4, guidelines="Kind before rude.\n\nRight before kind.", title="Session")
    with serving(store) as served:
        person = Person(context).begin(served.address)
        page = person.page
        assert page.title() == "Session" and page.locator("#guidelines p").count() == 2  # wide enough: they are open
        leave = ["Escape"] if task == "write" else []

        person.at_item(1)
        judge(person, task, 0)
        person.at_item(2)
        person.press(*leave, "S", "2")  # "I do not know enough to judge"
        person.at_item(3)
        person.press(*leave, "N")
        person.type("A comment, with letters that are keys: u s a b = 1")
        person.press("Escape", *(["E"] if task == "write" else []))
        judge(person, task, 2)
        person.at_item(4)

        person.press(*leave, "U")  # back to the third, as it was
        person.at_item(3)
        assert page.input_value("#comment").startswith("A comment")
        assert len(answers(store)) == 1
        person.press("Control+Enter")
        person.at_item(4)
        person.press(*leave, "L")  # guidelines, closed and opened
        page.locator("#guidelines").wait_for(state="hidden")
        person.press("L")
        page.locator("#guidelines").wait_for()
        person.press("?")
        page.locator("#help").wait_for()
        person.press("Escape", *(["E"] if task == "write" else []))
        judge(person, task, 3)
        person.finished()
        assert page.locator("#finished-figures").inner_text().split("\n")[:4] == [
            "Judged by you",
            "3",
            "Skipped by you",
            "1",
        ]
        comment = "A comment, with letters that are keys: u s a b = 1"
        assert answers(store) == [(item, judged(task, item), comment if item == 2 else "") for item in (0, 2, 3)]
        with store.locked() as state:
            skipped = state.standing("Ann", 1)
        assert skipped is not None and dict(skipped.body) == {"reason": "cannot_judge"}
        assert person.complaints == []


def test_keys_of_rank(tmp_path: Path, context: BrowserContext) -> None:
    """Moved, tied, taken out, put on a place; what is missing is said; off, single keys mean nothing."""
    store = new_store(tmp_path / "f.db", "rank", 2)
    with serving(store) as served:
        person = Person(context).begin(served.address)
        person.at_item(1)
        person.press("A", "Enter")
        person.status("B, C and D have no place yet.")
        person.press("B", "C", "D", "Shift+ArrowUp", "Shift+ArrowUp")  # A D B C
        person.press("C", "=", "=")  # tied with B, and no more
        person.press("A", "4")  # D B C A
        person.press("B", "Backspace", "B")  # at the end
        person.press("ArrowUp", "=")  # A, tied with C
        shown = person.page.locator(".places > li").evaluate_all(
            "rows => rows.map(row => [...row.querySelectorAll('.letter')].map(letter => letter.textContent))"
        )
        assert shown == [["D"], ["A", "C"], ["B"]]
        person.page.click("#help-open")
        person.page.uncheck("#help-single")
        person.press("Escape", "A", "1", "U", "S")
        assert person.page.locator(".places > li").count() == 3 and not person.page.locator("#skip").is_visible()
        person.press("Control+Enter")
        person.at_item(2)
        assert person.complaints == []


def test_compare_says_tie_and_both_bad(tmp_path: Path, context: BrowserContext) -> None:
    store = new_store(tmp_path / "f.db", "compare", 3)
    with serving(store) as served:
        person = Person(context).begin(served.address)
        for number, key in enumerate(("T", "X", "ArrowRight"), 1):
            person.at_item(number)
            if number < 3:
                person.press("Enter")
                person.status("Choose first")
            second = person.texts()["B"].strip()
            person.press(key, "Control+Enter")
        person.finished()
        said = [body["choice"] for _, body, _ in answers(store)]
        assert said == ["tie", "both_bad", int(second[-1])]


# --- by mouse ---------------------------------------------------------------------------------------------------------------


def test_dragged(tmp_path: Path, context: BrowserContext) -> None:
    """Onto the first place, behind it, onto another (a tie), and back to the pile."""
    store = new_store(tmp_path / "f.db", "rank", 1)
    with serving(store) as served:
        person = Person(context).begin(served.address)
        person.at_item(1)
        page = person.page

        def drag(letter: str, target: str, high: float) -> None:
            handle = page.locator(f".card[data-letter={letter}] .handle").bounding_box()
            assert handle is not None
            page.mouse.move(handle["x"] + 8, handle["y"] + 8)
            page.mouse.down()
            page.mouse.move(handle["x"] + 8, handle["y"] + 40, steps=4)
            box = page.locator(target).bounding_box()  # cards are lower now
            assert box is not None
            page.mouse.move(box["x"] + 40, box["y"] + high * box["height"], steps=6)
            page.mouse.up()

        def places() -> list[str]:
            found = page.locator(".places > li").evaluate_all(
                "rows => rows.map(row => [...row.querySelectorAll('.letter')].map(letter => letter.textContent).join(''))"
            )
            return [str(each) for each in found]

        drag("C", ".empty", 0.5)
        assert places() == ["C"]
        drag("A", ".places > li:last-child", 0.98)
        assert places() == ["C", "A"]
        drag("D", ".places > li:first-child", 0.02)
        assert places() == ["D", "C", "A"]
        drag("D", ".pile", 0.5)
        assert places() == ["C", "A"]
        drag("B", ".places > li:nth-child(1)", 0.5)
        assert places() == ["BC", "A"]
        page.click(".card[data-letter=D] .letter")
        assert places() == ["BC", "A", "D"]
        page.click("#submit")
        person.finished()
        assert person.complaints == []


# --- two tabs, reloads, kills -------------------------------------------------------------------------------------------------


def test_two_tabs(tmp_path: Path, context: BrowserContext) -> None:
    """The second is told that the item was answered; nothing is there twice, and it goes on with the next."""
    store = new_store(tmp_path / "f.db", "compare", 2)
    with serving(store) as served:
        first = Person(context).begin(served.address)
        second = Person(context).begin(f"http://{served.host}:{served.port}/")
        first.at_item(1)
        second.at_item(1)
        first.press("T", "Enter")
        first.at_item(2)
        second.press("X", "Enter")
        second.status("You have answered this item already")
        assert [body["choice"] for _, body, _ in answers(store)] == ["tie"]
        second.page.get_by_role("button", name="Go on to the next item").click()
        second.at_item(2)
        second.press("X", "Enter")
        second.finished()
        assert [body["choice"] for _, body, _ in answers(store)] == ["tie", "both_bad"]
        assert first.complaints == []


def test_a_reload_loses_nothing(tmp_path: Path, context: BrowserContext) -> None:
    store = new_store(tmp_path / "f.db", "write", 2)
    with serving(store) as served:
        person = Person(context).begin(served.address)
        person.at_item(1)
        person.press("Control+A")
        person.type("Half of a sen")
        person.page.fill("#comment", "not yet")
        person.page.reload()
        person.at_item(1)
        assert person.page.input_value("#written") == "Half of a sen"
        assert person.page.input_value("#comment") == "not yet"
        # Control: what was submitted leaves no draft behind.
        person.press("Control+Enter")
        person.at_item(2)
        assert person.page.evaluate("Object.keys(sessionStorage)") == ["labeller"]


def test_waiting_until_answers_come(tmp_path: Path, context: BrowserContext) -> None:
    path = tmp_path / "f.db"
    create(path, Settings("compare", 2), [Item(0, "question?", None)])
    store = Store(path)
    with serving(store) as served:
        person = Person(context).begin(served.address)
        person.page.locator("#waiting").wait_for()
        assert person.page.locator("#waiting-what").inner_text().startswith("0 of 1 items are ready")
        store.add_answers(0, ("one", "two"))
        person.at_item(1)
        assert sorted(person.texts().values()) == ["one", "two"]
        assert person.complaints == []


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("forks"), "children", "tutelage.feedback.server") as found:
        yield found


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_in_mid_submit(tmp_path: Path, context: BrowserContext, forks: Forker, kills: int) -> None:
    """kill -9 while an answer is stored, before and after it is: the page sends it again until it is confirmed."""
    rows = [{"prompt": f"{n}?", "responses": [f" {n}.{place}" for place in range(2)]} for n in range(kills + 2)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "f.db"
    config = {"out": str(out), "responses": str(write_rows(tmp_path / "r.jsonl", rows)), "port": port}

    points = ("begin", "written", "committed")

    def serve(at: int) -> Any:
        # What a server stores, in order: the answer that is sent again (unless it was stored before the kill), that the next
        # item is shown, and the answer to that, at which it is killed.
        again = at > 0 and points[(at - 1) % 3] != "committed"
        return forks.start("children:serve", config=config, name=points[at % 3], point=0 if at == kills else 2 + again)

    child, running = serve(0), True
    try:
        person = Person(context).begin(address_of(child.output))
        for number in range(len(rows)):
            person.at_item(number + 1)
            person.press(*person.letters([f" {number}.0", f" {number}.1"]), "Enter")
            if number < kills:
                running = False
                assert child.wait() == -signal.SIGKILL
                person.status("The server does not answer")
                child, running = serve(number + 1), True
                door = context.new_page()  # the person opens the new address, in another tab
                door.goto(address_of(child.output))
                door.close()
        person.finished()
    finally:
        if running:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
    events = answers_in(out)
    assert [event.item for event in events] == list(range(len(rows)))
    check_whole(out, [event.submission for event in events])


# --- attacked -----------------------------------------------------------------------------------------------------------------


@contextmanager
def elsewhere(html: str) -> Iterator[int]:
    """A page of somebody else, on another port of this machine; the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# What a hostile page tries: target is ours, body a change. "127.0.0.1" at another port counts as the same site, so the
# cookie travels with its requests; "localhost" is another site.
ATTACKS = {
    "post of plain text": (
        "await fetch(`${target}/api/submit`, {method: 'POST', mode: 'no-cors', credentials: 'include', body})"
    ),
    "post of JSON": (
        "await fetch(`${target}/api/submit`, {method: 'POST', credentials: 'include', body, "
        "headers: {'Content-Type': 'application/json'}})"
    ),
    "beacon": "navigator.sendBeacon(`${target}/api/submit`, new Blob([body], {type: 'text/plain'}))",
    "form": (
        "const form = Object.assign(document.createElement('form'), {method: 'POST', enctype: 'text/plain', "
        'action: `${target}/api/submit`}); const name = body.slice(0, -1) + \',"x":"\'; '
        "form.append(Object.assign(document.createElement('input'), {name, value: '\"}'})); "
        "document.body.append(form); form.submit(); await new Promise(done => setTimeout(done, 500))"
    ),
    "undo": (
        "await fetch(`${target}/api/undo`, {method: 'POST', mode: 'no-cors', credentials: 'include', "
        "body: JSON.stringify({labeller: 'Ann', submission: 'attack-undo'})})"
    ),
}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_hostile_pages_change_nothing(tmp_path: Path, context: BrowserContext, host: str) -> None:
    store = new_store(tmp_path / "f.db", "compare", 3)
    with serving(store) as served, elsewhere("<!doctype html><title>hostile</title><body>") as port:
        person = Person(context).begin(served.address)
        person.at_item(1)
        person.press("T", "Enter")
        person.at_item(2)
        before = answers(store)
        target = f"http://{served.host}:{served.port}"
        body = {
            "labeller": "Ann",
            "item": 1,
            "submission": "attack-submit",
            "seconds": 1,
            "comment": "",
            "answer": {"choice": "both_bad"},
        }
        hostile = context.new_page()
        for what, script in ATTACKS.items():
            hostile.goto(f"http://{host}:{port}/")
            code = f"async ([target, body]) => {{ try {{ {script} }} catch (error) {{ return String(error) }} }}"
            try:
                hostile.evaluate(code, [target, json.dumps(body)])
            except Exception as error:  # a form takes the page away
                assert "navigation" in str(error), error
            hostile.wait_for_timeout(100)
            assert answers(store) == before, what
        # Nothing can be read, framed or run either.
        hostile.goto(f"http://{host}:{port}/")
        read = """async target => {
            try { return await (await fetch(target, {credentials: 'include'})).text() } catch { return 'no' }
        }"""
        assert hostile.evaluate(read, f"{target}/api/session") == "no"
        framed = """async target => {
            const frame = Object.assign(document.createElement('iframe'), {src: target});
            document.body.append(frame);
            await new Promise(done => frame.addEventListener('load', done));
            return window.length;
        }"""
        assert hostile.evaluate(framed, target) == 1
        inside = hostile.frames[1]
        assert inside.locator("#title").count() == 0  # an error of the browser is shown, not the page
        # Control: the very same request from the page itself is taken.
        taken = person.page.evaluate(
            """async body => (await fetch('/api/submit', {
                method: 'POST', body, headers: {'Content-Type': 'application/json'}
            })).status""",
            json.dumps(body),
        )
        assert taken == 200 and len(answers(store)) == len(before) + 1


def test_a_foreign_name_for_this_machine_is_refused(tmp_path: Path, context: BrowserContext) -> None:
    """DNS rebinding: the browser believes that rebound.test is here; the server does not."""
    store = new_store(tmp_path / "f.db", "compare", 1)
    with serving(store) as served:
        page = context.new_page()
        response = page.goto(f"http://rebound.test:{served.port}/?token=the-token")
        assert response is not None and response.status == 421 and page.locator("#title").count() == 0
        response = page.goto(served.address)  # Control: the token is still good, under the server's own name
        assert response is not None and response.status == 200 and page.locator("#title").count() == 1


def test_hostile_texts_stay_texts(tmp_path: Path, context: BrowserContext) -> None:
    """Each of 200 as prompt, answer, comment and labeller's name: shown letter by letter, run by nobody."""
    assert len(set(HOSTILE)) == 200
    path = tmp_path / "f.db"
    create(
        path, Settings("rate", 1, title=HOSTILE[0], guidelines=HOSTILE[1]), [Item(n, t, (t,)) for n, t in enumerate(HOSTILE)]
    )
    store = Store(path)
    with store.locked() as state:  # others were here before
        for number, text in enumerate(HOSTILE):
            state.apply(Event(0, 0.0, "shown", text[:64].strip(), number, body={"order": (0,)}))
    with serving(store) as served:
        person = Person(context)
        person.page.goto(served.address)
        person.page.locator("#start-names button").first.wait_for()
        names = person.page.locator("#start-names button").evaluate_all("all => all.map(each => each.textContent)")
        assert set(names) == {text[:64].strip() for text in HOSTILE}
        own = next(text for text in HOSTILE if 20 < len(text) <= 64)
        person.page.fill("#name", own)
        person.press("Enter")
        for number in range(len(HOSTILE)):
            person.at_item(number + 1)
            shown = person.page.evaluate(
                """() => ({
                    texts: [...document.querySelectorAll('#prompt .text, .lettered .text')].map(each => each.textContent),
                    who: document.querySelector('#who-name').textContent,
                    inside: [...document.querySelectorAll('#prompt .text *, .lettered .text *, bdi *, #title *')].length,
                    strange: document.querySelectorAll(
                        'iframe, object, embed, base, img, svg, math, style, script:not([src="/label.js"])'
                    ).length,
                    fired: window.fired ?? null,
                })"""
            )
            text = shown["texts"][0]
            assert shown["texts"] == [HOSTILE[number]] * 2, (number, text)
            assert (shown["who"], shown["inside"], shown["strange"], shown["fired"]) == (own.strip(), 0, 0, None), text
            person.page.fill("#comment", HOSTILE[number])
            person.press("Escape", "4", "Control+Enter")
        person.finished()
        assert [comment for _, _, comment in answers(store)] == [text.strip() for text in HOSTILE] or [
            comment for _, _, comment in answers(store)
        ] == HOSTILE
        assert person.complaints == []
        ours = f"http://{served.host}:{served.port}/"
        assert person.asked and all(url.startswith(ours) for url in person.asked)


def test_control_the_hostile_texts_are_hostile(context: BrowserContext) -> None:
    """Put into a page as markup, with no policy, they run."""
    page = context.new_page()
    page.on("dialog", lambda dialog: dialog.dismiss())
    fired = 0
    with elsewhere("<!doctype html><title>victim</title><body>") as port:
        page.goto(f"http://127.0.0.1:{port}/")
        for text in HOSTILE:
            fired += bool(
                page.evaluate(
                    """async text => {
                        window.fired = null;
                        document.body.innerHTML = text;
                        for (const each of document.querySelectorAll('a[href], button, input')) {
                            each.dispatchEvent(new MouseEvent('click', {bubbles: true}));
                        }
                        await new Promise(done => setTimeout(done, 5));
                        return window.fired ?? null;
                    }""",
                    text,
                )
            )
            if page.url != f"http://127.0.0.1:{port}/":
                page.goto(f"http://127.0.0.1:{port}/")
    assert fired >= 50


# --- seen ---------------------------------------------------------------------------------------------------------------------

# Contrast of every text with what lies behind it, by the WCAG 2 formula; colours of any notation are drawn to be read.
CONTRASTS = """() => {
    const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
    const ink = canvas.getContext('2d', {willReadFrequently: true});
    const over = (colours) => {
        ink.clearRect(0, 0, 1, 1);
        for (const colour of colours) { ink.fillStyle = colour; ink.fillRect(0, 0, 1, 1); }
        return [...ink.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const linear = (part) => part <= 10 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const found = [];
    for (const element of document.querySelectorAll('body *')) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        const typed = element.matches('input:not([type=radio]):not([type=checkbox]), textarea') && element.value;
        if (!(own || typed) || !element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
        if (element.matches(':disabled') || element.closest('.sr, .jump')) continue;
        const behind = [];
        for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
        const [a, b] = [light(over(['white', ...behind])), light(over(['white', ...behind, getComputedStyle(element).color]))];
        found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.id || element.className || element.tagName]);
    }
    return found;
}"""


def judged_half(person: Person, task: Task) -> None:
    typed = {"rank": ["A", "B", "="], "compare": ["A"], "rate": ["A", "6", "T", "Enter"], "write": []}
    person.press(*typed[task])


@pytest.mark.parametrize("task", TASKS)
def test_light_dark_and_large(tmp_path: Path, browser: Browser, task: Task) -> None:
    """Every text stands out against its ground (4.5 to 1, WCAG AA), and at 400 % nothing is cut off or scrolls sideways."""
    store = new_store(tmp_path / "f.db", task, 2, guidelines="Right before kind.", overlap=2)
    with serving(store) as served:
        context = browser.new_context(viewport={"width": 1280, "height": 1024}, reduced_motion="reduce")
        person = Person(context).begin(served.address)
        person.at_item(1)
        judged_half(person, task)
        page = person.page
        for colours in ("light", "dark"):
            page.emulate_media(color_scheme=colours)  # type: ignore[arg-type]
            for dialog in (None, "#help", "#skip"):
                if dialog is not None:
                    page.click("#help-open" if dialog == "#help" else "#skip-open")
                measured = page.evaluate(CONTRASTS)
                assert len(measured) > 10
                weak = [(round(ratio, 2), where) for ratio, where in measured if ratio < 4.5]
                assert weak == [], (colours, dialog)
                person.press(*(["Escape"] if dialog else []))
        page.evaluate("document.querySelector('#status').style.color = 'gray'")  # Control
        page.evaluate("document.querySelector('#status').textContent = 'pale'")
        assert any(ratio < 4.5 for ratio, _ in page.evaluate(CONTRASTS))

        page.set_viewport_size({"width": 320, "height": 256})  # 1280 by 1024 at 400 %
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) == 320
        for control in ("#submit", "#skip-open", "#undo", "#comment"):
            page.locator(control).scroll_into_view_if_needed()
            box = page.locator(control).bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 320, control
        page.evaluate("document.querySelector('#work').style.width = '400px'")  # Control
        assert page.evaluate(wide) > 320
        context.close()


@pytest.mark.parametrize("task", TASKS)
def test_everything_has_a_name_and_the_focus_is_seen(tmp_path: Path, context: BrowserContext, task: Task) -> None:
    """What a screen reader is told: a role and a name for each control; Tab reaches them all and shows where it is."""
    store = new_store(tmp_path / "f.db", task, 1, guidelines="Right before kind.")
    with serving(store) as served:
        person = Person(context).begin(served.address)
        person.at_item(1)
        page = person.page
        told = page.locator("body").aria_snapshot()
        expected = {
            "rank": [
                'heading "Item 1 Put the answers in order, best first"',
                'group "Answer A: no place"',
                'button "Move up A"',
            ],
            "compare": ['radiogroup "Which is better"', 'radio "A is better A"', 'group "Answer B"'],
            "rate": ['radiogroup "Score of A, 1 poor to 7 excellent"', 'group "Flags of A"', 'checkbox "Hallucination R"'],
            "write": ['textbox "Your answer"'],
        }[task]
        for line in (*expected, "- banner", "- main", "- status", 'progressbar "Share of the items that are done"'):
            assert line in told, told
        nameless = page.locator("button:visible, input:visible, textarea:visible").evaluate_all(
            """all => all.filter(
                each => !(each.textContent.trim() || each.ariaLabel || each.labels?.length)
            ).map(each => each.outerHTML)"""
        )
        assert nameless == []
        reached = set()
        for _ in range(60):
            person.press("Tab")
            seen = page.evaluate(
                """() => { const at = document.activeElement, style = getComputedStyle(at);
                const label = at.matches('input') ? getComputedStyle(at.closest('label') ?? at) : style;
                const beside = at.nextElementSibling ? getComputedStyle(at.nextElementSibling) : style;
                const shown = [style, label, beside].some(each => each.outlineStyle !== 'none' && each.outlineWidth !== '0px');
                return [at.id, at === document.body || shown, at.outerHTML.slice(0, 120)]; }"""
            )
            assert seen[1], seen
            reached.add(seen[0])
        assert {"submit", "skip-open", "comment", "help-open", "guidelines-toggle", "who"} <= reached
