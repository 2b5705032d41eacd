"""Reward functions, `f(prompts, completions, **columns) -> list[float | None]` as in TRL, in processes that can be killed.

Each function has a worker of its own (`reward_worker.py`), an interpreter started afresh: never forked from the trainer,
whose threads and locks a fork would copy. All functions of a step run at the same time. What comes back is JSON over a
pipe; nothing is ever unpickled. What is printed goes through a pipe that is read all the time and of which only the end
is kept.

This keeps mistakes in: a hang, a crash, a leak. It is no sandbox for code that means harm: a function has the user's own
rights, can write files and use the network, can attack the process that watches over it, and what it asks others to start
(systemd, cron, Docker) or starts under another user id is not ours to kill.

No torch here: a worker starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import reprlib
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tutelage import files
from tutelage.files import DISK, Disk
from tutelage.reward_worker import OPTION

FAILURES = "failures.jsonl"
LARGEST = 1e30
"""No reward's magnitude may be above this: float32, which training computes in, ends at 3.4e38."""

OnFailure = Literal["fail", "zero", "drop"]
RewardFunction = Callable[..., Sequence[float | None]]

_IN_WORKER = "TUTELAGE_REWARD_WORKER"
_START = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]  # no json.py of the user's
import json
job = json.loads(sys.argv.pop())
sys.path[:] = job["path"]
from tutelage.reward_worker import keep
keep(job)
"""
_TAIL_BYTES = 2000  # of what a function printed: enough for a traceback
_GRACE_SECONDS = 0.5  # for a keeper to kill and say so; what takes longer is waited for when the pool is closed


class RewardFunctionError(ValueError):
    """A reward function cannot be loaded, or failed under `on_failure="fail"`; one sentence says which, how, and where."""


@dataclass(frozen=True)
class RewardLimits:
    """What one call of a reward function may use.

    Args:
        seconds: of wall-clock time for the call with all samples of a step; a step takes at most 1 s more.
        cpu_seconds: of CPU time for a call, all threads of the worker together (the kernel counts whole seconds: rounded up).
            Every process that the worker starts has as much of its own.
        memory_bytes: of address space (`ulimit -v`), for the worker and every process that it starts.
        output_bytes: printed in a call to stdout and stderr together.
        load_seconds: for importing the function's module, before the first step and after a worker was killed.
    """

    seconds: float = 30.0
    cpu_seconds: float = 60.0
    memory_bytes: int = 8 << 30
    output_bytes: int = 10 << 20
    load_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in ("seconds", "cpu_seconds", "memory_bytes", "output_bytes", "load_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"the limit {name} must be positive and finite, but it is {getattr(self, name)}")


@dataclass(frozen=True)
class Rewards:
    """What the functions gave for the samples of one call.

    Args:
        totals: of each sample, the weighted sum of the functions that gave a number; None: none did, or one
            failed and failures are dropped.
        values: function name -> its unweighted value for each sample; None: no reward.
        failed: how many samples a failure decided about.
    """

    totals: list[float | None]
    values: dict[str, list[float | None]]
    failed: int = 0

    def metrics(self) -> dict[str, float]:
        """TRL's `rewards/<name>/mean` and `rewards/<name>/std` (n − 1; 0 for one) over the samples that have a
        value, where any has; and `rewards/failed`."""
        result = {}
        for name, column in self.values.items():
            given = [value for value in column if value is not None]
            if given:
                mean = math.fsum(given) / len(given)
                squares = math.fsum((value - mean) ** 2 for value in given)
                result[f"rewards/{name}/mean"] = mean
                result[f"rewards/{name}/std"] = math.sqrt(squares / max(len(given) - 1, 1))
        return {**result, "rewards/failed": float(self.failed)}


@dataclass(frozen=True)
class _Failure:
    """reason: completes "reward function NAME …". sample: None where nothing tells which it was. whole_call: no
    sample of the call has a value."""

    function: str
    sample: int | None
    reason: str
    printed: str
    whole_call: bool


class RewardFunctions:
    """Reward functions with weights, for a `with`: their workers live that long.

    A function must depend on its arguments alone: what it remembers is lost when its worker is restarted, and a
    resumed run does not have it. Hashes of strings are the same in every worker (PYTHONHASHSEED), so sets iterate alike.

    **What is whose fault.** None is no failure: no reward for this sample. A value that is no number, NaN, infinite or
    beyond 1e30 is that sample's failure. After a call that raises or returns no list of the right length, the worker calls
    the function for one sample after the other, in what is left of the time limit: those that fail alone are at fault and
    the others keep the value they got alone. If none fails alone, or time runs out, the call as a whole has failed. So has
    one that hangs, crashes, prints too much or uses too much CPU time (there is no time for a second try): every sample of
    it is lost, and the failure names the sample that the function had taken from its lists last, unless it had gone through
    them to the end.

    **What a failure does**, by `on_failure`: "fail" raises; "zero": the function's value for the sample is 0; "drop":
    the sample has no reward, whatever other functions say. Each is a line of `failures.jsonl` in `folder`, with step,
    function, sample, prompt, completion, reason, the end of what was printed (where a hanging function was when nine tenths
    of the time were over, too) and whole_call; a whole call without a named sample has a line for each of its samples. What
    successful calls print is discarded.

    Args:
        functions: "module:name", "file.py:name", or functions defined at the top level of a module or script, which
            the worker imports anew (a script therefore needs `if __name__ == "__main__":`).
        folder: an existing folder, the run's.
        weights: one a function (None: 1 each).
        columns: names of the data's columns. Functions are called by keyword, as `f(prompts=…, completions=…, answer=…)`.
        disk: for tests, which watch it.

    Raises:
        ValueError: arguments that contradict each other, a function that has no name to import it by.
        RewardFunctionError: on entry, a function that is not there, raises while it is imported, or takes other arguments.
    """

    def __init__(
        self,
        functions: Sequence[str | RewardFunction],
        folder: Path,
        weights: Sequence[float] | None = None,
        columns: Sequence[str] = (),
        limits: RewardLimits | None = None,
        on_failure: OnFailure = "fail",
        disk: Disk = DISK,
    ) -> None:
        if _IN_WORKER in os.environ:
            raise RuntimeError(
                "the module of a reward function starts a training when it is imported: put that under "
                'if __name__ == "__main__":'
            )
        if isinstance(functions, str) or not functions:
            raise ValueError(f"{OPTION} needs a list of at least one function, but it is {functions!r}")
        self._specs = [_spec(function) for function in functions]
        self.names = _names(self._specs)
        """Of the functions, for metrics; a second one of a name is `name_2`."""
        self._weights = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        if len(self._weights) != len(functions):
            raise ValueError(f"there are {len(self._weights)} reward weights for {len(functions)} reward functions")
        for name, weight in zip(self.names, self._weights, strict=True):
            if not abs(weight) <= 1e6:
                raise ValueError(f"the weight of reward function {name} must be at most 1e6 either way, but it is {weight}")
        if on_failure not in ("fail", "zero", "drop"):
            raise ValueError(f"on_failure must be fail, zero or drop, but it is {on_failure!r}")
        taken = {"prompts", "completions"} & set(columns)
        if taken:
            raise ValueError(f"a column cannot be named {taken.pop()}: reward functions get the run's own under that name")
        self._limits = limits or RewardLimits()
        self._columns = tuple(columns)
        self._on_failure = on_failure
        self._failures = folder / FAILURES
        self._disk = disk
        self._path = [str(Path(entry).absolute()) for entry in sys.path]
        self._folder = str(Path.cwd())  # a restarted worker starts where the first one did
        self._entered = False
        self._workers: list[_Worker | None] = [None] * len(functions)
        self._ending: list[_Worker] = []

    def __enter__(self) -> RewardFunctions:
        self._entered = True
        with self._killing_on_exceptions():
            self._start_missing()
            self._load()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._entered = False
        self._kill_all(seconds=3.0)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        step: int | None = None,
    ) -> Rewards:
        """The rewards of n samples.

        Args:
            prompts, completions: n each, text or chat messages (anything JSON can say).
            columns: name -> n values, of the names that were announced.
            step: for failures.jsonl.

        Raises:
            ValueError: columns of another length or name, a value that JSON cannot say.
            RewardFunctionError: a failure under "fail"; a function that can no longer be loaded.
        """
        if not self._entered:
            raise RuntimeError("RewardFunctions must be called inside its with block: outside there are no workers")
        request = self._request(prompts, completions, columns or {})
        count = len(completions)
        if not count:
            return Rewards([], {name: [] for name in self.names})
        with self._killing_on_exceptions():
            now = time.monotonic()
            self._ending = [worker for worker in self._ending if not worker.wait(now)]
            self._start_missing()
            self._load()
            outcomes = self._ask(request, count)
        failures = [failure for _, failures in outcomes for failure in failures]
        for failure in failures:
            self._log(failure, prompts, completions, step)
        if failures:
            files.sync_file(self._failures, self._disk)
        if failures and self._on_failure == "fail":
            raise RewardFunctionError(self._sentence(failures[0], count))
        return self._totals([values for values, _ in outcomes], failures, count)

    # ---- the workers

    def _start_missing(self) -> None:
        for index, worker in enumerate(self._workers):
            if worker is None:
                self._workers[index] = _Worker(self._specs[index], self._columns, self._limits, self._path, self._folder)

    def _load(self) -> None:
        """Waits until every worker has imported its function."""
        workers = [worker for worker in self._workers if worker is not None and not worker.loaded]
        _exchange(workers, time.monotonic() + self._limits.load_seconds)
        for worker in workers:
            if worker.answer is None:
                reason = worker.fault or f"was not loaded within {self._limits.load_seconds:g} s"
                worker.end()
                worker.wait(time.monotonic() + _GRACE_SECONDS)
                said = worker.printed.splitlines()[-1:]
                raise RewardFunctionError(
                    f"{OPTION} {worker.spec} cannot be loaded: it {worker.reason(reason)}"
                    + (f"; the last that it printed: {said[0]}" if said else "")
                )
            if "problem" in worker.answer:
                raise RewardFunctionError(str(worker.answer["problem"]))
            worker.loaded = True

    def _ask(self, request: bytes, count: int) -> list[tuple[list[float | None], list[_Failure]]]:
        """Of each function its values, by policy where it failed, and its failures."""
        workers = [worker for worker in self._workers if worker is not None]
        for worker in workers:
            worker.ask(request, count)
        _exchange(workers, time.monotonic() + self._limits.seconds)
        faulty = [worker for worker in workers if worker.answer is None]
        for worker in faulty:
            worker.end()
        deadline = time.monotonic() + _GRACE_SECONDS
        for worker in faulty:
            if not worker.wait(deadline):
                self._ending.append(worker)
            self._workers[workers.index(worker)] = None
        if self._on_failure != "fail":
            self._start_missing()  # loads while the step goes on
        return [self._judge(name, worker, count) for name, worker in zip(self.names, workers, strict=True)]

    def _judge(self, name: str, worker: _Worker, count: int) -> tuple[list[float | None], list[_Failure]]:
        instead = 0.0 if self._on_failure == "zero" else None
        if worker.answer is None or worker.answer["values"] is None:
            sample, reason = worker.sample, worker.fault or f"did not return within {self._limits.seconds:g} s and was killed"
            if worker.problem is not None:  # whatever came of calling it for one sample after the other
                sample, reason = worker.problem["sample"], worker.problem["problem"]
            else:
                reason = worker.reason(reason)
            named = sample if sample is not None and 0 <= sample < count else None
            return [instead] * count, [_Failure(name, named, reason, worker.printed, whole_call=True)]
        values: list[float | None] = []
        failures = []
        for sample, value in enumerate(worker.answer["values"]):
            if isinstance(value, float) and not abs(value) <= LARGEST:
                value = f"gave {value}, where the largest reward is {LARGEST:g}" if math.isfinite(value) else f"gave {value}"
            if isinstance(value, str):
                failures.append(_Failure(name, sample, value, worker.printed, whole_call=False))
                values.append(instead)
            else:
                values.append(value)
        return values, failures

    @contextlib.contextmanager
    def _killing_on_exceptions(self) -> Iterator[None]:
        """A call that is broken off, by Ctrl-C too, leaves no worker in the middle of something."""
        try:
            yield
        except BaseException:
            self._kill_all(seconds=_GRACE_SECONDS)
            raise

    def _kill_all(self, seconds: float) -> None:
        ending = [*self._ending, *(worker for worker in self._workers if worker is not None)]
        self._workers = [None] * len(self._workers)
        for worker in ending:
            worker.end()
        deadline = time.monotonic() + seconds
        self._ending = [worker for worker in ending if not worker.wait(deadline)]
        if not self._entered:
            for worker in self._ending:  # its keeper hangs itself, so nothing gentler is left
                worker.kill_keeper()
            self._ending = []

    # ---- what goes in and out

    def _request(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> bytes:
        if set(columns) != set(self._columns):
            raise ValueError(f"reward functions were announced the columns {sorted(self._columns)}, but got {sorted(columns)}")
        arguments = {"prompts": list(prompts), "completions": list(completions)}
        arguments.update((name, list(columns[name])) for name in self._columns)
        for name, values in arguments.items():
            if len(values) != len(completions):
                raise ValueError(f"{name} has {len(values)} values for {len(completions)} completions")
        try:
            return json.dumps(arguments).encode()
        except (TypeError, ValueError):
            for name, values in arguments.items():
                for sample, value in enumerate(values):
                    _check_sendable(name, sample, value)
            raise

    def _totals(self, columns: list[list[float | None]], failures: list[_Failure], count: int) -> Rewards:
        whole = any(failure.whole_call for failure in failures)
        lost = set(range(count)) if whole else {failure.sample for failure in failures}
        totals: list[float | None] = []
        for sample in range(count):
            given = [(weight, column[sample]) for weight, column in zip(self._weights, columns, strict=True)]
            parts = [weight * value for weight, value in given if value is not None]
            dropped = self._on_failure == "drop" and sample in lost
            totals.append(math.fsum(parts) if parts and not dropped else None)
        return Rewards(totals, dict(zip(self.names, columns, strict=True)), len(lost))

    def _log(self, failure: _Failure, prompts: Sequence[Any], completions: Sequence[Any], step: int | None) -> None:
        samples = range(len(completions)) if failure.sample is None else [failure.sample]
        for sample in samples:
            record = {
                "step": step,
                "function": failure.function,
                "sample": sample,
                "prompt": prompts[sample],
                "completion": completions[sample],
                "reason": failure.reason,
                "printed": failure.printed,
                "whole_call": failure.whole_call,
            }
            files.append_json_line(self._failures, record, self._disk)

    def _sentence(self, failure: _Failure, count: int) -> str:
        if not failure.whole_call:
            where = f" for sample {failure.sample}"
        elif failure.sample is not None:
            where = f" when it was at sample {failure.sample}"
        else:
            where = f" in the call with samples 0 to {count - 1}"
        return (
            f"reward function {failure.function} {failure.reason}{where}; prompt, completion and what it printed are in "
            f"{self._failures}"
        )


def _spec(function: str | RewardFunction) -> str:
    """ "module:name" or "/absolute/file.py:name", by which another process finds the function."""
    if isinstance(function, str):
        where, colon, name = function.rpartition(":")
        return f"{Path(where).absolute()}:{name}" if colon and where.endswith(".py") else function
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    home = sys.modules.get(module) if isinstance(module, str) else None
    if home is None or getattr(home, name, None) is not function:
        raise ValueError(
            f"{OPTION}: {reprlib.repr(function)} has no name by which another process could import it: define it with def, "
            "at the top level of a module, and take what it needs from the columns"
        )
    if module != "__main__":
        return f"{module}:{name}"
    started = getattr(home, "__spec__", None)  # by python -m
    if started is not None:
        return f"{started.name}:{name}"
    file = getattr(home, "__file__", None)
    if file is None or not file.endswith(".py"):
        raise ValueError(f"{OPTION}: {name} is defined in an interactive session: put it into a file, as in own.py:{name}")
    return f"{Path(file).absolute()}:{name}"


def _names(specs: list[str]) -> list[str]:
    names: list[str] = []
    for index, spec in enumerate(specs):
        if spec in specs[:index]:
            raise ValueError(f"{OPTION} has {spec} twice: give it once, with the sum of the weights")
        name = plain = spec.rpartition(":")[2]
        number = 1
        while name in names:
            number += 1
            name = f"{plain}_{number}"
        names.append(name)
    return names


def _check_sendable(name: str, sample: int, value: object) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} of sample {sample} cannot be sent to a reward function ({error}): columns must hold text, numbers, "
            "true, false, null, lists and objects"
        ) from error


# --- the trainer's end ---------------------------------------------------------------------------------------


class _Worker:
    """A keeper and its worker, seen from the trainer.

    After an `_exchange`, `answer` is what came back, or `fault` says what went wrong; neither: time was up.
    """

    def __init__(self, spec: str, columns: Sequence[str], limits: RewardLimits, path: list[str], folder: str) -> None:
        self.spec = spec
        self.loaded = False
        self.answer: dict[str, Any] | None = None
        self.problem: dict[str, Any] | None = None
        """The call with all samples failed, and the worker is now calling one by one."""
        self.fault: str | None = None
        self.exit_status: int | None = None
        """Of the worker when it has ended, negative for a signal. None: its keeper did not say."""
        self.sample: int | None = None
        """The last that the function took from its lists before its worker ended."""
        self._limits = limits
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self._tail = bytearray()
        self._printed = 0
        self._calls = self._count = 0
        self._closed = False
        with contextlib.ExitStack() as child_ends:

            def pipe(child_reads: bool) -> tuple[int, int]:
                ends = os.pipe()
                theirs, ours = ends if child_reads else ends[::-1]
                child_ends.callback(os.close, theirs)
                return theirs, ours

            control, self._control = pipe(child_reads=True)
            status, self._status = pipe(child_reads=False)
            request, self._request = pipe(child_reads=True)
            reply, self._reply = pipe(child_reads=False)
            descriptors = [control, status, request, reply]
            job = {
                "parent": os.getpid(),
                "path": path,
                "spec": spec,
                "columns": list(columns),
                "descriptors": descriptors,
                "seconds": limits.seconds,
                "cpu_seconds": limits.cpu_seconds,
                "memory_bytes": limits.memory_bytes,
            }
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-X", "utf8", "-c", _START, json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer
                cwd=folder,
                env={"PYTHONHASHSEED": "0", **os.environ, _IN_WORKER: "1"},
            )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        for descriptor in (self._status, self._request, self._reply, self._output):
            os.set_blocking(descriptor, False)

    @property
    def waiting(self) -> bool:
        return self.answer is None and self.fault is None

    @property
    def printed(self) -> str:
        """The end of what the last call printed."""
        return self._tail.decode(errors="replace")

    def ask(self, arguments: bytes, count: int) -> None:
        """Prepares a call for the next `_exchange`."""
        self._printed = 0
        self._read_output()  # what a thread or a child of the function's has printed since the last call
        self._calls += 1
        self._count = count
        self._unsent = memoryview(b'{"id": %d, "arguments": %s}\n' % (self._calls, arguments))
        self._received.clear()
        self._tail.clear()
        self._printed = 0
        self.answer = self.problem = None

    def register(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._reply, selectors.EVENT_READ, (self, self._receive))
        selector.register(self._output, selectors.EVENT_READ, (self, self._read_output))
        selector.register(self._status, selectors.EVENT_READ, (self, self._ended))
        if self._unsent:
            selector.register(self._request, selectors.EVENT_WRITE, (self, self._send))

    def unregister(self, selector: selectors.BaseSelector) -> None:
        for descriptor in (self._reply, self._output, self._status, self._request):
            if descriptor in selector.get_map():
                selector.unregister(descriptor)

    def finish(self) -> None:
        """An answer counts only if no more was printed before it than may be."""
        if self.answer is not None:
            self._read_output()
            if self.fault is not None:
                self.answer = None

    def _send(self) -> bool:
        """As every handler, tells whether its descriptor is still of interest."""
        try:
            self._unsent = self._unsent[os.write(self._request, self._unsent[: 1 << 16]) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            return False  # it has ended, or closed its end: the other pipes say so
        return len(self._unsent) > 0

    def _receive(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reply, 1 << 16):
                self._received += data
                if len(self._received) > (1 << 20) + 4096 * self._count:
                    self.fault = "wrote into the pipe over which rewards come back"
                    return False
                while self.waiting and b"\n" in self._received:
                    line, _, rest = self._received.partition(b"\n")
                    self._received = rest
                    self._take(bytes(line))
            return False  # it has ended, which its keeper reports, or closed its end, which ends it when it replies
        return True

    def _take(self, line: bytes) -> None:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        match answer:
            case {"id": self._calls, "values": list(values)} if len(values) == self._count and all(map(_is_value, values)):
                self.answer = answer
            case {"id": self._calls, "values": None, "problem": str()}:
                self.answer = answer
            case {"id": self._calls, "problem": str(), "sample": int()} if self._calls:
                self.problem = answer
            case {"id": 0} if not self._calls:
                self.answer = answer
            case _:
                self.fault = "wrote into the pipe over which rewards come back"

    def _read_output(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._output, 1 << 16):
                self._tail = (self._tail + data)[-_TAIL_BYTES:]
                self._printed += len(data)
                if self._printed > self._limits.output_bytes:
                    self.fault = f"printed more than {self._limits.output_bytes} bytes"
                    return False
            return False
        return True

    def _ended(self) -> bool:
        self._receive()  # it may have answered before
        if self.waiting:
            self.fault = "ended"  # the exit status, which `wait` reads, says how
        return False

    # ---- the end

    def end(self) -> None:
        """Tells the keeper to kill everything; `wait` waits for it."""
        if self._closed:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._control, b"x")

    def wait(self, deadline: float) -> bool:
        """Whether the keeper has ended, with all that it keeps, before the deadline; then nothing is left open."""
        said = bytearray()
        while not self._closed:
            left = max(0.0, deadline - time.monotonic())
            ready = select.select([self._status, self._output], [], [], left)[0]
            if self._output in ready:
                self._take_the_rest()
            if self._status in ready:
                data = os.read(self._status, 4096)
                said += data
                if not data:
                    self._take_the_rest()
                    self._close()
            elif not left:
                return False
        if said:
            ended = json.loads(said)
            self.exit_status, self.sample = ended["exit"], ended["sample"]
        return True

    def _take_the_rest(self) -> None:
        """What was printed at the end, within bounds."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                self._tail = (self._tail + os.read(self._output, 1 << 16))[-_TAIL_BYTES:]

    def kill_keeper(self) -> None:
        """Kills the keeper, and by that the worker."""
        self._process.kill()
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        for descriptor in (self._control, self._status, self._request, self._reply):
            os.close(descriptor)

    def reason(self, otherwise: str) -> str:
        """How the worker ended, if not because the keeper was told to kill it."""
        status = self.exit_status
        if status is None:
            return otherwise if self.fault != "ended" else "stopped the process that watches over it"
        if status >= 0:
            return f"ended its process with exit status {status}"
        if status == -signal.SIGXCPU:
            return f"used more than {self._limits.cpu_seconds:g} s of CPU time"
        if status == -signal.SIGKILL and self.fault != "ended":
            return otherwise
        return f"crashed: {signal.Signals(-status).name} ended its process"


def _is_value(value: object) -> bool:
    return value is None or isinstance(value, (float, str))


def _exchange(workers: Iterable[_Worker], deadline: float) -> None:
    """Moves bytes to and from the workers until each has an answer or a fault, or the time is over."""
    waiting = set(workers)
    with selectors.DefaultSelector() as selector:
        for worker in waiting:
            worker.register(selector)
        while True:
            for worker in [worker for worker in waiting if not worker.waiting]:
                worker.unregister(selector)
                worker.finish()
                waiting.remove(worker)
            left = deadline - time.monotonic()
            if not waiting or left <= 0:
                return
            for key, _ in selector.select(left):
                worker, handler = key.data
                if worker.waiting and not handler():
                    selector.unregister(key.fd)
