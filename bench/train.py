"""Whole training steps: ``tutelage bench train``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tutelage import _core
from tutelage.batch import pack
from tutelage.config import ModelConfig
from tutelage.model import Model
from tutelage.objectives import cross_entropy
from tutelage.optimizer import AdamW

from . import TrainConfig, peers
from .measure import OURS, Case, Measurement, Plan, measure, report
from .memory import peak_bytes

Run = Callable[[], tuple[Tensor, ...]]
LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1


def gpt2(vocab_size: int, width: int, layers: int, heads: int, positions: int = 1024) -> ModelConfig:
    """GPT-2's architecture, tied, with biases."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        norm="layernorm",
        position="learned",
        mlp="gelu",
        attention_bias=True,
        mlp_bias=True,
    )


GPT2_124M = gpt2(50257, 768, 12, 12)
SMALL_12M = gpt2(4096, 384, 6, 6, positions=256)
SMOLLM2_135M = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    rope_theta=1e5,
)


@dataclass(frozen=True)
class TrainShape:
    """A model and the sequences x tokens of one step."""

    config: ModelConfig
    sequences: int
    length: int


SHAPES = {
    "gpt2-124m-4x64": TrainShape(GPT2_124M, 4, 64),
    "gpt2-124m-4x256": TrainShape(GPT2_124M, 4, 256),
    "gpt2-124m-1x1024": TrainShape(GPT2_124M, 1, 1024),
    "12m-16x256": TrainShape(SMALL_12M, 16, 256),
    "smollm2-135m-2x512": TrainShape(SMOLLM2_135M, 2, 512),
}


def model_flops(config: ModelConfig, parameters: int, sequences: int, length: int) -> float:
    """Flops of one step as the field counts them: 6 N tokens + 6 L C T tokens.

    N counts the embedding (once, where it is tied), C is heads x head_dim. The second term is attention's:
    4 L C T flops a token forward, three times that with the backward, half of it for the causal mask.
    """
    tokens = sequences * length
    width = config.num_attention_heads * config.head_width
    return 6.0 * parameters * tokens + 6.0 * config.num_hidden_layers * width * length * tokens


def our_step(model: Model, tokens: Tensor) -> Run:
    """One step on tokens [B, T]; it returns the loss from before the update."""
    optimizer = AdamW(model, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    batch = pack(list(tokens))
    targets = sum(batch.completion_counts)

    def step() -> tuple[Tensor, ...]:
        loss = cross_entropy(model.score(batch).logprobs, batch.completion_mask, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach(),)

    return step


def _tokens(shape: TrainShape) -> Tensor:
    size = (shape.sequences, shape.length)
    return torch.randint(shape.config.vocab_size, size, generator=torch.Generator().manual_seed(0))


def _contender(name: str, shape: TrainShape) -> Run:
    if name == OURS:
        return our_step(Model(shape.config), _tokens(shape))
    return peers.training_step(peers.build(shape.config), _tokens(shape), LR, BETAS, WEIGHT_DECAY)


def two_steps(name: str, config: dict[str, Any], sequences: int, length: int) -> Callable[[], None]:
    """For the peak of memory: the model, its optimizer and two steps of it."""

    def work() -> None:
        step = _contender(name, TrainShape(ModelConfig.from_dict(config), sequences, length))
        step()
        step()

    return work


def measurement(name: str, shape: TrainShape, plan: Plan, with_peers: bool, memory: bool) -> Measurement:
    """Steps of ours and of torch's in turn, tokens a second of each, and their peak memory."""
    threads = torch.get_num_threads()
    names = [OURS, "torch"] if with_peers else [OURS]
    parameters = _core.Transformer(shape.config.core_fields("lm")).size
    flops = model_flops(shape.config, parameters, shape.sequences, shape.length)
    contenders = {contender: _contender(contender, shape) for contender in names}
    m = measure(Case("train", "step", name, "GFLOP/s", flops, contenders), plan, threads)
    to_tokens = 1e9 * shape.sequences * shape.length / flops
    extra: dict[str, dict[str, Any]] = {"tokens/s": {contender: rate.scaled(to_tokens) for contender, rate in m.rates.items()}}
    del contenders  # two models less beside the processes that follow
    if memory:
        arguments = (shape.config.to_dict(), shape.sequences, shape.length)
        extra["peak GiB"] = {n: peak_bytes(two_steps, n, *arguments, threads=threads) / 2**30 for n in names}
    return replace(m, extra=extra)


def run(config: TrainConfig) -> dict[str, Any]:
    """``tutelage bench train``; see :func:`tutelage.bench.run`."""
    for name in config.shapes:
        if name not in SHAPES:
            raise ValueError(f"there is no shape {name!r} to train; there are {', '.join(SHAPES)}")
    plan = Plan(rounds=config.steps)
    chosen = {name: SHAPES[name] for name in config.shapes or tuple(SHAPES)}
    return report("train", plan, measurements(chosen, plan, config.peers, config.memory), config.json)


def measurements(shapes: dict[str, TrainShape], plan: Plan, with_peers: bool, memory: bool) -> Iterator[Measurement]:
    """One measurement a shape."""
    for name, shape in shapes.items():
        yield measurement(name, shape, plan, with_peers, memory)
