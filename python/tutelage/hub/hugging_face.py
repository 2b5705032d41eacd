"""Hugging Face folders, in and out: config.json, generation_config.json, the weights, and the model card.

Nothing is downloaded and nothing unpickled. The tokenizer's files are `data.tokenizer`'s.
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tutelage import files
from tutelage.config import Head, ModelConfig
from tutelage.files import DISK, Buffer, Disk
from tutelage.hub import config_json
from tutelage.hub.config_json import read_json
from tutelage.hub.model_card import CARD, Lineage, Stage, card, may_replace, read_lineage
from tutelage.hub.weights import INDEX, WEIGHTS, read_tensors, weight_files, weight_parts
from tutelage.safetensors_io import LazyTensor

__all__ = [
    "CARD",
    "CONFIG",
    "GENERATION_CONFIG",
    "INDEX",
    "WEIGHTS",
    "Origin",
    "Stage",
    "StoredDtype",
    "read_config",
    "read_eos_token_ids",
    "read_origin",
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

StoredDtype = Literal["float32", "float16", "bfloat16"]

_log = logging.getLogger(__name__)

_MODEL_FILE = re.compile(
    r"(generation_|adapter_)?config\.json|adapter_model\.safetensors|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json"
)
_LARGEST_BIAS = 1e30  # values are float32
_SMALLEST_ELEMENT = 2  # bytes, of float16 and bfloat16
_COMPARED_AT_ONCE = 1 << 22  # elements


@dataclass(frozen=True)
class Origin:
    """What a folder holds that a model does not know, and that is there again when the model is saved."""

    config: Mapping[str, Any]
    """Fields of config.json that no number depends on, and its model_type."""
    generation: Mapping[str, Any]
    """generation_config.json, with what older folders have of it in config.json."""
    dtypes: Mapping[str, torch.dtype]
    """What each tensor was stored as."""
    lineage: Lineage


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
    described = config_json.read_model(folder / CONFIG, read_json(folder / CONFIG))
    count = config_json.count_weights(described.config)
    if count * _SMALLEST_ELEMENT > weight_bytes:
        raise ValueError(
            f"{folder / CONFIG} describes {count:,} weights, more than fit into the "
            f"{weight_bytes:,} bytes of the folder's safetensors files: they belong to another model, or one "
            "of the two is damaged"
        )
    return described.config, described.head


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


def read_origin(folder: str | Path, dtypes: Mapping[str, torch.dtype]) -> Origin:
    """What else a folder holds. dtypes: what its tensors, by the model's names, are stored as.

    Raises ValueError as `read_config`, and naming a generation_config.json that is no JSON object.
    """
    folder = Path(folder)
    described = config_json.read_model(folder / CONFIG, read_json(folder / CONFIG))
    path = folder / GENERATION_CONFIG
    generation = read_json(path) if path.exists() else {}
    return Origin(described.kept, {**described.generation, **generation}, dict(dtypes), read_lineage(folder))


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
    tensors: Iterable[tuple[str, torch.Tensor | LazyTensor]],
    *,
    eos_token_ids: Sequence[int] = (),
    bos_token_id: int | None = None,
    reward_bias: float = 0.0,
    origin: Origin | None = None,
    dtype: StoredDtype | None = None,
    stage: Stage | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    disk: Disk = DISK,
) -> None:
    """Writes a model so that transformers' `Auto…from_pretrained` and `read_config`, `read_tensors` load it.

    Everything is written under temporary names first. Then config.json is the first file to go and the last
    to come: a folder with a config.json holds one model, whole. Files of other kinds are left alone, and so is a
    README.md that tutelage did not write. Extra memory: 16 MiB.

    Args:
        folder: made if missing.
        tensors: (name, tensor), under the names that transformers uses.
        eos_token_ids, bos_token_id: what transformers' `generate` stops at and starts from.
        reward_bias: see `read_reward_bias`; transformers keeps the field, but does not subtract it.
        origin: of the folder that the model came from: its other settings are written too.
        dtype: to store the weights in. None: what they were loaded from, where that holds every one of them exactly,
            so that a folder loaded and saved has the same bytes; otherwise as they are (float32), which is logged.
        stage: what was done to the model since, for the model card.
        max_shard_bytes: above it the weights become several files and an index.

    Raises:
        ValueError: transformers has no class for such a model; a weight too large for `dtype`, naming its tensor; FileError.
    """
    folder = Path(folder)
    weights = dict(tensors)
    special_ids = _special_ids(eos_token_ids, bos_token_id)
    stored = _stored_dtypes(weights, origin, dtype)
    widest = max(stored.values(), key=lambda one: one.itemsize)
    # Of float16 beside bfloat16 neither holds the other.
    name = str(widest if len({one for one in stored.values() if one.itemsize == widest.itemsize}) == 1 else torch.float32)
    kept = {} if origin is None else origin.config
    pad = kept.get("pad_token_id")
    if head == "scalar" and pad in eos_token_ids:
        pad = None  # transformers would read the reward before the token that ends the text, not after it
    document = {
        **config_json.describe(config, head, kept),
        **special_ids,
        "pad_token_id": pad,
        "torch_dtype": name.removeprefix("torch."),
    }
    if reward_bias:
        document[REWARD_BIAS] = reward_bias
    parts = weight_parts(weights, stored, max_shard_bytes)
    generation = {} if origin is None else origin.generation
    if head == "lm" and (eos_token_ids or generation):
        parts[GENERATION_CONFIG] = [_json({**generation, **special_ids})]
    if may_replace(folder / CARD):
        lineage = (Lineage() if origin is None else origin.lineage).then(stage)
        parameters = sum(tensor.numel() for tensor in weights.values())
        parts[CARD] = [card(head, document["architectures"][0], parameters, document["torch_dtype"], lineage, reward_bias)]
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


def _stored_dtypes(
    weights: Mapping[str, torch.Tensor | LazyTensor], origin: Origin | None, dtype: StoredDtype | None
) -> dict[str, torch.dtype]:
    """What each tensor is stored as."""
    if dtype is not None:
        chosen = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
        for name, tensor in weights.items():
            if isinstance(tensor, LazyTensor):
                raise TypeError(f"{name} is made as it is written, as {tensor.dtype}: it cannot be checked to fit into {dtype}")
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if largest > torch.finfo(chosen).max:
                raise ValueError(f"{name} holds {largest:g}, too large for {dtype}: save the model as float32")
        return dict.fromkeys(weights, chosen)
    own = {name: tensor.dtype for name, tensor in weights.items()}
    if origin is None or not origin.dtypes:
        return own
    before = list(origin.dtypes.values())
    usual = max(set(before), key=before.count)  # of a tensor that is new, as a reward model's head
    wanted = {name: origin.dtypes.get(name, usual) for name in weights}
    for name, tensor in weights.items():
        if not _holds(wanted[name], tensor):
            _log.info("%s does not hold %s exactly, as it is now: all weights are saved as %s", usual, name, own[name])
            return own
    return wanted


def _holds(dtype: torch.dtype, tensor: torch.Tensor | LazyTensor) -> bool:
    """Whether a tensor of this dtype can have exactly these numbers."""
    if dtype == tensor.dtype or isinstance(tensor, LazyTensor):
        return dtype == tensor.dtype
    pieces = torch.split(tensor.reshape(-1), _COMPARED_AT_ONCE)
    return all(torch.equal(piece.to(dtype).to(piece.dtype), piece) for piece in pieces)


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
        if prefix + name == path.name and (_MODEL_FILE.fullmatch(name) or (prefix and name == CARD)):
            files.remove(path, disk)
