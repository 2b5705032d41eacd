"""`tutelage play`: a page to talk with one or two models, and the file that says which of their answers were better."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tutelage import files
from tutelage.feedback.state import Settings
from tutelage.feedback.store import Store, create
from tutelage.feedback.table import Table, tally
from tutelage.feedback.tasks import check_labeller
from tutelage.talker import Talker
from tutelage.train.configs import PlayConfig
from tutelage.train.label import begun
from tutelage.train.serving import place, web

_SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")


def play(config: PlayConfig) -> None:
    """Serves the page until Ctrl-C, which goes on as KeyboardInterrupt.

    Raises ImportError without starlette and uvicorn; ValueError for a model that cannot chat and for a file that is of another
    task; OSError for an address that is taken; RunFolderError for a file that another server holds. None of them leaves a new
    file behind.
    """
    path = Path(config.out)
    console = Console(stderr=True)

    def say(text: str, style: str = "dim") -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    labeller = check_labeller(config.labeller)
    with ExitStack() as stack:
        here = stack.enter_context(place(config.host, config.port, config.allowed_hosts))
        settings = {name: getattr(config, name) for name in _SETTINGS}
        talkers = [Talker(folder, config.system, config.device, config.weights, **settings) for folder in config.models]
        if not path.parent.is_dir():
            files.make_folder(path.parent)
        stack.enter_context(files.lock_file(path))
        if not path.exists():
            source = {**dataclasses.asdict(config), "models": list(config.models)}
            create(path, Settings("compare", 2, seed=config.seed, title=config.title), [], source)
        elif begun(path)[0].task != "compare":
            raise ValueError(
                f"{path} holds judgements of the task {begun(path)[0].task}, not of two answers: give another --out"
            )
        store = Store(path)
        stack.callback(store.close)
        table = Table(store, talkers, config.models, labeller, config.seed, config.reveal, config.title)
        try:
            here.serve(web().play_api(table), config.addresses, config.browser, say, _told(store), lambda: False)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_ended(store, config)) from None


def _told(store: Store) -> str:
    with store.locked() as state:
        return f"{store.path} holds {len(state.answers())} judgements of {len(state.items)} answered messages"


def _ended(store: Store, config: PlayConfig) -> str:
    """What there is now, and who was better."""
    with store.locked() as state:
        found = tally(state, config.models)
    better = "; ".join(f"{name} was better {count} times" for name, count in found.get("better", {}).items())
    return _told(store) + (f"; {better}, neither {found['ties']} times" if better else "")
