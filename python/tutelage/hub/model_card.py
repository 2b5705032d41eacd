"""The model card: a saved model's README.md, whose front matter says where the model comes from and what was done to it.

The front matter is YAML with Hugging Face's fields, and one of ours: `tutelage`, a list of what was done, which the
card of a model made from this one continues. Cards come from strangers: of theirs only short plain values are taken.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tutelage.config import Head

CARD = "README.md"

_log = logging.getLogger(__name__)

# A card without it is somebody's own and never touched.
_MARK = "<!-- Written by tutelage, and replaced when a model is saved here again: remove this line to keep what you write. -->"
_PASSED_ON = ("license", "license_name", "license_link", "language", "datasets")
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_LARGEST_CARD, _LARGEST_FRONT = 1 << 20, 1 << 16  # bytes; YAML takes a second for some 100,000
_LONGEST, _MOST = 300, 100  # characters of a value, entries of a list
_COMMAND = re.compile(r"[a-z_]{1,40}")

Plain = str | bool | int | float


@dataclass(frozen=True)
class Stage:
    """Something that was done to a model.

    command: as on the command line, "sft".
    figures: with what, and what it came to: strings, numbers and lists of them.
    """

    command: str
    figures: Mapping[str, Plain | list[Plain]] = field(default_factory=dict)


@dataclass(frozen=True)
class Lineage:
    """What the card of a model passes on to those of the models that are made from it."""

    base_model: str | None = None
    """The published model that all began with; None: a first initialisation of ours."""
    fields: Mapping[str, str | list[str]] = field(default_factory=dict)
    """Of the front matter: license, language, datasets."""
    stages: tuple[Stage, ...] = ()

    def then(self, stage: Stage | None) -> Lineage:
        """After one more stage."""
        return self if stage is None else Lineage(self.base_model, self.fields, (*self.stages, stage))


def read_lineage(folder: Path) -> Lineage:
    """What is passed on of a folder's card, and the folder's name as the base model where tutelage did not write the card.

    A card whose front matter cannot be read passes on nothing, which is logged: no number of the model depends on it.
    """
    path = folder / CARD
    text = ""
    if path.is_file() and path.stat().st_size <= _LARGEST_CARD:
        text = path.read_text(encoding="utf-8", errors="replace")
    found = _FRONT_MATTER.match(text)
    front: Any = {}
    if found:
        try:
            if len(found[1]) > _LARGEST_FRONT:
                raise ValueError(f"it is longer than {_LARGEST_FRONT:,} characters")
            front = yaml.safe_load(found[1])
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            _log.warning("%s: the front matter cannot be read and passes nothing on: %s", path, error)
    front = front if isinstance(front, dict) else {}
    base = _plain(front.get("base_model")) if _MARK in text else _name(folder)
    return Lineage(
        base_model=base if isinstance(base, str) else None,
        fields={name: value for name in _PASSED_ON if (value := _texts(front.get(name)))},
        stages=tuple(_stages(front.get("tutelage"))) if _MARK in text else (),
    )


def _name(folder: Path) -> str:
    """The model's name: `org/name` where the folder is one of Hugging Face's cache."""
    folder = folder.resolve()
    cached = next((part for part in folder.parts if part.startswith("models--")), None)
    return folder.name if cached is None else "/".join(cached.split("--")[1:])


def _texts(value: object) -> str | list[str] | None:
    if isinstance(value, list):
        return [text for entry in value[:_MOST] if isinstance(text := _plain(entry), str)]
    text = _plain(value)
    return text if isinstance(text, str) else None


def _plain(value: object) -> Plain | None:
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else None
    if isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    return None


def _stages(value: object) -> Iterable[Stage]:
    for entry in value[:_MOST] if isinstance(value, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("command"), str) and _COMMAND.fullmatch(entry["command"]):
            figures: dict[str, Plain | list[Plain]] = {}
            for name, given in list(entry.items())[:_MOST]:
                kept: Plain | list[Plain] | None = _plain(given)
                if isinstance(given, list):
                    kept = [part for one in given[:_MOST] if (part := _plain(one)) is not None]
                if isinstance(name, str) and len(name) <= _LONGEST and name != "command" and kept is not None:
                    figures[name] = kept
            yield Stage(entry["command"], figures)


def may_replace(path: Path) -> bool:
    """Whether a card may be written to `path`: nothing is there, or a card that was written by us."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        return _MARK.encode() in file.read(_LARGEST_CARD)


def card(head: Head, architecture: str, parameters: int, dtype: str, lineage: Lineage, reward_bias: float) -> bytes:
    """The content of README.md.

    architecture: the class of transformers. dtype: that the weights are stored in.
    """
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if head == "lm" else "text-classification",
        **({} if lineage.base_model is None else {"base_model": lineage.base_model}),
        **lineage.fields,
        "tags": ["tutelage", *dict.fromkeys(stage.command for stage in lineage.stages)],
    }
    if lineage.stages:
        front["tutelage"] = [{"command": stage.command, **stage.figures} for stage in lineage.stages]
    kind = "language" if head == "lm" else "reward"
    auto = "AutoModelForCausalLM" if head == "lm" else "AutoModelForSequenceClassification"
    began = "It began with random weights." if lineage.base_model is None else f"It began as `{lineage.base_model}`."
    lines = [
        f"# A {kind} model",
        "",
        f"{architecture}, {parameters:,} parameters, stored as {dtype}. {began}",
        "",
        "```python",
        f'model = transformers.{auto}.from_pretrained("this folder")',
        'model = tutelage.Model.from_pretrained("this folder")',
        "```",
        "",
    ]
    if head == "scalar":
        lines += [
            "The reward of a text is the value after its last token, which for an answer is the token that ends it. Give",
            "transformers one text at a time, or a padding token that no text ends with.",
            "",
            f"`reward_bias` in config.json is {reward_bias:.6g}. tutelage subtracts it from every reward and transformers",
            "does not: the order of answers is the same, the zero is another.",
            "",
        ]
    if lineage.stages:
        lines += ["## How it was made", ""]
    for number, stage in enumerate(lineage.stages, 1):
        lines += [f"{number}. `tutelage {stage.command}`", ""]
        lines += [f"   * {name}: {_shown(value)}" for name, value in stage.figures.items()]
        lines += [""]
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{text}---\n{_MARK}\n\n".encode() + "\n".join(lines).rstrip().encode() + b"\n"


def _shown(value: Plain | list[Plain]) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(entry) for entry in value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return " ".join(str(value).split())
