"""config.json: what the model in a Hugging Face folder is, and how one of ours is described there.

Llama, Mistral, Qwen2, Qwen3 and GPT-2 (SmolLM is a Llama), in the layouts of transformers 4 and 5. An option that
changes what the model computes and that tutelage does not have is an error that names it.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tutelage.config import Head, ModelConfig

_log = logging.getLogger(__name__)

_JSON_BYTES = 16 << 20  # the index of a model of 100,000 tensors has 10 MB; parsed JSON takes many times its size
LARGEST_SIZE = 2**31 - 1  # token ids are int32


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


def read_model(path: Path, document: Mapping[str, Any]) -> tuple[ModelConfig, Head]:
    """What the content of a config.json describes, and its head: "scalar" for …ForSequenceClassification with one label.

    Dropout probabilities are not used; one that is not 0 is logged.

    Args:
        path: of the file, for messages.

    Raises:
        ValueError: naming the file and the field that is missing, malformed or not supported.
    """
    fields = _Fields(path, document)
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
    return (_read_gpt2(fields) if kind == "gpt2" else _read_llama(kind, fields)), head


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file that is missing, too large or holds something else."""
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
        if type(value) is not int or not least <= value <= LARGEST_SIZE:
            raise self.error(name, f"must be an integer from {least} to {LARGEST_SIZE}")
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


def count_weights(config: ModelConfig) -> int:
    """Entries of all matrices but the head's."""
    attention = 2 * config.head_width * (config.num_attention_heads + config.kv_heads)
    mlp = (3 if config.mlp == "swiglu" else 2) * config.intermediate_size
    rows = config.vocab_size + (config.max_position_embeddings if config.position == "learned" else 0)
    return config.hidden_size * (rows + config.num_hidden_layers * (attention + mlp))


def describe(config: ModelConfig, head: Head) -> dict[str, Any]:
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
