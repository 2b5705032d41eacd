"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): what they are told, by PEFT's names where it has one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoraConfig:
    """An adapter: beside a frozen matrix W [out, in] learn A [rank, in] and B [out, rank], y = x Wᵀ + scale · (x Aᵀ) Bᵀ.

    Args:
        rank: of A and B; PEFT's r.
        alpha: scale = alpha / rank; PEFT's lora_alpha.
        target_modules: the linear layers of the blocks that get one, by the ends of their names ("q_proj", "mlp.c_proj").
        use_rslora: scale = alpha / √rank (Kalajdzievski 2023, arXiv 2312.03732).

    Raises:
        ValueError: naming the field that cannot be.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ()
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, but it is {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, but it is {self.alpha}")

    @property
    def scale(self) -> float:
        """What (x Aᵀ) Bᵀ is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def core_fields(self, base_head: str) -> dict[str, Any]:
        """What the compiled core wants to know. No target_modules: all linear layers of the blocks."""
        return {"rank": self.rank, "scale": self.scale, "target_modules": [*self.target_modules], "base_head": base_head}


def modules_of(parameters: Sequence[str]) -> tuple[str, ...]:
    """The names of the layers that these parameters of an adapter belong to, each once, without the place in the model."""
    return tuple(dict.fromkeys(name.split(".")[-3] for name in parameters if name.endswith(".lora_A.weight")))
