"""AdamW: torch's by tolerance, itself by the bit; what is not finite is never applied."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from models_for_tests import backward, batch_for, bits, randn, tiny_model
from tutelage import AdamW, Model, NonFiniteGradientError

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def set_gradient(model: Model, gradient: Tensor) -> None:
    model.grads.copy_(gradient)


def torch_adamw(model: Model, **options: Any) -> tuple[list[Tensor], Tensor, torch.optim.AdamW]:
    """torch's optimizer over copies: what decays and what does not."""
    mask = model.decay_mask()
    parts = [model.params[mask].clone(), model.params[~mask].clone()]
    groups = [{"params": [parts[0]]}, {"params": [parts[1]], "weight_decay": 0.0}]
    return parts, mask, torch.optim.AdamW(groups, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_grad_norm", [None, 1.5])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_agrees_with_torch(kind: str, max_grad_norm: float | None, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype=dtype)
    options = {"lr": 3e-2, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.3}
    ours = AdamW(model, max_grad_norm=max_grad_norm, **options)  # type: ignore[arg-type]
    parts, mask, theirs = torch_adamw(model, **options)
    for step in range(10):
        gradient = randn(model.params, step) * (1e-3 if step % 2 else 1)  # clipped and not
        set_gradient(model, gradient)
        ours.lr = theirs.param_groups[0]["lr"] = theirs.param_groups[1]["lr"] = 3e-2 / (1 + step)
        norm = float(gradient.norm())
        assert ours.step() == pytest.approx(norm, rel=1e-5)
        if max_grad_norm is not None and norm > max_grad_norm:  # torch's clipping adds 1e-6 to the norm
            gradient *= max_grad_norm / norm
        parts[0].grad, parts[1].grad = gradient[mask], gradient[~mask]
        theirs.step()
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(model.params[mask], parts[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(model.params[~mask], parts[1], rtol=tolerance, atol=tolerance)


def test_norms_and_biases_do_not_decay() -> None:
    model = tiny_model("layernorm")
    before, mask = model.params.clone(), model.decay_mask()
    AdamW(model, lr=0.1, weight_decay=0.5).step()  # no gradient: nothing but the decay
    assert bits(model.params[~mask]) == bits(before[~mask])
    torch.testing.assert_close(model.params[mask], before[mask] * 0.95)


def test_a_learning_rate_of_zero_changes_no_weight() -> None:
    model = tiny_model()
    before = bits(model.params)
    set_gradient(model, randn(model.params, 0))
    AdamW(model, lr=0.0, weight_decay=0.5).step()
    assert bits(model.params) == before


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1])
def test_a_learning_rate_set_to_nonsense_is_not_applied(lr: float) -> None:
    model = tiny_model()
    set_gradient(model, randn(model.params, 0))
    optimizer = AdamW(model, lr=0.1)
    before = bits(model.params, optimizer.exp_avg, optimizer.exp_avg_sq)
    optimizer.lr = lr
    with pytest.raises(
        ValueError, match=f"lr must not be negative, infinite or NaN, but it is {lr}; the update was not applied"
    ):
        optimizer.step()
    assert bits(model.params, optimizer.exp_avg, optimizer.exp_avg_sq) == before and optimizer.steps == 0


def test_clipping_scales_the_step_and_not_the_gradient() -> None:
    model = tiny_model()
    gradient = randn(model.params, 0)
    set_gradient(model, gradient)
    optimizer = AdamW(model, lr=0.1, betas=(0.9, 0.95), max_grad_norm=0.5)
    norm = optimizer.step()
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert bits(model.grads) == bits(gradient)
    torch.testing.assert_close(optimizer.exp_avg, 0.1 * gradient * (0.5 / norm))
    below = tiny_model()
    set_gradient(below, gradient)
    free = AdamW(below, lr=0.1, max_grad_norm=norm * 1.01)
    free.step()
    torch.testing.assert_close(free.exp_avg, 0.1 * gradient)


def test_a_step_bumps_the_version_of_params() -> None:
    model = tiny_model()
    version = model.params._version
    AdamW(model, lr=0.1).step()
    assert model.params._version > version


def test_backward_after_the_step_is_refused() -> None:
    model = tiny_model()
    out = model.score(batch_for(model, [4, 5]))
    AdamW(model, lr=0.1).step()
    with pytest.raises(RuntimeError, match="the parameters changed between the forward and its backward"):
        out.logprobs.sum().backward()


def test_zero_grad() -> None:
    model = tiny_model()
    optimizer = AdamW(model, lr=0.1)
    backward(model, batch_for(model, [4, 5]))
    assert model.grads.any()
    optimizer.zero_grad()
    assert not model.grads.any()


def test_the_look_up_of_a_tied_embedding_is_in_the_step() -> None:
    """What the engine keeps apart is added although nobody reads ``grads``."""
    read, unread = tiny_model("llama-tied"), tiny_model("llama-tied")
    for model in (read, unread):
        backward(model, batch_for(model, [4, 5]))
    assert read.grads.any()
    norms = [AdamW(model, lr=0.1).step() for model in (read, unread)]
    assert norms[0] == norms[1] and bits(read.params) == bits(unread.params)


# ---- what is not finite is not applied


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_gradient_that_is_not_finite_is_not_applied(kind: str, poison: float) -> None:
    model = tiny_model(kind)
    optimizer = AdamW(model, lr=0.1, max_grad_norm=1.0)
    set_gradient(model, randn(model.params, 0))
    optimizer.step()
    before = bits(model.params, optimizer.exp_avg, optimizer.exp_avg_sq), optimizer.steps, model.params._version
    for name, _ in model.named_parameters():
        set_gradient(model, randn(model.params, 1))
        dict(model.named_grads())[name].view(-1)[-1] = poison
        model.grads[-1] = poison  # in a later tensor too: the first is named
        with pytest.raises(
            NonFiniteGradientError,
            match=rf"the gradient's norm is (nan|inf): {re.escape(name)} is the first parameter whose gradient is not "
            "finite; the update was not applied",
        ):
            optimizer.step()
        assert (
            bits(model.params, optimizer.exp_avg, optimizer.exp_avg_sq),
            optimizer.steps,
            model.params._version,
        ) == before


def test_nan_in_the_loss_is_not_applied() -> None:
    model = tiny_model()
    before = bits(model.params)
    (model.score(batch_for(model, [4, 5])).logprobs.sum() * math.nan).backward()
    with pytest.raises(NonFiniteGradientError, match=r"model\.embed_tokens\.weight is the first"):
        AdamW(model, lr=0.1).step()
    assert bits(model.params) == before


def test_nan_in_a_weight_is_not_applied() -> None:
    model = tiny_model()
    dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    before = bits(model.params)
    backward(model, batch_for(model, [4, 5]))
    with pytest.raises(NonFiniteGradientError, match="the update was not applied"):
        AdamW(model, lr=0.1).step()
    assert bits(model.params) == before


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e30), (torch.float64, 1e200)])
def test_squares_that_overflow_are_not_applied(dtype: torch.dtype, large: float) -> None:
    model = tiny_model(dtype=dtype)
    set_gradient(model, torch.full_like(model.params, large))
    before = bits(model.params)
    with pytest.raises(NonFiniteGradientError, match="every entry is finite, but their squares overflow"):
        AdamW(model, lr=0.1).step()
    assert bits(model.params) == before


# ---- state


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_saved_state_continues_bit_for_bit(kind: str) -> None:
    def step(model: Model, optimizer: AdamW, seed: int) -> None:
        optimizer.zero_grad()
        backward(model, batch_for(model, [4, 9, 5], seed), seed)
        optimizer.step()

    model = tiny_model(kind)
    optimizer = AdamW(model, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    for seed in range(3):
        step(model, optimizer, seed)
    other = model.clone()
    resumed = AdamW(other, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    forgetful_model = model.clone()
    forgetful = AdamW(forgetful_model, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, resumed, seed)
        step(forgetful_model, forgetful, seed)
    assert bits(other.params, resumed.exp_avg, resumed.exp_avg_sq) == bits(
        model.params, optimizer.exp_avg, optimizer.exp_avg_sq
    )
    assert resumed.steps == optimizer.steps == 6
    assert bits(forgetful_model.params) != bits(model.params), "control: the state matters"


def test_a_state_of_another_model_is_refused() -> None:
    small, large = AdamW(tiny_model("llama"), lr=0.1), AdamW(tiny_model("llama-tied"), lr=0.1)
    small.model.grads.fill_(1)
    small.step()
    before = bits(small.exp_avg, small.exp_avg_sq)
    state = {**small.state_dict(), "exp_avg_sq": large.exp_avg_sq, "exp_avg": small.exp_avg + 1, "steps": 9}
    entries, parameters = large.model.params.numel(), small.model.params.numel()
    with pytest.raises(ValueError, match=f"^exp_avg_sq has {entries} entries, but the model has {parameters} parameters$"):
        small.load_state_dict(state)
    assert bits(small.exp_avg, small.exp_avg_sq) == before and small.steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr = -0.001, eps = 1e-08 and weight_decay = 0.0 must not be negative (eps: positive)"),
        ({"eps": 0.0}, "lr = 0.1, eps = 0.0 and weight_decay = 0.0 must not be negative (eps: positive)"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1 must not be negative"),
        ({"lr": math.nan}, "lr = nan, "),
        ({"betas": (1.0, 0.9)}, "betas must lie in [0, 1), but they are (1.0, 0.9)"),
        ({"betas": (0.9, -0.1)}, "betas must lie in [0, 1), but they are (0.9, -0.1)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive or None, but it is 0.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be positive or None, but it is nan"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AdamW(tiny_model(), **{"lr": 0.1, **options})


# ---- torch's own optimizers


def test_torchs_optimizers_work_on_the_flat_buffers() -> None:
    ours, theirs = tiny_model("llama-tied"), tiny_model("llama-tied")
    optimizer = AdamW(ours, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    torchs = torch.optim.AdamW([theirs.params], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    start = ours.params.clone()
    for seed in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            backward(model, batch_for(model, [4, 9, 5], seed), seed)
        optimizer.step()
        version = theirs.params._version
        theirs.params.grad = theirs.grads
        torchs.step()
        assert theirs.params._version > version
    assert (ours.params - start).abs().max() > 1e-2
    torch.testing.assert_close(theirs.params, ours.params, rtol=1e-4, atol=1e-4)
