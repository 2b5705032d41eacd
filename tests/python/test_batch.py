"""PackedBatch: what pack lays out, split cuts and sum, mean, last return; every error."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models_for_tests import bits, randn, threads
from tutelage import PackedBatch, pack

few = settings(max_examples=25)
ragged = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1, max_size=12)


@st.composite
def batches(draw: st.DrawFn) -> PackedBatch:
    seqs = draw(ragged)
    masks = [draw(st.lists(st.booleans(), min_size=len(seq), max_size=len(seq))) for seq in seqs]
    return pack(seqs, masks)


def rows(batch: PackedBatch, x: torch.Tensor) -> list[list[Any]]:
    return [part.tolist() for part in x.split(batch.lengths)]


# ---- pack


def test_pack_lays_sequences_end_to_end() -> None:
    batch = pack([[5, 6, 7], (8,), np.array([9, 10])])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 10] and batch.tokens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.completion_mask.tolist() == [False, True, True, False, False, True]
    assert batch.completion_mask.dtype == torch.bool
    assert len(batch) == 3 and batch.lengths == [3, 1, 2] and batch.completion_counts == [2, 0, 1]
    assert batch.logprobs is None


@few
@given(ragged)
def test_pack_keeps_every_token(seqs: list[list[int]]) -> None:
    batch = pack(seqs)
    assert rows(batch, batch.tokens) == seqs
    assert rows(batch, batch.completion_mask) == [[False] + [True] * (len(seq) - 1) for seq in seqs]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64])
def test_pack_takes_any_integers(dtype: Any) -> None:
    ids = np.array([3, 1, 2], dtype=dtype)
    ids.setflags(write=False)  # as a memory-mapped corpus is
    assert pack([ids]).tokens.tolist() == [3, 1, 2]


def test_pack_takes_torch_vectors_ranges_and_iterators() -> None:
    batch = pack(seq for seq in (torch.tensor([1, 2]), range(3, 5), torch.arange(8, dtype=torch.int16)[::4]))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 0, 4]


def test_pack_copies() -> None:
    ids, mask = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([True, True])
    batch = pack([ids], [mask])
    ids[0], mask[0] = 7, False
    assert batch.tokens.tolist() == [1, 2] and batch.completion_mask.tolist() == [True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "there is no sequence to pack"),
        (([[1], []],), "sequence 1 must be a vector of at least one token id, but its shape is [0]"),
        (([[1], [[2, 3]]],), "sequence 1 must be a vector of at least one token id, but its shape is [1, 2]"),
        (([3],), "sequence 0 must be a vector of at least one token id, but its shape is []"),
        (([[1.5]],), "sequence 0 must hold integer token ids, but it is torch.float64"),
        (([torch.tensor([1j])],), "sequence 0 must hold integer token ids, but it is torch.complex64"),
        (([[1], [True]],), "sequence 1 must hold integer token ids, but it is torch.bool"),
        ((["text"],), "sequence 0 must be a vector of integer token ids, but it is 'text'"),
        (([[1, None]],), "sequence 0 must be a vector of integer token ids, but it is [1, None]"),
        (([[[1], [2, 3]]],), "sequence 0 must be a vector of integer token ids, but it is [[1], [2, 3]]"),
        (([[2**80]],), "sequence 0 must be a vector of integer token ids, but it is [1208925819614629174706176]"),
        (([[1], [2, -1]],), "sequence 1 holds a token id outside 0 .. 2^31 - 1"),
        (([[2**31]],), "sequence 0 holds a token id outside 0 .. 2^31 - 1"),
        (([np.array([2**63], dtype=np.uint64)],), "sequence 0 holds a token id outside 0 .. 2^31 - 1"),
        (([[1], [2]], [[True]]), "there are 2 sequences but 1 masks"),
        (([[1], [2, 3]], [[True], [True]]), "the mask of sequence 1 has shape [1], its tokens [2]"),
    ],
)
def test_pack_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pack(*arguments)


# ---- split


@few
@given(batches(), st.integers(9, 40))
def test_split_cuts_into_full_consecutive_batches(batch: PackedBatch, max_tokens: int) -> None:
    parts = batch.split(max_tokens)
    assert torch.cat([part.tokens for part in parts]).tolist() == batch.tokens.tolist()
    assert torch.cat([part.completion_mask for part in parts]).tolist() == batch.completion_mask.tolist()
    assert [length for part in parts for length in part.lengths] == batch.lengths
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        assert part.cu_seqlens[0] == 0 and part.cu_seqlens.dtype == torch.int32
        assert 0 < part.tokens.numel() <= max_tokens
        if following is not None:  # none was cut earlier than it had to be
            assert part.tokens.numel() + following.lengths[0] > max_tokens


def test_select_takes_sequences_in_any_order() -> None:
    batch = pack([[1, 2], [3, 4, 5], [6]], [[False, True], [False, False, True], [True]])
    assert batch.places([2, 0]).tolist() == [5, 0, 1]
    batch = dataclasses.replace(batch, logprobs=torch.arange(6.0))
    chosen = batch.select([2, 0])
    assert (chosen.tokens.tolist(), chosen.cu_seqlens.tolist()) == ([6, 1, 2], [0, 1, 3])
    assert chosen.cu_seqlens.dtype == torch.int32 and chosen.completion_mask.tolist() == [True, False, True]
    assert chosen.logprobs is not None and chosen.logprobs.tolist() == [5, 0, 1]
    assert pack([[1, 2]]).select([0]).logprobs is None


def test_split_carries_the_rollouts_logprobs() -> None:
    batch = pack([[1, 2], [3, 4, 5]])
    batch = PackedBatch(batch.tokens, batch.cu_seqlens, batch.completion_mask, torch.arange(5.0))
    logprobs = [part.logprobs for part in batch.split(3)]
    assert [x.tolist() for x in logprobs if x is not None] == [[0, 1], [2, 3, 4]]


@few
@given(batches(), st.data())
def test_split_keeps_groups_together(batch: PackedBatch, data: st.DataObject) -> None:
    sizes: list[int] = []
    while sum(sizes) < len(batch):
        sizes.append(data.draw(st.integers(1, len(batch) - sum(sizes))))
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    longest = max(sum(batch.lengths[a:b]) for a, b in itertools.pairwise(ends))
    parts = batch.split(data.draw(st.integers(longest, 2 * longest)), sizes)
    assert torch.cat([part.tokens for part in parts]).tolist() == batch.tokens.tolist()
    assert [length for part in parts for length in part.lengths] == batch.lengths
    assert {sum(map(len, parts[:i])) for i in range(len(parts))} <= set(ends)


def test_split_refuses_groups_that_do_not_fit() -> None:
    batch = pack([[1], [2, 3, 4], [5, 6]])
    assert [len(part) for part in batch.split(5, [1, 2])] == [1, 2]
    assert [len(part) for part in batch.split(5)] == [2, 1]  # control
    with pytest.raises(ValueError, match="sequences 1 to 2 have together 5 tokens, more than max_tokens = 4"):
        batch.split(4, [1, 2])
    for groups in ([1, 1], [4], [3, 0]):
        message = f"groups must be of the batch's 3 sequences, each of one or more, but they are {groups}"
        with pytest.raises(ValueError, match=re.escape(message)):
            batch.split(9, groups)


def test_split_refuses_a_sequence_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 3 tokens, more than max_tokens = 2"):
        pack([[1], [2, 3, 4]]).split(2)


# ---- sum, mean, last


@few
@given(batches())
def test_sum_mean_and_last(batch: PackedBatch) -> None:
    x = randn(batch.tokens.double(), seed=0)
    kept = [
        [value for value, counts in zip(values, mask, strict=True) if counts]
        for values, mask in zip(rows(batch, x), rows(batch, batch.completion_mask), strict=True)
    ]
    torch.testing.assert_close(batch.sum(x), torch.tensor([sum(values) for values in kept]).double())
    assert batch.completion_counts == [len(values) for values in kept]
    assert batch.last(x).tolist() == [values[-1] for values in rows(batch, x)]
    if all(kept):
        torch.testing.assert_close(batch.mean(x), torch.tensor([sum(values) / len(values) for values in kept]).double())
    else:
        empty = [bool(values) for values in kept].index(False)
        with pytest.raises(ValueError, match=f"sequence {empty} has no token in its completion_mask, so it has no mean"):
            batch.mean(x)


@few
@given(batches(), st.integers(1, 4))
def test_sums_have_the_bits_of_each_sequence_alone(batch: PackedBatch, count: int) -> None:
    x = randn(batch.tokens.float(), seed=1)
    alone = [
        pack([ids], [mask]).sum(values)
        for ids, mask, values in zip(
            *(each.split(batch.lengths) for each in (batch.tokens, batch.completion_mask, x)), strict=True
        )
    ]
    with threads(count):
        assert bits(batch.sum(x)) == bits(torch.cat(alone))


def test_sum_mean_and_last_are_differentiable() -> None:
    batch = pack([[1, 2, 3], [4, 5]])
    weights = torch.tensor([1.0, 10.0])
    for reduce, expected in (
        (batch.sum, [0, 1, 1, 0, 10]),
        (batch.mean, [0, 0.5, 0.5, 0, 10]),
        (batch.last, [0, 0, 1, 0, 10]),
    ):
        x = torch.zeros(5, requires_grad=True)
        (reduce(x) * weights).sum().backward()
        assert x.grad is not None and x.grad.tolist() == expected


@pytest.mark.parametrize("method", ["sum", "mean", "last"])
def test_one_entry_per_token(method: str) -> None:
    batch = pack([[1, 2, 3]])
    with pytest.raises(ValueError, match=re.escape("x must have one entry per token, [3], but it is [2]")):
        getattr(batch, method)(torch.zeros(2))
