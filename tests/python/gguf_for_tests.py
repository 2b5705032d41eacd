"""Tiny models with a tokenizer, in a folder and as GGUF files made by the `gguf` library, and files made by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import tutelage as tl
from chats_for_tests import CHATML, with_template
from tutelage.hub.hugging_face import write_folder

# Rows are whole blocks of every quantised type: 256.
_SHAPE: dict[str, Any] = {
    "vocab_size": 337,  # seven more than the tokenizer has tokens
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tl.ModelConfig] = {
    "llama": tl.ModelConfig(**_SHAPE, norm_eps=1e-6),
    "llama, tied, biases": tl.ModelConfig(
        **{**_SHAPE, "num_key_value_heads": 4}, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama, head_dim": tl.ModelConfig(**{**_SHAPE, "num_attention_heads": 8}, head_dim=64, rope_theta=5e5),
    "llama, linear": tl.ModelConfig(**_SHAPE, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama, llama3": tl.ModelConfig(**_SHAPE, rope_scaling=LLAMA3),
    "qwen2": tl.ModelConfig(**_SHAPE, attention_bias=True, attention_out_bias=False, rope_theta=1e6),
    "qwen3": tl.ModelConfig(**_SHAPE, qk_norm=True, head_dim=32, tie_word_embeddings=True),
    "gpt2": tl.ModelConfig(
        **{**_SHAPE, "num_key_value_heads": None},
        norm="layernorm",
        position="learned",
        mlp="gelu",
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "gpt2, untied": tl.ModelConfig(
        **{**_SHAPE, "num_key_value_heads": None},
        norm="layernorm",
        position="learned",
        mlp="gelu",
        attention_bias=True,
        mlp_bias=True,
    ),
}
TEXTS = [
    "hello world, this is what a user says",
    "  two blanks\t\n\n and   more \r\n",
    "naïve 猫 🙂 12345 don't I'LL e\u0301",
    "<|im_start|>user says<|im_end|>",
    "",
]


def tiny(name: str) -> tl.Model:
    """A model of `MODELS` whose attention is far from uniform, with a tokenizer and a chat template."""
    model = tl.Model(MODELS[name], seed=3)
    noise = torch.randn(model.params.numel(), generator=torch.Generator().manual_seed(4))
    model.params += 0.1 * noise
    model.tokenizer = with_template(CHATML, pad_token="</s>", unk_token="<s>")
    return model


def save(model: tl.Model, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a model in any dtype."""
    assert model.tokenizer is not None
    tensors = [(name, tensor.to(dtype)) for name, tensor in model.named_parameters()]
    write_folder(
        folder, model.config, "lm", tensors, eos_token_ids=model.eos_token_ids, bos_token_id=model.tokenizer.bos_token_id
    )
    model.tokenizer.save(folder)
    return folder


def logprobs(model: tl.Model) -> torch.Tensor:
    """Of some sequence, by position."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, 330, (60,), generator=generator).tolist()
    with torch.no_grad():
        return model.score(tl.pack([tokens])).logprobs


def library_file(path: Path, model: tl.Model, kind: str = "F32", **changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A Llama as llama.cpp's converter writes it, with the `gguf` library alone; returns the values that the matrices
    have in it, under Hugging Face's names.

    changes: metadata to add, replace or (None) leave out; `.` in names is `__`.
    """
    config, tokenizer = model.config, model.tokenizer
    assert tokenizer is not None
    writer = gguf.GGUFWriter(path, "llama")
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=lambda token: ids[token]) + [f"[PAD{i}]" for i in range(len(ids), config.vocab_size)]
    special = tokenizer.special_tokens
    document = json.loads(tokenizer.contents["tokenizer.json"])
    metadata: dict[str, Any] = {
        "llama.context_length": np.uint32(config.max_position_embeddings),
        "llama.embedding_length": np.uint32(config.hidden_size),
        "llama.block_count": np.uint32(config.num_hidden_layers),
        "llama.feed_forward_length": np.uint32(config.intermediate_size),
        "llama.attention.head_count": np.uint32(config.num_attention_heads),
        "llama.attention.head_count_kv": np.uint32(config.kv_heads),
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in special else 5 if i >= len(ids) else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in document["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(0),
        "tokenizer.chat_template": CHATML,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    for name, value in metadata.items():
        if name == "general.architecture":
            writer.kv_data[0][name].value = value
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, (list, tuple)):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, int(value))
    names = {"embed_tokens": "token_embd", "lm_head": "output", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "model.norm": "output_norm", "model.layers": "blk", "model.token": "token"}
    values: dict[str, np.ndarray[Any, Any]] = {}
    for name, weight in model.named_parameters():
        theirs = name
        for ours, their in names.items():
            theirs = theirs.replace(ours, their)
        array = weight.detach().numpy()
        if array.ndim == 1:
            writer.add_tensor(theirs, array)
            values[name] = array
            continue
        quantised, values[name] = _quantise(array, kind)
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.kv_heads)):
            if part in name:  # rows stay whole, so this may be done behind the quantisation
                quantised = _permute(quantised, heads)
        writer.add_tensor(theirs, quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _permute(weights: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of rows: of each head, one row of the first half and one of the second in turn."""
    half = weights.shape[0] // heads // 2
    order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]
    return np.ascontiguousarray(weights[order])


def _quantise(array: np.ndarray[Any, Any], kind: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(blocks, their values). The library cannot make K-quants: random blocks with small scales stand for them."""
    number = gguf.GGMLQuantizationType[kind]
    if kind.endswith("_K"):
        size = gguf.GGML_QUANT_SIZES[number][1]
        rng = np.random.default_rng(len(array))
        blocks = rng.integers(0, 256, (len(array), array.shape[1] // 256, size), dtype=np.uint8)
        scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
        for at in scales:
            blocks[:, :, at : at + 2] = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
        quantised = blocks.reshape(len(array), -1)
    else:
        quantised = gguf.quants.quantize(array, number)
    return quantised, gguf.quants.dequantize(quantised, number)


# --- by hand ------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def raw_file(
    values: Mapping[str | bytes, bytes] | list[tuple[str, bytes]] = (),  # type: ignore[assignment]
    tensors: list[tuple[str, tuple[int, ...], int, int]] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of packed values (type and content) and tensors (name, dims as in the file, type, offset)."""
    pairs = list(values.items()) if isinstance(values, Mapping) else list(values)
    tensors = tensors or []
    content = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs))))
    content += b"".join(text(name) + value for name, value in pairs)
    for name, dims, kind, offset in tensors:
        content += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return content + bytes(-len(content) % 32) + data
