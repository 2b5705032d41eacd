"""Packing: documents cut into pieces, pieces fitted into bins of one context length, bins shuffled.

A document longer than the context is cut into consecutive pieces; all pieces are then packed by best-fit
decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). Nothing is cropped and nothing
is padded. A piece is a sequence of its own to the engine, which lets no token attend to another piece.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tutelage.data.corpus import Corpus


@dataclass(frozen=True)
class Cursor:
    """A place in the training data: the next bin is number `index` of `epoch`."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class PackedEpoch:
    """One epoch's bins. Bin i holds the pieces `pieces[bounds[i]:bounds[i + 1]]`."""

    pieces: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]
    fill: float
    """Tokens in the bins, start tokens included, as a fraction of what they could hold."""

    def __len__(self) -> int:
        return len(self.bounds) - 1


class PackedEpochs:
    """Endless training data: `take(cursor, count)` gives the next `count` bins.

    A bin is a list of pieces, int32 arrays of together at most `context` tokens. A piece is [start token,
    tokens of one document…]; the last piece of a document ends with the end token. The engine predicts all
    but the first token of a piece, so every token of every document is predicted exactly once each time the
    document is seen; a continued document starts fresh with its next piece.

    Everything is a function of (corpus, context, seed, cursor): a resume needs the cursor only. A source of
    weight w has each of its documents seen ⌊w⌋ or ⌈w⌉ times an epoch, and n·w times, give or take one, in n
    epochs.
    """

    def __init__(self, corpus: Corpus, context: int, seed: int = 0) -> None:
        begins, ends, documents = piece_ranges(corpus.lengths, context)
        training = ~corpus.held_out_mask[documents]
        self.context = context
        self.seed = seed
        self._tokens = corpus.tokens
        self._start = np.array([corpus.start_token], np.int32)
        self._begins, self._ends, self._documents = begins[training], ends[training], documents[training]
        self._weight, self._phase = self._schedule(corpus)
        self._last: tuple[int, PackedEpoch] | None = None
        #: Equal means the same bins for equal cursors: what a checkpoint compares before it resumes.
        self.fingerprint = hashlib.sha256(f"{corpus.fingerprint} {context} {seed}".encode()).hexdigest()

    def _schedule(self, corpus: Corpus) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """[D] weight, and [D] phase in [0, 1): when a document is seen, spread evenly over its source."""
        training = ~corpus.held_out_mask
        weight, phase = np.zeros(len(training)), np.zeros(len(training))
        for index, report in enumerate(corpus.documents.sources):
            members = np.flatnonzero(training & (corpus.source_of_document == index))
            order = np.argsort(hashes(f"source {index} {self.seed}", len(members)), kind="stable")
            weight[members] = report.weight
            phase[members[order]] = (np.arange(len(members)) + 0.5) / max(len(members), 1)
        if weight.sum() < 1:
            raise ValueError(f"the weights leave {weight.sum():.3g} documents an epoch: raise them until it is one or more")
        return weight, phase

    def epoch(self, epoch: int) -> PackedEpoch:
        """The bins of one epoch; the last one asked for is kept. A million pieces take about a second."""
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, self._pack(epoch)
        return self._last[1]

    def _pack(self, epoch: int) -> PackedEpoch:
        # A document of weight w comes up whenever epoch·w + phase passes a whole number.
        before, after = epoch * self._weight + self._phase, (epoch + 1) * self._weight + self._phase
        times = np.floor(after) - np.floor(before)
        pieces = np.repeat(np.arange(len(self._begins)), times[self._documents].astype(np.int64))
        lengths = 1 + self._ends[pieces] - self._begins[pieces]
        # Among equal lengths the hash decides, so that every epoch brings other neighbours together.
        order = np.lexsort((hashes(f"pieces {self.seed} {epoch}", len(pieces)), -lengths))
        pieces, lengths = pieces[order], lengths[order]
        bins = best_fit_decreasing(lengths, self.context)
        count = int(bins.max()) + 1 if len(bins) else 0
        place = np.empty(count, np.int64)
        place[np.argsort(hashes(f"bins {self.seed} {epoch}", count), kind="stable")] = np.arange(count)
        by_place = np.argsort(place[bins], kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(place[bins], minlength=count))])
        return PackedEpoch(pieces[by_place], bounds, float(lengths.sum() / max(count * self.context, 1)))

    def take(self, cursor: Cursor, count: int) -> tuple[list[list[npt.NDArray[np.int32]]], Cursor]:
        """The next `count` bins, over the end of an epoch if need be, and the cursor behind them."""
        if count < 1:
            raise ValueError(f"count is {count}: it must be at least 1")
        epoch, index = cursor.epoch, cursor.index
        if epoch < 0 or not 0 <= index <= len(self.epoch(epoch)):
            raise ValueError(f"{cursor} is outside of this data: it belongs to other data or another context length")
        taken: list[list[npt.NDArray[np.int32]]] = []
        while True:
            packed = self.epoch(epoch)
            end = min(index + count - len(taken), len(packed))
            taken += [self._bin(packed, i) for i in range(index, end)]
            epoch, index = (epoch + 1, 0) if end == len(packed) else (epoch, end)
            if len(taken) == count:
                return taken, Cursor(epoch, index)

    def _bin(self, packed: PackedEpoch, index: int) -> list[npt.NDArray[np.int32]]:
        pieces = packed.pieces[packed.bounds[index] : packed.bounds[index + 1]]
        return [np.concatenate([self._start, self._tokens[self._begins[p] : self._ends[p]].astype(np.int32)]) for p in pieces]


def piece_ranges(
    lengths: npt.NDArray[np.int64], context: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut consecutive documents of `lengths` tokens into pieces of at most `context` - 1 tokens.

    Returns (begins, ends, documents), each [P]: piece p is the tokens begins[p]:ends[p] of documents[p]. One
    place in the context is left for the start token.
    """
    if context < 2:
        raise ValueError(f"context is {context}: it must be at least 2, a start token and one to predict")
    counts = -(-lengths // (context - 1))
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    document_ends = np.cumsum(lengths)[documents]
    begins = document_ends - lengths[documents] + number * (context - 1)
    return begins, np.minimum(begins + context - 1, document_ends), documents


def best_fit_decreasing(lengths: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """Bin of each item: always the fullest bin it fits into. `lengths` [P] descend, and lie in 1…capacity."""
    open_bins: list[list[int]] = [[] for _ in range(capacity)]  # open_bins[r]: bins with room for r more
    rooms = 0  # bit r is set while open_bins[r] is not empty, so that the best fit is one bit operation
    bins = np.empty(len(lengths), np.int64)
    count = 0
    for item, length in enumerate(lengths.tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, count
            count += 1
        bins[item] = chosen
        if room > length:
            open_bins[room - length].append(chosen)
            rooms |= 1 << (room - length)
    return bins


def hashes(purpose: str, count: int) -> npt.NDArray[np.uint64]:
    """[count] pseudo-random numbers: SplitMix64 (Steele et al. 2014) from a key that is a hash of `purpose`.

    Our own, because the permutations of numpy's generators may change with its version.
    """
    key = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
