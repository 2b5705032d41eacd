"""The model that a loop goes on with, and whether its rows fit."""

from __future__ import annotations

import hashlib

from tutelage.config import Head
from tutelage.data.tokenizer import Tokenizer
from tutelage.model import Model
from tutelage.train.configs import ExamplesConfig


def base_model(config: ExamplesConfig, head: Head) -> tuple[Model, Tokenizer]:
    """The model of config.model with this head, and its tokenizer with the chat template that is to be used.

    A scalar head is drawn anew (config.seed) where the folder holds a language model. Raises ValueError for a
    reward model where a language model is wanted, a folder without a tokenizer and a max_length that the model
    cannot read.
    """
    model = Model.from_pretrained(config.model, "scalar" if head == "scalar" else None, seed=config.seed)
    if model.head != head:
        raise ValueError(f"{config.model} holds a reward model, and fine-tuning needs a language model")
    if model.tokenizer is None:
        raise ValueError(f"there is no tokenizer.json in {config.model}: put the model's tokenizer there")
    context = model.config.max_position_embeddings
    if config.max_length > context:
        raise ValueError(f"max_length is {config.max_length}, but the model reads at most {context} tokens: lower it")
    if config.chat_template_path is not None:
        model.tokenizer = model.tokenizer.with_chat_template(config.chat_template_path)
    return model, model.tokenizer


def content(model: Model) -> str:
    """SHA-256 of the weights and the shape: equal means the same model."""
    digest = hashlib.sha256(repr(model.config).encode())
    digest.update(model.params.numpy().data)
    return digest.hexdigest()


def check_fits(where: str, what: str, tokens: int, config: ExamplesConfig) -> None:
    """Raises ValueError for a row of more tokens than a micro-batch may have. what: subject and verb, as in "the row has"."""
    if tokens > config.micro_batch_tokens:
        raise ValueError(
            f"{where}: {what} {tokens} tokens, more than micro_batch_tokens = "
            f"{config.micro_batch_tokens}: raise it, or lower max_length"
        )
