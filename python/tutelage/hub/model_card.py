"""The model card: a saved model's README.md, whose front matter says where the model comes from and what was done to it.

The front matter is YAML with Hugging Face's fields, and one of ours: `tutelage`, a list of what was done, which the
card of a model made from this one continues. Cards come from strangers: of theirs only short plain values are taken.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tutelage.config import Head
from tutelage.lora import LoraConfig

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


def adapter_lineage(folder: Path, base: Lineage) -> Lineage:
    """What is passed on of an adapter's folder whose model is of the lineage `base`.

    A card of ours tells of both. Of others' adapters their license and data go along, and the folder's name is what the model
    began as. Without a card: as if it had been the model under it.
    """
    path = folder / CARD
    if not path.is_file():
        return base
    own = read_lineage(folder)
    if may_replace(path):
        return own
    return Lineage(own.base_model, {**base.fields, **own.fields}, base.stages)


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
    kind = "language" if head == "lm" else "reward"
    began = "It began with random weights." if lineage.base_model is None else f"It began as `{lineage.base_model}`."
    lines = [
        f"# A {kind} model",
        "",
        f"{architecture}, {parameters:,} parameters, stored as {dtype}. {began}",
        "",
        "```python",
        f'model = transformers.{_AUTO[head]}.from_pretrained("this folder")',
        'model = tutelage.Model.from_pretrained("this folder")',
        "```",
        "",
    ]
    if head == "scalar":
        lines += [*_OF_REWARDS, "", *_of_the_bias("config.json", reward_bias, "transformers"), ""]
    return _written(_front("transformers", head, lineage, ()), [*lines, *_history(lineage.stages, 0)])


def adapter_card(
    head: Head, lora: LoraConfig, parameters: int, base_parameters: int, lineage: Lineage, base: Lineage, reward_bias: float
) -> bytes:
    """The content of an adapter's README.md.

    parameters: that the adapter (and a scalar head) has. lineage: of base and adapter together, which begins with `base`,
    that of the model under it.
    """
    count = len(base.stages)
    under = count if lineage.stages[:count] == base.stages else 0
    if base.base_model is None:
        origin = "which began with random weights"
    else:
        origin = f"which began as `{base.base_model}`" if base.stages else f"which is `{base.base_model}`"
    if base.stages:
        origin += f" and had been through {', '.join(f'`{stage.command}`' for stage in base.stages)}"
    other = lineage.base_model not in (None, base.base_model)
    kind = "language" if head == "lm" else "reward"
    lines = [
        f"# An adapter: a {kind} model on another model",
        "",
        f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}{' / √rank' if lora.use_rslora else ''}, on "
        f"{', '.join(lora.target_modules) or 'all linear layers'}: {parameters:,} parameters, as float32. It goes on the "
        f"model of {base_parameters:,} parameters that `base_model_name_or_path` in adapter_config.json names, {origin}."
        f"{f' The adapter began as `{lineage.base_model}`.' if other else ''}",
        "",
        "```python",
        'model = tutelage.Model.from_pretrained("this folder")  # and the model under it, where adapter_config.json says',
        f'base = transformers.{_AUTO[head]}.from_pretrained("the model under it"{_ONE_LABEL[head]})',
        'model = peft.PeftModel.from_pretrained(base, "this folder")',
        "```",
        "",
    ]
    if head == "scalar":
        lines += [*_OF_REWARDS, "", *_of_the_bias("the metadata of adapter_model.safetensors", reward_bias, "PEFT"), ""]
    return _written(_front("peft", head, lineage, ("lora",)), [*lines, *_history(lineage.stages, under)])


_AUTO: Mapping[Head, str] = {"lm": "AutoModelForCausalLM", "scalar": "AutoModelForSequenceClassification"}
_ONE_LABEL: Mapping[Head, str] = {"lm": "", "scalar": ", num_labels=1"}
_OF_REWARDS = (
    "The reward of a text is the value after its last token, which for an answer is the token that ends it. Give",
    "transformers one text at a time, or a padding token that no text ends with.",
)


def _of_the_bias(place: str, reward_bias: float, others: str) -> tuple[str, str]:
    return (
        f"`reward_bias` in {place} is {reward_bias:.6g}. tutelage subtracts it from every reward and {others}",
        "does not: the order of answers is the same, the zero is another.",
    )


def _front(library: str, head: Head, lineage: Lineage, tags: Sequence[str]) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation" if head == "lm" else "text-classification",
        **({} if lineage.base_model is None else {"base_model": lineage.base_model}),
        **lineage.fields,
        "tags": ["tutelage", *tags, *dict.fromkeys(stage.command for stage in lineage.stages)],
    }
    if lineage.stages:
        front["tutelage"] = [{"command": stage.command, **stage.figures} for stage in lineage.stages]
    return front


def _history(stages: Sequence[Stage], under: int) -> list[str]:
    """What was done; the first `under` stages to the model under an adapter."""
    lines = ["## How it was made", ""] if stages else []
    for number, stage in enumerate(stages, 1):
        lines += [f"{number}. `tutelage {stage.command}`{' (the model under it)' if number <= under else ''}", ""]
        lines += [f"   * {name}: {_shown(value)}" for name, value in stage.figures.items()]
        lines += [""]
    return lines


def _written(front: Mapping[str, Any], lines: Sequence[str]) -> bytes:
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{text}---\n{_MARK}\n\n".encode() + "\n".join(lines).rstrip().encode() + b"\n"


def _shown(value: Plain | list[Plain]) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(entry) for entry in value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return " ".join(str(value).split())
