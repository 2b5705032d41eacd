"""Generation: ``tutelage bench rollout``. Prefill as a fraction of the FMA peak, decoding as a fraction of the roofline."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tutelage.config import ModelConfig
from tutelage.model import Model
from tutelage.rollouts import Generation, GenerationSettings

from . import RolloutConfig, llama_cpp
from .ceilings import gauge
from .measure import OURS, Case, Measurement, Plan, Spread, measure, report
from .train import SMOLLM2_135M

PROMPT, NEW_TOKENS = 64, 128
WINDOW_SECONDS = 0.3  # of steps between two samples of the ceilings ...
LEAST_STEPS = 8  # ... and at least so many: a single step may be the one that touches new memory


def run(config: RolloutConfig) -> dict[str, Any]:
    """``tutelage bench rollout``; see :func:`tutelage.bench.run`."""
    if not config.batch or min(config.batch) < 1:
        raise ValueError(f"batch must name at least one number of sequences, each at least 1, but it is {config.batch}")
    plan = Plan(rounds=config.rounds)
    return report("rollout", plan, measurements(config, SMOLLM2_135M, plan), config.json)


def measurements(config: RolloutConfig, shape: ModelConfig, plan: Plan) -> Iterator[Measurement]:
    """Prefill, then decoding at every batch size, for each kind of weights."""
    for weights in config.weights:
        model = Model(shape, weights=weights)
        yield prefill(model, plan)
        with tempfile.TemporaryDirectory() as folder:
            peers = installed_peers(model, Path(folder)) if config.peers else {}
            if config.lora_rank:
                peers[f"adapter of rank {config.lora_rank}"] = partial(_adapted, model.with_lora(config.lora_rank))
            for batch in config.batch:
                yield decoding(model, peers, batch, plan)
        model.free_caches()


Peer = Callable[[int], AbstractContextManager[Callable[[], float]]]
"""Of a batch size, for a `with`: one measurement of decoded tokens a second."""


def installed_peers(model: Model, folder: Path) -> dict[str, Peer]:
    """transformers in float32 (its bfloat16 is many times slower on a CPU), llama.cpp at the width of the model's weights."""
    peers: dict[str, Peer] = {}
    if importlib.util.find_spec("transformers") is not None:
        peers["transformers"] = partial(_transformers, transformers_model(model), model.config)
    if llama_cpp.installed():
        for kind in ("F32",) if model.weights == "float32" else ("F16", "BF16"):
            llama_cpp.write_gguf(model, folder / f"{kind}.gguf", kind)
            peers[f"llama.cpp {kind}"] = partial(_llama_cpp, folder / f"{kind}.gguf", model.config)
    return peers


@contextmanager
def _transformers(theirs: Any, config: ModelConfig, batch: int) -> Iterator[Callable[[], float]]:
    yield partial(peer_rate, theirs, config, batch)


@contextmanager
def _adapted(model: Model, batch: int) -> Iterator[Callable[[], float]]:
    windows = Windows(model, batch)

    def rate() -> float:
        steps, seconds, _ = windows.window()
        return batch * steps / seconds

    yield rate


@contextmanager
def _llama_cpp(path: Path, config: ModelConfig, batch: int) -> Iterator[Callable[[], float]]:
    with llama_cpp.LlamaCpp(path, batch, PROMPT + NEW_TOKENS + 2, torch.get_num_threads()) as theirs:
        yield partial(theirs.rate, prompts_of(config, batch, PROMPT), NEW_TOKENS, WINDOW_SECONDS, LEAST_STEPS)


def prompts_of(config: ModelConfig, batch: int, length: int) -> list[list[int]]:
    """Random, all different."""
    generator = torch.Generator().manual_seed(batch)
    return [[int(i) for i in row] for row in torch.randint(config.vocab_size, (batch, length), generator=generator)]


def flops_of_token(model: Model, context: float) -> float:
    """Of one token behind `context` earlier ones, the head included: 2 a weight, 4 a position and query feature."""
    c = model.config
    matrices = sum(torch.Size(shape).numel() for _, _, shape, matrix in model._engine.parameters() if matrix)
    if not c.tie_word_embeddings:
        matrices -= c.vocab_size * c.hidden_size  # a look-up is no product
    return 2.0 * matrices + 4.0 * c.num_hidden_layers * c.num_attention_heads * c.head_width * context


def bytes_of_step(model: Model, batch: int, context: float) -> float:
    """Weights once, keys and values of every sequence."""
    c = model.config
    heads = c.num_key_value_heads or c.num_attention_heads
    return model._packed_weights().bytes + batch * context * 8.0 * c.num_hidden_layers * heads * c.head_width


def flops_of_prompts(model: Model, sequences: int, length: int) -> float:
    """Of reading prompts, up to each one's first token; the head works for the last position only."""
    head = 2.0 * model.config.vocab_size * model.config.hidden_size
    return sequences * length * (flops_of_token(model, length / 2) - head) + sequences * head


def prefill(model: Model, plan: Plan, sequences: int = 4, length: int = 512) -> Measurement:
    """Reading prompts; see :func:`flops_of_prompts`."""
    prompts = prompts_of(model.config, sequences, length)
    flops = flops_of_prompts(model, sequences, length)

    def ours() -> tuple[torch.Tensor, ...]:
        return tuple(model.generate(prompts, 1, stop_token_ids=[]).tokens)

    shape = f"{sequences}x{length} {model.weights}"
    return measure(Case("rollout", "prefill", shape, "GFLOP/s", flops, {OURS: ours}), plan, torch.get_num_threads())


def transformers_model(model: Model) -> Any:
    """The same weights in the peer's class."""
    transformers = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def decoding(model: Model, peers: Mapping[str, Peer], batch: int, plan: Plan) -> Measurement:
    """Windows of decoding steps of ours, each between two samples of both ceilings; the peers' in turn."""
    threads = torch.get_num_threads()
    peak, read = gauge("GFLOP/s", threads, plan.seconds / 2), gauge("GB/s", threads, plan.seconds / 2)
    ours = Windows(model, batch)
    rates: dict[str, list[float]] = {OURS: []}
    fractions: dict[str, list[float]] = {OURS: []}
    rooflines: list[float] = []
    ratios: dict[str, list[float]] = {}
    with ExitStack() as stack:
        theirs = {name: stack.enter_context(peer(batch)) for name, peer in peers.items()}
        for _ in range(plan.rounds):
            before = peak(), read()
            steps, seconds, context = ours.window()
            flops_s, bytes_s = (1e9 * statistics.mean(pair) for pair in zip(before, (peak(), read()), strict=True))
            limit = max(bytes_of_step(model, batch, context) / bytes_s, batch * flops_of_token(model, context) / flops_s)
            rooflines.append(batch / limit)
            rates[OURS].append(batch * steps / seconds)
            fractions[OURS].append(limit * steps / seconds)
            for name, rate_of in theirs.items():
                time.sleep(plan.settle)
                rate = rate_of()
                rates.setdefault(name, []).append(rate)
                fractions.setdefault(name, []).append(rate * limit / batch)
                ratios.setdefault(name, []).append(rates[OURS][-1] / rate)
    return Measurement(
        "rollout",
        "decode",
        f"batch {batch} {model.weights}",
        "tokens/s",
        Spread.of(rooflines),
        {name: Spread.of(samples) for name, samples in rates.items()},
        {name: Spread.of(samples) for name, samples in fractions.items()},
        {name: Spread.of(samples) for name, samples in ratios.items()},
        {},
    )


class Windows:
    """Decoding of `batch` sequences, prompt 64, up to 128 new tokens, then again from the start."""

    def __init__(self, model: Model, batch: int) -> None:
        self._model, self._batch = model, batch
        self._start()

    def _start(self) -> None:
        settings = GenerationSettings(NEW_TOKENS, stop_token_ids=[])
        self._generation = Generation(self._model, prompts_of(self._model.config, self._batch, PROMPT), settings)
        while self._generation.prefilled < self._batch * PROMPT:
            self._generation.step()
        self._left = NEW_TOKENS - 2 - -(-self._batch * PROMPT // 512)  # the first rows have decoded meanwhile

    def window(self) -> tuple[int, float, float]:
        """(steps, seconds, mean context) of some steps in which every sequence got a token."""
        if self._left < LEAST_STEPS:
            self._start()
        first, begin = self._left, time.perf_counter()
        while self._left > 0 and (first - self._left < LEAST_STEPS or time.perf_counter() - begin < WINDOW_SECONDS):
            self._generation.step()
            self._left -= 1
        seconds, steps = time.perf_counter() - begin, first - self._left
        return steps, seconds, PROMPT + NEW_TOKENS - first + steps / 2


class Clock:
    """A streamer of transformers: when the prompts and each step's tokens were there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def peer_rate(theirs: Any, config: ModelConfig, batch: int, steps: int = LEAST_STEPS) -> float:
    """Tokens a second of transformers' generate: `steps` tokens, from the moment of the one before them."""
    ids = torch.tensor(prompts_of(config, batch, PROMPT))
    clock = Clock()
    theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=steps + 1,
        max_new_tokens=steps + 1,
        do_sample=True,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
    )
    if len(clock.times) != steps + 2:
        raise RuntimeError(f"transformers' generate reported {len(clock.times)} times, not the prompts and {steps + 1} tokens")
    return batch * steps / (clock.times[-1] - clock.times[1])
