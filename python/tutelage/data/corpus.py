"""The corpus: documents tokenised once into a memory-mapped file, and what of them is held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tutelage import files
from tutelage.data.documents import Document, DocumentSet, SourceReport
from tutelage.data.packing import piece_ranges
from tutelage.data.tokenizer import Tokenizer

_TOKENS, _LENGTHS = "tokens.bin", "lengths.bin"
# Characters encoded at once: the tokenizer needs about 40 bytes of memory for each.
_BATCH = 1 << 22
# A longer document is encoded in parts cut behind a line break: the tokenizer's time and memory grow faster
# than the text, and one document keeps one core busy. No byte is lost; a merge across the cut is.
_PART = 1 << 18


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of one source.

    A model's bits per byte on them is `bits_per_byte(nats, held_out.bytes)`, where `nats` is the sum of -log
    p over all tokens but the first of every sequence: so each token of every document is predicted once, and
    its end too, as a compressor must also say where a document ends.
    """

    name: str
    documents: tuple[str, ...]
    bytes: int
    """UTF-8 bytes of the documents."""
    tokens: tuple[npt.NDArray[np.unsignedinteger], ...]
    """Per document: its tokens and the end token."""
    start_token: int

    def sequences(self, context: int) -> list[npt.NDArray[np.int32]]:
        """Sequences of at most `context` tokens for the model: [start token, tokens…], no two overlapping.

        A longer document is read in consecutive windows, each of which starts fresh.
        """
        return [
            np.concatenate([[self.start_token], tokens[begin:end]]).astype(np.int32)
            for tokens in self.tokens
            for begin, end in zip(*piece_ranges(np.array([len(tokens)]), context)[:2], strict=True)
        ]


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents: `build` makes one."""

    tokens: npt.NDArray[np.unsignedinteger]
    """[N] uint16 (uint32 above 65536 ids), memory-mapped: the documents one after the other, an end token
    after each."""
    lengths: npt.NDArray[np.int64]
    """[D] tokens of each document, its end token included."""
    documents: DocumentSet
    start_token: int
    """What a sequence starts with, so that the first token of a text is predicted too: bos, or eos if there
    is none."""
    fingerprint: str
    """SHA-256 of everything above and of the split: equal means the same training data."""

    @classmethod
    def build(cls, documents: DocumentSet, tokenizer: Tokenizer, cache_folder: str | Path) -> Corpus:
        """Tokenise `documents` into `cache_folder`, or take them from there if it was done before.

        The cache is one folder for each (documents, tokenizer), named by their hash, and verified when it is
        read. Raises ValueError for a tokenizer without end token or a damaged cache, and FileError if another
        process is writing into `cache_folder` or it cannot be written.
        """
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer names no end of text: set eos_token in its tokenizer_config.json")
        start = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        folder = Path(cache_folder) / _key(documents.documents, tokenizer)
        if not folder.exists():
            files.make_folder(folder.parent)
            with files.lock_folder(folder.parent):
                if not folder.exists():  # another process may have made it before we had the lock
                    lengths: list[int] = []
                    tokens = _encode(documents.documents, tokenizer, eos, dtype, lengths)
                    # In this order: `lengths` is complete once the tokens are written.
                    files.write_folder(folder, {_TOKENS: tokens, _LENGTHS: _int64_chunks(lengths)})
        try:
            files.verify_folder(folder)
        except files.CheckpointError as error:
            raise ValueError(f"{error}; delete {folder}, it will be made again") from error
        return cls(
            tokens=np.memmap(folder / _TOKENS, dtype=dtype, mode="r"),
            lengths=np.fromfile(folder / _LENGTHS, dtype="<i8"),
            documents=documents,
            start_token=start,
            fingerprint=_fingerprint(folder.name, documents),
        )

    @property
    def sources(self) -> tuple[SourceReport, ...]:
        """What became of every source, tokens included."""
        held_out = self.held_out_mask
        source = self.source_of_document
        return tuple(
            dataclasses.replace(
                report,
                tokens=int(self.lengths[(source == index) & ~held_out].sum()),
                held_out_tokens=int(self.lengths[(source == index) & held_out].sum()),
            )
            for index, report in enumerate(self.documents.sources)
        )

    @property
    def held_out_mask(self) -> npt.NDArray[np.bool_]:
        """[D] which documents are held out."""
        return np.array([document.held_out for document in self.documents.documents])

    @property
    def source_of_document(self) -> npt.NDArray[np.int64]:
        """[D] index of each document's source."""
        return np.array([document.source for document in self.documents.documents])

    def held_out(self) -> list[HeldOut]:
        """The held-out documents of every source that has some."""
        ends = np.cumsum(self.lengths)
        found = []
        for index, report in enumerate(self.documents.sources):
            members = [
                (document.text, self.tokens[end - length : end])
                for document, length, end in zip(self.documents.documents, self.lengths, ends, strict=True)
                if document.held_out and document.source == index
            ]
            if members:
                texts, tokens = zip(*members, strict=True)
                found.append(HeldOut(report.name, texts, report.held_out_bytes, tokens, self.start_token))
        return found


def _key(documents: Iterable[Document], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{files.FORMAT_VERSION} {tokenizer.fingerprint}\n".encode())
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()


def _fingerprint(key: str, documents: DocumentSet) -> str:
    digest = hashlib.sha256(key.encode())
    for document in documents.documents:
        digest.update(f"{document.source} {document.held_out}\n".encode())
    for source in documents.sources:
        digest.update(f"{source.weight!r}\n".encode())
    return digest.hexdigest()


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer, eos: int, dtype: np.dtype, lengths: list[int]
) -> Iterator[bytes]:
    """The bytes of the token file; appends each document's length to `lengths` on the way."""
    length = 0
    for batch in _batches(documents):
        encoded = tokenizer.encode_batch([text for text, _ in batch])
        for ids, (_, is_last) in zip(encoded, batch, strict=True):
            if is_last:
                ids.append(eos)
            length += len(ids)
            if is_last:
                lengths.append(length)
                length = 0
        yield np.fromiter((i for ids in encoded for i in ids), dtype).tobytes()


def _int64_chunks(numbers: list[int]) -> Iterator[bytes]:
    yield np.array(numbers, "<i8").tobytes()


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Parts of documents, each with whether it is its document's last, some `_BATCH` characters at a time."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        parts = _parts(document.text)
        for number, part in enumerate(parts, start=1):
            batch.append((part, number == len(parts)))
            size += len(part)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parts(text: str) -> list[str]:
    """The text in parts of at most `_PART` characters, cut behind a line break where there is one."""
    parts = []
    begin = 0
    while len(text) - begin > _PART:
        end = text.rfind("\n", begin, begin + _PART) + 1 or begin + _PART
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]
