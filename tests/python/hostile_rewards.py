"""Reward functions that misbehave at the completion "bad", for test_rewards.py. Their workers import this file, so no torch."""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Values = list[float | None]


def each(completions: Sequence[str], bad: Callable[[], Any]) -> list[Any]:
    """1 for every completion, and what `bad` does or gives for "bad"."""
    return [bad() if completion == "bad" else 1.0 for completion in completions]


def fine(prompts: list[str], completions: list[str], **columns: list[Any]) -> Values:
    return [float(len(completion)) for completion in completions]


def sometimes(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: None)


def nothing(completions: list[str], **columns: Any) -> Values:
    return [None] * len(completions)


def tells_its_imports(completions: list[str], **columns: Any) -> Values:
    return [float(any(name in sys.modules for name in ("torch", "numpy", "pickle")))] * len(completions)


def hashes(completions: list[str], **columns: Any) -> Values:
    return [float(hash(completion) % 2**40) for completion in completions]


def process_id(completions: list[str], **columns: Any) -> Values:
    return [float(os.getpid())] * len(completions)


def matches(prompts: list[str], completions: list[str], answer: list[str]) -> Values:
    assert isinstance(prompts, list) and isinstance(completions, list) and isinstance(answer, list)
    pairs = zip(prompts, completions, answer, strict=True)
    return [float(prompt + completion == right) for prompt, completion, right in pairs]


def numbers_of_other_kinds(completions: list[str], **columns: Any) -> Any:
    return (True, 2, ctypes.c_float(3).value, None)


def an_array(completions: list[str], **columns: Any) -> Any:
    return array.array("d", range(len(completions)))


def stops_its_children(completions: list[str], **columns: Any) -> Values:
    """And is asked to stop itself."""
    ends = []
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(os.getpid(), number)
        with subprocess.Popen(["sleep", "1000"]) as program:
            program.send_signal(number)
        ends.append(program.returncode == -number)
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(begun, b"x")
                while True:
                    time.sleep(0.01)  # a signal just before a sleep does not end it
            finally:
                os._exit(9)  # SIGINT raises
        os.read(ready, 1)
        os.kill(child, number)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ends.append(ended == (9 if number == signal.SIGINT else -number))
    return [float(all(ends))] * len(completions)


# ---- hostile


def as_told(completions: list[str], how: list[str], **columns: Any) -> Values:
    """What the function does that `how` names: for many cases in one worker."""
    return globals()[how[0]](completions=completions)  # type: ignore[no-any-return]


def raises(completions: list[str], **columns: Any) -> Values:
    def bad() -> float:
        print("looking for a number")
        raise ValueError("no number\nin it")

    return each(completions, bad)


def compares_and_raises(completions: list[str], **columns: Any) -> Values:
    if len(completions) > 1:
        completions.index("bad")
        raise KeyError("only together")
    return [1.0]


def raises_then_hangs(completions: list[str], **columns: Any) -> Values:
    if len(completions) > 1:
        raise KeyError("only together")
    time.sleep(1000)
    return [1.0]


def hangs(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: time.sleep(1000))


def hangs_after_its_loop(completions: list[str], **columns: Any) -> Values:
    values = each(completions, lambda: 1.0)
    time.sleep(1000 * completions.count("bad"))
    return values


def hangs_in_c(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: re.match("(a+)+$", "a" * 60 + "b"))


def ignores_signals(completions: list[str], **columns: Any) -> Values:
    def bad() -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN)
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(1000)

    return each(completions, bad)


def gives_nan(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: float("nan"))


def gives_infinity(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: float("-inf"))


def gives_too_much(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: 10**31)


def gives_text(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: "0.5")


def gives_a_huge_integer(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: 10**400)


def leaves_one_out(completions: list[str], **columns: Any) -> Values:
    return [1.0 for completion in completions if completion != "bad"]


def gives_a_dictionary(completions: list[str], **columns: Any) -> Any:
    return {"reward": 1.0} if "bad" in completions else [1.0] * len(completions)


def gives_an_object(completions: list[str], **columns: Any) -> Values:
    class Own:
        def __float__(self) -> float:
            raise RuntimeError("no")

        def __repr__(self) -> str:
            raise RuntimeError("no")

    return each(completions, Own)


def prints_a_gigabyte(completions: list[str], **columns: Any) -> Values:
    def bad() -> float:
        for _ in range(1024):
            os.write(1, b"x" * (1 << 20))
        return 1.0

    return each(completions, bad)


def starts_a_child(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: float(subprocess.Popen(["sleep", "1000"]).pid > 0))


def forks(completions: list[str], **columns: Any) -> Values:
    def bad() -> float:
        if os.fork() == 0:
            time.sleep(1000)
        return 1.0

    return each(completions, bad)


def forks_and_both_return(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: float(os.fork() >= 0))


def becomes_a_daemon(completions: list[str], **columns: Any) -> Values:
    """The grandchild leaves session, process group and parent; then the function hangs."""

    def bad() -> None:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(1000)
            os._exit(0)
        os.wait()
        time.sleep(1000)

    return each(completions, bad)


def allocates(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: float(len(bytes(100 << 30))))


def allocates_two_gigabytes(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: len(bytes(2 << 30)) / 2**31)


def ends_its_process(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: os._exit(3))


def exits(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: sys.exit("enough"))


def recurses(completions: list[str], **columns: Any) -> Values:
    def bad() -> Any:
        return bad()

    return each(completions, bad)


def segfaults(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: ctypes.string_at(0))


def is_killed(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: os.kill(os.getpid(), signal.SIGKILL))


def closes_its_pipes(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: os.closerange(0, 256))


def writes_into_every_pipe(completions: list[str], **columns: Any) -> Values:
    def bad() -> float:
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"[" * 100_000 + b"\n")
        return 1.0

    return each(completions, bad)


def reads_its_input(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: float(input()))


def computes_for_ever(completions: list[str], **columns: Any) -> Values:
    def bad() -> None:
        while True:
            pass

    return each(completions, bad)


def kills_its_keeper(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: os.kill(os.getppid(), signal.SIGKILL) or time.sleep(1000))


def stops_its_keeper(completions: list[str], **columns: Any) -> Values:
    return each(completions, lambda: os.kill(os.getppid(), signal.SIGSTOP) or time.sleep(1000))
