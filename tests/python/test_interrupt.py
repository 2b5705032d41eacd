"""Ctrl-C during a long call of the engine: KeyboardInterrupt between two blocks, and the model stays usable."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from models_for_tests import backward, batch_for, bits, forward_bits, gradient_bits, randn, threads
from tutelage import Model, ModelConfig, PackedBatch, _core
from tutelage.rollouts import Generation, GenerationSettings, Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def deep_model() -> Model:
    return Model(
        ModelConfig(vocab_size=130, hidden_size=64, intermediate_size=128, num_hidden_layers=80, num_attention_heads=2)
    )


def allocations() -> int:
    return int(_core.memory_use()["allocations"])


@contextmanager
def ctrl_c_after(started: int) -> Iterator[None]:
    """Ctrl-C as soon as the engine has allocated so often: a measure of its progress that no clock is in."""
    stop = threading.Event()

    def watch() -> None:
        while allocations() < started and not stop.is_set():
            pass
        if not stop.is_set():
            _thread.interrupt_main()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def work(model: Model, batch: PackedBatch, direction: str) -> Callable[[], object]:
    if direction == "forward":
        return lambda: forward_bits(model, batch)
    out = model.score(batch)
    return lambda: torch.autograd.backward([out.logprobs, out.entropy], [randn(out.logprobs, 0), randn(out.entropy, 1)])


def test_control_without_ctrl_c_nothing_is_raised() -> None:
    model = deep_model()
    with ctrl_c_after(10**18):
        forward_bits(model, batch_for(model, [5]))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_long_call(direction: str, count: int) -> None:
    model = deep_model()
    batch = batch_for(model, [100] * 8)
    expected = forward_bits(model, batch), gradient_bits(model, batch)
    model.zero_grad()
    with threads(count):
        whole = work(model, batch, direction)
        before = allocations()
        whole()
        complete = allocations() - before
        model.zero_grad()
        interrupted = work(model, batch, direction)
        before = allocations()
        with pytest.raises(KeyboardInterrupt), ctrl_c_after(before + complete // 10):
            interrupted()
        assert complete // 10 <= allocations() - before < complete, "before its end"
        if direction == "backward":
            with pytest.raises(RuntimeError, match=r"a backward ended in the middle.*call zero_grad\(\) first"):
                backward(model, batch)
    assert forward_bits(model, batch) == expected[0]
    assert gradient_bits(model, batch) == expected[1]


def test_ctrl_c_in_the_middle_of_a_generation_step() -> None:
    """The step is done again, not lost: what comes out afterwards has the bits of a generation that nobody stopped."""
    model = deep_model()
    prompts = [[row] * 100 for row in range(8)]
    expected = model.generate(prompts, 4)
    before = allocations()
    Generation(model, prompts, GenerationSettings(4, prefill_chunk=1000)).step()
    complete = allocations() - before
    generation = Generation(model, prompts, GenerationSettings(4, prefill_chunk=1000))
    before = allocations()
    with pytest.raises(Interrupted, match=r"^interrupted after 0 of 8 rows$") as caught, ctrl_c_after(before + complete // 10):
        generation.step()
    assert complete // 10 <= allocations() - before < complete, "before its end"
    assert caught.value.partial.lengths == [0] * 8
    while generation.step():
        pass
    for ours, theirs in ((generation.rollouts().tokens, expected.tokens), (generation.rollouts().logprobs, expected.logprobs)):
        assert bits(*ours) == bits(*theirs)
