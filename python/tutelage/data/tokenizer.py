"""Tokenizers: text to token ids and back, and training one. Thin over the `tokenizers` library."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tutelage import files
from tutelage.data.chat import (
    CHAT_TEMPLATE,
    NAMED_CHAT_TEMPLATE,
    NAMED_CHAT_TEMPLATES,
    ChatTemplate,
    ChatTemplateError,
    Rendered,
    Span,
)

_TOKENIZER = "tokenizer.json"
# Everything of a Hugging Face folder that belongs to the tokenizer: kept byte for byte by `save`.
_TOKENIZER_FILES = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)
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
        present += _named_templates(folder)
        return cls.from_contents({name: (folder / name).read_bytes() for name in present}, str(folder))

    @classmethod
    def from_contents(cls, contents: Mapping[str, bytes], where: str) -> Tokenizer:
        """The same from the files' bytes, by name; `where` is what an error says they come from."""
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
            contents={name: data for name, data in contents.items() if _is_kept(name)},
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

    def decode(self, ids: Sequence[int], errors: Literal["strict", "replace"] = "strict") -> str:
        """The text of `ids`, special tokens spelled out. Bytes that are no UTF-8 become U+FFFD.

        errors: what an id outside the vocabulary is, which a model may draw whose embedding was padded to a round
            number: an error, or one U+FFFD.

        Raises ValueError naming the position of such an id.
        """
        numbers = [int(i) for i in ids]
        for position, number in enumerate(numbers):
            if not 0 <= number < self.vocab_size and errors == "strict":
                raise ValueError(f"token id {number} at position {position} is outside the vocabulary of {self.vocab_size}")
        runs = itertools.groupby(numbers, lambda number: 0 <= number < self.vocab_size)
        return "".join(
            self.backend.decode(run, skip_special_tokens=False) if known else "\ufffd" * len(run)
            for known, run in ((known, list(run)) for known, run in runs)
        )

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template among the tokenizer's files. Raises ChatTemplateError for one that cannot be read."""
        return ChatTemplate.from_files(self.contents, self.special_tokens.values())

    def with_chat_template(self, path: str | Path) -> Tokenizer:
        """The same tokenizer with the chat template of a Jinja file instead of all that it has; `save` writes it too.

        The spellings of special tokens in it are tokens where the vocabulary has them, and plain text otherwise.
        Raises ChatTemplateError naming the file for a template that does not compile, OSError for a file that
        cannot be read.
        """
        others = {name: data for name, data in self.contents.items() if not NAMED_CHAT_TEMPLATE.fullmatch(name)}
        changed = dataclasses.replace(self, contents={**others, CHAT_TEMPLATE: Path(path).read_bytes()})
        try:
            ChatTemplate.from_files(changed.contents, changed.special_tokens.values())
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{path}: {error}") from error
        return changed

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> tuple[list[int], list[bool]]:
        """(ids, assistant_mask) of a conversation, each of T entries; the mask is True for what the model answers.

        The ids are those of transformers' `apply_chat_template(messages, tokenize=True)`, with one difference: a
        special token that a message (or tool) spells is plain text, as it is to `encode`; only the template writes
        special tokens. A token that is not `special` in tokenizer.json is text anyway.

        The mask holds every token that has a character of an answer (`ChatTemplate.render`: `{% generation %}`, or
        growing prefixes), the token that ends the turn among them where the template is sound; `check_template` says
        whether it is.

        Raises ChatTemplateError without a template, or as `ChatTemplate.render`.
        """
        rendered = self.render_chat(messages, add_generation_prompt, tools, template_options, answers=True)
        ids, places = self.encode_rendered(rendered)
        return ids, covered(places, rendered.answers)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> list[int]:
        """The ids of `chat` without the mask: also for templates that do not let one tell what is answered."""
        return self.encode_rendered(self.render_chat(messages, add_generation_prompt, tools, template_options))[0]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        answers: bool = False,
    ) -> Rendered:
        """`ChatTemplate.render` of this tokenizer's template; raises ChatTemplateError where it has none."""
        if self.chat_template is None:
            raise ChatTemplateError(
                "this tokenizer has no chat template, so messages cannot become text: put the template the model was taught "
                "with into its folder as chat_template.jinja, or give strings (prompt, completion) instead of messages"
            )
        return self.chat_template.render(messages, add_generation_prompt, tools, template_options, answers)

    def encode_rendered(self, rendered: Rendered, cuts: Sequence[int] = ()) -> tuple[list[int], list[Span]]:
        """The ids of a rendered conversation, and the characters each stands for.

        `cuts`, ascending places in the text, are encoded across by no token: the ids before a cut are those of
        the text before it alone.
        """
        _check_text(rendered.text, "the rendered conversation")
        bounds = [0, *cuts, len(rendered.text)]
        ids: list[int] = []
        places: list[Span] = []
        for begin, end in itertools.pairwise(bounds):
            if begin < end:
                part_ids, part_places = self._encode_part(rendered, begin, end)
                ids += part_ids
                places += part_places
        return ids, places

    def encode_next(self, text: str) -> list[int]:
        """The ids of `text` where it goes on after other text: without the blank that some tokenizers put in front."""
        _check_text(text, "the text")
        return _encode_after(self.backend, self._lead, text, range(len(text) + 1))[0]

    @property
    def adds_bos(self) -> bool:
        """Whether this tokenizer's rules put bos in front of every text (Llama's do, GPT-2's do not)."""
        return self.bos_token_id is not None and self.backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_token_id]

    @functools.cached_property
    def special_tokens(self) -> dict[int, str]:
        """Id to spelling of the tokens that tokenizer.json calls special."""
        tokens: dict[int, AddedToken] = self.backend.get_added_tokens_decoder()
        return {number: token.content for number, token in tokens.items() if token.special}

    @functools.cached_property
    def _chat_backend(self) -> tokenizers.Tokenizer:
        """Knows the special tokens where they are spelled. Its offsets leave out nothing."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        backend.post_processor = None
        return backend

    @functools.cached_property
    def _alias_backend(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """Knows no special token, but for each a private character that stands for it: (backend, spelling to
        character, id of the character to id of the special token)."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        backend.post_processor = None
        decoder: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        special = {number: decoder[number] for number in self.special_tokens}
        characters = {number: chr(_FIRST_ALIAS + index) for index, number in enumerate(special)}
        backend.add_tokens(
            [
                AddedToken(
                    characters[number],
                    single_word=t.single_word,
                    lstrip=t.lstrip,
                    rstrip=t.rstrip,
                    normalized=False,
                    special=False,
                )
                for number, t in special.items()
            ]
        )
        vocabulary = backend.get_vocab(with_added_tokens=True)
        aliases = {vocabulary[character]: number for number, character in characters.items()}
        return backend, {self.special_tokens[number]: character for number, character in characters.items()}, aliases

    @functools.cached_property
    def _lead(self) -> str:
        """What must stand before a text that goes on after other text: "" unless the tokenizer treats the beginning of
        a text in another way."""
        backend = self._chat_backend
        both, first = (backend.encode(text, add_special_tokens=False).ids for text in ("\na", "\n"))
        alone = backend.encode("a", add_special_tokens=False).ids
        return "" if both == first + alone else "\n"

    def _encode_part(self, rendered: Rendered, begin: int, end: int) -> tuple[list[int], list[Span]]:
        lead = self._lead if begin else ""
        text = rendered.text[begin:end]
        if rendered.special is None:
            return _encode_after(self._chat_backend, lead, text, list(range(begin, end + 1)))
        backend, characters, aliases = self._alias_backend
        used = next((character for character in characters.values() if character in text), None)
        if used is not None:
            raise ChatTemplateError(
                f"a message spells a special token and has the private character U+{ord(used):X}, which would stand for one"
            )
        # The text with its own special tokens as single characters, and where each character comes from.
        parts: list[str] = []
        origin: list[int] = []
        place = begin
        for first, last in [span for span in rendered.special if begin <= span[0] < end]:
            parts += [rendered.text[place:first], characters[rendered.text[first:last]]]
            origin += [*range(place, first), first]
            place = last
        parts.append(rendered.text[place:end])
        origin += range(place, end + 1)
        ids, places = _encode_after(backend, lead, "".join(parts), origin)
        return [aliases.get(number, number) for number in ids], places

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
        for name in (*_TOKENIZER_FILES, *_named_templates(folder)):
            if name not in self.contents:
                files.remove(folder / name)  # of another tokenizer
        named = folder / NAMED_CHAT_TEMPLATES
        if named.is_dir() and not any(named.iterdir()):
            files.remove(named)
        for name, data in self.contents.items():
            files.make_folder((folder / name).parent)
            files.write_file_atomic(folder / name, data)


def _named_templates(folder: Path) -> list[str]:
    """The files of a folder's named chat templates."""
    return sorted(
        f"{NAMED_CHAT_TEMPLATES}/{path.name}" for path in (folder / NAMED_CHAT_TEMPLATES).glob("*.jinja") if path.is_file()
    )


def _is_kept(name: str) -> bool:
    return name in _TOKENIZER_FILES or NAMED_CHAT_TEMPLATE.fullmatch(name) is not None


# Private characters (Unicode's plane 16, from behind) that stand for special tokens.
_FIRST_ALIAS = 0x108000


def _encode_after(backend: tokenizers.Tokenizer, lead: str, text: str, origin: Sequence[int]) -> tuple[list[int], list[Span]]:
    """The ids of `text` as it goes on after `lead`, and their places, told by the place of each character."""
    encoding = backend.encode(lead + text, add_special_tokens=False)
    ids, offsets = encoding.ids, encoding.offsets
    if lead:
        before = backend.encode(lead, add_special_tokens=False).ids
        if ids[: len(before)] != before:
            raise ValueError(f"this tokenizer cannot encode {text[:20]!r} as text that goes on after other text")
        ids, offsets = ids[len(before) :], [(begin - len(lead), end - len(lead)) for begin, end in offsets[len(before) :]]
    return ids, [(origin[begin], origin[end]) for begin, end in offsets]


def covered(places: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token whether it has a character inside one of the spans; both ascend."""
    mask, index = [], 0
    for begin, end in places:
        while index < len(spans) and spans[index][1] <= begin:
            index += 1
        mask.append(index < len(spans) and end > spans[index][0])
    return mask


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
    return Tokenizer.from_contents(contents, "the trained tokenizer")


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
