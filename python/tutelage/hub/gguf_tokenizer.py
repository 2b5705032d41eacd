"""A GGUF file's tokenizer as the files of a Hugging Face folder.

Byte-level BPE (tokenizer.ggml.model "gpt2"): tokens and merges are in the file, the rule that splits text before the
merges only by a name. The names of `PRE_TOKENIZERS` are known with the rule that the models' own tokenizer.json has;
others are refused. SentencePiece's BPE ("llama") has scores instead of merges: the merges follow from them, as in
transformers' conversion.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.data.tokenizer import Tokenizer
from tutelage.hub.gguf_file import GgufFile, Value

_MODEL = "tokenizer.ggml.model"
_PRE = "tokenizer.ggml.pre"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BLANK = "\u2581"  # SentencePiece's space


# --- rules --------------------------------------------------------------------------------------------------


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before the merges. ignore_merges: a piece that is a token stays whole. adds_bos: where the file
    does not say whether bos stands in front of every text."""

    rule: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(_byte_level(True)),
    "smollm": PreTokenizer(_sequence({"type": "Digits", "individual_digits": True}, _byte_level(True))),
    "qwen2": PreTokenizer(_sequence(_split(_QWEN2), _byte_level(False)), normalizer={"type": "NFC"}),
    "llama-bpe": PreTokenizer(_sequence(_split(_LLAMA3), _byte_level(False)), ignore_merges=True, adds_bos=True),
    "smaug-bpe": PreTokenizer(_sequence(_split(_LLAMA3), _byte_level(False))),
    "tekken": PreTokenizer(_sequence(_split(_TEKKEN), _byte_level(False)), ignore_merges=True, adds_bos=True),
    # What llama.cpp does where a file of before 2024 says nothing.
    "default": PreTokenizer(
        _sequence(
            _split(r"[\p{P}\$\+<=>\^~\|]+"), _split(_GPT2), _split(r"\p{N}+"), _split("[0-9][0-9][0-9]"), _byte_level(False)
        )
    ),
}  # fmt: skip
"""Names of tokenizer.ggml.pre, each with what the models' own tokenizer.json says."""
# Other names that llama.cpp has for the same rule.
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


# --- in -----------------------------------------------------------------------------------------------------


def read_tokenizer(file: GgufFile, vocab_size: int) -> tuple[dict[str, bytes], tuple[int, ...]]:
    """The tokenizer's files (name to bytes), and the ids that end an answer.

    Raises ValueError naming the file and the metadata value that is missing, malformed or not supported.
    """
    return _Reader(file, vocab_size).read()


class _Reader:
    def __init__(self, file: GgufFile, vocab_size: int) -> None:
        self.path = file.path
        self.metadata = file.metadata
        self.tokens = self._tokens(vocab_size)
        self.types = self._types()

    def read(self) -> tuple[dict[str, bytes], tuple[int, ...]]:
        kind = self._string(_MODEL)
        if kind == "gpt2":
            document = self._byte_level()
        elif kind == "llama":
            document = self._sentencepiece()
        else:
            raise self._error(_MODEL, "must be 'gpt2' (byte-level BPE) or 'llama' (SentencePiece BPE)")
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            number = self._id(theirs)
            if number is not None:
                config[f"{ours}_token"] = self.tokens[number]
        contents = {"tokenizer.json": _json(document), "tokenizer_config.json": _json(config)}
        template = self.metadata.get("tokenizer.chat_template")
        if template is not None:
            contents["chat_template.jinja"] = self._string("tokenizer.chat_template").encode()
        self._check(contents)
        ends = [number for number in map(self._id, ("eos", "eot", "eom")) if number is not None]
        return contents, tuple(dict.fromkeys(ends))

    def _check(self, contents: Mapping[str, bytes]) -> None:
        """Every token has its id in what was made, or an error says which has not."""
        backend = Tokenizer.from_contents(contents, str(self.path)).backend
        ids = backend.get_vocab(with_added_tokens=True)
        for number, token in enumerate(self.tokens):
            if self.types[number] != _UNUSED and ids.get(token) != number:
                raise ValueError(
                    f"{self.path}: the token {reprlib.repr(token)} would get the id {ids.get(token)} instead of {number}"
                )

    # ---- values

    def _error(self, name: str, problem: str) -> ValueError:
        value = reprlib.repr(self.metadata[name]) if name in self.metadata else "missing"
        return ValueError(f"{self.path}: {name} {problem}, but it is {value}")

    def _string(self, name: str) -> str:
        value = self.metadata.get(name)
        if not isinstance(value, str):
            raise self._error(name, "must be a string")
        return value

    def _flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise self._error(f"tokenizer.ggml.{name}", "must be true or false")
        return value

    def _strings(self, name: str) -> list[str]:
        value = self.metadata.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self._error(name, "must be a list of strings")
        return value

    def _tokens(self, vocab_size: int) -> list[str]:
        name = "tokenizer.ggml.tokens"
        tokens = self._strings(name)
        if not 0 < len(tokens) <= vocab_size:
            raise ValueError(f"{self.path}: {name} has {len(tokens)} entries, but the model has {vocab_size} token ids")
        seen: dict[str, int] = {}
        for number, token in enumerate(tokens):
            if seen.setdefault(token, number) != number:
                raise ValueError(f"{self.path}: {name} has {reprlib.repr(token)} twice, as {seen[token]} and {number}")
        return tokens

    def _types(self) -> list[int]:
        name = "tokenizer.ggml.token_type"
        value = self.metadata.get(name)
        if value is None:
            return [_NORMAL] * len(self.tokens)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != len(self.tokens):
            raise self._error(name, f"must be a list of {len(self.tokens)} integers")
        types: list[int] = value.tolist()
        wrong = next((i for i, entry in enumerate(types) if not _NORMAL <= entry <= _BYTE), None)
        if wrong is not None:
            raise ValueError(f"{self.path}: {name} has {types[wrong]} for token {wrong}; there are types {_NORMAL} to {_BYTE}")
        return types

    def _id(self, kind: str) -> int | None:
        name = f"tokenizer.ggml.{kind}_token_id"
        value = self.metadata.get(name)
        if value is None or value in (2**32 - 1, -1):  # llama.cpp's "none"
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise self._error(name, f"must be an id below {len(self.tokens)}")
        return value

    # ---- tokenizer.json

    def _document(self, adds_bos: bool, adds_eos: bool, **parts: Any) -> dict[str, Any]:
        added = [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
        document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
        return {**document, "post_processor": self._post_processor(adds_bos, adds_eos), **parts}

    def _post_processor(self, adds_bos: bool, adds_eos: bool) -> dict[str, Any] | None:
        ends: dict[str, int] = {}
        for kind, wanted in (("bos", self._flag("add_bos_token", adds_bos)), ("eos", self._flag("add_eos_token", adds_eos))):
            number = self._id(kind)
            if wanted:
                if number is None:
                    raise self._error(f"tokenizer.ggml.{kind}_token_id", "must be a token id, as it is added to every text")
                ends[kind] = number
        if not ends:
            return None

        def around(name: str, kind: int) -> list[dict[str, Any]]:
            text = {"Sequence": {"id": name, "type_id": kind}}
            bos, eos = (
                [{"SpecialToken": {"id": self.tokens[ends[end]], "type_id": kind}}] if end in ends else []
                for end in ("bos", "eos")
            )
            return [*bos, text, *eos]

        tokens = {self.tokens[number]: number for number in ends.values()}
        return {
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": around("A", 0) + around("B", 1),
            "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in tokens.items()},
        }

    def _vocabulary(self) -> dict[str, int]:
        """What the model of tokenizer.json knows. The library numbers added tokens on from there, so those in front
        of a normal one are in it too."""
        plain = [number for number, kind in enumerate(self.types) if kind in (_NORMAL, _BYTE)]
        end = plain[-1] + 1 if plain else 0
        return {token: number for number, token in enumerate(self.tokens[:end]) if self.types[number] != _UNUSED}

    def _byte_level(self) -> dict[str, Any]:
        name = self.metadata.get(_PRE, "default")
        pre = PRE_TOKENIZERS.get(_ALIASES.get(str(name), str(name)))
        if pre is None:
            raise self._error(_PRE, f"must be one of {', '.join(PRE_TOKENIZERS)}")
        return self._document(
            pre.adds_bos,
            False,
            normalizer=pre.normalizer,
            pre_tokenizer=pre.rule,
            decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            model=_bpe(self._vocabulary(), self._merges(), ignore_merges=pre.ignore_merges),
        )

    def _merges(self) -> list[tuple[str, str]]:
        name = "tokenizer.ggml.merges"
        known = set(self.tokens)
        merges = []
        for number, merge in enumerate(self._strings(name)):
            left, _, right = merge.partition(" ")
            if not {left, right, left + right} <= known:
                raise ValueError(f"{self.path}: {name} has {reprlib.repr(merge)} as entry {number}, but no such tokens")
            merges.append((left, right))
        return merges

    def _sentencepiece(self) -> dict[str, Any]:
        for name in ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"):
            if self.metadata.get(name, False) is not False:
                raise self._error(name, "is not supported")
        scores = self.metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(self.tokens):
            raise self._error("tokenizer.ggml.scores", f"must be a list of {len(self.tokens)} numbers")
        if not bool(np.isfinite(scores).all()):
            raise ValueError(f"{self.path}: tokenizer.ggml.scores holds NaN or an infinity")
        unknown = self._id("unknown")
        prefix = self._flag("add_space_prefix", True)
        vocabulary = self._vocabulary()
        pieces = {t: float(scores[i]) for t, i in vocabulary.items() if self.types[i] in (_NORMAL, _USER_DEFINED)}
        return self._document(
            True,
            False,
            pre_tokenizer=None,
            **sentencepiece_rules(prefix),
            model=_bpe(
                vocabulary,
                merges_of(pieces),
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            ),
        )


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


def _bpe(vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**defaults, **options, "vocab": dict(vocabulary), "merges": [list(pair) for pair in merges]}


def sentencepiece_rules(prefix: bool) -> dict[str, Any]:
    """Normalizer and decoder of Llama 2's tokenizer.json; prefix: a blank is put in front of a text."""
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if not prefix:
        return {"normalizer": blanks, "decoder": {"type": "Sequence", "decoders": decoders}}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _BLANK}, blanks]},
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    }


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: every split of a piece into two pieces, the best piece first."""
    merges = [
        (score, len(piece[:cut]), len(piece[cut:]), piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in merges]
