"""The seam to torch.distributed: what ranks tell each other. No other file knows of process groups.

`torchrun --nproc-per-node N -m tutelage …` starts N processes; each joins here and gets a `Ranks`. A program that was started
alone gets one too, whose every operation is nothing at all: one rank costs nothing and changes no bit.

All operations are made of messages between two ranks (gloo's or NCCL's send and receive), for three reasons. A sum has an
order that is ours: of what the ranks hold, along the tree of `dealing.fold`; gloo's own sums have an order for each number of
ranks and each release. Every wait is for one rank, so that one can be named when it dies or hangs. And what is sent can be
counted. There is only the sum, and who wants a mean divides before: gloo has no mean.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from tutelage.dealing import fold
from tutelage.devices import find

TIMEOUT = 600.0
"""Seconds that a rank waits for another. Longer than the longest that one does what the others wait for: a save, a corpus."""

_GRACE = 1.0
"""Seconds in which a rank that stopped by itself, or lost another, has said so."""

_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
_NAMES = {str(dtype): dtype for dtype in _DTYPES}


class RankError(ConnectionError):
    """Another rank died, hangs or stopped; the message names it."""


class Ranks:
    """This process among the others. This class is for a process alone: nothing is sent and nothing is copied."""

    rank = 0
    count = 1
    """Of all ranks."""

    def __init__(self) -> None:
        self.starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        """How often torchrun has started the ranks again, after one of them had failed."""
        self.sent: Counter[str] = Counter()
        """Bytes that this rank has sent to others, by operation."""

    @property
    def leads(self) -> bool:
        """True of one rank: it does what must be done once."""
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """What every rank gave, a JSON value, in the order of the ranks."""
        return [value]

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """The vectors of all ranks, one after the other in the order of the ranks; of a rank there may be none."""
        return torch.cat(list(parts))

    def broadcast(self, flat: Tensor) -> None:
        """Overwrites `flat` with what the leading rank has in it."""

    def reduce_scatter(self, flat: Tensor, pieces: Sequence[range], present: Sequence[bool]) -> Callable[[], Tensor]:
        """Starts the sum of all ranks' `flat`; of it a rank gets its own piece, from the function that is returned.

        pieces: a part of `flat` for each rank. present: which ranks have something to add; what the others hold counts as
        nothing. `flat` must stay as it is until the function has been called.
        """
        own = flat[pieces[0].start : pieces[0].stop]
        return lambda: own

    def all_gather(self, flat: Tensor, pieces: Sequence[range]) -> None:
        """Fills `flat` with every rank's own piece of it."""

    def all_reduce(self, flat: Tensor) -> None:
        """Overwrites `flat` with the sum of all ranks' `flat`."""
        pieces = even(flat.numel(), self.count)
        own = self.reduce_scatter(flat, pieces, [True] * self.count)()
        mine = pieces[self.rank]
        flat[mine.start : mine.stop] = own
        self.all_gather(flat, pieces)

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        self.exchange(None)


def even(size: int, count: int) -> list[range]:
    """0 … size − 1 in `count` parts as nearly of one size."""
    return [range(size * rank // count, size * (rank + 1) // count) for rank in range(count)]


class _Group(Ranks):
    """Several ranks, over a process group of torch."""

    def __init__(self, rank: int, count: int, timeout: float, device: torch.device) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        super().__init__()
        self.rank, self.count = rank, count
        self._dist, self._timeout, self._device = dist, timeout, device
        self._operations = 0
        if dist.is_initialized():
            raise RankError("this process is in a process group already: leave it, tutelage makes its own")
        limit = timedelta(seconds=timeout)
        if device.type == "cuda":
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a wait ends after the time-out, with an error
        try:
            met, _, _ = next(rendezvous("env://", timeout=limit))
            # torchrun's store outlives the ranks: those that it starts again must not find the addresses of those that died.
            self._store = dist.PrefixStore(f"start {self.starts}", met)  # type: ignore[attr-defined]
            self._store.set(f"here/{rank}", "")
            backend = "gloo" if device.type == "cpu" else "nccl"
            dist.init_process_group(backend, store=self._store, rank=rank, world_size=count, timeout=limit)
            self.barrier()  # connections are made
        except (RuntimeError, TimeoutError) as error:
            raise RankError(
                f"rank {rank} of {count} waited {timeout:g} s, and {self._missing()} did not come: {error}"
            ) from error

    def _missing(self) -> str:
        with suppress(RuntimeError, AttributeError):
            absent = [str(other) for other in range(self.count) if not self._store.check([f"here/{other}"])]
            return f"rank {', '.join(absent)}" if absent else "another rank"
        return "rank 0, where the ranks meet,"

    # ---- what is sent

    def exchange(self, value: Any) -> list[Any]:
        own = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        sizes[self.rank][0] = len(own)
        self._everywhere("exchange", sizes[self.rank], sizes)
        texts = [torch.empty(int(size), dtype=torch.uint8) for size in sizes]
        texts[self.rank] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        self._everywhere("exchange", texts[self.rank], texts)
        return [json.loads(bytes(text.numpy())) for text in texts]

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        own = torch.cat(list(parts)) if parts else None
        told = None if own is None else [own.numel(), str(own.dtype)]
        whole = self.exchange(told)
        name = next(entry[1] for entry in whole if entry is not None)
        found = [torch.empty(0 if entry is None else entry[0], dtype=_NAMES[name]) for entry in whole]
        if own is not None:
            found[self.rank] = own
        self._everywhere("gather", found[self.rank], found)
        return torch.cat(found)

    def broadcast(self, flat: Tensor) -> None:
        others = [other for other in range(self.count) if other != self.rank]
        if self.leads:
            self._post("broadcast", [(other, flat) for other in others], [])()
        else:
            self._post("broadcast", [], [(0, flat)])()

    def reduce_scatter(self, flat: Tensor, pieces: Sequence[range], present: Sequence[bool]) -> Callable[[], Tensor]:
        mine = pieces[self.rank]
        found: list[Tensor | None] = [
            torch.empty(len(mine), dtype=flat.dtype, device=flat.device) if there else None for there in present
        ]
        incoming = [(other, part) for other, part in enumerate(found) if part is not None and other != self.rank]
        outgoing = [(other, flat[piece.start : piece.stop]) for other, piece in enumerate(pieces) if other != self.rank]
        arrived = self._post("reduce_scatter", outgoing if present[self.rank] else [], incoming)

        def finish() -> Tensor:
            arrived()
            own = found[self.rank]
            if own is not None:
                own.copy_(flat[mine.start : mine.stop])
            total = fold(found, lambda left, right: left.add_(right))
            return flat.new_zeros(len(mine)) if total is None else total

        return finish

    def all_gather(self, flat: Tensor, pieces: Sequence[range]) -> None:
        parts = [flat[piece.start : piece.stop] for piece in pieces]
        self._everywhere("all_gather", parts[self.rank], parts)

    def _everywhere(self, what: str, own: Tensor, parts: Sequence[Tensor]) -> None:
        """Sends `own` to all others and receives theirs into `parts`."""
        others = [other for other in range(self.count) if other != self.rank]
        self._post(what, [(other, own) for other in others], [(other, parts[other]) for other in others])()

    def _post(
        self, what: str, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """Starts sending and receiving; the function that is returned waits for the end of both. Empty tensors are left out."""
        dist, self._operations = self._dist, self._operations + 1
        number = self._operations
        messages = []
        for function, pairs in ((dist.irecv, incoming), (dist.isend, outgoing)):
            messages += [(other, function, tensor) for other, tensor in pairs if tensor.numel()]
        self.sent[what] += sum(tensor.numel() * tensor.element_size() for _, tensor in outgoing)
        landing = []  # of what travels by another memory
        operations = []
        for other, function, tensor in messages:
            travelling = tensor if tensor.device == self._device else tensor.to(self._device)
            if travelling is not tensor and function is dist.irecv:
                landing.append((tensor, travelling))
            operations.append(dist.P2POp(function, travelling.view(torch.uint8), other, tag=number))
        begun = time.monotonic()
        with self._naming(None, what, number, begun):
            self._store.set(f"at/{self.rank}", str(number))
            works = dist.batch_isend_irecv(operations) if operations else []
        peers: list[int | None] = [other for other, _, _ in messages] if len(works) == len(messages) else [None] * len(works)

        def finish() -> None:
            waiting = time.monotonic()
            for peer, work in zip(peers, works, strict=True):
                with self._naming(peer, what, number, waiting):
                    work.wait()
            for tensor, travelling in landing:
                tensor.copy_(travelling)

        return finish

    # ---- who is missing

    @contextmanager
    def _naming(self, peer: int | None, what: str, number: int, begun: float) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's, of every kind
            waited = time.monotonic() - begun
            how = "hangs" if waited > 0.9 * self._timeout else "died"
            culprit, told = self._find(peer, number, how)
            seconds = f": nothing came from it in {self._timeout:g} s (rank_timeout)" if told == "hangs" else ""
            who = "another rank" if culprit is None else f"rank {culprit}"
            raise RankError(
                f"{who} {told}{seconds}, so rank {self.rank} stops too, in operation {number}, {what}. "
                "torchrun --max-restarts starts all ranks again, and they go on from the newest checkpoint"
            ) from error

    def report(self, error: BaseException) -> None:
        """Tells the others why this rank stops, for them to name it."""
        if not isinstance(error, RankError):
            reason = f"stopped ({' '.join((str(error) or type(error).__name__).split())})"
            with suppress(RuntimeError):
                self._store.set(f"stopped/{self.rank}", json.dumps({"how": reason}))

    def _find(self, peer: int | None, number: int, how: str) -> tuple[int | None, str]:
        """(the rank that began it, what became of it), when nothing comes from `peer`: which may only have lost another."""
        with suppress(RuntimeError):
            self._store.set(f"stopped/{self.rank}", json.dumps({"lost": peer, "how": how}))
            deadline = time.monotonic() + _GRACE
            seen = {self.rank}
            while True:
                told = {
                    other: json.loads(self._store.get(f"stopped/{other}"))
                    for other in range(self.count)
                    if self._store.check([f"stopped/{other}"])
                }
                by_itself = [other for other in told if "lost" not in told[other]]
                if by_itself:
                    return by_itself[0], told[by_itself[0]]["how"]
                if peer in told and told[peer]["lost"] is not None and peer not in seen:
                    seen.add(peer)
                    peer, how = told[peer]["lost"], told[peer]["how"]
                elif time.monotonic() < deadline:
                    time.sleep(0.05)
                else:
                    break
            at = {
                other: int(self._store.get(f"at/{other}"))
                for other in range(self.count)
                if other not in told and self._store.check([f"at/{other}"])
            }
            behind = [other for other, place in sorted(at.items(), key=lambda entry: entry[1]) if place < number]
            if behind and peer not in behind:
                peer = behind[0]
            return peer, how
        return 0 if peer is None else peer, "died, and with it the place where the ranks meet" if peer is None else how


def _own_gpu() -> torch.device:
    """Makes a GPU of this machine this rank's. Returns where its messages travel from: the GPU (by NCCL) if every rank here has
    its own, host memory otherwise, since NCCL refuses ranks that share one."""
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
    own = int(os.environ.get("LOCAL_RANK") or os.environ["RANK"]) % gpus
    torch.cuda.set_device(own)
    return torch.device("cuda", own) if here <= gpus else torch.device("cpu")


@contextmanager
def join(timeout: float = TIMEOUT, device: str = "cpu") -> Iterator[Ranks]:
    """This process's `Ranks`, for a `with`, as torchrun's environment says (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; on GPUs
    LOCAL_RANK and LOCAL_WORLD_SIZE too).

    timeout: seconds that a rank waits for another. device: what the models are on, see `devices`; with "cuda" this rank's GPU
    becomes torch's current one, and messages travel by NCCL if each rank has its own.

    Raises:
        RankError: in every operation, naming the rank that died, stopped or did not answer in time.
        ValueError: the environment names several ranks and leaves out how they meet, or the device does not work here.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {count}, but {' and '.join(missing)} is not set: start the ranks with torchrun")
    import torch.distributed as dist

    find(device)
    ranks = _Group(int(os.environ["RANK"]), count, timeout, _own_gpu() if device == "cuda" else torch.device("cpu"))
    try:
        yield ranks
        ranks.barrier()
    except BaseException as error:
        ranks.report(error)
        raise
    finally:
        dist.destroy_process_group()
