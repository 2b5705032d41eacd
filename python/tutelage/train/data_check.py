"""`tutelage data check`: what a file of rows is, what is wrong with it, and what of it would be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from tutelage.data.examples import (
    BAD,
    Example,
    ExampleSet,
    Finding,
    Prompt,
    Report,
    load_preferences,
    load_prompts,
    load_rankings,
    load_sft,
    load_unpaired,
    sequences,
)
from tutelage.data.rows import BadRows, Kind, Rows, read_rows
from tutelage.data.tokenizer import Tokenizer
from tutelage.train.configs import DataCheckConfig
from tutelage.train.picture import sparkline
from tutelage.train.run import write_json

_BINS = 40


@dataclass(frozen=True)
class DataCheckResult:
    """What was found. Without a model there are no tokens: lengths are in characters, and there are no examples."""

    rows: Rows
    examples: ExampleSet[Any] | None
    report: Report
    lengths: npt.NDArray[np.int64]
    """Of every sequence, in tokens or characters."""


def data_check(config: DataCheckConfig) -> DataCheckResult:
    """Checks and prints as `config` says. Raises as the loaders of `tutelage.data.examples`."""
    if not config.data:
        raise ValueError("there is nothing to check; pass a file, as in `tutelage data check rows.jsonl`")
    rows = read_rows(config.data, bad_rows=BadRows(config.on_bad_row))
    kinds = {schema.kind for schema in rows.schemas.values()}
    if len(kinds) > 1:
        described = ", ".join(f"{name} is {schema}" for name, schema in rows.schemas.items())
        raise ValueError(f"the files are of different schemas, check them apart: {described}")
    if config.model is None:
        texts = [text for row in rows.rows for text in (row.responses or (row.prompt,))]
        lengths = np.array([len(text if isinstance(text, str) else "".join(_contents(text))) for text in texts], np.int64)
        bad = tuple(Finding(BAD, line) for line in rows.bad)
        result = DataCheckResult(rows, None, Report(len(rows.rows) + len(rows.bad), len(rows.rows), bad), lengths)
    else:
        tokenizer = Tokenizer.from_pretrained(config.model)
        if config.chat_template_path is not None:
            tokenizer = tokenizer.with_chat_template(config.chat_template_path)
        loaded = _load(config, tokenizer, kinds.pop())
        lengths = np.array([len(s.tokens) for item in loaded.examples for s in sequences(item)], np.int64)
        result = DataCheckResult(rows, loaded, loaded.report, lengths)
    console = Console()
    _print(console, result)
    if result.examples is not None:
        for item in result.examples.examples[: config.show]:
            _show(console, tokenizer, item.where, sequences(item))
    if config.json is not None:
        write_json(Path(config.json), _figures(result))
    return result


def _contents(messages: Any) -> list[str]:
    return [message["content"] for message in messages if isinstance(message.get("content"), str)]


def _load(config: DataCheckConfig, tokenizer: Tokenizer, kind: Kind) -> ExampleSet[Any]:
    max_length = config.max_length or 2**31 - 1
    common = (config.data, tokenizer, max_length, config.on_bad_row)
    if kind == "prompt_only":
        return load_prompts(*common, on_long="drop" if config.on_long == "drop" else "error")
    if kind in ("language_modeling", "prompt_completion"):
        return load_sft(*common, config.on_long, config.completion_only_loss, config.assistant_only_loss)
    load: Any = {"preference": load_preferences, "unpaired_preference": load_unpaired, "ranking": load_rankings}[kind]
    loaded: ExampleSet[Any] = load(*common, config.on_long, config.completion_only_loss)
    return loaded


def _print(console: Console, result: DataCheckResult) -> None:
    for name, schema in result.rows.schemas.items():
        console.print(f"{name}: {schema}", highlight=False, markup=False, soft_wrap=True)
    columns = sorted({name for row in result.rows.rows for name in row.columns})
    if columns:
        console.print(f"other fields: {', '.join(columns)}", highlight=False, markup=False, soft_wrap=True)
    console.print(str(result.report), highlight=False, markup=False, soft_wrap=True)
    unit = "characters" if result.examples is None else "tokens"
    console.print(_histogram(result.lengths, unit), highlight=False, markup=False, soft_wrap=True)
    if result.examples is not None:
        learned = sum(int(s.mask.sum()) for item in result.examples.examples for s in sequences(item) if isinstance(s, Example))
        total = int(result.lengths.sum())
        console.print(f"{total} tokens, {learned} of them learned", highlight=False)


def _histogram(lengths: npt.NDArray[np.int64], unit: str) -> str:
    low, high = int(lengths.min()), int(lengths.max())
    counts = np.histogram(lengths, bins=min(_BINS, high - low + 1), range=(low, high + 1))[0]
    median, most = (int(np.percentile(lengths, share, method="lower")) for share in (50, 95))
    return f"lengths {low} {sparkline([float(n) for n in counts])} {high} {unit}; half up to {median}, 95 % up to {most}"


def _show(console: Console, tokenizer: Tokenizer, where: str, shown: Sequence[Example | Prompt]) -> None:
    """The text of each sequence, what is learned of it in green; in ⟦brackets⟧ where there is no colour."""
    for number, sequence in enumerate(shown):
        title = where if len(shown) == 1 else f"{where}, {number + 1} of {len(shown)}"
        console.print(Text(f"── {title}", style="bold"), soft_wrap=True)
        mask = sequence.mask.tolist() if isinstance(sequence, Example) else [False] * len(sequence.tokens)
        text = Text()
        for learned, run in groupby(zip(mask, sequence.tokens.tolist(), strict=True), lambda pair: pair[0]):
            piece = tokenizer.decode([token for _, token in run])
            if learned:
                text.append(piece if console.color_system else f"⟦{piece}⟧", style="bold green")
            else:
                text.append(piece, style="dim")
        console.print(text, soft_wrap=True)


def _figures(result: DataCheckResult) -> dict[str, object]:
    return {
        "command": "data check",
        "schemas": {name: str(schema) for name, schema in result.rows.schemas.items()},
        "rows": result.report.rows,
        "examples": result.report.examples,
        "findings": result.report.counts,
        "longest": int(result.lengths.max()),
        "fingerprint": None if result.examples is None else result.examples.fingerprint,
    }
