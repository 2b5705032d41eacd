"""Held-out bits per byte: every token counted once, the same bits however it is batched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tutelage import Model, ModelConfig, pack
from tutelage.data.corpus import HeldOut
from tutelage.evaluate import held_out_bits_per_byte, held_out_nats

MODEL = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def held_out(name: str, lengths: list[int], size: int) -> HeldOut:
    tokens = tuple(np.arange(length, dtype=np.uint16) % 31 for length in lengths)
    return HeldOut(name, ("",) * len(lengths), size, tokens, start_token=31)


def test_nats_are_the_sum_over_documents_scored_one_by_one() -> None:
    model, source = Model(MODEL), held_out("a", [3, 10, 7], 50)
    with torch.no_grad():
        alone = [
            pack([[31, *document.tolist()]])
            for document in source.tokens  # each fits into the context
        ]
        expected = -math.fsum(float(batch.sum(model.score(batch).logprobs)) for batch in alone)
    assert held_out_nats(model, source, 16, 16) == expected
    assert held_out_nats(model, source, 16, 1000) == expected


def test_a_document_longer_than_the_context_is_read_in_windows() -> None:
    model, long = Model(MODEL), held_out("a", [25], 50)
    windows = [held_out("w", [25], 50).tokens[0][begin : begin + 9] for begin in (0, 9, 18)]
    pieces = HeldOut("a", ("",) * 3, 50, tuple(windows), start_token=31)
    assert held_out_nats(model, long, 10, 10) == held_out_nats(model, pieces, 10, 100)
    assert held_out_nats(model, long, 26, 26) != held_out_nats(model, long, 10, 10)


def test_bits_per_byte_by_source_and_of_all_together() -> None:
    model = Model(MODEL)
    sources = [held_out("a", [5], 20), held_out("b", [9, 9], 60)]
    bits = held_out_bits_per_byte(model, sources, 16, 64)
    assert list(bits) == ["a", "b", "all"]
    assert bits["all"] == pytest.approx((bits["a"] * 20 + bits["b"] * 60) / 80)
    assert held_out_bits_per_byte(model, [], 16, 64) == {}
