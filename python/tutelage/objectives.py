"""Every loss, a pure function with its formula and its paper.

Three rules keep the promises: element-wise only +, -, x, /, min, max, where, exp, log, logsigmoid; every sum is the engine's;
statistics of a whole optimizer step are computed once and passed in (``denominator=``).
"""

from __future__ import annotations

from torch import Tensor

from tutelage import kernels


def cross_entropy(logprobs: Tensor, mask: Tensor, denominator: float) -> Tensor:
    """Mean negative log-likelihood: −Σ_mask logp / denominator. Pretraining and SFT.

    Args:
        logprobs: [N], from ``model.score``.
        mask: bool [N], the tokens that count.
        denominator: the number of masked tokens in the whole optimizer step, over all its micro-batches.

    Raises:
        ValueError: if the denominator is not positive (an all-masked batch).
    """
    if not denominator > 0:
        raise ValueError(f"denominator must be positive, but it is {denominator}: no token counts in this step")
    return -kernels.total(logprobs, mask) / denominator
