"""AdamW over the model's flat buffers, fused in the core."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage.distributed import Ranks
from tutelage.model import Model
from tutelage.sharding import BUCKET_BYTES, Layout, Reduction, Shard, buckets


class NonFiniteGradientError(ArithmeticError):
    """The gradient holds NaN or infinity; the update was not applied."""


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101). Weight decay applies to matrices, not to norms and biases.

    Of several ranks each keeps the moments of its own part of the parameters and updates that part (ZeRO-1): a step's gradients
    are summed part by part (`reduction`, after every backward of several), and updated parameters go to all ranks.

    Args:
        model: whose ``params`` it updates from whose ``grads``.
        lr: learning rate; set ``optimizer.lr`` to change it between steps.
        betas, eps, weight_decay: as torch's AdamW.
        max_grad_norm: gradients are scaled down to this global L2 norm when they exceed it (None: never).
        ranks: that train the model together (None: this process alone).
        exact: the gradient comes by `reduction` from one rank, too, so that its norm is the same sum for any number of them.
        bucket_bytes: see `sharding.BUCKET_BYTES`.
    """

    def __init__(
        self,
        model: Model,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        *,
        ranks: Ranks | None = None,
        exact: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
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
        ranks = ranks or Ranks()
        size = model.params.numel()
        cuts = buckets(size, sorted(model.block_starts().values()), bucket_bytes // model.params.element_size())
        self.layout = Layout(size, cuts, ranks.count)
        """Which rank updates which parameters."""
        self._shard = Shard(self.layout, ranks, model._on.core) if ranks.count > 1 or exact else None
        # Of the gradients since zero_grad, this rank's part; without a shard they are the model's.
        self._sum: Tensor | None = None
        own = size if self._shard is None else self._shard.size
        self.exp_avg = torch.zeros(own, dtype=model.params.dtype, device=model.params.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)

    def reduction(self, present: Sequence[bool]) -> Reduction:
        """Of several ranks (or exact): adds the gradients that the model of each rank holds, or will hold at the end of the
        backward that begins now, to those that `step` will take.

        present: which ranks have one. Tell it how far the backward is (`Model.telling`), or just that it is finished.
        """
        assert self._shard is not None
        fresh = self._sum is None
        if self._sum is None:
            self._sum = torch.empty_like(self.exp_avg)
        model = self.model
        return Reduction(self._shard, model._grad_buffer, model._settled_grads, present, self._sum, not fresh)

    def own_part(self, flat: Tensor) -> Tensor:
        """Of a tensor as params what this rank updates: all of it, or a copy of this rank's part."""
        return flat if self._shard is None else self._shard.cut(flat)

    def grad_norm(self) -> float:
        """The gradient's global L2 norm, before clipping.

        Raises:
            NonFiniteGradientError: naming the first parameter whose gradient is not finite.
        """
        if self._shard is None:
            square = self.model._engine.sum_of_squares(self.model._settled_grads(), torch.get_num_threads())
        else:
            square = self._shard.sum_of_squares(self._gradients())
        norm = math.sqrt(square)
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
        if self._shard is None:
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
        else:
            self._step_own_part(self._shard, scale)
            torch.autograd.graph.increment_version(model.params)
        return norm

    def _step_own_part(self, shard: Shard, scale: float) -> None:
        model, gradients = self.model, self._gradients()
        level = model._engine.level if model.device_name == "cpu" else None  # levels are the CPU's
        for begin, end, decays in _runs(model):
            for piece, place in zip(shard.pieces, shard.places, strict=True):
                first, last = max(begin, piece.start), min(end, piece.stop)
                if first < last:
                    here = slice(place.start + first - piece.start, place.start + last - piece.start)
                    model._on.core.adamw(
                        model.params[first:last],
                        gradients[here],
                        self.exp_avg[here],
                        self.exp_avg_sq[here],
                        step=self.steps,
                        lr=self.lr,
                        betas=self.betas,
                        eps=self.eps,
                        weight_decay=self.weight_decay if decays else 0.0,
                        grad_scale=scale,
                        threads=torch.get_num_threads(),
                        level=level,
                    )
        shard.spread(model.params)

    def _gradients(self) -> Tensor:
        if self._sum is None:
            raise ValueError("there is no gradient: several ranks (or exact) need a reduction() after every backward")
        return self._sum

    def _culprit(self) -> str:
        overflow = "every entry is finite, but their squares overflow"
        if self._shard is None:
            for name, grad in self.model.named_grads():
                if not bool(torch.isfinite(grad).all()):
                    return f"{name} is the first parameter whose gradient is not finite"
            return overflow
        wrong, first = torch.nonzero(~torch.isfinite(self._gradients())).flatten(), self.layout.size
        if wrong.numel():
            at = int(wrong[0])
            first = next(
                piece.start + at - place.start
                for piece, place in zip(self._shard.pieces, self._shard.places, strict=True)
                if at in place
            )
        first = min(self._shard.ranks.exchange(first))
        if first == self.layout.size:
            return overflow
        name = next(name for name, offset, shape, _ in _parameters(self.model) if first < offset + torch.Size(shape).numel())
        return f"{name} is the first parameter whose gradient is not finite"

    def zero_grad(self) -> None:
        """Sets the model's gradients to zero."""
        self.model.zero_grad()
        self._sum = None

    def state_dict(self) -> dict[str, Any]:
        """``steps`` (int), ``exp_avg`` and ``exp_avg_sq``: as params; of several ranks this rank's part, see ``layout``."""
        return {"steps": self.steps, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, but that every rank gives the moments of all parameters; copies.

        Raises:
            ValueError: naming the tensor whose shape does not fit the model.
        """
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != self.model.params.shape:
                raise ValueError(
                    f"{name} has {state[name].numel()} entries, but the model has {self.model.params.numel()} parameters"
                )
        self.steps = int(state["steps"])
        self.exp_avg.copy_(self.own_part(state["exp_avg"]))
        self.exp_avg_sq.copy_(self.own_part(state["exp_avg_sq"]))


def _parameters(model: Model) -> list[tuple[str, int, tuple[int, ...], bool]]:
    return model._engine.parameters()


def _runs(model: Model) -> list[tuple[int, int, bool]]:
    """(first, last, whether it decays) of neighbouring parameters of one kind."""
    runs: list[tuple[int, int, bool]] = []
    for _, offset, shape, decays in _parameters(model):
        end = offset + torch.Size(shape).numel()
        if runs and runs[-1][2] == decays:
            runs[-1] = (runs[-1][0], end, decays)
        else:
            runs.append((offset, end, decays))
    return runs
