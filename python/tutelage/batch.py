"""Packed sequences: what every kernel and every loss works on. No padding anywhere."""

from __future__ import annotations

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

    def split(self, max_tokens: int, group: int = 1) -> list[PackedBatch]:
        """Consecutive batches of at most ``max_tokens`` tokens, in order.

        Args:
            group: so many consecutive sequences always stay together: 2 for pairs.

        Raises:
            ValueError: naming a sequence, or a group of them, that is longer by itself; a number of sequences that ``group``
                does not divide.
        """
        if group < 1 or len(self) % group:
            raise ValueError(f"group must be at least 1 and divide the {len(self)} sequences, but it is {group}")
        single = self.lengths
        lengths = [sum(single[s : s + group]) for s in range(0, len(single), group)]
        for g, length in enumerate(lengths):
            if length > max_tokens:
                which = f"sequence {g} has" if group == 1 else f"sequences {g * group} to {(g + 1) * group - 1} have"
                raise ValueError(f"{which} {length} tokens, more than max_tokens = {max_tokens}")
        parts: list[PackedBatch] = []
        first, tokens = 0, 0
        for g, length in enumerate([*lengths, max_tokens + 1]):
            if tokens + length > max_tokens:
                parts.append(self._slice(first * group, g * group))
                first, tokens = g, 0
            tokens += length
        return parts

    def _slice(self, first: int, last: int) -> PackedBatch:
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
