"""A flat buffer cut into a piece for each rank: who updates which parameters (ZeRO-1, Rajbhandari et al. 2020,
arXiv 1910.02054).

The buffer is cut into buckets, of whole blocks of the model where they are small enough, and each bucket into a piece for
every rank. So the gradient of the last block, which a backward finishes first, travels while it works on the others, and
every rank has something to do for every bucket. Buckets and pieces begin at multiples of CHUNK: where a sum over the buffer is
cut depends neither on the number of ranks nor on the buckets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage import _core
from tutelage.distributed import Ranks

CHUNK = 4096
"""Entries of a partial sum: the engine's own block, see cpp/kernels/total.h."""

BUCKET_BYTES = 16 * 2**20
"""Of the smallest bucket: at 10 Gbit/s 13 ms on its way, so that the latency of its messages is of no account."""

_FLYING = 2
"""Buckets on their way at a time: memory for what comes in is needed for so many."""


@dataclass(frozen=True)
class Layout:
    """How a buffer of `size` entries is cut for `ranks` ranks. buckets: consecutive, all of the buffer. chunk: entries."""

    size: int
    buckets: tuple[range, ...]
    ranks: int
    chunk: int = CHUNK

    def pieces(self, bucket: range) -> list[range]:
        """The part of each rank: as nearly alike as whole chunks allow."""
        chunks = -(-len(bucket) // self.chunk)
        ends = [min(len(bucket), self.chunk * (chunks * rank // self.ranks)) for rank in range(self.ranks + 1)]
        return [range(bucket.start + first, bucket.start + last) for first, last in itertools.pairwise(ends)]

    def of(self, rank: int) -> list[range]:
        """The pieces of a rank, those that are not empty, ascending."""
        return [piece for piece in (self.pieces(bucket)[rank] for bucket in self.buckets) if len(piece)]

    def bytes_summed(self, rank: int, width: int = 4) -> int:
        """That a rank sends to others for one sum of gradients: to each its pieces. width: bytes of an entry."""
        return width * (self.size - sum(map(len, self.of(rank))))

    def bytes_spread(self, rank: int, width: int = 4) -> int:
        """That a rank sends to others after one update: its pieces to each."""
        return width * (self.ranks - 1) * sum(map(len, self.of(rank)))


def buckets(size: int, starts: Sequence[int], least: int) -> tuple[range, ...]:
    """Consecutive ranges of about `least` entries, to twice that, from the last backwards; the first begins at 0 and may be
    smaller. They begin at the first multiple of CHUNK within a block, or within it where a block is larger. starts: of the
    blocks, ascending."""
    found: list[range] = []
    end = size
    for start in reversed(starts):
        begin = CHUNK * -(-start // CHUNK)
        if begin and end - begin >= least:
            found[:0] = _cut(begin, end, least)
            end = begin
    return (*_cut(0, end, least), *found)


def _cut(first: int, last: int, least: int) -> list[range]:
    count, chunks = max(1, (last - first) // max(least, CHUNK)), -(-(last - first) // CHUNK)
    ends = [min(last, first + CHUNK * (chunks * part // count)) for part in range(count + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(ends)]


class Shard:
    """This rank's part of all buffers of one layout: its pieces laid end to end."""

    def __init__(self, layout: Layout, ranks: Ranks, core: Any = _core) -> None:
        """core: the compiled module that computes where the buffers lie."""
        self.layout, self.ranks, self._core = layout, ranks, core
        self.pieces = layout.of(ranks.rank)
        ends = list(itertools.accumulate((len(piece) for piece in self.pieces), initial=0))
        self.places = [range(first, last) for first, last in itertools.pairwise(ends)]
        """Where each piece lies in the shard."""
        self.size = ends[-1]

    def cut(self, flat: Tensor) -> Tensor:
        """A copy of this rank's part of `flat`."""
        return torch.cat([flat[piece.start : piece.stop] for piece in self.pieces] or [flat[:0]])

    def sum_of_squares(self, shard: Tensor) -> float:
        """Of all ranks' parts together: a sum for each chunk, and of those the exactly rounded sum, which has no order. So it
        does not depend on the number of ranks."""
        sums = []
        with torch.no_grad():
            for place in self.places:  # one after the other: no second shard of squares
                part = shard[place.start : place.stop]
                ends = torch.tensor([*range(0, len(place), self.layout.chunk), len(place)], dtype=torch.int32)
                total = torch.empty(len(ends) - 1, dtype=part.dtype, device=part.device)
                self._core.total(part * part, total, cu_seqlens=ends.to(part.device), threads=torch.get_num_threads())
                sums.append(total.cpu())
        return math.fsum(self.ranks.gather(sums).tolist())

    def spread(self, flat: Tensor) -> None:
        """Fills `flat` with what the other ranks have in their parts of it."""
        for bucket in self.layout.buckets:
            self.ranks.all_gather(flat, self.layout.pieces(bucket))

    def place(self, piece: range) -> range:
        """Of a piece of this rank."""
        return self.places[self.pieces.index(piece)]


class Reduction:
    """The sum of all ranks' gradients on its way into this rank's shard, bucket by bucket from the last to the first."""

    def __init__(
        self,
        shard: Shard,
        grads: Callable[[], Tensor],
        settled: Callable[[], Tensor],
        present: Sequence[bool],
        into: Tensor,
        add: bool,
    ) -> None:
        """grads: gives the flat gradient as it is. settled: the same when nothing is missing any more. present: which ranks
        have one. into: the shard of the sum, added to if `add`."""
        self._shard, self._present, self._into, self._add = shard, present, into, add
        self._grads, self._settled = grads, settled
        self._waiting = list(shard.layout.buckets)
        self._finished_from = shard.layout.size
        self._flying: list[tuple[range, Callable[[], Tensor]]] = []
        self.before: list[Tensor] = []
        """Flat gradients that this rank adds to its own before a bucket is sent, the last of them first."""

    def ready(self, offset: int) -> None:
        """From `offset` on the gradient is finished; what is left of it may still be on its way through the backward."""
        if offset > self._finished_from:
            raise RuntimeError(f"the gradient was finished from {self._finished_from} on, and now only from {offset} on")
        self._finished_from = offset
        while self._waiting and self._waiting[-1].start >= offset:
            if len(self._flying) == _FLYING:
                self._land()
            bucket, grads = self._waiting.pop(), self._grads()
            for other in reversed(self.before):
                grads[bucket.start : bucket.stop] += other[bucket.start : bucket.stop]
            pieces = self._shard.layout.pieces(bucket)
            arriving = self._shard.ranks.reduce_scatter(grads, pieces, self._present)
            self._flying.append((pieces[self._shard.ranks.rank], arriving))

    def finish(self) -> None:
        """The gradient is finished: sends the rest and waits for what others send."""
        self._settled()
        self.ready(0)
        while self._flying:
            self._land()

    def _land(self) -> None:
        piece, arriving = self._flying.pop(0)
        total = arriving()
        if len(piece):
            place = self._shard.place(piece)
            own = self._into[place.start : place.stop]
            if self._add:
                own += total
            else:
                own.copy_(total)
