"""Hugging Face folders, in and out: config.json, and the weights as one or several safetensors files.

Llama, Mistral, Qwen2, Qwen3 and GPT-2 (SmolLM is a Llama), in the layouts of transformers 4 and 5. Nothing is
downloaded and nothing unpickled. An option that changes what the model computes and that tutelage does not
have is an error that names it.
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from tutelage import files
from tutelage.config import Head, ModelConfig
from tutelage.files import DISK, Buffer, Disk
from tutelage.safetensors_io import safetensors_chunks

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
REWARD_BIAS = "reward_bias"

_log = logging.getLogger(__name__)

_MODEL_FILE = re.compile(
    r"(generation_)?config\.json|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json"
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_JSON_BYTES = 16 << 20  # the index of a model of 100,000 tensors has 10 MB; parsed JSON takes many times its size
_LARGEST_SIZE = 2**31 - 1  # token ids are int32
_LARGEST_BIAS = 1e30  # values are float32
_SMALLEST_ELEMENT = 2  # bytes, of float16 and bfloat16
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

# What transformers' class assumes where config.json says nothing.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "gpt2": {"n_positions": 1024, "activation_function": "gelu_new", "tie_word_embeddings": True},
}
# Options that would change what the model computes, with the values that leave it as it is.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "original_max_position_embeddings": (None,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
_ROPE_FIELDS = (
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
_GELUS: Mapping[str, Literal["gelu", "gelu_erf"]] = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_erf",
}
_HEADS: Mapping[str, Head] = {
    "ForCausalLM": "lm",
    "LMHeadModel": "lm",
    "ForSequenceClassification": "scalar",
    "Model": "lm",  # the backbone alone: enough where the head is tied
}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT2"}
_PREFIXES = ("model.", "transformer.")
_HEAD_TENSORS = ("lm_head.weight", "score.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


# --- config.json --------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> tuple[ModelConfig, Head]:
    """What the model in a folder is, and its head: "scalar" for …ForSequenceClassification with one label.

    The weight files must be there too: a config.json that describes more weights than they can hold is
    refused, so that damaged or hostile sizes allocate nothing. Dropout probabilities are not used; one that
    is not 0 is logged.

    Raises:
        ValueError: naming the file and the field that is missing, malformed or not supported.
    """
    folder = Path(folder)
    weight_bytes = sum(path.stat().st_size for path in _weight_files(folder))
    fields = _Fields(folder / CONFIG, _read_json(folder / CONFIG))
    kind = fields.text("model_type")
    if kind not in _DEFAULTS:
        raise fields.error("model_type", f"must be one of {', '.join(_DEFAULTS)}")
    fields = _Fields(fields.path, {**_DEFAULTS[kind], **fields.values})
    for name, allowed in _NEUTRAL.items():
        if name in fields.values and fields.values[name] not in allowed:
            raise fields.error(name, f"is not supported (only {json.dumps(allowed[-1])})")
    dropouts = [name for name in _DROPOUTS if fields.values.get(name) not in (None, 0)]
    if dropouts:
        _log.warning("%s: %s not used, tutelage has no dropout", fields.path, ", ".join(dropouts))
    head = _read_head(kind, fields)
    config = _read_gpt2(fields) if kind == "gpt2" else _read_llama(kind, fields)
    if _count_weights(config) * _SMALLEST_ELEMENT > weight_bytes:
        raise ValueError(
            f"{fields.path} describes {_count_weights(config):,} weights, more than fit into the "
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
        value = _read_json(path).get("eos_token_id") if path.exists() else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(type(number) is not int or not 0 <= number <= _LARGEST_SIZE for number in ids):
            raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, but it is {reprlib.repr(value)}")
        return tuple(ids)
    return ()


def read_reward_bias(folder: str | Path) -> float:
    """What config.json says is to be subtracted from every value (its field reward_bias); 0 where it says nothing.

    Raises:
        ValueError: naming the file whose reward_bias is no finite number.
    """
    path = Path(folder) / CONFIG
    value = _read_json(path).get(REWARD_BIAS)
    if value is None:
        return 0.0
    if type(value) not in (int, float) or not -_LARGEST_BIAS < value < _LARGEST_BIAS:  # NaN is not above anything
        raise ValueError(f"{path}: {REWARD_BIAS} must be a finite number, but it is {reprlib.repr(value)}")
    return float(value)


@dataclass(frozen=True)
class _Fields:
    """A JSON object of a file; every error names the file and the field. null is as good as absent."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def error(self, name: str, problem: str) -> ValueError:
        value = reprlib.repr(self.values[name]) if name in self.values else "missing"
        return ValueError(f"{self.path}: {self.prefix}{name} {problem}, but it is {value}")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= _LARGEST_SIZE:
            raise self.error(name, f"must be an integer from {least} to {_LARGEST_SIZE}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.values.get(name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        value: Any = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < 1e30:  # NaN is not above 0
            raise self.error(name, "must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, "must be a string")
        return value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: it is not the folder of a Hugging Face model")
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a {path.name} has at most {_JSON_BYTES:,}")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a JSON object")
    return document


def _read_head(kind: str, fields: _Fields) -> Head:
    architectures = fields.values.get("architectures")
    if architectures is None:
        return "lm"
    heads = {_CLASSES[kind] + ending: head for ending, head in _HEADS.items()}
    if not isinstance(architectures, list) or len(architectures) != 1 or str(architectures[0]) not in heads:
        raise fields.error("architectures", f"must be a list of one of {', '.join(heads)}")
    head = heads[str(architectures[0])]
    if head == "scalar" and _count_labels(fields) != 1:
        raise ValueError(
            f"{fields.path}: the classifier has {_count_labels(fields)} labels (id2label), "
            "but a scalar head is a classifier with one"
        )
    return head


def _build(fields: _Fields, **options: Any) -> ModelConfig:
    try:
        return ModelConfig(**options)
    except ValueError as error:  # it names the field, but knows no file
        raise ValueError(f"{fields.path}: {error}") from error


def _count_labels(fields: _Fields) -> int:
    labels = fields.values.get("id2label")
    if labels is None:
        return fields.integer("num_labels", 2)
    if not isinstance(labels, dict):
        raise fields.error("id2label", "must be an object")
    return len(labels)


def _read_llama(kind: str, fields: _Fields) -> ModelConfig:
    """Llama, and its relatives with other options."""
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "must be 'silu'")
    heads = fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    bias = kind == "qwen2" or (kind != "mistral" and fields.flag("attention_bias", False))
    rope_theta, rope_scaling = _read_rope(fields)
    return _build(
        fields,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.optional_integer("head_dim"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention_bias=bias,
        attention_out_bias=bias and kind != "qwen2",
        mlp_bias=kind == "llama" and fields.flag("mlp_bias", False),
        qk_norm=kind == "qwen3",
        sliding_window=_read_sliding_window(kind, fields, layers),
    )


def _read_rope(fields: _Fields) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling). transformers 4: rope_theta and rope_scaling; 5: both in rope_parameters."""
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(name) or {}
    if not isinstance(values, dict):
        raise fields.error(name, "must be an object")
    rope = _Fields(fields.path, values, name + ".")
    theta = (rope if "rope_theta" in values else fields).number("rope_theta", 1e4)
    kind = rope.text("rope_type", values.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        shown = "rope_type" if "rope_type" in values else "type"
        raise rope.error(shown, "must be default, linear or llama3 (other scalings are not supported)")
    for field in values:
        if field not in _ROPE_FIELDS:
            raise rope.error(field, "is not supported")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "is not supported (only 1.0)")
    if kind == "default":
        return theta, None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": rope.number("factor")}
    if kind == "llama3":
        for field in ("low_freq_factor", "high_freq_factor"):
            scaling[field] = rope.number(field)
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise rope.error("low_freq_factor", f"must be below high_freq_factor = {scaling['high_freq_factor']}")
        field = "original_max_position_embeddings"
        scaling[field] = rope.integer(field)
    return theta, scaling


def _read_sliding_window(kind: str, fields: _Fields, layers: int) -> int | None:
    if kind == "llama":
        return None
    window = fields.optional_integer("sliding_window")
    if kind == "mistral":
        return window
    if not fields.flag("use_sliding_window", False) or window is None:
        return None
    types = fields.values.get("layer_types")
    if types is None:
        sliding = max(0, layers - fields.integer("max_window_layers", least=0))
    elif (
        isinstance(types, list)
        and len(types) == layers
        and set(map(str, types))
        <= {
            "sliding_attention",
            "full_attention",
        }
    ):
        sliding = types.count("sliding_attention")
    else:
        raise fields.error("layer_types", "must name sliding_attention or full_attention for every layer")
    if 0 < sliding < layers:
        raise fields.error(
            "sliding_window",
            f"holds for {sliding} of {layers} layers (max_window_layers, layer_types), which is not "
            "supported: set use_sliding_window to false to attend to all tokens in all layers",
        )
    return window if sliding else None


def _read_gpt2(fields: _Fields) -> ModelConfig:
    activation = fields.text("activation_function")
    if activation not in _GELUS:
        raise fields.error("activation_function", f"must be one of {', '.join(_GELUS)}")
    hidden_size = fields.integer("n_embd")
    return _build(
        fields,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("n_inner", 4 * hidden_size),
        num_hidden_layers=fields.integer("n_layer"),
        num_attention_heads=fields.integer("n_head"),
        max_position_embeddings=fields.integer("n_positions"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        position="learned",
        mlp=_GELUS[activation],
        attention_bias=True,
        mlp_bias=True,
    )


def _count_weights(config: ModelConfig) -> int:
    """Entries of all matrices but the head's."""
    attention = 2 * config.head_width * (config.num_attention_heads + config.kv_heads)
    mlp = (3 if config.mlp == "swiglu" else 2) * config.intermediate_size
    rows = config.vocab_size + (config.max_position_embeddings if config.position == "learned" else 0)
    return config.hidden_size * (rows + config.num_hidden_layers * (attention + mlp))


# --- weights in ---------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """Where a tensor is: the file, and its name in there."""

    path: Path
    stored: str


def read_tensors(
    folder: str | Path, expected: Mapping[str, Sequence[int]], *, tied: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder, each once, as float32 on the CPU, one in memory at a time.

    All names and shapes are checked before the first tensor is read. Names may lack their prefix ("model.",
    "transformer."); buffers that are no parameters are passed over, and so is a head that is not expected.

    Args:
        expected: name -> shape of every tensor that must be there.
        tied: the model's head is its embedding: an lm_head.weight of its own is an error unless it is equal.

    Raises:
        ValueError: naming the file and the tensor that is missing, unexpected, stored twice, of another
            shape or not of floating point; a folder that holds only pickled weights.
    """
    folder = Path(folder)
    found: dict[str, _Source] = {}
    for path in _weight_files(folder):
        with _open(path) as file:
            for stored in file.keys():  # noqa: SIM118 (no dict, and not iterable in older releases)
                name = _parameter_name(stored, expected)
                if name in found:
                    raise ValueError(f"{path}: {stored} is in {found[name].path.name} too, as {found[name].stored}")
                if name is not None:
                    found[name] = _Source(path, stored)
                    _check_tensor(path, stored, file.get_slice(stored), expected.get(name))
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
        with _open(path) as file:
            for name, source in group:
                yield name, file.get_tensor(source.stored).to(torch.float32)


def _weight_files(folder: Path) -> list[Path]:
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
    weight_map = _read_json(path).get("weight_map")
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


def _open(path: Path) -> Any:
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


def _check_tensor(path: Path, stored: str, view: Any, shape: Sequence[int] | None) -> None:
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
    with _open(source.path) as file:
        tensor: torch.Tensor = file.get_tensor(source.stored)
        return tensor


# --- a folder out -------------------------------------------------------------------------------------------


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
    special_ids = {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_ids[0] if len(eos_token_ids) == 1 else list(eos_token_ids) or None,
    }
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    document = {**_describe(config, head), **special_ids, "pad_token_id": None, "torch_dtype": dtype}
    if reward_bias:
        document[REWARD_BIAS] = reward_bias
    parts = _weight_parts(weights, max_shard_bytes)
    if eos_token_ids and head == "lm":
        parts[GENERATION_CONFIG] = [_json(special_ids)]
    parts[CONFIG] = [_json(document)]
    files.make_folder(folder, disk)
    _replace_files(folder, parts, disk)


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode() + b"\n"


def _describe(config: ModelConfig, head: Head) -> dict[str, Any]:
    """config.json, in the layout of transformers 4, which 5 reads too."""
    kind = _model_type(config)
    ending = "ForSequenceClassification" if head == "scalar" else "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    document: dict[str, Any] = {
        "architectures": [_CLASSES[kind] + ending],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if head == "scalar":
        document |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if kind == "gpt2":
        return document | {
            "n_positions": config.max_position_embeddings,
            "n_embd": config.hidden_size,
            "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads,
            "n_inner": config.intermediate_size,
            "activation_function": {"gelu": "gelu_new", "gelu_erf": "gelu"}[config.mlp],
            "layer_norm_epsilon": config.norm_eps,
            **{name: 0.0 for name in _DROPOUTS if name.endswith("_pdrop")},
        }
    document |= {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
    }
    if kind in ("llama", "qwen3"):
        document["attention_bias"] = config.attention_bias
    if kind == "llama":
        document["mlp_bias"] = config.mlp_bias
    else:
        document["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3"):
        document |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return document


def _model_type(config: ModelConfig) -> str:
    """The architecture of transformers that computes what `config` says."""
    if config.position == "learned":
        return "gpt2"
    if config.norm != "rmsnorm" or config.mlp != "swiglu":
        raise _no_class(f"rotary positions with norm={config.norm!r} and mlp={config.mlp!r}")
    out_bias = config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
    if out_bias and not config.attention_bias:
        raise _no_class("attention_out_bias without attention_bias")
    if config.qk_norm:
        kind = "qwen3"
    elif config.attention_bias and not out_bias:
        kind = "qwen2"
    # transformers 5 accepts heads x head_dim other than hidden_size in a Llama only if the heads divide it
    elif config.sliding_window is not None or config.hidden_size % config.num_attention_heads:
        kind = "mistral"
    else:
        return "llama"
    for name, wrong in (
        ("mlp_bias", config.mlp_bias),
        ("attention_bias", kind == "mistral" and config.attention_bias),
        (
            "attention_bias without attention_out_bias",
            kind == "qwen3" and config.attention_bias and not out_bias,
        ),
    ):
        if wrong:
            raise _no_class(f"{name} in a {_CLASSES[kind]} (which its other options make it)")
    return kind


def _no_class(what: str) -> ValueError:
    return ValueError(f"no transformers class has {what}: save the model as a tutelage checkpoint instead")


def _weight_parts(weights: Mapping[str, torch.Tensor], max_shard_bytes: int) -> dict[str, Iterable[Buffer]]:
    """File name -> content: model.safetensors, or shards and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in weights.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        return {WEIGHTS: safetensors_chunks(weights)}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    parts: dict[str, Iterable[Buffer]] = {file: safetensors_chunks(shard) for file, shard in zip(names, shards, strict=True)}
    return {**parts, INDEX: [_json(index)]}


def _replace_files(folder: Path, parts: Mapping[str, Iterable[Buffer]], disk: Disk) -> None:
    """Writes `parts`, whose last is config.json, in place of the model that `folder` may hold."""
    _remove_model(folder, files.TEMPORARY, disk)  # leftovers of an interrupted write
    try:
        for name, chunks in parts.items():
            files.write_file(folder / (files.TEMPORARY + name), chunks, disk)
    except BaseException:  # the old model is untouched; a full disk gets its space back
        with suppress(files.FileError):
            _remove_model(folder, files.TEMPORARY, disk)
        raise
    files.remove(folder / CONFIG, disk)
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
