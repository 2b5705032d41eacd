"""What the tests of PPO and GRPO share: models that end their answers, prompts, and a run that is watched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runs_for_tests import save_model, write_rows
from tutelage import AdamW, Model, Rollouts
from tutelage.files import newest_complete
from tutelage.train import experience
from tutelage.train.experience import Episodes

ANSWER = 10
"""Longest answer."""


def save_policy(folder: Path, seed: int = 0) -> Path:
    """A language model that has learned nothing, of whose tokens a good tenth end an answer."""
    model = Model.from_pretrained(save_model(folder, seed=seed))
    model.eos_token_ids = tuple(range(0, 40))
    model.save_pretrained(folder)
    return folder


def save_judge(folder: Path, seed: int = 3, bias: float = 0.0) -> Path:
    """A reward model whose rewards lie well apart."""
    model = Model.from_pretrained(save_model(folder, seed=seed, head="scalar"))
    with torch.no_grad():
        model.params.mul_(2)
    model.reward_bias = bias
    model.save_pretrained(folder)
    return folder


def prompts() -> list[dict[str, Any]]:
    return [{"prompt": f"{'say ' * (i % 4)}{i}", "number": i} for i in range(24)]


def save_prompts(folder: Path) -> Path:
    return write_rows(folder / "prompts.jsonl", prompts())


@dataclasses.dataclass(frozen=True)
class Update:
    """A step of an optimizer: of which head, from which weights by which gradient, and what else there was."""

    head: str
    params: Tensor
    grads: Tensor
    after: Tensor
    lr: float
    eps: float
    max_grad_norm: float | None


@dataclasses.dataclass
class Watched:
    """What a run did."""

    answers: list[Episodes] = dataclasses.field(default_factory=list)
    """Of each step."""
    drawn: list[Rollouts] = dataclasses.field(default_factory=list)
    """Every answer, also those that were left out."""
    updates: list[Update] = dataclasses.field(default_factory=list)
    calls: dict[str, list[tuple[Any, ...]]] = dataclasses.field(default_factory=dict)
    """Name -> (arguments, result) of each call of the functions that were to be watched."""
    forwards: list[tuple[str, str, bool]] = dataclasses.field(default_factory=list)
    """(head, id of the model, with gradient) of each forward."""

    def of(self, head: str) -> list[Update]:
        return [update for update in self.updates if update.head == head]


@contextmanager
def watching(module: Any, *names: str) -> Iterator[Watched]:
    """Watches a loop's module, its optimizers and every forward, for a `with`."""
    watched = Watched()
    with pytest.MonkeyPatch.context() as patch:

        def watch(name: str, function: Any) -> Any:
            def called(*arguments: Any, **others: Any) -> Any:
                result = function(*arguments, **others)
                watched.calls.setdefault(name, []).append((arguments, result))
                return result

            return called

        for name in names:
            patch.setattr(module, name, watch(name, getattr(module, name)))
        gather, step, score, values, scores = (
            module.gather,
            AdamW.step,
            Model.score,
            Model.values,
            experience.Judge.scores,
        )

        def gathered(*arguments: Any, **others: Any) -> Episodes | None:
            found: Episodes | None = gather(*arguments, **others)
            if found is not None:
                watched.answers.append(found)
            return found

        def judged(judge: Any, rows: Any, rollouts: Rollouts) -> Any:
            watched.drawn.append(rollouts)
            return scores(judge, rows, rollouts)

        def stepped(optimizer: AdamW) -> float:
            model = optimizer.model
            before, grads = model.params.clone(), model.grads.clone()
            norm = step(optimizer)
            options = optimizer.lr, optimizer.eps, optimizer.max_grad_norm
            watched.updates.append(Update(model.head, before, grads, model.params.clone(), *options))
            return norm

        def scored(model: Model, *arguments: Any, **others: Any) -> Any:
            watched.forwards.append(("lm", str(id(model)), torch.is_grad_enabled()))
            return score(model, *arguments, **others)

        def valued(model: Model, *arguments: Any, **others: Any) -> Any:
            watched.forwards.append(("scalar", str(id(model)), torch.is_grad_enabled()))
            return values(model, *arguments, **others)

        patch.setattr(module, "gather", gathered)
        patch.setattr(experience.Judge, "scores", judged)
        patch.setattr(AdamW, "step", stepped)
        patch.setattr(Model, "score", scored)
        patch.setattr(Model, "values", valued)
        yield watched


def with_params(folder: Path, params: Tensor, head: Any = None) -> Model:
    """The model of a folder with other weights."""
    model = Model.from_pretrained(folder, head)
    with torch.no_grad():
        model.params.copy_(params)
    return model


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two vectors differ by at most so much of the second one's length."""
    difference = (found.double() - expected.double()).norm()
    return bool(difference <= tolerance * expected.double().norm())


def sequences_of(answers: Episodes) -> list[list[int]]:
    """Prompt and answer of each episode."""
    rows = zip(answers.rollouts.prompts, answers.rollouts.tokens, strict=True)
    return [[*prompt.tolist(), *answer.tolist()] for prompt, answer in rows]


def newest(folder: Path) -> Path:
    found = newest_complete(folder)
    assert found is not None
    return found


def state_of(folder: Path) -> str:
    """SHA-256 of the final state, but for the loss: of it only the gradient is the same for any cut (the sum is not)."""
    content = [(newest(folder) / "tensors.safetensors").read_bytes(), (folder / "model" / "model.safetensors").read_bytes()]
    state = json.loads((newest(folder) / "state.json").read_text())["state"]["loop"]
    del state["loss"]
    content.append(json.dumps(state).encode())
    return hashlib.sha256(b"".join(content)).hexdigest()
