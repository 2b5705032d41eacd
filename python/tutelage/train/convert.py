"""`tutelage convert`: a GGUF file becomes a Hugging Face folder, or a folder a GGUF file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tutelage import files
from tutelage.data.tokenizer import Tokenizer
from tutelage.hub import gguf_model, hugging_face
from tutelage.hub.gguf_file import GgufFile
from tutelage.hub.gguf_tokenizer import read_tokenizer
from tutelage.safetensors_io import LazyTensor
from tutelage.train.configs import ConvertConfig
from tutelage.train.run import write_json

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Conversion:
    """What was written, and as what."""

    target: Path
    tensors: int
    weights: int
    dtype: str
    seconds: float


def convert(config: ConvertConfig) -> Conversion:
    """Converts as `config` says: the whole target appears at the end, or nothing.

    Raises FileNotFoundError without a source, RunFolderError where something would be lost, otherwise as `gguf_file`,
    `gguf_model`, `gguf_tokenizer` and `hugging_face`.
    """
    source, target = Path(config.source), Path(config.target)
    begin = time.monotonic()
    if source.is_dir():
        raise ValueError("not yet")
    tensors, weights, dtype = _to_folder(source, target, config)
    result = Conversion(target, tensors, weights, dtype, time.monotonic() - begin)
    Console().print(
        f"{weights:,} weights in {tensors} tensors as {dtype}; in {target}, {result.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    if config.json is not None:
        figures = {"tensors": tensors, "weights": weights, "dtype": dtype, "seconds": result.seconds}
        write_json(Path(config.json), {"command": "convert", "source": str(source), "target": str(target), **figures})
    return result


def _to_folder(source: Path, target: Path, config: ConvertConfig) -> tuple[int, int, str]:
    if config.dtype == "q8_0":
        raise ValueError("q8_0 is for GGUF files; a folder holds float32, float16 or bfloat16")
    if not source.is_file():
        raise FileNotFoundError(f"there is no {source}: give a GGUF file or the folder of a model")
    _check_folder(target, config.overwrite)
    with GgufFile(source) as file, _bar() as advance:
        model, places = gguf_model.read_model(file)
        contents, eos_token_ids = read_tokenizer(file, model.vocab_size)
        tokenizer = Tokenizer.from_contents(contents, str(source))
        dtype = gguf_model.exact_dtype(file) if config.dtype == "auto" else _DTYPES[config.dtype]

        def pieces(index: int) -> Iterator[torch.Tensor]:
            advance(index / len(places))
            return gguf_model.rows_of(file, places[index], dtype)

        tensors: list[tuple[str, Any]] = [
            (place.ours, LazyTensor(place.shape, dtype, lambda index=index: pieces(index)))  # type: ignore[misc]
            for index, place in enumerate(places)
        ]
        temporary = target.with_name(files.TEMPORARY + target.name)
        files.remove(temporary)
        try:
            hugging_face.write_folder(
                temporary, model, "lm", tensors, eos_token_ids=eos_token_ids, bos_token_id=tokenizer.bos_token_id
            )
            tokenizer.save(temporary)
            files.write_file_atomic(temporary / "README.md", _card(file).encode())
            if target.exists():
                files.discard([target], files.DISK)
            files.DISK.rename(temporary, target)
            files.DISK.fsync(target.parent)
        except BaseException:
            files.remove(temporary)
            raise
    return len(places), sum(math.prod(place.shape) for place in places), str(dtype).removeprefix("torch.")


def _check_folder(target: Path, overwrite: bool) -> None:
    """What is replaced is a model and nothing else."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if not target.exists():
        return
    if not target.is_dir():
        raise files.RunFolderError(f"{target} is a file: give the folder to write the model to")
    if not overwrite:
        raise files.RunFolderError(f"{target} is not empty: pass --overwrite to replace a model in it, or another target")
    if not (target / hugging_face.CONFIG).is_file() or any(path.is_dir() for path in target.iterdir()):
        raise files.RunFolderError(f"{target} is not the folder of a model alone, so nothing in it was touched: pass another")


def _card(file: GgufFile) -> str:
    name = file.metadata.get("general.name", file.path.stem)
    license_ = file.metadata.get("general.license")
    head = ["---", "library_name: transformers"] + ([f"license: {license_}"] if isinstance(license_, str) else []) + ["---"]
    types = sorted({tensor.type for tensor in file.tensors.values()})
    return "\n".join([*head, "", f"# {name}", "", f"Converted from {file.path.name} ({', '.join(types)}) by tutelage.", ""])


@contextmanager
def _bar() -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; the function moves it to a share of the whole."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.percentage:3.0f}%"), BarColumn(), console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.update(task, completed=share)
