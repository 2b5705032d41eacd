"""The tensors of a Hugging Face folder, in one or several safetensors files. Nothing is unpickled."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from tutelage.files import Buffer
from tutelage.hub.config_json import read_json
from tutelage.safetensors_io import LazyTensor, safetensors_chunks

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_PREFIXES = ("model.", "transformer.")
_HEAD_TENSORS = ("lm_head.weight", "score.weight")
_MAPPED_AT_ONCE = 64 << 20  # bytes
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class _Source(NamedTuple):
    """Where a tensor is: the file, and its name in there."""

    path: Path
    stored: str


def read_tensors(
    folder: str | Path, expected: Mapping[str, Sequence[int]], *, tied: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder, each once, as they are stored (float64 as float32), mapped into memory.

    All names and shapes are checked before the first tensor is read, and every number of a tensor before it is handed
    on. Names may lack their prefix ("model.", "transformer."); buffers that are no parameters are passed over, and so is
    a head that is not expected.

    Args:
        expected: name -> shape of every tensor that must be there.
        tied: the model's head is its embedding: an lm_head.weight of its own is an error unless it is equal.

    Raises:
        ValueError: naming the file and the tensor that is missing, unexpected, stored twice, of another
            shape, not of floating point or not finite; a folder that holds only pickled weights.
    """
    folder = Path(folder)
    found: dict[str, _Source] = {}
    for path in weight_files(folder):
        with open_weights(path) as file:
            for stored in file.keys():  # noqa: SIM118 (no dict, and not iterable in older releases)
                name = _parameter_name(stored, expected)
                if name in found:
                    raise ValueError(f"{path}: {stored} is in {found[name].path.name} too, as {found[name].stored}")
                if name is not None:
                    found[name] = _Source(path, stored)
                    check_tensor(path, stored, file.get_slice(stored), expected.get(name))
    unexpected = [name for name in found if name not in expected and name not in _HEAD_TENSORS]
    missing = [name for name in expected if name not in found]
    for what, names in (("lacks", missing), ("has, but the model of its config.json has not,", unexpected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{folder} {what} the tensors {', '.join(names[:5])}{more}")
    if tied and "lm_head.weight" in found:
        _check_tied(found, expected)
    return _load(found, expected)


def _load(found: Mapping[str, _Source], expected: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, torch.Tensor]]:
    wanted = [(name, source) for name, source in found.items() if name in expected]
    for path, group in groupby(wanted, key=lambda entry: entry[1].path):
        with ExitStack() as stack:
            file, mapped = stack.enter_context(open_weights(path)), 0
            for name, source in group:
                if mapped > _MAPPED_AT_ONCE:  # what has been read stays in memory for as long as the file is mapped
                    stack.close()
                    file, mapped = stack.enter_context(open_weights(path)), 0
                tensor = file.get_tensor(source.stored)
                mapped += tensor.nbytes
                if tensor.dtype == torch.float64:  # no model has it, and its range is wider
                    tensor = tensor.to(torch.float32)
                _check_finite(source, tensor)
                yield name, tensor


def _check_finite(source: _Source, tensor: torch.Tensor) -> None:
    # The least and the greatest number are NaN where any is: one pass over the memory, which the copy needs next.
    if not tensor.numel() or all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(tensor)).tolist()):
        return
    flat = tensor.reshape(-1)
    place = int((~torch.isfinite(flat)).nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape)]
    raise ValueError(
        f"{source.path}: {source.stored} holds {flat[place].item()} at {index}: the weights are damaged, or of a training that "
        "diverged"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises ValueError where it has none, or lacks one that its index names."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder (tutelage downloads nothing: fetch the model first)")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _read_index(folder / INDEX)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickled:
        raise ValueError(
            f"{folder} has only pickled weights ({pickled[0]}): loading a pickle can run any code, so "
            "tutelage never does; get the model's safetensors files, or, if you trust it, convert it with "
            "transformers' model.save_pretrained(folder)"
        )
    raise ValueError(f"{folder} has no {WEIGHTS} and no {INDEX}")


def _read_index(path: Path) -> list[Path]:
    """The shards that an index names."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map must be an object, tensor to file")
    shards = []
    for name in sorted(set(map(str, weight_map.values()))):
        # A name, not a path: nothing outside the folder is opened.
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise ValueError(f"{path}: weight_map names {reprlib.repr(name)}, which is no safetensors file of its folder")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path.parent} lacks {reprlib.repr(name)}, which {path.name} names: copy or fetch it again")
        shards.append(path.parent / name)
    return shards


def open_weights(path: Path) -> Any:
    """The header of a safetensors file, checked, and its data mapped into memory; for a `with`."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error


def _parameter_name(stored: str, expected: Mapping[str, Sequence[int]]) -> str | None:
    """The model's name of a stored tensor; None for a buffer."""
    for name in (stored, *(prefix + stored for prefix in _PREFIXES)):
        if name in expected:
            return name
    return None if ("." + stored).endswith(_BUFFERS) else stored


def check_tensor(path: Path, stored: str, view: Any, shape: Sequence[int] | None) -> None:
    """Raises ValueError where a stored tensor has another shape, or is not of floating point."""
    if shape is None:
        return
    if tuple(view.get_shape()) != tuple(shape):
        raise ValueError(f"{path}: {stored} must have shape {list(shape)}, but it has {view.get_shape()}")
    if view.get_dtype() not in _FLOAT_DTYPES:
        raise ValueError(
            f"{path}: {stored} is {view.get_dtype()}, but only {', '.join(_FLOAT_DTYPES)} are read: "
            "quantized weights are not supported"
        )


def _check_tied(found: Mapping[str, _Source], expected: Mapping[str, Sequence[int]]) -> None:
    """Where the two differ, transformers 4 uses the embedding and 5 the stored head: nobody can know."""
    embedding = next(name for name in expected if name.endswith(("embed_tokens.weight", "wte.weight")))
    head, tied = (_read_one(found[name]) for name in ("lm_head.weight", embedding))
    if not torch.equal(head, tied):
        raise ValueError(
            f"{found['lm_head.weight'].path}: lm_head.weight differs from {embedding}, but config.json has "
            "tie_word_embeddings true: set it to false, or remove the tensor"
        )


def _read_one(source: _Source) -> torch.Tensor:
    with open_weights(source.path) as file:
        tensor: torch.Tensor = file.get_tensor(source.stored)
        return tensor


def weight_parts(
    weights: Mapping[str, torch.Tensor | LazyTensor], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int
) -> dict[str, Iterable[Buffer]]:
    """File name -> content: model.safetensors, or shards and their index. dtypes: what each tensor is stored as."""
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in weights.items()}
    shards: list[dict[str, torch.Tensor | LazyTensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in weights.items():
        if shards[-1] and sizes[name] > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= sizes[name]
    if len(shards) == 1:
        return {WEIGHTS: safetensors_chunks(weights, dtypes=dtypes)}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    parts: dict[str, Iterable[Buffer]] = {
        file: safetensors_chunks(shard, dtypes=dtypes) for file, shard in zip(names, shards, strict=True)
    }
    return {**parts, INDEX: [json.dumps(index, indent=2).encode() + b"\n"]}
