"""ModelConfig: defaults, its own JSON, and every error."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from models_for_tests import KINDS
from tutelage import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2: dict[str, Any] = {
    **SIZES,
    "norm": "layernorm",
    "position": "learned",
    "mlp": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def test_defaults_that_follow_from_other_fields() -> None:
    config = ModelConfig(**SIZES)
    assert config.head_width == 8 and config.kv_heads == 4
    config = ModelConfig(**SIZES, head_dim=24, num_key_value_heads=2)
    assert config.head_width == 24 and config.kv_heads == 2


def test_attention_out_bias_follows_attention_bias() -> None:
    for attention_bias, out_bias, expected in (
        (True, None, True),
        (False, None, False),
        (True, False, False),
        (False, True, True),
    ):
        config = ModelConfig(**SIZES, attention_bias=attention_bias, attention_out_bias=out_bias)
        assert config.core_fields("lm")["attention_out_bias"] is expected


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**SIZES).vocab_size = 3  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
def test_survives_json(kind: str) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(KINDS[kind].to_dict()))) == KINDS[kind]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hiden_size", "unknown field 'hiden_size' in a model configuration; did you mean 'hidden_size'?"),
        ("zzz", "unknown field 'zzz' in a model configuration"),
    ],
)
def test_unknown_fields_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        ModelConfig.from_dict({**SIZES, name: 1})


def gpt2_needs(field: str, needed: object, given: object) -> tuple[dict[str, Any], str]:
    message = f"position='learned' is GPT-2's architecture and needs {field}={needed!r}, but it is {given!r}"
    return {**GPT2, field: given}, message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({**SIZES, name: 0}, f"{name} must be at least 1, but it is 0") for name in (*SIZES, "max_position_embeddings")),
        (
            {**SIZES, "num_key_value_heads": 3},
            "num_key_value_heads = 3 must divide num_attention_heads = 4",
        ),
        (
            {**SIZES, "num_key_value_heads": 0},
            "num_key_value_heads = 0 must divide num_attention_heads = 4",
        ),
        (
            {**SIZES, "num_key_value_heads": -2},
            "num_key_value_heads = -2 must divide num_attention_heads = 4",
        ),
        (
            {**SIZES, "hidden_size": 33},
            "hidden_size = 33 is no multiple of num_attention_heads = 4; give head_dim",
        ),
        ({**SIZES, "hidden_size": 48}, "head_dim must be a multiple of 8, but it is 12"),
        ({**SIZES, "head_dim": 0}, "head_dim must be a multiple of 8, but it is 0"),
        ({**SIZES, "head_dim": -8}, "head_dim must be a multiple of 8, but it is -8"),
        ({**SIZES, "norm": "batch"}, "norm must be one of rmsnorm, layernorm, but it is 'batch'"),
        ({**SIZES, "position": "alibi"}, "position must be one of rope, learned, but it is 'alibi'"),
        ({**SIZES, "mlp": "relu"}, "mlp must be one of swiglu, gelu, gelu_erf, but it is 'relu'"),
        ({**SIZES, "norm_eps": 0.0}, "norm_eps must be positive and finite, but it is 0.0"),
        ({**SIZES, "norm_eps": math.nan}, "norm_eps must be positive and finite, but it is nan"),
        ({**SIZES, "rope_theta": -1.0}, "rope_theta must be positive and finite, but it is -1.0"),
        ({**SIZES, "rope_theta": math.inf}, "rope_theta must be positive and finite, but it is inf"),
        ({**SIZES, "sliding_window": 0}, "sliding_window must be at least 1 or None, but it is 0"),
        (
            {**SIZES, "rope_scaling": {"rope_type": "yarn"}},
            "rope_scaling of type yarn lacks factor, original_max_position_embeddings",
        ),
        (
            {**SIZES, "rope_scaling": {}},
            "rope_scaling: rope_type must be one of linear, llama3, yarn, but it is None",
        ),
        (
            {**SIZES, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling of type llama3 lacks high_freq_factor, low_freq_factor, original_max_position_embeddings",
        ),
        (
            {**SIZES, "rope_scaling": {**LLAMA3, "factor": 0.0}},
            "rope_scaling: factor must be positive and finite, but it is 0.0",
        ),
        ({**SIZES, "rope_scaling": {**YARN, "betafast": 3}}, "rope_scaling of type yarn has no betafast"),
        ({**SIZES, "rope_scaling": {**LLAMA3, "beta_fast": 3}}, "rope_scaling of type llama3 has no beta_fast"),
        ({**SIZES, "rope_scaling": {**YARN, "mscale": -1}}, "rope_scaling: mscale must be positive and finite, but it is -1"),
        ({**SIZES, "rope_scaling": {**YARN, "truncate": 0}}, "rope_scaling: truncate must be True or False, but it is 0"),
        (
            {**SIZES, "rope_scaling": YARN, "rope_theta": 1.0},
            "rope_scaling of type yarn needs rope_theta above 1, but it is 1.0",
        ),
        (
            {**SIZES, "sliding_window": 4, "layer_types": ["full_attention"]},
            "layer_types must name full_attention or sliding_attention for each of the 2 blocks, but it is ['full_attention']",
        ),
        (
            {**SIZES, "sliding_window": 4, "layer_types": ["full_attention", "chunked_attention"]},
            "layer_types must name full_attention or sliding_attention for each of the 2 blocks, but it is "
            "['full_attention', 'chunked_attention']",
        ),
        ({**SIZES, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types needs a sliding_window"),
        ({**SIZES, "no_rope_layers": [1, 2]}, "no_rope_layers must name 0 or 1 for each of the 2 blocks, but it is [1, 2]"),
        gpt2_needs("no_rope_layers", None, (1, 0)),
        gpt2_needs("norm", "layernorm", "rmsnorm"),
        gpt2_needs("mlp", "gelu", "swiglu"),
        gpt2_needs("attention_bias", True, False),
        gpt2_needs("mlp_bias", True, False),
        gpt2_needs("qk_norm", False, True),
        gpt2_needs("sliding_window", None, 8),
        gpt2_needs("rope_scaling", None, LLAMA3),
        gpt2_needs("attention_out_bias", None, False),
        gpt2_needs("num_key_value_heads", None, 2),
        (
            {**GPT2, "head_dim": 16},
            "position='learned' is GPT-2's architecture: heads x head_dim must be hidden_size",
        ),
    ],
)
def test_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        ModelConfig(**fields)
