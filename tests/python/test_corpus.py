from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from tutelage import files
from tutelage.data import corpus as corpus_module
from tutelage.data.compression import bits_per_byte
from tutelage.data.corpus import Corpus
from tutelage.data.documents import DocumentSet, Source, read_documents
from tutelage.data.packing import Cursor, PackedEpochs
from tutelage.data.tokenizer import Tokenizer, train_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "the", "sea"]
TEXTS = [" ".join(WORDS[i % 7 : i % 11 + 2] * (i % 5 + 1)) + f" {i}\n東京 🙂" for i in range(80)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def documents() -> DocumentSet:
    sources = [Source([{"text": t} for t in part], name=n) for n, part in (("a", TEXTS[:50]), ("b", TEXTS[50:]))]
    return read_documents(sources, 0.1)


def cached(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def test_the_file_holds_every_document_and_an_end(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = Corpus.build(documents, tokenizer, tmp_path)
    expected = [[*tokenizer.encode(document.text), 0] for document in documents.documents]
    assert corpus.tokens.tolist() == [token for ids in expected for token in ids]
    assert corpus.lengths.tolist() == [len(ids) for ids in expected]
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.tokens.dtype == np.uint16
    assert not corpus.tokens.flags.writeable
    for index, report in enumerate(corpus.sources):
        for held_out, tokens in ((False, report.tokens), (True, report.held_out_tokens)):
            members = zip(documents.documents, expected, strict=True)
            assert tokens == sum(len(ids) for d, ids in members if d.source == index and d.held_out == held_out)


def test_training_text_comes_back_from_the_bins(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = PackedEpochs(Corpus.build(documents, tokenizer, tmp_path), 512)
    bins, _ = stream.take(Cursor(), len(stream.epoch(0)))
    texts = [tokenizer.decode(piece[1:-1].tolist()) for one in bins for piece in one]
    assert sorted(texts) == sorted(documents.training_texts())


@pytest.mark.parametrize("context", [2, 9, 4096])
def test_held_out_tokens_are_predicted_once(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path, context: int) -> None:
    held_out = Corpus.build(documents, tokenizer, tmp_path).held_out()
    assert [h.name for h in held_out] == ["a", "b"]
    for index, source in enumerate(held_out):
        texts = [d.text for d in documents.documents if d.held_out and d.source == index]
        assert list(source.documents) == texts
        assert source.bytes == sum(len(text.encode()) for text in texts)
        sequences = source.sequences(context)
        assert all(2 <= len(s) <= context and s[0] == 0 and s.dtype == np.int32 for s in sequences)
        predicted = [token for s in sequences for token in s[1:].tolist()]
        assert predicted == [token for text in texts for token in [*tokenizer.encode(text), 0]]


def test_bits_per_byte_of_a_uniform_model(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = Corpus.build(documents, tokenizer, tmp_path)
    source, report = corpus.held_out()[0], corpus.sources[0]
    nats = sum((len(s) - 1) * math.log(300) for s in source.sequences(16))
    assert report.held_out_tokens is not None
    expected = report.held_out_tokens * math.log2(300) / report.held_out_bytes
    assert bits_per_byte(nats, source.bytes) == pytest.approx(expected)


def test_tokenised_once(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Corpus.build(documents, tokenizer, tmp_path)

    def never(*_: object) -> list[list[int]]:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode_batch", never)
    second = Corpus.build(documents, tokenizer, tmp_path)
    assert (second.tokens == first.tokens).all()
    assert second.fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="tokenised again"):
        Corpus.build(read_documents([Source([{"text": "other"}])]), tokenizer, tmp_path)


def test_the_cache_knows_documents_and_tokenizer_apart(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sources = [Source([{"text": text} for text in TEXTS[:50]])]
    builds = [
        Corpus.build(documents, tokenizer, tmp_path),
        Corpus.build(documents, train_tokenizer(TEXTS, 290), tmp_path),
        Corpus.build(read_documents(sources), tokenizer, tmp_path),
    ]
    assert len(cached(tmp_path)) == 3
    # the same tokens, another split: no new file, but other training data
    builds.append(Corpus.build(read_documents(sources, 0.3), tokenizer, tmp_path))
    assert len(cached(tmp_path)) == 3
    assert len({build.fingerprint for build in builds}) == 4


def test_two_builds_write_the_same_bytes(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        Corpus.build(documents, tokenizer, tmp_path / name)
        (folder,) = cached(tmp_path / name)
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1]


@pytest.mark.parametrize("file", ["tokens.bin", "lengths.bin", "manifest.json"])
def test_a_damaged_cache_is_refused_and_named(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path, file: str) -> None:
    Corpus.build(documents, tokenizer, tmp_path)
    (folder,) = cached(tmp_path)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{folder}.* delete {folder}, it will be made again"):
        Corpus.build(documents, tokenizer, tmp_path)


def test_an_interrupted_build_is_made_again(
    documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Corpus.build(documents, tokenizer, tmp_path / "whole")
    encode, calls = Tokenizer.encode_batch, []

    def killed(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(corpus_module, "_BATCH", 500)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            Corpus.build(documents, tokenizer, tmp_path / "cut")
    again = Corpus.build(documents, tokenizer, tmp_path / "cut")
    assert (again.tokens == whole.tokens).all()
    assert (again.lengths == whole.lengths).all()
    assert len(cached(tmp_path / "cut")) == 1


def test_two_processes_do_not_write_one_cache(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        files.lock_folder(tmp_path),
        pytest.raises(files.RunFolderError, match=f"in use by process {os.getpid()}"),
    ):
        Corpus.build(documents, tokenizer, tmp_path)
    Corpus.build(documents, tokenizer, tmp_path)


def test_long_documents_are_encoded_in_parts(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_PART", 10)
    monkeypatch.setattr(corpus_module, "_BATCH", 25)
    texts = [
        "short",
        "exactly 10",
        "a line\nand another\n\nand one without any break at all",
        "🙂" * 33,
        "x" * 30,
    ]
    documents = read_documents([Source([{"text": text} for text in texts])], 0)
    corpus = Corpus.build(documents, tokenizer, tmp_path)
    ends = np.cumsum(corpus.lengths)
    decoded = [tokenizer.decode(corpus.tokens[e - n : e].tolist()) for n, e in zip(corpus.lengths, ends, strict=True)]
    assert decoded == [text + "<|endoftext|>" for text in texts]
    assert corpus_module._parts("a line\nand another") == ["a line\n", "and another"[:10], "r"]


def test_a_large_vocabulary_takes_uint32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    backend = type(tokenizer.backend).from_str(tokenizer.contents["tokenizer.json"].decode())
    backend.add_tokens([f"<{i}>" for i in range(70_000)])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<69999>", "bos_token": "<1>"}')
    large = Tokenizer.from_pretrained(tmp_path)
    documents = read_documents([Source([{"text": "the <65000> cat"}, {"text": "a mat"}])])
    corpus = Corpus.build(documents, large, tmp_path / "cache")
    assert corpus.tokens.dtype == np.uint32
    assert large.vocab_size == 70_300
    assert corpus.tokens[corpus.lengths[0] - 1] == 70_299
    assert 300 + 65_000 in corpus.tokens.tolist()
    (bins,), _ = PackedEpochs(corpus, 16).take(Cursor(), 1)
    assert bins[0][0] == 301  # a bos token starts every sequence where there is one


def test_a_tokenizer_without_an_end_is_refused(documents: DocumentSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.contents["tokenizer.json"])
    with pytest.raises(ValueError, match="the tokenizer names no end of text: set eos_token"):
        Corpus.build(documents, Tokenizer.from_pretrained(tmp_path), tmp_path / "cache")
