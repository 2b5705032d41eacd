"""What must hold for a published model, whatever folder it lies in: `python tests/python/real_model_for_tests.py FOLDER TEXT`.

The same checks run on a cut of random weights in test_real_model.py.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import tutelage as tl

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Give me three tips for better sleep.",
    "What is 12 + 7?",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "Name a fruit that is red.",
)


@dataclass(frozen=True)
class Figures:
    """Largest differences of the log-probs of single tokens, and greedy answers that are the same."""

    tokens: int
    ours_to_theirs: float
    ours_to_double: float
    theirs_to_double: float
    equal_answers: int
    answers: int


def measure(folder: Path, texts: Sequence[str], questions: Sequence[str] = QUESTIONS, new_tokens: int = 48) -> Figures:
    """Log-probs and greedy answers of ours beside transformers' in float32 and float64, on the same ids."""
    model = tl.Model.from_pretrained(folder)
    assert model.tokenizer is not None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    sequences = model.tokenizer.encode_batch(texts)
    with torch.no_grad():
        batch = tl.pack(sequences)
        ours = [model.score(batch).logprobs[begin + 1 : end].double() for begin, end in _bounds(batch)]
        single = [_logprobs(theirs, ids) for ids in sequences]
        answers, equal = 0, 0
        for question in questions:
            ids = model.tokenizer.chat_ids([{"role": "user", "content": question}], add_generation_prompt=True)
            answer = model.generate([ids], max_new_tokens=new_tokens, temperature=0).tokens[0].tolist()
            prompt = torch.tensor([ids])
            full = theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=model.eos_token_ids[0],
            )
            answers, equal = answers + 1, equal + (full[0, len(ids) :].tolist() == answer)
        theirs = theirs.double()
        double = [_logprobs(theirs, ids) for ids in sequences]
    return Figures(
        sum(map(len, ours)),
        _largest(ours, single),
        _largest(ours, double),
        _largest(single, double),
        equal,
        answers,
    )


def check(figures: Figures) -> None:
    """What the figures must be."""
    assert figures.ours_to_theirs < 2e-4, figures
    assert figures.ours_to_double <= 2 * figures.theirs_to_double, figures
    assert figures.equal_answers == figures.answers > 0, figures


def check_rollout(folder: Path, texts: Sequence[str], new_tokens: int = 24) -> None:
    """P2: the log-probs that generation reports are the bits of `score`, in batches of any size."""
    model = tl.Model.from_pretrained(folder)
    assert model.tokenizer is not None
    prompts = [ids[:20] for ids in model.tokenizer.encode_batch(texts[:4])]
    together = model.generate(prompts, max_new_tokens=new_tokens, samples_per_prompt=2, seed=3)
    batch = together.pack()
    assert batch.logprobs is not None
    with torch.no_grad():
        scored = model.score(batch).logprobs[batch.completion_mask]
    assert torch.equal(scored, batch.logprobs[batch.completion_mask])
    alone = model.generate(prompts[:1], max_new_tokens=new_tokens, seed=3)
    assert torch.equal(alone.tokens[0], together.tokens[0]) and torch.equal(alone.logprobs[0], together.logprobs[0])


def _bounds(batch: tl.PackedBatch) -> list[tuple[int, int]]:
    ends = batch.cu_seqlens.tolist()
    return list(itertools.pairwise(ends))


def _logprobs(model: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor(ids)
    logits = model(tokens[None]).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0].double()


def _largest(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def paragraphs(text: str, count: int, characters: int = 600) -> list[str]:
    """So many passages of whole sentences from all over a text."""
    found, current = [], ""
    for sentence in re.split(r"(?<=[.?!])\s+", text):
        current += sentence + " "
        if len(current) > characters:
            found.append(current.strip())
            current = ""
    return random.Random(5).sample(found, count)


if __name__ == "__main__":
    where, passages = Path(sys.argv[1]), paragraphs(Path(sys.argv[2]).read_text(), 20)
    result = measure(where, passages)
    print(result)
    check(result)
    check_rollout(where, passages)
    print("all hold")
