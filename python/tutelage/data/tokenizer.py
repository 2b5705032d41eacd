"""Tokenizers: text to token ids and back, and training one. Thin over the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tutelage import files

_TOKENIZER = "tokenizer.json"
# Everything of a Hugging Face folder that belongs to the tokenizer: kept byte for byte by `save`.
_TOKENIZER_FILES = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Where the ids of special tokens are looked up when the files above do not name them.
_MODEL_FILES = ("generation_config.json", "config.json")


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 on (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    `eos_token_id` ends a document, `bos_token_id` starts one; each is None where the tokenizer has none.
    Build it with `Tokenizer.from_pretrained(folder)` or `train_tokenizer(documents, vocab_size)`.
    """

    backend: tokenizers.Tokenizer
    contents: Mapping[str, bytes]
    """The tokenizer's files, name to bytes: what `save` writes."""
    vocab_size: int
    """Every id is below this."""
    eos_token_id: int | None
    bos_token_id: int | None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read a Hugging Face folder (or one that `save` wrote).

        Raises FileNotFoundError without a tokenizer.json, ValueError naming the file that cannot be
        understood.
        """
        folder = Path(folder)
        if not (folder / _TOKENIZER).is_file():
            raise FileNotFoundError(f"no {_TOKENIZER} in {folder}")
        present = [name for name in (*_TOKENIZER_FILES, *_MODEL_FILES) if (folder / name).is_file()]
        return cls._from_contents({name: (folder / name).read_bytes() for name in present}, str(folder))

    @classmethod
    def _from_contents(cls, contents: Mapping[str, bytes], where: str) -> Tokenizer:
        backend = _load_backend(contents[_TOKENIZER], f"{where}/{_TOKENIZER}")
        # What a file asks for in passing must not drop, add or merge tokens: the caller decides about
        # lengths, and text that spells <|endoftext|> is text.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        ids = backend.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError(f"{where}/{_TOKENIZER}: the vocabulary is empty")
        configs = {
            name: _load_object(data, f"{where}/{name}")
            for name, data in contents.items()
            if name.endswith(".json") and name != _TOKENIZER
        }
        return cls(
            backend=backend,
            contents={name: data for name, data in contents.items() if name in _TOKENIZER_FILES},
            vocab_size=max(ids.values()) + 1,
            eos_token_id=_special_id("eos", configs, ids, where),
            bos_token_id=_special_id("bos", configs, ids, where),
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's rules and special ids: equal means equal ids for every text."""
        ids = f"{self.eos_token_id} {self.bos_token_id}\n".encode()
        return hashlib.sha256(ids + self.contents[_TOKENIZER]).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Nothing is added, and the spelling of a special token is plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores. Raises ValueError for text that has no UTF-8 (lone
        surrogates)."""
        for row, text in enumerate(texts):
            _check_text(text, f"text {row}")
        # "fast" leaves out the offsets, which cost more memory than the ids
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelled out. Bytes that are no UTF-8 become U+FFFD.

        Raises ValueError naming the position of an id outside the vocabulary.
        """
        numbers = [int(i) for i in ids]
        for position, number in enumerate(numbers):
            if not 0 <= number < self.vocab_size:
                raise ValueError(f"token id {number} at position {position} is outside the vocabulary of {self.vocab_size}")
        return self.backend.decode(numbers, skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for in running text, by id; b"" for ids that no token has.

        Raises ValueError for a tokenizer whose tokens are neither byte-level (GPT-2, Llama 3, Qwen) nor SentencePiece's.
        """
        decoder = json.dumps(json.loads(self.backend.to_str()).get("decoder"), ensure_ascii=False)
        added = set(self.backend.get_added_tokens_decoder())
        spelled = [b""] * self.vocab_size
        for token, number in self.backend.get_vocab(with_added_tokens=True).items():
            if number in added:
                spelled[number] = token.encode()
            elif '"ByteLevel"' in decoder:
                spelled[number] = bytes(_BYTE_OF[character] for character in token)
            elif "\u2581" in decoder:
                byte = re.fullmatch("<0x([0-9A-F]{2})>", token) if '"ByteFallback"' in decoder else None
                spelled[number] = bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()
            else:
                raise ValueError("this tokenizer is neither byte-level nor SentencePiece's: what a token spells is not known")
        return spelled

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder`; `transformers.AutoTokenizer` can read them."""
        folder = Path(folder)
        files.make_folder(folder)
        for name, data in self.contents.items():
            files.write_file_atomic(folder / name, data)


def train_tokenizer(documents: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ("<|endoftext|>",)) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenisation, Radford et al. 2019) on `documents`.

    Ids: the special tokens first, then the 256 bytes, then the merges in the order they were learned. The
    first special token ends (and starts) documents. Any text can be encoded and comes back unchanged. The
    same documents in the same order give the same bytes. With little text there may be fewer than
    `vocab_size` tokens: `Tokenizer.vocab_size` is the truth.

    Raises ValueError when `vocab_size` does not hold the bytes and the special tokens.
    """
    if not special_tokens or len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
        raise ValueError(f"special_tokens must be distinct, non-empty and at least one, not {special_tokens!r}")
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}: it must be at least {smallest} (256 bytes + {len(special_tokens)} special tokens)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_checked(documents), trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special_tokens[0],
        "clean_up_tokenization_spaces": False,
    }
    contents = {
        _TOKENIZER: backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }
    return Tokenizer._from_contents(contents, "the trained tokenizer")


def _checked(documents: Iterable[str]) -> Iterator[str]:
    for row, text in enumerate(documents):
        _check_text(text, f"document {row}")
        yield text


def _check_text(text: str, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has a lone surrogate at character {error.start}: it is no valid Unicode") from error


def _load_backend(data: bytes, where: str) -> tokenizers.Tokenizer:
    # The library raises bare Exception, and its Rust panics arrive as a BaseException that cannot be
    # imported.
    try:
        return tokenizers.Tokenizer.from_str(data.decode())
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{where} is no tokenizer: {error}") from error


def _load_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, not {type(value).__name__}")
    return value


def _special_id(kind: str, configs: Mapping[str, Mapping[str, Any]], ids: Mapping[str, int], where: str) -> int | None:
    """Id of the eos or bos token: the tokenizer's files name a token, the model's an id or several."""
    for name, config in configs.items():
        token = config.get(f"{kind}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            if not isinstance(token, str) or token not in ids:
                raise ValueError(f"{where}/{name}: {kind}_token {token!r} is not in the vocabulary")
            return ids[token]
        number = config.get(f"{kind}_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if number is not None:
            if isinstance(number, bool) or not isinstance(number, int) or number not in ids.values():
                raise ValueError(f"{where}/{name}: {kind}_token_id {number!r} is not in the vocabulary")
            return number
    return None
