"""Work without gradients that ranks share: passes over a batch, answers to prompts. Every rank gets all of what comes of it.

What comes of a sequence, and which answer is drawn to a prompt, depends on neither the batch nor the rank (P1, P3), so all
this has the same bits for any number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage import dealing
from tutelage.batch import PackedBatch
from tutelage.distributed import Ranks
from tutelage.model import Model
from tutelage.rollouts import Rollouts


def shared(ranks: Ranks, batch: PackedBatch, compute: Callable[[PackedBatch], Tensor]) -> Tensor:
    """What `compute` gives for the batch, a vector: of every token or of every sequence, in their order."""
    if ranks.count == 1:
        return compute(batch)
    own = dealing.deal(batch.lengths, ranks.count)[ranks.rank]
    return ranks.gather([compute(batch.part(own))] if len(own) else [])


def answers(
    ranks: Ranks, model: Model, prompts: Sequence[Sequence[int]], longest: int, samples: int = 1, **settings: Any
) -> Rollouts:
    """What `model.generate` gives for the prompts, to the bit. longest: tokens of an answer. settings: see there."""
    if ranks.count == 1:
        return model.generate(prompts, longest, samples, **settings)
    own = dealing.deal([len(prompt) + longest for prompt in prompts], ranks.count)[ranks.rank]
    # Equal prompts are samples of one: those before mine are other ranks'.
    before = Counter(tuple(prompt) for prompt in prompts[: own.start])
    firsts = [samples * before[tuple(prompt)] for prompt in prompts[own.start : own.stop]]
    drawn = None
    if len(own):
        drawn = model.generate(prompts[own.start : own.stop], longest, samples, first_sample=firsts, **settings)
    told = ranks.exchange(None if drawn is None else [drawn.lengths, drawn.finish_reasons, drawn.texts])
    some = [entry for entry in told if entry is not None]
    lengths = [length for entry in some for length in entry[0]]

    def whole(rows: list[Tensor] | None) -> list[Tensor]:
        return list(torch.split(ranks.gather([torch.cat(rows)] if rows else []), lengths))

    return Rollouts(
        [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts for _ in range(samples)],
        whole(None if drawn is None else drawn.tokens),
        whole(None if drawn is None else drawn.logprobs),
        whole(None if drawn is None else drawn.support_logprobs),
        [reason for entry in some for reason in entry[1]],
        None if some[0][2] is None else [text for entry in some for text in entry[2]],
    )
