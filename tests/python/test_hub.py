"""Hugging Face folders: read as transformers writes them, written as it reads them, all else refused."""

from __future__ import annotations

import copy
import errno
import json
import logging
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage import files
from tutelage.config import ModelConfig
from tutelage.files import Disk, Operation
from tutelage.hub.hugging_face import (
    CARD,
    CONFIG,
    INDEX,
    WEIGHTS,
    read_config,
    read_eos_token_ids,
    read_reward_bias,
    read_tensors,
    write_folder,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2_OURS: dict[str, Any] = {
    **{name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")},
    "norm": "layernorm",
    "position": "learned",
    "mlp": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}
# name -> (transformers' class, its options, ours)
MODELS: dict[str, tuple[str, dict[str, Any], ModelConfig]] = {
    "llama": (
        "Llama",
        {**SIZES, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": LLAMA3},
        ModelConfig(**SIZES, rope_theta=5e5, rope_scaling=LLAMA3),
    ),
    "llama with biases, tied": (
        "Llama",
        {**SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        ModelConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, norm_eps=1e-6),
    ),
    "llama, linear": (
        "Llama",
        {**SIZES, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ModelConfig(**SIZES, rope_scaling={"rope_type": "linear", "factor": 2.0}, norm_eps=1e-6),
    ),
    "mistral": (
        "Mistral",
        {**SIZES, "sliding_window": 9},
        ModelConfig(**SIZES, sliding_window=9, norm_eps=1e-6),
    ),
    "qwen2": (
        "Qwen2",
        {**SIZES, "tie_word_embeddings": True},
        ModelConfig(**SIZES, attention_bias=True, attention_out_bias=False, tie_word_embeddings=True, norm_eps=1e-6),
    ),
    "qwen2 with a window": (
        "Qwen2",
        {**SIZES, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
        ModelConfig(**SIZES, attention_bias=True, attention_out_bias=False, sliding_window=9, norm_eps=1e-6),
    ),
    "qwen3": ("Qwen3", SIZES, ModelConfig(**SIZES, qk_norm=True, norm_eps=1e-6)),
    "qwen3 with biases": (
        "Qwen3",
        {**SIZES, "attention_bias": True},
        ModelConfig(**SIZES, qk_norm=True, attention_bias=True, norm_eps=1e-6),
    ),
    "qwen3 with a window in some blocks": (
        "Qwen3",
        {**SIZES, "use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
        ModelConfig(
            **SIZES, qk_norm=True, sliding_window=9, layer_types=("sliding_attention", "full_attention"), norm_eps=1e-6
        ),
    ),
    "smollm3": (
        "SmolLM3",
        {**SIZES, "no_rope_layers": [1, 0], "rope_scaling": YARN, "rope_theta": 5e5, "pad_token_id": None},
        ModelConfig(**SIZES, no_rope_layers=(1, 0), rope_scaling=YARN, rope_theta=5e5, tie_word_embeddings=True, norm_eps=1e-6),
    ),
    "gpt2": ("GPT2", {**GPT2, "n_inner": 40}, ModelConfig(**GPT2_OURS, tie_word_embeddings=True)),
    "gpt2, erf, untied": (
        "GPT2",
        {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False},
        ModelConfig(**{**GPT2_OURS, "mlp": "gelu_erf", "intermediate_size": 128}),
    ),
}


def transformers_model(name: str, head: str = "lm") -> Any:
    kind, options, _ = MODELS[name]
    torch.manual_seed(0)
    ending = {
        "lm": "LMHeadModel" if kind == "GPT2" else "ForCausalLM",
        "scalar": "ForSequenceClassification",
    }[head]
    labels = {} if head == "lm" else {"num_labels": 1}
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(options), **labels, bos_token_id=None, eos_token_id=None)
    return getattr(transformers, kind + ending)(config)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """Name -> tensor, a tied head only once."""
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """A folder that transformers wrote, and its parameters."""
    made: dict[tuple[str, str], tuple[Path, dict[str, torch.Tensor]]] = {}

    def save(name: str, head: str = "lm") -> tuple[Path, dict[str, torch.Tensor]]:
        if (name, head) not in made:
            model = transformers_model(name, head)
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            made[name, head] = folder, parameters(model)
        return made[name, head]

    return save


@pytest.fixture
def llama(tmp_path: Path, saved: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of a Llama that a test may spoil."""
    folder, state = saved("llama")
    return Path(shutil.copytree(folder, tmp_path / "llama")), state


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**document, **changes}))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_config(folder)
    assert str(folder) in str(caught.value)


def refused_tensors(folder: Path, state: dict[str, torch.Tensor], message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_tensors(folder, shapes(state), **options)
    assert str(folder) in str(caught.value)


def assert_same(loaded: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == (torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name


# --- what transformers writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", MODELS)
def test_reads_what_transformers_writes(saved: Any, name: str, head: str) -> None:
    folder, state = saved(name, head)
    config, own_head = read_config(folder)
    assert own_head == head
    assert config.core_fields("lm") == MODELS[name][2].core_fields("lm")
    assert_same(dict(read_tensors(folder, shapes(state))), state)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}),
        ("llama, linear", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}),
        ("mistral", {"rope_theta": 10000, "rope_scaling": None, "head_dim": None}),
        ("mistral", {"rope_scaling": {"rope_type": "default"}}),
        ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": False, "sliding_window": 5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
        ("qwen2 with a window", {"layer_types": None}),
    ],
)
def test_reads_the_layout_of_transformers_4(tmp_path: Path, saved: Any, name: str, layout: dict[str, Any]) -> None:
    folder = shutil.copytree(saved(name)[0], tmp_path / "model")
    document = json.loads((folder / CONFIG).read_text())
    for field in ("rope_parameters", "layer_types"):
        document.pop(field, None)
    (folder / CONFIG).write_text(json.dumps({**document, **layout}))
    config, _ = read_config(folder)
    expected = MODELS[name][2]
    assert config.core_fields("lm") == expected.core_fields("lm")


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    """A config.json that leaves out what it may means what transformers' class makes of it."""
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    for kind in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "GPT2"):
        config = getattr(transformers, kind + "Config")()
        config.save_pretrained(tmp_path / "full")
        needed = {
            name: getattr(config, name)
            for name in [*sizes, "model_type", "n_embd", "n_layer", "n_head"]
            if hasattr(config, name)
        }
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / CONFIG).write_text(json.dumps(needed))
        for folder in ("full", "bare"):
            with (tmp_path / folder / WEIGHTS).open("wb") as file:
                file.truncate(10**11)  # sparse: a file that could hold the weights
        full, bare = (read_config(tmp_path / folder)[0] for folder in ("full", "bare"))
        assert full.core_fields("lm") == bare.core_fields("lm"), kind


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_reads_shards_and_half_precision(tmp_path: Path, name: str) -> None:
    model = transformers_model(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder, max_shard_size="10KB")
        assert (folder / INDEX).is_file() and len(list(folder.glob("model-*.safetensors"))) > 2
        read_config(folder)
        assert_same(dict(read_tensors(folder, shapes(parameters(model)))), parameters(model))


def test_prefixes_buffers_and_other_heads(tmp_path: Path, saved: Any) -> None:
    """Old GPT-2 files: no prefix, masks among the tensors, the tied head stored a second time."""
    _, state = saved("gpt2")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    buffers = {
        "h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
        "h.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": state["transformer.wte.weight"].clone(),
        "score.weight": torch.ones(1, 32),
    }
    safetensors.torch.save_file({**bare, **buffers}, tmp_path / WEIGHTS)
    assert_same(dict(read_tensors(tmp_path, shapes(state), tied=True)), state)
    refused_tensors(tmp_path, {**state, "x": torch.ones(1)}, "lacks the tensors x")


def test_a_head_that_differs_from_its_embedding_is_not_tied(llama: Any) -> None:
    folder, state = llama
    backbone = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    message = "lm_head.weight differs from model.embed_tokens.weight, but config.json has tie_word_embeddings true"
    refused_tensors(folder, backbone, message, tied=True)
    assert_same(dict(read_tensors(folder, shapes(backbone))), backbone)


def test_dropout_is_logged(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = llama
    with caplog.at_level(logging.WARNING):
        read_config(folder)
        assert caplog.text == ""
        edit(folder, attention_dropout=0.1)
        read_config(folder)
    assert "attention_dropout not used, tutelage has no dropout" in caplog.text


def test_pickled_weights_are_refused(llama: Any) -> None:
    folder, state = llama
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    message = "has only pickled weights (pytorch_model.bin): loading a pickle can run any code"
    refused(folder, message)
    refused_tensors(folder, state, message)


# --- config.json refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma"},
            "model_type is 'gemma', which has norms that multiply by 1 + weight, scaled embeddings and a GELU-gated MLP; "
            "tutelage runs llama, mistral, qwen2, qwen3, smollm3, gpt2",
        ),
        ({"model_type": 3}, "model_type must be a string, but it is 3"),
        ({"vocab_size": None}, "vocab_size must be an integer from 1 to 2147483647, but it is None"),
        ({"vocab_size": 0}, "vocab_size must be an integer from 1 to 2147483647, but it is 0"),
        ({"hidden_size": 2**31}, "hidden_size must be an integer from 1 to 2147483647, but it is 2147483648"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_attention_heads": 4.0}, "num_attention_heads must be an integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide num_attention_heads = 4"),
        ({"head_dim": 12}, "head_dim must be a multiple of 8, but it is 12"),
        ({"head_dim": -8}, "head_dim must be an integer from 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', but it is 'gelu'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, but it is 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, but it is nan"),
        (
            {"rope_parameters": {"rope_theta": 10**400}},
            "rope_parameters.rope_theta must be a positive number",
        ),
        (
            {"rope_parameters": None, "rope_theta": "1e4"},
            "rope_theta must be a positive number, but it is '1e4'",
        ),
        ({"mlp_bias": 1}, "mlp_bias must be true or false, but it is 1"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object, but it is [1]"),
        (
            {"rope_scaling": {"type": "su", "factor": 2}},
            "rope_scaling.type must be default, linear, llama3 or yarn: other rotations for longer sequences would make a "
            "token's log-prob depend on the tokens behind it, but it is 'su'",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic"}},
            "rope_scaling.rope_type must be default, linear, llama3 or yarn: other rotations for longer sequences",
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, "depend on the tokens behind it, but it is 'longrope'"),
        (
            {"rope_scaling": {"type": "mrope"}},
            "rope_scaling.type must be default, linear, llama3 or yarn (other scalings are not supported), but it is 'mrope'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": "1"}}, "rope_scaling.beta_slow must be a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, "rope_scaling.truncate must be true or false"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "rope_scaling.factor must be a positive number, but it is 0"),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling.factor must be a positive number, but it is missing",
        ),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor must be below high_freq_factor = 4.0",
        ),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 2.5}},
            "rope_scaling.original_max_position_embeddings must be an integer",
        ),
        (
            {"rope_scaling": {"full_attention": {}}},
            "rope_scaling.full_attention is not supported, but it is {}",
        ),
        (
            {"rope_scaling": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is not supported (only 1.0)",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported (only 1.0), but it is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported (only null)"),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "architectures must be a list of one of LlamaForCausalLM",
        ),
        ({"architectures": ["MistralForCausalLM"]}, "but it is ['MistralForCausalLM']"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of one of"),
        ({"architectures": []}, "architectures must be a list of one of"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "the classifier has 2 labels"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "num_labels": 5},
            "the classifier has 5 labels",
        ),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": 1}, "id2label must be an object"),
        ({"vocab_size": 2**31 - 1}, "describes 68,719,"),
        ({"num_hidden_layers": 2**31 - 1}, "more than fit into the"),
        ({"intermediate_size": 10**6}, "bytes of the folder's safetensors files"),
    ],
)
def test_config_refused(llama: Any, changes: dict[str, Any], message: str) -> None:
    edit(llama[0], **changes)
    refused(llama[0], message)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window must be an integer from 1"),
        (
            "qwen2 with a window",
            {"layer_types": ["sliding_attention", "chunked_attention"]},
            "layer_types must name sliding_attention or full_attention for each of the 2 layers",
        ),
        (
            "qwen2 with a window",
            {"layer_types": None, "num_hidden_layers": 2**31 - 1},
            "num_hidden_layers must be at most 10000 where blocks differ, but it is 2147483647",
        ),
        (
            "qwen2 with a window",
            {"layer_types": ["sliding_attention"]},
            "layer_types must name sliding_attention or",
        ),
        ("qwen3", {"use_sliding_window": 1}, "use_sliding_window must be true or false"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must say 1 (RoPE) or 0 for each of the 2 layers, but it is [1]"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers must say 1 (RoPE) or 0"),
        ("smollm3", {"no_rope_layers": "10"}, "no_rope_layers must say 1 (RoPE) or 0"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval must be an integer from 1"),
        ("smollm3", {"no_rope_layers": None, "num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000"),
        ("gpt2", {"hidden_size": 48}, "hidden_size is another name of n_embd, which is 32, but it is 48"),
        (
            "gpt2",
            {"activation_function": "relu"},
            "activation_function must be one of gelu_new, gelu_pytorch_tanh",
        ),
        (
            "gpt2",
            {"scale_attn_weights": False},
            "scale_attn_weights is not supported (only true), but it is False",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is not supported",
        ),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is not supported (only false)"),
        ("gpt2", {"n_head": 5}, "hidden_size = 32 is no multiple of num_attention_heads = 5"),
        ("gpt2", {"n_positions": 10**9}, "more than fit into"),
    ],
)
def test_config_of_others_refused(tmp_path: Path, saved: Any, name: str, changes: dict[str, Any], message: str) -> None:
    folder = Path(shutil.copytree(saved(name)[0], tmp_path / "model"))
    edit(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "config.json is not a JSON object"),
        (b"{", "config.json is not JSON"),
        (b"\xff\xfe\x00", "config.json is not JSON"),
        (b"[" * 100_000, "config.json is not JSON"),
        (b'{"model_type": ' + b"1" * 10_000 + b"}", "config.json is not JSON"),
        (b" " * (17 << 20), "config.json has 17,825,792 bytes; a config.json has at most 16,777,216"),
    ],
)
def test_config_that_is_no_object(llama: Any, content: bytes, message: str) -> None:
    (llama[0] / CONFIG).write_bytes(content)
    refused(llama[0], message)


def test_no_model_in_the_folder(tmp_path: Path, llama: Any) -> None:
    folder, _ = llama
    refused(folder / "nowhere", "is not a folder (tutelage downloads nothing: fetch the model first)")
    (folder / CONFIG).unlink()
    refused(folder, "has no config.json: it is not the folder of a Hugging Face model")
    (folder / WEIGHTS).unlink()
    refused(folder, "has no model.safetensors and no model.safetensors.index.json")


# --- tensors refused ----------------------------------------------------------------------------------------


def test_tensors_refused(llama: Any) -> None:
    folder, state = llama
    norm = "model.norm.weight"

    def rewritten(changes: dict[str, torch.Tensor | None], message: str) -> None:
        tensors = {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
        refused_tensors(folder, state, message)

    rewritten({norm: None, "lm_head.weight": None}, "lacks the tensors model.norm.weight, lm_head.weight")
    rewritten(dict.fromkeys(list(state)[:7]), "and 2 more")
    rewritten({"model.extra": torch.ones(2)}, "the model of its config.json has not, the tensors model.extra")
    rewritten({norm: torch.ones(33)}, f"{norm} must have shape [32], but it has [33]")
    rewritten({norm: torch.ones(32, dtype=torch.int8)}, f"{norm} is I8, but only F64, F32, F16, BF16 are read")
    rewritten({norm: torch.ones(32).to(torch.float8_e4m3fn)}, f"{norm} is F8_E4M3, but only")
    rewritten({"norm.weight": torch.ones(32)}, "is in model.safetensors too")


def test_shards_refused(tmp_path: Path, llama: Any) -> None:
    folder, state = llama
    whole = folder / WEIGHTS
    outside = tmp_path / "outside.safetensors"
    shutil.copy(whole, outside)
    whole.rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    for names, message in (
        (
            {"x": "../outside.safetensors"},
            "weight_map names '../outside.safetensors', which is no safetensors file of",
        ),
        ({"x": str(outside)}, "which is no safetensors file of its folder"),
        ({"x": ".."}, "which is no safetensors file of its folder"),
        ({"x": "a.bin"}, "weight_map names 'a.bin'"),
        ({"x": 3}, "weight_map names '3'"),
        ({"x": "a\0.safetensors"}, "which is no safetensors file of its folder"),
        (
            {"x": "c.safetensors"},
            "lacks 'c.safetensors', which model.safetensors.index.json names: copy or fetch it",
        ),
        (
            {"x": "a.safetensors", "y": "b.safetensors"},
            "b.safetensors: lm_head.weight is in a.safetensors too",
        ),
        ({}, "weight_map must be an object, tensor to file"),
        ([1], "weight_map must be an object, tensor to file"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))
        refused_tensors(folder, state, message)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert_same(dict(read_tensors(folder, shapes(state))), state)
    (folder / INDEX).write_text("[]")
    refused_tensors(folder, state, "model.safetensors.index.json is not a JSON object")


# --- fuzz ---------------------------------------------------------------------------------------------------

FUZZ = [300, pytest.param(7_000, marks=pytest.mark.slow), pytest.param(170_000, marks=pytest.mark.soak)]
NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 8, 2**31, 2**63, 2**64, 10**400, 1e400, -1e400, math.nan, 1e-320, 0.5]),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "silu", "default", "linear", "llama3", "F32", "sliding_attention", "GPT2Model", "../x"]),
    st.text(max_size=8),
    st.lists(st.integers(-1, 9) | st.text(max_size=3), max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", *LLAMA3]),
        st.sampled_from(["linear", "llama3", 0, -1, 2, 10**400, math.nan, None, []]),
        max_size=4,
    ),
)


def run_fuzz(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Runs `check` on at least half as many different inputs as `examples`."""
    seen = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def execute(value: Any) -> None:
        nonlocal seen
        seen += 1
        check(value)

    execute()
    assert seen >= examples // 2


@pytest.mark.parametrize("examples", FUZZ)
@pytest.mark.parametrize("name", ["llama", "qwen2 with a window", "gpt2"])
def test_fuzzed_config(tmp_path: Path, saved: Any, name: str, examples: int) -> None:
    folder = Path(shutil.copytree(saved(name, "scalar")[0], tmp_path / "model"))
    document = json.loads((folder / CONFIG).read_text())
    weight_bytes = (folder / WEIGHTS).stat().st_size
    names = st.sampled_from([*document, "rope_scaling", "rope_theta", "num_labels", "quantization_config"])

    def check(changes: dict[str, Any]) -> None:
        (folder / CONFIG).write_text(json.dumps({**document, **changes}))
        try:
            config, _ = read_config(folder)
        except ValueError as error:
            assert str(folder) in str(error) and len(str(error)) < 1000
        else:
            assert 2 * config.vocab_size * config.hidden_size <= weight_bytes
            assert config.core_fields("lm")["num_hidden_layers"] <= weight_bytes

    run_fuzz(examples // 3, st.dictionaries(names, NASTY, min_size=1, max_size=3), check)


@pytest.mark.parametrize("examples", FUZZ)
def test_fuzzed_config_bytes(llama: Any, examples: int) -> None:
    folder, _ = llama
    content = (folder / CONFIG).read_bytes()

    def check(seed: int) -> None:
        (folder / CONFIG).write_bytes(mutated(content, random.Random(seed)))
        try:
            read_config(folder)
        except ValueError as error:
            assert str(folder) in str(error)

    run_fuzz(examples, st.integers(0, 2**32), check)


def mutated(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(4):
            case 0:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            case 1:
                at = rng.randrange(len(changed))
                changed[at : at + rng.randrange(4)] = rng.choice([b"9", b"-", b'"', b"{", b"]", b"\0", b"1e99"])
            case 2:
                del changed[rng.randrange(len(changed)) + 1 :]
            case _:
                at, end = sorted(rng.randrange(len(changed)) for _ in range(2))
                changed[at:at] = changed[at : min(end, at + 50)]
    return bytes(changed)


@pytest.mark.parametrize("examples", FUZZ)
def test_fuzzed_safetensors(llama: Any, examples: int) -> None:
    """Bytes of the header, and its JSON: an error, or tensors of the shapes that were asked for."""
    folder, state = llama
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def check(case: tuple[int, str, str, Any]) -> None:
        seed, tensor, field, value = case
        if field:
            text = json.dumps({**header, tensor: {**header[tensor], field: value}}).encode()
            changed = len(text).to_bytes(8, "little") + text + data
        else:
            changed = mutated(content[: 8 + length], random.Random(seed)) + data
        (folder / WEIGHTS).write_bytes(changed)
        try:
            loaded = dict(read_tensors(folder, shapes(state)))
        except ValueError as error:
            assert str(folder) in str(error)
        else:
            assert shapes(loaded) == shapes(state)

    fields = st.sampled_from(["", "dtype", "shape", "data_offsets"])
    run_fuzz(examples, st.tuples(st.integers(0, 2**32), st.sampled_from(list(state)), fields, NASTY), check)


# --- what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_written(tmp_path: Path, saved: Any, name: str, head: Any) -> None:
    _, state = saved(name, head)
    config = MODELS[name][2]
    write_folder(tmp_path / "out", config, head, iter(state.items()), eos_token_ids=[7], bos_token_id=3)
    auto = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__.startswith(MODELS[name][0]) and model.dtype == torch.float32
    assert (model.config.eos_token_id, model.config.bos_token_id) == (7, 3)
    if head == "lm":
        assert model.generation_config.eos_token_id == 7
    assert_same(parameters(model), state)
    again, own_head = read_config(tmp_path / "out")
    assert (again.core_fields("lm"), own_head) == (config.core_fields("lm"), head)
    original = transformers_model(name, head)
    for field in (
        "rope_parameters",
        "sliding_window",
        "layer_types",
        "attention_bias",
        "head_dim",
        "num_labels",
    ):
        assert getattr(model.config, field, None) == getattr(original.config, field, None), field
    prompt = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(model.eval()(prompt).logits, original.eval()(prompt).logits)


def test_special_tokens_are_never_those_of_the_class(tmp_path: Path, saved: Any) -> None:
    """Unknown is null: a Llama that says nothing of them would get 1 and 2."""
    folder, state = tmp_path / "out", saved("llama")[1]
    write_folder(folder, MODELS["llama"][2], "lm", state.items())
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert not (folder / "generation_config.json").exists()
    write_folder(folder, MODELS["llama"][2], "lm", state.items(), eos_token_ids=[4, 5])
    assert transformers.AutoConfig.from_pretrained(folder).eos_token_id == [4, 5]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_writes_shards(tmp_path: Path, saved: Any, name: str) -> None:
    _, state = saved(name)
    config = MODELS[name][2]
    write_folder(tmp_path, config, "lm", state.items(), max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / WEIGHTS).exists()
    largest = max(tensor.nbytes for tensor in state.values())
    assert all(shard.stat().st_size < max(20_000, largest) + 2000 for shard in shards)
    assert_same(dict(read_tensors(tmp_path, shapes(state))), state)
    assert_same(parameters(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), state)
    # A smaller model in the same place leaves nothing of it, and nothing of other files is touched.
    (tmp_path / "README.md").write_text("mine")
    write_folder(tmp_path, config, "lm", state.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, CONFIG, WEIGHTS]
    assert_same(dict(read_tensors(tmp_path, shapes(state))), state)


def test_shapes_that_llama_refuses_are_written_as_mistral(tmp_path: Path) -> None:
    """transformers' LlamaConfig wants a hidden size that the heads divide; a plain Mistral is the same."""
    config = ModelConfig(**{**SIZES, "hidden_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1})
    write_folder(tmp_path, config, "lm", {"model.norm.weight": torch.ones(40)}.items())
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "mistral"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"norm": "layernorm"},
            "no transformers class has rotary positions with norm='layernorm' and mlp='swiglu'",
        ),
        ({"mlp": "gelu"}, "no transformers class has rotary positions with norm='rmsnorm' and mlp='gelu'"),
        ({"attention_out_bias": True}, "no transformers class has attention_out_bias without attention_bias"),
        ({"qk_norm": True, "mlp_bias": True}, "no transformers class has mlp_bias in a Qwen3"),
        (
            {"qk_norm": True, "attention_bias": True, "attention_out_bias": False},
            "attention_bias without attention_out_bias in a Qwen3",
        ),
        ({"attention_bias": True, "attention_out_bias": False, "mlp_bias": True}, "mlp_bias in a Qwen2"),
        ({"qk_norm": True, "no_rope_layers": (1, 0)}, "no_rope_layers in a Qwen3"),
        ({"attention_bias": True, "attention_out_bias": False, "no_rope_layers": (1, 0)}, "no_rope_layers in a Qwen2"),
    ],
)
def test_models_that_transformers_lacks(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_folder(tmp_path / "out", ModelConfig(**SIZES, **options), "lm", {"x": torch.ones(1)}.items())
    assert not (tmp_path / "out").exists()


def outcomes_of_interrupted_writes(folder: Path) -> set[str]:
    """An old model is replaced by a new one, stopped at every operation: what `folder` then holds."""
    old, new = (ModelConfig(**SIZES, tie_word_embeddings=True, rope_theta=theta) for theta in (1e4, 2e4))
    shape = {"model.embed_tokens.weight": (61, 800)}

    def write(config: ModelConfig, value: float, shard: int, disk: Disk = files.DISK) -> None:
        tensors = {name: torch.full(size, value) for name, size in shape.items()}
        write_folder(folder, config, "lm", tensors.items(), max_shard_bytes=shard, disk=disk)

    outcomes = set()
    for stop in range(1000):
        count = 0

        def observe(operation: Operation, stop: int = stop) -> None:
            nonlocal count
            count += 1
            if count > stop:
                raise OSError(errno.ENOSPC, "full")

        shutil.rmtree(folder, ignore_errors=True)
        write(old, 1.0, 10**9)
        try:
            write(new, 2.0, 10**9, Disk(observe))
        except files.FileError:
            finished = False
        else:
            finished = True
        try:
            config, _ = read_config(folder)
            (_, tensor), *_ = read_tensors(folder, shape)
            outcomes.add(f"config {config.rope_theta:g}, weights {tensor[0, 0].item():g}")
        except ValueError:
            outcomes.add("nothing")
        write(new, 2.0, 10**9)  # leftovers are in nobody's way
        assert sorted(path.name for path in folder.iterdir()) == [CARD, CONFIG, WEIGHTS]
        if finished:
            return outcomes
    raise AssertionError("the write never ended")


def test_an_interrupted_write_mixes_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"config 10000, weights 1", "config 20000, weights 2"}
    assert outcomes_of_interrupted_writes(tmp_path / "model") == {*whole, "nothing"}
    # Control: with the old config.json left in place, a folder holds the old config and the new weights.
    remove = files.remove
    monkeypatch.setattr(files, "remove", lambda path, disk=files.DISK: None if path.name == CONFIG else remove(path, disk))
    mixed = outcomes_of_interrupted_writes(tmp_path / "control")
    assert "config 10000, weights 2" in mixed


def test_a_full_disk_leaves_the_old_model_and_no_leftovers(tmp_path: Path, saved: Any) -> None:
    folder, state = tmp_path / "out", saved("llama")[1]
    config = MODELS["llama"][2]
    write_folder(folder, config, "lm", state.items())

    def full(operation: Operation) -> None:
        if operation.name == "write" and operation.path.name.endswith(CONFIG):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(files.FileError, match="No space left on device"):
        write_folder(folder, config, "lm", state.items(), disk=Disk(full))
    assert sorted(path.name for path in folder.iterdir()) == [CARD, CONFIG, WEIGHTS]
    assert_same(dict(read_tensors(folder, shapes(state))), state)


def test_writing_copies_no_weights(tmp_path: Path) -> None:
    """The pieces that reach the disk are the tensors' own memory."""
    tensor = torch.arange(5_000_000, dtype=torch.float32)
    addresses = []

    def observe(operation: Operation) -> None:
        if operation.name == "write" and len(operation.data) > 10**6:
            addresses.append(torch.frombuffer(operation.data, dtype=torch.uint8).data_ptr())

    write_folder(tmp_path, ModelConfig(**SIZES), "lm", {"x": tensor}.items(), disk=Disk(observe))
    assert addresses and all(0 <= at - tensor.data_ptr() < tensor.nbytes for at in addresses)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, None, ()), (None, 7, (7,)), ([3, 4], 7, (3, 4)), (None, [], ())],
)
def test_the_ids_that_end_a_completion(tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token_id": config}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ["2", -1, [1, None], 2**31, True])
def test_ids_that_cannot_end_a_completion(tmp_path: Path, value: Any) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=f"{CONFIG}: eos_token_id must be a token id or a list of them, but it is"):
        read_eos_token_ids(tmp_path)


@pytest.mark.parametrize("value", [0.1, -3, 1e-9, None])
def test_the_bias_of_a_reward_model_is_read(tmp_path: Path, value: float | None) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({} if value is None else {"reward_bias": value}))
    assert read_reward_bias(tmp_path) == (value or 0.0)


@pytest.mark.parametrize("value", ["2", True, [1.0], math.inf, math.nan, 10**400, -1e31])
def test_what_is_no_bias(tmp_path: Path, value: Any) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"reward_bias": value}))
    with pytest.raises(ValueError, match=f"{CONFIG}: reward_bias must be a finite number, but it is"):
        read_reward_bias(tmp_path)
