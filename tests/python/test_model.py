"""Model: surface, gradients against central differences in float64, memory, errors."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from models_for_tests import (
    EVERY,
    KINDS,
    backward,
    batch_for,
    bits,
    forward_bits,
    gradient_bits,
    in_use,
    in_use_at_start,
    randn,
    same_model,
    sequences,
    threads,
    tiny_model,
)
from tutelage import Model, PackedBatch, _core, pack

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [5, 1, 9, 2, 12]


def sha256(x: Tensor) -> str:
    return hashlib.sha256(bits(x)).hexdigest()


# ---- parameters, gradients, state


@pytest.mark.parametrize("kind", KINDS)
def test_named_parameters_and_grads_are_views_that_cover_everything(kind: str) -> None:
    model = tiny_model(kind)
    for named, flat in ((model.named_parameters, model.params), (model.named_grads, model.grads)):
        flat.copy_(torch.arange(flat.numel()))
        views = dict(named())
        assert torch.equal(torch.cat([view.reshape(-1) for view in views.values()]), flat)
        assert all(view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for view in views.values())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in model.named_grads()]
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def test_names_and_shapes_are_those_of_transformers() -> None:
    shapes = {name: list(view.shape) for name, view in tiny_model("gpt2").named_parameters()}
    assert shapes["transformer.h.1.attn.c_attn.weight"] == [48, 144]
    assert shapes["transformer.wpe.weight"] == [320, 48]
    assert "lm_head.weight" not in shapes
    shapes = {name: list(view.shape) for name, view in tiny_model("qwen3", head="scalar").named_parameters()}
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == [24, 40]
    assert shapes["model.layers.1.self_attn.q_norm.weight"] == [24]
    assert shapes["score.weight"] == [1, 40]


def test_matrices_decay_norms_and_biases_do_not() -> None:
    model = tiny_model("layernorm")
    mask = model.decay_mask()
    for name, view in model.named_parameters():
        offset = view.storage_offset()
        part = mask[offset : offset + view.numel()]
        assert part.all() if view.dim() == 2 else not part.any(), name


def test_state_round_trip() -> None:
    model = tiny_model()
    other = Model(model.config, seed=5)
    assert bits(other.params) != bits(model.params)
    other.load_state_dict({name: view.clone() for name, view in model.state_dict().items()})
    assert bits(other.params) == bits(model.params)


def test_loading_bumps_the_version_of_params() -> None:
    model = tiny_model()
    version = model.params._version
    model.load_state_dict(model.state_dict())
    assert model.params._version > version


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = Model(KINDS["llama"], seed=1)
    before = bits(model.params)
    state = {name: view.clone() + 1 for name, view in model.state_dict().items()}
    norm, head = "model.norm.weight", "lm_head.weight"

    def refused(changed: dict[str, Tensor], message: str) -> None:
        with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
            model.load_state_dict(changed)
        assert bits(model.params) == before

    refused(
        {"x": torch.zeros(1), **{name: view for name, view in state.items() if name != norm}},
        f"the state does not fit this model: missing {norm}; unexpected x",
    )
    refused(
        {**state, **{f"x{i}": torch.zeros(1) for i in range(7)}},
        "the state does not fit this model: unexpected x0, x1, x2, x3, x4 and 2 more",
    )
    refused({**state, head: torch.zeros(48, 275)}, f"{head} must have shape [275, 48], but the state has [48, 275]")


def test_a_clone_is_a_model_of_its_own() -> None:
    model = tiny_model("qwen3", recompute=True, logits_budget=0)
    batch = batch_for(model, LENGTHS)
    backward(model, batch)
    other = model.clone()
    assert other.config == model.config and other.recompute and other.logits_budget == 0
    assert bits(other.params) == bits(model.params) and not other.grads.any() and model.grads.any()
    before = forward_bits(model, batch)
    other.params.mul_(2)
    assert forward_bits(model, batch) == before != forward_bits(other, batch)


# ---- initial weights

# Written down when the first version was made: the same on every machine, so that a seed means something.
INITIAL = {
    "llama": "61ec3e08ec9fa2500b057af5514f9b5db94841ec1771424a134b9cb94354111c",
    "gpt2": "fabdfee82eb9332574b0b3f9b4565145401b1e0fb39f06b5a85963ac40f22058",
}


@pytest.mark.parametrize("kind", INITIAL)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_initial_weights_are_known(kind: str, count: int) -> None:
    with threads(count):
        assert sha256(Model(KINDS[kind], seed=3).params) == INITIAL[kind]


def test_initial_weights_depend_on_the_seed_and_not_on_the_level_or_head() -> None:
    model = Model(KINDS["llama"], seed=3)
    assert bits(Model(KINDS["llama"], seed=4).params) != bits(model.params)
    assert bits(Model(KINDS["llama"], seed=3, level="scalar").params) == bits(model.params)
    assert bits(Model(KINDS["llama"], seed=2**64 - 1).params) != bits(model.params)
    critic = dict(Model(KINDS["llama"], seed=3, head="scalar").named_parameters())
    for name, view in model.named_parameters():
        if name != "lm_head.weight":
            assert bits(critic[name]) == bits(view), name


def test_initial_weights_have_their_distribution() -> None:
    parameters = dict(Model(KINDS["gpt2"]).named_parameters())
    for name, view in parameters.items():
        if name.endswith(".bias"):
            assert not view.any(), name
        elif view.dim() == 1:
            assert (view == 1).all(), name
        else:  # normal, 0.02; into the residual stream 0.02 / sqrt(2 layers)
            expected = 0.02 / (math.sqrt(2 * 2) if name.endswith("c_proj.weight") else 1)
            deviation = float(view.std()) / expected
            assert abs(deviation - 1) < 5 / math.sqrt(2 * view.numel()), (name, deviation)
            assert abs(float(view.mean())) < 5 * expected / math.sqrt(view.numel()), name


# ---- gradients are added, and never stale


def test_gradients_are_zero_before_the_first_backward() -> None:
    model = tiny_model()
    assert not model.grads.any()
    model = tiny_model()
    model.zero_grad()
    assert not model.grads.any()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("seen", [False, True])
def test_zero_grad_leaves_nothing_behind(kind: str, seen: bool) -> None:
    model = tiny_model(kind)
    batch, another = batch_for(model, LENGTHS), batch_for(model, [7, 8], seed=1)
    expected = gradient_bits(tiny_model(kind), another)
    backward(model, batch, seed=5)
    if seen:
        assert model.grads.any()
    model.zero_grad()
    backward(model, another)
    assert bits(model.grads) == expected
    model.zero_grad()
    assert not model.grads.any()
    assert bits(model.grads) == bits(torch.zeros_like(model.params)), "zeros must be +0"


def test_a_held_reference_to_grads_is_zeroed_too() -> None:
    model = tiny_model("qwen3")
    grads = model.grads
    backward(model, batch_for(model, LENGTHS))
    assert model.grads.data_ptr() == grads.data_ptr()
    model.zero_grad()
    assert not grads.any()


def test_grads_may_be_zeroed_in_place() -> None:
    model = tiny_model("qwen3")
    batch = batch_for(model, LENGTHS)
    expected = gradient_bits(model, batch)
    model.grads.zero_()
    backward(model, batch)
    assert bits(model.grads) == expected


def test_parameters_that_no_token_touches_have_zero_gradients() -> None:
    model = tiny_model("llama")
    model.zero_grad()
    backward(model, pack([[3, 4, 5]]))
    embedding = dict(model.named_grads())["model.embed_tokens.weight"]
    assert embedding[[3, 4]].any(1).all() and not embedding[6:].any()


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_two_backwards_add(kind: str) -> None:
    model = tiny_model(kind, dtype=torch.float64)
    batches = [batch_for(model, LENGTHS), batch_for(model, [3, 6], seed=1)]
    separate = []
    for batch in batches:
        model.zero_grad()
        backward(model, batch)
        separate.append(model.grads.clone())
    model.zero_grad()
    for batch in batches:
        backward(model, batch)
    torch.testing.assert_close(model.grads, separate[0] + separate[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_backward_tells_how_far_it_is(kind: str, head: Any) -> None:
    """From the offset that it tells gradients have their last bits; before it they have not."""
    model = tiny_model(kind, head=head)
    batch = batch_for(model, LENGTHS)
    expected = gradient_bits(model, batch)
    told: list[tuple[int, torch.Tensor]] = []
    model.zero_grad()
    with model.telling(lambda offset: told.append((offset, model._grad_buffer().clone()))):
        backward(model, batch)
    whole = model.grads
    assert bits(whole) == expected
    assert [offset for offset, _ in told] == sorted(model.block_starts().values(), reverse=True)
    for offset, there in told:
        assert bits(there[offset:]) == bits(whole[offset:])
        assert offset == 0 or bits(there[:offset]) != bits(whole[:offset])
    backward(model, batch)  # nobody is told any more
    assert len(told) == len(model.block_starts())


def test_who_is_told_may_stop_the_backward() -> None:
    model = tiny_model()
    out = model.score(batch_for(model, LENGTHS))

    def stop(offset: int) -> None:
        raise KeyError(offset)

    with pytest.raises(KeyError), model.telling(stop):
        out.logprobs.sum().backward()
    with pytest.raises(RuntimeError, match="a backward ended in the middle"):
        model.score(batch_for(model, LENGTHS)).logprobs.sum().backward()
    model.zero_grad()
    backward(model, batch_for(model, LENGTHS))


def test_only_first_tokens_have_no_gradient() -> None:
    model = tiny_model("qwen3")
    out = model.score(pack([[3], [4]]))
    assert not out.logprobs.any() and not out.entropy.any()
    out.logprobs.sum().backward()
    assert not model.grads.any()


def test_several_graphs_alive_at_once() -> None:
    model = tiny_model("qwen3")
    batches = [batch_for(model, LENGTHS, seed) for seed in range(3)]

    def gradients(order: list[int], together: bool) -> bytes:
        model.zero_grad()
        outs = {i: model.score(batches[i]) for i in range(3)} if together else {}
        for i in order:
            out = outs[i] if together else model.score(batches[i])
            torch.autograd.backward([out.logprobs, out.entropy], [randn(out.logprobs, i), randn(out.entropy, 9)])
        return bits(model.grads)

    for order in ([0, 1, 2], [2, 0, 1]):
        assert gradients(order, together=True) == gradients(order, together=False)


def test_a_longer_sequence_does_not_disturb_a_graph() -> None:
    model, fresh = tiny_model(), tiny_model()  # the rotary tables grow while the first graph is alive
    short, long = batch_for(model, [4]), batch_for(model, [300])
    out = model.score(short)
    with torch.no_grad():
        model.score(long)
    torch.autograd.backward([out.logprobs, out.entropy], [randn(out.logprobs, 0), randn(out.entropy, 1)])
    assert bits(model.grads) == gradient_bits(fresh, short)


def test_a_graph_keeps_its_batch() -> None:
    model = tiny_model()
    batch = batch_for(model, LENGTHS)
    expected = gradient_bits(model, batch)
    model.zero_grad()
    out = model.score(batch)
    batch.tokens.zero_()
    torch.autograd.backward([out.logprobs, out.entropy], [randn(out.logprobs, 0), randn(out.entropy, 1)])
    assert bits(model.grads) == expected


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_backward_twice_is_refused(head: Any) -> None:
    model = tiny_model(head=head)
    batch = batch_for(model, LENGTHS)
    x = model.values(batch) if head == "scalar" else model.score(batch).logprobs
    x.sum().backward(retain_graph=True)
    before = bits(model.grads)
    again = "compute the values" if head == "scalar" else "score the batch"
    with pytest.raises(ValueError, match=f"this graph's backward has already run; {again} again for another one"):
        x.sum().backward()
    assert bits(model.grads) == before


@pytest.mark.parametrize("change", ["params", "view", "load"])
def test_parameters_changed_before_the_backward_are_refused(change: str) -> None:
    model = tiny_model()
    out = model.score(batch_for(model, LENGTHS))
    if change == "params":
        model.params.mul_(2)
    elif change == "view":
        next(model.named_parameters())[1][0, 0] = 1
    else:
        model.load_state_dict(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"the parameters changed between the forward and its backward; run backward\(\) before"
    ):
        out.logprobs.sum().backward()
    assert not model.grads.any()


# ---- what the numbers mean


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_probabilities_sum_to_one_and_give_the_entropy(kind: str, temperature: float) -> None:
    model = tiny_model(kind).double()
    vocab = model.config.vocab_size
    prefix = [7, 5, 0, 11]
    with torch.no_grad():
        batch = pack([[*prefix, token] for token in range(vocab)])
        out = model.score(batch, temperature)
    logp, entropy = batch.last(out.logprobs), batch.last(out.entropy)
    assert float(logp.std()) > 0.1, "far from uniform, or the test says little"
    torch.testing.assert_close(logp.exp().sum(), torch.tensor(1.0).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy, (-(logp.exp() * logp).sum()).expand(vocab), rtol=1e-11, atol=0)


def test_temperature_divides_the_logits() -> None:
    model = tiny_model("llama").double()
    hot = model.clone()
    dict(hot.named_parameters())["lm_head.weight"].div_(1.7)
    batch = batch_for(model, LENGTHS)
    with torch.no_grad():
        ours, divided = model.score(batch, temperature=1.7), hot.score(batch)
    torch.testing.assert_close(ours.logprobs, divided.logprobs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.entropy, divided.entropy, rtol=1e-12, atol=1e-12)


def test_first_tokens_have_neither_logprob_nor_entropy() -> None:
    model = tiny_model()
    batch = batch_for(model, LENGTHS)
    out = model.score(batch)
    first = torch.zeros_like(batch.completion_mask)
    first[batch.cu_seqlens[:-1].long()] = True
    assert bits(out.logprobs[first]) == bits(out.entropy[first]) == bits(torch.zeros(len(batch)))
    assert (out.logprobs[~first] < 0).all() and (out.entropy[~first] > 0).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_completions_alone_have_the_bits_that_they_have_among_all_tokens(kind: str, share: float) -> None:
    """Log-probs, entropies and gradients, for masks with gaps and sequences without a wanted token."""
    model = tiny_model(kind)
    whole = batch_for(model, LENGTHS)
    wanted = torch.rand(whole.tokens.numel(), generator=torch.Generator().manual_seed(3)) < share
    wanted[: whole.lengths[0]] = False
    wanted[whole.cu_seqlens[:-1].long()] = False
    batch = PackedBatch(whole.tokens, whole.cu_seqlens, wanted)
    found = []
    for options in ({}, {"completion_only": True}):
        out = model.score(batch, 0.7, **options)
        weight = randn(out.logprobs, 5)
        model.zero_grad()
        ((out.logprobs * weight + 0.1 * out.entropy)[wanted].sum()).backward()
        found.append((out.logprobs[wanted], out.entropy[wanted], model.grads.clone()))
        if options:
            assert bits(out.logprobs[~wanted], out.entropy[~wanted]) == bits(torch.zeros(2 * int((~wanted).sum())))
    (logprobs, entropy, grads), alone = found
    assert bits(logprobs, entropy) == bits(*alone[:2])
    assert bits(grads + 0.0) == bits(alone[2] + 0.0)  # a sum of no terms is 0, of zeros it may be -0
    assert grads.any() == (share > 0)


def test_a_mask_that_does_not_fit_is_named() -> None:
    model = tiny_model()
    batch = batch_for(model, LENGTHS)
    wrong = PackedBatch(batch.tokens, batch.cu_seqlens, batch.completion_mask)
    object.__setattr__(wrong, "completion_mask", batch.completion_mask[1:])
    with pytest.raises(ValueError, match="argument 'mask' must have shape"):
        model.score(wrong, completion_only=True)


def test_values_are_read_after_the_token() -> None:
    critic = tiny_model(head="scalar")
    batch, changed = pack([[1, 2, 3, 4]]), pack([[1, 2, 3, 5]])
    with torch.no_grad():
        before, after = critic.values(batch), critic.values(changed)
    assert bits(before[:3]) == bits(after[:3]) and before[3] != after[3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_double_build_agrees_with_the_float_one(kind: str) -> None:
    model = tiny_model(kind)
    batch = batch_for(model, [*LENGTHS, 40])
    with torch.no_grad():
        single, double = model.score(batch), model.double().score(batch)
    torch.testing.assert_close(single.logprobs.double(), double.logprobs, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(single.entropy.double(), double.entropy, rtol=2e-5, atol=2e-5)


def loss(model: Model, batch: PackedBatch) -> Tensor:
    """A random linear function of all outputs, as ``backward`` differentiates it."""
    with torch.no_grad():
        if model.head == "scalar":
            values = model.values(batch)
            return (values * randn(values, 0)).sum()
        out = model.score(batch, 0.7)
        return (out.logprobs * randn(out.logprobs, 0)).sum() + (out.entropy * randn(out.entropy, 1)).sum()


def compare_with_central_differences(model: Model, temperature: float = 0.7) -> None:
    batch = batch_for(model, [1, 9, 2, 17])
    model.zero_grad()
    backward(model, batch, temperature=temperature)
    gradients = {name: grad.clone() for name, grad in model.named_grads()}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        direction, original, step = randn(parameter, seed), parameter.clone(), 1e-6
        parameter.add_(direction, alpha=step)
        ahead = loss(model, batch)
        parameter.copy_(original).sub_(direction, alpha=step)
        difference = (ahead - loss(model, batch)) / (2 * step)
        parameter.copy_(original)
        ours = (gradients[name] * direction).sum()
        # The differences' own error: third derivatives x step^2 and rounding / step.
        torch.testing.assert_close(ours, difference, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_gradients_agree_with_central_differences(kind: str, head: Any) -> None:
    compare_with_central_differences(tiny_model(kind, head=head).double())


def test_control_central_differences_notice_a_gradient_that_is_slightly_wrong() -> None:
    with pytest.raises(AssertionError, match="not close"):
        compare_with_central_differences(tiny_model().double(), temperature=0.7001)


# ---- memory: block sizes are rounded up to 64 bytes, from 2 MiB on to 2 MiB


def rounded(size: int) -> int:
    unit = 64 if size < 2**21 else 2**21
    return -(-size // unit) * unit


def forward(model: Model, batch: PackedBatch) -> object:
    return model.values(batch) if model.head == "scalar" else model.score(batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"recompute": True}, {"logits_budget": 0}, {"dtype": torch.float64}, {"head": "scalar"}], ids=str
)
def test_activation_memory_is_what_is_stated(kind: str, options: dict[str, Any]) -> None:
    model = tiny_model(kind, **options)
    batch = batch_for(model, LENGTHS)
    forward(model, batch)  # rotary tables
    _core.free_cached_memory()  # a kept block may be a quarter larger than was asked for
    before = in_use_at_start()
    kept = forward(model, batch)
    assert in_use() - before == rounded(model.activation_bytes(batch.tokens.numel(), len(batch)))
    del kept
    assert in_use() == before
    with torch.no_grad():
        kept = forward(model, batch)
    assert in_use() == before, kept


def test_no_grad_needs_less_memory_from_the_start() -> None:
    model = tiny_model(logits_budget=0)
    batch = batch_for(model, [30] * 8)
    forward(model, batch)

    def peak() -> int:
        _core.free_cached_memory()
        before = in_use_at_start()
        _core.reset_memory_peak()
        forward(model, batch)
        return int(_core.memory_use()["peak"]) - before

    with threads(1):  # kernels' scratch is the same for both; of two threads at once it need not be
        kept = peak()
        with torch.no_grad():
            not_kept = peak()
    stated = [model.activation_bytes(batch.tokens.numel(), len(batch), keep=keep) for keep in (True, False)]
    assert stated[1] < 0.7 * stated[0]
    assert kept - not_kept == rounded(stated[0]) - rounded(stated[1])


def test_inference_mode_keeps_nothing() -> None:
    model = tiny_model()
    batch = batch_for(model, LENGTHS)
    expected = forward_bits(model, batch)
    before = in_use_at_start()
    with torch.inference_mode():
        out = model.score(batch)
    assert in_use() == before and not out.logprobs.requires_grad
    assert bits(out.logprobs, out.entropy) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_recompute_gives_the_same_bits_with_less_memory(kind: str, head: Any) -> None:
    model = tiny_model(kind, head=head)
    saving = same_model(model, recompute=True)
    batch = batch_for(model, LENGTHS)
    assert forward_bits(saving, batch) == forward_bits(model, batch)
    assert gradient_bits(saving, batch) == gradient_bits(model, batch)
    saved = model.activation_bytes(1000, 10) - saving.activation_bytes(1000, 10)
    assert saved > 4 * 1000 * 3 * model.config.hidden_size


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_logits_kept_or_not_give_the_same_bits(kind: str) -> None:
    model = tiny_model(kind)
    batch = batch_for(model, LENGTHS)
    logits = 4 * (batch.tokens.numel() - len(batch)) * model.config.vocab_size
    expected = forward_bits(model, batch), gradient_bits(model, batch)
    for budget in (0, logits // 3, logits - 1, logits):
        other = same_model(model, logits_budget=budget)
        assert (forward_bits(other, batch), gradient_bits(other, batch)) == expected
        kept = other.activation_bytes(batch.tokens.numel(), len(batch))
        without = model.activation_bytes(batch.tokens.numel(), len(batch)) - rounded(logits)
        assert kept == without + (rounded(logits) if budget == logits else 0)


# ---- errors, before any kernel runs


@pytest.mark.parametrize(
    ("seqs", "message"),
    [
        (
            [[1, 2], [3, 275, 4]],
            "tokens: token id 275 at position 1 of sequence 1 is outside the vocabulary of 275 ids (0 to 274)",
        ),
        (
            [[2**31 - 1]],
            "tokens: token id 2147483647 at position 0 of sequence 0 is outside the vocabulary of 275 ids",
        ),
        (
            [[1], [2] * 321],
            "sequence 1 has 321 tokens, more than max_position_embeddings = 320; truncate or drop it",
        ),
    ],
)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_batches_that_do_not_fit(seqs: list[list[int]], message: str, head: Any) -> None:
    model = tiny_model(head=head)
    before = _core.memory_use()["allocations"]
    with pytest.raises(ValueError, match=re.escape(message)):
        forward(model, pack(seqs))
    assert _core.memory_use()["allocations"] == before


def test_the_longest_sequence_fits() -> None:
    model = tiny_model()
    with torch.no_grad():
        assert torch.isfinite(model.score(batch_for(model, [320, 319])).logprobs).all()


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tokens", "cu_seqlens", "message"),
    [
        (i32(1, -1), i32(0, 2), "tokens: token id -1 at position 1 of sequence 0 is outside the vocabulary of 275"),
        (i32(1, 2), i32(0, 1, 1, 2), "sequence 1 is empty; drop it before packing"),
        (i32(), i32(0), "the batch is empty; pack at least one sequence"),
        (i32(1, 2), i32(1, 2), "cu_seqlens must start at 0, but it starts at 1"),
        (i32(1, 2), i32(0, 3, 2), "cu_seqlens must never fall, but entry 2 is 2 after 3"),
        (i32(1, 2), i32(0, 1), "cu_seqlens must end at the number of tokens, 2, but it ends at 1"),
        (i32(1, 2).long(), i32(0, 2), "argument 'tokens' must be int32, but it is another dtype [2] on the CPU"),
        (i32(1, 2), i32(0, 2).double(), "argument 'cu_seqlens' must be int32, but it is float64 [2] on the CPU"),
        (
            i32(1, 2).view(1, 2),
            i32(0, 2),
            "argument 'tokens' must have shape [any], but it is int32 [1, 2] on the CPU",
        ),
        (i32(1, 2, 3, 4)[::2], i32(0, 2), "argument 'tokens' must be contiguous; call .contiguous() on it first"),
    ],
)
def test_batches_made_by_hand(tokens: Tensor, cu_seqlens: Tensor, message: str) -> None:
    model = tiny_model()
    batch = PackedBatch(tokens, cu_seqlens, torch.ones(tokens.shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=re.escape(message)):
        model.score(batch)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, but it is {temperature}"):
        tiny_model().score(pack([[1, 2]]), temperature=temperature)


def test_the_wrong_head() -> None:
    batch = pack([[1, 2]])
    with pytest.raises(ValueError, match=r"this model has a scalar head; call values\(batch\), or load it with head='lm'"):
        tiny_model(head="scalar").score(batch)
    with pytest.raises(
        ValueError, match=r"this model has a language-model head; call score\(batch\), or load it with head='scalar'"
    ):
        tiny_model().values(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device must be 'cpu', 'cuda' or 'cuda-sim', but it is 'gpu'"),
        ({"head": "value"}, "head must be 'lm' or 'scalar', but it is 'value'"),
        ({"dtype": torch.bfloat16}, "dtype must be torch.float32 or torch.float64, but it is torch.bfloat16"),
        (
            {"dtype": torch.float64, "level": "scalar"},
            "level chooses among float32 kernels; leave it out with dtype=torch.float64",
        ),
        ({"seed": -1}, "seed must lie in 0 .. 2^64 - 1, but it is -1"),
        ({"seed": 2**64}, "seed must lie in 0 .. 2^64 - 1, but it is 18446744073709551616"),
        ({"logits_budget": -1}, "logits_budget must not be negative, but it is -1"),
        ({"level": "mmx"}, "mmx"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Model(KINDS["llama"], **options)


def test_repr_says_what_it_is() -> None:
    model = tiny_model()
    text = repr(model)
    assert f"{model.params.numel():,} parameters" in text and "vocab_size=275" in text and "'lm'" in text


def test_sequences_for_tests_reach_the_whole_vocabulary() -> None:
    assert {token for seq in sequences([2000], 60) for token in seq} == set(range(60))
