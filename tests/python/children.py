"""What the forked children of the training tests do: runs that kill themselves at a chosen point."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from tutelage import cli
from tutelage.data.packing import Cursor
from tutelage.feedback.state import State
from tutelage.feedback.store import Store
from tutelage.files import Disk, Operation
from tutelage.school import course
from tutelage.school.stages import SchoolConfig
from tutelage.train import dpo as preferring
from tutelage.train import grpo as groups
from tutelage.train import ppo as policy
from tutelage.train import pretrain as pretraining
from tutelage.train import reward as reward_modelling
from tutelage.train import sft as fine_tuning
from tutelage.train.configs import (
    DpoConfig,
    GrpoConfig,
    LabelConfig,
    OrpoConfig,
    PlayConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
)
from tutelage.train.label import label
from tutelage.train.play import play

# Of each loop: its module, its function and its config.
LOOPS: dict[str, tuple[Any, Callable[..., object], Callable[..., Any]]] = {
    "pretrain": (pretraining, pretraining.pretrain, PretrainConfig),
    "sft": (fine_tuning, fine_tuning.sft, SftConfig),
    "reward": (reward_modelling, reward_modelling.reward, RewardConfig),
    "dpo": (preferring, preferring.dpo, DpoConfig),
    "orpo": (preferring, preferring.orpo, OrpoConfig),
    "ppo": (policy, policy.ppo, PpoConfig),
    "grpo": (groups, groups.grpo, GrpoConfig),
    "school": (course, course.school, SchoolConfig),
}


def counting(at: int, number: int, name: str = "", times: int = 1) -> Callable[[object], None]:
    """Sends this process the signal `number`, so many times, at the `at`-th call of those with `name` (or of
    all).

    Counted from 1; 0: never.
    """
    calls = 0

    def passed(what: object) -> None:
        nonlocal calls
        calls += not name or what == name
        if calls == at and (not name or what == name):
            for _ in range(times):
                os.kill(os.getpid(), number)

    return passed


def train(
    config: dict[str, Any],
    loop: str = "pretrain",
    point: int = 0,
    operation: int = 0,
    name: str = "",
    threads: int = 1,
    forget_cursor: bool = False,
) -> int:
    """A run that is killed at its point-th named point (of `name`) or operation-th disk
    operation.

    forget_cursor: switches the protection off that the kill tests are about.
    """
    torch.set_num_threads(threads)
    if forget_cursor:
        LOOPS[loop][0].Cursor = _first_cursor
    disk = Disk(counting(operation, signal.SIGKILL))
    LOOPS[loop][1](_config(config, loop), disk=disk, fault=counting(point, signal.SIGKILL, name))
    return 0


def _first_cursor(**saved: int) -> Cursor:
    return Cursor()


def passed(config: dict[str, Any], loop: str = "pretrain") -> int:
    """A whole run; prints how many named points and how many disk operations it passed."""
    torch.set_num_threads(1)
    points: list[str] = []
    operations: list[Operation] = []
    LOOPS[loop][1](_config(config, loop), disk=Disk(operations.append), fault=points.append)
    print(len(points), len(operations))
    return 0


def _config(fields: dict[str, Any], loop: str) -> Any:
    return LOOPS[loop][2](**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def command(
    config: dict[str, Any], loop: str = "pretrain", point: int = 0, name: str = "", number: int = 0, times: int = 1
) -> int:
    """`tutelage LOOP` as the command line runs it, with signals at a named point."""
    torch.set_num_threads(1)
    fault = counting(point, number, name, times)
    return cli.run(loop, lambda: LOOPS[loop][1](_config(config, loop), fault=fault))


def play_page(config: dict[str, Any]) -> int:
    """`tutelage play` as the command line runs it."""
    torch.set_num_threads(1)
    return cli.run("play", lambda: play(PlayConfig(**{**config, "models": tuple(config["models"])})))


def serve(config: dict[str, Any], point: int = 0, name: str = "", without: str = "") -> int:
    """`tutelage label` as the command line runs it, killed at its point-th named point of storing (of `name`).

    without: switches a protection off that the kill tests are about: "commit" (what is confirmed is stored later) or
    "identity" (a submission that was taken is not known again).
    """
    torch.set_num_threads(1)
    if without == "commit":
        whole, waiting = Store.add, list[Any]()

        def later(self: Store, kind: Any, *arguments: Any, **named: Any) -> Any:
            before = self._connection
            waiting.append((kind, arguments, named))
            if len(waiting) % 7 == 0:
                return whole(self, kind, *arguments, **named)
            self._connection = _Nowhere()  # type: ignore[assignment]
            try:
                return whole(self, kind, *arguments, **named)
            finally:
                self._connection = before

        Store.add = later  # type: ignore[method-assign]
    elif without == "identity":
        applied = State.apply

        def forgetting(self: State, event: Any) -> None:
            applied(self, event)
            self.submissions.clear()

        State.apply = forgetting  # type: ignore[method-assign]
    fault = counting(point, signal.SIGKILL, name)
    return cli.run("label", lambda: label(LabelConfig(browser=False, **config), fault=fault))


class _Nowhere:
    """A connection that takes everything and keeps nothing."""

    lastrowid = 1
    in_transaction = False

    def execute(self, *_: Any) -> Any:
        return self
