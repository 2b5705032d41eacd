"""The seam to torch.distributed: operations, their order, what is sent, and who is named when a rank is gone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ranks_for_tests
from forked import Forker, forker
from models_for_tests import bits
from rank_children import flats
from tutelage import dealing, distributed
from tutelage.dealing import Node


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("children"), "rank_children") as parent:
        yield parent


# ---- dealing

costs = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(costs, st.integers(1, 9))
def test_shares_are_consecutive_and_even(costs: list[int], ranks: int) -> None:
    shares = dealing.deal(costs, ranks)
    assert len(shares) == ranks
    assert [unit for share in shares for unit in share] == list(range(len(costs)))
    if len(costs) >= ranks:
        assert all(len(share) for share in shares)
    if ranks == 2:  # no other cut is better, but that nobody may be without work
        sums = [abs(sum(costs[:at]) - sum(costs[at:])) for at in range(min(1, len(costs) - 1), max(len(costs), 2))]
        assert abs(sum(costs[: shares[0].stop]) - sum(costs[shares[0].stop :])) == min(sums, default=0)


def flat_order(node: Node) -> str:
    return str(dealing.fold_tree(node, [str(unit) for unit in range(node.last)], lambda a, b: f"({a}+{b})"))


@given(costs, st.integers(1, 9))
def test_a_tree_dealt_to_any_ranks_adds_in_one_order(costs: list[int], ranks: int) -> None:
    root = dealing.tree(costs)
    nodes = dealing.share_out(root, ranks)
    assert len(nodes) == ranks

    def within(node: Node) -> str:
        if node.halves is None:
            return str(node.first)
        return f"({within(node.halves[0])}+{within(node.halves[1])})"

    parts = [None if node is None else within(node) for node in nodes]
    assert dealing.fold(parts, lambda a, b: f"({a}+{b})") == flat_order(root)
    assert [unit for node in nodes if node for unit in range(node.first, node.last)] == list(range(len(costs)))


def test_a_tree_is_halved_by_cost() -> None:
    assert flat_order(dealing.tree([1, 1, 1, 1, 4])) == "(((0+1)+(2+3))+4)"
    assert flat_order(dealing.tree([1] * 5)) == "((0+1)+(2+(3+4)))"
    assert flat_order(dealing.tree([9, 1, 1, 1])) == "(0+(1+(2+3)))"


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(1, 6))
def test_leaves_cut_no_group(groups: list[int], size: int) -> None:
    found = dealing.leaves(groups, size)
    assert [row for leaf in found for row in leaf] == list(range(sum(groups)))
    ends = {sum(groups[:count]) for count in range(len(groups) + 1)}
    assert all(leaf.stop in ends for leaf in found)
    assert all(len(leaf) >= size for leaf in found[:-1])
    assert all(len(leaf) < size + max(groups) for leaf in found)


# ---- operations


def test_one_rank_sends_and_copies_nothing(children: Forker) -> None:
    assert children.run("rank_children:lonely", size=5) == (0, "")
    assert ranks_for_tests.outputs(ranks_for_tests.run(children, "rank_children:lonely", 1, size=7)) == [""]


@pytest.mark.parametrize(("count", "size"), [(2, 1000), (3, 257), (4, 3)])
def test_every_operation_of_several_ranks(children: Forker, tmp_path: Path, count: int, size: int) -> None:
    ranks_for_tests.outputs(ranks_for_tests.run(children, "rank_children:seam", count, size=size, folder=str(tmp_path)))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    whole = flats(count, size)

    def total(ranks: list[int]) -> torch.Tensor:
        parts = [whole[rank].clone() if rank in ranks else None for rank in range(count)]
        sum_ = dealing.fold(parts, lambda a, b: a + b)
        assert sum_ is not None
        return sum_

    everyone, but_one = total(list(range(count))), total([rank for rank in range(count) if rank != 1])
    for rank, own in enumerate(found):
        assert own["exchanged"] == [{"rank": other, "text": "é" * other} for other in range(count)]
        assert bits(torch.tensor(own["total"])) == bits(everyone)
        begin, end = own["pieces"][rank]
        assert bits(torch.tensor(own["scattered"])) == bits(but_one[begin:end])
        assert own["unchanged"]
        expected = torch.cat([whole[other][begin:end] for other, (begin, end) in enumerate(own["pieces"])])
        assert bits(torch.tensor(own["spread"])) == bits(expected)
        assert own["sent"] == [0.0] * size
        assert own["gathered"] == [
            entry for other in range(count) if other != 1 for entry in [*whole[other][:other].tolist(), whole[other][0].item()]
        ]
        assert own["bits"] == [entry > 0 for other in range(count) for entry in whole[other].tolist()]
        # What a rank sends: to each other rank its piece of this rank's flat, and to all others its own piece.
        lengths = [end - begin for begin, end in own["pieces"]]
        shares = [len(piece) for piece in distributed.even(size, count)]
        scattered = (0 if rank == 1 else size - lengths[rank]) + size - shares[rank]
        assert own["bytes"]["reduce_scatter"] == 4 * scattered
        assert own["bytes"]["all_gather"] == 4 * (count - 1) * (lengths[rank] + shares[rank])
        assert own["bytes"].get("broadcast", 0) == (4 * size * (count - 1) if rank == 0 else 0)
    # The negative control: in another order the sum has other bits.
    chain = whole[0].clone()
    for flat in whole[1:]:
        chain += flat
    assert count < 4 or bits(chain) != bits(everyone) or size < 100


# ---- who is missing


@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_that_dies_is_named_at_once(children: Forker, count: int) -> None:
    ended = ranks_for_tests.run(children, "rank_children:failing", count, rank=1, how="die", timeout=60)
    assert [rank.status for rank in ended] == [-signal.SIGKILL if rank == 1 else 5 for rank in range(count)]
    for rank, other in enumerate(ended):
        if rank != 1:
            assert f"rank 1 died, so rank {rank} stops too, in operation" in other.output
            assert "--max-restarts" in other.output
    assert max(rank.seconds for rank in ended) < 20


def test_a_rank_that_hangs_is_named_within_the_time_out(children: Forker) -> None:
    with ranks_for_tests.meeting_place() as port:
        started = ranks_for_tests.start(children, "rank_children:failing", 3, port, rank=2, how="hang", timeout=2)
        for rank in (0, 1):
            assert started[rank].wait() == 5
            said = started[rank].output.read_text()
            assert f"rank 2 hangs: nothing came from it in 2 s (rank_timeout), so rank {rank} stops too" in said
        ranks_for_tests.kill(started[2])


def test_a_rank_that_raises_is_named_with_its_reason(children: Forker) -> None:
    ended = ranks_for_tests.run(children, "rank_children:failing", 3, rank=0, how="raise", timeout=60)
    assert [rank.status for rank in ended] == [6, 5, 5]
    for other in ended[1:]:
        assert "rank 0 stopped (told to fail at exchange), so rank" in other.output


def test_who_waits_for_a_waiter_names_the_first(children: Forker) -> None:
    with ranks_for_tests.meeting_place() as port:
        started = ranks_for_tests.start(children, "rank_children:waiting_for_a_waiter", 3, port, timeout=2)
        for rank in (1, 2):
            assert started[rank].wait() == 5
            assert "rank 0 hangs" in started[rank].output.read_text()
        ranks_for_tests.kill(started[0])


def test_a_rank_that_never_comes_is_named(children: Forker) -> None:
    ended = ranks_for_tests.run(children, "rank_children:late", 3, timeout=2, absent=1)
    assert [rank.status for rank in ended] == [5, 0, 5]
    assert "rank 0 of 3 waited 2 s, and rank 1 did not come" in ended[0].output


def test_ranks_started_again_do_not_look_for_those_that_died(children: Forker) -> None:
    """torchrun's store, with all that the ranks wrote into it, outlives them."""
    with ranks_for_tests.meeting_place() as port:
        for restart, expected in enumerate(([5, -signal.SIGKILL], [0, 0])):
            started = ranks_for_tests.start(children, "rank_children:late_when_restarted", 2, port, restart, timeout=20)
            assert [rank.wait() for rank in started] == expected, [rank.output.read_text() for rank in started]


@pytest.mark.parametrize(
    ("gpus", "local", "here", "own", "where"),
    [(1, 1, 2, 0, "cpu"), (2, 1, 2, 1, "cuda:1"), (4, 5, 8, 1, "cpu"), (8, 5, 8, 5, "cuda:5")],
)
def test_ranks_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch, gpus: int, local: int, here: int, own: int, where: str) -> None:
    """And share one where there are more of them than GPUs; then messages go through host memory."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in (("LOCAL_RANK", local), ("LOCAL_WORLD_SIZE", here)):
        monkeypatch.setenv(name, str(value))
    assert distributed._own_gpu() == torch.device(where) and taken == [own]


def test_an_environment_that_says_half_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with monkeypatch.context() as whole:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            whole.setenv(name, "0")
        with pytest.raises(ValueError, match="device 'cuda' does not work here"), distributed.join(device="cuda"):
            pass
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT is not set"),
        distributed.join(),
    ):
        pass
