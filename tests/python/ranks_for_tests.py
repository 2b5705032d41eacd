"""Ranks for tests: forked children that meet at a store which outlives each of them, as torchrun's does."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from forked import Child, Forker


@dataclasses.dataclass(frozen=True)
class Ended:
    """What became of a rank: exit status (minus a signal), output, seconds since the start."""

    status: int
    output: str
    seconds: float


@contextmanager
def meeting_place() -> Iterator[int]:
    """The port of a store, for a `with`; one for each start of the ranks."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    yield store.port


def start(children: Forker, function: str, count: int, port: int, restart: int = 0, **arguments: Any) -> list[Child]:
    """Starts "module:function" as so many ranks. restart: how often torchrun would have started them again."""
    return [
        children.start(
            "rank_children:as_rank",
            rank=rank,
            count=count,
            port=port,
            restart=restart,
            called=function,
            arguments=arguments,
        )
        for rank in range(count)
    ]


def run(children: Forker, function: str, count: int, restart: int = 0, **arguments: Any) -> list[Ended]:
    """Starts ranks and waits for the end of all."""
    with meeting_place() as port:
        begun = time.monotonic()
        started = start(children, function, count, port, restart, **arguments)
        ended = []
        for child in started:
            status = child.wait()
            ended.append(Ended(status, child.output.read_text(), time.monotonic() - begun))
        return ended


def outputs(ended: list[Ended]) -> list[str]:
    """What ranks printed that must all have ended well."""
    assert all(rank.status == 0 for rank in ended), "\n".join(rank.output for rank in ended)
    return [rank.output for rank in ended]


def kill(child: Child) -> None:
    """Ends a rank that hangs, as it should."""
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
