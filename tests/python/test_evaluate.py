"""Held-out bits per byte: every token counted once, the same bits however it is batched."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tutelage import Model, ModelConfig, pack
from tutelage.data.corpus import HeldOut
from tutelage.data.documents import Source, read_documents
from tutelage.data.tokenizer import train_tokenizer
from tutelage.evaluate import (
    documents_to_score,
    exact_match,
    held_out_bits_per_byte,
    held_out_nats,
    kl_divergence,
    rate,
)

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


def test_every_document_is_scored_with_its_end() -> None:
    tokenizer = train_tokenizer(["ab"], 257)
    documents = read_documents([_source("é", "b"), _source("c")], 0.0)
    first, second = documents_to_score(documents, tokenizer)
    assert first.documents == ("é", "b") and first.bytes == 3 and second.bytes == 1
    assert [tokens.tolist() for tokens in first.tokens] == [[*tokenizer.encode(text), 0] for text in ("é", "b")]
    assert first.start_token == 0
    with pytest.raises(ValueError, match="this tokenizer has no eos token, so the end of a document cannot be predicted"):
        documents_to_score(documents, dataclasses.replace(tokenizer, eos_token_id=None))


def _source(*texts: str) -> Source:
    return Source([{"text": text} for text in texts])


@pytest.mark.parametrize(("answer", "equal"), [(" a  b\n", True), ("ab", False), ("a B", False), ("a b", True)])
def test_exact_match_but_for_white_space(answer: str, equal: bool) -> None:
    assert exact_match(answer, "a b") == equal


def test_wilson_interval() -> None:
    """Against the roots of (p - q)^2 = z^2 q (1 - q) / n, which define it; and 8 of 10 as tables have it."""
    found = rate([1.0] * 8 + [0.0] * 2)
    assert (found.rate, found.count) == (0.8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4901625), pytest.approx(0.9433178))
    for scores in ([0.0] * 5, [1.0] * 5, [1.0, 0.5, 0.0], [0.5]):
        found = rate(scores)
        assert 0 <= found.low <= found.rate <= found.high <= 1 and found.low < found.high
        for bound in (found.low, found.high):
            squared = 1.959963984540054**2 * bound * (1 - bound) / found.count
            assert (found.rate - bound) ** 2 == pytest.approx(squared, abs=1e-12)


def test_scores_that_are_none() -> None:
    with pytest.raises(ValueError, match="there is no score to average"):
        rate([])
    with pytest.raises(ValueError, match=r"score 1 must lie in 0 \.\. 1, but it is nan"):
        rate([1.0, math.nan])


def test_kl_divergence() -> None:
    model, reference = Model(MODEL), Model(MODEL, seed=1)
    model.params *= 5
    rollouts = model.generate([[1, 2], [3], [4]], [4, 7, 5], temperature=0.7)
    found = kl_divergence(rollouts, reference, 0.7, 5)
    assert found == kl_divergence(rollouts, reference, 0.7, 10**6)
    sums = []
    for prompt, tokens in zip(rollouts.prompts, rollouts.tokens, strict=True):
        batch = pack([[*prompt.tolist(), *tokens.tolist()]])
        with torch.no_grad():
            ours, theirs = (m.score(batch, 0.7).logprobs.double()[prompt.numel() :] for m in (model, reference))
        sums.append(float((ours - theirs).sum()))
    assert found.per_sequence == pytest.approx(sum(sums) / 3)
    assert found.per_token == pytest.approx(sum(sums) / 16) and (found.sequences, found.tokens) == (3, 16)
    assert found.standard_error == pytest.approx(np.std(sums, ddof=1) / math.sqrt(3))
    same = kl_divergence(rollouts, model, 0.7, 100)
    assert (same.per_token, same.per_sequence, same.standard_error) == (0, 0, 0)
    assert kl_divergence(model.generate([[1]], 2), reference, 1.0, 9).standard_error is None
    with pytest.raises(ValueError, match="there is no sequence to pack"):
        kl_divergence(model.generate([], 2), reference, 1.0, 9)
