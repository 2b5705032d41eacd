"""The whole real model against `transformers`, and rollouts against scores: `python -m pytest examples/test_smollm2.py`.

Under a minute on two cores, 3 GiB; downloads the packages into runs/packages where they are not. The suite in tests/python
has the same on small models, without a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from common.model import smollm2
from common.plain import articles
from tutelage import Model, pack

PACKAGES = Path("runs/packages")
PARAGRAPHS, TOKENS = 20, 128
QUESTIONS = ("What is the capital of France?", "Write a haiku about rain.", "Why is the sky blue?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2(PACKAGES, made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    yield Model.from_pretrained(folder)


def paragraphs(model: Model) -> list[list[int]]:
    assert model.tokenizer is not None
    return [model.tokenizer.encode(text)[:TOKENS] for text in articles(PACKAGES)[:PARAGRAPHS]]


def their_logprobs(folder: Path, sequences: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = []
    with torch.no_grad():
        for ids in sequences:
            tokens = torch.tensor(ids)
            logprobs = theirs(tokens[None]).logits[0, :-1].log_softmax(-1)
            found.append(logprobs.gather(1, tokens[1:, None])[:, 0].double())
    return found


def test_logprobs_are_those_of_transformers(folder: Path, model: Model) -> None:
    sequences = paragraphs(model)
    batch = pack(sequences)
    with torch.no_grad():
        scored = torch.split(model.score(batch).logprobs.double(), batch.lengths)
    single, double = (their_logprobs(folder, sequences, dtype) for dtype in (torch.float32, torch.float64))
    ours = [logprobs[1:] for logprobs in scored]
    apart, from_exact, their_own = (
        max(float((one - other).abs().max()) for one, other in zip(*pair, strict=True))
        for pair in ((ours, single), (ours, double), (single, double))
    )
    print(f"to transformers float32 {apart:.2e}, to float64 {from_exact:.2e}; transformers' own {their_own:.2e}")
    assert apart <= 2e-4
    assert from_exact <= 2 * their_own


def test_greedy_answers_are_those_of_transformers(folder: Path, model: Model) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.chat_ids([{"role": "user", "content": question}], True) for question in QUESTIONS]
    ours = model.generate(prompts, 32, temperature=0.0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = transformers.AutoTokenizer.from_pretrained(folder)
    for question, prompt, answer in zip(QUESTIONS, prompts, ours.tokens, strict=True):
        rendered = own.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        assert own(rendered, add_special_tokens=False).input_ids == prompt
        given = torch.tensor([prompt])
        found = theirs.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=32, do_sample=False)
        assert found[0, len(prompt) :].tolist() == answer.tolist(), question


def test_a_rollout_has_the_bits_of_its_score(model: Model) -> None:
    prompts = [ids[:length] for ids, length in zip(paragraphs(model), (3, 17, 40, 64, 65), strict=False)]
    together = model.generate(prompts, 24, samples_per_prompt=2, seed=3)
    batch = together.pack()
    with torch.no_grad():
        scored = model.score(batch).logprobs
    assert batch.logprobs is not None
    mask = batch.completion_mask
    assert scored[mask].numpy().tobytes() == batch.logprobs[mask].numpy().tobytes()
    alone = model.generate(prompts[2:3], 24, samples_per_prompt=2, seed=3, prefill_chunk=7)
    for row in (0, 1):
        assert alone.tokens[row].tolist() == together.tokens[4 + row].tolist()
        assert alone.logprobs[row].numpy().tobytes() == together.logprobs[4 + row].numpy().tobytes()
    other = model.generate(prompts, 24, samples_per_prompt=2, seed=4)  # the comparison can fail
    assert [tokens.tolist() for tokens in other.tokens] != [tokens.tolist() for tokens in together.tokens]
