"""Every loss against its formula in plain Python, by gradcheck, bit for bit under any cut and any threads; every error."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models_for_tests import bits, threads, tiny_model
from tutelage import pack
from tutelage.objectives import (
    RankingPairs,
    cross_entropy,
    dpo,
    implicit_rewards,
    ipo,
    kl_estimate,
    kto,
    kto_z0,
    odds_ratio,
    orpo,
    ppo_policy,
    ppo_value,
    preference_metrics,
    ranking_metrics,
    ranking_pairs,
    reward_ranking,
    simpo,
)

few = settings(max_examples=25)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(x: float) -> float:
    return math.log(math.exp(x) / (1 - math.exp(x)))


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


@dataclass(frozen=True)
class Case:
    """One loss on vectors of one length; the first `trained` of them get a gradient.

    loss: (*vectors, denominator). plain: one element's loss, straight from the paper. draw: the vectors, given a length.
    """

    loss: Callable[..., Tensor]
    plain: Callable[..., float]
    draw: Callable[[int], list[Tensor]]
    trained: int


def normal(n: int, seed: int, mean: float, std: float) -> Tensor:
    return mean + std * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def coins(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.7


def sums(n: int) -> list[Tensor]:
    """Log-probs of completions by a policy and, near it, a reference: chosen, rejected, ref_chosen, ref_rejected."""
    ours = [normal(n, seed, -60.0, 20.0) for seed in (1, 2)]
    return [*ours, *(x + normal(n, seed, 0.0, 8.0) for x, seed in zip(ours, (3, 4), strict=True))]


def means(n: int) -> list[Tensor]:
    return [-torch.exp(normal(n, seed, 0.0, 1.5)) for seed in (1, 2)]


def policy_tokens(n: int) -> list[Tensor]:
    logprobs = -torch.exp(normal(n, 1, 0.0, 1.0))
    return [logprobs, logprobs + normal(n, 2, 0.0, 0.3), normal(n, 3, 0.0, 1.0), coins(n, 4)]


def value_tokens(n: int) -> list[Tensor]:
    values = normal(n, 1, 0.0, 1.0)
    return [values, values + normal(n, 2, 0.0, 0.4), normal(n, 3, 0.0, 1.0), coins(n, 4)]


def plain_dpo(c: float, r: float, rc: float, rr: float, beta: float = 0.1, smoothing: float = 0.0) -> float:
    h = beta * ((c - r) - (rc - rr))
    return -(1 - smoothing) * math.log(sigma(h)) - smoothing * math.log(sigma(-h))


def plain_kto(logp: float, ref: float, desirable: bool) -> float:
    if desirable:
        return 1.2 * (1 - sigma(0.2 * ((logp - ref) - 0.7)))
    return 0.8 * (1 - sigma(0.2 * (0.7 - (logp - ref))))


def plain_odds_ratio(c: float, r: float) -> float:
    return -math.log(sigma(log_odds(c) - log_odds(r)))


def plain_ppo(logp: float, old: float, advantage: float, mask: bool) -> float:
    ratio = math.exp(logp - old)
    return -min(ratio * advantage, clip(ratio, 0.8, 1.2) * advantage) if mask else 0.0


def plain_value(value: float, old: float, target: float, mask: bool) -> float:
    near = clip(value, old - 0.3, old + 0.3)
    return 0.5 * max((value - target) ** 2, (near - target) ** 2) if mask else 0.0


def kl_loss(kind: Any) -> Callable[..., Tensor]:
    return lambda logp, ref, mask, d: -cross_entropy(kl_estimate(logp, ref, kind), mask, d)


CASES: dict[str, Case] = {
    "cross_entropy": Case(cross_entropy, lambda x, m: -x if m else 0.0, lambda n: [*means(n)[:1], coins(n, 4)], 1),
    "dpo": Case(lambda *x: dpo(*x[:4], denominator=x[4]), plain_dpo, sums, 2),
    "cdpo": Case(
        lambda *x: dpo(*x[:4], beta=0.3, label_smoothing=0.2, denominator=x[4]), lambda *x: plain_dpo(*x, 0.3, 0.2), sums, 2
    ),
    "ipo": Case(
        lambda *x: ipo(*x[:4], beta=0.4, denominator=x[4]),
        lambda c, r, rc, rr: (math.log(math.exp(c - rc) / math.exp(r - rr)) - 1 / 0.8) ** 2,
        lambda n: [x / 20 for x in sums(n)],
        2,
    ),
    "simpo": Case(lambda c, r, d: simpo(c, r, 2.5, 0.7, d), lambda c, r: -math.log(sigma(2.5 * c - 2.5 * r - 0.7)), means, 2),
    "odds_ratio": Case(odds_ratio, plain_odds_ratio, means, 2),
    "orpo": Case(lambda c, r, d: orpo(c, r, 0.3, d), lambda c, r: -c + 0.3 * plain_odds_ratio(c, r), means, 2),
    "kto": Case(
        lambda x, ref, good, d: kto(x, ref, good, 0.7, 0.2, 1.2, 0.8, d),
        plain_kto,
        lambda n: [*sums(n)[::2], coins(n, 5)],
        1,
    ),
    "ppo_policy": Case(lambda *x: ppo_policy(*x[:4], 0.2, x[4]), plain_ppo, policy_tokens, 1),
    "ppo_value": Case(lambda *x: ppo_value(*x[:4], 0.3, x[4]), plain_value, value_tokens, 1),
    "k1": Case(kl_loss("k1"), lambda p, q, m: p - q if m else 0.0, lambda n: [*means(n), coins(n, 4)], 1),
    "k2": Case(kl_loss("k2"), lambda p, q, m: (p - q) ** 2 / 2 if m else 0.0, lambda n: [*means(n), coins(n, 4)], 1),
    "k3": Case(
        kl_loss("k3"),
        lambda p, q, m: math.exp(q - p) - 1 - (q - p) if m else 0.0,
        lambda n: [*policy_tokens(n)[:2], coins(n, 4)],
        1,
    ),
}
every_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def leaves(vectors: Sequence[Tensor], trained: int) -> list[Tensor]:
    return [x.detach().requires_grad_(i < trained) for i, x in enumerate(vectors)]


# ---- the formula


@every_case
def test_loss_is_the_papers_formula(case: Case) -> None:
    vectors = case.draw(211)
    expected = math.fsum(case.plain(*row) for row in zip(*(x.tolist() for x in vectors), strict=True)) / 57.0
    double = [x.double() if x.is_floating_point() else x for x in vectors]
    assert case.loss(*double, 57.0).item() == pytest.approx(expected, rel=1e-12)
    loss = case.loss(*vectors, 57.0)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=3e-5)


@every_case
def test_gradcheck(case: Case) -> None:
    vectors = leaves([x.double() if x.is_floating_point() else x for x in case.draw(23)], case.trained)
    assert torch.autograd.gradcheck(lambda *x: case.loss(*x, 5.0), vectors, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("cross_entropy", "k1", "k2", "k3")])
def test_denominator_is_the_count_of_the_call_unless_given(name: str) -> None:
    defaults: dict[str, Callable[..., Tensor]] = {
        "dpo": dpo,
        "cdpo": lambda *x: dpo(*x, beta=0.3, label_smoothing=0.2),
        "ipo": lambda *x: ipo(*x, beta=0.4),
        "simpo": lambda *x: simpo(*x, 2.5, 0.7),
        "odds_ratio": odds_ratio,
        "orpo": lambda *x: orpo(*x, 0.3),
        "kto": lambda *x: kto(*x, 0.7, 0.2, 1.2, 0.8),
        "ppo_policy": ppo_policy,
        "ppo_value": lambda *x: ppo_value(*x, 0.3),
    }
    vectors = CASES[name].draw(37)
    count = int(vectors[3].sum()) if name.startswith("ppo") else 37
    assert bits(defaults[name](*vectors)) == bits(CASES[name].loss(*vectors, count))


# ---- the same bits for any cut, offset, stride and number of threads


def loss_and_gradients(case: Case, vectors: Sequence[Tensor], cuts: Sequence[int], denominator: float) -> tuple[bytes, bytes]:
    """The first part's loss, and the gradients of all parts laid end to end."""
    losses, gradients = [], []
    for begin, end in itertools.pairwise(cuts):
        part = leaves([x[begin:end] for x in vectors], case.trained)
        losses.append(case.loss(*part, denominator))
        losses[-1].backward()
        gradients.append([x.grad for x in part[: case.trained]])
    whole = [torch.cat(list(parts)) for parts in zip(*gradients, strict=True)]
    return bits(losses[0]), bits(*whole)


def changes_with(case: Case) -> set[str]:
    """What the bits of a loss or its gradients depend on though they should not."""
    n = 70_000  # more than two of the pieces that torch gives to its threads
    vectors = case.draw(n)
    found = set()
    with threads(1):
        loss, gradients = loss_and_gradients(case, vectors, [0, n], 1000.0)
    for count in (2, 3, 4):
        with threads(count):
            if loss_and_gradients(case, vectors, [0, n], 1000.0) != (loss, gradients):
                found.add("threads")
            if loss_and_gradients(case, vectors, [0, 1, 4, 11, 26, 57, 33_000, n - 3, n], 1000.0)[1] != gradients:
                found.add("cuts")
    strided = [torch.stack([x, x], 1)[:, 1] for x in vectors]
    if loss_and_gradients(case, strided, [0, n], 1000.0) != (loss, gradients):
        found.add("strides")
    return found


@every_case
def test_bits_do_not_depend_on_cut_stride_or_threads(case: Case) -> None:
    assert changes_with(case) == set()


@every_case
@few
@given(data=st.data())
def test_any_cut_gives_the_same_gradients(case: Case, data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 150))
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(1, n - 1), max_size=6))})
    vectors = case.draw(n)
    assert loss_and_gradients(case, vectors, cuts, 7.0)[1] == loss_and_gradients(case, vectors, [0, n], 7.0)[1]


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda c, r, rc, rr, d: -torch.log(torch.sigmoid(c - r)).sum() / d, "cuts"),
        (lambda c, r, rc, rr, d: torch.nn.functional.softplus(r - c).sum() / d, "cuts"),
        (lambda c, r, rc, rr, d: -torch.nn.functional.logsigmoid(c - r).mean(), "cuts"),
        (lambda c, r, rc, rr, d: -torch.nn.functional.logsigmoid(c - r).sum() / d, "threads"),
    ],
    ids=["sigmoid", "softplus", "mean", "sum"],
)
def test_negative_control_bits_of_careless_losses_change(loss: Callable[..., Tensor], found: str) -> None:
    assert found in changes_with(Case(loss, plain_dpo, lambda n: [x / 20 for x in sums(n)], 2))


# ---- single losses


@pytest.mark.parametrize("pairs", [1, 2, 4, 64])
def test_dpo_of_policy_equal_to_reference_is_exactly_log_2(pairs: int) -> None:
    chosen, rejected, *_ = sums(pairs)
    assert implicit_rewards(chosen, chosen).tolist() == [0.0] * pairs
    assert bits(dpo(chosen, rejected, chosen, rejected)) == bits(torch.tensor(math.log(2)))


def test_dpo_of_a_model_and_its_own_reference_scored_elsewhere_is_exactly_log_2() -> None:
    model = tiny_model()
    batch = pack([[1, 2, 3, 4], [1, 2, 9], [5, 6, 7], [5, 6, 8, 8, 8]])  # chosen, rejected, chosen, rejected
    with torch.no_grad():  # one at a time, as a cache of reference log-probs is made
        ref = torch.cat([part.sum(model.score(part).logprobs) for part in batch.split(5)])
    logps = batch.sum(model.score(batch).logprobs)
    loss = dpo(logps[0::2], logps[1::2], ref[0::2], ref[1::2])
    assert bits(loss) == bits(torch.tensor(math.log(2)))
    loss.backward()
    assert float(model.grads.abs().max()) > 0


def test_cdpo_without_smoothing_is_dpo_and_smoothing_reaches_its_own_minimum() -> None:
    vectors = sums(100)
    assert bits(dpo(*vectors, label_smoothing=0.0)) == bits(dpo(*vectors))
    assert bits(dpo(*vectors, label_smoothing=0.1)) != bits(dpo(*vectors))
    h = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)  # σ(h) = 1 − ε
    zero = torch.zeros(1)
    dpo(h, zero, zero, zero, beta=1.0, label_smoothing=0.1).backward()
    assert h.grad is not None and abs(h.grad.item()) < 1e-7


def test_simpo_of_equal_pairs_knows_the_margin() -> None:
    x = means(8)[0]
    assert simpo(x, x, 2.0, 1.0).item() == pytest.approx(math.log(1 + math.e), rel=1e-6)
    assert bits(simpo(x, x, 2.0, 0.0)) == bits(torch.tensor(math.log(2)))


def test_orpo_takes_another_nll_term() -> None:
    chosen, rejected = means(16)
    nll = torch.tensor(1.25, requires_grad=True)
    loss = orpo(chosen, rejected, 0.3, 10.0, nll=nll)
    loss.backward()
    assert bits(loss) == bits(nll + 0.3 * odds_ratio(chosen, rejected, 10.0))
    assert nll.grad is not None and nll.grad.item() == 1.0


@pytest.mark.parametrize("chosen", [-1e-6, -1e-4, -0.3, -0.7, -5.0, -80.0, -1e4])
def test_odds_ratio_keeps_float32_precision(chosen: float) -> None:
    x, y = torch.tensor([chosen]), torch.tensor([-0.5])
    exact = x.double() - torch.log(-torch.expm1(x.double())) - (-0.5 - math.log(-math.expm1(-0.5)))
    expected = torch.nn.functional.softplus(-exact).item()
    assert odds_ratio(x, y).item() == pytest.approx(expected, rel=2e-6)


def test_negative_control_plain_odds_are_imprecise_near_certainty() -> None:
    x = torch.tensor([-1e-6])
    plain, ours = torch.log(1 - torch.exp(x)), torch.log(-torch.expm1(x))
    assert abs(ours.item() - math.log(1e-6)) < 1e-5 < abs(plain.item() - math.log(1e-6))


EXTREMES = torch.tensor([-1e4, -1e3, -88.0, -1e-30, 0.0, 88.0, 1e3, 1e4])


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: dpo(x, y, y, x),
        lambda x, y: dpo(x, y, y, x, label_smoothing=0.1),
        lambda x, y: ipo(x, y, y, x),
        simpo,
        lambda x, y: odds_ratio(-x.abs(), -y.abs()),
        lambda x, y: orpo(-x.abs(), -y.abs()),
        lambda x, y: kto(x, y, coins(len(x), 1), 0.5),
        lambda x, y: reward_ranking(torch.stack([x, y], 1).reshape(-1), ranking_pairs([[[0], [1]]] * len(x)), None, 0.01),
        lambda x, y: ppo_value(x, y, y, torch.ones(len(x), dtype=torch.bool)),
    ],
    ids=["dpo", "cdpo", "ipo", "simpo", "odds_ratio", "orpo", "kto", "reward_ranking", "ppo_value"],
)
def test_extreme_inputs_stay_finite(loss: Callable[..., Tensor]) -> None:
    for x, y in itertools.product(EXTREMES, EXTREMES):
        vectors = [x[None].clone().requires_grad_(), y[None].clone().requires_grad_()]
        result = loss(*vectors)
        result.backward()
        assert result.isfinite(), (x, y)
        assert all(v.grad is not None and bool(v.grad.isfinite().all()) for v in vectors), (x, y)


def test_kto_z0_is_the_clamped_mean_of_the_mismatched_pairs() -> None:
    logps, ref = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True), torch.tensor([-2.0, -2.0, -5.0])
    assert kto_z0(logps, ref) == 1.0
    assert kto_z0(ref, logps) == 0.0
    results = set()
    for count in (1, 2, 3, 4):
        with threads(count):
            results.add(kto_z0(*sums(70_000)[::2]) + kto_z0(*sums(70_000)[2::-2]))
    assert len(results) == 1 and results != {0.0}


def test_kto_at_the_reference_point_is_half_the_weight() -> None:
    x = torch.tensor([-3.0, -4.0])
    assert kto(x + 0.5, x, torch.tensor([True, False]), 0.5, 0.1, 1.5, 1.0, 1.0).item() == pytest.approx(1.25, rel=1e-6)


def test_preference_metrics_are_trls() -> None:
    metrics = preference_metrics(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 5.0, 1.0]))
    assert metrics == {
        "rewards/chosen": 2.5,
        "rewards/rejected": 2.0,
        "rewards/accuracies": 0.5,  # the tie is no win
        "rewards/margins": 0.5,
    }
    logps = torch.tensor([-2.0], requires_grad=True)
    reward = implicit_rewards(logps, torch.tensor([-3.0]), 0.5)
    assert reward.tolist() == [0.5] and not reward.requires_grad


# ---- rankings

RANKINGS = [[[0], [2, 1], [3]], [[0], [1]], [[2], [0], [1]], [[1, 3], [0, 2]]]


def test_ranking_pairs_are_all_pairs_of_different_rank() -> None:
    pairs = ranking_pairs(RANKINGS)
    found = list(zip(pairs.winners.tolist(), pairs.losers.tolist(), strict=True))
    assert found[:5] == [(0, 2), (0, 1), (0, 3), (2, 3), (1, 3)]
    assert found[5:9] == [(4, 5), (8, 6), (8, 7), (6, 7)]
    assert found[9:] == [(10, 9), (10, 11), (12, 9), (12, 11)]
    # The tie (2, 1) is dropped but counts in C(4, 2) = 6.
    assert pairs.weights.tolist() == [1 / 6] * 5 + [1.0] + [1 / 3] * 3 + [1 / 6] * 4
    assert pairs.responses == 13 and pairs.prompts == 4


ranked_prompts = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=6), min_size=1, max_size=9)


def grouped(ranks: Sequence[int]) -> list[list[int]]:
    """Groups of equal rank, the best (the lowest) first; the last response is put behind all."""
    ranks = [*ranks[:-1], 9]
    return [[i for i, rank in enumerate(ranks) if rank == wanted] for wanted in sorted(set(ranks))]


@few
@given(ranked_prompts, st.booleans())
def test_k_wise_loss_is_the_weighted_sum_of_its_pairs(prompts: list[list[int]], with_margin: bool) -> None:
    rankings = [grouped(ranks) for ranks in prompts]
    rewards = normal(sum(map(len, prompts)), 1, 0.0, 2.0).double()
    pairs = ranking_pairs(rankings)
    margin = normal(len(pairs.winners), 2, 1.0, 0.5).double() if with_margin else None
    expected, first, p = 0.0, 0, 0
    for groups in rankings:
        count = sum(map(len, groups))
        for g, group in enumerate(groups):
            for w, later in itertools.product(group, groups[g + 1 :]):
                for x in later:
                    won, lost = rewards[first + w].item(), rewards[first + x].item()
                    lead = won - lost - (0.0 if margin is None else margin[p].item())
                    expected += (-math.log(sigma(lead)) + 0.02 * (won + lost) ** 2) / math.comb(count, 2)
                    p += 1
        first += count
    assert p == len(pairs.winners)
    loss = reward_ranking(rewards, pairs, margin, centering=0.02)
    assert loss.item() == pytest.approx(expected / len(prompts), rel=1e-12)
    assert reward_ranking(rewards, pairs, margin, 0.02, 3.0).item() == pytest.approx(expected / 3, rel=1e-12)


def test_plain_pairs_are_trls_loss() -> None:
    chosen, rejected, margin = (normal(64, seed, 0.0, 1.0) for seed in (1, 2, 3))
    rewards = torch.stack([chosen, rejected], 1).reshape(-1)
    lead = chosen.double() - rejected.double()
    trl = -torch.nn.functional.logsigmoid(lead - margin).mean() + 0.01 * torch.mean((chosen + rejected).double() ** 2)
    assert reward_ranking(rewards, ranking_pairs([[[0], [1]]] * 64), margin, 0.01).item() == pytest.approx(trl.item(), rel=1e-6)


def test_gradcheck_of_rankings() -> None:
    rewards = normal(13, 1, 0.0, 1.0).double().requires_grad_()
    pairs = ranking_pairs(RANKINGS)
    margin = normal(13, 2, 0.0, 1.0).double()
    assert torch.autograd.gradcheck(lambda x: reward_ranking(x, pairs, margin, 0.1, 3.0), [rewards])


def ranking_gradients(
    rewards: Tensor, rankings: Sequence[list[list[int]]], cuts: Sequence[int], normalise: bool = True
) -> bytes:
    gradients, first = [], 0
    for begin, end in itertools.pairwise(cuts):
        pairs = ranking_pairs(rankings[begin:end])
        part = rewards[first : first + pairs.responses].detach().requires_grad_()
        first += pairs.responses
        reward_ranking(part, pairs, None, 0.01, 100.0 if normalise else None).backward()
        assert part.grad is not None
        gradients.append(part.grad)
    return bits(torch.cat(gradients))


def test_bits_of_rankings_do_not_depend_on_cut_or_threads() -> None:
    rankings = [*RANKINGS, [[8], [3, 1], [0, 2], [4], [7, 5, 6]]] * 1200  # 52,800 pairs, more than torch gives to one thread
    count = sum(len(group) for groups in rankings for group in groups)
    rewards, n = normal(count, 1, 0.0, 2.0), len(rankings)
    with threads(1):
        whole = ranking_gradients(rewards, rankings, [0, n])
    for threads_count in (2, 3, 4):
        with threads(threads_count):
            assert ranking_gradients(rewards, rankings, [0, n]) == whole
            assert ranking_gradients(rewards, rankings, [0, 1, 3, 17, 5555, n]) == whole
    assert ranking_gradients(rewards, rankings, [0, 17, n], normalise=False) != whole  # the control: no common denominator


# ---- tokens


def test_ratio_of_a_policy_with_itself_is_exactly_1() -> None:
    logprobs, _, advantages, mask = policy_tokens(500)
    advantages = torch.round(advantages * 8) / 8  # sums without rounding
    leaf = logprobs.clone().requires_grad_()
    loss = ppo_policy(leaf, logprobs, advantages, mask, denominator=1.0)
    loss.backward()
    assert loss.item() == -advantages[mask].sum().item()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.where(mask, -advantages, 0))


@pytest.mark.parametrize(
    ("delta", "advantage", "loss", "gradient"),
    [
        (0.5, 1.0, -1.2, 0.0),  # already more likely than the clip allows
        (-0.5, -1.0, 0.8, 0.0),  # already less likely
        (0.5, -1.0, math.exp(0.5), math.exp(0.5)),  # gone the wrong way: never clipped
        (-0.5, 1.0, -math.exp(-0.5), -math.exp(-0.5)),
        (1e4, 1.0, -1.2, 0.0),  # exp overflows, the minimum does not
        (-1e4, -1.0, 0.8, 0.0),
        (-1e4, 1.0, 0.0, 0.0),
        (0.3, 0.0, 0.0, 0.0),
    ],
)
def test_clipping(delta: float, advantage: float, loss: float, gradient: float) -> None:
    x = torch.tensor([delta], requires_grad=True)
    result = ppo_policy(x, torch.zeros(1), torch.tensor([advantage]), torch.tensor([True]))
    result.backward()
    assert result.item() == pytest.approx(loss, rel=1e-6)
    assert x.grad is not None and x.grad.item() == pytest.approx(gradient, rel=1e-6)


@pytest.mark.parametrize("loss", [ppo_policy, ppo_value])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_the_mask_leaves_out_does_not_matter(loss: Callable[..., Tensor], bad: float) -> None:
    *vectors, mask = policy_tokens(50)
    results = []
    for outside in (0.0, bad):
        x, *rest = (torch.where(mask, v, outside) for v in vectors)
        x.requires_grad_()
        result = loss(x, *rest, mask)
        result.backward()
        assert x.grad is not None
        results.append(bits(result, x.grad))
    assert results[0] == results[1]


def test_k3_is_never_negative_and_exactly_0_between_equals() -> None:
    logprobs, ref, *_ = policy_tokens(10_000)
    assert float(kl_estimate(logprobs, ref, "k3").min()) >= 0
    near = logprobs * (1 + 1e-5)
    assert float(kl_estimate(logprobs, near, "k3").min()) > -1e-12
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(logprobs, logprobs, kind).tolist() == [0.0] * 10_000


# ---- errors

A, B, M = torch.zeros(3), torch.zeros(4), torch.ones(3, dtype=torch.bool)
E = torch.zeros(0)
PAIR = ranking_pairs([[[0], [1]]])
SHAPE = " must have the shape of "


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy(A, M, 0), "denominator must be positive, but it is 0: no token counts in this step"),
        (lambda: cross_entropy(A, M, math.nan), "denominator must be positive, but it is nan"),
        (lambda: dpo(A, A, A, A, denominator=0), "denominator must be positive, but it is 0: no sequence counts in this step"),
        (lambda: ppo_policy(A, A, A, ~M), "denominator must be positive, but it is 0: no token counts in this step"),
        (lambda: ppo_value(A, A, A, ~M), "denominator must be positive, but it is 0: no token counts in this step"),
        (lambda: kto(A, A, M, 0.0, denominator=-1), "denominator must be positive, but it is -1"),
        (lambda: dpo(A, B, A, A), f"rejected{SHAPE}chosen, [3], but it has [4]"),
        (lambda: dpo(A, A, A, B), f"ref_rejected{SHAPE}chosen, [3], but it has [4]"),
        (lambda: dpo(A, A, A[:1], A), f"ref_chosen{SHAPE}chosen, [3], but it has [1]"),
        (lambda: dpo(E, E, E, E), "chosen must be a vector of at least one entry, but its shape is [0]"),
        (lambda: dpo(A[None], A[None], A, A), "chosen must be a vector of at least one entry, but its shape is [1, 3]"),
        (lambda: dpo(A, A, A, A, beta=0), "beta must be positive, but it is 0"),
        (lambda: dpo(A, A, A, A, label_smoothing=0.5), "label_smoothing must be at least 0 and below 0.5, but it is 0.5"),
        (lambda: dpo(A, A, A, A, label_smoothing=-0.1), "label_smoothing must be at least 0 and below 0.5, but it is -0.1"),
        (lambda: ipo(A, A, B, A), f"ref_chosen{SHAPE}chosen, [3], but it has [4]"),
        (lambda: ipo(A, A, A, A, beta=-1), "beta must be positive, but it is -1"),
        (lambda: simpo(A, B), f"rejected{SHAPE}chosen, [3], but it has [4]"),
        (lambda: simpo(A, A, beta=0), "beta must be positive, but it is 0"),
        (lambda: simpo(A, A, gamma=-1), "gamma must not be negative, but it is -1"),
        (lambda: odds_ratio(A, B), f"rejected{SHAPE}chosen, [3], but it has [4]"),
        (lambda: orpo(A, B), f"rejected{SHAPE}chosen, [3], but it has [4]"),
        (lambda: orpo(A, A, beta=0), "beta must be positive, but it is 0"),
        (lambda: orpo(A, A, nll=A), "nll must be a scalar, but its shape is [3]"),
        (lambda: kto(A, B, M, 0.0), f"ref_logps{SHAPE}logps, [3], but it has [4]"),
        (lambda: kto(A, A, M[:2], 0.0), f"desirable{SHAPE}logps, [3], but it has [2]"),
        (lambda: kto(A, A, A, 0.0), "desirable must be bool, but it is torch.float32"),
        (lambda: kto(A, A, M, -0.1), "z0 must not be negative, but it is -0.1"),
        (lambda: kto(A, A, M, 0.0, beta=0), "beta must be positive, but it is 0"),
        (lambda: kto(A, A, M, 0.0, desirable_weight=-1), "desirable_weight must not be negative, but it is -1"),
        (lambda: kto(A, A, M, 0.0, undesirable_weight=-1), "undesirable_weight must not be negative, but it is -1"),
        (lambda: kto_z0(A, B), f"ref_logps{SHAPE}logps, [3], but it has [4]"),
        (lambda: kto_z0(E, E), "logps must be a vector of at least one entry, but its shape is [0]"),
        (lambda: implicit_rewards(A, B), f"ref_logps{SHAPE}logps, [3], but it has [4]"),
        (lambda: implicit_rewards(A, A, 0), "beta must be positive, but it is 0"),
        (lambda: preference_metrics(A, B), f"rejected{SHAPE}chosen, [3], but it has [4]"),
        (lambda: ranking_pairs([]), "rankings is empty: there is no prompt"),
        (lambda: ranking_pairs([[[0], [1]], [[0], [2]]]), "ranking 1 must hold each of 0 .. K - 1 once, but it is [[0], [2]]"),
        (lambda: ranking_pairs([[[0], [0, 1]]]), "ranking 0 must hold each of 0 .. K - 1 once, but it is [[0], [0, 1]]"),
        (
            lambda: ranking_pairs([[[1, 0, 2]]]),
            "ranking 0 prefers no response to another, so there is nothing to learn from it",
        ),
        (lambda: reward_ranking(A, PAIR), "there are 3 rewards, but the rankings are of 2 responses"),
        (lambda: reward_ranking(A[None, :2], PAIR), "rewards must be a vector of at least one entry, but its shape is [1, 2]"),
        (lambda: reward_ranking(A[:2], PAIR, A), "margin must have one entry per pair, [1], but it has [3]"),
        (lambda: reward_ranking(A[:2], PAIR, None, -1), "centering must not be negative, but it is -1"),
        (lambda: reward_ranking(A[:2], PAIR, denominator=0), "denominator must be positive, but it is 0"),
        (lambda: ppo_policy(A, A, B, M), f"advantages{SHAPE}logprobs, [3], but it has [4]"),
        (lambda: ppo_policy(A, A, A, M[:1]), f"mask{SHAPE}logprobs, [3], but it has [1]"),
        (lambda: ppo_policy(A, A, A, A), "mask must be bool, but it is torch.float32"),
        (lambda: ppo_policy(A, A, A, M, clip_range=0), "clip_range must be positive, but it is 0"),
        (lambda: ppo_value(A, B, A, M), f"old_values{SHAPE}values, [3], but it has [4]"),
        (lambda: ppo_value(A, A, A, M, clip_range_value=0), "clip_range_value must be positive, but it is 0"),
        (lambda: kl_estimate(A, B), f"ref_logprobs{SHAPE}logprobs, [3], but it has [4]"),
        (lambda: kl_estimate(A, A, "k4"), "kind must be k1, k2 or k3, but it is 'k4'"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_ranking_metrics_are_trls() -> None:
    """Pairs 2 > 1, 2 > 0, and of the second prompt one of equal rewards, which is no win; 1 and 0 are tied and no pair."""
    rewards = torch.tensor([1.0, 5.0, 3.0, 2.0, 2.0], requires_grad=True)
    assert ranking_metrics(rewards, ranking_pairs([[[2], [1, 0]], [[1], [0]]])) == {
        "accuracy": pytest.approx(1 / 3),
        "margin": 0.0,
        "mean_reward": 2.6,
        "min_reward": 1.0,
        "max_reward": 5.0,
    }
    with pytest.raises(ValueError, match="there are 5 rewards, but the rankings are of 2 responses"):
        ranking_metrics(rewards, PAIR)


def test_ranking_pairs_are_a_value() -> None:
    pairs = ranking_pairs([[[1], [0]]])
    assert isinstance(pairs, RankingPairs) and pairs.winners.dtype == torch.int32
    with pytest.raises(AttributeError):
        pairs.prompts = 2
