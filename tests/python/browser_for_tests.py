"""A person at the labelling page: real Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The path of an installed Chromium; fails the test that has none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found, "the labelling page is tested in Chromium, and there is none on this machine: apt-get install chromium"
    return found


@contextmanager
def chrome(*arguments: str) -> Iterator[Browser]:
    """A browser that looks for nothing by itself, for a `with`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-background-networking", *arguments]
        )
        try:
            yield browser
        finally:
            browser.close()


class Person:
    """Somebody at the page; what the browser complained of is in `complaints`, and must be nothing.

    context: a browser's profile; several persons in one share its cookies, as tabs do.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(10_000)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("console", lambda said: said.type == "error" and self.complaints.append(f"console: {said.text}"))
        self.page.on("dialog", self._dialog)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def begin(self, address: str, name: str = "Ann") -> Person:
        """Opens the page and says who is there, by keyboard."""
        self.page.goto(address)
        self.page.locator("#start").wait_for()
        self.type(name)
        self.press("Enter")
        self.page.locator("#start").wait_for(state="hidden")
        return self

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def type(self, text: str) -> None:
        self.page.keyboard.type(text)

    def at_item(self, number: int) -> None:
        """Waits until this item is there."""
        self.page.locator(f"#item-number:text-is('Item {number}')").wait_for()

    def finished(self) -> None:
        self.page.locator("#finished").wait_for()

    def status(self, text: str) -> None:
        """Waits until the status line says this."""
        self.page.locator("#status", has_text=text).wait_for()

    def prompt(self) -> str:
        return self.page.locator("#prompt .text").inner_text()

    def texts(self) -> dict[str, str]:
        """The answers on the screen, by letter."""
        cards = self.page.locator(".lettered")
        pairs = cards.evaluate_all(
            "cards => cards.map(card => [card.querySelector('.letter').textContent, card.querySelector('.text').textContent])"
        )
        return {str(letter): str(text) for letter, text in pairs}

    def letters(self, texts: Sequence[str]) -> list[str]:
        """The letters under which these answers are shown."""
        by_text = {text: letter for letter, text in self.texts().items()}
        return [by_text[text] for text in texts]

    def focused(self) -> str:
        """The id of the focused element, or of the next one around it that has any."""
        return str(self.page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
