"""The compiled core itself: ISA levels, memory, Philox, tensors through DLPack, and its type stub."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tutelage
from tutelage import _core

# ---- ISA levels


def test_the_active_level_is_one_that_this_cpu_runs() -> None:
    levels = dict(_core.levels())
    assert list(levels)[-1] == "scalar" and levels["scalar"]
    assert levels[_core.active_level()]


def test_every_level_that_runs_here_passes_its_self_check() -> None:
    for name, supported in _core.levels():
        if supported:
            assert _core.self_check(name) == ""


def active_level_under(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from tutelage import _core; print(_core.active_level())"
    environment = {**os.environ, "TUTELAGE_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_level_can_be_set() -> None:
    assert active_level_under("scalar").stdout == "scalar\n"
    wrong = active_level_under("mmx")
    assert wrong.returncode == 1
    assert "ValueError: unknown ISA level 'mmx'; this build has " in wrong.stderr


# ---- Philox, memory


def test_philox_known_answers() -> None:
    """kat_vectors of Random123."""
    ones = 0xFFFFFFFF
    assert _core.philox4x32(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _core.philox4x32(ones << 32 | ones, (ones,) * 4) == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]


def matmul(rows: int = 300) -> torch.Tensor:
    x, y = torch.ones(rows, 300), torch.empty(rows, 300)
    _core.matmul(x, torch.ones(300, 300), y, threads=1)
    return y


@pytest.fixture
def allocations_work_again() -> Iterator[None]:
    yield
    _core.fail_allocation(0)


@pytest.mark.usefixtures("allocations_work_again")
def test_memory_runs_out_and_the_core_goes_on() -> None:
    _core.fail_allocation(1)
    with pytest.raises(MemoryError):
        matmul()
    assert (matmul() == 300).all()


def test_memory_is_counted() -> None:
    _core.free_cached_memory()
    _core.reset_memory_peak()
    before = _core.memory_use()
    assert before["cached"] == 0 and before["peak"] == before["in_use"]
    matmul()
    after = _core.memory_use()
    assert after["allocations"] > before["allocations"]
    assert after["in_use"] == before["in_use"] and after["peak"] > before["peak"] and after["cached"] > 0


# ---- tensors through DLPack


def total(x: Any) -> float:
    out = torch.empty(1, dtype=torch.float64)
    _core.total(x, out, threads=1)
    return float(out)


def test_tensors_are_lent_not_copied() -> None:
    x = torch.arange(6.0, dtype=torch.float64)
    assert total(x) == 15.0 and total(x[2:]) == 14.0 and total(np.arange(4.0)) == 6.0
    out = np.zeros(1)
    _core.total(x, out, threads=1)
    assert out[0] == 15.0


def test_what_was_lent_is_given_back() -> None:
    x = np.arange(4.0)
    before = sys.getrefcount(x)
    total(x)
    with pytest.raises(ValueError):
        _core.total(x, np.zeros(2), threads=1)
    assert sys.getrefcount(x) == before


def read_only() -> Any:
    x = np.arange(4.0)
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], r"argument 'x' must be a tensor, but it is of type list"),
        (None, r"argument 'x' must be a tensor, but it is of type NoneType"),
        (torch.ones(2, requires_grad=True), r"argument 'x' cannot be read: .*use tensor\.detach\(\)"),
        (torch.ones(2, device="meta"), r"argument 'x' cannot be read: .*meta"),
        (read_only(), r"argument 'x' cannot be read: .*readonly"),
        (
            torch.ones(2).half(),
            r"argument 'x' must be float32 or float64, but it is another dtype \[2\] on the CPU",
        ),
        (
            torch.ones(2, dtype=torch.int32),
            r"argument 'x' must be float32 or float64, but it is int32 \[2\] on the CPU",
        ),
        (torch.ones(2, 2), r"argument 'x' must have shape \[any\], but it is float32 \[2, 2\] on the CPU"),
        (torch.ones(4)[::2], r"argument 'x' must be contiguous; call \.contiguous\(\) on it first"),
    ],
)
def test_what_is_not_a_usable_tensor_is_named(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        total(x)


# ---- the type stub


def stub() -> dict[str, list[str]]:
    """Functions and methods of _core.pyi, with the names of their parameters."""
    found = {}
    tree = ast.parse((Path(tutelage.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
    for node in tree.body:
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for f in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(f, ast.FunctionDef):
                found[owner + f.name] = [a.arg for a in (*f.args.args, *f.args.kwonlyargs)]
    return found


def compiled() -> dict[str, list[str]]:
    """The same, from the module: pybind11 writes the signature into the first line of a docstring."""
    found = {}
    for name, thing in vars(_core).items():
        members = vars(thing) if isinstance(thing, type) else {name: thing}
        for member, f in members.items():
            key = f"{name}.{member}" if isinstance(thing, type) else name
            if isinstance(f, property):
                found[key] = ["self"]
            elif callable(f) and (member == "__init__" or not member.startswith("_")):
                signature = f.__doc__.splitlines()[0]
                found[key] = re.findall(r"(?:[(,] )?(\w+):", signature.split("(", 1)[1])
    return found


def test_the_stub_is_what_was_compiled() -> None:
    without_init = {"Graph.__init__", "Generator.__init__", "PackedWeights.__init__"}  # made by the core only
    ours = compiled()
    assert {k: v for k, v in ours.items() if k not in without_init} == stub()
