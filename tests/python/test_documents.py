from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tutelage.data import documents as documents_module
from tutelage.data.documents import DocumentSet, Source, read_documents

TEXTS = st.lists(st.text(max_size=12), min_size=3, max_size=60)


def rows(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def numbered(count: int) -> list[dict[str, str]]:
    return rows([f"document number {i}" for i in range(count)])


def split(documents: DocumentSet) -> dict[str, bool]:
    return {document.text: document.held_out for document in documents.documents}


# --- duplicates and the split ------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(first=TEXTS, second=TEXTS, fraction=st.floats(0.01, 0.9))
def test_every_text_once_and_on_one_side(first: list[str], second: list[str], fraction: float) -> None:
    kept = {text for text in first + second if text.strip()}
    per_source = [{t for t in texts if t.strip()} for texts in (first, second)]
    assume(all(len(texts) >= 2 for texts in per_source) and per_source[1] - per_source[0])
    documents = read_documents([Source(rows(first)), Source(rows(second))], fraction)
    texts = [document.text for document in documents.documents]
    assert sorted(texts) == sorted(kept)
    for report, given_texts in zip(documents.sources, (first, second), strict=True):
        assert report.documents + report.held_out_documents + report.duplicates + report.empty == len(given_texts)
        assert report.empty == sum(not text.strip() for text in given_texts)
    sizes = [sum(len(d.text.encode()) for d in documents.documents if d.source == i) for i in (0, 1)]
    assert [report.bytes + report.held_out_bytes for report in documents.sources] == sizes
    assert sorted(documents.training_texts()) == sorted(t for t, held_out in split(documents).items() if not held_out)


@settings(max_examples=50, deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 99))
def test_the_split_does_not_depend_on_the_order(texts: list[str], seed: int) -> None:
    assume(len({text for text in texts if text.strip()}) >= 2)
    shuffled = random.Random(seed).sample(texts, len(texts))
    assert split(read_documents([Source(rows(texts))])) == split(read_documents([Source(rows(shuffled))]))


def test_the_split_does_not_depend_on_other_documents() -> None:
    few, many = (
        split(read_documents([Source(numbered(1000))])),
        split(read_documents([Source(numbered(2000))])),
    )
    assert {text: many[text] for text in few} == few


def test_the_split_has_about_the_size_asked_for() -> None:
    documents = read_documents([Source(numbered(4000))], 0.1)
    expected, deviation = 400, math.sqrt(4000 * 0.1 * 0.9)
    assert abs(documents.sources[0].held_out_documents - expected) < 4 * deviation
    assert read_documents([Source(numbered(50))], 0).sources[0].held_out_documents == 0


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_sides_have_a_document_of_every_source(fraction: float) -> None:
    report = read_documents([Source(numbered(2))], fraction).sources[0]
    assert (report.documents, report.held_out_documents) == (1, 1)


def test_negative_control_without_content_hashes_a_duplicate_reaches_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = itertools.count()
    monkeypatch.setattr(documents_module, "_digest", lambda text: random.Random(next(calls)).randbytes(16))
    documents = read_documents([Source(rows(["the same text"] * 200))], 0.5)
    assert len(documents.documents) == 200
    assert {document.held_out for document in documents.documents} == {False, True}


def test_a_duplicate_belongs_to_the_first_source() -> None:
    documents = read_documents([Source(numbered(10)), Source(numbered(12))])
    assert [report.duplicates for report in documents.sources] == [0, 10]
    assert [d.source for d in documents.documents] == [0] * 10 + [1] * 2


# --- one single document -----------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\n", " ", "x"])
def test_a_single_document_is_cut_and_its_end_held_out(tmp_path: Path, separator: str) -> None:
    text = separator.join(f"line{i:04}" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    documents = read_documents([str(tmp_path / "book.txt")], 0.1)
    start, end = documents.documents
    assert start.text + end.text == text
    assert (start.held_out, end.held_out) == (False, True)
    assert int(0.1 * len(text)) <= len(end.text) <= 0.2 * len(text)
    assert start.text.endswith(separator) or separator == "x"
    assert documents.sources[0].cut


def test_a_single_document_stays_whole_where_it_cannot_be_cut_or_nothing_is_held_out() -> None:
    for texts, fraction in ((["a long text with words"], 0.0), (["x"], 0.5), (["abab"], 0.5)):
        documents = read_documents([Source(rows(texts))], fraction)
        assert split(documents) == {texts[0]: False}
        assert not documents.sources[0].cut


def test_parts_of_a_cut_document_are_on_one_side_only() -> None:
    documents = read_documents([Source(rows(["aaaa\nbbbb", "aaaa\n", "zz"])), Source(rows(["aaaa\nbbbb\ncccc"]))], 0.4)
    texts = [document.text for document in documents.documents]
    assert len(set(texts)) == len(texts)


# --- files -------------------------------------------------------------------------------------------------


def write_all_kinds(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a.txt").write_bytes("\ufeffwith a mark\r\n".encode())
    (folder / "b.jsonl").write_text('{"text": "line\u2028one"}\n\n{"text": "two", "more": 1}')
    (folder / "c.json").write_text(json.dumps(rows(["three", "four"])))
    pq.write_table(pa.table({"text": ["five", "six"], "other": [1, 2]}), folder / "d.parquet")
    (folder / "notes.md").write_text("ignored")
    (folder / ".hidden.txt").write_text("ignored")
    (folder / ".git").mkdir()
    (folder / ".git" / "e.txt").write_text("ignored")


def test_a_folder_of_every_kind_of_file(tmp_path: Path) -> None:
    write_all_kinds(tmp_path)
    documents = read_documents([str(tmp_path)], 0)
    texts = ["line\u2028one", "two", "three", "four", "five", "six", "with a mark\r\n"]
    assert [document.text for document in documents.documents] == texts
    assert documents.sources[0].ignored_files == 2
    again = read_documents([Source(name) for name in sorted(tmp_path.iterdir()) if not name.name.startswith((".", "n"))], 0)
    assert [document.text for document in again.documents] == texts


def test_rows_may_come_once_only() -> None:
    documents = read_documents([Source((row for row in numbered(5)), name="stream")], 0)
    assert documents.sources[0].documents == 5


# --- weights -----------------------------------------------------------------------------------------------


def test_weights_after_a_colon(tmp_path: Path) -> None:
    (tmp_path / "odd:3").mkdir()
    assert Source.parse("forum.jsonl:2.5") == Source("forum.jsonl", 2.5, "forum.jsonl")
    assert Source.parse("books/") == Source("books/", 1.0, "books/")
    assert Source.parse(f"{tmp_path}/odd:3").weight == 1.0
    assert Source.parse(f"{tmp_path}/odd:3:2").weight == 2.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.txt:0", r"the weight of a\.txt is 0\.0: it must be a positive number"),
        ("a.txt:-1", r"the weight of a\.txt is -1\.0: it must be a positive number"),
        ("a.txt:nan", "it must be a positive number"),
        ("a.txt:inf", "it must be a positive number"),
        ("a.txt:two", r"a\.txt:two does not exist, and the weight 'two' after its colon is not a number"),
    ],
)
def test_weights_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source.parse(spec)


# --- what cannot be read -----------------------------------------------------------------------------------

BAD_LINES = [
    (b'{"text": "unclosed', r"no valid JSON \(Unterminated string starting at at character 9\)"),
    (b"plain words", r"no valid JSON \("),
    (b"[" * 100_000, r"no valid JSON \("),
    (b'{"text": ' + b"1" * 5000 + b"}", r"no valid JSON \(|field 'text' is int"),
    (b'{"text": "\xff"}', "no UTF-8 at byte 10"),
    (b'{"text": "a\\ud800"}', "field 'text' has a lone surrogate at character 1"),
    (b'{"text": 3}', "field 'text' is int, not a string"),
    (b'{"text": null}', "field 'text' is NoneType, not a string"),
    (b'{"prompt": "a", "answer": "b"}', r"no field 'text' \(it has: answer, prompt\)"),
    (b"{}", r"no field 'text' \(it has: none\)"),
    (b'["text"]', "the row is list, not an object with a field 'text'"),
    (b"null", "the row is NoneType"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "forum.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}\n')
    with pytest.raises(ValueError, match=rf"forum\.jsonl, line 3: ({message})") as error:
        read_documents([str(file)])
    assert "correct it, or leave such rows out with on_bad_row='skip:<max>'" in str(error.value)
    documents = read_documents([str(file)], on_bad_row="skip:1")
    assert sorted(split(documents)) == ["good", "good too"]
    (skipped,) = documents.sources[0].bad_rows
    assert skipped.startswith(f"{file}, line 3: ")


def test_forty_bad_rows_are_skipped_and_reported_up_to_the_limit(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    bad = [BAD_LINES[i % len(BAD_LINES)][0] for i in range(20)]
    for file in (first, second):
        good = [json.dumps({"text": f"{file} {i}"}).encode() for i in range(20)]
        file.write_bytes(b"\n".join(line for pair in zip(good, bad, strict=True) for line in pair))
    documents = read_documents([str(first), str(second)], on_bad_row="skip:40")
    for file, report in zip((first, second), documents.sources, strict=True):
        assert report.documents + report.held_out_documents == 20
        assert [reason.split(": ")[0] for reason in report.bad_rows] == [f"{file}, line {n}" for n in range(2, 41, 2)]
    with pytest.raises(ValueError, match=r"b\.jsonl, line 40: .*bad row 40, more than on_bad_row='skip:39' allows"):
        read_documents([str(first), str(second)], on_bad_row="skip:39")


@pytest.mark.parametrize("policy", ["skip", "skip:", "skip:x", "skip:-1", "ignore", "error:3", "skip:²"])
def test_policies_that_do_not_exist(policy: str) -> None:
    with pytest.raises(ValueError, match="it must be 'error' or 'skip:<max>'"):
        read_documents([Source(numbered(3))], on_bad_row=policy)


def test_a_text_file_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 latin")
    (tmp_path / "b.txt").write_bytes(b"fine")
    with pytest.raises(ValueError, match=r"a\.txt: no UTF-8 at byte 3"):
        read_documents([str(tmp_path)])
    assert len(read_documents([str(tmp_path)], on_bad_row="skip:5").sources[0].bad_rows) == 1


def _file(name: str, content: bytes = b"x") -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: str(folder / "no.txt"), FileNotFoundError, r"no\.txt does not exist"),
        (
            _file("a.csv"),
            ValueError,
            r"a\.csv: cannot read \.csv; give \.txt, \.jsonl, \.json, \.parquet or a folder",
        ),
        (_file("README"), ValueError, "README: cannot read a file without suffix"),
        (str, ValueError, "nothing to read in this folder"),
        (
            _file("a.json", b'{"text": "a"}'),
            ValueError,
            r"a\.json: a \.json file must be a list of rows.*it holds dict",
        ),
        (
            _file("a.json", b'{"text": "a"}\n{}'),
            ValueError,
            r"\(one row a line is \.jsonl\): no valid JSON \(Extra data",
        ),
        (_file("a.parquet"), ValueError, r"a\.parquet: no readable parquet file"),
        (_file("a.txt", b" \n"), ValueError, r"a\.txt adds no documents \(1 read: 1 empty, 0 duplicates\)"),
        (_file("a.jsonl", b""), ValueError, r"a\.jsonl adds no documents \(0 read"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_documents([make(tmp_path)])


def test_a_parquet_file_without_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text' \(it has: prompt\)"):
        read_documents([str(tmp_path / "a.parquet")])
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet, row 1: field 'text' is NoneType"):
        read_documents([str(tmp_path / "b.parquet")])


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what Python does where it is missing
    with pytest.raises(ImportError, match=r"a\.parquet: reading \.parquet needs pyarrow: pip install 'tutelage\[hub\]'"):
        read_documents([str(tmp_path / "a.parquet")])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_arguments_that_cannot_be(fraction: float) -> None:
    with pytest.raises(ValueError, match="it must be at least 0 and below 1"):
        read_documents([Source(numbered(3))], fraction)
    with pytest.raises(ValueError, match="no sources of documents given"):
        read_documents([])


def test_a_source_given_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"again adds no documents \(5 read: 0 empty, 5 duplicates\)"):
        read_documents([Source(numbered(5)), Source(numbered(5), name="again")])


def test_a_row_of_an_iterable_is_named() -> None:
    with pytest.raises(ValueError, match="mine, row 1: the row is str"):
        read_documents([Source([{"text": "a"}, "b"], name="mine")])  # type: ignore[list-item]


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".txt", ".jsonl", ".json", ".parquet"]))
def test_any_bytes_give_documents_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    file = tmp_path_factory.getbasetemp() / f"any{suffix}"
    file.write_bytes(content)
    try:
        documents = read_documents([str(file)])
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert documents.documents
