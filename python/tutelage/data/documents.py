"""Documents for pretraining: read from files, folders or rows, freed of duplicates, split by document."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.data.rows import SUFFIXES, BadRow, BadRows, files_of, read_file


@dataclass(frozen=True)
class Source:
    """One source of documents: a file, a folder (read recursively), or any iterable of rows `{"text": …}`.

    .txt: a file is a document. .jsonl, .json (a list), .parquet: a row is a document, its field `text`.
    `weight` is how often an epoch sees each training document of this source; 0.5 is every second epoch.
    """

    data: str | Path | Iterable[Mapping[str, Any]]
    weight: float = 1.0
    name: str = ""
    """What reports and errors call it; default: the path as given, or "rows"."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", str(self.data) if isinstance(self.data, (str, Path)) else "rows")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"the weight of {self.name} is {self.weight}: it must be a positive number")

    @classmethod
    def parse(cls, spec: str) -> Source:
        """`"books/"` or, with a weight, `"forum.jsonl:2"`."""
        path, colon, weight = spec.rpartition(":")
        if not colon or Path(spec).exists():
            return cls(spec)
        try:
            number = float(weight)
        except ValueError as error:
            raise ValueError(f"{spec} does not exist, and the weight {weight!r} after its colon is not a number") from error
        return cls(path, number)


@dataclass(frozen=True)
class Document:
    text: str
    source: int
    """Index into `DocumentSet.sources`."""
    held_out: bool


@dataclass(frozen=True)
class SourceReport:
    """What became of one source. Bytes are UTF-8; held-out figures are not part of the training figures."""

    name: str
    weight: float
    documents: int
    bytes: int
    held_out_documents: int
    held_out_bytes: int
    duplicates: int
    """Documents dropped because this source or an earlier one holds the same text."""
    empty: int
    """Documents dropped because they hold nothing but white space."""
    bad_rows: tuple[str, ...]
    """Where and why, for every row skipped by `on_bad_row="skip:<max>"`."""
    ignored_files: int
    """Files of a folder that are hidden or of a kind that is not read."""
    cut: bool
    """The source is one single document, so its end was cut off and held out."""
    tokens: int | None = None
    """Training tokens, one end token for each document included; None until tokenised."""
    held_out_tokens: int | None = None


@dataclass(frozen=True)
class DocumentSet:
    documents: tuple[Document, ...]
    sources: tuple[SourceReport, ...]

    def training_texts(self) -> Iterator[str]:
        return (document.text for document in self.documents if not document.held_out)


def read_documents(sources: Sequence[Source | str], held_out_fraction: float = 0.05, on_bad_row: str = "error") -> DocumentSet:
    """Read every source; drop exact duplicates and empty documents; decide which documents are held out.

    Whether a document is held out depends on its text alone (a hash), not on the order of documents or
    sources; of every source with two documents or more at least one is held out and at least one is not. A
    source of one single document is cut in two near a line break, and its last `held_out_fraction` is held
    out. `held_out_fraction=0` holds nothing out. The texts are held in memory.

    A bad row (no JSON, no string field `text`, no UTF-8) is an error naming file and line, or with
    `on_bad_row="skip:<max>"` is left out and reported, up to `max` rows in all. Raises FileNotFoundError,
    ImportError (.parquet without pyarrow) or ValueError.
    """
    if not sources:
        raise ValueError("no sources of documents given")
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}: it must be at least 0 and below 1")
    bad_rows = BadRows(on_bad_row)
    seen: set[bytes] = set()
    documents: list[Document] = []
    reports = []
    for index, source in enumerate(Source.parse(s) if isinstance(s, str) else s for s in sources):
        read = _Reader(bad_rows)
        texts: dict[bytes, str] = {}
        total = empty = 0
        for text in read.texts(source):
            total += 1
            if text.strip():
                texts.setdefault(_digest(text), text)
            else:
                empty += 1
        duplicates = total - empty - len(texts)
        parts = _cut(next(iter(texts.values())), held_out_fraction) if len(texts) == 1 else []
        if parts:
            texts = {_digest(part): part for part in parts}
        unseen = {digest: text for digest, text in texts.items() if digest not in seen}
        duplicates += len(texts) - len(unseen)
        if not unseen:
            raise ValueError(f"{source.name} adds no documents ({total} read: {empty} empty, {duplicates} duplicates)")
        seen.update(unseen)
        held_out = {_digest(parts[1])} & set(unseen) if parts else held_out_digests(unseen, held_out_fraction)
        documents += [Document(text, index, digest in held_out) for digest, text in unseen.items()]
        sizes = {digest: len(text.encode()) for digest, text in unseen.items()}
        held_out_bytes = sum(sizes[digest] for digest in held_out)
        reports.append(
            SourceReport(
                name=source.name,
                weight=source.weight,
                documents=len(unseen) - len(held_out),
                bytes=sum(sizes.values()) - held_out_bytes,
                held_out_documents=len(held_out),
                held_out_bytes=held_out_bytes,
                duplicates=duplicates,
                empty=empty,
                bad_rows=tuple(read.skipped),
                ignored_files=read.ignored_files,
                cut=bool(parts),
            )
        )
    return DocumentSet(tuple(documents), tuple(reports))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def held_out_digests(digests: Iterable[bytes], fraction: float) -> set[bytes]:
    """Digests below `fraction` of their range; with two or more, never none of them and never all."""
    ordered = sorted(digests)
    if fraction == 0 or len(ordered) < 2:
        return set()
    threshold = int(fraction * 2**64)
    count = sum(int.from_bytes(digest[:8], "big") < threshold for digest in ordered)
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])


def _cut(text: str, fraction: float) -> list[str]:
    """The text in two parts, the second about `fraction` of it, or [] where that leaves no two."""
    target = len(text) - int(len(text) * fraction)
    earliest = max(2 * target - len(text), 0)  # the held-out part is at most twice what was asked for
    line, space = text.rfind("\n", earliest, target), text.rfind(" ", earliest, target)
    at = line + 1 if line >= 0 else space + 1 if space >= 0 else target
    parts = [text[:at], text[at:]]
    return parts if all(part.strip() for part in parts) and parts[0] != parts[1] else []


class _Reader:
    """Reads one source, and notes what it had to leave out."""

    def __init__(self, bad_rows: BadRows) -> None:
        self.bad_rows = bad_rows
        self.skipped: list[str] = []
        self.ignored_files = 0

    def texts(self, source: Source) -> Iterator[str]:
        for where, row in self._rows(source):
            text = row if isinstance(row, BadRow) else _text(row)
            if isinstance(text, BadRow):
                self.skipped.append(self.bad_rows.add(where, text.reason))
            else:
                yield text

    def _rows(self, source: Source) -> Iterator[tuple[str, object]]:
        if not isinstance(source.data, (str, Path)):
            yield from ((f"{source.name}, row {number}", row) for number, row in enumerate(source.data))
            return
        files, self.ignored_files = files_of(Path(source.data), (".txt", *SUFFIXES))
        for file in files:
            if file.suffix == ".txt":
                yield _read_txt(file)
            else:
                yield from read_file(file, ["text"])


def _text(row: object) -> str | BadRow:
    if not isinstance(row, Mapping):
        return BadRow(f"the row is {type(row).__name__}, not an object with a field 'text'")
    if "text" not in row:
        return BadRow(f"no field 'text' (it has: {', '.join(sorted(map(str, row))[:8]) or 'none'})")
    text = row["text"]
    if not isinstance(text, str):
        return BadRow(f"field 'text' is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRow(f"field 'text' has a lone surrogate at character {error.start}: it is no valid Unicode")
    return text


def _read_txt(path: Path) -> tuple[str, object]:
    try:
        return str(path), {"text": path.read_bytes().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return str(path), BadRow(f"no UTF-8 at byte {error.start}")
