"""Takes the pictures of the pages for the docs: every task half-way, one of them dark, and a talk with two models.

python tools/label_pictures.py [FOLDER [MODEL MODEL]]

FOLDER: docs/images. Without models no talk. Needs Chromium and pip install '.[test]'.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
LIMIT = 120_000  # bytes of a picture

GUIDELINES = """\
Read the prompt first, then every answer to its end.

What is true comes before what is well said. An answer that is wrong in something that matters is worse than one that is clumsy.

Of two that are right, prefer the one that the person who asked can use: short enough, in their words, nothing left out.

If you cannot tell two apart, tie them. If you do not know enough to judge, skip.
"""

SKY = "Why is the sky blue? Please explain it so that a six-year-old understands it."
ANSWERS = [
    "Sunlight looks white, but all the colours of the rainbow are in it. When it comes through the air, the air bounces the "
    "blue around much more than the red. So blue light comes to your eyes from everywhere up there, and the sky looks blue.",
    "The sky is blue because it mirrors the sea. Where there is no sea, it is less blue.",
    "Rayleigh scattering: the scattering cross-section of molecules much smaller than the wavelength goes with the inverse "
    "fourth power of the wavelength, so short wavelengths dominate the diffuse light of the sky.",
    "Imagine a bag of marbles, red ones that are heavy and blue ones that are light. You roll them through a forest. The red "
    "ones go straight on, and the blue ones bounce off the trees in all directions. Light does that in the air.",
]


def rows(task: str) -> list[dict[str, Any]]:
    """Rows for `--responses` (or, for write, the same with one answer): the shown one, and others behind it."""
    count = {"rank": 4, "compare": 2, "rate": 3, "write": 1}[task]
    chosen = [ANSWERS[2]] if task == "write" else ANSWERS[:count]
    prompt = [{"role": "user", "content": SKY}]
    first = {"prompt": prompt, "responses": [[{"role": "assistant", "content": text}] for text in chosen]}
    others = [{**first, "prompt": [{"role": "user", "content": f"{SKY} ({number})"}]} for number in range(1, 24)]
    return [*others[:8], first, *others[8:]]


def label_command(task: str, folder: Path) -> list[str]:
    """`tutelage label` on the rows of a task."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(task)))
    (folder / "guidelines.txt").write_text(GUIDELINES)
    options = {"task": task, "responses": "rows.jsonl", "out": "feedback.db", "guidelines": "guidelines.txt", "overlap": "2"}
    command = ["label", "--title", "Answers for children"]
    for name, value in options.items():
        command += [f"--{name}", value]
    return command


@contextmanager
def serving(command: list[str], folder: Path) -> Iterator[str]:
    """A command that serves a page; its address."""
    command = [sys.executable, "-m", "tutelage", *command, "--no-browser"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.send_signal(signal.SIGINT)


def best_first(page: Page) -> list[str]:
    """The letters of the answers on the screen, the ones that a child can use first."""
    texts = {letter: page.locator(f".lettered:has(.letter:text-is('{letter}')) .text") for letter in "ABCD"}
    quality = [ANSWERS[0], ANSWERS[3], ANSWERS[2], ANSWERS[1]]
    return sorted((letter for letter in texts if texts[letter].count()), key=lambda at: quality.index(texts[at].inner_text()))


def keys(page: Page, task: str, number: int) -> list[str]:
    """What a person types about an item."""
    letters = [] if task == "write" else best_first(page)
    if number % 3 == 0:  # people differ now and then
        letters = letters[1::-1] + letters[2:]
    scores = [key for letter in letters for key in (letter, str(6 - 2 * letters.index(letter)))]
    return {"rank": letters, "compare": letters[:1], "rate": scores, "write": []}[task]


def take(browser: Browser, task: str, address: str, folder: Path) -> Iterator[Path]:
    """The pictures of one task."""
    context = browser.new_context(viewport={"width": 1240, "height": 780}, reduced_motion="reduce", color_scheme="light")
    page = context.new_page()
    page.goto(address)
    for person in range(2):  # so that there is an agreement to show
        page.fill("#name", f"Labeller {person + 1}")
        page.keyboard.press("Enter")
        for number in range(8):
            page.locator(f"#item-number:text-is('Item {number + 1}')").wait_for()
            for pressed in (*keys(page, task, number + person), "Control+Enter"):
                page.keyboard.press(pressed)
        page.locator("#item-number:text-is('Item 9')").wait_for()
        if person == 0:
            page.click("#who")
    if task == "write":
        page.fill("#written", ANSWERS[0])
    else:
        letters = best_first(page)
        first, second, *rest = letters
        flagged = [first, "6", "T", "Enter", letters[-1], "2", "Q", "R"]
        typed = {"rank": [first, second, "=", *rest[:1]], "compare": [first], "rate": flagged}
        for pressed in typed[task]:
            page.keyboard.press(pressed)
    page.mouse.move(0, 400)
    for name, colours in ((task, "light"), ("dark", "dark")) if task == "rank" else ((task, "light"),):
        page.emulate_media(color_scheme=colours, reduced_motion="reduce")  # type: ignore[arg-type]
        path = folder / f"label-{name}.png"
        yield shot(page, path)
    context.close()


def take_play(browser: Browser, address: str, folder: Path) -> Path:
    """The picture of a talk: one message judged, one to judge."""
    context = browser.new_context(viewport={"width": 1240, "height": 780}, reduced_motion="reduce", color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.locator("body[data-view=ready]").wait_for()
    for said, pressed in (("What do you think of the film about the two brothers?", "A"), ("Would you watch it again?", "")):
        page.keyboard.type(said)
        page.keyboard.press("Enter")
        page.locator("body[data-view=choosing]").wait_for()
        if pressed:
            page.keyboard.press(pressed)
            page.locator("body[data-view=ready]").wait_for()
    path = shot(page, folder / "play.png")
    context.close()
    return path


def shot(page: Page, path: Path) -> Path:
    """What is on the screen."""
    page.screenshot(path=path)
    # 128 colours are all that a page of text needs, at a third of the size
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    large = 0
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking", "--font-render-hinting=none"]
        )
        paths = []
        for task in ("rank", "compare", "rate", "write"):
            own = Path(scratch) / task
            own.mkdir()
            with serving(label_command(task, own), own) as address:
                paths += take(browser, task, address, folder)
        if sys.argv[2:]:
            models = [str(Path(name).resolve()) for name in sys.argv[2:]]
            for name, model in zip(("before", "after"), models, strict=True):  # short names to show
                (Path(scratch) / name).symlink_to(model)
            command = ["play", "before", "after", "--max_new_tokens", "70", "--temperature", "0.7"]
            with serving(command, Path(scratch)) as address:
                paths.append(take_play(browser, address, folder))
        for path in paths:
            size = path.stat().st_size
            large += size > LIMIT
            print(f"{path}: {size:,} bytes")
        browser.close()
    return 1 if large else 0


if __name__ == "__main__":
    raise SystemExit(main())
