"""Short training runs: a base model, rows, what a finished run comes to, and runs that are killed and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from chats_for_tests import CHATML, save_tokenizer
from forked import Forker
from tutelage import Model, ModelConfig, Tokenizer
from tutelage.files import newest_complete
from tutelage.hub.model_card import Stage, read_lineage


def kill_rounds(few: int, many: int) -> pytest.MarkDecorator:
    """How often a test kills: `few` rounds in the slow tier, `many` in the long one, whose loops come to 500 kills."""
    return pytest.mark.parametrize(
        "rounds", [pytest.param(few, marks=pytest.mark.slow, id="few"), pytest.param(many, marks=pytest.mark.soak, id="many")]
    )


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


def overflow(model: Model) -> None:
    """Every weight stays a number (a folder with one that is not is refused), and no log-prob or reward is one."""
    with torch.no_grad():
        model.params.mul_(1e3)
        dict(model.named_parameters())["model.norm.weight"].fill_(3e38)


def done_to(folder: Path) -> list[Stage]:
    """What the card of a saved model says was done to it."""
    return list(read_lineage(folder).stages)


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


def uninterrupted(children: Forker, loop: str, options: dict[str, Any]) -> Whole:
    status, output = children.run("children:passed", loop=loop, config=options)
    assert status == 0, output
    points, operations = map(int, output.splitlines()[-1].split())
    return Whole(digest(Path(options["output_dir"]), options["max_steps"]), points, operations)


def killed_and_resumed(children: Forker, loop: str, options: dict[str, Any], kill: dict[str, int], **others: Any) -> str:
    """The digest of a run that is killed once and resumed."""
    status, output = children.run("children:train", loop=loop, config=options, **kill)
    assert status == -signal.SIGKILL, output
    status, output = children.run("children:train", loop=loop, config={**options, "resume": "auto"}, **others)
    assert status == 0, output
    return digest(Path(options["output_dir"]), options["max_steps"])
