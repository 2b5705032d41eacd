"""What must hold for published models, on a cut of SmolLM2's shape with random weights.

Whole: `python tests/python/real_model_for_tests.py FOLDER TEXT`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import tutelage as tl
from chats_for_tests import CHATML, plain_tokenizer, with_template
from real_model_for_tests import check, check_rollout, measure

SMOLLM2 = tl.ModelConfig(
    vocab_size=len(plain_tokenizer().backend.get_vocab()),
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    rope_theta=1e5,
)
TEXTS = [
    "The world says hello to a user. " * 9,
    "What is this? It is so, said the assistant; " * 8,
    "naïve 猫 🙂" * 15,
    "a\n\nb  c hello",
    "so it says, the system of this world " * 10,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tl.Model(SMOLLM2, seed=1)
    noise = torch.randn(model.params.numel(), generator=torch.Generator().manual_seed(2))
    model.params += 0.05 * noise
    model.tokenizer = with_template(CHATML)
    path = tmp_path_factory.mktemp("cut")
    model.save_pretrained(path)
    return path


def test_a_cut_is_transformers_model(folder: Path) -> None:
    figures = measure(folder, TEXTS, ["hello?", "what is it"], new_tokens=12)
    check(figures)
    assert figures.tokens > 300
    for wrong in (
        {"ours_to_theirs": 3e-4},
        {"ours_to_double": 2.1 * figures.theirs_to_double},
        {"equal_answers": 1},
        {"answers": 0, "equal_answers": 0},
    ):
        with pytest.raises(AssertionError):
            check(dataclasses.replace(figures, **wrong))  # type: ignore[arg-type]


def test_a_wrong_weight_is_noticed(folder: Path, tmp_path: Path) -> None:
    """Control: rows of q and k in llama.cpp's order move the log-probs far beyond the bound."""
    model = tl.Model.from_pretrained(folder)
    with torch.no_grad():
        right = model.score(tl.pack([model.tokenizer.encode(TEXTS[0])])).logprobs  # type: ignore[union-attr]
        q = dict(model.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
        q.copy_(q.clone().view(9, 2, 32, 576).transpose(1, 2).reshape(576, 576))
        wrong = model.score(tl.pack([model.tokenizer.encode(TEXTS[0])])).logprobs  # type: ignore[union-attr]
    assert (right - wrong).abs().max() > 0.1


def test_a_cut_generates_the_bits_of_score(folder: Path) -> None:
    check_rollout(folder, TEXTS, new_tokens=8)
