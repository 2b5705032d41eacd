"""What the tests of the loops that learn from rows share: a tiny base model, rows in a file, what a run ends with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chats_for_tests import CHATML, save_tokenizer
from tutelage import Model, ModelConfig, Tokenizer
from tutelage.files import newest_complete


def save_model(folder: Path, template: str | None = CHATML, seed: int = 0, **options: Any) -> Path:
    """A base model that has learned nothing."""
    save_tokenizer(folder, template)
    tokenizer = Tokenizer.from_pretrained(folder)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=options.get("head", "lm") == "lm",
    )
    model = Model(shape, seed=seed, **options)
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def weights(folder: Path) -> str:
    """SHA-256 of a saved model."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def digest(folder: Path, steps: int) -> str:
    """SHA-256 of all that a finished run must end with: newest checkpoint, model, tokenizer, metrics."""
    newest = newest_complete(folder)
    assert newest is not None and newest.name.startswith(f"step-{steps:08d}")
    content = hashlib.sha256()
    for path in [*sorted(newest.iterdir()), *sorted((folder / "model").iterdir()), folder / "metrics.jsonl"]:
        content.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return content.hexdigest()


@dataclasses.dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its digest, and what it passed on its way."""

    digest: str
    points: int
    operations: int
