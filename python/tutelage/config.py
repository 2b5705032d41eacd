"""What a model is: the options that cover Llama, Mistral, Qwen2, Qwen3, SmolLM, SmolLM3 and GPT-2."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Head = Literal["lm", "scalar"]
LayerType = Literal["full_attention", "sliding_attention"]

_ROPE_SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_YARN_DEFAULTS: Mapping[str, float | bool] = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 0.0,  # 0: it follows from the factor
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
    "truncate": True,
}


@dataclass(frozen=True)
class ModelConfig:
    """One transformer, described by Hugging Face's field names.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP (of gate and of up each, for SwiGLU).
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads, a divisor of the query heads (None: as many).
        head_dim: width of a head, a multiple of 8 (None: hidden_size / num_attention_heads).
        max_position_embeddings: the longest sequence.
        tie_word_embeddings: the head uses the embedding's matrix.
        norm: "rmsnorm" or "layernorm", with ``norm_eps``.
        position: "rope" or "learned" (GPT-2's architecture, names and [in, out] matrices).
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, ``{"rope_type": "linear", "factor": …}``, Llama 3's
            ``{"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}`` or
            ``{"rope_type": "yarn", "factor", "original_max_position_embeddings"}`` (Peng et al. 2023, arXiv 2309.00071), which
            may also give "beta_fast" (32), "beta_slow" (1), "truncate" (True), "attention_factor" (what cosines and sines are
            multiplied by; else 0.1 log(factor) + 1, or by "mscale" and "mscale_all_dim").
        mlp: "swiglu", "gelu" (Hugging Face's gelu_new, the tanh form) or "gelu_erf".
        attention_bias: biases on q, k, v; ``attention_out_bias`` on the output projection (None: as attention_bias).
        mlp_bias: biases in the MLP.
        qk_norm: RMSNorm over each head of q and k before the rotation (Qwen3).
        sliding_window: attend to the last so many tokens, itself included (None: to all).
        layer_types: for every block "sliding_attention" (the window) or "full_attention" (all); None: the window for all.
        no_rope_layers: for every block 1 (RoPE) or 0 (no positions, SmolLM3's NoPE); the name is Hugging Face's. None: RoPE for
            all.

    Raises:
        ValueError: naming the field that cannot be.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 1e4
    rope_scaling: Mapping[str, Any] | None = None
    mlp: Literal["swiglu", "gelu", "gelu_erf"] = "swiglu"
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] | None = None
    no_rope_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        if self.kv_heads < 1 or self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} must divide num_attention_heads = {self.num_attention_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is no multiple of num_attention_heads = "
                f"{self.num_attention_heads}; give head_dim"
            )
        if self.head_width % 8 or self.head_width < 8:
            raise ValueError(f"head_dim must be a multiple of 8, but it is {self.head_width}")
        for name, allowed in (
            ("norm", ("rmsnorm", "layernorm")),
            ("position", ("rope", "learned")),
            ("mlp", ("swiglu", "gelu", "gelu_erf")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, but it is {getattr(self, name)!r}")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, but it is {getattr(self, name)}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1 or None, but it is {self.sliding_window}")
        self._check_rope_scaling()
        self._check_layers()
        if self.position == "learned":
            self._check_gpt2()

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        kind: Any = self.rope_scaling.get("rope_type")
        if kind not in _ROPE_SCALINGS:
            raise ValueError(f"rope_scaling: rope_type must be one of {', '.join(_ROPE_SCALINGS)}, but it is {kind!r}")
        optional = _YARN_DEFAULTS if kind == "yarn" else {}
        missing = sorted(set(_ROPE_SCALINGS[kind]) - set(self.rope_scaling))
        if missing:
            raise ValueError(f"rope_scaling of type {kind} lacks {', '.join(missing)}")
        for name, value in self.rope_scaling.items():
            if name not in ("rope_type", *_ROPE_SCALINGS[kind], *optional):
                raise ValueError(f"rope_scaling of type {kind} has no {name}")
            if name == "truncate" and not isinstance(value, bool):
                raise ValueError(f"rope_scaling: truncate must be True or False, but it is {value!r}")
            if name not in ("rope_type", "truncate") and not 0 < value < math.inf:
                raise ValueError(f"rope_scaling: {name} must be positive and finite, but it is {value}")
        if kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_scaling of type yarn needs rope_theta above 1, but it is {self.rope_theta}")

    def _check_layers(self) -> None:
        """Lists become tuples: JSON has no tuples, and what is equal must compare so."""
        for name, allowed in (("layer_types", ("full_attention", "sliding_attention")), ("no_rope_layers", (0, 1))):
            layers = getattr(self, name)
            if layers is None:
                continue
            object.__setattr__(self, name, tuple(layers))
            if len(layers) != self.num_hidden_layers or any(entry not in allowed for entry in layers):
                raise ValueError(
                    f"{name} must name {' or '.join(map(str, allowed))} for each of the {self.num_hidden_layers} blocks, "
                    f"but it is {reprlib.repr(layers)}"
                )
        if self.layer_types is not None and self.sliding_window is None:
            raise ValueError("layer_types needs a sliding_window")

    def _check_gpt2(self) -> None:
        gpt2 = {
            "norm": ("layernorm",),
            "mlp": ("gelu", "gelu_erf"),
            "attention_bias": (True,),
            "mlp_bias": (True,),
            "qk_norm": (False,),
            "sliding_window": (None,),
            "rope_scaling": (None,),
            "no_rope_layers": (None,),
            "attention_out_bias": (None, True),
            "num_key_value_heads": (None, self.num_attention_heads),
        }
        for name, allowed in gpt2.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"position='learned' is GPT-2's architecture and needs {name}={allowed[0]!r}, "
                    f"but it is {getattr(self, name)!r}"
                )
        if self.head_width * self.num_attention_heads != self.hidden_size:
            raise ValueError("position='learned' is GPT-2's architecture: heads x head_dim must be hidden_size")

    @property
    def head_width(self) -> int:
        """head_dim, or its default."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """num_key_value_heads, or its default."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        fields = dataclasses.asdict(self)
        fields["rope_scaling"] = None if self.rope_scaling is None else dict(self.rope_scaling)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`. An unknown field is a ValueError with a suggestion."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"unknown field {name!r} in a model configuration" + (f"; did you mean {close[0]!r}?" if close else "")
                )
        return cls(**fields)

    def core_fields(self, head: Head) -> dict[str, Any]:
        """What the compiled core wants to know: every default resolved."""
        fields = self.to_dict()
        fields["num_key_value_heads"] = self.kv_heads
        fields["head_dim"] = self.head_width
        fields["sliding_window"] = self.sliding_window or 0
        if self.attention_out_bias is None:
            fields["attention_out_bias"] = self.attention_bias
        fields["head"] = head
        if self.rope_scaling is not None and self.rope_scaling["rope_type"] == "yarn":
            fields["rope_scaling"] = {**_YARN_DEFAULTS, **self.rope_scaling}
        fields["rope_layers"] = [bool(rotates) for rotates in self.no_rope_layers or ()]
        fields["window_layers"] = [kind == "sliding_attention" for kind in self.layer_types or ()]
        return fields
