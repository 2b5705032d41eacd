"""Children that can be killed: forked from a parent that has imported torch and run no kernel yet.

Forking takes a tenth of a second where a fresh interpreter takes three, and no child inherits a lock or a
worker thread of a process that has computed something. The parent is this file run as a program: it reads one
JSON job a line.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Child:
    """A forked child, running `function(**arguments)`; its output goes to `output`."""

    pid: int
    output: Path
    parent: subprocess.Popen[str]

    def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        return int(_ask(self.parent, {"wait": self.pid}))

    def wait_until_stopped(self) -> None:
        """Returns when it has stopped itself by SIGSTOP."""
        assert _ask(self.parent, {"wait_until_stopped": self.pid}) == "stopped\n"


class Forker:
    """Forks children that have already imported `modules`."""

    def __init__(self, folder: Path, parent: subprocess.Popen[str]) -> None:
        self._folder = folder
        self._parent = parent
        self._count = 0

    def start(self, function: str, **arguments: Any) -> Child:
        """Starts "module:function" with JSON arguments in a child."""
        self._count += 1
        output = self._folder / f"child-{self._count}.txt"
        job = {"function": function, "arguments": arguments, "output": str(output)}
        return Child(int(_ask(self._parent, job)), output, self._parent)

    def run(self, function: str, **arguments: Any) -> tuple[int, str]:
        """Starts a child and waits: its exit status (or minus the signal) and its output."""
        child = self.start(function, **arguments)
        return child.wait(), child.output.read_text()


@contextmanager
def forker(folder: Path, *modules: str) -> Iterator[Forker]:
    """The parent process, for a `with`; children find what lies beside this file."""
    command = [sys.executable, __file__, *modules]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            yield Forker(folder, parent)
        finally:
            parent.kill()


def _ask(parent: subprocess.Popen[str], job: dict[str, Any]) -> str:
    assert parent.stdin is not None and parent.stdout is not None
    parent.stdin.write(json.dumps(job) + "\n")
    parent.stdin.flush()
    return parent.stdout.readline()


def _serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
            continue
        if "wait_until_stopped" in job:
            stopped = os.WIFSTOPPED(os.waitpid(job["wait_until_stopped"], os.WUNTRACED)[1])
            print("stopped" if stopped else "ended", flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(job)
        print(pid, flush=True)


def _child(job: dict[str, Any]) -> None:
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(source, descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    status = 1
    try:
        module, _, name = job["function"].partition(":")
        status = getattr(importlib.import_module(module), name)(**job["arguments"]) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    print("ready", flush=True)
    _serve()
