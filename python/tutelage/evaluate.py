"""What a model has learned: on text it was never trained on, in its answers, against another model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tutelage.batch import PackedBatch, pack
from tutelage.data.compression import bits_per_byte
from tutelage.data.corpus import HeldOut
from tutelage.data.documents import DocumentSet
from tutelage.data.tokenizer import Tokenizer
from tutelage.model import Model
from tutelage.rollouts import Rollouts

Done = Callable[[int], None]
"""Is told after each part how many of the sequences are finished."""
Share = Callable[[PackedBatch, Callable[[PackedBatch], torch.Tensor]], torch.Tensor]
"""(batch, function of a batch) -> what the function gives for it; where ranks share the work, each does a part of the batch."""

# The normal distribution's 97.5 % quantile: 95 % lie between its two sides.
_Z = 1.959963984540054


def whole(batch: PackedBatch, compute: Callable[[PackedBatch], torch.Tensor]) -> torch.Tensor:
    """Nothing is shared."""
    return compute(batch)


def _told(parts: Iterable[PackedBatch], done: Done) -> Iterator[PackedBatch]:
    finished = 0
    for part in parts:
        yield part
        finished += len(part)
        done(finished)


def _from(before: int, done: Done) -> Done:
    return lambda finished: done(before + finished)


def _nobody(_: int) -> None:
    pass


def held_out_nats(model: Model, held_out: HeldOut, context: int, max_tokens: int, share: Share = whole) -> float:
    """Sum of −log p (natural logarithm) over every token of the documents, end tokens included.

    Documents longer than `context` tokens are read in consecutive windows, each of which starts fresh. At
    most `max_tokens` (≥ context) go through the model at once; neither that nor the number of threads changes
    a bit of the result.
    """
    return _nats(model, pack(held_out.sequences(context)), max_tokens, share)


def held_out_loss(model: Model, batch: PackedBatch, max_tokens: int, share: Share = whole) -> float:
    """Mean of −log p (natural logarithm) over the masked tokens of the whole batch.

    At most `max_tokens` tokens go through the model at once; neither that nor the number of threads changes a
    bit of the result.
    """
    return _nats(model, batch, max_tokens, share) / sum(batch.completion_counts)


def _nats(model: Model, batch: PackedBatch, max_tokens: int, share: Share = whole, done: Done = _nobody) -> float:
    def sums(own: PackedBatch) -> torch.Tensor:
        with torch.no_grad():
            parts = _told(own.split(max_tokens), done)
            return torch.cat([part.sum(model.score(part, completion_only=True).logprobs) for part in parts])

    return -math.fsum(share(batch, sums).tolist())


def sequence_rewards(model: Model, batch: PackedBatch, max_tokens: int, done: Done = _nobody) -> torch.Tensor:
    """The reward of each sequence, float32 [S]: the scalar head's value at its last token.

    At most `max_tokens` tokens, or the longest sequence, go through the model at once; neither that nor the number of
    threads changes a bit of the result.
    """
    with torch.no_grad():
        return torch.cat([part.last(model.values(part)) for part in _told(batch.split(max(max_tokens, *batch.lengths)), done)])


def mean_reward(model: Model, rollouts: Rollouts, max_tokens: int, share: Share = whole) -> float:
    """Mean over the rollouts of the reward model's value at an answer's last token. As `sequence_rewards`."""
    rewards = share(rollouts.pack(), lambda part: sequence_rewards(model, part, max_tokens)).tolist()
    return math.fsum(rewards) / len(rewards)


def load_reward_model(folder: str, tokenizer: Tokenizer, base: Model | None = None, device: str = "cpu") -> Model:
    """The reward model in `folder`. Raises ValueError for a language model and for one of another tokenizer.

    base: see `Model.from_pretrained`.
    """
    model = Model.from_pretrained(folder, device=device, base=base)
    if model.head != "scalar":
        raise ValueError(f"{folder} holds a language model, and rewards need a reward model: make one with `tutelage reward`")
    if model.tokenizer is None or model.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"the reward model {folder} has another tokenizer than the model, so it cannot read its answers")
    return model


def held_out_bits_per_byte(
    model: Model,
    sources: Iterable[HeldOut],
    context: int,
    max_tokens: int,
    share: Share = whole,
    done: Done = _nobody,
) -> dict[str, float]:
    """Bits per UTF-8 byte on the held-out documents of each source, by name, and of all of them as "all".

    Empty where nothing is held out.
    """
    sources = list(sources)
    if not sources:
        return {}
    nats, before = [], 0
    for source in sources:
        batch = pack(source.sequences(context))
        nats.append(_nats(model, batch, max_tokens, share, _from(before, done)))
        before += len(batch)
    bits = {source.name: bits_per_byte(cost, source.bytes) for source, cost in zip(sources, nats, strict=True)}
    return {**bits, "all": bits_per_byte(math.fsum(nats), sum(source.bytes for source in sources))}


def documents_to_score(documents: DocumentSet, tokenizer: Tokenizer) -> list[HeldOut]:
    """All documents of each source as tokens, an end token behind each.

    Raises ValueError for a tokenizer without an end token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("this tokenizer has no eos token, so the end of a document cannot be predicted")
    start = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found = []
    for index, source in enumerate(documents.sources):
        texts = tuple(document.text for document in documents.documents if document.source == index)
        tokens = tuple(np.array([*ids, eos], np.uint32) for ids in tokenizer.encode_batch(texts))
        found.append(HeldOut(source.name, texts, sum(len(text.encode()) for text in texts), tokens, start))
    return found


def exact_match(answer: str, expected: str) -> bool:
    """Whether the two are equal but for white space: runs of it count as one blank, none at the ends."""
    return answer.split() == expected.split()


@dataclass(frozen=True)
class Rate:
    """A mean of scores in 0 .. 1, with its 95 % Wilson interval (E. B. Wilson, 1927).

    The interval is made for scores of 0 and 1; for scores between it is too wide rather than too narrow.
    """

    rate: float
    low: float
    high: float
    count: int


def rate(scores: Sequence[float]) -> Rate:
    """The mean score: accuracy, or a win rate whose wins are 1, ties 0.5 and losses 0.

    Raises ValueError for no scores, or naming the one that is not in 0 .. 1.
    """
    if not scores:
        raise ValueError("there is no score to average")
    for index, score in enumerate(scores):
        if not 0 <= score <= 1:
            raise ValueError(f"score {index} must lie in 0 .. 1, but it is {score}")
    n, p = len(scores), math.fsum(scores) / len(scores)
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Rate(p, max(0.0, centre - half), min(1.0, centre + half), n)


@dataclass(frozen=True)
class Divergence:
    """KL(model ‖ reference) in nats, estimated from samples of the model."""

    per_token: float
    """Mean over all sampled tokens of log p − log p_ref."""
    per_sequence: float
    """Mean over sequences of its sum: unbiased for the divergence of whole answers."""
    standard_error: float | None
    """Of per_sequence; None for a single sequence."""
    sequences: int
    tokens: int


def kl_divergence(
    rollouts: Rollouts, reference: Model, temperature: float, max_tokens: int, done: Done = _nobody
) -> Divergence:
    """How far the model that sampled `rollouts`, at `temperature` and with nothing cut off, is from `reference`.

    Both distributions are those at `temperature`. At most `max_tokens` tokens, or the longest sequence, go through the
    reference at once; that changes no bit. Raises ValueError where there is no row, and as `Model.score`.
    """
    batch = rollouts.pack()
    counts = batch.completion_counts
    sums: list[float] = []
    with torch.no_grad():
        for part in _told(batch.split(max(max_tokens, *batch.lengths)), done):
            assert part.logprobs is not None  # a rollout has them
            known = reference.score(part, temperature, completion_only=True).logprobs
            sums += part.sum(part.logprobs.double() - known.double()).tolist()
    error = statistics.stdev(sums) / math.sqrt(len(sums)) if len(sums) > 1 else None
    total = math.fsum(sums)
    return Divergence(total / sum(counts), total / len(sums), error, len(sums), sum(counts))
