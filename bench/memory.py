"""The peak memory of one piece of work, in a process of its own: this file, run with what to do.

A process's high-water mark never falls, so what was measured before would hide what is measured now.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(prepare: Callable[..., Any], *arguments: Any, threads: int) -> int:
    """Bytes that the function returned by ``prepare(*arguments)`` adds to its process at the peak of one run.

    Args:
        prepare: a module's function, found by its name in the other process. Its own allocations do not
            count.
        arguments: JSON values.
        threads: of torch and ours.

    Raises:
        RuntimeError: with what the other process said when it failed.
    """
    target = f"{prepare.__module__}:{prepare.__qualname__}"
    command = [sys.executable, "-m", __name__, target, json.dumps(arguments), str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {target} failed:\n{result.stderr}")
    return int(result.stdout)


def _status_bytes(field: str) -> int:
    # VmHWM, not ru_maxrss: a child starts with the ru_maxrss of the process that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return 1024 * int(match[1])


def main(target: str, arguments: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    module, _, name = target.partition(":")
    run = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    before = _status_bytes("VmRSS")
    run()
    print(_status_bytes("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
