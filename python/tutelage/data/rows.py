"""Rows: read from files or any iterable, checked against a schema, and what happens to those that are bad.

The schemas are TRL's, unchanged, each with strings or with messages (`{"role": …, "content": …}`):

    language modelling   {"text"} or {"messages"}
    prompt-completion    {"prompt", "completion"}
    prompt-only          {"prompt"}
    preference           {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} whose common beginning is the prompt
    unpaired preference  {"prompt", "completion", "label"}

and one of ours for rankings, `{"prompt": …, "responses": […], "ranking": [[0], [2, 1], [3]]}`: groups of
indices into the responses, best first; the members of one group are tied. Before people have ranked them such rows
have prompt and responses only; as nothing can be learned from them, they are read where they are asked for by name.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SUFFIXES = (".jsonl", ".json", ".parquet")

Data = str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]]
"""Where rows come from: a file or a folder of files, several of them, or any iterable of dicts."""

Kind = Literal[
    "language_modeling", "prompt_completion", "prompt_only", "preference", "unpaired_preference", "ranking", "responses"
]

# What a row of each schema must have. In this order a row's schema is looked for: the more it asks for, the earlier.
_REQUIRED: Mapping[Kind, tuple[tuple[str, ...], ...]] = {
    "ranking": (("prompt", "responses", "ranking"),),
    "preference": (("chosen", "rejected"),),
    "unpaired_preference": (("prompt", "completion", "label"),),
    "prompt_completion": (("prompt", "completion"),),
    "language_modeling": (("messages",), ("text",)),
    "prompt_only": (("prompt",),),
    "responses": (("prompt", "responses"),),
}
KINDS: tuple[Kind, ...] = tuple(kind for kind in _REQUIRED if kind != "responses")
"""Those from which something can be learned, or generated."""

# Of what stands inside a message; far below what Python's recursion can take.
_DEEPEST = 64


# --- the policy for bad rows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    reason: str


class BadRows:
    """The policy for bad rows, "error" or "skip:<max>", and those skipped so far.

    Raises ValueError for any other policy.
    """

    def __init__(self, policy: str) -> None:
        kind, _, most = policy.partition(":")
        if policy != "error" and not (kind == "skip" and most.isascii() and most.isdigit()):
            raise ValueError(f"on_bad_row is {policy!r}: it must be 'error' or 'skip:<max>', as in 'skip:10'")
        self.policy = policy
        self.most = int(most) if kind == "skip" else 0
        self.count = 0

    def add(self, where: str, reason: str) -> str:
        """One more bad row: the line of the report. Raises ValueError where the policy does not allow it."""
        message = f"{where}: {reason}"
        self.count += 1
        if self.count > self.most:
            advice = (
                "correct it, or leave such rows out with on_bad_row='skip:<max>'"
                if self.policy == "error"
                else f"that is bad row {self.count}, more than on_bad_row={self.policy!r} allows"
            )
            raise ValueError(f"{message}: {advice}")
        return message


# --- reading ------------------------------------------------------------------------------------------------


def read_file(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, object]]:
    """(where, row or BadRow) for every row of a .jsonl, .json (a list of rows) or .parquet file.

    `columns` are those of a .parquet file that are needed; None: all. Raises ValueError for a file that as a
    whole is no such file, ImportError for .parquet without pyarrow.
    """
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _json(line.rstrip(b"\r\n"))
    elif path.suffix == ".json":
        rows = _json(path.read_bytes())
        if not isinstance(rows, list):
            reason = rows.reason if isinstance(rows, BadRow) else f"it holds {type(rows).__name__}"
            raise ValueError(f"{path}: a .json file must be a list of rows (one row a line is .jsonl): {reason}")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))
    else:
        yield from _read_parquet(path, columns)


def _json(data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(f"no UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(f"no valid JSON ({error.msg} at character {error.pos})")
    except (ValueError, RecursionError) as error:  # numbers of too many digits, nesting too deep
        return BadRow(f"no valid JSON ({error})")


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, object]]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")  # typed Any: it comes without types
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(f"{path}: reading .parquet needs pyarrow: pip install 'tutelage[hub]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [column for column in columns or () if column not in names]
            if missing:
                raise ValueError(f"{path}: no column {missing[0]!r} (it has: {', '.join(names[:8]) or 'none'})")
            for batch in file.iter_batches(columns=None if columns is None else list(columns)):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: no readable parquet file: {error}") from error


def files_of(path: Path, suffixes: Sequence[str]) -> tuple[list[Path], int]:
    """The file `path`, or the files of that folder (read recursively, sorted) that have one of `suffixes`, and how
    many of the folder were left out because they are hidden or of another kind.

    Raises FileNotFoundError, or ValueError where there is nothing to read.
    """
    readable = f"give {', '.join(suffixes)} or a folder of them"
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if path.suffix not in suffixes:
            raise ValueError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; {readable}")
        return [path], 0
    found, ignored = [], 0
    for directory, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            file = Path(directory, name)
            if file.suffix in suffixes and not name.startswith("."):
                found.append(file)
            else:
                ignored += 1
    if not found:
        raise ValueError(f"{path}: nothing to read in this folder; {readable}")
    return sorted(found), ignored


def _sources(data: Data) -> Iterator[tuple[str, Iterator[tuple[str, object]]]]:
    """(name, its rows) of every file, or of the iterable."""
    if isinstance(data, (str, Path)):
        data = [data]
    if isinstance(data, (list, tuple)) and data and all(isinstance(entry, (str, Path)) for entry in data):
        for entry in data:
            for file in files_of(Path(entry), SUFFIXES)[0]:
                yield str(file), read_file(file)
    else:
        yield "rows", ((f"row {number}", row) for number, row in enumerate(data))


# --- the schema ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    kind: Kind
    conversational: bool
    """Messages, not strings."""

    def __str__(self) -> str:
        return f"{self.kind.replace('_', ' ')} ({'conversational' if self.conversational else 'strings'})"


Messages = tuple[Mapping[str, Any], ...]
Text = str | Messages


@dataclass(frozen=True)
class Row:
    """A row that passed every check; what its schema does not have is None or empty."""

    where: str
    schema: Schema
    prompt: Text | None
    """None for language modelling only."""
    responses: tuple[Text, ...]
    """The text; the completion; chosen and rejected; or the ranked responses."""
    ranking: tuple[tuple[int, ...], ...] = ()
    label: bool | None = None
    margin: float | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_options: Mapping[str, Any] | None = None
    """TRL's `chat_template_kwargs`: variables for the chat template."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other fields."""

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt: equal prompts, equal keys. Of a text without prompt: of the text; of a conversation: of
        what stands before its first answer."""
        prompt: object = self.prompt
        if prompt is None:
            prompt = self.responses[0]
            if not isinstance(prompt, str):
                first = next((i for i, message in enumerate(prompt) if message["role"] == "assistant"), len(prompt))
                prompt = prompt[:first]
        return _hash(prompt)

    @property
    def key(self) -> str:
        """Hash of everything that is learned from: equal for rows that say the same."""
        return _hash([self.prompt, self.responses, self.ranking, self.label, self.margin, self.tools, self.template_options])


def _hash(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Rows:
    """The rows of a data set."""

    rows: tuple[Row, ...]
    bad: tuple[str, ...]
    """Where and why, for every row that was skipped."""
    schemas: Mapping[str, Schema]
    """Of each file (or "rows")."""


def read_rows(data: Data, accept: Sequence[Kind] = KINDS, bad_rows: BadRows | None = None) -> Rows:
    """Read and check rows whose schema is one of `accept`, which are tried in this order.

    The schema of a file is the one that most of its rows have; a row of another one is bad, as are wrong types,
    which are told with the field. `bad_rows` is the policy (default: an error). Raises FileNotFoundError,
    ImportError (.parquet without pyarrow) or ValueError naming file and line.
    """
    bad_rows = BadRows("error") if bad_rows is None else bad_rows
    rows: list[Row] = []
    bad: list[str] = []
    schemas: dict[str, Schema] = {}
    for name, source in _sources(data):
        read = list(source)
        found = Counter(schema for _, row in read if (schema := _schema(row, accept)) is not None)
        schema = found.most_common(1)[0][0] if found else None
        if schema is not None:
            schemas[name] = schema
        for where, value in read:
            try:
                rows.append(_check(where, value, schema, accept))
            except _BadFieldError as error:
                bad.append(bad_rows.add(where, str(error)))
    if not rows:
        described = str(data) if isinstance(data, (str, Path)) else "the data"
        raise ValueError(f"{described}: there is no row to use ({len(bad)} bad ones were skipped)")
    return Rows(tuple(rows), tuple(bad), schemas)


class _BadFieldError(ValueError):
    """Why a row is bad."""


def _fields(kind: Kind, row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The required fields of `kind` that the row has, or None where it lacks one."""
    return next((fields for fields in _REQUIRED[kind] if all(row.get(f) is not None for f in fields)), None)


def _schema(row: object, accept: Sequence[Kind]) -> Schema | None:
    if not isinstance(row, Mapping):
        return None
    for kind in accept:
        fields = _fields(kind, row)
        if fields is not None:
            return Schema(kind, not isinstance(row[fields[0]], str))
    return None


def _check(where: str, row: object, schema: Schema | None, accept: Sequence[Kind]) -> Row:
    if isinstance(row, BadRow):
        raise _BadFieldError(row.reason)
    if not isinstance(row, Mapping):
        raise _BadFieldError(f"the row is {type(row).__name__}, not an object with fields")
    if schema is None:
        raise _BadFieldError(f"the row's fields ({_names(row)}) fit no schema; it needs {_wanted(accept)}")
    fields = _fields(schema.kind, row)
    if fields is None:
        # What the row is nearest to says best which field it lacks.
        required = max(_REQUIRED[schema.kind], key=lambda names: sum(row.get(n) is not None for n in names))
        missing = next(name for name in required if row.get(name) is None)
        how = "is null" if missing in row else "is missing"
        raise _BadFieldError(f"field {missing!r} {how} (the row has: {_names(row)})")
    reader = _FieldReader(row, schema.conversational)
    kind = schema.kind
    prompt: Text | None = None
    responses: tuple[Text, ...] = ()
    ranking: tuple[tuple[int, ...], ...] = ()
    label = margin = None
    if kind == "language_modeling":
        responses = (reader.text(fields[0]),)
    elif kind == "preference":
        chosen, rejected = reader.text("chosen"), reader.text("rejected")
        if row.get("prompt") is not None:
            fields = ("prompt", *fields)
            prompt = reader.text("prompt")
        else:
            prompt, chosen, rejected = _extract_prompt(chosen, rejected)
        responses, ranking, margin = (chosen, rejected), ((0,), (1,)), reader.margin()
        fields = (*fields, "margin")
    else:
        prompt = reader.text("prompt")
        if kind == "responses":
            responses = reader.responses(least=1)
        elif kind == "ranking":
            responses = reader.responses(least=2)
            ranking = reader.ranking(len(responses))
        elif kind != "prompt_only":
            responses = (reader.text("completion"),)
        if kind == "unpaired_preference":
            label = reader.label()
    if kind != "language_modeling" and prompt and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise _BadFieldError("field 'prompt' ends with an answer (role 'assistant'): it must end with what is to be answered")
    return Row(
        where,
        schema,
        prompt,
        responses,
        ranking,
        label,
        margin,
        reader.tools(),
        reader.template_options(),
        {name: value for name, value in row.items() if name not in (*fields, "tools", "chat_template_kwargs")},
    )


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))[:8]) or "none"


def _wanted(accept: Sequence[Kind]) -> str:
    return ", or ".join(" + ".join(fields) for kind in accept for fields in _REQUIRED[kind])


_EITHER = "the rows of one file have strings or messages, not both"


class _FieldReader:
    """The fields of one row, checked. Raises _BadFieldError naming the field."""

    def __init__(self, row: Mapping[str, Any], conversational: bool) -> None:
        self.row = row
        self.conversational = conversational

    def text(self, name: str) -> Text:
        return self._text(f"field {name!r}", self.row[name])

    def _text(self, what: str, value: object) -> Text:
        if not self.conversational:
            if not isinstance(value, str):
                also = f"; {_EITHER}" if isinstance(value, list) else ""
                raise _BadFieldError(f"{what} is {type(value).__name__}, not a string{also}")
            _check_unicode(what, value)
            return value
        if isinstance(value, str):
            raise _BadFieldError(f"{what} is a string, not a list of messages; {_EITHER}")
        if not isinstance(value, (list, tuple)):
            raise _BadFieldError(f"{what} is {type(value).__name__}, neither a string nor a list of messages")
        if not value:
            raise _BadFieldError(f"{what} is an empty list: it needs a message")
        return tuple(self._message(f"{what}, message {number}", message) for number, message in enumerate(value))

    def _message(self, what: str, message: object) -> Mapping[str, Any]:
        if not isinstance(message, Mapping):
            raise _BadFieldError(f"{what} is {type(message).__name__}, not an object with 'role' and 'content'")
        if "from" in message and "value" in message:
            raise _BadFieldError(f"{what} has 'from' and 'value': rename them to 'role' and 'content'")
        # Parquet gives every message every field of any: null is "not there", as it is to transformers.
        kept = {name: value for name, value in message.items() if value is not None}
        role, content = kept.get("role"), kept.get("content")
        if not isinstance(role, str) or not role:
            raise _BadFieldError(f"{what}: 'role' is {_type(role)}, not a string like 'user' or 'assistant'")
        if content is None and "tool_calls" not in kept:
            raise _BadFieldError(f"{what}: 'content' is missing")
        parts = isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) for part in content)
        if content is not None and not isinstance(content, str) and not parts:
            raise _BadFieldError(f"{what}: 'content' is {_type(content)}, not a string")
        _check_unicode(what, kept)
        return kept

    def responses(self, least: int) -> tuple[Text, ...]:
        value = self.row["responses"]
        if not isinstance(value, (list, tuple)):
            raise _BadFieldError(f"field 'responses' is {type(value).__name__}, not a list")
        if len(value) < least:
            raise _BadFieldError(
                f"field 'responses' has {len(value)}: a ranking needs two or more"
                if least > 1
                else "field 'responses' is empty"
            )
        return tuple(self._text(f"field 'responses', response {number}", entry) for number, entry in enumerate(value))

    def ranking(self, count: int) -> tuple[tuple[int, ...], ...]:
        value = self.row["ranking"]
        if not isinstance(value, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in value):
            raise _BadFieldError("field 'ranking' must be a list of lists of numbers of responses, as in [[0], [2, 1]]")
        members = [member for group in value for member in group]
        if any(isinstance(member, bool) or not isinstance(member, int) for member in members):
            raise _BadFieldError("field 'ranking' must be a list of lists of numbers of responses, as in [[0], [2, 1]]")
        if sorted(members) != list(range(count)) or not all(value):
            raise _BadFieldError(
                f"field 'ranking' must name each of the responses 0 to {count - 1} once, in groups that are not empty"
            )
        if len(value) < 2:
            raise _BadFieldError("field 'ranking' has all responses tied in one group: there is nothing to learn from it")
        return tuple(tuple(group) for group in value)

    def label(self) -> bool:
        value = self.row["label"]
        if not isinstance(value, bool):
            raise _BadFieldError(f"field 'label' is {_type(value)}, neither true nor false")
        return value

    def margin(self) -> float | None:
        value = self.row.get("margin")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _BadFieldError(f"field 'margin' is {_type(value)}, not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise _BadFieldError(f"field 'margin' is {number}: it must be finite")
        return number

    def tools(self) -> tuple[Mapping[str, Any], ...] | None:
        value = self.row.get("tools")
        if not self.conversational or not value:
            return None
        if isinstance(value, str):
            parsed = _json(value.encode("utf-8", "replace"))
            value = parsed if isinstance(parsed, list) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
            raise _BadFieldError("field 'tools' must be a list of JSON schemas, or a string of such JSON")
        _check_unicode("field 'tools'", value)
        return tuple(value)

    def template_options(self) -> Mapping[str, Any] | None:
        value = self.row.get("chat_template_kwargs")
        if not self.conversational or not value:
            return None
        if not isinstance(value, Mapping):
            raise _BadFieldError(f"field 'chat_template_kwargs' is {_type(value)}, not an object")
        _check_unicode("field 'chat_template_kwargs'", value)
        return {name: entry for name, entry in value.items() if entry is not None}


def _type(value: object) -> str:
    return "missing" if value is None else type(value).__name__


def _check_unicode(what: str, value: object, depth: int = 0) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _BadFieldError(f"{what} has a lone surrogate at character {error.start}: it is no valid Unicode") from error
    elif isinstance(value, (Mapping, list, tuple)):
        if depth > _DEEPEST:
            raise _BadFieldError(f"{what} is nested more than {_DEEPEST} levels deep")
        for name, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            if not isinstance(name, str) and isinstance(value, Mapping):
                raise _BadFieldError(f"{what} has a key that is {type(name).__name__}, not a string")
            _check_unicode(what, name, depth + 1)
            _check_unicode(f"{what}, {name!r}"[:200], entry, depth + 1)


def _extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) from two texts that both begin with the prompt: TRL's `extract_prompt`.

    The prompt is the longest common beginning, without a space at its end, which belongs to the completions.
    Where one text is the beginning of the other, the last character (or message) of the shorter is not part of
    the prompt. Strings that share nothing have an empty prompt; messages that share nothing are refused.
    """
    shorter = min(len(chosen), len(rejected))
    common = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if common is None:
        common = max(shorter - 1, 0)
    elif common and chosen[common - 1] == " ":
        common -= 1
    if not common and not isinstance(chosen, str):
        raise _BadFieldError("fields 'chosen' and 'rejected' share no first message, which would be the prompt")
    return chosen[:common], chosen[common:], rejected[common:]
