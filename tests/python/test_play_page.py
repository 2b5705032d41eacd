"""The page to talk at, in Chromium: a whole session by keyboard, reloaded, stopped, without a server; hostile texts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext

from browser_for_tests import Person, chrome
from hostile_texts import HOSTILE
from labelling_for_tests import Json
from test_play import NAMES, playing, turns, two_models
from tutelage.feedback.store import Store
from tutelage.feedback.table import Turn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return two_models(tmp_path_factory, 256)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chrome() as found:
        yield found


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    found = browser.new_context(viewport={"width": 1240, "height": 780}, reduced_motion="reduce")
    yield found
    found.close()


def enter(context: BrowserContext, served: Any) -> Person:
    """Comes to the page; a test's `Page` has used the first address."""
    person = Person(context)
    person.page.goto(served.address.replace("the-token", "another-token"))
    person.page.locator("body[data-view]").wait_for()
    return person


def view(person: Person, name: str) -> None:
    person.page.locator(f"body[data-view={name}]").wait_for()


def ask(person: Person, text: str) -> dict[str, str]:
    """Sends a message by keyboard; the two answers."""
    person.type(text)
    person.press("Enter")
    view(person, "choosing")
    cards = person.page.locator("#talk > li:last-child .card")
    return dict(
        cards.evaluate_all("cards => cards.map(card => [card.dataset.letter, card.querySelector('.text').textContent])")
    )


def answers(store: Store, item: int) -> dict[str, str]:
    """What is kept, by the letter under which it was shown."""
    order, responses = store.state.order("Ann", item), store.state.items[item].responses
    assert order is not None and responses is not None
    return {"AB"[at]: str(responses[place][0]["content"]) for at, place in enumerate(order)}  # type: ignore[index]


def choices(store: Store) -> list[Any]:
    return [event.body["choice"] for event in store.state.answers()]


def test_a_whole_session_by_keyboard_alone(tmp_path: Path, context: BrowserContext, folders: list[str]) -> None:
    with playing(tmp_path / "f.db", folders, title="Two of them", system="be <b>kind</b>") as (_, store, served):
        person = enter(context, served)
        page = person.page
        assert page.title() == "Two of them" and page.locator("#empty").is_visible()
        assert page.locator("[data-role=system] .text").inner_text() == "be <b>kind</b>"
        assert person.focused() == "message"

        shown = ask(person, "hello")
        assert shown == answers(store, 0) and person.focused() == "choices"
        person.status("Which is better?")
        person.press("B")
        view(person, "ready")
        person.status("Stored.")
        order = store.state.order("Ann", 0)
        assert order is not None and choices(store) == [order[1]] and person.focused() == "message"
        assert page.locator(".turn-foot").inner_text().startswith("You found B better.")
        assert NAMES[order[1]] in page.locator(".card.chosen").inner_text()

        person.press("Escape", "U")  # taken back, and judged anew
        view(person, "choosing")
        assert choices(store) == []
        person.press("ArrowLeft")
        view(person, "ready")
        assert choices(store) == [order[0]]

        shown = ask(person, "more")  # goes on with A
        system = {"role": "system", "content": "be <b>kind</b>"}
        assert store.state.items[1].prompt == (system, *turns("hello", answers(store, 0)["A"], "more"))
        person.press("T")
        view(person, "ready")
        ask(person, "again")
        person.press("X")
        view(person, "ready")
        ask(person, "unjudged")
        person.press("0")
        view(person, "ready")
        person.status("Not judged.")
        assert choices(store) == [order[0], "tie", "both_bad"]
        counts = page.locator("#counts > *").all_inner_texts()
        better = NAMES[order[0]]
        assert counts == ["3 judged", *(f"{name} {int(name == better)}" for name in NAMES), "neither 2"]

        person.press("Escape", "N")
        person.status("A new conversation.")
        assert page.locator("#talk > li").count() == 1  # the system's
        ask(person, "anew")
        assert store.state.items[4].prompt == (system, *turns("anew"))
        first, last = (store.state.items[number].columns["conversation"] for number in (0, 4))
        assert first != last
        person.press("?")
        page.locator("#help").wait_for()
        person.press("Escape")
        page.locator("#help").wait_for(state="hidden")
        assert person.complaints == []
        assert all(url.startswith(f"http://127.0.0.1:{served.port}/") for url in person.asked)


def test_single_keys_can_be_switched_off(tmp_path: Path, context: BrowserContext, folders: list[str]) -> None:
    with playing(tmp_path / "f.db", folders) as (_, store, served):
        person = enter(context, served)
        ask(person, "hello")
        person.press("?")
        person.page.locator("#help-single").uncheck()
        person.press("Escape", "A", "T", "N")
        view(person, "choosing")
        assert choices(store) == []
        person.page.get_by_role("button", name="A is better").click()
        view(person, "ready")
        assert len(choices(store)) == 1 and person.complaints == []


def test_a_reload_loses_nothing(tmp_path: Path, context: BrowserContext, folders: list[str]) -> None:
    """While choosing, while typing, and while answers come: then the message is what it was."""
    with playing(tmp_path / "f.db", folders) as (_, store, served):
        person = enter(context, served)
        shown = ask(person, "hello")
        person.page.reload()
        view(person, "choosing")
        cards = person.page.locator(".card .text").all_text_contents()
        assert cards == [shown["A"], shown["B"]]
        person.press("A")
        view(person, "ready")
        person.type("half a mess")
        person.page.reload()
        view(person, "ready")
        assert person.page.input_value("#message") == "half a mess"
        assert ask(person, "age") == answers(store, 1)
        assert store.state.items[1].prompt == tuple(turns("hello", shown["A"], "half a message"))
        assert person.complaints == []


def test_answers_are_shown_as_they_come_and_can_be_stopped(
    tmp_path: Path, context: BrowserContext, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, lines = Turn.step, 0

    def slow(self: Turn) -> Any:
        nonlocal lines
        time.sleep(0.1)
        lines += 1
        return step(self)

    monkeypatch.setattr(Turn, "step", slow)
    with playing(tmp_path / "f.db", folders, settings={"max_new_tokens": 60}) as (_, store, served):
        person = enter(context, served)
        person.type("hello")
        person.press("Enter")
        person.page.locator(".card .text:not(:empty)").first.wait_for()
        assert lines < 30 and person.page.locator("#stop").is_visible() and not person.page.locator("#choices").count()
        person.press("Escape")
        view(person, "ready")
        person.status("Stopped; your message is back.")
        assert person.page.input_value("#message") == "hello" and not store.state.items
        assert person.page.locator("#talk > li").count() == 0
        time.sleep(0.5)
        before = lines
        time.sleep(0.5)
        assert lines == before, "the models go on answering nobody"
        assert person.complaints == []


def test_a_server_that_went_away(tmp_path: Path, context: BrowserContext, folders: list[str]) -> None:
    """A message is put back; a judgement is sent until it is confirmed, once."""
    with playing(tmp_path / "f.db", folders) as (_, store, served):
        person = enter(context, served)
        context.route("**/api/say", lambda route: route.abort())
        person.type("hello")
        person.press("Enter")
        person.status("The server does not answer. Your message is back.")
        assert person.page.input_value("#message") == "hello"
        context.unroute("**/api/say")
        person.press("Enter")
        view(person, "choosing")
        lost: list[Any] = []

        def lose_the_answer(route: Any) -> None:
            if not lost:
                lost.append(route.fetch())  # it reached the server; what it said does not reach the page
                route.abort()
            else:
                route.continue_()

        context.route("**/api/judge", lose_the_answer)
        person.press("A")
        view(person, "ready")
        assert len(lost) == 1 and len(choices(store)) == 1
        context.unroute("**/api/judge")
        assert all("ERR_FAILED" in complaint for complaint in person.complaints)


def test_what_the_server_refuses_is_told(tmp_path: Path, context: BrowserContext, folders: list[str]) -> None:
    with playing(tmp_path / "f.db", folders) as (_, store, served):
        person = enter(context, served)
        person.press("Enter")
        person.status("Type a message first.")
        person.type("z" * 300)
        person.press("Enter")
        person.status("reads at most 256, its answer included")
        assert person.page.input_value("#message") == "z" * 300 and not store.state.items
        person.press("Control+A")
        ask(person, "hello")
        person.page.locator("#message").focus()
        person.type("early")
        person.press("Enter")
        person.status("Say first which answer is better, or press 0 for no judgement.")
        assert len(store.state.items) == 1


def test_hostile_texts_are_text(
    tmp_path: Path, context: BrowserContext, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As message, answer and name of a model."""
    hostile = [text for text in HOSTILE if "\0" not in text and text.strip()]
    said = iter(hostile)
    step = Turn.step

    def spoken(self: Turn) -> list[Any] | None:
        if self._ended or self._engaged:
            return step(self)
        text = next(said)
        told = step(self)
        for growing in self._texts:
            monkeypatch.setattr(growing, "text", lambda whole=False: text)
        return [{"id": "A", "text": text}, {"id": "B", "text": text}, *(told or [])]

    monkeypatch.setattr(Turn, "step", spoken)
    monkeypatch.setattr("test_play.NAMES", (hostile[0], hostile[1]))
    with playing(tmp_path / "f.db", folders, settings={"max_new_tokens": 1}) as (_, store, served):
        person = enter(context, served)
        page = person.page
        elements = "document.querySelectorAll('#talk :is(script, img, iframe, svg, a, style, form, input)').length"
        for number, text in enumerate(hostile[:40]):
            page.locator("#message").fill(text)
            page.locator("#send").click()
            view(person, "choosing")
            assert (
                page.locator("#talk > li:last-child .said .text").evaluate("e => e.textContent")
                == store.state.items[number].prompt[-1]["content"]
            )  # type: ignore[index]
            assert page.locator("#talk > li:last-child .card .text").first.evaluate("e => e.textContent") == text
            person.press("A")
            view(person, "ready")
            person.press("Escape", "N")
        assert page.evaluate(elements) == 0 and person.complaints == []


@pytest.mark.parametrize("size", [(320, 256), (1280, 1024), (375, 812)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(tmp_path: Path, browser: Browser, folders: list[str], size: tuple[int, int], scheme: Any) -> None:
    """1280 by 1024 at 400 % is 320 by 256; a telephone; light and dark."""
    found = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    with playing(tmp_path / "f.db", folders) as (_, _, served):
        person = enter(found, served)
        ask(person, "hello")
        wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert person.page.evaluate(wider) <= 0
        person.page.get_by_role("button", name="A is better").click()
        view(person, "ready")
        assert person.page.evaluate(wider) <= 0 and person.complaints == []
    found.close()


def test_every_control_has_a_name(tmp_path: Path, context: BrowserContext, folders: list[str]) -> None:
    with playing(tmp_path / "f.db", folders) as (_, _, served):
        person = enter(context, served)
        ask(person, "hello")
        page = person.page
        for name in ("A is better", "Tie", "Both are bad", "B is better", "No judgement", "New conversation", "Keys"):
            assert page.get_by_role("button", name=name).count() == 1
        assert page.get_by_role("textbox", name="Your message").count() == 1
        assert page.get_by_role("group", name="Which is better?").count() == 1
        assert page.get_by_role("group", name="Answer A").count() == 1
        assert page.get_by_role("list", name="Conversation").count() == 1
        assert page.get_by_role("status").count() == 1


def test_two_tabs_have_a_conversation_each(tmp_path: Path, context: BrowserContext, folders: list[str]) -> None:
    with playing(tmp_path / "f.db", folders) as (_, store, served):
        one = enter(context, served)
        two = Person(context)
        two.page.goto(f"http://127.0.0.1:{served.port}/")
        two.page.locator("body[data-view]").wait_for()
        ask(one, "first")
        ask(two, "second")
        one.page.bring_to_front()
        one.press("A")
        view(one, "ready")
        two.page.bring_to_front()
        two.press("B")
        view(two, "ready")
        assert [item.prompt for item in store.state.items.values()] == [tuple(turns("first")), tuple(turns("second"))]
        names: list[Json] = [item.columns for item in store.state.items.values()]  # type: ignore[misc]
        assert names[0]["conversation"] != names[1]["conversation"] and len(choices(store)) == 2
        one.page.bring_to_front()
        one.press("Escape", "U")
        one.status("Something else was judged since then")
        assert len(choices(store)) == 2 and json.dumps(one.complaints).count("409") == len(one.complaints)
