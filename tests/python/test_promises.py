"""P1 and P4: the same bits whatever the batch, its order, its cut into micro-batches, the threads, the ISA level."""

from __future__ import annotations

import functools
import itertools
import random
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models_for_tests import (
    EVERY,
    backward,
    batch_for,
    bits,
    forward_bits,
    gradient_bits,
    randn,
    same_model,
    sequences,
    threads,
    tiny_model,
)
from tutelage import AdamW, Model, PackedBatch, kernels, objectives, pack

pytestmark = pytest.mark.usefixtures("one_thread")

few = settings(max_examples=12)
several = settings(max_examples=15)


@functools.cache
def shared_model(kind: str, head: Any = "lm", level: str | None = None) -> Model:
    """Read only: examples share it."""
    return tiny_model(kind, head=head, level=level)


# ---- P1: the log-probs of a sequence


def each(model: Model, seqs: list[list[int]], temperature: float = 1.0) -> list[bytes]:
    """The bits of every sequence of one batch."""
    batch = pack(seqs)
    with torch.no_grad():
        if model.head == "scalar":
            outputs = [model.values(batch)]
        else:
            out = model.score(batch, temperature)
            outputs = [out.logprobs, out.entropy]
    return [bits(*parts) for parts in zip(*(x.split(batch.lengths) for x in outputs), strict=True)]


def alone(model: Model, seqs: list[list[int]], temperature: float = 1.0) -> list[bytes]:
    return [each(model, [seq], temperature)[0] for seq in seqs]


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("head", ["lm", "scalar"])
@few
@given(lengths, st.randoms(use_true_random=False), st.sampled_from([1.0, 0.7]))
def test_score_alone_is_score_in_any_batch(
    kind: str, head: Any, lengths: list[int], chance: random.Random, temperature: float
) -> None:
    model = shared_model(kind, head)
    seqs = sequences(lengths, model.config.vocab_size, seed=chance.randrange(1000))
    expected = alone(model, seqs, temperature)
    assert each(model, seqs, temperature) == expected
    order = chance.sample(range(len(seqs)), len(seqs))
    assert each(model, [seqs[i] for i in order], temperature) == [expected[i] for i in order]


@pytest.mark.parametrize("kind", EVERY)
def test_score_of_long_sequences(kind: str) -> None:
    """Across tiles of 128 keys and several panels of rows."""
    model = shared_model(kind)
    seqs = sequences([127, 1, 128, 129, 3, 300], model.config.vocab_size)
    assert each(model, seqs) == alone(model, seqs)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("head", [pytest.param("lm", marks=pytest.mark.slow), pytest.param("scalar", marks=pytest.mark.soak)])
@several
@given(st.lists(st.integers(1, 320), min_size=1, max_size=12), st.randoms(use_true_random=False), st.integers(1, 4))
def test_score_alone_is_score_in_any_batch_at_length(
    kind: str, head: Any, lengths: list[int], chance: random.Random, count: int
) -> None:
    model = shared_model(kind, head)
    seqs = sequences(lengths, model.config.vocab_size, seed=chance.randrange(1000))
    expected = alone(model, seqs)
    chance.shuffle(order := list(range(len(seqs))))
    with threads(count):
        assert each(model, [seqs[i] for i in order]) == [expected[i] for i in order]
    scalar = shared_model(kind, head, level="scalar")
    assert each(scalar, seqs) == expected


@pytest.mark.parametrize("kind", EVERY)
@few
@given(st.integers(2, 60), st.data())
def test_a_prefix_has_the_bits_of_the_whole(kind: str, length: int, data: st.DataObject) -> None:
    model = shared_model(kind)
    cut = data.draw(st.integers(1, length - 1))
    (seq,) = sequences([length], model.config.vocab_size, seed=length)
    with torch.no_grad():
        whole, prefix = model.score(pack([seq])), model.score(pack([seq[:cut]]))
    assert bits(prefix.logprobs, prefix.entropy) == bits(whole.logprobs[:cut], whole.entropy[:cut])


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_score_on_any_number_of_threads(kind: str, count: int) -> None:
    model = shared_model(kind)
    batch = batch_for(model, [5, 1, 130, 17, 2])
    expected = forward_bits(model, batch)
    with threads(count):
        assert forward_bits(model, batch) == expected


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_scalar_level_has_the_bits_of_the_best(kind: str, head: Any) -> None:
    model, scalar = shared_model(kind, head), shared_model(kind, head, level="scalar")
    assert bits(scalar.params) == bits(model.params)
    batch = batch_for(model, [5, 1, 130, 17, 2])
    assert forward_bits(scalar, batch) == forward_bits(model, batch)


def poisoned(kind: str, token: int) -> Model:
    model = tiny_model(kind)
    dict(model.named_parameters())[next(iter(model.state_dict()))][token] = float("nan")
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2-untied"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_neighbour_full_of_nan_changes_nothing(kind: str, count: int) -> None:
    model, bad = poisoned(kind, token=9), 9
    seqs = [[token + (token == bad) for token in seq] for seq in sequences([3, 40, 1, 140, 18, 2], 130)]
    spoiled = [[bad] * 20, [5, bad, 5], [bad], [7] * 150 + [bad] * 10]
    expected = alone(shared_model(kind), seqs)
    mixed = [seq for pair in itertools.zip_longest(seqs, spoiled) for seq in pair if seq is not None]
    with threads(count):
        found = dict(zip(map(tuple, mixed), each(model, mixed), strict=True))
    assert [found[tuple(seq)] for seq in seqs] == expected
    with torch.no_grad():  # the poison works
        assert model.score(pack([spoiled[0]])).logprobs[1:].isnan().all()


def test_control_bits_tell_negative_zero_and_find_nan_equal() -> None:
    nan = torch.tensor([float("nan")])
    assert bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0])) and bits(nan) == bits(nan.clone())


def test_control_torch_does_not_keep_the_promise() -> None:
    """The comparison can fail: a product of torch's has other bits in another batch."""
    x, weight = torch.randn(67, 300, generator=torch.Generator().manual_seed(0)), randn(torch.empty(300, 275), 1)
    together = x @ weight
    assert any(bits(x[i : i + 1] @ weight) != bits(together[i]) for i in range(67))


# ---- P4: gradients, however the batch is cut

CUTS = {"1x32": [32], "32x1": [1] * 32, "4x8": [8] * 4, "5+27": [5, 27]}


def batch_of_32(model: Model, seed: int = 0) -> PackedBatch:
    chance = random.Random(seed)
    return batch_for(model, [chance.randint(1, 12) for _ in range(32)], seed)


def cut(batch: PackedBatch, counts: list[int]) -> list[tuple[PackedBatch, slice]]:
    """Consecutive micro-batches of so many sequences, and where their tokens lie in the whole."""
    parts, first = [], 0
    for count in counts:
        begin, end = (int(batch.cu_seqlens[i]) for i in (first, first + count))
        ids = batch.tokens[begin:end].split(batch.lengths[first : first + count])
        parts.append((pack(ids), slice(begin, end)))
        first += count
    assert first == len(batch)
    return parts


def accumulate(model: Model, batch: PackedBatch, counts: list[int], *, between: Any = None) -> bytes:
    """The gradient of the step, for a d loss / d log-prob that was given before the batch was cut."""
    d_logprobs, d_entropy = (randn(batch.tokens.to(model.dtype), seed) for seed in (1, 2))
    model.zero_grad()
    for part, where in cut(batch, counts):
        if model.head == "scalar":
            model.values(part).backward(d_logprobs[where])
        else:
            out = model.score(part, temperature=0.9)
            torch.autograd.backward([out.logprobs, out.entropy], [d_logprobs[where], d_entropy[where]])
        if between is not None:
            between(model)
    return bits(model.grads)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_gradients_do_not_depend_on_micro_batches(kind: str, head: Any) -> None:
    model = tiny_model(kind, head=head)
    batch = batch_of_32(model)
    expected = accumulate(model, batch, CUTS["1x32"])
    for counts in CUTS.values():
        assert accumulate(model, batch, counts) == expected
    assert accumulate(model, batch, [1, 2, 3, 20, 6]) == expected


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("options", [{"recompute": True}, {"logits_budget": 0}, {"level": "scalar"}], ids=str)
def test_gradients_do_not_depend_on_how_they_are_computed(kind: str, options: dict[str, Any]) -> None:
    model = tiny_model(kind)
    batch = batch_of_32(model)
    expected = accumulate(model, batch, CUTS["1x32"])
    for name in ("1x32", "5+27"):
        assert accumulate(same_model(model, **options), batch, CUTS[name]) == expected


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_gradients_do_not_depend_on_threads(kind: str, count: int) -> None:
    model = tiny_model(kind)
    batch = batch_of_32(model)
    expected = accumulate(model, batch, CUTS["1x32"])
    with threads(count):
        assert accumulate(model, batch, CUTS["5+27"]) == expected


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_of_long_sequences(kind: str, count: int) -> None:
    """Across tiles of 128 keys; attention's backward in one pass (many tasks a thread) and in two (few)."""
    model = tiny_model(kind)
    batch = batch_for(model, [129, 3, 260, 40, 20, 150, 1])
    expected = accumulate(model, batch, [7])
    with threads(count):
        assert accumulate(model, batch, [1, 1, 2, 3]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("head", ["lm", "scalar"])
@several
@given(st.lists(st.integers(1, 90), min_size=2, max_size=14), st.integers(1, 4), st.data())
def test_gradients_of_any_cut(kind: str, head: Any, lengths: list[int], count: int, data: st.DataObject) -> None:
    model = tiny_model(kind, head=head, recompute=data.draw(st.booleans()))
    batch = batch_for(model, lengths, seed=sum(lengths))
    expected = accumulate(model, batch, [len(lengths)])
    borders = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1))))
    counts = [b - a for a, b in itertools.pairwise([0, *borders, len(lengths)])]
    with threads(count):
        assert accumulate(model, batch, counts) == expected


def test_control_a_tied_embedding_with_one_buffer_would_break_the_promise() -> None:
    """Reading ``grads`` adds the look-up's chain to the head's: done after every micro-batch it is the one buffer."""
    model = tiny_model("llama-tied")
    batch = batch_of_32(model)
    expected = accumulate(model, batch, CUTS["1x32"])
    for name in ("32x1", "4x8", "5+27"):
        assert accumulate(model, batch, CUTS[name], between=lambda model: model.grads) != expected
    untied = tiny_model("llama")  # where there is one chain each, reading is harmless
    batch = batch_of_32(untied)
    expected = accumulate(untied, batch, CUTS["1x32"])
    assert accumulate(untied, batch, CUTS["4x8"], between=lambda model: model.grads) == expected


@pytest.mark.parametrize("kind", EVERY)
def test_control_partial_sums_would_break_the_promise(kind: str) -> None:
    model = tiny_model(kind)
    batch = batch_of_32(model)
    expected = accumulate(model, batch, CUTS["1x32"])
    collected = torch.zeros_like(model.params)

    def collect(model: Model) -> None:
        collected.add_(model.grads)
        model.zero_grad()

    accumulate(model, batch, CUTS["4x8"], between=collect)
    assert bits(collected) != expected
    whole = torch.frombuffer(bytearray(expected), dtype=torch.float32)
    torch.testing.assert_close(collected, whole, rtol=1e-3, atol=1e-4)


# ---- training


def train(kind: str, steps: int, micro_batches: list[int]) -> Model:
    model = tiny_model(kind)
    optimizer = AdamW(model, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    for step in range(steps):
        batch = batch_of_32(model, seed=step)
        denominator = kernels.total(batch.completion_mask.float()).item()
        optimizer.zero_grad()
        for part, _ in cut(batch, micro_batches):
            out = model.score(part)
            objectives.cross_entropy(out.logprobs, part.completion_mask, denominator).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_training_twice_gives_the_same_bits(kind: str) -> None:
    expected = bits(train(kind, 20, CUTS["4x8"]).params)
    assert bits(train(kind, 20, CUTS["4x8"]).params) == expected
    assert bits(train(kind, 20, CUTS["5+27"]).params) == expected


def test_training_on_two_threads_gives_the_same_bits() -> None:
    expected = bits(train("llama-tied", 3, CUTS["4x8"]).params)
    with threads(2):
        assert bits(train("llama-tied", 3, CUTS["1x32"]).params) == expected


def test_control_training_on_other_data_gives_other_bits() -> None:
    assert bits(train("llama", 2, [32]).params) != bits(train("llama", 3, [32]).params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_training_on_more_threads_gives_the_same_bits(kind: str, count: int) -> None:
    expected = bits(train(kind, 20, CUTS["1x32"]).params)
    with threads(count):
        assert bits(train(kind, 20, CUTS["4x8"]).params) == expected


# ---- Python threads


@pytest.mark.parametrize("count", [1, 2])
def test_two_python_threads_give_the_bits_of_one(count: int) -> None:
    kinds = ["llama", "gpt2"]
    expected = {kind: bits(train(kind, 4, CUTS["4x8"]).params) for kind in kinds}
    found: dict[str, bytes] = {}
    together = threading.Barrier(len(kinds))

    def work(kind: str) -> None:
        together.wait()
        found[kind] = bits(train(kind, 4, CUTS["4x8"]).params)

    with threads(count):
        workers = [threading.Thread(target=work, args=(kind,)) for kind in kinds]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert found == expected


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_two_python_threads_may_score_on_one_model(kind: str) -> None:
    model = tiny_model(kind)  # fresh: both grow its rotary tables
    batches = [batch_for(model, [3 + 10 * i], seed=i) for i in range(20)]
    found: list[list[bytes]] = [[], []]

    def work(results: list[bytes]) -> None:
        results.extend(forward_bits(model, batch) for batch in batches)

    workers = [threading.Thread(target=work, args=(results,)) for results in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    expected = [forward_bits(model, batch) for batch in batches]
    assert found == [expected, expected]


@pytest.mark.parametrize("kind", EVERY)
def test_gradients_twice_are_the_same(kind: str) -> None:
    model = tiny_model(kind)
    batch = batch_of_32(model)
    assert gradient_bits(model, batch) == gradient_bits(model, batch)
    backward(model, batch)
    assert bits(model.grads) != gradient_bits(model, batch)
