"""Checks the CUDA kernels with nvcc alone, without a GPU: registers, spills, occupancy, the instructions of main loops.

    python tools/check_cuda.py BUILD [--update] [--predict]

BUILD is a release build of the C++ harness: its tests say with which blocks and how much shared memory each kernel is
launched, so a kernel that no test runs is found too. What is found is compared with docs/cuda-registers.json (--update
writes it). nvcc is taken from PATH, the disassembler from PATH or the package nvidia-cuda-nvdisasm. Compiles for sm_80 (8.6
and 8.9 run the same code) and sm_90.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "cuda-registers.json"
ARCHITECTURES = ("80", "90")
# the same as in CMakeLists.txt
NVCC_FLAGS = ("-std=c++20", f"-I{ROOT}", f"-I{ROOT / 'cpp'}", "-fmad=false", "-O3")
COUNTED = ("HMMA", "LDSM", "LDGSTS")
LOCAL = ("LDL", "STL")
# Of rows that are not aligned to 16 bytes: copied element by element.
UNALIGNED = re.compile(r"matmul_kernel<.*, false>|logits_kernel<false, .*>")


@dataclass
class Kernel:
    """What ptxas and the disassembler say of one kernel on one architecture."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    main_loop: dict[str, int] = field(default_factory=dict)


class CheckError(Exception):
    """Something is missing that the check needs."""


def short_names(mangled: list[str]) -> dict[str, str]:
    """Mangled names to `kernel<arguments>`, without namespace, return type and parameters."""
    listed = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {name: short_name(readable) for name, readable in zip(mangled, listed, strict=True)}


def short_name(readable: str) -> str:
    """`void tutelage::cuda::f<tutelage::cuda::T, true>(int)` to `f<T, true>`."""
    depth, end = 0, len(readable)
    for i, letter in enumerate(readable):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and i > 0:
            end = i
            break
    name = readable[:end].removeprefix("void ")
    return name.replace("tutelage::cuda::", "").replace("tutelage::", "")


def find_disassembler() -> str:
    """nvdisasm from PATH or from the package."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for candidate in sorted(Path(place).glob("**/nvdisasm")):
            return str(candidate)
    raise CheckError("nvdisasm is not here: pip install nvidia-cuda-nvdisasm")


def compile_unit(nvcc: str, unit: Path, architecture: str, cubin: Path) -> str:
    """Compiles one unit for one architecture; ptxas's words."""
    flags = [f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v,--warn-on-spills"]
    done = subprocess.run([nvcc, *NVCC_FLAGS, *flags, str(unit), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise CheckError(f"{unit.name} does not compile for sm_{architecture}:\n{done.stderr}")
    return done.stderr


def read_ptxas(words: str) -> dict[str, Kernel]:
    """Of each kernel by its mangled name: registers, shared memory, stack and spills."""
    kernels: dict[str, Kernel] = {}
    name = ""
    for line in words.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
            kernels[name] = Kernel()
        elif name and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            kernels[name].stack, kernels[name].spilled = int(match[1]), int(match[2]) + int(match[3])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            kernels[name].registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernels[name].shared = int(shared[1])
    return kernels


def read_instructions(listing: str) -> dict[str, tuple[list[str], list[tuple[int, int]]]]:
    """Of each kernel: its opcodes in order, and its loops as ranges of them (from a branch target to the branch back to it)."""
    found: dict[str, tuple[list[str], list[tuple[int, int]]]] = {}
    opcodes: list[str] = []
    loops: list[tuple[int, int]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            opcodes, loops, labels = [], [], {}
            found[match[1]] = (opcodes, loops)
        elif match := re.match(r"(\.L_[\w.]+):", line):
            labels[match[1]] = len(opcodes)
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            opcodes.append(match[1])
            target = re.search(r"`\((\.L_[\w.]+)\)", line)
            if match[1] == "BRA" and target and target[1] in labels:
                loops.append((labels[target[1]], len(opcodes)))
    return found


def count(opcodes: list[str], names: tuple[str, ...]) -> dict[str, int]:
    return {name: opcodes.count(name) for name in names if name in opcodes}


def main_loop(opcodes: list[str], loops: list[tuple[int, int]]) -> dict[str, int]:
    """The counted instructions of the loop with the most HMMA (LDGSTS where there is none); of equals the smallest loop."""
    best: tuple[tuple[int, int, int], dict[str, int]] = ((0, 0, 0), {})
    for begin, end in loops:
        counts = count(opcodes[begin:end], COUNTED)
        order = (counts.get("HMMA", 0), counts.get("LDGSTS", 0), begin - end)
        if counts and order > best[0]:
            best = (order, counts)
    return best[1]


def inspect(nvcc: str, disassembler: str, folder: Path) -> dict[str, dict[str, Kernel]]:
    """Every kernel of cuda/units/: architecture to what is known of it."""
    units = sorted((ROOT / "cuda" / "units").glob("*.cu"))
    if not units:
        raise CheckError("no cuda/units/*.cu")

    def one(job: tuple[Path, str]) -> tuple[str, dict[str, Kernel]]:
        unit, architecture = job
        cubin = folder / f"{unit.stem}.{architecture}.cubin"
        kernels = read_ptxas(compile_unit(nvcc, unit, architecture, cubin))
        listing = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        for name, (opcodes, loops) in read_instructions(listing).items():
            if name in kernels:
                kernels[name].counts = count(opcodes, COUNTED + LOCAL)
                kernels[name].main_loop = main_loop(opcodes, loops)
        return architecture, kernels

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(one, [(unit, architecture) for unit in units for architecture in ARCHITECTURES]))
    names = short_names(sorted({name for _, kernels in results for name in kernels}))
    found: dict[str, dict[str, Kernel]] = {}
    for architecture, kernels in results:
        for name, kernel in kernels.items():
            found.setdefault(names[name], {})[architecture] = kernel
    return found


def launches(build: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """Of each kernel that the emulator's tests launch: threads of a block and bytes of shared memory, the largest seen."""
    tests = build / "tests" / "simt" / "tutelage_simt_tests"
    if not tests.exists():
        raise CheckError(f"{tests} is not built: cmake --build {build} --target tutelage_simt_tests")
    log = folder / "launches"
    done = subprocess.run([str(tests)], env={**os.environ, "TUTELAGE_SIMT_LAUNCHES": str(log)}, capture_output=True, text=True)
    if done.returncode != 0:
        raise CheckError(f"{tests} fails:\n{done.stderr}")
    symbols: dict[int, str] = {}
    origin = 0
    listing = subprocess.run(["nm", "--defined-only", str(tests)], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        address, kind, name = line.split(maxsplit=2)
        if kind in "tTwW":
            symbols[int(address, 16)] = name
            if name.startswith("_ZN4simt10run_launch") and not name.endswith(".cold"):
                origin = int(address, 16)
    seen: dict[str, tuple[int, int]] = {}
    for line in log.read_text().splitlines():
        distance, threads, shared = map(int, line.split())
        name = symbols.get(origin + distance, "")
        seen[name] = max(seen.get(name, (0, 0)), (threads, shared))
    names = short_names(sorted(seen))
    found: dict[str, tuple[int, int]] = {}
    for mangled, launch in seen.items():
        found[names[mangled]] = max(found.get(names[mangled], (0, 0)), launch)
    return found


def occupancy(nvcc: str, folder: Path, rows: list[tuple[int, int, int]], architecture: str) -> list[list[int]]:
    """Blocks per multiprocessor for (registers, threads, shared): of 80 on A100 and RTX 4090, of 90 on H100."""
    program = folder / "occupancy"
    if not program.exists():
        said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", said, re.M)
        if not top:
            raise CheckError("nvcc --dryrun does not say where its headers are")
        include, source = Path(top[1]).resolve() / "include", ROOT / "tools" / "occupancy.cc"
        subprocess.run(["c++", "-w", f"-I{include}", str(source), "-o", str(program)], check=True, capture_output=True)
    lines = "".join(f"{registers} {threads} {shared}\n" for registers, threads, shared in rows)
    done = subprocess.run([str(program), architecture], input=lines, capture_output=True, text=True, check=True)
    return [list(map(int, line.split())) for line in done.stdout.splitlines()]


def describe(
    found: dict[str, dict[str, Kernel]], launched: dict[str, tuple[int, int]], nvcc: str, folder: Path
) -> dict[str, object]:
    """The table: one row a kernel."""
    names = sorted(found)
    blocks: dict[str, dict[str, int]] = {name: {} for name in names}
    for architecture, devices in (("80", ("A100", "RTX 4090")), ("90", ("H100",))):
        rows = [(found[n][architecture].registers, *launched.get(n, (32, 0))) for n in names]
        for name, counts in zip(names, occupancy(nvcc, folder, rows, architecture), strict=True):
            blocks[name].update(zip(devices, counts, strict=True))
    table: dict[str, object] = {}
    for name in names:
        threads, shared = launched.get(name, (0, 0))
        row: dict[str, object] = {"threads": threads, "shared": shared}
        for architecture in ARCHITECTURES:
            kernel = found[name][architecture]
            row[f"sm_{architecture}"] = {"registers": kernel.registers, **kernel.main_loop}
        row["blocks per multiprocessor"] = blocks[name]
        table[name] = row
    return table


def faults(found: dict[str, dict[str, Kernel]], launched: dict[str, tuple[int, int]]) -> list[str]:
    """What no table may hold."""
    wrong = []
    for name, kernels in sorted(found.items()):
        for architecture, kernel in kernels.items():
            where = f"{name} (sm_{architecture})"
            if kernel.spilled or kernel.stack:
                wrong.append(f"{where}: {kernel.spilled} bytes are spilled, the stack frame has {kernel.stack}")
            if any(kernel.counts.get(opcode) for opcode in LOCAL):
                wrong.append(f"{where}: local memory is used (LDL, STL)")
            if kernel.counts.get("HMMA"):
                expected = [opcode for opcode in COUNTED if opcode != "LDGSTS" or not UNALIGNED.fullmatch(name)]
                missing = [opcode for opcode in expected if not kernel.main_loop.get(opcode)]
                if missing:
                    wrong.append(f"{where}: no {', '.join(missing)} in the main loop")
            if kernel.shared:
                wrong.append(f"{where}: {kernel.shared} bytes of static shared memory; the dialect has only dyn_smem")
        if name not in launched:
            wrong.append(f"{name}: no test launches it")
    return wrong


def differences(kept: dict[str, object], table: dict[str, object]) -> list[str]:
    """Rows that are not what the committed table says."""
    wrong = [f"{name} is not in the table" for name in table if name not in kept]
    wrong += [f"{name} is in the table and not in cuda/units/" for name in kept if name not in table]
    wrong += [
        f"{name}:\n    table {kept[name]}\n    found {row}" for name, row in table.items() if name in kept and kept[name] != row
    ]
    return wrong


# What a kernel must move and compute for the shape below: bytes, flops. Nothing here was measured.
TOKENS, HIDDEN, VOCABULARY, PARAMETERS = 8192, 4096, 128_256, 1_000_000_000
WORK = {
    "rms_norm": (4 * TOKENS * HIDDEN, 0),
    "rms_norm, residual": (8 * TOKENS * HIDDEN, 0),
    "rms_norm backward": (6 * TOKENS * HIDDEN, 0),
    "rms_norm backward, weight": (4 * TOKENS * HIDDEN, 0),
    "rope, 40 heads of 128": (4 * TOKENS * 40 * 128, 0),
    "swiglu, 14,336 columns": (6 * TOKENS * 14_336, 0),
    "swiglu backward": (10 * TOKENS * 14_336, 0),
    "embedding": (4 * TOKENS * HIDDEN, 0),
    "adamw, 1e9 parameters": (30 * PARAMETERS, 0),
    "sample, 256 rows": (4 * 256 * VOCABULARY, 0),
}
# bytes and dense bf16 flops a second, by their data sheets
PEAKS = {"A100 80 GB": (2.04e12, 312e12), "H100 SXM": (3.35e12, 989e12), "RTX 4090": (1.01e12, 165e12)}


def predict() -> str:
    """A table of the least times that bytes and flops allow."""
    lines = [f"PREDICTED, not measured: the least time at the devices' peaks, {TOKENS:,} tokens of {HIDDEN:,}, in microseconds"]
    lines.append(f"{'':<28}" + "".join(f"{device:>14}" for device in PEAKS))
    for name, (moved, computed) in WORK.items():
        least = [max(moved / bandwidth, computed / flops) * 1e6 for bandwidth, flops in PEAKS.values()]
        lines.append(f"{name:<28}" + "".join(f"{time:>14,.1f}" for time in least))
    return "\n".join(lines)


def write(version: str, table: dict[str, object]) -> None:
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    TABLE.write_text(f'{{\n  "nvcc": {json.dumps(version)},\n  "kernels": {{\n{rows}\n  }}\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--update", action="store_true", help="write docs/cuda-registers.json")
    parser.add_argument("--predict", action="store_true", help="print what bytes and flops allow, and check nothing")
    arguments = parser.parse_args()
    if arguments.predict:
        print(predict())
        return 0
    try:
        nvcc = shutil.which("nvcc")
        if not nvcc:
            raise CheckError("nvcc is not in PATH")
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"V(\d+\.\d+\.\d+)", said)
        version = release[1] if release else "unknown"
        disassembler = find_disassembler()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = inspect(nvcc, disassembler, folder)
            launched = launches(arguments.build, folder)
            table = describe(found, launched, nvcc, folder)
    except CheckError as error:
        print(f"check_cuda: {error}", file=sys.stderr)
        return 2
    wrong = faults(found, launched)
    if arguments.update:
        write(version, table)
    else:
        kept = json.loads(TABLE.read_text())
        if kept["nvcc"] == version:
            wrong += differences(kept["kernels"], table)
        else:  # another ptxas allots other registers; what must hold holds all the same
            print(f"docs/cuda-registers.json is of nvcc {kept['nvcc']}, this is {version}: registers are not compared")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(table)} kernels for sm_{', sm_'.join(ARCHITECTURES)}: {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
