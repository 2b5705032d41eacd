"""tools/check_cuda.py reads what the compiler and the disassembler say, and objects where it must."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_cuda.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_cuda", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_cuda", module)
    spec.loader.exec_module(module)
    return module


PTXAS = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 388 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
ptxas info    : Function properties for _Z1bv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes smem, 388 bytes cmem[0]
"""

SASS = """
\t.section\t.text._Z1av,"ax",@progbits
        /*0000*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
.L_x_2:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/              @P1  BRA `(.L_x_2) ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/              @P0  BRA `(.L_x_1) ;
        /*0070*/              @P0  BRA `(.L_x_3) ;
.L_x_3:
        /*0080*/                   EXIT ;
\t.section\t.text._Z1bv,"ax",@progbits
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
"""


def test_what_ptxas_and_the_disassembler_say_is_read(tool: ModuleType) -> None:
    kernels = tool.read_ptxas(PTXAS)
    assert (kernels["_Z1av"].registers, kernels["_Z1av"].stack, kernels["_Z1av"].spilled) == (40, 0, 0)
    assert (kernels["_Z1bv"].registers, kernels["_Z1bv"].stack, kernels["_Z1bv"].spilled) == (255, 16, 20)
    assert kernels["_Z1bv"].shared == 64
    found = tool.read_instructions(SASS)
    opcodes, loops = found["_Z1av"]
    assert loops == [(3, 5), (1, 7)]  # the branch forward is none
    assert tool.main_loop(opcodes, loops) == {"HMMA": 2, "LDSM": 1, "LDGSTS": 1}
    assert tool.short_name("void tutelage::cuda::f<tutelage::cuda::T, (int)8>(tutelage::G, int)") == "f<T, (int)8>"


def test_faults_are_named(tool: ModuleType) -> None:
    kernel = tool.Kernel
    good = {"80": kernel(registers=40, counts={"HMMA": 2}, main_loop={"HMMA": 2, "LDSM": 1, "LDGSTS": 1})}
    assert tool.faults({"a": good}, {"a": (128, 0)}) == []
    assert tool.faults({"a": good}, {}) == ["a: no test launches it"]
    by_element = {"80": kernel(counts={"HMMA": 2}, main_loop={"HMMA": 2, "LDSM": 1})}
    unaligned, aligned = (
        "matmul_kernel<16, 64, 1, 8, (Lies)0, (Lies)1, false>",
        "matmul_kernel<16, 64, 1, 8, (Lies)0, (Lies)1, true>",
    )
    assert tool.faults({unaligned: by_element}, {unaligned: (128, 0)}) == []
    assert tool.faults({aligned: by_element}, {aligned: (128, 0)}) == [f"{aligned} (sm_80): no LDGSTS in the main loop"]
    bad = {"80": kernel(stack=16, spilled=20, shared=64, counts={"HMMA": 1, "STL": 1}, main_loop={"HMMA": 1})}
    assert tool.faults({"b": bad}, {"b": (32, 0)}) == [
        "b (sm_80): 20 bytes are spilled, the stack frame has 16",
        "b (sm_80): local memory is used (LDL, STL)",
        "b (sm_80): no LDSM, LDGSTS in the main loop",
        "b (sm_80): 64 bytes of static shared memory; the dialect has only dyn_smem",
    ]


def test_the_committed_table_is_compared(tool: ModuleType) -> None:
    table = {"a": {"registers": 40}, "b": {"registers": 50}}
    assert tool.differences(table, dict(table)) == []
    assert tool.differences({"a": {"registers": 41}, "c": {}}, table) == [
        "b is not in the table",
        "c is in the table and not in cuda/units/",
        "a:\n    table {'registers': 41}\n    found {'registers': 40}",
    ]


def test_predictions_say_that_they_are(tool: ModuleType) -> None:
    first, _, *rows = tool.predict().splitlines()
    assert first.startswith("PREDICTED, not measured")
    rms_norm = next(row for row in rows if row.startswith("rms_norm "))
    assert rms_norm.split()[1:] == ["65.8", "40.1", "132.9"]  # 134 MB at 2.04, 3.35 and 1.01 TB/s
