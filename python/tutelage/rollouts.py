"""Generation: prompts in, completions with their log-probs out, by the same kernels that train.

What a row becomes depends on the weights, its prompt, its settings, the seed and its sample index alone: not on the other
rows, their order, the threads, or how prompts are cut into chunks. Its log-probs are the bits that ``model.score`` gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tutelage.batch import PackedBatch, pack

if TYPE_CHECKING:
    from tutelage.model import Model

FinishReason = Literal["stop", "length", "string", "interrupted"]

PREFILL_CHUNK = 512
"""Tokens of prompts that go through the model in one step: enough that arithmetic, not memory, is the limit."""
MAX_SEQUENCES = 256
"""Sequences in flight: twice what it takes to make a step's products arithmetic-bound."""


@dataclass(frozen=True)
class Rollouts:
    """Completions. Row = prompt index x samples_per_prompt + sample index; every list has one entry a row.

    Attributes:
        prompts: int32 vectors.
        tokens: int32 vectors, the completions; a stop token is part of them.
        logprobs: float32 vectors, log p of every token at the sampling temperature (at 1 for greedy): the bits of ``score``.
        support_logprobs: float32 vectors, log p within what top_k, top_p and min_p left; for information, ``score`` cannot
            give them. The same as ``logprobs`` where nothing was cut.
        finish_reasons: "stop" (a stop token), "string" (a stop string), "length" (max_new_tokens or the context is full),
            "interrupted".
        texts: the completions as text, without the stop token and from the stop string on cut off; None without a tokenizer.
    """

    prompts: list[Tensor]
    tokens: list[Tensor]
    logprobs: list[Tensor]
    support_logprobs: list[Tensor]
    finish_reasons: list[FinishReason]
    texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [row.numel() for row in self.tokens]

    def select(self, rows: Sequence[int]) -> Rollouts:
        """These rows only."""
        return Rollouts(
            [self.prompts[row] for row in rows],
            [self.tokens[row] for row in rows],
            [self.logprobs[row] for row in rows],
            [self.support_logprobs[row] for row in rows],
            [self.finish_reasons[row] for row in rows],
            None if self.texts is None else [self.texts[row] for row in rows],
        )

    def pack(self) -> PackedBatch:
        """The batch that training takes: prompt + completion of every row, a mask over the completions, and the rollout's own
        log-probs (0 outside the mask).

        Raises:
            ValueError: there is no row.
        """
        masks = [
            torch.cat([torch.zeros(prompt.numel(), dtype=torch.bool), torch.ones(row.numel(), dtype=torch.bool)])
            for prompt, row in zip(self.prompts, self.tokens, strict=True)
        ]
        batch = pack([torch.cat(parts) for parts in zip(self.prompts, self.tokens, strict=True)], masks)
        logprobs = torch.zeros(batch.tokens.numel())
        logprobs[batch.completion_mask] = torch.cat(self.logprobs)
        return PackedBatch(batch.tokens, batch.cu_seqlens, batch.completion_mask, logprobs)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a generation. ``partial`` holds what was generated so far: rows that were not finished have the finish
    reason "interrupted"."""

    def __init__(self, partial: Rollouts) -> None:
        done = sum(reason != "interrupted" for reason in partial.finish_reasons)
        super().__init__(f"interrupted after {done} of {len(partial)} rows")
        self.partial = partial


@dataclass(frozen=True)
class StreamedToken:
    """One token as it comes.

    Attributes:
        row: prompt index x samples_per_prompt + sample index.
        token, logprob: as in :class:`Rollouts`.
        finish_reason: None while the row goes on.
    """

    row: int
    token: int
    logprob: float
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class GenerationSettings:
    """What :meth:`Model.generate` was asked for; its docstring explains the fields."""

    max_new_tokens: int | Sequence[int] = 128
    samples_per_prompt: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: Sequence[int] | None = None
    stop_strings: Sequence[str] = ()
    seed: int | Sequence[int] = 0
    prefill_chunk: int = PREFILL_CHUNK
    kv_cache_bytes: int | None = None
    share_prefixes: bool = True
    first_sample: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt must be at least 1, but it is {self.samples_per_prompt}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, but it is {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, but it is {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], but it is {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], but it is {self.min_p}")
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, but it is {self.prefill_chunk}")
        if any(not text for text in self.stop_strings):
            raise ValueError("a stop string is empty; it would stop every row at once")


class Generation:
    """Requests on their way: what :meth:`Model.generate` and :meth:`Model.generate_stream` drive.

    Raises:
        ValueError: naming the prompt that is empty, too long, holds an id outside the vocabulary, or can never fit
            ``kv_cache_bytes``; text prompts or stop strings without a tokenizer; a scalar head; a float64 model.
    """

    def __init__(self, model: Model, prompts: Sequence[str | Sequence[int] | Tensor], settings: GenerationSettings) -> None:
        if model.dtype != torch.float32:
            raise ValueError(f"generation needs a float32 model, but this one is {model.dtype}; it is for gradient checks")
        ids = [_ids(model, row, prompt) for row, prompt in enumerate(prompts)]
        limits = _per_prompt("max_new_tokens", settings.max_new_tokens, len(ids), least=1)
        seeds = _per_prompt("seed", settings.seed, len(ids), least=0)
        firsts = _per_prompt("first_sample", settings.first_sample, len(ids), least=0)
        stop_ids = list(model.eos_token_ids if settings.stop_token_ids is None else settings.stop_token_ids)
        for number in stop_ids:
            if not 0 <= number < model.config.vocab_size:
                raise ValueError(f"stop_token_ids holds {number}, but the vocabulary has {model.config.vocab_size} ids")
        stop_bytes = [text.encode() for text in settings.stop_strings]
        spelling: list[bytes] = []
        if stop_bytes:
            if model.tokenizer is None:
                raise ValueError("stop_strings need a tokenizer, but this model has none (model.tokenizer)")
            spelling = model.tokenizer.token_bytes()
            spelling += [b""] * (model.config.vocab_size - len(spelling))
        budget = model._on.free_memory() // 2 if settings.kv_cache_bytes is None else settings.kv_cache_bytes
        options = model._on.core.GeneratorOptions(
            budget, settings.prefill_chunk, MAX_SEQUENCES, settings.share_prefixes, torch.get_num_threads()
        )
        self._model = model
        self._stop_strings = stop_bytes
        self._prompts = [torch.tensor(prompt, dtype=torch.int32) for prompt in ids for _ in range(settings.samples_per_prompt)]
        self._generator = model._engine.generator(model._weights(), *model._streams(), options, spelling)
        before: Counter[tuple[int, tuple[int, ...]]] = Counter()  # equal prompts are further samples of one prompt
        for prompt, limit, seed, first in zip(ids, limits, seeds, firsts, strict=True):
            same = (seed, tuple(prompt))
            for _ in range(settings.samples_per_prompt):
                self._generator.add(
                    prompt,
                    limit,
                    settings.temperature,
                    settings.top_k,
                    settings.top_p,
                    settings.min_p,
                    seed,
                    first + before[same],
                    stop_ids,
                    stop_bytes,
                )
                before[same] += 1

    def step(self) -> bool:
        """Runs every token that is due through the model; False when nothing is left to do.

        Raises:
            Interrupted: Ctrl-C.
            RuntimeError: the logits are not finite, naming prompt and position.
        """
        try:
            return self._generator.step()
        except KeyboardInterrupt:
            raise Interrupted(self.rollouts()) from None

    def streamed(self) -> Iterator[StreamedToken]:
        """The tokens of the last step."""
        for row in self._generator.advanced:
            tokens, logprobs, _, reason = self._generator.completion(row)
            yield StreamedToken(row, tokens[-1], logprobs[-1], None if reason == "running" else _reason(reason))

    @property
    def prefilled(self) -> int:
        """Tokens of prompts computed so far (shared beginnings once)."""
        return self._generator.prefilled

    def rollouts(self) -> Rollouts:
        """What there is so far."""
        rows = [self._generator.completion(row) for row in range(len(self._prompts))]
        tokenizer = self._model.tokenizer
        return Rollouts(
            self._prompts,
            [torch.tensor(row[0], dtype=torch.int32) for row in rows],
            [torch.tensor(row[1], dtype=torch.float32) for row in rows],
            [torch.tensor(row[2], dtype=torch.float32) for row in rows],
            [_reason(row[3]) for row in rows],
            None if tokenizer is None else [self._text(row[0], row[3]) for row in rows],
        )

    def _text(self, tokens: list[int], reason: str) -> str:
        tokenizer = self._model.tokenizer
        assert tokenizer is not None
        if reason == "stop":
            return tokenizer.decode(tokens[:-1], errors="replace")
        text = tokenizer.decode(tokens, errors="replace")
        if reason == "string":
            spelled = text.encode()
            starts = [at for at in (spelled.find(stop) for stop in self._stop_strings) if at >= 0]
            return spelled[: min(starts)].decode() if starts else text
        return text


def _reason(name: str) -> FinishReason:
    return "interrupted" if name == "running" else name  # type: ignore[return-value]


def _ids(model: Model, row: int, prompt: str | Sequence[int] | Tensor) -> list[int]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(f"prompt {row} is text, but this model has no tokenizer (model.tokenizer); pass token ids")
        return model.tokenizer.encode(prompt)
    ids = [int(number) for number in prompt]
    for position, number in enumerate(ids):  # the engine names an id outside the vocabulary, if it is an int32 at all
        if not -(2**31) <= number < 2**31:
            raise ValueError(f"prompt {row} holds {number} at position {position}, which is no token id")
    return ids


def _per_prompt(name: str, value: int | Sequence[int], prompts: int, least: int) -> list[int]:
    values = [int(entry) for entry in value] if isinstance(value, Iterable) else [int(value)] * prompts
    if len(values) != prompts:
        raise ValueError(f"{name} must be one number or one for every prompt ({prompts}), but there are {len(values)}")
    for row, entry in enumerate(values):
        if not least <= entry < 2**63:
            raise ValueError(f"{name} must be at least {least}, but for prompt {row} it is {entry}")
    return values
