"""Tiny models of every architecture, and comparisons by the byte."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tutelage import Model, ModelConfig, PackedBatch, _core, pack

_GPT2: dict[str, Any] = {
    "vocab_size": 130,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 320,
    "norm": "layernorm",
    "position": "learned",
    "mlp": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": 275,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 320,
}
KINDS: dict[str, ModelConfig] = {
    "llama": ModelConfig(**_LLAMA),
    "llama-tied": ModelConfig(**{**_LLAMA, "vocab_size": 977, "tie_word_embeddings": True}),
    "llama-3.1": ModelConfig(
        **{**_LLAMA, "num_attention_heads": 6, "num_key_value_heads": 3},
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": ModelConfig(**_LLAMA, attention_bias=True, attention_out_bias=False),
    "qwen3": ModelConfig(**{**_LLAMA, "hidden_size": 40}, head_dim=24, qk_norm=True, tie_word_embeddings=True),
    "mistral": ModelConfig(**_LLAMA, sliding_window=7),
    "smollm3": ModelConfig(  # every option that differs between blocks, and yarn
        **{**_LLAMA, "num_hidden_layers": 3},
        attention_bias=True,
        mlp_bias=True,
        sliding_window=7,
        layer_types=("full_attention", "sliding_attention", "sliding_attention"),
        no_rope_layers=(1, 0, 1),
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "layernorm": ModelConfig(
        **_LLAMA, norm="layernorm", mlp="gelu_erf", attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "gpt2": ModelConfig(**_GPT2, tie_word_embeddings=True),
    "gpt2-untied": ModelConfig(**{**_GPT2, "mlp": "gelu_erf"}),
}


ADAPTED = ("llama+lora", "gpt2+lora")
"""Kinds with an adapter on them."""
EVERY = (*KINDS, *ADAPTED)


def tiny_model(kind: str = "llama", **options: Any) -> Model:
    """A model whose attention and logits are far from uniform, as the small initial weights would leave them."""
    if kind in ADAPTED:
        return lora_model(kind.removesuffix("+lora"), **options)
    model = Model(KINDS[kind], **options)
    noise = torch.randn(model.params.numel(), generator=torch.Generator().manual_seed(1))
    model.params += 0.2 * noise.to(model.device)
    return model


def lora_model(
    kind: str = "llama",
    head: Any = None,
    targets: tuple[str, ...] = (),
    rank: int = 3,
    base: Model | None = None,
    **options: Any,
) -> Model:
    """An adapter that has learned something, on a tiny model."""
    model = (base or tiny_model(kind, **options)).with_lora(rank, 2.0 * rank, targets, head, seed=1)
    noise = torch.randn(model.params.numel(), generator=torch.Generator().manual_seed(2))
    model.params += 0.1 * noise.to(model.device)
    return model


def same_model(model: Model, **options: Any) -> Model:
    """Another model with the same weights."""
    if model.base is None or model.lora is None:
        other = Model(model.config, head=model.head, **options)
    else:
        lora = model.lora
        other = same_model(model.base, **options).with_lora(lora.rank, lora.alpha, lora.target_modules, model.head)
    other.load_state_dict(model.state_dict())
    return other


def sequences(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(vocab_size) for _ in range(length)] for length in lengths]


def batch_for(model: Model, lengths: Sequence[int], seed: int = 0) -> PackedBatch:
    return pack(sequences(lengths, model.config.vocab_size, seed))


def randn(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def bits(*tensors: Tensor) -> bytes:
    """The bytes: unlike ``torch.equal`` they tell -0 from 0 and find NaN equal to itself."""
    return b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forward_bits(model: Model, batch: PackedBatch, temperature: float = 1.0) -> bytes:
    with torch.no_grad():
        if model.head == "scalar":
            return bits(model.values(batch))
        out = model.score(batch, temperature)
        return bits(out.logprobs, out.entropy)


def backward(model: Model, batch: PackedBatch, seed: int = 0, temperature: float = 1.0) -> None:
    """Adds the gradient of a random linear function of everything that the forward returns."""
    if model.head == "scalar":
        values = model.values(batch)
        values.backward(randn(values, seed))
    else:
        out = model.score(batch, temperature)
        torch.autograd.backward([out.logprobs, out.entropy], [randn(out.logprobs, seed), randn(out.entropy, seed + 1)])


def gradient_bits(model: Model, batch: PackedBatch, seed: int = 0) -> bytes:
    model.zero_grad()
    backward(model, batch, seed)
    return bits(model.grads)


def in_use() -> int:
    """Bytes that the core's memory has handed out and not got back."""
    return int(_core.memory_use()["in_use"])


def in_use_at_start() -> int:
    """The same before a measurement: what earlier tests left in reference cycles must not be freed in the middle of it."""
    gc.collect()
    return in_use()
