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
    from tutelage.data.chat import ChatTemplateError as ChatTemplateError
    from tutelage.data.chat_check import check_template as check_template
    from tutelage.data.examples import Batches as Batches
    from tutelage.data.examples import Example as Example
    from tutelage.data.examples import ExampleSet as ExampleSet
    from tutelage.data.examples import Preference as Preference
    from tutelage.data.examples import Prompt as Prompt
    from tutelage.data.examples import Ranking as Ranking
    from tutelage.data.examples import Unpaired as Unpaired
    from tutelage.data.examples import load_preferences as load_preferences
    from tutelage.data.examples import load_prompts as load_prompts
    from tutelage.data.examples import load_rankings as load_rankings
    from tutelage.data.examples import load_sft as load_sft
    from tutelage.data.examples import load_unpaired as load_unpaired
    from tutelage.data.examples import split_examples as split_examples
    from tutelage.data.tokenizer import Tokenizer as Tokenizer
    from tutelage.data.tokenizer import train_tokenizer as train_tokenizer
    from tutelage.lora import LoraConfig as LoraConfig
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
    "Batches": "data.examples",
    "ChatTemplateError": "data.chat",
    "Example": "data.examples",
    "ExampleSet": "data.examples",
    "Interrupted": "rollouts",
    "LoraConfig": "lora",
    "Model": "model",
    "ModelConfig": "config",
    "NonFiniteGradientError": "optimizer",
    "PackedBatch": "batch",
    "Preference": "data.examples",
    "Prompt": "data.examples",
    "Ranking": "data.examples",
    "Rollouts": "rollouts",
    "Score": "model",
    "StreamedToken": "rollouts",
    "Tokenizer": "data.tokenizer",
    "Unpaired": "data.examples",
    "check_template": "data.chat_check",
    "load_preferences": "data.examples",
    "load_prompts": "data.examples",
    "load_rankings": "data.examples",
    "load_sft": "data.examples",
    "load_unpaired": "data.examples",
    "pack": "batch",
    "split_examples": "data.examples",
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
