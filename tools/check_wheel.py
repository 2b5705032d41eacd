"""Checks what `python -m build` made: one sdist, one wheel under 5 MB, the pages and no OpenMP runtime inside, and it
imports and scores, on the CPU and on the CUDA emulator, in another environment without a compiler (torch comes from this one).

python tools/check_wheel.py DIST_FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

LIMIT = 5_000_000  # bytes
PAGE = ("label.html", "label.js", "play.html", "play.js", "shared.js", "page.css", "icon.svg")


def main() -> int:
    folder = Path(sys.argv[1])
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    size = wheel.stat().st_size
    names = zipfile.ZipFile(wheel).namelist()
    bundled = [name for name in names if "gomp" in name or "iomp" in name]
    print(f"{sdist.name}: {sdist.stat().st_size:,} bytes; {wheel.name}: {size:,} bytes, {len(names)} files")
    missing = [name for name in PAGE if f"tutelage/feedback/page/{name}" not in names]
    if missing:
        print(f"the wheel lacks {missing} of the pages", file=sys.stderr)
        return 1
    if size > LIMIT or bundled:
        print(f"the wheel must stay under {LIMIT:,} bytes and carry no OpenMP runtime {bundled}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        python = Path(scratch) / "bin" / "python"
        # Without a compiler: nothing but the environment's own folder is on PATH.
        environment = {**os.environ, "PATH": str(python.parent), "PYTHONPATH": ""}
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, env=environment)
        # torch and the other dependencies are lent by this environment; tutelage itself must come from the new one.
        (Path(sysconfig.get_path("purelib", vars={"base": scratch})) / "lent.pth").write_text(
            sysconfig.get_path("purelib") + "\n"
        )
        code = (
            "import tutelage as tl\n"
            "for device in ('cpu', 'cuda-sim'):\n"
            "    m = tl.Model(tl.ModelConfig(64, 16, 32, 1, 2), device=device)\n"
            "    print(float(m.score(tl.pack([[1, 2, 3]])).logprobs.sum()))\n"
            "print(tl.__file__)"
        )
        done = subprocess.run([python, "-c", code], check=True, env=environment, capture_output=True, text=True, cwd=scratch)
    logprob, emulated, where = done.stdout.split()
    if not where.startswith(scratch):
        print(f"the wheel was not what was imported, but {where}", file=sys.stderr)
        return 1
    if abs(float(emulated) - float(logprob)) > 0.01 * abs(float(logprob)):
        print(f"cuda-sim scores {emulated}, the CPU {logprob}: they must agree to a percent", file=sys.stderr)
        return 1
    print(f"imports and scores without a compiler: {logprob}; on cuda-sim {emulated}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
