"""`tutelage doctor`: what this installation can do on this machine, and what is wrong with it.

Everything is imported on the spot: a doctor that cannot come because torch is broken would be of no help.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tutelage import __version__

# Where this project's own tests run on real hardware, bit for bit against the scalar level. Other levels are
# checked at every start, each kernel on one odd shape, but nobody has run the test suite on them.
# Levels that every machine of the project's tests has; the others are tested wherever a machine that runs the tests has them.
_TESTED_LEVELS = frozenset({"scalar", "avx2"})
_OPENMP = re.compile(r"(?:libgomp|libomp|libiomp5?)[^/]*\.so[^/]*$")


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this installation can do here: versions, CPU, kernels, threads, libraries, memory."""

    json: str | None = None
    """Also write the findings to this file."""


@dataclass(frozen=True)
class Finding:
    """One line of the report; a problem makes the line start with "!"."""

    subject: str
    text: str
    problem: bool = False


def doctor(config: DoctorConfig) -> list[Finding]:
    """Prints the findings and returns them; works without torch or the compiled core, and says what is
    missing."""
    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{'!' if finding.problem else ' '} {finding.subject:<{width}}  {finding.text}")
    if config.json is not None:
        from tutelage.train.run import write_json

        write_json(
            Path(config.json),
            {"command": "doctor", "findings": [dataclasses.asdict(finding) for finding in findings]},
        )
    return findings


def examine() -> list[Finding]:
    """Every finding, in the order of the report."""
    findings = [
        Finding("tutelage", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        Finding("cpu", f"{_cpu_model()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable"),
        Finding("memory", _memory()),
    ]
    try:
        import torch
    except ImportError as error:
        return [*findings, Finding("torch", f"cannot be imported: {error}", problem=True)]
    findings += [
        Finding("torch", torch.__version__),
        Finding("threads", f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)"),
    ]
    try:
        from tutelage import _core
    except ImportError as error:
        return [
            *findings,
            Finding("core", f"cannot be imported: {error}; install tutelage again", problem=True),
        ]
    return [
        *findings,
        *_levels(_core),
        openmp_finding(loaded_libraries()),
        *_devices(),
    ]


def _devices() -> list[Finding]:
    from tutelage import devices

    return [device_finding(name, devices.problem(name)) for name in devices.DEVICES if name != "cpu"]


def device_finding(name: str, wrong: str) -> Finding:
    """What to say of a device beside the CPU; `wrong` is why it does not work here, or empty."""
    subject = f"device, {name}"
    if wrong:
        # Without a GPU nothing is missing; but the emulator is a part of every installation.
        return Finding(subject, f"does not work here: {wrong}", problem=name == "cuda-sim")
    what = "an emulator of the GPU's kernels, for tests" if name == "cuda-sim" else _gpu()
    return Finding(subject, f"works: {what}")


def _gpu() -> str:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )


def _levels(core: ModuleType) -> list[Finding]:
    """One finding for each ISA level of the build, the one in use named."""
    active = core.active_level()
    return [
        level_finding(name, supported, core.self_check(name) if supported else "", name == active)
        for name, supported in core.levels()
    ]


def level_finding(name: str, supported: bool, wrong_kernel: str, active: bool) -> Finding:
    """What to say of an ISA level; `wrong_kernel` is the one whose bits differ from the scalar level's, or
    empty."""
    subject = f"kernels, {name}"
    if not supported:
        return Finding(subject, "not on this CPU")
    if wrong_kernel:
        return Finding(subject, f"not used: {wrong_kernel} differs from the scalar level; please report this", True)
    tested = "tested" if name in _TESTED_LEVELS else "self-checked at load"
    return Finding(subject, f"{tested}{', in use' if active else ''}")


def loaded_libraries() -> list[str]:
    """Paths of the shared libraries in this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    fields = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    return sorted({parts[5] for parts in fields if len(parts) == 6})


def openmp_finding(libraries: Iterable[str]) -> Finding:
    """How many OpenMP runtimes are loaded: two would each start a thread for every core."""
    found = [path for path in libraries if _OPENMP.search(path)]
    if len(found) > 1:
        return Finding(
            "openmp",
            f"{len(found)} runtimes in one process: {', '.join(found)}; they compete for the cores: "
            "import torch before anything that brings its own, or remove that",
            problem=True,
        )
    return Finding("openmp", found[0] if found else "none loaded")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _memory() -> str:
    info = Path("/proc/meminfo")
    if not info.exists():
        return f"unknown on {sys.platform}"
    kilobytes = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", info.read_text(), re.MULTILINE)}
    return f"{kilobytes['MemAvailable'] / 2**20:.1f} of {kilobytes['MemTotal'] / 2**20:.1f} GiB free"
