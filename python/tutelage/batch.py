"""Packed sequences: what every kernel and every loss works on. No padding anywhere."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage import kernels


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end.

    Attributes:
        tokens: int32 [N], all sequences one after the other.
        cu_seqlens: int32 [S + 1]; sequence s holds tokens cu_seqlens[s] .. cu_seqlens[s + 1].
        completion_mask: bool [N], the tokens that count in losses, ``sum`` and ``mean``.
        logprobs: float32 [N] or None: a rollout's own log-probs, 0 outside the mask.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    completion_mask: Tensor
    logprobs: Tensor | None = None

    def __len__(self) -> int:
        """Number of sequences, S."""
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [int(n) for n in (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).tolist()]

    def _per_token(self, x: Tensor) -> Tensor:
        if x.shape != self.tokens.shape:
            raise ValueError(f"x must have one entry per token, [{self.tokens.numel()}], but it is {list(x.shape)}")
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Sum of ``x`` [N] over the masked tokens of each sequence: [S]. The engine's one fixed order; differentiable."""
        return kernels.total(self._per_token(x), self.completion_mask, self.cu_seqlens)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of ``x`` [N] over the masked tokens of each sequence: [S].

        Raises:
            ValueError: naming the first sequence without a masked token.
        """
        counts = self.completion_counts
        if 0 in counts:
            raise ValueError(f"sequence {counts.index(0)} has no token in its completion_mask, so it has no mean")
        return self.sum(x) / torch.tensor(counts, dtype=x.dtype)

    def last(self, x: Tensor) -> Tensor:
        """``x`` [N] at the last token of each sequence: [S]."""
        return self._per_token(x)[(self.cu_seqlens[1:] - 1).long()]

    @property
    def completion_counts(self) -> list[int]:
        """Masked tokens of each sequence."""
        ends = torch.cumsum(self.completion_mask, 0)
        before = torch.cat([ends.new_zeros(1), ends])[self.cu_seqlens.long()]
        return [int(n) for n in (before[1:] - before[:-1]).tolist()]

    def places(self, sequences: Sequence[int]) -> Tensor:
        """int64: where the tokens of these sequences are, one sequence after the other."""
        starts = self.cu_seqlens.tolist()
        return torch.cat([torch.arange(starts[s], starts[s + 1]) for s in sequences])

    def select(self, sequences: Sequence[int]) -> PackedBatch:
        """A batch of these sequences, in their order."""
        places, lengths = self.places(sequences), self.lengths
        return PackedBatch(
            self.tokens[places],
            torch.tensor([0, *itertools.accumulate(lengths[s] for s in sequences)], dtype=torch.int32),
            self.completion_mask[places],
            None if self.logprobs is None else self.logprobs[places],
        )

    def split(self, max_tokens: int, groups: Sequence[int] | None = None) -> list[PackedBatch]:
        """Consecutive batches of at most ``max_tokens`` tokens, in order.

        Args:
            groups: how many consecutive sequences each group has, the members of which stay together (None: each sequence
                stands alone).

        Raises:
            ValueError: naming a sequence or group that is longer by itself; groups that are not of all sequences.
        """
        sizes = [1] * len(self) if groups is None else list(groups)
        if sum(sizes) != len(self) or min(sizes) < 1:
            raise ValueError(f"groups must be of the batch's {len(self)} sequences, each of one or more, but they are {sizes}")
        bounds = [0, *itertools.accumulate(sizes)]
        starts = self.cu_seqlens.tolist()
        lengths = [starts[last] - starts[first] for first, last in itertools.pairwise(bounds)]
        for (first, last), length in zip(itertools.pairwise(bounds), lengths, strict=True):
            if length > max_tokens:
                what = f"sequence {first} has" if last == first + 1 else f"sequences {first} to {last - 1} have together"
                raise ValueError(f"{what} {length} tokens, more than max_tokens = {max_tokens}")
        parts: list[PackedBatch] = []
        first, tokens = 0, 0
        for begin, length in zip(bounds, [*lengths, max_tokens + 1], strict=True):
            if tokens + length > max_tokens:
                parts.append(self.part(range(first, begin)))
                first, tokens = begin, 0
            tokens += length
        return parts

    def part(self, sequences: range) -> PackedBatch:
        """A batch of consecutive sequences; views of this one's tensors."""
        first, last = sequences.start, sequences.stop
        begin, end = int(self.cu_seqlens[first]), int(self.cu_seqlens[last])
        return PackedBatch(
            self.tokens[begin:end],
            self.cu_seqlens[first : last + 1] - begin,
            self.completion_mask[begin:end],
            None if self.logprobs is None else self.logprobs[begin:end],
        )


def _vector(x: Any) -> Tensor:
    # Not torch.as_tensor: it warns of read-only arrays, as a memory-mapped corpus is.
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))


def pack(seqs: Iterable[Any], masks: Sequence[Any] | None = None) -> PackedBatch:
    """Lays sequences end to end.

    Args:
        seqs: token ids: lists, tuples, numpy or torch vectors of integers.
        masks: for each sequence as many booleans as tokens (None: all but each first token, which nothing predicts).

    Raises:
        ValueError: naming the sequence that is empty, not integer, or whose mask does not fit.
    """
    rows: list[Tensor] = []
    for s, seq in enumerate(seqs):
        try:
            row = _vector(seq)
        except (TypeError, ValueError) as error:
            raise ValueError(f"sequence {s} must be a vector of integer token ids, but it is {reprlib.repr(seq)}") from error
        if row.dim() != 1 or row.numel() == 0:
            raise ValueError(f"sequence {s} must be a vector of at least one token id, but its shape is {list(row.shape)}")
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise ValueError(f"sequence {s} must hold integer token ids, but it is {row.dtype}")
        row = row.to(torch.int64)
        if int(row.min()) < 0 or int(row.max()) > 2**31 - 1:
            raise ValueError(f"sequence {s} holds a token id outside 0 .. 2^31 - 1")
        rows.append(row.to(torch.int32))
    if not rows:
        raise ValueError("there is no sequence to pack")
    lengths = torch.tensor([0] + [row.numel() for row in rows])
    cu_seqlens = torch.cumsum(lengths, 0).to(torch.int32)
    if masks is None:
        mask = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool)
        mask[cu_seqlens[:-1].long()] = False
    else:
        if len(masks) != len(rows):
            raise ValueError(f"there are {len(rows)} sequences but {len(masks)} masks")
        parts = [_vector(mask).to(torch.bool) for mask in masks]
        for s, (row, part) in enumerate(zip(rows, parts, strict=True)):
            if part.shape != row.shape:
                raise ValueError(f"the mask of sequence {s} has shape {list(part.shape)}, its tokens {list(row.shape)}")
        mask = torch.cat(parts)
    return PackedBatch(torch.cat(rows), cu_seqlens, mask)
