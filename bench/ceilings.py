"""What the machine can do at most, measured beside the rest: fused multiply-adds and reading memory."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import tutelage
from tutelage import _core

Unit = Literal["GFLOP/s", "GB/s"]
READ_BYTES = 256 * 2**20  # far above every last-level cache


def gauge(unit: Unit, threads: int, seconds: float) -> Callable[[], float]:
    """A function that takes one sample of the ceiling for this unit. That of GB/s keeps what it reads: memory taken anew for
    every sample would push what is being measured out of the core's store of blocks."""
    if unit == "GFLOP/s":
        return lambda: _core.fma_peak(threads, seconds)
    memory = torch.ones(READ_BYTES // 4)
    return lambda: _core.read_bandwidth(memory, threads, seconds)


def ceilings(threads: int, seconds: float) -> dict[str, dict[str, float]]:
    """Both ceilings on one thread and on all, in GFLOP/s and GB/s, one sample each."""
    return {unit: {str(n): gauge(unit, n, seconds)() for n in sorted({1, threads})} for unit in ("GFLOP/s", "GB/s")}


def environment() -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "tutelage": tutelage.__version__,
        "level": _core.active_level(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "openblas": openblas_kernel(),
        "openblas_environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("OPENBLAS_")},
    }


def openblas_kernel() -> str | None:
    """The kernel that numpy's OpenBLAS picked for this CPU, where threadpoolctl is there to say."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    pools = importlib.import_module("threadpoolctl").threadpool_info()
    names = [pool["architecture"] for pool in pools if pool["internal_api"] == "openblas"]
    return str(names[0]) if names else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
