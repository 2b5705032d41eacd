"""Adapters in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors.

What PEFT has and tutelage has not (DoRA, ranks and scales of single layers, biases, …) is an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage import files
from tutelage.config import Head
from tutelage.files import DISK, Buffer, Disk
from tutelage.hub.config_json import read_json
from tutelage.hub.hugging_face import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GENERATION_CONFIG,
    REWARD_BIAS,
    Origin,
    Stage,
    generation_config,
    replace_files,
)
from tutelage.hub.model_card import CARD, Lineage, adapter_card, adapter_lineage, may_replace
from tutelage.hub.weights import check_tensor, open_weights
from tutelage.lora import LoraConfig
from tutelage.safetensors_io import safetensors_chunks

_log = logging.getLogger(__name__)

_PREFIX = "base_model.model."
_TASKS: Mapping[str, Head] = {"CAUSAL_LM": "lm", "SEQ_CLS": "scalar"}
_SCORE = "score.weight"
# Fields that do not change what a finished adapter computes; init_lora_weights is looked at on its own.
_READ = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora", "bias")
_IRRELEVANT = (
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "lora_dropout",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "modules_to_save",
    "init_lora_weights",
    "ensure_weight_tying",
)
# Initialisations that leave the base as it is. Others ("pissa", "olora", …) put a part of it into the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")


@dataclass(frozen=True)
class AdapterFolder:
    """What the folder of an adapter says."""

    lora: LoraConfig
    head: Head
    reward_bias: float
    """As a reward model's, see `hugging_face.read_reward_bias`; kept in the metadata of the weights' file."""


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds an adapter and no model of its own."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (Path(folder) / CONFIG).is_file()


def base_folder(folder: str | Path) -> Path:
    """The folder of the model under an adapter, as adapter_config.json names it: from here, or from the adapter's folder.

    Raises:
        ValueError: it names none that is there.
    """
    path = Path(folder) / ADAPTER_CONFIG
    name = read_json(path).get("base_model_name_or_path")
    places = [place for place in (Path(name), Path(folder) / name) if place.is_dir()] if isinstance(name, str) and name else []
    if not places:
        raise ValueError(
            f"{path}: base_model_name_or_path is {reprlib.repr(name)}, which is no folder here (tutelage downloads nothing): "
            "write the base's folder there, or load it yourself and use Model.load_adapter(base, folder)"
        )
    return places[0]


def read_config(folder: str | Path) -> AdapterFolder:
    """What the adapter in a folder is.

    Raises:
        ValueError: naming the file and the field that is missing, malformed or not supported.
    """
    path = Path(folder) / ADAPTER_CONFIG
    values = read_json(path)

    def wrong(name: str, problem: str) -> ValueError:
        return ValueError(f"{path}: {name} {problem}, but it is {json.dumps(values.get(name))}")

    if values.get("peft_type") != "LORA":
        raise wrong("peft_type", 'must be "LORA"')
    for name, value in values.items():
        if name not in (*_READ, *_IRRELEVANT) and value not in (None, False, {}, []):
            raise wrong(name, "is not supported")
    if values.get("lora_dropout") not in (None, 0):
        _log.warning("%s: lora_dropout not used, tutelage has no dropout", path)
    if values.get("bias", "none") != "none":
        raise wrong("bias", 'is not supported (only "none")')
    if values.get("init_lora_weights") not in _PLAIN_STARTS:
        raise wrong("init_lora_weights", "is not supported: such an adapter belongs to a changed base")
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    targets: Any = values.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= 2**20:
        raise wrong("r", "must be a positive integer")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise wrong("lora_alpha", "must be a positive number")
    if targets == "all-linear":
        targets = []
    elif not isinstance(targets, list) or not targets or not all(isinstance(target, str) and target for target in targets):
        raise wrong("target_modules", 'must be a list of names, or "all-linear"')
    rslora = values.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise wrong("use_rslora", "must be true or false")
    with open_weights(_weights(folder)) as file:
        has_score, metadata = _PREFIX + _SCORE in file.keys(), file.metadata() or {}  # noqa: SIM118 (no dict)
        for stored in file.keys():  # noqa: SIM118
            shape = file.get_slice(stored).get_shape()
            if stored.endswith(".lora_A.weight") and shape[:1] != [rank]:  # or a wrong r would allocate what it likes
                raise wrong("r", f"must be the rank of the tensors ({stored} has shape {shape})")
    task: Any = values.get("task_type")
    if task not in (*_TASKS, None):
        raise wrong("task_type", f"must be one of {', '.join(_TASKS)}")
    head = _TASKS.get(task) or ("scalar" if has_score else "lm")
    saved = values.get("modules_to_save") or []
    if saved and (head == "lm" or not set(saved) <= {"score", "classifier"}):
        raise wrong("modules_to_save", "is not supported (only a reward model's score)")
    return AdapterFolder(LoraConfig(rank, float(alpha), tuple(targets), rslora), head, _bias(_weights(folder), metadata))


def _weights(folder: str | Path) -> Path:
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which can run any code)" if path.with_suffix(".bin").exists() else ""
        raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}: get the adapter's safetensors file{pickled}")
    return path


def _bias(path: Path, metadata: Mapping[str, str]) -> float:
    text = metadata.get(REWARD_BIAS, "0")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: {REWARD_BIAS} must be a finite number, but it is {reprlib.repr(text)}")
    return value


def read_origin(folder: str | Path, base: Origin | None) -> Origin:
    """That of the model under an adapter, with what the adapter's card says of both."""
    known = base or Origin({}, {}, {}, Lineage())
    return dataclasses.replace(known, lineage=adapter_lineage(Path(folder), known.lineage))


def read_tensors(folder: str | Path, expected: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an adapter, each once, as float32 on the CPU; a head that is not expected is passed over.

    Raises:
        ValueError: naming the file and the tensor that is missing, unexpected, of another shape or not of floating point.
    """
    path = _weights(folder)
    with open_weights(path) as file:
        stored = {name.removeprefix(_PREFIX): name for name in file.keys()}  # noqa: SIM118
        unexpected = [name for name in stored if name not in expected and name != _SCORE]
        missing = [name for name in expected if name not in stored]
        for what, names in (
            ("lacks", missing),
            ("has, but an adapter of this model and adapter_config.json has not,", unexpected),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise ValueError(f"{path} {what} the tensors {', '.join(names[:5])}{more}")
        for name, shape in expected.items():
            check_tensor(path, stored[name], file.get_slice(stored[name]), shape)
        for name in expected:
            yield name, file.get_tensor(stored[name]).to(torch.float32)


def write_adapter(
    folder: str | Path,
    lora: LoraConfig,
    head: Head,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    base_folder: str | None,
    base_parameters: int,
    fan_in_fan_out: bool,
    origin: Origin | None = None,
    base_origin: Origin | None = None,
    stage: Stage | None = None,
    eos_token_ids: Sequence[int] = (),
    bos_token_id: int | None = None,
    reward_bias: float = 0.0,
    disk: Disk = DISK,
) -> None:
    """Writes an adapter so that PEFT, `read_config` and `read_tensors` load it; as whole as `hugging_face.write_folder`, a
    model card too.

    Args:
        tensors: (name, tensor), under the names that the model's parameters have.
        base_folder: where the model under it is, and base_parameters how many it has. fan_in_fan_out: whether its matrices are
            [in, out] (GPT-2's Conv1D).
        origin: of the adapter, and base_origin of the model under it. stage: what was done to the adapter since.
    """
    weights = dict(tensors)
    alpha: int | float = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    document: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": next(task for task, own in _TASKS.items() if own == head),
        "base_model_name_or_path": base_folder,
        "r": lora.rank,
        "lora_alpha": alpha,
        "target_modules": list(lora.target_modules),
        "use_rslora": lora.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": ["score"] if head == "scalar" else None,
    }
    metadata = {REWARD_BIAS: repr(reward_bias)} if reward_bias else None
    parts: dict[str, Iterable[Buffer]] = {
        ADAPTER_WEIGHTS: safetensors_chunks({_PREFIX + name: tensor for name, tensor in weights.items()}, metadata)
    }
    if eos_token_ids and head == "lm":
        parts[GENERATION_CONFIG] = [generation_config(eos_token_ids, bos_token_id)]
    if may_replace(Path(folder) / CARD):
        base = Lineage() if base_origin is None else base_origin.lineage
        lineage = (base if origin is None else origin.lineage).then(stage)
        parameters = sum(tensor.numel() for tensor in weights.values())
        parts[CARD] = [adapter_card(head, lora, parameters, base_parameters, lineage, base, reward_bias)]
    parts[ADAPTER_CONFIG] = [json.dumps(document, indent=2).encode() + b"\n"]
    files.make_folder(Path(folder), disk)
    replace_files(Path(folder), parts, disk)
