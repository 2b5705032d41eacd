"""A process forked after the engine has worked on several threads: its threads are gone, its bits are not."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from models_for_tests import backward, batch_for, bits, threads, tiny_model
from tutelage import Model

SECONDS = 60  # a child that waits for threads that are not there ends here


def in_a_child(model: Model, folder: Path) -> bytes:
    """The bits of :func:`work` in a forked process."""
    result = folder / "bits"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        try:
            result.write_bytes(work(model))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return result.read_bytes()


def work(model: Model) -> bytes:
    """Log-probs and gradients on as many threads as torch has. (Nothing of torch's own that is large enough to be shared among
    threads: that waits for ever in a forked child.)"""
    batch = batch_for(model, [9, 30, 17])
    logprobs = model.score(batch).logprobs
    backward(model, batch)
    return bits(logprobs.detach(), model.grads)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_forked_after_work_has_the_same_bits(tmp_path: Path, count: int) -> None:
    with threads(count):
        model = tiny_model()
        model.score(batch_for(model, [40, 40]))  # now there are threads to lose
        assert in_a_child(model, tmp_path) == work(model)  # and the parent keeps its own
