"""AdamW over the model's flat buffers, fused in the core."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tutelage.model import Model


class NonFiniteGradientError(ArithmeticError):
    """The gradient holds NaN or infinity; the update was not applied."""


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101). Weight decay applies to matrices, not to norms and biases.

    Args:
        model: whose ``params`` it updates from whose ``grads``.
        lr: learning rate; set ``optimizer.lr`` to change it between steps.
        betas, eps, weight_decay: as torch's AdamW.
        max_grad_norm: gradients are scaled down to this global L2 norm when they exceed it (None: never).
    """

    def __init__(
        self,
        model: Model,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        if not 0 <= betas[0] < 1 or not 0 <= betas[1] < 1:
            raise ValueError(f"betas must lie in [0, 1), but they are {betas}")
        if not (lr >= 0 and eps > 0 and weight_decay >= 0):  # this way round NaN is refused too
            raise ValueError(f"lr = {lr}, eps = {eps} and weight_decay = {weight_decay} must not be negative (eps: positive)")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, but it is {max_grad_norm}")
        self.model = model
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.steps = 0
        self.exp_avg = torch.zeros_like(model.params)
        self.exp_avg_sq = torch.zeros_like(model.params)

    def grad_norm(self) -> float:
        """The gradient's global L2 norm, before clipping.

        Raises:
            NonFiniteGradientError: naming the first parameter whose gradient is not finite.
        """
        norm = math.sqrt(self.model._engine.sum_of_squares(self.model._settled_grads(), torch.get_num_threads()))
        if not math.isfinite(norm):
            raise NonFiniteGradientError(f"the gradient's norm is {norm}: {self._culprit()}; the update was not applied")
        return norm

    def step(self) -> float:
        """One update. Returns the gradient's global L2 norm, before clipping.

        Raises:
            NonFiniteGradientError: naming the first parameter whose gradient is not finite. Nothing has changed then.
            ValueError: for a learning rate that is negative, infinite or NaN. Nothing has changed then either.
        """
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"lr must not be negative, infinite or NaN, but it is {self.lr}; the update was not applied")
        norm, model = self.grad_norm(), self.model
        scale = 1.0 if self.max_grad_norm is None or norm <= self.max_grad_norm else self.max_grad_norm / norm
        self.steps += 1
        grads = model._settled_grads()

        def update(copy: Tensor | None) -> None:
            model._engine.adamw(
                model.params,
                grads,
                self.exp_avg,
                self.exp_avg_sq,
                self.lr,
                *self.betas,
                self.eps,
                self.weight_decay,
                self.steps,
                scale,
                copy,
                torch.get_num_threads(),
            )

        model._stepped(update)
        return norm

    def _culprit(self) -> str:
        for name, grad in self.model.named_grads():
            if not bool(torch.isfinite(grad).all()):
                return f"{name} is the first parameter whose gradient is not finite"
        return "every entry is finite, but their squares overflow"

    def zero_grad(self) -> None:
        """Sets the model's gradients to zero."""
        self.model.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """``steps`` (int), ``exp_avg`` and ``exp_avg_sq`` (as params)."""
        return {"steps": self.steps, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; copies.

        Raises:
            ValueError: naming the tensor whose shape does not fit the model.
        """
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != self.model.params.shape:
                raise ValueError(
                    f"{name} has {state[name].numel()} entries, but the model has {self.model.params.numel()} parameters"
                )
        self.steps = int(state["steps"])
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])
