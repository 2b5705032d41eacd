"""Out of memory: whichever allocation fails, MemoryError, and afterwards the engine computes the right bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models_for_tests import KINDS, backward, batch_for, bits, gradient_bits, in_use, in_use_at_start, threads, tiny_model
from tutelage import AdamW, Model, _core


@pytest.fixture(autouse=True)
def no_failure_is_left_pending() -> Iterator[None]:
    yield
    _core.fail_allocation(0)


def allocations(work: Callable[[], object]) -> int:
    before = int(_core.memory_use()["allocations"])
    work()
    return int(_core.memory_use()["allocations"]) - before


def fails(k: int, work: Callable[[], object]) -> None:
    _core.fail_allocation(k)
    with pytest.raises(MemoryError):
        work()
    _core.fail_allocation(0)


OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"recompute": True},
    "qwen3": {"logits_budget": 0},
    "mistral": {"head": "scalar"},
    "gpt2": {},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_allocation_of_a_forward_may_fail(kind: str, count: int) -> None:
    def forward(model: Model) -> bytes:
        if model.head == "scalar":
            return bits(model.values(batch))
        out = model.score(batch)
        return bits(out.logprobs, out.entropy)

    def fresh() -> Model:  # its rotary tables are not made yet
        return tiny_model(kind, **OPTIONS[kind])

    with threads(count):
        batch = batch_for(fresh(), [3, 1, 20])
        expected = forward(fresh())
        model = fresh()
        number = allocations(lambda: forward(model))
        assert number > 10
        before = in_use_at_start()
        for k in range(1, number + 1):
            failing = fresh()
            fails(k, lambda failing=failing: forward(failing))
            assert forward(failing) == expected
        del failing
        assert in_use() == before, "a failed forward keeps nothing"


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_allocation_of_a_backward_may_fail(kind: str, count: int) -> None:
    def graph(model: Model) -> torch.Tensor:
        if model.head == "scalar":
            return model.values(batch).sum()
        out = model.score(batch)
        return out.logprobs.sum() + out.entropy.sum()

    with threads(count):
        model = tiny_model(kind, **OPTIONS[kind])
        batch, another = batch_for(model, [3, 1, 20]), batch_for(model, [9, 4], seed=1)
        expected = gradient_bits(tiny_model(kind, **OPTIONS[kind]), another)
        loss = graph(model)
        number = allocations(loss.backward)
        assert number > 10
        for k in range(1, number + 1):
            failing = tiny_model(kind, **OPTIONS[kind])
            if k % 2:  # a part of what is to be added is there already, or grads were read
                backward(failing, another)
            else:
                assert not failing.grads.any()
            loss = graph(failing)
            fails(k, loss.backward)
            failing.zero_grad()
            backward(failing, another)
            assert bits(failing.grads) == expected


def test_half_a_gradient_is_never_read_or_applied() -> None:
    model = tiny_model("llama-tied")
    batch = batch_for(model, [3, 1, 20])
    optimizer = AdamW(model, lr=0.1)
    out, another = model.score(batch), model.score(batch)
    before = bits(model.params)
    number = allocations(out.logprobs.sum().backward)
    model.zero_grad()
    out = model.score(batch)
    fails(number // 2, out.logprobs.sum().backward)
    for use in (optimizer.step, lambda: model.grads, another.logprobs.sum().backward):
        with pytest.raises(
            RuntimeError,
            match=r"a backward ended in the middle, so the gradients hold only part of it; call zero_grad\(\) first",
        ):
            use()
    assert bits(model.params) == before and optimizer.steps == 0
    optimizer.zero_grad()
    assert not model.grads.any()
    assert gradient_bits(model, batch) == gradient_bits(tiny_model("llama-tied"), batch)


def test_a_backward_that_fails_before_it_starts_has_added_nothing() -> None:
    model = tiny_model()
    batch = batch_for(model, [3, 1, 20])
    expected = gradient_bits(model, batch)
    loss = model.score(batch).logprobs.sum()
    fails(1, lambda: loss.backward(retain_graph=True))
    assert bits(model.grads) == expected


def test_making_a_model_and_a_step_may_fail() -> None:
    """Neither allocates from the core today; should one start to, its failures are tested with the rest."""
    model = tiny_model()
    optimizer = AdamW(model, lr=0.1)
    for work in (lambda: Model(KINDS["llama"]), optimizer.step):
        for k in range(1, allocations(work) + 1):
            before = bits(model.params)
            fails(k, work)
            assert bits(model.params) == before
            work()


def test_control_without_a_failure_nothing_is_raised() -> None:
    model = tiny_model()
    batch = batch_for(model, [3])
    number = allocations(lambda: model.score(batch))
    _core.fail_allocation(number + 1)
    model.score(batch)
    with pytest.raises(MemoryError):
        model.score(batch)
    model.score(batch)


def resources() -> tuple[int, int, int]:
    """Resident bytes, open files and threads of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, len(list(Path("/proc/self/fd").iterdir())), int(status["Threads"])


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_two_thousand_steps_leak_nothing(kind: str) -> None:
    """Lengths change from step to step, so that every size of block comes and goes; all of them within the first 200 steps."""
    model = tiny_model(kind)
    optimizer = AdamW(model, lr=1e-3)
    lengths = random.Random(0)
    batches = [batch_for(model, [lengths.randint(1, 300) for _ in range(lengths.randint(1, 8))]) for _ in range(50)]
    early = resources()
    for step in range(1, 2_001):
        (-model.score(batches[step % 50]).logprobs.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 200:
            early = resources()
    late = resources()
    assert late[0] <= 1.01 * early[0]
    assert late[1:] == early[1:]
