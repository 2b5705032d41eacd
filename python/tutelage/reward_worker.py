"""The processes in which a reward function runs: a keeper, and the worker that it forks. `rewards.py` starts and asks them.

The keeper has no code of the user's. It is the subreaper of everything that the worker starts: Linux re-parents to it
what a daemon's double fork and `setsid` would hand to init. When the trainer says so, when the trainer is gone, even by
kill -9, or when the worker ends, the keeper kills all of its descendants, says how the worker ended, and ends.

The worker reads a call a line, {"id", "arguments": {name: list}}, and writes what `_answers` yields, as JSON lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import math
import mmap
import os
import reprlib
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, overload

from tutelage.user_code import load_function

OPTION = "--reward_funcs"
"""What the functions are given to, for the messages."""

_REASON_CHARACTERS = 300
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


# --- the keeper ----------------------------------------------------------------------------------------------


def keep(job: dict[str, Any]) -> NoReturn:
    """The keeper's whole life."""
    control, status, request, reply = job["descriptors"]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    progress = mmap.mmap(-1, 8)  # shared with the worker: readable when that is dead
    _note(progress, -1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # it ends with its trainer, and not without its worker
        signal.signal(number, signal.SIG_IGN)
    keeper = os.getpid()
    worker = os.fork()  # this process has one thread and nothing of the user's
    if worker == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _outlive_signals()
        for descriptor in (control, status, woken, wake):
            os.close(descriptor)
        _work(job, keeper, request, reply, progress)
    os.close(request)
    os.close(reply)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    ended: dict[int, int] = {}
    # A process that the trainer forked may hold the other end of `control` open, so its parent is looked at as well.
    while worker not in ended and os.getppid() == job["parent"]:
        ready = {descriptor for descriptor, _ in poll.poll(1000)}
        if woken in ready:
            os.read(woken, 4096)
            _reap(ended)
        if control in ready:
            break
    _kill_descendants(ended)
    code = os.waitstatus_to_exitcode(ended[worker]) if worker in ended else None
    with contextlib.suppress(BrokenPipeError):
        os.write(status, json.dumps({"exit": code, "sample": int.from_bytes(progress[:8], "little", signed=True)}).encode())
    os._exit(0)


def _reap(ended: dict[int, int]) -> bool:
    """Adds what has ended, pid -> wait status; whether any child is left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if not pid:
            return True
        ended[pid] = status


def _kill_descendants(ended: dict[int, int]) -> None:
    """Until none is left: those whose parent dies become children of this process.

    Gives up after 10 s: a process of another user (sudo) cannot be killed.
    """
    deadline = time.monotonic() + 10
    while _reap(ended) and time.monotonic() < deadline:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = list(children.get(root, ()))
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, ()))
    return found


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed: a reward function cannot be watched over on this system")


# --- the worker ----------------------------------------------------------------------------------------------


class _WrongAnswerError(Exception):
    """A function returned something that is no list of one value a sample."""


class _Watched(list[Any]):
    """A list that notes which element was taken from it last; −1 when a loop over it has come to its end."""

    def __init__(self, values: Iterable[Any], note: Callable[[int], None]) -> None:
        super().__init__(values)
        self._note = note

    def __iter__(self) -> Iterator[Any]:
        for index, value in enumerate(super().__iter__()):
            self._note(index)
            yield value
        self._note(-1)

    @overload
    def __getitem__(self, key: SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> list[Any]: ...
    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        if not isinstance(key, slice) and -len(self) <= key.__index__() < len(self):
            self._note(key.__index__() % len(self))
        return super().__getitem__(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # a function may send it to a process of its own


def _note(progress: mmap.mmap, sample: int) -> None:
    progress[:8] = sample.to_bytes(8, "little", signed=True)


def _work(job: dict[str, Any], keeper: int, request: int, reply: int, progress: mmap.mmap) -> NoReturn:
    """The worker's whole life."""
    worker = os.getpid()
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)  # it died before this process could ask to die with it
        for descriptor in (request, reply):
            os.set_inheritable(descriptor, False)
        _limit(resource.RLIMIT_AS, job["memory_bytes"])
        _limit(resource.RLIMIT_CORE, 0)
        faulthandler.enable(2)
        function = _loaded(job, reply)
        with open(request, "rb") as requests:
            for line in requests:
                call = json.loads(line)
                _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + job["cpu_seconds"]), soft_only=True)
                faulthandler.dump_traceback_later(0.9 * job["seconds"], file=2)
                for answer in _answers(function, call["arguments"], job, lambda sample: _note(progress, sample)):
                    if os.getpid() != worker:  # a child that the function forked has come back from it, too
                        os._exit(0)
                    _reply(reply, {"id": call["id"], **answer})
                faulthandler.cancel_dump_traceback_later()
        os._exit(0)
    except BaseException:
        _print_traceback()
    finally:
        os._exit(1)


def _outlive_signals() -> None:
    """What asks every process of a job to stop (systemd, Slurm) is for the trainer, which finishes its step first.

    What the function starts has the usual handlers: it may want to stop that.
    """
    usual: dict[signal.Signals, Any] = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    for number in usual:
        signal.signal(number, lambda number, frame: None)  # not SIG_IGN, which a new program would inherit
    os.register_at_fork(after_in_child=restore)


def _limit(which: int, value: int, soft_only: bool = False) -> None:
    """Sets a limit, or a lower one that is set already."""
    hard = resource.getrlimit(which)[1]
    lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (lowest, hard if soft_only else lowest))


def _reply(descriptor: int, answer: Mapping[str, Any]) -> None:
    data = memoryview(json.dumps(answer).encode() + b"\n")
    while data:
        data = data[os.write(descriptor, data) :]


def _print_traceback() -> None:
    """Where sys.stderr was at the start: the function may have put another in its place."""
    with contextlib.suppress(OSError):
        os.write(2, traceback.format_exc().encode(errors="replace"))


def _loaded(job: dict[str, Any], reply: int) -> Callable[..., Any]:
    try:
        function = load_function(job["spec"], OPTION, (), ("prompts", "completions", *job["columns"]))
    except BaseException as error:
        where = _place(error)
        problem = f"{OPTION} {job['spec']} cannot be loaded: {_described(error)}{where}" if where else str(error)
        _reply(reply, {"id": 0, "problem": problem})
        os._exit(1)
    _reply(reply, {"id": 0})
    return function


def _answers(
    function: Callable[..., Any], arguments: dict[str, list[Any]], job: dict[str, Any], note: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """What goes back of one call: {"values": [number, None, or text that says what is wrong]}, or what is wrong
    with the whole, in "problem"; before it that is known, what is wrong and with which "sample"."""
    count = len(arguments["completions"])
    taken = -1

    def took(sample: int) -> None:
        nonlocal taken
        taken = sample
        note(sample)

    took(-1)
    try:
        yield {"values": _called(function, {name: _Watched(values, took) for name, values in arguments.items()}, count)}
        return
    except BaseException as error:
        problem = _problem(error, job)
        if not isinstance(error, _WrongAnswerError):
            _print_traceback()
    if count == 1:
        yield {"values": [problem]}
        return
    yield {"problem": problem, "sample": taken}
    values: list[Any] = []
    for sample in range(count):
        note(sample)
        try:
            values += _called(function, {name: [column[sample]] for name, column in arguments.items()}, 1)
        except BaseException as error:
            values.append(_problem(error, job))
    alone = any(isinstance(value, str) for value in values)
    yield {"values": values if alone else None, "problem": problem}


def _called(function: Callable[..., Any], arguments: dict[str, list[Any]], count: int) -> list[float | str | None]:
    values = function(**arguments)
    if not isinstance(values, (list, tuple)) and hasattr(values, "tolist"):  # an array, a tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise _WrongAnswerError(f"returned {_shown(values)} where a list belongs")
    if len(values) != count:
        raise _WrongAnswerError(f"returned {len(values)} values for {count} sample{'s' * (count > 1)}")
    return [_value(value) for value in values]


def _value(value: Any) -> float | str | None:
    if value is None:
        return None
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except Exception:
        return f"gave {_shown(value)} where a number belongs"[:_REASON_CHARACTERS]


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _problem(error: BaseException, job: dict[str, Any]) -> str:
    if isinstance(error, _WrongAnswerError):
        return str(error)[:_REASON_CHARACTERS]
    limit = f" (the limit is {job['memory_bytes'] / 2**30:.3g} GiB)" if isinstance(error, MemoryError) else ""
    return f"raised {_described(error)}{limit}{_place(error)}"


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (type(error).__name__ + (f": {text}" if text else ""))[:_REASON_CHARACTERS]


def _place(error: BaseException) -> str:
    """ " (file, line 3)", where in the user's code it came from; empty if not from there."""
    ours = {__file__, load_function.__code__.co_filename, importlib.__file__}
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename not in ours and not frame.filename.startswith("<frozen")]
    if theirs:
        return f" ({theirs[-1].filename}, line {theirs[-1].lineno})"
    return f" ({error.filename}, line {error.lineno})" if isinstance(error, SyntaxError) else ""
