"""How a buffer is cut among ranks, and in which order gradients leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models_for_tests import bits
from tutelage import sharding
from tutelage.distributed import Ranks
from tutelage.sharding import CHUNK, Layout, Reduction, Shard

sizes = st.integers(1, 60 * CHUNK)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[int], int]:
    size = draw(sizes)
    return size, sorted(draw(st.sets(st.integers(0, size - 1), max_size=8))), draw(st.integers(1, 20 * CHUNK))


@given(cuts())
def test_buckets_are_the_whole_buffer_cut_at_chunks(cut: tuple[int, list[int], int]) -> None:
    size, starts, least = cut
    found = sharding.buckets(size, starts, least)
    assert [found[0].start, *(bucket.stop for bucket in found)] == [*(bucket.start for bucket in found), size]
    assert all(bucket.start % CHUNK == 0 for bucket in found)
    assert all(len(bucket) or size == 0 for bucket in found)
    wanted = max(least, CHUNK)
    gaps = [last - first for first, last in itertools.pairwise([0, *starts, size])]
    assert all(len(bucket) < 2 * wanted + 2 * CHUNK for bucket in found) or max(gaps) >= wanted
    assert all(len(bucket) < 3 * wanted + 2 * CHUNK for bucket in found)  # so what arrives needs little memory
    assert all(len(bucket) > wanted / 2 - CHUNK for bucket in found[1:])  # so messages are not small


@given(cuts(), st.integers(1, 9))
def test_pieces_are_the_whole_buffer(cut: tuple[int, list[int], int], ranks: int) -> None:
    layout = Layout(cut[0], sharding.buckets(*cut), ranks)
    pieces = sorted((piece.start, piece.stop) for rank in range(ranks) for piece in layout.of(rank))
    assert [0, *(stop for _, stop in pieces)] == [*(start for start, _ in pieces), cut[0]]
    assert sum(layout.bytes_summed(rank) for rank in range(ranks)) == 4 * (ranks - 1) * cut[0]
    assert sum(layout.bytes_spread(rank) for rank in range(ranks)) == 4 * (ranks - 1) * cut[0]


def test_the_sum_of_squares_depends_on_no_cut() -> None:
    size = 10 * CHUNK + 17
    flat = torch.randn(size) * 10 ** torch.randint(-6, 6, (size,))
    found = set()
    for least in (CHUNK, 3 * CHUNK, 100 * CHUNK):
        for starts in ([0], [5, 3 * CHUNK + 1, 7 * CHUNK]):
            shard = Shard(Layout(size, sharding.buckets(size, starts, least), 1), Ranks())
            found.add(shard.sum_of_squares(shard.cut(flat)))
    assert len(found) == 1
    # The negative control: chunks that begin elsewhere.
    shifted = Shard(Layout(size, (range(1000), range(1000, size)), 1), Ranks())
    assert shifted.sum_of_squares(shifted.cut(flat)) not in found


class Noting(Ranks):
    """One rank that notes which bucket leaves when."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[range] = []

    def reduce_scatter(self, flat: Tensor, pieces: Sequence[range], present: Sequence[bool]) -> Callable[[], Tensor]:
        self.left.append(pieces[0])
        return super().reduce_scatter(flat, pieces, present)


def test_buckets_leave_when_they_are_finished_and_with_all_that_is_added_before() -> None:
    size = 8 * CHUNK
    layout = Layout(size, sharding.buckets(size, [0, 2 * CHUNK, 4 * CHUNK], 2 * CHUNK), 1)
    ranks = Noting()
    grads, others = torch.randn(size), [torch.randn(size), torch.randn(size)]
    expected = bits(others[0] + (others[1] + grads))
    into = torch.empty(size)
    reduction = Reduction(Shard(layout, ranks), lambda: grads, lambda: grads, [True], into, False)
    reduction.before += others
    reduction.ready(5 * CHUNK)  # within the bucket that begins at 4 chunks, which was cut in two
    assert ranks.left == [range(6 * CHUNK, size)]
    reduction.ready(4 * CHUNK)
    assert ranks.left == [range(6 * CHUNK, size), range(4 * CHUNK, 6 * CHUNK)]
    with pytest.raises(RuntimeError, match="the gradient was finished from 16384 on, and now only from 20480 on"):
        reduction.ready(5 * CHUNK)
    reduction.finish()
    assert [piece.start for piece in ranks.left] == [6 * CHUNK, 4 * CHUNK, 2 * CHUNK, 0]
    assert bits(into) == expected
    again = Reduction(Shard(layout, ranks), lambda: grads, lambda: grads, [True], into, True)
    before = into.clone()
    again.finish()
    assert bits(into) == bits(before + grads)
