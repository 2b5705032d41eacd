"""What a model has learned, measured on text that it was never trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from tutelage.batch import PackedBatch, pack
from tutelage.data.compression import bits_per_byte
from tutelage.data.corpus import HeldOut
from tutelage.model import Model


def held_out_nats(model: Model, held_out: HeldOut, context: int, max_tokens: int) -> float:
    """Sum of −log p (natural logarithm) over every token of the documents, end tokens included.

    Documents longer than `context` tokens are read in consecutive windows, each of which starts fresh. At
    most `max_tokens` (≥ context) go through the model at once; neither that nor the number of threads changes
    a bit of the result.
    """
    return _nats(model, pack(held_out.sequences(context)), max_tokens)


def held_out_loss(model: Model, batch: PackedBatch, max_tokens: int) -> float:
    """Mean of −log p (natural logarithm) over the masked tokens of the whole batch.

    At most `max_tokens` tokens go through the model at once; neither that nor the number of threads changes a
    bit of the result.
    """
    return _nats(model, batch, max_tokens) / sum(batch.completion_counts)


def _nats(model: Model, batch: PackedBatch, max_tokens: int) -> float:
    sums: list[float] = []
    with torch.no_grad():
        for part in batch.split(max_tokens):
            sums += part.sum(model.score(part).logprobs).tolist()
    return -math.fsum(sums)


def held_out_bits_per_byte(model: Model, sources: Iterable[HeldOut], context: int, max_tokens: int) -> dict[str, float]:
    """Bits per UTF-8 byte on the held-out documents of each source, by name, and of all of them as "all".

    Empty where nothing is held out.
    """
    sources = list(sources)
    if not sources:
        return {}
    nats = [held_out_nats(model, source, context, max_tokens) for source in sources]
    bits = {source.name: bits_per_byte(cost, source.bytes) for source, cost in zip(sources, nats, strict=True)}
    return {**bits, "all": bits_per_byte(math.fsum(nats), sum(source.bytes for source in sources))}
