"""Progress bars on a terminal; where none is, nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def bar(console: Console, transient: bool = False) -> Progress:
    """How many of all, the bar, what the task says in its field `figures`, the time that is left."""
    return Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )


@contextmanager
def progress(console: Console, what: str, total: int, transient: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar for a `with`; tell what is yielded how much of `total` is done. transient: nothing of it stays."""
    if not console.is_terminal:
        yield lambda done: None
        return
    with bar(console, transient) as shown:
        task = shown.add_task("", total=total, figures=what)
        yield lambda done: shown.update(task, completed=done)
