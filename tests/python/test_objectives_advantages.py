"""Advantages and their statistics: GAE against its definition, groups, whitening; nothing leaks between sequences."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models_for_tests import bits, threads
from tutelage import PackedBatch, pack
from tutelage.objectives import baselines, gae, grpo_advantages, mean_std, ppo_value, rloo_advantages, whiten

few = settings(max_examples=25)


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@st.composite
def batches(draw: st.DrawFn) -> PackedBatch:
    masks = draw(st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=6))
    return pack([[1] * (1 + len(mask)) for mask in masks], [[False, *mask] for mask in masks])


# ---- values and GAE


def defined_gae(
    rewards: Sequence[float], values: Sequence[float], mask: Sequence[bool], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """One sequence, A_t = Σ_l (γλ)^l δ_{t+l} over its actions: every sum written out."""
    actions = [i for i, masked in enumerate(mask) if masked]
    b = [values[i - 1] for i in actions] + [0.0]
    delta = [rewards[i] + gamma * b[k + 1] - b[k] for k, i in enumerate(actions)]
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for k, i in enumerate(actions):
        advantages[i] = math.fsum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(actions)))
        returns[i] = advantages[i] + b[k]
    return advantages, returns


@few
@given(batches(), st.sampled_from([(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.0, 0.5), (1.0, 0.0)]))
def test_gae_is_its_definition(batch: PackedBatch, factors: tuple[float, float]) -> None:
    n = batch.tokens.numel()
    rewards, values = normal(n, 1), normal(n, 2)
    expected: tuple[list[float], list[float]] = ([], [])
    for x, v, m in zip(*(y.split(batch.lengths) for y in (rewards, values, batch.completion_mask)), strict=True):
        for column, part in zip(expected, defined_gae(x.tolist(), v.tolist(), m.tolist(), *factors), strict=True):
            column.extend(part)
    for found, wanted in zip(gae(rewards, values, batch, *factors), expected, strict=True):
        assert found.dtype == torch.float32 and found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_gae_by_hand() -> None:
    batch = pack([[7, 8, 9, 9]], [[False, False, True, True]])  # two actions, judged by the values at tokens 1 and 2
    rewards, values = torch.tensor([9.0, 9.0, 0.5, 2.0]), torch.tensor([9.0, 1.0, 3.0, 9.0])
    advantages, returns = gae(rewards, values, batch, gamma=0.5, lam=0.5)
    # δ = [0.5 + 0.5·3 − 1, 2 + 0 − 3] = [1, −1]
    assert advantages.tolist() == [0.0, 0.0, 1.0 - 0.25, -1.0]
    assert returns.tolist() == [0.0, 0.0, 1.75, 2.0]


def test_with_gamma_and_lambda_1_the_return_is_the_sum_of_the_rewards_to_come() -> None:
    batch = pack([[1] * 6, [1] * 4])
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 1.0, 1.0, 1.0])
    _, returns = gae(rewards, normal(10, 2), batch, 1.0, 1.0)
    assert returns.tolist() == pytest.approx([0, 15, 14, 12, 9, 5, 0, 3, 2, 1], abs=1e-6)


def test_a_users_turn_is_stepped_over() -> None:
    rewards, values = torch.tensor([0.0, 1.0, 50.0, 50.0, 2.0]), torch.tensor([3.0, 60.0, 60.0, 4.0, 60.0])
    gap = pack([[1] * 5], [[False, True, False, False, True]])
    close = pack([[1] * 3], [[False, True, True]])
    with_gap = gae(rewards, values, gap, 0.9, 0.8)
    without = gae(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0, 60.0]), close, 0.9, 0.8)
    for a, b in zip(with_gap, without, strict=True):
        assert bits(a[gap.completion_mask]) == bits(b[close.completion_mask])


def test_nothing_leaks_from_a_neighbour_full_of_nan() -> None:
    batch = pack([[1] * 3, [1] * 7, [1] * 2, [1] * 5])
    rewards, values = normal(17, 1), normal(17, 2)
    whole = gae(rewards, values, batch)
    clean = torch.tensor([False] * 3 + [True] * 7 + [False] * 2 + [True] * 5)
    sick = gae(torch.where(clean, rewards, math.nan), torch.where(clean, values, math.nan), batch)
    alone = [gae(x, v, pack([[1] * len(x)])) for x, v in ((rewards[3:10], values[3:10]), (rewards[12:], values[12:]))]
    for k in range(2):
        assert bits(sick[k][clean]) == bits(whole[k][clean]) == bits(*(parts[k] for parts in alone))
        assert bool(sick[k][[1, 2, 11]].isnan().all())  # the control: it is there
    shifted = baselines(torch.where(clean, values, math.nan), batch)
    assert bits(shifted[clean]) == bits(baselines(values, batch)[clean])


def test_gae_is_data() -> None:
    batch = pack([[1] * 4])
    rewards, values = normal(4, 1).requires_grad_(), normal(4, 2).requires_grad_()
    assert not any(x.requires_grad for x in gae(rewards, values, batch))


def test_baselines_are_the_values_one_token_earlier() -> None:
    batch = pack([[1] * 3, [1], [1] * 2])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
    shifted = baselines(values, batch)
    assert shifted.tolist() == [0.0, 1.0, 2.0, 0.0, 0.0, 5.0]
    shifted.backward(torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0]))
    assert values.grad is not None and values.grad.tolist() == [20.0, 30.0, 0.0, 0.0, 60.0, 0.0]


def test_value_loss_of_a_critic_that_knows_the_returns_is_0() -> None:
    batch = pack([[1] * 5, [1] * 3])
    rewards = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, -1.0])
    values = torch.tensor([2.0, 2.0, 2.0, 2.0, 9.0, -1.0, -1.0, 9.0])  # after the last token nothing is left to judge
    advantages, returns = gae(rewards, values, batch)
    assert advantages.tolist() == [0.0] * 8
    judged = baselines(values, batch)
    assert ppo_value(judged, judged, returns, batch.completion_mask).item() == 0.0
    # The control: without the shift the same critic looks wrong.
    assert ppo_value(values, values, returns, batch.completion_mask).item() > 1


# ---- groups


@few
@given(st.integers(2, 7), st.integers(1, 9))
def test_group_advantages_are_their_definitions(size: int, prompts: int) -> None:
    rewards = normal(size * prompts, size)
    groups = [group.tolist() for group in rewards.split(size)]
    grpo = [(r - statistics.fmean(g)) / (statistics.stdev(g) + 1e-4) for g in groups for r in g]
    centred = [r - statistics.fmean(g) for g in groups for r in g]
    rloo = [r - statistics.fmean(g[:i] + g[i + 1 :]) for g in groups for i, r in enumerate(g)]
    assert grpo_advantages(rewards, size).tolist() == pytest.approx(grpo, rel=1e-5, abs=1e-6)
    assert grpo_advantages(rewards, size, scale="none").tolist() == pytest.approx(centred, rel=1e-5, abs=1e-6)
    assert rloo_advantages(rewards, size).tolist() == pytest.approx(rloo, rel=1e-5, abs=1e-6)
    assert grpo_advantages(rewards, size).dtype == torch.float32


def test_a_group_of_equal_rewards_teaches_exactly_nothing() -> None:
    rewards = torch.tensor([0.1] * 7 + [1 / 3] * 7)
    for advantages in (grpo_advantages(rewards, 7), grpo_advantages(rewards, 7, "none"), rloo_advantages(rewards, 7)):
        assert advantages.tolist() == [0.0] * 14
    assert (rewards[:7] - rewards[:7].sum() / 7).any()  # the control: in float32 it would


def test_a_groups_advantages_do_not_depend_on_the_others() -> None:
    rewards = normal(24, 1)
    for f in (grpo_advantages, rloo_advantages):
        sick = f(torch.cat([rewards[:8], torch.full((8,), math.nan), rewards[16:]]), 8)
        assert bits(sick[:8], sick[16:]) == bits(f(rewards[:8], 8), f(rewards[16:], 8))
        assert bool(sick[8:16].isnan().all())
        assert not f(rewards.clone().requires_grad_(), 8).requires_grad


# ---- whitening


def test_whitened_tokens_have_mean_0_and_standard_deviation_1() -> None:
    x, mask = 3 + 2 * normal(5000, 1), normal(5000, 2) > 0
    x = torch.where(mask, x, math.nan)
    mean, std = mean_std(x, mask)
    assert mean == pytest.approx(x[mask].double().mean().item(), rel=1e-12)
    assert std == pytest.approx(x[mask].double().std(correction=0).item(), rel=1e-12)
    white = whiten(x, mask, mean, std)
    assert white[~mask].tolist() == [0.0] * int((~mask).sum())
    assert mean_std(white, mask) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert mean_std(whiten(x, mask, mean, std, shift_mean=False), mask) == pytest.approx((mean, 1.0), abs=1e-5)


def test_whitening_does_not_depend_on_cut_or_threads() -> None:
    x, mask = normal(100_000, 1), normal(100_000, 2) > 0
    found = set()
    for count in (1, 2, 3, 4):
        with threads(count):
            mean, std = mean_std(x, mask)
            found.add((mean, std, bits(whiten(x, mask, mean, std))))
            cut = torch.cat([whiten(x[a:b], mask[a:b], mean, std) for a, b in ((0, 7), (7, 40_001), (40_001, 100_000))])
            assert bits(cut) == bits(whiten(x, mask, mean, std))
    assert len(found) == 1
    # The control: statistics of the parts instead of the whole step.
    assert bits(whiten(x[:7], mask[:7], *mean_std(x[:7], mask[:7]))) != bits(whiten(x, mask, mean, std)[:7])


# ---- errors

A, B, M = torch.zeros(3), torch.zeros(4), torch.ones(3, dtype=torch.bool)
BATCH = pack([[1, 2, 3]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gae(B, A, BATCH), "rewards must have the shape of tokens, [3], but it has [4]"),
        (lambda: gae(A, B, BATCH), "values must have the shape of tokens, [3], but it has [4]"),
        (lambda: gae(A, A, BATCH, gamma=1.1), "gamma must be in 0 .. 1, but it is 1.1"),
        (lambda: gae(A, A, BATCH, lam=-0.1), "lam must be in 0 .. 1, but it is -0.1"),
        (
            lambda: gae(A, A, pack([[1, 2], [3]], [[False, True], [True]])),
            "the first token of sequence 1 is in completion_mask, but nothing comes before it to act on",
        ),
        (lambda: baselines(B, BATCH), "values must have the shape of tokens, [3], but it has [4]"),
        (lambda: grpo_advantages(A, 2), "group_size must be at least 2 and divide the 3 rewards, but it is 2"),
        (lambda: rloo_advantages(A, 1), "group_size must be at least 2 and divide the 3 rewards, but it is 1"),
        (lambda: grpo_advantages(A[:0], 2), "rewards must be a vector of at least one entry, but its shape is [0]"),
        (lambda: grpo_advantages(A, 3, "batch"), "scale must be group or none, but it is 'batch'"),
        (lambda: mean_std(A, M[:2]), "mask must have the shape of x, [3], but it has [2]"),
        (lambda: mean_std(A, A), "mask must be bool, but it is torch.float32"),
        (lambda: mean_std(A, ~M), "denominator must be positive, but it is 0: no token counts in this step"),
        (lambda: whiten(A, M[:2], 0.0, 1.0), "mask must have the shape of x, [3], but it has [2]"),
        (lambda: whiten(A, A, 0.0, 1.0), "mask must be bool, but it is torch.float32"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
