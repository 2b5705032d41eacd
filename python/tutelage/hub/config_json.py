"""config.json: what the model in a Hugging Face folder is, and how one of ours is described there.

Llama, Mistral, Qwen2, Qwen3, SmolLM3 and GPT-2 (SmolLM and SmolLM2 are Llamas), in the layouts of transformers 4 and
5. An option that changes what the model computes and that tutelage does not have is an error that names it; so is a
field that nobody here knows, unless it is switched off.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.config import Head, ModelConfig
from tutelage.hub.kinds import (
    ALIASES,
    BASIC,
    BY_LENGTH,
    CLASSES,
    DEFAULTS,
    DROPOUTS,
    GELUS,
    GENERATION,
    HARMLESS,
    HEADS,
    MISSING,
    NEUTRAL,
    READ,
    ROPE_FIELDS,
)

_log = logging.getLogger(__name__)

_JSON_BYTES = 16 << 20  # the index of a model of 100,000 tensors has 10 MB; parsed JSON takes many times its size
LARGEST_SIZE = 2**31 - 1  # token ids are int32
_MOST_LAYERS = 10_000  # of a pattern that is made up here: what a file may make us allocate


@dataclass(frozen=True)
class Described:
    """What a config.json says."""

    config: ModelConfig
    head: Head
    kept: Mapping[str, Any]
    """Fields that change nothing of what the model computes, and its model_type: for `describe`."""
    generation: Mapping[str, Any]
    """Settings of generation, which older files have here."""


def read_model(path: Path, document: Mapping[str, Any]) -> Described:
    """What the content of a config.json says. The head is "scalar" for …ForSequenceClassification with one label.

    Dropout probabilities are not used; one that is not 0 is logged.

    Args:
        path: of the file, for messages.

    Raises:
        ValueError: naming the file and the field that is missing, malformed, unknown or not supported; for a model of
            another kind, what of it is missing here.
    """
    fields = _Fields(path, document)
    kind = fields.text("model_type")
    if kind not in DEFAULTS:
        raise _other_kind(fields, kind)
    document = _without_aliases(kind, fields)
    fields = _Fields(fields.path, {**DEFAULTS[kind], **document})
    for name, allowed in NEUTRAL.items():
        if name in fields.values and fields.values[name] not in allowed:
            raise fields.error(name, f"is not supported (only {json.dumps(allowed[-1])})")
    for name, value in document.items():
        known = name in BASIC or name in READ[kind] or name in HARMLESS or name in GENERATION
        # == would take 0 for False
        off = value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
        if not (known or off or name in NEUTRAL or name in DROPOUTS or name.startswith("_")):
            raise fields.error(
                name,
                f"is no field of a {CLASSES[kind]} that is known here; remove it if nothing that is computed depends on it",
            )
    dropouts = [name for name in DROPOUTS if fields.values.get(name) not in (None, 0)]
    if dropouts:
        _log.warning("%s: %s not used, tutelage has no dropout", fields.path, ", ".join(dropouts))
    head = _read_head(kind, fields)
    kept = {name: value for name, value in document.items() if name in HARMLESS}
    if head == "scalar":
        kept |= {name: document[name] for name in ("id2label", "label2id") if document.get(name)}
    return Described(
        config=_read_gpt2(fields) if kind == "gpt2" else _read_llama(kind, fields),
        head=head,
        kept={"model_type": kind, **kept},
        generation={name: value for name, value in document.items() if name in GENERATION and value is not None},
    )


def _without_aliases(kind: str, fields: _Fields) -> dict[str, Any]:
    document, aliases = dict(fields.values), ALIASES.get(kind, {})
    for alias, name in aliases.items():
        value = document.pop(alias, None)
        if value is not None and document.setdefault(name, value) != value:
            raise fields.error(alias, f"is another name of {name}, which is {reprlib.repr(document[name])}")
    return document


def _other_kind(fields: _Fields, kind: str) -> ValueError:
    kinds = ", ".join(DEFAULTS)
    why = f"has {MISSING[kind]}" if kind in MISSING else "is not known here"
    return ValueError(f"{fields.path}: model_type is {kind!r}, which {why}; tutelage runs {kinds}")


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
    heads = {CLASSES[kind] + ending: head for ending, head in HEADS.items()}
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
        mlp_bias=kind in ("llama", "smollm3") and fields.flag("mlp_bias", False),
        qk_norm=kind == "qwen3",
        **_read_blocks(kind, fields, layers),
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
    shown = "rope_type" if "rope_type" in values else "type"
    if kind in BY_LENGTH:
        raise rope.error(
            shown,
            "must be default, linear, llama3 or yarn: other rotations for longer sequences would make a token's log-prob "
            "depend on the tokens behind it",
        )
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise rope.error(shown, "must be default, linear, llama3 or yarn (other scalings are not supported)")
    for field in values:
        if field not in ROPE_FIELDS:
            raise rope.error(field, "is not supported")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "is not supported (only 1.0)")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, {"rope_type": kind, "factor": rope.number("factor")}
    longest = fields.integer("max_position_embeddings")
    original = rope.integer("original_max_position_embeddings", longest)
    if kind == "yarn":
        scaling: dict[str, Any] = {"rope_type": kind, "factor": rope.number("factor", longest / original)}
        for field in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if values.get(field):  # transformers takes 0 for not given
                scaling[field] = rope.number(field)
        if not rope.flag("truncate", True):
            scaling["truncate"] = False
    else:
        scaling = {"rope_type": kind, "factor": rope.number("factor")}
        for field in ("low_freq_factor", "high_freq_factor"):
            scaling[field] = rope.number(field)
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise rope.error("low_freq_factor", f"must be below high_freq_factor = {scaling['high_freq_factor']}")
    return theta, {**scaling, "original_max_position_embeddings": original}


def _read_blocks(kind: str, fields: _Fields, layers: int) -> dict[str, Any]:
    """The window, and what differs between blocks; None where nothing does."""
    window, types, rotated = None, None, None
    if kind == "mistral":
        window = fields.optional_integer("sliding_window")
    elif kind != "llama":
        if kind == "smollm3":
            rotated = _read_rotated(fields, layers)
        if fields.flag("use_sliding_window", False):
            window = fields.optional_integer("sliding_window")
        if window is not None:
            types = _read_layer_types(kind, fields, layers, rotated)
            if "sliding_attention" not in types:
                window = None
    return {
        "sliding_window": window,
        "layer_types": types if types is not None and len(set(types)) > 1 else None,
        "no_rope_layers": None if rotated is None or all(rotated) else rotated,
    }


def _read_rotated(fields: _Fields, layers: int) -> list[int]:
    given = fields.values.get("no_rope_layers")
    if given is None:
        interval = fields.integer("no_rope_layer_interval")
        return [int((index + 1) % interval != 0) for index in range(_few(fields, layers))]
    if not isinstance(given, list) or len(given) < layers or any(entry not in (0, 1) for entry in given):
        raise fields.error("no_rope_layers", f"must say 1 (RoPE) or 0 for each of the {layers} layers")
    return [int(entry) for entry in given[:layers]]


def _read_layer_types(kind: str, fields: _Fields, layers: int, rotated: list[int] | None) -> list[str]:
    types = fields.values.get("layer_types")
    if types is None:
        if rotated is not None:
            return ["full_attention" if rotates else "sliding_attention" for rotates in rotated]
        full = fields.integer("max_window_layers", least=0)
        return ["full_attention" if index < full else "sliding_attention" for index in range(_few(fields, layers))]
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(entry not in ("full_attention", "sliding_attention") for entry in types)
    ):
        raise fields.error("layer_types", f"must name sliding_attention or full_attention for each of the {layers} layers")
    return types


def _few(fields: _Fields, layers: int) -> int:
    if layers > _MOST_LAYERS:
        raise fields.error("num_hidden_layers", f"must be at most {_MOST_LAYERS} where blocks differ")
    return layers


def _read_gpt2(fields: _Fields) -> ModelConfig:
    activation = fields.text("activation_function")
    if activation not in GELUS:
        raise fields.error("activation_function", f"must be one of {', '.join(GELUS)}")
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
        mlp=GELUS[activation],
        attention_bias=True,
        mlp_bias=True,
    )


def count_weights(config: ModelConfig) -> int:
    """Entries of all matrices but the head's."""
    attention = 2 * config.head_width * (config.num_attention_heads + config.kv_heads)
    mlp = (3 if config.mlp == "swiglu" else 2) * config.intermediate_size
    rows = config.vocab_size + (config.max_position_embeddings if config.position == "learned" else 0)
    return config.hidden_size * (rows + config.num_hidden_layers * (attention + mlp))


def describe(config: ModelConfig, head: Head, kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json, in the layout of transformers 4, which 5 reads too.

    Args:
        kept: of the folder that the model came from, see `Described`. Its model_type stays where such a model can be
            what `config` says.

    Raises:
        ValueError: transformers has no class for such a model.
    """
    kept = dict(kept or {})
    kind = _model_type(config, kept.pop("model_type", None))
    ending = "ForSequenceClassification" if head == "scalar" else "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    document: dict[str, Any] = {
        **kept,
        "architectures": [CLASSES[kind] + ending],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if head == "scalar":
        document = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, **document}
    else:
        document = {name: value for name, value in document.items() if name not in ("id2label", "label2id")}
    if kind == "gpt2":
        return document | {
            "n_positions": config.max_position_embeddings,
            "n_embd": config.hidden_size,
            "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads,
            "n_inner": config.intermediate_size,
            "activation_function": {"gelu": "gelu_new", "gelu_erf": "gelu"}[config.mlp],
            "layer_norm_epsilon": config.norm_eps,
            **{name: 0.0 for name in DROPOUTS if name.endswith("_pdrop")},
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
    if kind in ("llama", "qwen3", "smollm3"):
        document["attention_bias"] = config.attention_bias
    if kind in ("llama", "smollm3"):
        document["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        document["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3", "smollm3"):
        document |= _describe_blocks(kind, config)
    return document


def _describe_blocks(kind: str, config: ModelConfig) -> dict[str, Any]:
    window, layers = config.sliding_window, config.num_hidden_layers
    blocks: dict[str, Any] = {"sliding_window": window, "use_sliding_window": window is not None, "max_window_layers": 0}
    types: Sequence[str] | None = config.layer_types
    if types is None and kind == "smollm3" and window is not None:
        types = ("sliding_attention",) * layers
    if types is not None:  # files of transformers before 4.54 have the first full blocks only
        blocks |= {"layer_types": list(types), "max_window_layers": (*types, "sliding_attention").index("sliding_attention")}
    if kind == "smollm3":
        blocks["no_rope_layers"] = list(config.no_rope_layers or (1,) * layers)
    return blocks


def _model_type(config: ModelConfig, wanted: object) -> str:
    """The architecture of transformers that computes what `config` says: `wanted` if it does."""
    if config.position == "learned":
        return "gpt2"
    if config.norm != "rmsnorm" or config.mlp != "swiglu":
        raise _no_class(f"rotary positions with norm={config.norm!r} and mlp={config.mlp!r}")
    out_bias = config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
    if out_bias and not config.attention_bias:
        raise _no_class("attention_out_bias without attention_bias")
    kinds = [kind for kind in CLASSES if kind != "gpt2"]
    able = [kind for kind in kinds if _lacks(kind, config, out_bias) is None]
    if wanted in able:
        return str(wanted)
    if able:
        return able[0]
    nearest = "qwen3" if config.qk_norm else "smollm3" if out_bias == config.attention_bias else "qwen2"
    raise _no_class(f"{_lacks(nearest, config, out_bias)} in a {CLASSES[nearest]} (which its other options make it)")


def _lacks(kind: str, config: ModelConfig, out_bias: bool) -> str | None:
    """The first of the model's options that transformers' class does not have."""
    for name, present, lacking in (
        ("qk_norm", config.qk_norm, kind != "qwen3"),
        ("no qk_norm", not config.qk_norm, kind == "qwen3"),
        ("attention_bias", config.attention_bias, kind == "mistral"),
        ("no attention_bias", not config.attention_bias, kind == "qwen2"),
        ("attention_out_bias", out_bias, kind == "qwen2"),
        ("attention_bias without attention_out_bias", config.attention_bias and not out_bias, kind != "qwen2"),
        ("mlp_bias", config.mlp_bias, kind not in ("llama", "smollm3")),
        ("sliding_window", config.sliding_window is not None, kind == "llama"),
        ("layer_types", config.layer_types is not None, kind in ("llama", "mistral")),
        ("no_rope_layers", config.no_rope_layers is not None, kind != "smollm3"),
        # transformers 5 accepts heads x head_dim other than hidden_size in a Llama only if the heads divide it
        ("a head_dim of its own", bool(config.hidden_size % config.num_attention_heads), kind == "llama"),
    ):
        if present and lacking:
            return name
    return None


def _no_class(what: str) -> ValueError:
    return ValueError(f"no transformers class has {what}: save the model as a tutelage checkpoint instead")
