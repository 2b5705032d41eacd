"""What the model in a GGUF file is: its metadata as a `ModelConfig`, its tensors under Hugging Face's names.

llama.cpp's architectures llama (Llama, Mistral, SmolLM), qwen2, qwen3 and gpt2. The one thing that does not show:
llama.cpp rotates neighbouring features of a head where Hugging Face rotates its two halves, so for the architecture
llama its converter interleaves the rows of attn_q and attn_k. Read as they are, such a model still talks, only worse.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tutelage.config import ModelConfig
from tutelage.hub.gguf_file import DTYPES, GgufFile, TensorToWrite, Value
from tutelage.hub.hugging_face import WEIGHTS
from tutelage.safetensors_io import PIECE_BYTES

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")

_LARGEST_SIZE = 2**31 - 1
_ROPE_FACTORS = "rope_freqs.weight"
# Of {architecture}.*: what is read, and what changes nothing. Anything else might change what the model computes.
_KNOWN = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.layer_norm_epsilon",
        "attention.sliding_window",
        "attention.causal",
        "expert_count",
        "expert_used_count",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "vocab_size",
    }
)

# Of a ModelConfig: what the metadata and the tensors of a file tell. Anything else must be at its default.
_DESCRIBED = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
        "norm",
        "norm_eps",
        "position",
        "rope_theta",
        "rope_scaling",
        "mlp",
        "attention_bias",
        "attention_out_bias",
        "mlp_bias",
        "qk_norm",
        "sliding_window",
    }
)
_ROPE_FIELDS = {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


# --- tensors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A tensor under both names; `shape` is Hugging Face's. heads: its rows are interleaved within so many heads.
    transposed: llama.cpp has [out, in] where GPT-2's Conv1D is [in, out]."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    heads: int = 0
    transposed: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether the file's type applies to it: llama.cpp wants norms, biases and learned positions in float32."""
        return len(self.shape) == 2 and self.theirs != "position_embd.weight"

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Its shape in the GGUF file, in torch's order."""
        return self.shape[::-1] if self.transposed else self.shape

    def to_ours(self, tensor: torch.Tensor) -> torch.Tensor:
        """A whole tensor of the GGUF file in Hugging Face's layout."""
        if self.heads:
            return tensor.view(self.heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return tensor.T.contiguous() if self.transposed else tensor

    def to_theirs(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_ours`."""
        if self.heads:
            return tensor.view(self.heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return tensor.T.contiguous() if self.transposed else tensor

    def to_write(self, kind: str, load: Callable[[], torch.Tensor]) -> TensorToWrite:
        """This tensor for a file whose matrices are of `kind`; `load` gives it in Hugging Face's layout."""
        rows = max(PIECE_BYTES // (4 * self.their_shape[-1]), 1)
        return TensorToWrite(
            self.theirs,
            self.their_shape,
            kind if self.is_matrix else "F32",
            lambda: iter(torch.split(self.to_theirs(load()), rows if len(self.shape) > 1 else self.shape[0])),
        )


def places(config: ModelConfig, architecture: str) -> list[Place]:
    """All tensors of a model, in the order of its layers."""
    return _gpt2_places(config) if architecture == "gpt2" else _llama_places(config, architecture)


def _llama_places(config: ModelConfig, architecture: str) -> list[Place]:
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_width
    queries, keys = config.num_attention_heads, config.kv_heads
    out_bias = config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
    interleaved = architecture == "llama"
    found = [Place("model.embed_tokens.weight", "token_embd.weight", (config.vocab_size, hidden))]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        found.append(Place(ours + "input_layernorm.weight", theirs + "attn_norm.weight", (hidden,)))
        for our, their, out, width_in, bias, heads in (
            ("self_attn.q_proj", "attn_q", queries * width, hidden, config.attention_bias, queries * interleaved),
            ("self_attn.k_proj", "attn_k", keys * width, hidden, config.attention_bias, keys * interleaved),
            ("self_attn.v_proj", "attn_v", keys * width, hidden, config.attention_bias, 0),
            ("self_attn.o_proj", "attn_output", hidden, queries * width, out_bias, 0),
            ("mlp.gate_proj", "ffn_gate", inner, hidden, config.mlp_bias, 0),
            ("mlp.up_proj", "ffn_up", inner, hidden, config.mlp_bias, 0),
            ("mlp.down_proj", "ffn_down", hidden, inner, config.mlp_bias, 0),
        ):
            found.append(Place(f"{ours}{our}.weight", f"{theirs}{their}.weight", (out, width_in), heads))
            if bias:
                found.append(Place(f"{ours}{our}.bias", f"{theirs}{their}.bias", (out,), heads))
        if config.qk_norm:
            for part in "qk":
                found.append(Place(f"{ours}self_attn.{part}_norm.weight", f"{theirs}attn_{part}_norm.weight", (width,)))
        found.append(Place(ours + "post_attention_layernorm.weight", theirs + "ffn_norm.weight", (hidden,)))
    found.append(Place("model.norm.weight", "output_norm.weight", (hidden,)))
    if not config.tie_word_embeddings:
        found.append(Place("lm_head.weight", "output.weight", (config.vocab_size, hidden)))
    return found


def _gpt2_places(config: ModelConfig) -> list[Place]:
    hidden, inner = config.hidden_size, config.intermediate_size
    found = [
        Place("transformer.wte.weight", "token_embd.weight", (config.vocab_size, hidden)),
        Place("transformer.wpe.weight", "position_embd.weight", (config.max_position_embeddings, hidden)),
    ]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"transformer.h.{layer}.", f"blk.{layer}."
        for our, their, shape in (
            ("ln_1", "attn_norm", (hidden,)),
            ("attn.c_attn", "attn_qkv", (hidden, 3 * hidden)),
            ("attn.c_proj", "attn_output", (hidden, hidden)),
            ("ln_2", "ffn_norm", (hidden,)),
            ("mlp.c_fc", "ffn_up", (hidden, inner)),
            ("mlp.c_proj", "ffn_down", (inner, hidden)),
        ):
            found.append(Place(f"{ours}{our}.weight", f"{theirs}{their}.weight", shape, transposed=len(shape) == 2))
            found.append(Place(f"{ours}{our}.bias", f"{theirs}{their}.bias", shape[-1:]))
    found += [Place(f"transformer.ln_f.{kind}", f"output_norm.{kind}", (hidden,)) for kind in ("weight", "bias")]
    if not config.tie_word_embeddings:
        found.append(Place("lm_head.weight", "output.weight", (config.vocab_size, hidden)))
    return found


# --- in -----------------------------------------------------------------------------------------------------


def read_model(file: GgufFile) -> tuple[ModelConfig, list[Place]]:
    """What the file's model is, and where each of its tensors is. All names and shapes have been checked.

    Raises ValueError naming the file and the architecture, metadata value or tensor that does not fit.
    """
    fields = _Fields(file)
    architecture = fields.architecture
    fields.check_known()
    config = _read_gpt2(fields) if architecture == "gpt2" else _read_llama(fields)
    found = places(config, architecture)
    expected = {place.theirs: place.their_shape for place in found}
    for name, shape in expected.items():
        if name not in file.tensors:
            raise ValueError(f"{file.path} lacks the tensor {name}")
        if file.tensors[name].shape != shape:
            raise ValueError(
                f"{file.path}: the tensor {name} must have shape {list(shape)}, but it has {list(file.tensors[name].shape)}"
            )
    for name in file.tensors:
        if name not in expected and name != _ROPE_FACTORS:
            raise ValueError(f"{file.path} has the tensor {reprlib.repr(name)}, which the model of its metadata has not")
    return config, found


def exact_dtype(file: GgufFile) -> torch.dtype:
    """The smallest dtype that holds all of the file's numbers exactly: float16 or bfloat16 where its matrices are of that
    type and what else is stored (norms, biases: always float32) fits, else float32."""
    kinds = {tensor.type for tensor in file.tensors.values()} - {"F32"}
    if len(kinds) != 1 or not kinds < DTYPES.keys():
        return torch.float32
    dtype = DTYPES[kinds.pop()]
    for name, tensor in file.tensors.items():
        if tensor.type == "F32" and name != _ROPE_FACTORS:
            for piece in file.read(name):
                if not torch.equal(piece.to(dtype).float(), piece):
                    return torch.float32
    return dtype


def rows_of(file: GgufFile, place: Place, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor in Hugging Face's layout, its rows in order, a piece at a time, as `dtype`.

    Raises ValueError naming the tensor with a number that is not finite, or is not in `dtype`.
    """
    pieces = file.read(place.theirs)
    if place.heads or place.transposed:
        pieces = iter([place.to_ours(torch.cat(list(pieces)).view(place.their_shape))])
    for piece in pieces:
        cast = piece.to(dtype)
        if dtype == torch.float16 and not bool(torch.isfinite(cast).all()):
            raise ValueError(f"{file.path}: the tensor {place.theirs} holds numbers too large for float16; choose bfloat16")
        yield cast


class _Fields:
    """The metadata of one architecture; every error names the file and the value."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not _is_one_of(file.metadata.get("split.count", 1), (0, 1)):
            raise ValueError(
                f"{file.path} is one of {file.metadata['split.count']} parts of a model: "
                "join them with llama.cpp's `llama-gguf-split --merge` first"
            )
        if not _is_one_of(architecture, ARCHITECTURES):
            raise ValueError(
                f"{file.path} holds a model of the architecture {reprlib.repr(architecture)}, which tutelage does not run; "
                f"it converts {', '.join(ARCHITECTURES)}"
            )
        self.architecture: str = str(architecture)

    def check_known(self) -> None:
        """Raises for a value of the architecture that might change what the model computes."""
        prefix = self.architecture + "."
        for name, value in self.file.metadata.items():
            if name.startswith(prefix) and name.removeprefix(prefix) not in _KNOWN:
                raise ValueError(f"{self.file.path}: {name} = {reprlib.repr(value)} is not supported")
        if self.integer("expert_count", 0, least=0):
            raise self.error("expert_count", "must be 0: mixtures of experts are not supported")
        if not _is_one_of(self.get("attention.causal"), (None, True)):
            raise self.error("attention.causal", "must be true: models that look ahead are not supported")

    def get(self, name: str) -> Value | None:
        return self.file.metadata.get(f"{self.architecture}.{name}")

    def error(self, name: str, problem: str) -> ValueError:
        value = self.get(name)
        shown = "missing" if value is None else reprlib.repr(value)
        return ValueError(f"{self.file.path}: {self.architecture}.{name} {problem}, but it is {shown}")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value: Any = self.get(name)
        if isinstance(value, np.ndarray) and len(value) and bool((value == value[0]).all()):
            value = value[0].item()  # one number a layer
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= _LARGEST_SIZE:
            raise self.error(name, f"must be an integer from {least} to {_LARGEST_SIZE} (the same in every layer)")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value: Any = self.get(name)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < 1e30:  # NaN is not above 0
            raise self.error(name, "must be a positive number")
        return float(str(np.float32(value)))  # 1e-05, not the 9.99999974e-06 that float32 makes of it

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors


def _is_one_of(value: object, allowed: Sequence[object]) -> bool:
    """A list (a numpy array, which would be compared element by element) is none of them."""
    return not isinstance(value, np.ndarray) and value in allowed


def _build(fields: _Fields, **options: Any) -> ModelConfig:
    try:
        return ModelConfig(**options)
    except ValueError as error:  # it names the field, but knows no file
        raise ValueError(f"{fields.file.path}: {error}") from error


def _sizes(fields: _Fields) -> dict[str, Any]:
    """What all architectures have."""
    embedding = fields.file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{fields.file.path} lacks the tensor token_embd.weight of shape [vocabulary, width]")
    layers = fields.integer("block_count")
    if layers > len(fields.file.tensors):
        raise fields.error("block_count", f"does not fit the file's {len(fields.file.tensors)} tensors")
    if fields.integer("vocab_size", embedding.shape[0]) != embedding.shape[0]:
        raise fields.error("vocab_size", f"must be {embedding.shape[0]}, the rows of token_embd.weight")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": fields.integer("embedding_length"),
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": fields.integer("attention.head_count"),
        "max_position_embeddings": fields.integer("context_length"),
        "tie_word_embeddings": not fields.has("output.weight"),
    }


def _read_llama(fields: _Fields) -> ModelConfig:
    sizes = _sizes(fields)
    heads = sizes["num_attention_heads"]
    width = fields.integer("attention.key_length", sizes["hidden_size"] // heads)
    if fields.integer("attention.value_length", width) != width:
        raise fields.error("attention.value_length", f"must be {width}, as attention.key_length")
    if fields.integer("rope.dimension_count", width) != width:
        raise fields.error("rope.dimension_count", f"must be the whole head, {width}")
    window = fields.integer("attention.sliding_window", 0, least=0)
    if 0 < window < sizes["max_position_embeddings"]:
        raise fields.error("attention.sliding_window", f"must be 0: llama.cpp has none for {fields.architecture}")
    theta = fields.number("rope.freq_base", 1e4)
    bias = fields.has("blk.0.attn_q.bias")
    if fields.architecture == "qwen2" and not bias:
        raise ValueError(f"{fields.file.path} lacks the tensor blk.0.attn_q.bias")
    return _build(
        fields,
        **sizes,
        num_key_value_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=width,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_read_rope_scaling(fields, width, theta),
        attention_bias=bias,
        attention_out_bias=fields.has("blk.0.attn_output.bias"),
        mlp_bias=fields.has("blk.0.ffn_down.bias"),
        qk_norm=fields.architecture == "qwen3",
    )


def _read_gpt2(fields: _Fields) -> ModelConfig:
    return _build(
        fields,
        **_sizes(fields),
        norm="layernorm",
        norm_eps=fields.number("attention.layer_norm_epsilon"),
        position="learned",
        mlp="gelu",
        attention_bias=True,
        mlp_bias=True,
    )


def _read_rope_scaling(fields: _Fields, width: int, theta: float) -> dict[str, Any] | None:
    kind = fields.get("rope.scaling.type")
    if kind is None and fields.get("rope.scale_linear") is not None:  # files of 2023
        factor = fields.number("rope.scale_linear")
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    if fields.has(_ROPE_FACTORS):
        if not _is_one_of(kind, (None, "none")):
            raise fields.error("rope.scaling.type", f"must be none beside the tensor {_ROPE_FACTORS}")
        return _read_rope_factors(fields, width, theta)
    if _is_one_of(kind, (None, "none")):
        return None
    if not _is_one_of(kind, ("linear", "yarn")):
        raise fields.error("rope.scaling.type", "must be none, linear or yarn (other scalings are not supported)")
    if kind == "linear":
        return {"rope_type": "linear", "factor": fields.number("rope.scaling.factor")}
    return {
        "rope_type": "yarn",
        "factor": fields.number("rope.scaling.factor"),
        "original_max_position_embeddings": fields.integer("rope.scaling.original_context_length"),
    }


def _read_rope_factors(fields: _Fields, width: int, theta: float) -> dict[str, Any]:
    """Llama 3's scaling, which a GGUF file has only as what each frequency is divided by."""
    stored = fields.file.tensors[_ROPE_FACTORS]
    if stored.shape != (width // 2,) or stored.type != "F32":
        raise ValueError(f"{fields.file.path}: the tensor {_ROPE_FACTORS} must be F32 [{width // 2}]")
    factors = torch.cat(list(fields.file.read(_ROPE_FACTORS))).view(-1)
    scaling = {
        "rope_type": "llama3",
        "factor": float(str(np.float32(factors.max().item()))),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": fields.integer("rope.scaling.original_context_length", 8192),
    }
    if not torch.allclose(rope_factors(scaling, width, theta), factors, rtol=1e-4, atol=0):
        raise ValueError(
            f"{fields.file.path}: the tensor {_ROPE_FACTORS} is not that of Llama 3's scaling with low_freq_factor 1 and "
            f"high_freq_factor 4 from {scaling['original_max_position_embeddings']} positions: other scalings are not supported"
        )
    return scaling


def rope_factors(scaling: Mapping[str, Any], width: int, theta: float) -> torch.Tensor:
    """What Llama 3's scaling divides each frequency by: float32 [width / 2] (Grattafiori et al. 2024)."""
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors.float()


# --- out ----------------------------------------------------------------------------------------------------


def describe(config: ModelConfig, path: Path) -> tuple[str, dict[str, Value]]:
    """(architecture, its metadata) of a model for llama.cpp.

    Raises ValueError naming the option of `config` that llama.cpp has not; `path` is the folder it is told of.
    """
    architecture = _architecture(config, path)
    metadata: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "gpt2":
        metadata["attention.layer_norm_epsilon"] = float(config.norm_eps)
    else:
        metadata |= {
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.head_width,
            "attention.value_length": config.head_width,
            "attention.layer_norm_rms_epsilon": float(config.norm_eps),
            "rope.dimension_count": config.head_width,
            "rope.freq_base": float(config.rope_theta),
            **_describe_rope_scaling(config),
        }
    return architecture, {f"{architecture}.{name}": value for name, value in metadata.items()}


def stored_dtype(folder: Path) -> str:
    """What the weights of a folder are stored as: "float16" or "bfloat16" where all are, else "float32"."""
    paths = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("model-*.safetensors"))
    kinds = set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dict)
    return {"F16": "float16", "BF16": "bfloat16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def extra_tensors(config: ModelConfig) -> list[TensorToWrite]:
    """Tensors that only llama.cpp has: Llama 3's divisors of the frequencies."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return []
    factors = rope_factors(scaling, config.head_width, config.rope_theta)
    return [TensorToWrite(_ROPE_FACTORS, (len(factors),), "F32", lambda: iter([factors]))]


def _describe_rope_scaling(config: ModelConfig) -> dict[str, Value]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    if scaling["rope_type"] == "llama3":  # the rest is in the divisors
        original = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        return {"rope.scaling.original_context_length": round(original)}
    described: dict[str, Value] = {
        "rope.scaling.type": str(scaling["rope_type"]),
        "rope.scaling.factor": float(scaling["factor"]),
    }
    if scaling["rope_type"] == "yarn":
        described["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
    return described


def _architecture(config: ModelConfig, path: Path) -> str:
    out_bias = config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
    if config.position == "learned":
        architecture = "gpt2"
    elif config.qk_norm:
        architecture = "qwen3"
    else:
        architecture = "qwen2" if config.attention_bias and not out_bias else "llama"
    scaling = (config.rope_scaling or {}).get("rope_type")
    window = config.sliding_window
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _DESCRIBED and value != field.default:
            raise ValueError(f"{path}: a GGUF file has no place for {field.name} = {reprlib.repr(value)}")
    further = sorted(set(config.rope_scaling or {}) - _ROPE_FIELDS)
    if further:
        raise ValueError(f"{path}: a GGUF file has no place for rope_scaling's {', '.join(further)}")
    for name, value, wrong in (
        ("mlp", config.mlp, config.mlp != ("gelu" if architecture == "gpt2" else "swiglu")),
        ("norm", config.norm, config.norm != ("layernorm" if architecture == "gpt2" else "rmsnorm")),
        ("sliding_window", window, window is not None and window < config.max_position_embeddings),
        ("attention_bias", True, architecture == "qwen3" and config.attention_bias),
        ("attention_out_bias", True, architecture == "qwen3" and out_bias),
        ("mlp_bias", True, architecture in ("qwen2", "qwen3") and config.mlp_bias),
        ("rope_scaling", scaling, scaling == "llama3" and architecture != "llama"),
    ):
        if wrong:
            raise ValueError(f"{path}: llama.cpp's architecture {architecture} has no {name} = {value!r}")
    return architecture
