"""Every loss, a pure function with its formula and its paper.

Three rules keep the promises: element-wise only +, -, x, /, min, max, where, exp, expm1, log, logsigmoid; every sum is the
engine's; statistics of a whole optimizer step are computed once and passed in (``denominator=``). So the gradient of an
element is the same bits for any cut of a step into micro-batches and for any number of threads. torch's sigmoid and softplus
are not exact in this sense: σ(x) is written exp(logsigmoid(x)).

σ is the logistic function. P counts pairs or sequences, N tokens. What works on sequences takes the vectors that
``batch.sum`` (log-prob of a completion) or ``batch.mean`` (per token) return. ``denominator`` is what the sum is divided by:
the count over the whole optimizer step; None stands for the count in the call itself, right where the step is one call.
Every function raises ValueError for vectors that are empty or do not fit, options outside their range, and a denominator
that is not positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tutelage import kernels
from tutelage.batch import PackedBatch
from tutelage.user_code import load_function

_ALMOST_CERTAIN = -(2.0**-24)
"""log of 1 − 2^-24, the largest float32 below 1."""


def cross_entropy(logprobs: Tensor, mask: Tensor, denominator: float) -> Tensor:
    """Mean negative log-likelihood: −Σ_mask logp / denominator. Pretraining and SFT.

    Args:
        logprobs: [N], from ``model.score``.
        mask: bool [N], the tokens that count.
        denominator: the number of masked tokens in the whole optimizer step, over all its micro-batches.

    Raises:
        ValueError: if the denominator is not positive (an all-masked batch).
    """
    return -_mean(logprobs, denominator, mask)


# ---- pairs: a chosen and a rejected completion of one prompt


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: float | None = None,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    mean of −(1 − ε) log σ(h) − ε log σ(−h), h = β [(chosen − ref_chosen) − (rejected − ref_rejected)].

    ε = ``label_smoothing`` > 0 is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"): a label is taken
    to be wrong with probability ε. With the policy equal to the reference h is exactly 0 and the loss of a pair log 2.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [P], log-probs of whole completions: ``batch.sum``.
        beta: > 0, how dear it is to leave the reference.
        label_smoothing: ε, 0 ≤ ε < 0.5.
        denominator: pairs in the optimizer step.
    """
    _check_positive(beta=beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, but it is {label_smoothing}")
    h = beta * _log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected)
    return _mean((label_smoothing - 1) * logsigmoid(h) - label_smoothing * logsigmoid(-h), denominator)


def ipo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    denominator: float | None = None,
) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17; beta is its τ).

    mean of (h − 1/(2β))², h = (chosen − ref_chosen) − (rejected − ref_rejected).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [P]: ``batch.mean`` as in TRL (the authors' own experiments average over
            the tokens), so that long and short completions share one target; ``batch.sum`` for the paper's formula to the
            letter. All four of one kind.
        beta: > 0.
        denominator: pairs in the optimizer step.
    """
    _check_positive(beta=beta)
    distance = _log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)
    return _mean(distance * distance, denominator)


def simpo(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0, denominator: float | None = None) -> Tensor:
    """Simple preference optimisation, without a reference (Meng et al. 2024, arXiv 2405.14734, eq. 6).

    mean of −log σ(β (chosen − rejected) − γ).

    Args:
        chosen, rejected: [P], mean log-probs per token: ``batch.mean``.
        beta: > 0.
        gamma: ≥ 0, the margin by which the chosen one has to win.
        denominator: pairs in the optimizer step.
    """
    _check_positive(beta=beta)
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, but it is {gamma}")
    _check_shapes(chosen=chosen, rejected=rejected)
    return _mean(-logsigmoid(beta * (chosen - rejected) - gamma), denominator)


def odds_ratio(chosen: Tensor, rejected: Tensor, denominator: float | None = None) -> Tensor:
    """The odds-ratio term of ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 7), without its factor λ.

    mean of −log σ(log odds(chosen) − log odds(rejected)), log odds(x) = x − log(1 − exp x).

    A probability above 1 − 2^-24, the largest float32 below 1, counts as that: at 1 the odds are infinite.

    Args:
        chosen, rejected: [P], mean log-probs per token, ≤ 0: ``batch.mean``.
        denominator: pairs in the optimizer step.
    """
    _check_shapes(chosen=chosen, rejected=rejected)
    chosen, rejected = (torch.clamp(x, max=_ALMOST_CERTAIN) for x in (chosen, rejected))
    # −expm1(x) is 1 − exp(x) without cancellation near 0; far from 0 its rounding is below that of x, which it is added to.
    log_odds = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    return _mean(-logsigmoid(log_odds), denominator)


def orpo(
    chosen: Tensor, rejected: Tensor, beta: float = 0.1, denominator: float | None = None, nll: Tensor | None = None
) -> Tensor:
    """Odds-ratio preference optimisation, without a reference (Hong et al. 2024, arXiv 2403.07691, eq. 6).

    nll + β · ``odds_ratio(chosen, rejected)``; by default nll is the paper's, the mean over pairs of −chosen (eq. 2: each
    completion's mean over its tokens).

    TRL (1.16) takes the token mean instead, over prompt and completion of the chosen sequences; pass it to agree with it::

        nll = cross_entropy(logprobs, mask, tokens_in_step)  # the mask of the chosen sequences, prompts included
        loss = orpo(chosen, rejected, beta, pairs_in_step, nll=nll)

    Args:
        chosen, rejected: [P], mean log-probs per token, ≤ 0: ``batch.mean``.
        beta: > 0, the paper's λ.
        denominator: pairs in the optimizer step.
        nll: a scalar, already divided by its own denominator.
    """
    _check_positive(beta=beta)
    _check_shapes(chosen=chosen, rejected=rejected)
    if nll is None:
        nll = -_mean(chosen, denominator)
    elif nll.dim() != 0:
        raise ValueError(f"nll must be a scalar, but its shape is {list(nll.shape)}")
    return nll + beta * odds_ratio(chosen, rejected, denominator)


# ---- single completions, marked as desirable or not


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    z0: float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    denominator: float | None = None,
) -> Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7).

    mean of λ_D (1 − σ(β (r − z0))) where desirable, λ_U (1 − σ(β (z0 − r))) elsewhere, r = logps − ref_logps.

    Args:
        logps, ref_logps: [P], log-probs of whole completions: ``batch.sum``.
        desirable: bool [P].
        z0: ≥ 0, ``kto_z0`` of the whole optimizer step.
        beta: > 0.
        desirable_weight, undesirable_weight: λ_D and λ_U, ≥ 0. The paper wants λ_D n_D / (λ_U n_U) in [1, 4/3] for n_D
            desirable and n_U undesirable examples.
        denominator: completions in the optimizer step, of both kinds.
    """
    _check_positive(beta=beta)
    for name, value in {"z0": z0, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, but it is {value}")
    _check_shapes(logps=logps, ref_logps=ref_logps, desirable=desirable)
    _check_bool(desirable=desirable)
    gain = beta * ((logps - ref_logps) - z0)
    weight = torch.where(desirable, logps.new_tensor(desirable_weight), logps.new_tensor(undesirable_weight))
    return _mean(weight * torch.exp(logsigmoid(torch.where(desirable, -gain, gain))), denominator)


def kto_z0(logps: Tensor, ref_logps: Tensor) -> float:
    """KTO's reference point: max(0, mean of logps − ref_logps) over mismatched pairs; an estimate of KL(policy ‖ reference).

    A number, so that no gradient flows through it. TRL's mismatch: prompt i with the completion of example i − 1.

    Args:
        logps, ref_logps: [P], log-probs of whole completions y_j after prompts x_i, j ≠ i, over the whole optimizer step.
    """
    _check_shapes(logps=logps, ref_logps=ref_logps)
    return max(0.0, kernels.total((logps - ref_logps).double()).item() / logps.numel())


# ---- what is logged


def implicit_rewards(logps: Tensor, ref_logps: Tensor, beta: float = 0.1) -> Tensor:
    """[P]: β (logps − ref_logps), the reward that a policy trained by DPO or KTO stands for (arXiv 2305.18290, eq. 5)."""
    _check_positive(beta=beta)
    _check_shapes(logps=logps, ref_logps=ref_logps)
    return beta * (logps - ref_logps).detach()


def preference_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """TRL's figures of the rewards [P] of pairs: means over all pairs given; an equal pair counts as wrong.

    Returns:
        "rewards/chosen", "rewards/rejected", "rewards/accuracies" (share with chosen > rejected), "rewards/margins".
    """
    _check_shapes(chosen=chosen, rejected=rejected)
    columns = {
        "rewards/chosen": chosen.detach().double(),
        "rewards/rejected": rejected.detach().double(),
        "rewards/accuracies": (chosen > rejected).double(),
        "rewards/margins": chosen.detach().double() - rejected.detach().double(),
    }
    return {name: _mean(column, None).item() for name, column in columns.items()}


# ---- reward models


@dataclass(frozen=True)
class RankingPairs:
    """The comparisons of a micro-batch of prompts, from ``ranking_pairs``.

    Attributes:
        winners, losers: int32 [P], positions in the vector of rewards.
        weights: float64 [P], 1 / C(K, 2), K being the number of responses of the pair's prompt.
        responses: R, over all prompts.
        prompts: the number of prompts.
    """

    winners: Tensor
    losers: Tensor
    weights: Tensor
    responses: int
    prompts: int


def ranking_pairs(rankings: Sequence[Sequence[Sequence[int]]]) -> RankingPairs:
    """All pairs of different rank, prompt after prompt.

    A prompt of K responses gives C(K, 2) pairs less the ties, each of weight 1 / C(K, 2): ties are dropped but still count in
    the normaliser, so a pair weighs the same beside ties as without them, and a prompt with ties weighs less.

    Args:
        rankings: for each prompt the groups of its responses, the best first; a group holds responses that tie:
            ``[[0], [2, 1], [3]]``. The responses of a prompt lie one after another in the vector of rewards. A plain pair is
            ``[[0], [1]]``: chosen, rejected.

    Raises:
        ValueError: naming the ranking that is not of each of 0 .. K − 1 once, or whose responses all tie.
    """
    if not len(rankings):
        raise ValueError("rankings is empty: there is no prompt")
    winners: list[int] = []
    losers: list[int] = []
    weights: list[float] = []
    first = 0
    for i, groups in enumerate(rankings):
        responses = [response for group in groups for response in group]
        count = len(responses)
        if sorted(responses) != list(range(count)):
            raise ValueError(f"ranking {i} must hold each of 0 .. K - 1 once, but it is {[list(group) for group in groups]}")
        pairs = [
            (winner, loser)
            for g, group in enumerate(groups)
            for winner in group
            for later in groups[g + 1 :]
            for loser in later
        ]
        if not pairs:
            raise ValueError(f"ranking {i} prefers no response to another, so there is nothing to learn from it: drop it")
        winners += [first + winner for winner, _ in pairs]
        losers += [first + loser for _, loser in pairs]
        weights += [1 / math.comb(count, 2)] * len(pairs)
        first += count
    return RankingPairs(
        torch.tensor(winners, dtype=torch.int32),
        torch.tensor(losers, dtype=torch.int32),
        torch.tensor(weights, dtype=torch.float64),
        first,
        len(rankings),
    )


def reward_ranking(
    rewards: Tensor,
    ranking: RankingPairs,
    margin: Tensor | None = None,
    centering: float = 0.0,
    denominator: float | None = None,
) -> Tensor:
    """The K-wise loss of InstructGPT's reward model (Ouyang et al. 2022, arXiv 2203.02155, eq. 1); K = 2 is the pairwise one.

    Σ over pairs of 1/C(K, 2) · [−log σ(r_w − r_l − margin) + c (r_w + r_l)²] / denominator.

    K forward passes a prompt, however many pairs. A reward's gradient is two sums, over the pairs that it wins and over those
    that it loses, each in the order of the pairs.

    Args:
        rewards: [R], ``batch.last(model.values(batch))``: the responses of each prompt one after another.
        ranking: ``ranking_pairs`` of the same prompts.
        margin: [P] or None, by how much each pair's winner should lead (Touvron et al. 2023, arXiv 2307.09288, eq. 2).
        centering: c ≥ 0, draws rewards to a mean of 0 (Eisenstein et al. 2023, arXiv 2312.09244; TRL's
            ``center_rewards_coefficient``).
        denominator: prompts in the optimizer step.
    """
    _check_responses(rewards, ranking)
    if not centering >= 0:
        raise ValueError(f"centering must not be negative, but it is {centering}")
    won, lost = (kernels.embedding(ids, rewards[:, None])[:, 0] for ids in (ranking.winners, ranking.losers))
    lead = won - lost
    if margin is not None:
        if margin.shape != lead.shape:
            raise ValueError(f"margin must have one entry per pair, {list(lead.shape)}, but it has {list(margin.shape)}")
        lead = lead - margin
    losses = -logsigmoid(lead)
    if centering:
        both = won + lost
        losses = losses + centering * (both * both)
    return _mean(ranking.weights.to(losses.dtype) * losses, ranking.prompts if denominator is None else denominator)


def ranking_metrics(rewards: Tensor, ranking: RankingPairs) -> dict[str, float]:
    """TRL's figures of a reward model.

    Args:
        rewards, ranking: as ``reward_ranking``'s.

    Returns:
        "accuracy": the share of the pairs whose winner has the higher reward; equal rewards count as wrong, responses that
        are tied in the ranking make no pair. "margin": mean lead of the winners. "mean_reward", "min_reward", "max_reward":
        of all responses.
    """
    _check_responses(rewards, ranking)
    exact = rewards.detach().double()
    lead = exact[ranking.winners.long()] - exact[ranking.losers.long()]
    return {
        "accuracy": _mean((lead > 0).double(), None).item(),
        "margin": _mean(lead, None).item(),
        "mean_reward": _mean(exact, None).item(),
        "min_reward": exact.min().item(),
        "max_reward": exact.max().item(),
    }


# ---- tokens: policy gradients


def ppo_policy(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    denominator: float | None = None,
) -> Tensor:
    """The clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7), also that of GRPO.

    −Σ_mask min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) / denominator, ρ = exp(logprobs − old_logprobs).

    Args:
        logprobs: [N], of the policy that learns, at the temperature of the rollout.
        old_logprobs: [N], of the rollout. ρ is exactly 1 where the two are equal.
        advantages: [N], at the action tokens.
        mask: bool [N]. What it leaves out may be anything, NaN too.
        clip_range: ε > 0.
        denominator: masked tokens in the optimizer step.
    """
    _check_positive(clip_range=clip_range)
    _check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    delta, advantages = _inside(mask, logprobs - old_logprobs), _inside(mask, advantages)
    low, high = 1 - clip_range, 1 + clip_range
    with torch.no_grad():
        ratio = torch.exp(delta)
        clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    # Where the minimum is the clipped term nothing depends on ρ. It is left out before exp: 0 · ∞ would be NaN in the backward.
    bound = torch.where(advantages > 0, delta.new_tensor(high), delta.new_tensor(low))
    chosen = torch.where(clipped, bound, torch.exp(torch.where(clipped, 0, delta)))
    return -_mean(chosen * advantages, denominator, mask)


def ppo_value(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range_value: float = 0.2,
    denominator: float | None = None,
) -> Tensor:
    """PPO's clipped value loss (Huang et al. 2022, "The 37 implementation details of PPO", detail 9; arXiv 2403.17031).

    ½ Σ_mask max((v − R)², (clip(v, v_old − ε, v_old + ε) − R)²) / denominator.

    Args:
        values, old_values: [N], at the tokens whose actions they judge: ``baselines(critic.values(batch), batch)``.
        returns: [N], as ``gae`` gives them.
        mask: bool [N]. What it leaves out may be anything, NaN too.
        clip_range_value: ε > 0.
        denominator: masked tokens in the optimizer step.
    """
    _check_positive(clip_range_value=clip_range_value)
    _check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns = (_inside(mask, x) for x in (values, old_values, returns))
    free = values - returns
    near = torch.clamp(values, old_values - clip_range_value, old_values + clip_range_value) - returns
    return _mean(0.5 * torch.maximum(free * free, near * near), denominator, mask)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Estimates of KL(policy ‖ reference) from the policy's own samples (Schulman 2020, "Approximating KL divergence").

    With d = logprobs − ref_logprobs: k1 = d, unbiased; k2 = d²/2, biased, of low variance; k3 = exp(−d) − 1 + d, unbiased and
    never negative. As a loss term take k3 (GRPO, arXiv 2402.03300, eq. 4) or k2: the gradient of k1 is 0 on average.

    Args:
        logprobs, ref_logprobs: [N] tokens or [P] sums.

    Returns:
        One number for each entry.
    """
    _check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * (d * d)
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kind must be k1, k2 or k3, but it is {kind!r}")


def adaptive_kl_coef(coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next weight of the KL penalty (Ziegler et al. 2019, arXiv 1909.08593, § 2.2).

    coef · (1 + e · episodes / horizon), e = clip(kl / target − 1, −0.2, 0.2).

    Args:
        kl: what was measured, the mean over the episodes of the KL of a whole completion, in nats.
        target: > 0, what it should be.
        horizon: > 0, over how many episodes the weight adapts.
        episodes: of the optimizer step.
    """
    _check_positive(target=target, horizon=horizon)
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


# ---- advantages: data, without gradients, computed once for a whole optimizer step


def baselines(values: Tensor, batch: PackedBatch) -> Tensor:
    """[N]: ``values`` moved to the actions that they judge: ``values[i - 1]`` at i, 0 at each sequence's first token.

    A value is read after its token, so what is expected before ``tokens[i]`` is chosen stands at i − 1. Differentiable.
    """
    _check_shapes(tokens=batch.tokens, values=values)
    first = torch.zeros_like(batch.tokens, dtype=torch.bool)
    first[batch.cu_seqlens[:-1].long()] = True
    return torch.where(first, 0, torch.cat([values[:1], values[:-1]]))


def gae(rewards: Tensor, values: Tensor, batch: PackedBatch, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16), each sequence by itself.

    Over the masked tokens i of a sequence, the actions, from the last one back: b_i = values[i − 1] is the baseline,
    δ_i = rewards[i] + γ b_next − b_i, A_i = δ_i + γ λ A_next, returns_i = A_i + b_i. After the last action b and A are 0: a
    sequence that was cut off is worth what its rewards say.

    Args:
        rewards: [N], what each action earns. Read at masked tokens only.
        values: [N], read after each token: ``critic.values(batch)``.
        batch: its ``completion_mask`` tells the actions; what lies between two of them (a user's turn) is stepped over.
        gamma, lam: γ and λ, 0 .. 1.

    Returns:
        advantages, returns: [N] of the type of ``values``, 0 outside the mask; without gradient. ``returns`` is what
        ``baselines(values, batch)`` should be.

    Raises:
        ValueError: naming the sequence whose first token is masked: nothing comes before it, so no action is it.
    """
    for name, factor in {"gamma": gamma, "lam": lam}.items():
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} must be in 0 .. 1, but it is {factor}")
    _check_shapes(tokens=batch.tokens, rewards=rewards, values=values)
    # One chain per sequence, in double precision: nothing depends on what else is in the batch.
    reward, value = (x.detach().double().tolist() for x in (rewards, values))
    mask, bounds = batch.completion_mask.tolist(), batch.cu_seqlens.tolist()
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for s in range(len(batch)):
        if mask[bounds[s]]:
            raise ValueError(f"the first token of sequence {s} is in completion_mask, but nothing comes before it to act on")
        following, advantage = 0.0, 0.0
        for i in range(bounds[s + 1] - 1, bounds[s], -1):
            if mask[i]:
                baseline = value[i - 1]
                advantage = reward[i] + gamma * following - baseline + gamma * lam * advantage
                advantages[i], returns[i] = advantage, advantage + baseline
                following = baseline
    return values.new_tensor(advantages), values.new_tensor(returns)


def grpo_advantages(rewards: Tensor, group_size: int, scale: Literal["group", "none"] = "group") -> Tensor:
    """Advantages relative to the other samples of the same prompt (GRPO: Shao et al. 2024, arXiv 2402.03300, § 4.1.2).

    (r − mean) / (std + 1e-4), mean and std (of n − 1, as in TRL) over the group; with ``scale="none"`` r − mean, as Dr. GRPO
    has it (Liu et al. 2025, arXiv 2503.20783), whose ``denominator`` is a constant: completions times their longest length. A
    group of equal rewards gives exactly 0.

    Args:
        rewards: [R], the samples of each prompt one after another.
        group_size: samples a prompt, ≥ 2.

    Returns:
        [R], without gradient.
    """
    groups = _groups(rewards, group_size)
    centred = groups - _sums_of_rows(groups) / group_size
    if scale == "group":
        centred = centred / (torch.sqrt(_sums_of_rows(centred * centred) / (group_size - 1)) + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale must be group or none, but it is {scale!r}")
    return centred.reshape(-1).to(rewards.dtype)


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """r − mean of the other rewards of its group: REINFORCE leave-one-out (Kool et al. 2019; arXiv 2402.14740, eq. 6).

    Arguments and result as for ``grpo_advantages``.
    """
    groups = _groups(rewards, group_size)
    others = (_sums_of_rows(groups) - groups) / (group_size - 1)
    return (groups - others).reshape(-1).to(rewards.dtype)


def mean_std(x: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and standard deviation (of n, as OpenAI's moments) of ``x`` [N] over the mask, for ``whiten``: of a whole step."""
    _check_shapes(x=x, mask=mask)
    _check_bool(mask=mask)
    x = _inside(mask, x.detach().double())
    mean = _mean(x, None, mask)
    return mean.item(), math.sqrt(_mean((x - mean) * (x - mean), None, mask).item())


def whiten(x: Tensor, mask: Tensor, mean: float, std: float, shift_mean: bool = True) -> Tensor:
    """[N]: (x − mean) / (std + 1e-8) on the mask, 0 elsewhere; ``shift_mean=False`` adds the mean again (arXiv 2403.17031).

    Args:
        x: [N], advantages; or rewards, with ``shift_mean=False``.
        mask: bool [N].
        mean, std: ``mean_std`` of the whole optimizer step.
    """
    _check_shapes(x=x, mask=mask)
    white = (_inside(mask, x) - mean) / (std + 1e-8)
    return _inside(mask, white if shift_mean else white + mean)


# ---- a user's own objective


def load_objective(spec: str) -> Callable[..., Tensor]:
    """The objective that ``spec`` names, "module:name" or "file.py:name": ``f(out, batch, columns) -> loss``.

    ``out`` is what ``model.score(batch)`` returns, ``batch`` the PackedBatch of the micro-batch, ``columns`` the loop's own
    vectors by name (reference log-probs, denominator, …); the loss is a scalar with a gradient. The three rules at the top of
    this file are what keeps a run's bits the same for any micro-batch size and number of threads.

    Raises:
        ValueError: see ``load_function``.
    """
    return load_function(spec, "--objective", ("out", "batch", "columns"))


# ---- shared


def _mean(losses: Tensor, denominator: float | None, mask: Tensor | None = None) -> Tensor:
    if denominator is None:
        denominator = losses.numel() if mask is None else int(mask.sum())
    if not denominator > 0:
        what = "sequence" if mask is None else "token"
        raise ValueError(f"denominator must be positive, but it is {denominator}: no {what} counts in this step")
    return kernels.total(losses, mask) / denominator


def _log_ratio_margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    _check_shapes(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _inside(mask: Tensor, x: Tensor) -> Tensor:
    """x on the mask, 0 elsewhere, before anything is computed: a NaN outside would reach the gradient as 0 · NaN."""
    _check_bool(mask=mask)
    return torch.where(mask, x, 0)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    _check_shapes(rewards=rewards)
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(f"group_size must be at least 2 and divide the {rewards.numel()} rewards, but it is {group_size}")
    return rewards.detach().double().view(-1, group_size)  # double: the mean of equal numbers is that number


def _sums_of_rows(x: Tensor) -> Tensor:
    rows, columns = x.shape
    return kernels.total(x.reshape(-1), None, torch.arange(0, rows * columns + 1, columns, dtype=torch.int32))[:, None]


def _check_positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, but it is {value}")


def _check_shapes(**vectors: Tensor) -> None:
    (first, pattern), *others = vectors.items()
    if pattern.dim() != 1 or not pattern.numel():
        raise ValueError(f"{first} must be a vector of at least one entry, but its shape is {list(pattern.shape)}")
    for name, x in others:
        if x.shape != pattern.shape:
            raise ValueError(f"{name} must have the shape of {first}, {list(pattern.shape)}, but it has {list(x.shape)}")


def _check_responses(rewards: Tensor, ranking: RankingPairs) -> None:
    _check_shapes(rewards=rewards)
    if rewards.numel() != ranking.responses:
        raise ValueError(f"there are {rewards.numel()} rewards, but the rankings are of {ranking.responses} responses")


def _check_bool(**masks: Tensor) -> None:
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, but it is {mask.dtype}")
