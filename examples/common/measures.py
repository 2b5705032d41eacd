"""What the worked cases measure of a model besides their own task: what it has forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tutelage import Model, PackedBatch, Tokenizer, pack
from tutelage.evaluate import held_out_loss

MICRO_BATCH_TOKENS = 1024
"""Tokens that go through the model at once: memory depends on it, no result does."""


def openings(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> PackedBatch:
    """The first `length` tokens of each text."""
    return pack([ids[:length] for ids in tokenizer.encode_batch(texts)])


def perplexity(model: Model, batch: PackedBatch) -> float:
    """exp of the mean −log p of every token but each sequence's first."""
    return math.exp(held_out_loss(model, batch, max(MICRO_BATCH_TOKENS, *batch.lengths)))
