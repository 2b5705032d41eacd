"""Refuses ISA-specific units that share code: a weak symbol in an isa_*.o could replace another level's function.

Run after a build that kept its objects: python tools/check_symbols.py [BUILD_FOLDER]. NM names another nm, for objects of
another machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# The one weak symbol GCC puts into any unit with exception handling: data that refers to its runtime, no code.
ALLOWED = {"DW.ref.__gxx_personality_v0"}


def weak_symbols(unit: Path) -> list[str]:
    """Weak (V, W) and unique (u) definitions in an object file."""
    listing = subprocess.run(
        [os.environ.get("NM", "nm"), "--defined-only", "--demangle", unit], capture_output=True, text=True, check=True
    )
    found = []
    for line in listing.stdout.splitlines():
        kind, _, name = line[17:].partition(" ")
        if kind in ("V", "W", "u", "v", "w") and name not in ALLOWED:
            found.append(name)
    return found


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build")
    units = sorted(folder.rglob("isa_*.cc.o"))
    if not units:
        print(f"no isa_*.cc.o under {folder}: build first", file=sys.stderr)
        return 2
    leaks = {unit: names for unit in units if (names := weak_symbols(unit))}
    for unit, names in leaks.items():
        print(f"{unit.name}: weak symbols {', '.join(names[:5])}", file=sys.stderr)
    print(f"{len(units)} ISA units, {len(leaks)} with weak symbols")
    return 1 if leaks else 0


if __name__ == "__main__":
    raise SystemExit(main())
