"""Compares the committed type stubs of the extension with what the built module has: names of functions, classes, methods."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime must be the process's one)

from tutelage import _core

STUB = Path(__file__).parent.parent / "python" / "tutelage" / "_core.pyi"


def stub_names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Public names that a stub defines, methods as Class.method."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef):
            names.add(prefix + node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {node.name} | stub_names(node.body, f"{node.name}.")
    return {name for name in names if not name.rpartition(".")[2].startswith("_")}


def module_names() -> set[str]:
    """The same of the module as built."""
    names: set[str] = set()
    for name, value in vars(_core).items():
        if name.startswith("_"):
            continue
        names.add(name)
        if isinstance(value, type):
            names |= {f"{name}.{member}" for member in vars(value) if not member.startswith("_")}
    return names


def main() -> int:
    stub, built = stub_names(ast.parse(STUB.read_text()).body), module_names()
    for name in sorted(built - stub):
        print(f"{STUB.name} lacks {name}", file=sys.stderr)
    for name in sorted(stub - built):
        print(f"{STUB.name} has {name}, the module has not", file=sys.stderr)
    print(f"{len(built)} names in the module, {len(stub ^ built)} differ from the stubs")
    return 1 if stub != built else 0


if __name__ == "__main__":
    raise SystemExit(main())
