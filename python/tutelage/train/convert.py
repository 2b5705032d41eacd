"""`tutelage convert`: a GGUF file becomes a Hugging Face folder, or a folder a GGUF file."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tutelage import files
from tutelage.data.chat import NAMED_CHAT_TEMPLATES
from tutelage.data.tokenizer import Tokenizer
from tutelage.hub import gguf_model, hugging_face
from tutelage.hub.gguf_file import GgufFile, Value, gguf_chunks
from tutelage.hub.gguf_model import Place
from tutelage.hub.gguf_tokenizer import describe_tokenizer, read_tokenizer
from tutelage.hub.model_card import Lineage, Stage
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
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}: give a GGUF file or the folder of a model")
    begin = time.monotonic()
    places, dtype = (_to_gguf if source.is_dir() else _to_folder)(source, target, config)
    weights = sum(math.prod(place.shape) for place in places)
    result = Conversion(target, len(places), weights, dtype, time.monotonic() - begin)
    Console().print(
        f"{weights:,} weights in {len(places)} tensors as {dtype}; in {target}, {result.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    if config.json is not None:
        figures = {"tensors": len(places), "weights": weights, "dtype": dtype, "seconds": result.seconds}
        write_json(Path(config.json), {"command": "convert", "source": str(source), "target": str(target), **figures})
    return result


def _to_folder(source: Path, target: Path, config: ConvertConfig) -> tuple[list[Place], str]:
    if config.dtype == "q8_0":
        raise ValueError("q8_0 is for GGUF files; a folder holds float32, float16 or bfloat16")
    _check_folder(target, config.overwrite)
    with GgufFile(source) as file, _bar() as advance:
        model, places = gguf_model.read_model(file)
        contents, eos_token_ids = read_tokenizer(file, model.vocab_size)
        tokenizer = Tokenizer.from_contents(contents, str(source))
        dtype = gguf_model.exact_dtype(file) if config.dtype == "auto" else _DTYPES[config.dtype]

        def pieces(index: int) -> Iterator[torch.Tensor]:
            advance(index / len(places))
            return gguf_model.rows_of(file, places[index], dtype)

        tensors = [
            (place.ours, LazyTensor(place.shape, dtype, functools.partial(pieces, index))) for index, place in enumerate(places)
        ]
        types = sorted({tensor.type for tensor in file.tensors.values()})
        temporary = target.with_name(files.TEMPORARY + target.name)
        files.remove(temporary)
        try:
            hugging_face.write_folder(
                temporary,
                model,
                "lm",
                tensors,
                eos_token_ids=eos_token_ids,
                bos_token_id=tokenizer.bos_token_id,
                origin=_origin(file),
                stage=Stage("convert", {"source": file.path.name, "types": [*types]}),
            )
            tokenizer.save(temporary)
            if target.exists():
                files.discard([target], files.DISK)
            files.DISK.rename(temporary, target)
            files.DISK.fsync(target.parent)
        except BaseException:
            files.remove(temporary)
            raise
    return places, str(dtype).removeprefix("torch.")


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
    if not (target / hugging_face.CONFIG).is_file() or any(
        path.is_dir() and path.name != NAMED_CHAT_TEMPLATES for path in target.iterdir()
    ):
        raise files.RunFolderError(f"{target} is not the folder of a model alone, so nothing in it was touched: pass another")


def _origin(file: GgufFile) -> hugging_face.Origin:
    """What the card says of the file's model."""
    name, license_ = (file.metadata.get(f"general.{field}") for field in ("name", "license"))
    fields = {"license": license_} if isinstance(license_, str) else {}
    base = name if isinstance(name, str) and name else file.path.stem
    return hugging_face.Origin({}, {}, {}, Lineage(base, fields))


def _to_gguf(source: Path, target: Path, config: ConvertConfig) -> tuple[list[Place], str]:
    if target.is_dir():
        raise files.RunFolderError(f"{target} is a folder: give the GGUF file to write")
    if target.exists() and not config.overwrite:
        raise files.RunFolderError(f"{target} exists already: pass --overwrite to replace it, or another target")
    model, head = hugging_face.read_config(source)
    if head != "lm":
        raise ValueError(f"{source} holds a reward model, for which llama.cpp has no place: convert a language model")
    architecture, described = gguf_model.describe(model, source)
    tokenizer = Tokenizer.from_pretrained(source)
    described |= describe_tokenizer(tokenizer, model.vocab_size, hugging_face.read_eos_token_ids(source), str(source))
    stored = gguf_model.stored_dtype(source)
    dtype = stored if config.dtype == "auto" else config.dtype
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": source.resolve().name,
        "general.file_type": {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}[kind],
        **({"general.quantization_version": 2} if kind == "Q8_0" else {}),
        **described,
    }
    # A first pass over the folder checks all of it and says in which order its tensors come; the second writes them.
    by_name = {place.ours: place for place in gguf_model.places(model, architecture)}
    shapes = {name: place.shape for name, place in by_name.items()}
    tied = model.tie_word_embeddings
    order = [by_name[name] for name, _ in hugging_face.read_tensors(source, shapes, tied=tied)]
    tensors = hugging_face.read_tensors(source, shapes, tied=tied)
    with _bar() as advance:

        def load(index: int) -> torch.Tensor:
            advance(index / len(order))
            name, tensor = next(tensors)
            assert name == order[index].ours
            return tensor

        to_write = [place.to_write(kind, functools.partial(load, index)) for index, place in enumerate(order)]
        try:
            files.write_file_atomic(target, gguf_chunks(metadata, [*to_write, *gguf_model.extra_tensors(model)]))
        except BaseException:
            files.remove(target.with_name(files.TEMPORARY + target.name))
            raise
    return order, dtype


@contextmanager
def _bar() -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; the function moves it to a share of the whole."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.percentage:3.0f}%"), BarColumn(), console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.update(task, completed=share)
