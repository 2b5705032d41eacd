"""Hugging Face folders, in and out: config.json, and the weights as one or several safetensors files.

Nothing is downloaded and nothing unpickled.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tutelage import files
from tutelage.config import Head, ModelConfig
from tutelage.files import DISK, Buffer, Disk
from tutelage.hub import config_json
from tutelage.hub.config_json import read_json
from tutelage.hub.weights import INDEX, WEIGHTS, read_tensors, weight_files, weight_parts

__all__ = [
    "CONFIG",
    "GENERATION_CONFIG",
    "INDEX",
    "WEIGHTS",
    "read_config",
    "read_eos_token_ids",
    "read_reward_bias",
    "read_tensors",
    "write_folder",
]

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
REWARD_BIAS = "reward_bias"

_MODEL_FILE = re.compile(
    r"(generation_|adapter_)?config\.json|adapter_model\.safetensors|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json"
)
_LARGEST_BIAS = 1e30  # values are float32
_SMALLEST_ELEMENT = 2  # bytes, of float16 and bfloat16


def read_config(folder: str | Path) -> tuple[ModelConfig, Head]:
    """What the model in a folder is, and its head: "scalar" for …ForSequenceClassification with one label.

    The weight files must be there too: a config.json that describes more weights than they can hold is
    refused, so that damaged or hostile sizes allocate nothing. Dropout probabilities are not used; one that
    is not 0 is logged.

    Raises:
        ValueError: naming the file and the field that is missing, malformed or not supported.
    """
    folder = Path(folder)
    weight_bytes = sum(path.stat().st_size for path in weight_files(folder))
    config, head = config_json.read_model(folder / CONFIG, read_json(folder / CONFIG))
    count = config_json.count_weights(config)
    if count * _SMALLEST_ELEMENT > weight_bytes:
        raise ValueError(
            f"{folder / CONFIG} describes {count:,} weights, more than fit into the "
            f"{weight_bytes:,} bytes of the folder's safetensors files: they belong to another model, or one "
            "of the two is damaged"
        )
    return config, head


def read_eos_token_ids(folder: str | Path) -> tuple[int, ...]:
    """The ids that end a completion: generation_config.json's, or config.json's; () where neither names any.

    Raises:
        ValueError: naming the file whose eos_token_id is neither an id nor a list of ids.
    """
    for name in (GENERATION_CONFIG, CONFIG):
        path = Path(folder) / name
        value = read_json(path).get("eos_token_id") if path.exists() else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(type(number) is not int or not 0 <= number <= config_json.LARGEST_SIZE for number in ids):
            raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, but it is {reprlib.repr(value)}")
        return tuple(ids)
    return ()


def read_reward_bias(folder: str | Path) -> float:
    """What config.json says is to be subtracted from every value (its field reward_bias); 0 where it says nothing.

    Raises:
        ValueError: naming the file whose reward_bias is no finite number.
    """
    path = Path(folder) / CONFIG
    value = read_json(path).get(REWARD_BIAS)
    if value is None:
        return 0.0
    if type(value) not in (int, float) or not -_LARGEST_BIAS < value < _LARGEST_BIAS:  # NaN is not above anything
        raise ValueError(f"{path}: {REWARD_BIAS} must be a finite number, but it is {reprlib.repr(value)}")
    return float(value)


def write_folder(
    folder: str | Path,
    config: ModelConfig,
    head: Head,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    eos_token_ids: Sequence[int] = (),
    bos_token_id: int | None = None,
    reward_bias: float = 0.0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    disk: Disk = DISK,
) -> None:
    """Writes a model so that transformers' `Auto…from_pretrained` and `read_config`, `read_tensors` load it.

    Everything is written under temporary names first. Then config.json is the first file to go and the last
    to come: a folder with a config.json holds one model, whole. Files of other kinds are left alone. Extra
    memory: 16 MiB.

    Args:
        folder: made if missing.
        tensors: (name, tensor), of one dtype, under the names that transformers uses.
        eos_token_ids, bos_token_id: what transformers' `generate` stops at and starts from.
        reward_bias: see `read_reward_bias`; transformers keeps the field, but does not subtract it.
        max_shard_bytes: above it the weights become several files and an index.

    Raises:
        ValueError: transformers has no class for such a model; FileError.
    """
    folder = Path(folder)
    weights = dict(tensors)
    special_ids = _special_ids(eos_token_ids, bos_token_id)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    document = {**config_json.describe(config, head), **special_ids, "pad_token_id": None, "torch_dtype": dtype}
    if reward_bias:
        document[REWARD_BIAS] = reward_bias
    parts = weight_parts(weights, max_shard_bytes)
    if eos_token_ids and head == "lm":
        parts[GENERATION_CONFIG] = [generation_config(eos_token_ids, bos_token_id)]
    parts[CONFIG] = [_json(document)]
    files.make_folder(folder, disk)
    replace_files(folder, parts, disk)


def generation_config(eos_token_ids: Sequence[int], bos_token_id: int | None) -> bytes:
    """generation_config.json."""
    return _json(_special_ids(eos_token_ids, bos_token_id))


def _special_ids(eos_token_ids: Sequence[int], bos_token_id: int | None) -> dict[str, Any]:
    return {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_ids[0] if len(eos_token_ids) == 1 else list(eos_token_ids) or None,
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode() + b"\n"


def replace_files(folder: Path, parts: Mapping[str, Iterable[Buffer]], disk: Disk) -> None:
    """Writes `parts`, whose last is (adapter_)config.json, in place of the model or adapter that `folder` may hold."""
    _remove_model(folder, files.TEMPORARY, disk)  # leftovers of an interrupted write
    try:
        for name, chunks in parts.items():
            files.write_file(folder / (files.TEMPORARY + name), chunks, disk)
    except BaseException:  # the old model is untouched; a full disk gets its space back
        with suppress(files.FileError):
            _remove_model(folder, files.TEMPORARY, disk)
        raise
    for name in (CONFIG, ADAPTER_CONFIG):
        files.remove(folder / name, disk)
    disk.fsync(folder)
    _remove_model(folder, "", disk)
    *first, last = parts
    for names in (first, [last]):
        for name in names:
            disk.rename(folder / (files.TEMPORARY + name), folder / name)
        disk.fsync(folder)


def _remove_model(folder: Path, prefix: str, disk: Disk) -> None:
    """Removes the files that `write_folder` makes, where they carry this prefix."""
    for path in sorted(folder.iterdir()):
        name = path.name.removeprefix(prefix)
        if prefix + name == path.name and _MODEL_FILE.fullmatch(name):
            files.remove(path, disk)
