from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from tutelage.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "the cat sat on the mat, the cat sat",
    "naïve café — 東京 🙂\n\n\ttabs and\r\nlines",
    "one two one two",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


def test_the_spelling_of_a_special_token_is_text(tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert tokenizer.eos_token_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.encode("a")[0], 0]) == "a<|endoftext|>"


def test_negative_control_without_the_protection_text_forges_an_end(tokenizer: Tokenizer) -> None:
    unprotected = type(tokenizer.backend).from_str(tokenizer.contents["tokenizer.json"].decode())
    assert tokenizer.eos_token_id in unprotected.encode("a<|endoftext|>b").ids


def test_batch_is_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_special_tokens_come_first_then_the_bytes_then_merges() -> None:
    tokenizer = train_tokenizer(TEXTS, 270, ("<|end|>", "<|user|>"))
    ids = tokenizer.backend.get_vocab()
    assert (ids["<|end|>"], ids["<|user|>"]) == (0, 1)
    assert sorted(i for token, i in ids.items() if len(token) == 1) == list(range(2, 258))
    assert tokenizer.vocab_size == 270
    assert tokenizer.eos_token_id == 0
    assert tokenizer.bos_token_id is None


def test_little_text_gives_fewer_tokens_than_asked_for() -> None:
    assert train_tokenizer(["ab ab"], 1000).vocab_size < 270
    assert train_tokenizer([], 257).vocab_size == 257


def test_training_is_deterministic_for_any_number_of_threads(tokenizer: Tokenizer) -> None:
    program = (
        "import sys, hashlib, test_tokenizer as t\n"
        "print(hashlib.sha256(t.train_tokenizer(t.TEXTS, 300).contents['tokenizer.json']).hexdigest())"
    )
    prints = set()
    for threads, seed in (("1", "0"), ("2", "1")):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        prints.add(run.stdout)
    assert len(prints) == 1
    assert train_tokenizer(iter(TEXTS), 300).contents == tokenizer.contents
    assert train_tokenizer([*TEXTS, "other other"], 300).contents != tokenizer.contents


@pytest.mark.parametrize(
    ("vocab_size", "special_tokens", "message"),
    [
        (
            256,
            ("<|endoftext|>",),
            r"vocab_size is 256: it must be at least 257 \(256 bytes \+ 1 special tokens\)",
        ),
        (257, ("a", "b"), "at least 258"),
        (300, (), "special_tokens must be distinct, non-empty and at least one"),
        (300, ("a", "a"), "special_tokens must be distinct"),
    ],
)
def test_what_cannot_be_trained(vocab_size: int, special_tokens: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TEXTS, vocab_size, special_tokens)


def test_text_that_is_no_unicode_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="document 1 has a lone surrogate at character 2"):
        train_tokenizer(["fine", "ab\ud800"], 300)
    with pytest.raises(ValueError, match="text 1 has a lone surrogate at character 0"):
        tokenizer.encode_batch(["fine", "\ud800"])
    with pytest.raises(ValueError, match="text 0 is int, not a string"):
        tokenizer.encode_batch([3])  # type: ignore[list-item]


@pytest.mark.parametrize("bad", [-1, 300, 10**12])
def test_ids_outside_the_vocabulary_are_named(tokenizer: Tokenizer, bad: int) -> None:
    spelled = [tokenizer.decode([token]) for token in (65, 66)]
    assert tokenizer.decode([65, bad, bad, 66], errors="replace") == "\ufffd\ufffd".join(spelled)
    with pytest.raises(ValueError, match=f"token id {bad} at position 1 is outside the vocabulary of 300"):
        tokenizer.decode([5, bad])


def test_save_and_read_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    again = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.contents == tokenizer.contents
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("the cat 🙂") == tokenizer.encode("the cat 🙂")
    assert (again.eos_token_id, again.vocab_size) == (0, 300)


def test_transformers_reads_what_we_save(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[1])["input_ids"] == tokenizer.encode(TEXTS[1])
    assert theirs.eos_token_id == tokenizer.eos_token_id


def test_other_files_of_the_tokenizer_are_kept_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_bytes(b"{{ messages }} \r\n")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"not ours")
    Tokenizer.from_pretrained(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_bytes() == b"{{ messages }} \r\n"
    assert not (tmp_path / "b" / "model.safetensors").exists()


def test_named_chat_templates_are_kept_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Those of transformers' folder too; those of another tokenizer, which was there before, go."""
    files = {
        "chat_template.jinja": b"{{ messages | length }}\r\n",
        "additional_chat_templates/tool_use.jinja": b"{{ tools | length }} tools\n",
        "additional_chat_templates/rag.jinja": b"{% broken, but never used",
    }
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a" / "additional_chat_templates").mkdir()
    for name, data in files.items():
        (tmp_path / "a" / name).write_bytes(data)
    (tmp_path / "a" / "additional_chat_templates" / "notes.txt").write_bytes(b"no template")
    again = Tokenizer.from_pretrained(tmp_path / "a")
    assert {name: data for name, data in again.contents.items() if "template" in name} == files
    again.save(tmp_path / "b")
    assert {name: (tmp_path / "b" / name).read_bytes() for name in files} == files
    assert not (tmp_path / "b" / "additional_chat_templates" / "notes.txt").exists()
    assert again.fingerprint == tokenizer.fingerprint, "no id depends on them"
    messages = [{"role": "user", "content": "x"}]
    assert again.render_chat(messages).text == "1"
    assert again.render_chat(messages, tools=[{"name": "f"}]).text == "1 tools"
    (tmp_path / "new.jinja").write_text("new")
    changed = again.with_chat_template(tmp_path / "new.jinja")
    assert changed.render_chat(messages, tools=[{"name": "f"}]).text == "new"
    changed.save(tmp_path / "b")
    assert not (tmp_path / "b" / "additional_chat_templates").exists()


def test_named_chat_templates_are_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "a")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    theirs.chat_template = {"default": "plain {{ messages[0].content }}", "tool_use": "tools", "rag": "rag"}
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "additional_chat_templates" / "rag.jinja").exists(), "control"
    ours = Tokenizer.from_pretrained(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    back = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert back.chat_template == theirs.chat_template
    messages, tools = [{"role": "user", "content": "x"}], [{"type": "function", "function": {"name": "f"}}]
    assert ours.render_chat(messages).text == back.apply_chat_template(messages, tokenize=False) == "plain x"
    assert ours.render_chat(messages, tools=tools).text == back.apply_chat_template(messages, tools=tools, tokenize=False)
    # A named default comes before chat_template.jinja.
    (tmp_path / "theirs" / "additional_chat_templates" / "default.jinja").write_text("named")
    assert Tokenizer.from_pretrained(tmp_path / "theirs").render_chat(messages).text == "named"
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs").apply_chat_template(messages, tokenize=False) == "named"


def test_truncation_and_padding_in_the_file_are_not_obeyed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = type(tokenizer.backend).from_str(tokenizer.contents["tokenizer.json"].decode())
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    text = "the cat sat on the mat"
    assert len(backend.encode_batch([text])[0].ids) == 9
    assert Tokenizer.from_pretrained(tmp_path).encode(text) == tokenizer.encode(text)


def _folder(tokenizer: Tokenizer, folder: Path, **configs: object) -> Path:
    (folder / "tokenizer.json").write_bytes(tokenizer.contents["tokenizer.json"])
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("configs", "eos", "bos"),
    [
        ({}, None, None),
        ({"tokenizer_config": {"eos_token": "!", "bos_token": None}}, "!", None),
        ({"tokenizer_config": {"eos_token": {"content": "!"}}}, "!", None),
        ({"tokenizer_config": {}, "special_tokens_map": {"bos_token": "!"}}, None, "!"),
        ({"generation_config": {"eos_token_id": [0, 1]}}, "<|endoftext|>", None),
        ({"config": {"eos_token_id": 0, "bos_token_id": 0}}, "<|endoftext|>", "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": "!"}, "config": {"eos_token_id": 0}}, "!", None),
    ],
)
def test_where_special_ids_come_from(
    tokenizer: Tokenizer, tmp_path: Path, configs: dict[str, object], eos: str | None, bos: str | None
) -> None:
    read = Tokenizer.from_pretrained(_folder(tokenizer, tmp_path, **configs))
    vocabulary = tokenizer.backend.get_vocab()
    expected = tuple(None if token is None else vocabulary[token] for token in (eos, bos))
    assert (read.eos_token_id, read.bos_token_id) == expected


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (
            {"tokenizer_config": {"eos_token": "<nope>"}},
            "tokenizer_config.json: eos_token '<nope>' is not in the",
        ),
        ({"config": {"bos_token_id": 300}}, "config.json: bos_token_id 300 is not in the vocabulary"),
        ({"config": {"bos_token_id": True}}, "config.json: bos_token_id True is not in the vocabulary"),
        ({"special_tokens_map": [1]}, "special_tokens_map.json must hold a JSON object, not list"),
    ],
)
def test_special_ids_that_cannot_be(tokenizer: Tokenizer, tmp_path: Path, configs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(_folder(tokenizer, tmp_path, **configs))


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in .*"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer: "):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "examples", [300, pytest.param(2_000, marks=pytest.mark.slow), pytest.param(90_000, marks=pytest.mark.soak)]
)
def test_damaged_files_give_an_error_or_a_tokenizer(tokenizer: Tokenizer, tmp_path: Path, examples: int) -> None:
    original = tokenizer.contents["tokenizer.json"]
    ran = {"refused": 0, "read": 0}

    @settings(max_examples=examples, database=None)
    @given(st.integers(0, len(original) - 1), st.binary(max_size=4), st.integers(0, 9))
    def execute(start: int, inserted: bytes, removed: int) -> None:
        (tmp_path / "tokenizer.json").write_bytes(original[:start] + inserted + original[start + removed :])
        try:
            read = Tokenizer.from_pretrained(tmp_path)
        except ValueError as error:
            assert "tokenizer.json" in str(error)
            ran["refused"] += 1
        else:
            assert read.vocab_size > 0
            ran["read"] += 1

    execute()
    assert sum(ran.values()) >= examples // 2 and min(ran.values()) > 0, ran


def test_the_bytes_of_tokens_make_the_text(tokenizer: Tokenizer) -> None:
    spelled = tokenizer.token_bytes()
    assert len(spelled) == tokenizer.vocab_size and tokenizer.eos_token_id is not None
    assert spelled[tokenizer.eos_token_id] == b"<|endoftext|>"
    for text in ("plain text", "naïve 猫\n\t\0", "\u00a0 ½"):
        assert b"".join(spelled[number] for number in tokenizer.encode(text)) == text.encode()


def test_the_bytes_of_sentencepiece_tokens() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"<0x0A>": 0, "\u2581a": 1, "b": 2}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = Tokenizer.from_contents({"tokenizer.json": backend.to_str().encode()}, "test")
    assert made.token_bytes() == [b"\n", b" a", b"b"]


def test_tokens_of_unknown_spelling() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}))
    made = Tokenizer.from_contents({"tokenizer.json": backend.to_str().encode()}, "test")
    with pytest.raises(ValueError, match="neither byte-level nor SentencePiece's"):
        made.token_bytes()
