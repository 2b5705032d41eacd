"""What ours is measured against: plain PyTorch as nanoGPT and transformers write it. Used nowhere else.

Parameters have Hugging Face's names; GPT-2's matrices are [out, in] here, as torch's Linear has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.config import ModelConfig


def rope_tables(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, [positions, head_dim / 2] each."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., d] rotated; cos and sin [..., d], the two halves of a row equal."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Gpt2(nn.Module):
    """nanoGPT's model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.max_position_embeddings, width)
        self.h = nn.ModuleList(Gpt2Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(width, eps=config.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x[:, :-1]), self.wte.weight)


class Gpt2Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.ln_1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.ln_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, config.intermediate_size),
                "c_proj": nn.Linear(config.intermediate_size, width),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (
            part.view(rows, length, self.heads, -1).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).split(width, dim=2)
        )
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](o.transpose(1, 2).reshape(rows, length, width))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        result: Tensor = x + self.mlp["c_proj"](hidden)
        return result


class Llama(nn.Module):
    """Llama's model, tied."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        cos, sin = rope_tables(config.max_position_embeddings, config.head_width, config.rope_theta)
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1))
        self.register_buffer("sin", torch.cat((sin, sin), dim=-1))

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.layers:
            x = block(x, cos, sin)
        return F.linear(self.norm(x[:, :-1]), self.embed_tokens.weight)


class LlamaBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_width
        self.head, self.group = head, config.num_attention_heads // config.kv_heads

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.input_layernorm = nn.RMSNorm(width, eps=config.norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(width, config.num_attention_heads * head),
                "k_proj": linear(width, config.kv_heads * head),
                "v_proj": linear(width, config.kv_heads * head),
                "o_proj": linear(config.num_attention_heads * head, width),
            }
        )
        self.post_attention_layernorm = nn.RMSNorm(width, eps=config.norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(width, config.intermediate_size),
                "up_proj": linear(width, config.intermediate_size),
                "down_proj": linear(config.intermediate_size, width),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        hidden = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[name](hidden).view(rows, length, -1, self.head).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rope(q, cos, sin), rope(k, cos, sin).repeat_interleave(self.group, dim=1)
        o = F.scaled_dot_product_attention(q, k, v.repeat_interleave(self.group, dim=1), is_causal=True)
        x = x + self.self_attn["o_proj"](o.transpose(1, 2).reshape(rows, length, -1))
        hidden = self.post_attention_layernorm(x)
        hidden = F.silu(self.mlp["gate_proj"](hidden)) * self.mlp["up_proj"](hidden)
        result: Tensor = x + self.mlp["down_proj"](hidden)
        return result


def build(config: ModelConfig) -> Gpt2 | Llama:
    """The torch model of a tied configuration.

    Raises:
        ValueError: naming the option that these two peers do not have.
    """
    if not config.tie_word_embeddings or config.qk_norm or config.sliding_window or config.rope_scaling:
        raise ValueError("the torch peers have no untied heads, q/k norm, sliding windows or rope_scaling")
    return Gpt2(config) if config.position == "learned" else Llama(config)


def training_step(
    model: nn.Module, tokens: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> Callable[[], tuple[Tensor, ...]]:
    """One step of nanoGPT's loop on tokens [B, T], int64; it returns the loss from before the update."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=betas,
        fused=True,
    )

    def step() -> tuple[Tensor, ...]:
        logits = model(tokens)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (loss.detach(),)

    return step


def cross_entropy_over_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Summed cross-entropy of a linear head, forward and backward: (loss, dx, dweight)."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = F.cross_entropy(F.linear(x, weight), targets, reduction="sum")
        return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))

    return step


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal scaled_dot_product_attention, [1, H, T, d]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / math.sqrt(q.shape[-1]))
