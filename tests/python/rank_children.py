"""What the forked children of the tests of several ranks do."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib
import json
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from children import LOOPS, counting
from tutelage import AdamW, Model, ModelConfig, cli, dealing, pack
from tutelage.dealing import Node
from tutelage.distributed import RankError, Ranks, even, join
from tutelage.files import Disk
from tutelage.sharding import Reduction
from tutelage.train import run as running
from tutelage.train.run import ignore


def as_rank(rank: int, count: int, port: int, restart: int, called: str, arguments: dict[str, Any]) -> int:
    """ "module:function" with what torchrun sets for a rank."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT=str(restart),
    )
    torch.set_num_threads(1)
    module, _, name = called.partition(":")
    return int(getattr(importlib.import_module(module), name)(**arguments) or 0)


def own_rank() -> int:
    return int(os.environ["RANK"])


def fail_at(rank: int, phase: str, at: int = 1, how: str = "die") -> Any:
    """A `fault` for one rank: it dies (or hangs, raises, gets Ctrl-C) when it passes the point `phase` the at-th time; not
    when torchrun has started it again."""
    if own_rank() != rank or int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0:
        return ignore
    calls = 0

    def passed(point: str) -> None:
        nonlocal calls
        calls += point == phase
        if point == phase and calls == at:
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "hang":
                time.sleep(3600)
            elif how == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise ValueError(f"told to fail at {phase}")

    return passed


def flats(count: int, size: int, seed: int = 0) -> list[Tensor]:
    """What each rank holds: large and small numbers, whose sum depends on its order."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator) * 10 ** torch.randint(-6, 6, (size,), generator=generator) for _ in range(count)
    ]


def seam(size: int, folder: str) -> None:
    """Every operation once; what came of them is saved."""
    with join(20) as ranks:
        whole = flats(ranks.count, size)
        own = whole[ranks.rank]
        chance = random.Random(size)
        cuts = sorted(chance.randrange(size + 1) for _ in range(ranks.count - 1))
        pieces = [range(a, b) for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
        found: dict[str, Any] = {"exchanged": ranks.exchange({"rank": ranks.rank, "text": "é" * ranks.rank})}
        present = [rank != 1 for rank in range(ranks.count)]
        found["scattered"] = ranks.reduce_scatter(own, pieces, present)().tolist()
        found["unchanged"] = bool(torch.equal(own, flats(ranks.count, size)[ranks.rank]))
        total = own.clone()
        ranks.all_reduce(total)
        found["total"] = total.tolist()
        spread = torch.full((size,), -1.0)
        mine = pieces[ranks.rank]
        spread[mine.start : mine.stop] = own[mine.start : mine.stop]
        ranks.all_gather(spread, pieces)
        found["spread"] = spread.tolist()
        sent = torch.full((size,), float(ranks.rank))
        ranks.broadcast(sent)
        found["sent"] = sent.tolist()
        found["gathered"] = ranks.gather([own[: ranks.rank], own[:1]] if ranks.rank != 1 else []).tolist()
        found["bits"] = ranks.gather([own > 0]).tolist()
        found["pieces"] = [[piece.start, piece.stop] for piece in pieces]
        found["bytes"] = dict(ranks.sent)
        with open(f"{folder}/{ranks.rank}.json", "w") as file:  # noqa: PTH123
            json.dump(found, file)


def lonely(size: int) -> None:
    with join() as ranks:
        assert type(ranks) is Ranks
        own = torch.arange(float(size))
        assert ranks.reduce_scatter(own, even(size, 1), [True])().data_ptr() == own.data_ptr()
        assert ranks.gather([own[:2], own[2:]]).tolist() == own.tolist()
        assert ranks.exchange({"a": 1}) == [{"a": 1}]
        ranks.all_reduce(own)
        ranks.broadcast(own)
        ranks.barrier()
        assert own.tolist() == list(range(size)) and not ranks.sent


def failing(rank: int, how: str, timeout: float, operations: int = 4, at: int = 3) -> int:
    """Ranks that exchange something again and again, until one dies, hangs or raises; the others print what they are told."""
    fault = fail_at(rank, "exchange", at, how)
    try:
        with join(timeout) as ranks:
            flat = torch.ones(50_000)
            for _ in range(operations):
                fault("exchange")
                ranks.all_reduce(flat)
    except RankError as error:
        print(error)
        return 5
    except ValueError as error:
        print(error)
        return 6
    return 0


def late_when_restarted(timeout: float) -> int:
    """Rank 1 dies; when all are started again, rank 0 comes long after rank 1 has looked for it."""
    fault = fail_at(1, "exchange")
    if own_rank() == 0 and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0:
        time.sleep(2)
    try:
        with join(timeout) as ranks:
            fault("exchange")
            ranks.barrier()
    except RankError as error:
        print(error)
        return 5
    return 0


def waiting_for_a_waiter(timeout: float) -> int:
    """Rank 0 hangs; rank 1 waits for it, and rank 2 for rank 1, and is the first to lose patience."""
    try:
        with join(timeout) as ranks:
            flat = torch.ones(10)
            if ranks.rank == 0:
                time.sleep(3600)
            if ranks.rank == 1:
                time.sleep(1)
            ranks.gather([flat])
    except RankError as error:
        print(error)
        return 5
    return 0


def late(timeout: float, absent: int) -> int:
    if own_rank() == absent:
        return 0
    try:
        with join(timeout):
            return 1
    except RankError as error:
        print(error)
        return 5


def failing_disk(at: int) -> Callable[[object], None]:
    """No space is left at the at-th operation, counted from 1."""
    calls = 0

    def before(operation: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return before


def count(folder: Path) -> None:
    """Lets every step write what its rank has sent so far, by our count and by the kernel's, what it would send, and how many
    buckets it has sent before its backward had ended."""
    end_step, finish = running.Run.end_step, Reduction.finish
    steps: list[dict[str, Any]] = []
    early = 0

    def finished(reduction: Reduction) -> None:
        nonlocal early
        early += len(reduction._shard.layout.buckets) - len(reduction._waiting)
        finish(reduction)

    def counted(run: Any, model: Any, optimizer: AdamW, loop: Any) -> None:
        layout, rank = optimizer.layout, run.ranks.rank
        expected = [layout.bytes_summed(rank), layout.bytes_spread(rank)]
        counts = {"sent": dict(run.ranks.sent), "expected": expected, "kernel": kernels_count()}
        steps.append({**counts, "early": early, "buckets": len(layout.buckets)})
        (folder / f"{rank}.json").write_text(json.dumps(steps))
        end_step(run, model, optimizer, loop)

    running.Run.end_step = counted  # type: ignore[method-assign]
    Reduction.finish = finished  # type: ignore[method-assign]


def kernels_count() -> int:
    """Bytes that the kernel has sent for this process's TCP connections."""
    total = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("<Q", info, 200)[0]  # struct tcp_info, tcpi_bytes_sent
    return total


def memory(hidden: int) -> None:
    """Prints what the optimizer of this rank adds to the process, and how many parameters there are."""
    shape = ModelConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4, num_attention_heads=4
    )
    with join(60) as ranks:
        model = Model(shape)
        batch = pack([[1, 2, 3, 4]])
        for _ in range(2):  # all that is allocated but once
            model.zero_grad()
            model.score(batch).logprobs.sum().backward()
        before = resident()
        optimizer = AdamW(model, 1e-3, ranks=ranks, bucket_bytes=1 << 20)
        if ranks.count > 1:
            optimizer.reduction([True] * ranks.count).finish()
        optimizer.step()
        print(resident() - before, model.params.numel())


def resident() -> int:
    """Bytes of this process in memory, without what files and other processes share, and what malloc keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))


def leaning(costs: Sequence[int]) -> Node:
    """A tree of so many leaves that is a chain."""
    node = Node(0, 1)
    for last in range(2, len(costs) + 1):
        node = Node(0, last, (node, Node(last - 1, last)))
    return node


def train(
    loop: str,
    config: dict[str, Any],
    fail: dict[str, Any] | None = None,
    bucket_bytes: int | None = None,
    operation: int = 0,
    of: int = 0,
    full: bool = False,
    counted: str = "",
    lean: bool = False,
) -> int:
    """`tutelage LOOP` as the command line runs it.

    fail: see `fail_at`. operation: of the rank `of`, the disk operation at which it dies, or which fails if `full`.
    bucket_bytes: of every optimizer. counted: a folder for what was sent, see `count`. lean: leaves are added one by one.
    """
    if lean:
        dealing.tree = leaning
    if counted:
        count(Path(counted))
    if bucket_bytes is not None:
        running.AdamW = functools.partial(AdamW, bucket_bytes=bucket_bytes)  # type: ignore[misc,assignment]
    fault = ignore if fail is None else fail_at(**fail)
    at = operation if own_rank() == of else 0
    disk = Disk(failing_disk(at) if full else counting(at, signal.SIGKILL))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    _, function, make = LOOPS[loop]
    return cli.run(loop, lambda: function(make(**values), disk=disk, fault=fault))


if __name__ == "__main__":  # by torchrun
    sys.exit(train(**json.loads(sys.argv[1])))
