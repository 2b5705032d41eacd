"""Where a model computes: the CPU, a GPU, or a GPU's kernels on an emulator. docs/cuda.md tells them apart."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage import _core

DEVICES = ("cpu", "cuda", "cuda-sim")


@dataclass(frozen=True)
class Device:
    """A device that works here.

    Attributes:
        name: "cpu"; "cuda" (torch's current CUDA device); "cuda-sim" (the same kernels, emulated on the CPU: for tests).
        core: the compiled module that computes on it.
        place: where parameters, gradients and what else the kernels write lie.
        rounds: its kernels read weights and activations as bfloat16, whatever the parameters are.
    """

    name: str
    core: Any
    place: torch.device
    rounds: bool

    def free_cached_memory(self) -> None:
        """Gives memory that was kept for reuse back to the system."""
        if self.name == "cuda":
            torch.cuda.empty_cache()
        else:
            self.core.free_cached_memory()

    def free_memory(self) -> int:
        """Bytes that it could still give."""
        if self.name != "cuda":
            return free_memory()
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def find(name: str) -> Device:
    """The device of that name.

    Raises:
        ValueError: there is no such device, or it does not work here, and why.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda-sim', but it is {name!r}")
    if name == "cpu":
        return Device(name, _core, torch.device("cpu"), rounds=False)
    wrong = problem(name)
    if wrong:
        raise ValueError(f"device {name!r} does not work here: {wrong}")
    module = importlib.import_module(_MODULES[name])
    return Device(name, module, torch.device("cpu" if name == "cuda-sim" else "cuda"), rounds=True)


_MODULES = {"cuda": "tutelage._cuda", "cuda-sim": "tutelage._cuda_sim"}


def problem(name: str) -> str:
    """Why the device of that name does not work here; empty: it does."""
    if name == "cpu":
        return ""
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError:
        if name == "cuda-sim":
            return "this installation has no module tutelage._cuda_sim; install tutelage again"
        return (
            "this build has no CUDA kernels; install tutelage from its sources on a machine with nvcc, "
            "with --config-settings=cmake.define.TUTELAGE_CUDA=ON"
        )
    except ImportError as error:
        return f"{_MODULES[name]} cannot be imported: {error}"
    if name == "cuda-sim":
        return ""
    wrong: str = module.problem()
    if wrong:
        return wrong
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a torch that has it (https://pytorch.org)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (torch.cuda.is_available() is False)"
    return ""


def free_memory() -> int:
    """Bytes that this machine could still give; on systems that do not say, 4 GiB."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * 2**30
