"""One compiled engine for the whole upbringing of a language model. ``import tutelage as tl``."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage import kernels as kernels
    from tutelage import objectives as objectives
    from tutelage.batch import PackedBatch as PackedBatch
    from tutelage.batch import pack as pack
    from tutelage.config import ModelConfig as ModelConfig
    from tutelage.data.tokenizer import Tokenizer as Tokenizer
    from tutelage.data.tokenizer import train_tokenizer as train_tokenizer
    from tutelage.model import Model as Model
    from tutelage.model import Score as Score
    from tutelage.optimizer import AdamW as AdamW
    from tutelage.optimizer import NonFiniteGradientError as NonFiniteGradientError
    from tutelage.rollouts import Interrupted as Interrupted
    from tutelage.rollouts import Rollouts as Rollouts
    from tutelage.rollouts import StreamedToken as StreamedToken

__version__ = importlib.metadata.version("tutelage")

# Name -> module. Loaded on first use (PEP 562): `tutelage --help` need not wait for torch.
_HOMES = {
    "AdamW": "optimizer",
    "Interrupted": "rollouts",
    "Model": "model",
    "ModelConfig": "config",
    "NonFiniteGradientError": "optimizer",
    "PackedBatch": "batch",
    "Rollouts": "rollouts",
    "Score": "model",
    "StreamedToken": "rollouts",
    "Tokenizer": "data.tokenizer",
    "pack": "batch",
    "train_tokenizer": "data.tokenizer",
}
_MODULES = ("kernels", "objectives")

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tutelage.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"tutelage.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
