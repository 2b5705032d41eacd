"""A GGUF file's tokenizer as the files of a Hugging Face folder, and back.

Byte-level BPE (tokenizer.ggml.model "gpt2"): tokens and merges are in the file, the rule that splits text before the
merges only by a name. The names of `PRE_TOKENIZERS` are known with the rule that the models' own tokenizer.json has;
others are refused. SentencePiece's BPE ("llama") has scores instead of merges: the merges follow from them, as in
transformers' conversion.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from tutelage.data.chat import template_sources
from tutelage.data.tokenizer import Tokenizer
from tutelage.hub.gguf_file import GgufFile, Value

_MODEL = "tokenizer.ggml.model"
_PRE = "tokenizer.ggml.pre"
_TEMPLATE = "tokenizer.chat_template"
_TEMPLATE_NAMES = "tokenizer.chat_templates"  # of further ones: tokenizer.chat_template.<name>
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")
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
        for number in map(self._id, _SPECIAL_IDS):
            if number is not None and self.types[number] == _UNUSED:  # but named: it is used
                self.types[number] = _CONTROL

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
        contents = {"tokenizer.json": _json(document)}
        names = self._strings(_TEMPLATE_NAMES) if _TEMPLATE_NAMES in self.metadata else []
        if names:
            templates = {"default": _TEMPLATE} | {name: f"{_TEMPLATE}.{name}" for name in names}
            config["chat_template"] = [
                {"name": name, "template": self._string(key)} for name, key in templates.items() if key in self.metadata
            ]
        elif _TEMPLATE in self.metadata:
            contents["chat_template.jinja"] = self._string(_TEMPLATE).encode()
        contents["tokenizer_config.json"] = _json(config)
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
        if value is None or (type(value) is int and value in (2**32 - 1, -1)):  # llama.cpp's "none"
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
        """What the model of tokenizer.json knows. The library gives added tokens the ids behind it, so only those that
        come last, without a gap, may be left out (as Llama 3's and Qwen's files do)."""
        used = [number for number, kind in enumerate(self.types) if kind != _UNUSED]
        plain = [number for number in used if self.types[number] in (_NORMAL, _BYTE)]
        end = plain[-1] + 1 if plain and used == list(range(len(used))) else len(self.tokens)
        return {self.tokens[number]: number for number in used if number < end}

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
        known = self._vocabulary().keys()
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


# --- out ----------------------------------------------------------------------------------------------------


def describe_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int], where: str) -> dict[str, Value]:
    """The metadata of a tokenizer for llama.cpp, which then has the same ids for every text.

    Args:
        vocab_size: the model's; ids that the tokenizer has not are padded with unused tokens.
        eos_token_ids: what ends the model's answers; at most three.
        where: what an error calls the tokenizer.

    Raises ValueError naming the part of tokenizer.json that llama.cpp has not.
    """
    return _Writer(tokenizer, vocab_size, where).describe(eos_token_ids)


class _Writer:
    def __init__(self, tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
        self.tokenizer = tokenizer
        self.where = where
        self.document: dict[str, Any] = json.loads(tokenizer.contents["tokenizer.json"])
        self.model: dict[str, Any] = self.document["model"]
        self.config: dict[str, Any] = json.loads(tokenizer.contents.get("tokenizer_config.json", b"{}"))
        self.ids: dict[str, int] = tokenizer.backend.get_vocab(with_added_tokens=True)
        if tokenizer.vocab_size > vocab_size:
            self._fail(f"has {tokenizer.vocab_size} tokens, but the model has {vocab_size} ids")
        self.tokens = [f"[PAD{number}]" for number in range(vocab_size)]
        self.types = [_UNUSED] * vocab_size
        for token, number in self.ids.items():
            self.tokens[number], self.types[number] = token, _NORMAL
        for added in self.document.get("added_tokens", []):
            for option in ("lstrip", "rstrip", "single_word"):
                if added.get(option):
                    self._fail(f"has the added token {added['content']!r} with {option}, which llama.cpp has not")
            self.types[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED

    def describe(self, eos_token_ids: Sequence[int]) -> dict[str, Value]:
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(option):
                self._fail(f"has {option} = {self.model[option]!r}, which llama.cpp has not")
        if self.model.get("type") != "BPE":
            self._fail(f"is a {self.model.get('type')}: only BPE can be converted")
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in self.model["merges"]]
        kind = self._sentencepiece(merges) if self.model.get("byte_fallback") else self._byte_level(merges)
        described: dict[str, Value] = {
            **kind,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": np.array(self.types, np.int32),  # type: ignore[dict-item]
            **self._special_ids(eos_token_ids),
            **self._templates(),
        }
        return described

    def _fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.where}: tokenizer.json {problem}")

    def _byte_level(self, merges: Sequence[tuple[str, ...]]) -> dict[str, Value]:
        rule = _canonical(self.document.get("pre_tokenizer"))
        names = [
            name
            for name, pre in PRE_TOKENIZERS.items()
            if rule == _canonical(pre.rule)
            and self.document.get("normalizer") == pre.normalizer
            and bool(self.model.get("ignore_merges")) == pre.ignore_merges
        ]
        if not names:
            self._fail(
                f"splits text by a rule (pre_tokenizer, normalizer, ignore_merges) that is none of {', '.join(PRE_TOKENIZERS)}"
            )
        return {
            _MODEL: "gpt2",
            _PRE: names[0],
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
            "tokenizer.ggml.add_space_prefix": False,
        }

    def _sentencepiece(self, merges: Sequence[tuple[str, ...]]) -> dict[str, Value]:
        normalizer = self.document.get("normalizer")
        prefixes = [prefix for prefix in (True, False) if normalizer == sentencepiece_rules(prefix)["normalizer"]]
        if not prefixes or self.document.get("pre_tokenizer") is not None:
            self._fail("treats blanks in another way (normalizer, pre_tokenizer) than Llama 2's, which llama.cpp has not")
        for number, token in enumerate(self.tokens):
            if token == self.model.get("unk_token"):
                self.types[number] = _UNKNOWN
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                self.types[number] = _BYTE
        ranks: dict[str, int] = {}
        for pair in merges:
            ranks.setdefault("".join(pair), len(ranks))
        scores = np.zeros(len(self.tokens), np.float32)
        for number, token in enumerate(self.tokens):
            if self.types[number] in (_NORMAL, _USER_DEFINED):
                scores[number] = -ranks.get(token, len(ranks) + number)
        pieces = {t: float(scores[i]) for i, t in enumerate(self.tokens) if self.types[i] in (_NORMAL, _USER_DEFINED)}
        if merges_of(pieces) != list(merges):
            self._fail("has merges that do not follow from scores of its tokens, as llama.cpp needs them")
        return {
            _MODEL: "llama",
            _PRE: "default",
            "tokenizer.ggml.scores": scores,  # type: ignore[dict-item]
            "tokenizer.ggml.add_space_prefix": prefixes[0],
        }

    def _special_ids(self, eos_token_ids: Sequence[int]) -> dict[str, Value]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ends = list(dict.fromkeys(eos_token_ids))
        if eos is not None:  # the tokenizer's own first, where the model stops at it
            ends = [eos, *(number for number in ends if number != eos)] if eos in ends or not ends else ends
        if len(ends) > 3:
            self._fail(f"goes with a model that has {len(ends)} eos ids; llama.cpp has place for 3 (eos, eot, eom)")
        found: dict[str, Value] = {}
        for kind, number in (("bos", bos), *zip(("eos", "eot", "eom"), ends, strict=False)):
            if number is not None:
                found[f"tokenizer.ggml.{kind}_token_id"] = number
        for ours, theirs in (("unk", "unknown"), ("pad", "padding")):
            token = self.config.get(f"{ours}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in self.ids:
                found[f"tokenizer.ggml.{theirs}_token_id"] = self.ids[token]
        around = self.tokenizer.backend.encode("", add_special_tokens=True).ids
        wanted = {
            (with_bos, with_eos): [bos] * with_bos + [eos] * with_eos
            for with_bos in (False, True)
            for with_eos in (False, True)
        }
        for (with_bos, with_eos), ids in wanted.items():
            if around == ids:
                return found | {"tokenizer.ggml.add_bos_token": with_bos, "tokenizer.ggml.add_eos_token": with_eos}
        self._fail(f"puts the ids {around} around every text (post_processor); llama.cpp can add bos and eos")

    def _templates(self) -> dict[str, Value]:
        sources = template_sources(self.tokenizer.contents)
        if sources is None:
            return {}
        named = sources[0]
        if [*named] == ["default"]:
            return {_TEMPLATE: named["default"]}
        found: dict[str, Value] = {f"{_TEMPLATE}.{name}": text for name, text in named.items() if name != "default"}
        if "default" in named:
            found[_TEMPLATE] = named["default"]
        return found | {_TEMPLATE_NAMES: [name for name in named if name != "default"]}


def _canonical(rule: Any) -> Any:
    """A pre-tokenizer without what does not change the ids."""
    if not isinstance(rule, dict):
        return rule
    if rule.get("type") == "Sequence":
        parts = [_canonical(part) for part in rule.get("pretokenizers", [])]
        return parts[0] if len(parts) == 1 else parts
    return {name: value for name, value in rule.items() if name != "trim_offsets"}
