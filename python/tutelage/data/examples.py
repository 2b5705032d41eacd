"""Rows to examples: tokens, and which of them are learned, for every stage that learns from people.

A row of strings becomes [bos where the tokenizer adds it] + prompt + completion + [eos]. Prompt and completion are
encoded apart, so that the prompt's ids are always a prefix of the whole: what the model is taught is what it sees
when it generates. Where a text spells bos at its beginning or eos at its end, that token is meant, once.

A row of messages is rendered by the tokenizer's chat template and cut where the answer begins, for the same
reason. An example of a prompt and its completion ends with the stop token of the turn, as a rollout does: a line
break that the template writes behind it is left out. The template is checked first (`check_template`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from tutelage.data.chat import ChatTemplateError
from tutelage.data.chat_check import TurnFormat, check_template, masked_conversation, prompt_ids
from tutelage.data.documents import held_out_digests
from tutelage.data.packing import Cursor, hashes
from tutelage.data.rows import BadRows, Data, Kind, Messages, Row, Schema, Text, read_rows
from tutelage.data.tokenizer import Tokenizer, covered

OnLong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence."""

    tokens: npt.NDArray[np.int32]
    """[T]"""
    mask: npt.NDArray[np.bool_]
    """[T] the tokens that are learned; never the first, which nothing predicts."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other fields."""
    where: str = ""
    """File and line, for messages."""
    prompt_key: str = ""
    """Hash of the prompt: equal for equal prompts."""


@dataclass(frozen=True, eq=False)
class Preference:
    """Two completions of one prompt."""

    chosen: Example
    rejected: Example
    margin: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    prompt_key: str = ""


@dataclass(frozen=True, eq=False)
class Unpaired:
    """A completion, and whether it is desirable."""

    example: Example
    label: bool
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    prompt_key: str = ""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Completions of one prompt, ranked."""

    responses: tuple[Example, ...]
    ranking: tuple[tuple[int, ...], ...]
    """Groups of indices into `responses`, best first; the members of a group are tied."""
    margin: float | None = None
    """Of a pair."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    prompt_key: str = ""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is to be answered."""

    tokens: npt.NDArray[np.int32]
    """[T], the generation prompt included."""
    prompt: Text = ""
    """As it stands in the row: a string or messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    prompt_key: str = ""


Item = TypeVar("Item", Example, Preference, Unpaired, Ranking, Prompt)


# --- the report ---------------------------------------------------------------------------------------------

# Kinds of findings, in the order in which a report shows them: the first three cost rows.
BAD, DROPPED, TRUNCATED = "bad row", "too long, dropped", "truncated"
NO_STOP, EMPTY, EQUAL = "no stop token", "empty completion", "chosen equals rejected"
DUPLICATE, DOUBLE_BOS, SPELLED, NOTE = "duplicate row", "double bos", "spelled special token", "note"
_KINDS = (BAD, DROPPED, TRUNCATED, NO_STOP, EMPTY, EQUAL, DUPLICATE, DOUBLE_BOS, SPELLED, NOTE)
_SHOWN = 20


@dataclass(frozen=True)
class Finding:
    """A row that was left out or changed, or looks wrong."""

    kind: str
    message: str
    """File and line, and what there is to say."""


@dataclass(frozen=True)
class Report:
    """What became of the rows; `str` of it is for people and shows at most 20 findings of a kind."""

    rows: int
    """Rows read, bad ones included."""
    examples: int
    findings: tuple[Finding, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each kind that there are."""
        counted = Counter(finding.kind for finding in self.findings)
        return {kind: counted[kind] for kind in _KINDS if counted[kind]}

    def __str__(self) -> str:
        counts = self.counts
        summary = ", ".join(f"{kind}: {count}" for kind, count in counts.items()) or "nothing to report"
        lines = [f"{self.rows} rows, {self.examples} examples; {summary}"]
        for kind, count in counts.items():
            found = [finding.message for finding in self.findings if finding.kind == kind]
            lines += [f"  {kind}: {message}" for message in found[:_SHOWN]]
            if count > _SHOWN:
                lines.append(f"  {kind}: … and {count - _SHOWN} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class ExampleSet(Generic[Item]):
    """The examples of a data set, in the order of its rows."""

    examples: tuple[Item, ...]
    report: Report
    fingerprint: str
    """SHA-256 of everything that is learned from (ids, masks, labels, margins, rankings); not of `columns`."""
    schemas: Mapping[str, Schema] = field(default_factory=dict)
    """Of each file."""
    turn: TurnFormat | None = None
    """How the chat template ends a turn, where there were messages: generation must stop at its stop token."""

    def __len__(self) -> int:
        return len(self.examples)


# --- loaders ------------------------------------------------------------------------------------------------


def load_sft(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: OnLong = "error",
    completion_only_loss: bool = True,
    assistant_only_loss: bool = True,
) -> ExampleSet[Example]:
    """Examples of language modelling (`text`, `messages`) and prompt-completion rows.

    data: a file or folder, several of them, or any iterable of dicts; see `tutelage.data.rows`.
    max_length: in tokens. `on_long` says what happens to longer rows: "error"; "truncate" keeps the first
        `max_length` tokens; "drop". All is reported.
    on_bad_row: "error", or "skip:<max>" to leave out up to so many, reported. A row of which no token is left to
        learn is a bad row.
    completion_only_loss: of prompt and completion learn only the completion (TRL's default); False: both.
    assistant_only_loss: of messages learn only what the assistant says. TRL's default is False, ours is True: a
        model that answers need not learn to ask.

    Raises FileNotFoundError, ImportError (.parquet without pyarrow), ChatTemplateError for a template that would
    teach something wrong, or ValueError naming file and line.
    """
    loader = _Loader(tokenizer, max_length, on_bad_row, on_long, completion_only_loss, assistant_only_loss)
    return loader.load(data, ("prompt_completion", "language_modeling"), loader.example)


def load_preferences(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: OnLong = "error",
    completion_only_loss: bool = True,
) -> ExampleSet[Preference]:
    """Pairs of preference rows; a field `margin` (a number) is kept. Otherwise as `load_sft`."""
    loader = _Loader(tokenizer, max_length, on_bad_row, on_long, completion_only_loss)
    return loader.load(data, ("preference",), loader.preference)


def load_unpaired(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: OnLong = "error",
    completion_only_loss: bool = True,
) -> ExampleSet[Unpaired]:
    """Completions with a label, of unpaired preference rows. Otherwise as `load_sft`."""
    loader = _Loader(tokenizer, max_length, on_bad_row, on_long, completion_only_loss)
    return loader.load(data, ("unpaired_preference",), loader.unpaired)


def load_rankings(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: OnLong = "error",
    completion_only_loss: bool = True,
) -> ExampleSet[Ranking]:
    """Rankings of ranking rows; a preference row is a ranking of two. Otherwise as `load_sft`."""
    loader = _Loader(tokenizer, max_length, on_bad_row, on_long, completion_only_loss)
    return loader.load(data, ("ranking", "preference"), loader.ranking)


def load_prompts(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    on_bad_row: str = "error",
    on_long: Literal["error", "drop"] = "error",
    answer: int = 0,
) -> ExampleSet[Prompt]:
    """Prompts of all rows that have one, for generation; the other fields are `columns`. Otherwise as `load_sft`.

    A prompt is never truncated: half a prompt is another one. answer: tokens of max_length that are kept for an answer.
    """
    if on_long not in ("error", "drop"):
        raise ValueError(f"on_long is {on_long!r}: for prompts it must be 'error' or 'drop'")
    loader = _Loader(tokenizer, max_length - answer, on_bad_row, on_long)
    if answer:
        loader.limit = f"max_length = {max_length} less {answer} for an answer"
    return loader.load(data, ("prompt_only",), loader.prompt)


class _Unusable(ChatTemplateError):  # noqa: N818 (it is caught where rows are counted)
    """A row of which no example can be made, and why."""


class _Dropped(Exception):  # noqa: N818 (no error: it was asked for)
    """A row that is too long."""


class _Loader:
    """Rows to examples of one data set, and what there is to report."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        on_bad_row: str,
        on_long: str,
        completion_only: bool = True,
        assistant_only: bool = True,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: it must be at least 1")
        if on_long not in ("error", "truncate", "drop"):
            raise ValueError(f"on_long is {on_long!r}: it must be 'error', 'truncate' or 'drop'")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer names no end of text: set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        self.bos = tokenizer.bos_token_id
        self.max_length = max_length
        self.limit = f"max_length = {max_length}"
        self.bad_rows = BadRows(on_bad_row)
        self.on_long = on_long
        self.completion_only = completion_only
        self.assistant_only = assistant_only
        self.turn: TurnFormat | None = None
        self.findings: list[Finding] = []

    def load(self, data: Data, accept: Sequence[Kind], make: Callable[[Row], Item]) -> ExampleSet[Item]:
        read = read_rows(data, accept, self.bad_rows)
        self.findings += [Finding(BAD, line) for line in read.bad]
        if any(schema.conversational for schema in read.schemas.values()):
            self.turn = check_template(self.tokenizer)
            if self.turn.stop_token_id != self.eos:
                end = self.tokenizer.decode([self.eos])
                told = f"answers end with {self.turn.stop_token!r}, texts with {end!r}: generation must stop at both"
                self.findings.append(Finding(NOTE, told))
        examples: list[Item] = []
        seen: dict[str, str] = {}
        for row in read.rows:
            first = seen.setdefault(row.key, row.where)
            if first != row.where:
                self._find(DUPLICATE, row, f"says the same as {first}")
            try:
                examples.append(make(row))
            except _Dropped:
                continue
            except ChatTemplateError as error:
                self.findings.append(Finding(BAD, self.bad_rows.add(row.where, str(error))))
        report = Report(len(read.rows) + len(read.bad), len(examples), tuple(self.findings))
        if not examples:
            raise ValueError(f"there is no example to learn from: {report}")
        return ExampleSet(tuple(examples), report, _fingerprint(examples), read.schemas, self.turn)

    def _find(self, kind: str, row: Row, message: str) -> None:
        self.findings.append(Finding(kind, f"{row.where}: {message}"))

    # -- one row --

    def example(self, row: Row) -> Example:
        return self._completions(row, ("",))[0] if row.prompt is not None else self._whole(row, row.responses[0])

    def preference(self, row: Row) -> Preference:
        if row.responses[0] == row.responses[1]:
            self._find(EQUAL, row, "chosen and rejected are the same")
        chosen, rejected = self._completions(row, ("chosen", "rejected"))
        return Preference(chosen, rejected, row.margin, row.columns, row.where, row.prompt_key)

    def unpaired(self, row: Row) -> Unpaired:
        (example,) = self._completions(row, ("",))
        return Unpaired(example, bool(row.label), row.columns, row.where, row.prompt_key)

    def ranking(self, row: Row) -> Ranking:
        if row.schema.kind == "preference":
            pair = self.preference(row)
            responses: tuple[Example, ...] = (pair.chosen, pair.rejected)
        else:
            responses = self._completions(row, [f"response {number}" for number in range(len(row.responses))])
        return Ranking(responses, row.ranking, row.margin, row.columns, row.where, row.prompt_key)

    def prompt(self, row: Row) -> Prompt:
        assert row.prompt is not None
        if isinstance(row.prompt, str):
            ids = self._opening(row, row.prompt)
        else:
            ids = prompt_ids(self.tokenizer, row.prompt, row.tools, row.template_options)
            self._look_at_messages(row, row.prompt, ids)
        if not ids:
            raise _Unusable("the prompt has no token")
        if len(ids) > self.max_length:
            self._too_long(row, "the prompt", len(ids), "raise max_length, or pass on_long='drop'")
        return Prompt(np.array(ids, np.int32), row.prompt, row.columns, row.where, row.prompt_key)

    # -- strings --

    def _opening(self, row: Row, text: str) -> list[int]:
        """The ids of a text that begins a sequence, after bos where the tokenizer adds it or the text spells it."""
        bos = "" if self.bos is None else self.tokenizer.decode([self.bos])
        spelled = bool(bos) and text.startswith(bos)
        if spelled and self.tokenizer.adds_bos:
            self._find(
                DOUBLE_BOS, row, f"the text begins with {bos!r}, which the tokenizer adds by itself: it stands there once"
            )
        text = text.removeprefix(bos) if spelled else text
        self._look_for_special(row, text)
        start = [] if self.bos is None or not (spelled or self.tokenizer.adds_bos) else [self.bos]
        return [*start, *self.tokenizer.encode(text)]

    def _without_end(self, row: Row, text: str) -> str:
        """The text without an end token that it spells at its end, as that one is added."""
        text = text.removesuffix(self.tokenizer.decode([self.eos]))
        if not text.strip():
            self._find(EMPTY, row, "there is no text, so only the end token is learned")
        return text

    def _string_completion(self, row: Row, prompt: str, opening: list[int], completion: str) -> tuple[list[int], list[bool]]:
        completion = self._without_end(row, completion)
        self._look_for_special(row, completion)
        encode = self.tokenizer.encode_next if prompt else self.tokenizer.encode
        ids = [*encode(completion), self.eos]
        return opening + ids, [not self.completion_only] * len(opening) + [True] * len(ids)

    def _look_for_special(self, row: Row, text: str) -> None:
        spelled = next((token for token in self.tokenizer.special_tokens.values() if token and token in text), None)
        if spelled is not None:
            self._find(SPELLED, row, f"the text spells {spelled!r}, which is plain text, not that token")

    # -- messages --

    def _chat_completion(self, row: Row, prompt: Messages, completion: Messages) -> tuple[list[int], list[bool]]:
        assert self.turn is not None
        options, messages = row.template_options, (*prompt, *completion)
        # An answer alone needs no search for answers, which is refused for more templates.
        alone = len(completion) == 1 and completion[0]["role"] == "assistant"
        everything = (alone and self.completion_only) or not (self.completion_only or self.assistant_only)
        asked = self.tokenizer.render_chat(prompt, True, row.tools, options, answers=True)
        before = asked.text
        rendered = self.tokenizer.render_chat(messages, False, row.tools, options, answers=not everything)
        if not rendered.text.startswith(before):
            raise _Unusable(
                "the chat template renders the prompt in another way when the completion follows. It rendered\n"
                f"{before}\nand with the completion\n{rendered.text}"
            )
        cuts = {len(before), *(begin for begin, _ in (*asked.answers, *rendered.answers))}  # where generation begins
        ids, places = self.tokenizer.encode_rendered(rendered, sorted(cuts))
        mask = [begin >= len(before) or not self.completion_only for begin, _ in places]
        if not everything:
            mask = [a and b for a, b in zip(mask, covered(places, rendered.answers), strict=True)]
        ends = [index for index, number in enumerate(ids) if number == self.turn.stop_token_id]
        if ends and not rendered.text[places[ends[-1]][1] :].strip():
            ids, mask = ids[: ends[-1] + 1], mask[: ends[-1] + 1]
        self._look_at_messages(row, messages, ids)
        return ids, mask

    def _look_at_messages(self, row: Row, messages: Messages, ids: list[int]) -> None:
        if self.bos is not None and ids[:2] == [self.bos] * 2:
            self._find(
                DOUBLE_BOS, row, "the rendered conversation begins with two bos tokens: the template writes one too many"
            )
        for number, message in enumerate(messages):
            content = message.get("content", "")
            if not isinstance(content, str):
                continue
            if message["role"] == "assistant" and not content.strip() and "tool_calls" not in message:
                self._find(EMPTY, row, f"message {number} is an empty answer")
            self._look_for_special(row, content)

    # -- both --

    def _whole(self, row: Row, text: Text) -> Example:
        """Language modelling."""
        if isinstance(text, str):
            ids = [*self._opening(row, self._without_end(row, text)), self.eos]
            return self._fit(row, "", ids, [True] * len(ids), self.eos)
        assert self.turn is not None
        if self.assistant_only:
            ids, mask = masked_conversation(self.tokenizer, self.turn, text, row.tools, row.template_options)
        else:
            ids = self.tokenizer.chat_ids(text, False, row.tools, **(row.template_options or {}))
            mask = [True] * len(ids)
        self._look_at_messages(row, text, ids)
        return self._fit(row, "", ids, mask, self.turn.stop_token_id)

    def _completions(self, row: Row, names: Sequence[str]) -> tuple[Example, ...]:
        """The prompt with each of the responses."""
        opening = self._opening(row, row.prompt) if isinstance(row.prompt, str) else []
        examples = []
        for name, response in zip(names, row.responses, strict=True):
            if isinstance(row.prompt, str) and isinstance(response, str):
                ids, mask = self._string_completion(row, row.prompt, opening, response)
                stop = self.eos
            else:
                assert self.turn is not None and isinstance(row.prompt, tuple) and isinstance(response, tuple)
                ids, mask = self._chat_completion(row, row.prompt, response)
                stop = self.turn.stop_token_id
            examples.append(self._fit(row, name, ids, mask, stop))
        return tuple(examples)

    def _fit(self, row: Row, name: str, ids: list[int], mask: list[bool], stop: int) -> Example:
        """The example, of at most max_length tokens."""
        what = name or "the row"
        length = len(ids)
        if length > self.max_length:
            if self.on_long != "truncate":
                self._too_long(row, what, length, "raise max_length, or pass on_long='truncate' or 'drop'")
            ids, mask = ids[: self.max_length], mask[: self.max_length]
            self._find(TRUNCATED, row, f"{what} keeps {self.max_length} of {length} tokens")
        mask = [False, *mask[1:]][: len(ids)]
        if not any(mask):
            cut = f" of the {self.max_length} that are kept of {length}" if length > self.max_length else ""
            raise _Unusable(f"{what} has no token to learn{cut}: the mask is empty")
        if stop not in [number for number, counts in zip(ids, mask, strict=True) if counts]:
            self._find(NO_STOP, row, f"{what} has no {self.tokenizer.decode([stop])!r} to learn, which would end it")
        return Example(np.array(ids, np.int32), np.array(mask, np.bool_), row.columns, row.where, row.prompt_key)

    def _too_long(self, row: Row, what: str, length: int, advice: str) -> NoReturn:
        message = f"{what} has {length} tokens, more than {self.limit}"
        if self.on_long == "error":
            raise ValueError(f"{row.where}: {message}: {advice}")
        self._find(DROPPED, row, message)
        raise _Dropped


def _fingerprint(examples: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in examples:
        digest.update(f"{type(item).__name__} {getattr(item, 'label', None)} {getattr(item, 'ranking', None)} ".encode())
        digest.update(f"{getattr(item, 'margin', None)}\n".encode())
        for sequence in sequences(item):
            mask = sequence.mask if isinstance(sequence, Example) else np.zeros(0, np.bool_)
            digest.update(f"{len(sequence.tokens)} {len(mask)}\n".encode())
            digest.update(sequence.tokens.astype("<i4").tobytes() + mask.tobytes())
    return digest.hexdigest()


def sequences(item: Example | Preference | Unpaired | Ranking | Prompt) -> tuple[Example | Prompt, ...]:
    """Every sequence of tokens of an item."""
    if isinstance(item, Preference):
        return (item.chosen, item.rejected)
    if isinstance(item, Ranking):
        return item.responses
    return (item.example if isinstance(item, Unpaired) else item,)


# --- split and order ----------------------------------------------------------------------------------------


def split_examples(examples: ExampleSet[Item], fraction: float, seed: int = 0) -> tuple[ExampleSet[Item], ExampleSet[Item]]:
    """(training, held out). A hash of the prompt decides, so equal prompts stand on one side, whatever else there is.

    With two prompts or more neither side is empty, unless `fraction` is 0. Raises ValueError for a fraction outside
    of [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction is {fraction}: it must be at least 0 and below 1")
    digests = [hashlib.blake2b(f"{seed} {item.prompt_key}".encode(), digest_size=16).digest() for item in examples.examples]
    held_out = held_out_digests(set(digests), fraction)
    sides = []
    for side in (False, True):
        chosen = tuple(item for item, digest in zip(examples.examples, digests, strict=True) if (digest in held_out) == side)
        report = dataclasses.replace(examples.report, examples=len(chosen))
        sides.append(dataclasses.replace(examples, examples=chosen, report=report, fingerprint=_fingerprint(chosen)))
    return sides[0], sides[1]


class Batches(Generic[Item]):
    """Endless examples, in a fresh order every epoch: `take(cursor, count)` gives the next `count`.

    The order is a function of (number of examples, seed, epoch), so a resume needs the cursor only. An epoch's last
    examples are followed by the next epoch's first: no example is left out, none comes twice in an epoch.
    """

    def __init__(self, examples: ExampleSet[Item], seed: int = 0) -> None:
        if not examples.examples:
            raise ValueError("there are no examples to take batches of")
        self.examples: tuple[Item, ...] = examples.examples
        self.seed = seed
        self._last: tuple[int, list[int]] | None = None
        #: Equal means the same examples for equal cursors: what a checkpoint compares before it resumes.
        self.fingerprint = hashlib.sha256(f"{examples.fingerprint} {seed}".encode()).hexdigest()

    def __len__(self) -> int:
        """Examples of an epoch."""
        return len(self.examples)

    def order(self, epoch: int) -> list[int]:
        """Indices of the examples in the order of an epoch; the last one asked for is kept."""
        if self._last is None or self._last[0] != epoch:
            numbers = hashes(f"examples {self.seed} {epoch}", len(self.examples))
            self._last = epoch, [int(index) for index in np.argsort(numbers, kind="stable")]
        return self._last[1]

    def take(self, cursor: Cursor, count: int) -> tuple[list[Item], Cursor]:
        """The next `count` examples, over the end of an epoch if need be, and the cursor behind them."""
        if count < 1:
            raise ValueError(f"count is {count}: it must be at least 1")
        epoch, index = cursor.epoch, cursor.index
        if epoch < 0 or not 0 <= index <= len(self.examples):
            raise ValueError(f"{cursor} is outside of this data: it belongs to other data")
        taken: list[Item] = []
        while True:
            part = self.order(epoch)[index : index + count - len(taken)]
            taken += [self.examples[number] for number in part]
            index += len(part)
            if index == len(self.examples):
                epoch, index = epoch + 1, 0
            if len(taken) == count:
                return taken, Cursor(epoch, index)
