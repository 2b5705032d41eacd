from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chats_for_tests import turns
from tutelage.data.rows import KINDS, BadRows, Kind, Row, Schema, read_rows

USER, ANSWER, OTHER = [turns("hi")[0]], [turns("", "yes")[1]], [turns("", "no")[1]]

# Of every schema a good row, in strings and in messages.
GOOD: dict[str, tuple[Kind, dict[str, Any]]] = {
    "text": ("language_modeling", {"text": "a text"}),
    "messages": ("language_modeling", {"messages": USER + ANSWER}),
    "prompt-completion": ("prompt_completion", {"prompt": "a", "completion": "b"}),
    "prompt-completion-chat": ("prompt_completion", {"prompt": USER, "completion": ANSWER}),
    "prompt": ("prompt_only", {"prompt": "a"}),
    "prompt-chat": ("prompt_only", {"prompt": USER}),
    "preference": ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    "preference-chat": ("preference", {"prompt": USER, "chosen": ANSWER, "rejected": OTHER}),
    "implicit": ("preference", {"chosen": "a b", "rejected": "a c"}),
    "implicit-chat": ("preference", {"chosen": USER + ANSWER, "rejected": USER + OTHER}),
    "unpaired": ("unpaired_preference", {"prompt": "a", "completion": "b", "label": True}),
    "unpaired-chat": ("unpaired_preference", {"prompt": USER, "completion": ANSWER, "label": False}),
    "ranking": ("ranking", {"prompt": "a", "responses": ["b", "c", "d", "e"], "ranking": [[0], [2, 1], [3]]}),
    "ranking-chat": ("ranking", {"prompt": USER, "responses": [ANSWER, OTHER], "ranking": [[1], [0]]}),
}


def one(row: object, *more: object, accept: Any = KINDS) -> Row:
    return read_rows([row, *more], accept).rows[0]  # type: ignore[list-item]


# --- what schema --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_schemas_are_told_from_the_fields(name: str) -> None:
    kind, row = GOOD[name]
    read = one(row | {"score": 3, "id": "x"})
    assert read.schema == Schema(kind, "chat" in name or name == "messages")
    assert read.columns == {"score": 3, "id": "x"}
    assert read.where == "row 0"
    assert read_rows(iter([row])).schemas == {"rows": read.schema}  # any iterable, once


def test_what_a_row_says() -> None:
    read = one(GOOD["ranking"][1])
    assert (read.prompt, read.responses, read.ranking) == ("a", ("b", "c", "d", "e"), ((0,), (2, 1), (3,)))
    read = one(GOOD["preference-chat"][1] | {"margin": 2})
    assert (read.prompt, read.responses, read.ranking) == (tuple(USER), (tuple(ANSWER), tuple(OTHER)), ((0,), (1,)))
    assert (read.margin, read.columns) == (2.0, {})
    assert one(GOOD["unpaired"][1]).label is True
    assert str(read.schema) == "preference (conversational)"


def test_a_loader_looks_only_for_its_schemas() -> None:
    row = {"prompt": "a", "completion": "b", "label": True, "text": "c"}
    assert one(row).schema.kind == "unpaired_preference"
    assert one(row, accept=("prompt_completion",)).columns == {"label": True, "text": "c"}
    assert one(row, accept=("prompt_only",)).columns == {"completion": "b", "label": True, "text": "c"}
    with pytest.raises(
        ValueError, match=r"row 0: the row's fields \(text\) fit no schema; it needs prompt \+ responses \+ ranking"
    ):
        read_rows([{"text": "a"}], ("ranking",))


def test_nulls_are_fields_that_are_not_there() -> None:
    read = one({"prompt": None, "text": None, "messages": [{"role": "user", "content": "a", "name": None}], "margin": None})
    assert read.schema == Schema("language_modeling", True)
    assert read.responses == (({"role": "user", "content": "a"},),)


def test_tools_and_template_options() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for tools in ([tool], json.dumps([tool])):
        read = one({"messages": USER, "tools": tools, "chat_template_kwargs": {"thinking": False, "x": None}})
        assert read.tools == (tool,) and read.template_options == {"thinking": False} and not read.columns


# --- the implicit prompt, as TRL extracts it -----------------------------------------------------------------


def trl_extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What TRL documents: the longest common beginning, less a space at its end."""
    index = 0
    for index in range(min(len(chosen), len(rejected))):
        if chosen[index] != rejected[index]:
            if chosen[index - 1] == " ":
                index -= 1
            break
    return chosen[:index], chosen[index:], rejected[index:]


@given(prefix=st.text("ab ", min_size=1, max_size=5), chosen=st.text("ab ", max_size=4), rejected=st.text("ab ", max_size=4))
def test_the_prompt_of_strings_is_trls(prefix: str, chosen: str, rejected: str) -> None:
    read = one({"chosen": prefix + chosen, "rejected": prefix + rejected})
    assert (read.prompt, *read.responses) == trl_extract_prompt(prefix + chosen, prefix + rejected)
    assert all(
        read.prompt + response == whole
        for response, whole in zip(read.responses, (prefix + chosen, prefix + rejected), strict=True)
    )  # type: ignore[operator]


def test_the_prompt_of_messages_is_trls() -> None:
    chosen, rejected = turns("a", "b", "c", "d"), turns("a", "b", "c", "e")
    read = one({"chosen": chosen, "rejected": rejected})
    assert read.prompt == tuple(chosen[:3]) and read.responses == ((chosen[3],), (rejected[3],))
    with pytest.raises(
        ValueError, match="row 0: fields 'chosen' and 'rejected' share no first message, which would be the prompt"
    ):
        one({"chosen": turns("a", "b"), "rejected": turns("x", "b")})


def test_strings_that_share_nothing_have_an_empty_prompt() -> None:
    read = one({"chosen": "good ", "rejected": "bad"})
    assert (read.prompt, *read.responses) == ("", "good ", "bad")


# --- bad rows -----------------------------------------------------------------------------------------------

# For every schema what can be wrong with one of its rows: (schema, changed fields, what is said). None: the field is gone.
SURROGATE = "a\ud800"
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"text": 3}, "field 'text' is int, not a string"),
    ("text", {"text": SURROGATE}, "field 'text' has a lone surrogate at character 1"),
    ("text", {"text": None}, "field 'text' is null|field 'messages' is missing"),
    ("messages", {"messages": "hi"}, "field 'messages' is a string, not a list of messages; the rows of one file"),
    ("messages", {"messages": []}, "field 'messages' is an empty list: it needs a message"),
    ("messages", {"messages": {"role": "user"}}, "field 'messages' is dict, neither a string nor a list of messages"),
    ("messages", {"messages": ["hi"]}, "field 'messages', message 0 is str, not an object with 'role' and 'content'"),
    ("messages", {"messages": [*USER, {"content": "a"}]}, "field 'messages', message 1: 'role' is missing, not a string"),
    ("messages", {"messages": [{"role": 1, "content": "a"}]}, "message 0: 'role' is int, not a string"),
    ("messages", {"messages": [{"role": "user"}]}, "message 0: 'content' is missing"),
    ("messages", {"messages": [{"role": "user", "content": 5}]}, "message 0: 'content' is int, not a string"),
    ("messages", {"messages": [{"role": "user", "content": SURROGATE}]}, "message 0, 'content' has a lone surrogate"),
    (
        "messages",
        {"messages": [{"from": "human", "value": "a"}]},
        "has 'from' and 'value': rename them to 'role' and 'content'",
    ),
    ("messages", {"messages": [{"role": "user", "content": "a", "x": {1: 2}}]}, "'x' has a key that is int, not a string"),
    ("messages", {"messages": USER, "tools": 3}, "field 'tools' must be a list of JSON schemas"),
    ("messages", {"messages": USER, "tools": "{"}, "field 'tools' must be a list of JSON schemas"),
    ("messages", {"messages": USER, "chat_template_kwargs": [1]}, "field 'chat_template_kwargs' is list, not an object"),
    ("prompt-completion", {"completion": None}, r"field 'completion' is null \(the row has: completion, prompt\)"),
    ("prompt-completion", {"completion": 1.5}, "field 'completion' is float, not a string"),
    (
        "prompt-completion",
        {"prompt": USER},
        "field 'prompt' is list, not a string; the rows of one file have strings or messages",
    ),
    ("prompt-completion-chat", {"completion": "b"}, "field 'completion' is a string, not a list of messages"),
    ("prompt-completion-chat", {"prompt": ANSWER}, r"field 'prompt' ends with an answer \(role 'assistant'\)"),
    ("prompt", {"prompt": True}, "field 'prompt' is bool, not a string"),
    ("prompt-chat", {"prompt": 7}, "field 'prompt' is int, neither a string nor a list of messages"),
    ("preference", {"chosen": ["b"]}, "field 'chosen' is list, not a string"),
    ("preference", {"rejected": None}, "field 'rejected' is null"),
    ("preference", {"margin": "big"}, "field 'margin' is str, not a number"),
    ("preference", {"margin": True}, "field 'margin' is bool, not a number"),
    ("preference", {"margin": float("nan")}, "field 'margin' is nan: it must be finite"),
    ("preference", {"margin": 10**400}, "field 'margin' is inf: it must be finite"),
    ("preference-chat", {"rejected": "no"}, "field 'rejected' is a string, not a list of messages"),
    ("preference-chat", {"prompt": "hi"}, "field 'prompt' is a string, not a list of messages"),
    ("implicit-chat", {"chosen": OTHER}, "share no first message"),
    ("unpaired", {"label": 1}, "field 'label' is int, neither true nor false"),
    ("unpaired", {"label": "yes"}, "field 'label' is str, neither true nor false"),
    ("unpaired-chat", {"completion": [3]}, "field 'completion', message 0 is int"),
    ("ranking", {"responses": "b"}, "field 'responses' is str, not a list"),
    ("ranking", {"responses": ["b"]}, "field 'responses' has 1: a ranking needs two or more"),
    ("ranking", {"responses": ["b", 3, "d", "e"]}, "field 'responses', response 1 is int, not a string"),
    (
        "ranking",
        {"ranking": [0, 1, 2, 3]},
        r"field 'ranking' must be a list of lists of numbers of responses, as in \[\[0\], \[2, 1\]\]",
    ),
    ("ranking", {"ranking": [[0], [True], [2], [3]]}, "field 'ranking' must be a list of lists of numbers"),
    (
        "ranking",
        {"ranking": [[0], [2, 1]]},
        "field 'ranking' must name each of the responses 0 to 3 once, in groups that are not empty",
    ),
    ("ranking", {"ranking": [[0], [2, 1], [3], []]}, "in groups that are not empty"),
    ("ranking", {"ranking": [[0], [2, 1], [3, 3]]}, "must name each of the responses 0 to 3 once"),
    ("ranking", {"ranking": [[3, 0, 2, 1]]}, "field 'ranking' has all responses tied in one group"),
    ("ranking-chat", {"responses": ["b", "c"]}, "field 'responses', response 0 is a string, not a list of messages"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_a_bad_row_is_told_with_its_field(name: str, change: dict[str, Any], message: str) -> None:
    good = GOOD[name][1]
    with pytest.raises(
        ValueError, match=f"row 2: .*({message}).*: correct it, or leave such rows out with on_bad_row='skip:<max>'"
    ):
        read_rows([good, good, good | change])
    read = read_rows([good, good, good | change], bad_rows=BadRows("skip:1"))
    assert len(read.rows) == 2 and read.bad[0].startswith("row 2: ")


def test_messages_nested_too_deeply() -> None:
    deep: Any = "a"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match=r"'x', 0, .* is nested more than 64 levels deep"):
        read_rows([{"messages": [{"role": "user", "content": "a", "x": deep}]}])


@pytest.mark.parametrize("name", GOOD)
def test_forty_bad_rows_of_every_schema(tmp_path: Path, name: str) -> None:
    kind, good = GOOD[name]
    lines = ["{", "[1]", "null", json.dumps({"other": 1}), '{"a": "\\ud800"}', '{"x":' * 2000]
    lines += [json.dumps(good | change) for of, change, said in BAD if of == name and "has a key" not in said]
    bad = [lines[i % len(lines)].encode() for i in range(39)] + [b'{"a": "\xff"}']
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(line for b in bad for line in (json.dumps(good).encode(), b)))
    read = read_rows(file, bad_rows=BadRows("skip:40"))
    assert len(read.rows) == 40 and {row.schema.kind for row in read.rows} == {kind}
    assert [line.split(": ")[0] for line in read.bad] == [f"{file}, line {number}" for number in range(2, 81, 2)]
    with pytest.raises(
        ValueError, match=r"rows\.jsonl, line 80: no UTF-8 at byte 7: that is bad row 40, more than on_bad_row='skip:39'"
    ):
        read_rows(file, bad_rows=BadRows("skip:39"))


def test_the_schema_is_that_of_most_rows_not_of_the_first() -> None:
    rows = [{"prompt": "a"}, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError, match=r"row 0: field 'completion' is missing \(the row has: prompt\)"):
        read_rows(rows)


def test_files_may_have_different_schemas(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD["messages"][1]))
    (tmp_path / "b.json").write_text(json.dumps([GOOD["prompt-completion"][1]]))
    (tmp_path / "c.txt").write_text("left out")
    for data in (tmp_path, [str(tmp_path / "a.jsonl"), tmp_path / "b.json"]):
        read = read_rows(data, ("prompt_completion", "language_modeling"))
        assert [row.schema.kind for row in read.rows] == ["language_modeling", "prompt_completion"]
        assert list(read.schemas) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.json")]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [GOOD["preference-chat"][1] | {"id": 1}, GOOD["preference-chat"][1] | {"margin": 0.5}]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(pa.Table.from_pylist(rows[1:]).schema)), tmp_path / "a.parquet")
    read = read_rows(tmp_path / "a.parquet")
    assert [row.margin for row in read.rows] == [None, 0.5]
    assert read.rows[0].prompt == tuple(USER) and read.rows[1].where.endswith("a.parquet, row 1")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, r"the data: there is no row to use \(0 bad ones were skipped\)"),
        ("no.jsonl", FileNotFoundError, r"no\.jsonl does not exist"),
        (["no.jsonl"], FileNotFoundError, r"no\.jsonl does not exist"),
        (3, TypeError, "not iterable"),
    ],
)
def test_data_that_is_not_there(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_rows(data)


def test_only_bad_rows_are_no_data_set(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{\n{\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: there is no row to use \(2 bad ones were skipped\)"):
        read_rows(file, bad_rows=BadRows("skip:9"))
    (tmp_path / "b.csv").write_text("a")
    with pytest.raises(ValueError, match=r"b\.csv: cannot read \.csv; give \.jsonl, \.json, \.parquet or a folder of them"):
        read_rows(tmp_path / "b.csv")


# --- keys ---------------------------------------------------------------------------------------------------


def test_equal_prompts_have_equal_keys() -> None:
    keys = {
        one({"prompt": "a", "completion": "b"}).prompt_key,
        one({"prompt": "a", "chosen": "b", "rejected": "c"}).prompt_key,
        one({"prompt": "a"}).prompt_key,
        one({"text": "a"}).prompt_key,
    }
    assert len(keys) == 1
    chat = {
        one({"messages": turns("a", "b", "c", "d")}).prompt_key,
        one({"prompt": turns("a"), "completion": ANSWER}).prompt_key,
    }
    assert len(chat) == 1 and chat != keys
    assert one({"messages": turns("a", "b")}).key != one({"messages": turns("a", "c")}).key


# --- fuzz ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_mutated_jsonl_gives_rows_or_a_clear_error(tmp_path: Path, seed: int) -> None:
    """500 mutations a seed."""
    generator = random.Random(seed)
    lines = [json.dumps(row).encode() for _, row in GOOD.values()]
    file = tmp_path / "any.jsonl"
    for _ in range(500):
        data = bytearray(generator.choice(lines) + b"\n" + generator.choice(lines))
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(data))
            end = place + generator.randint(0, 3)
            pieces = [
                bytes([generator.randrange(256)]),
                b'"',
                b"[",
                b"{",
                b"null",
                b"1e999",
                b"\\ud800",
                b"true",
                data[place:end],
            ]
            data[place:end] = generator.choice(pieces)
        file.write_bytes(data)
        try:
            read = read_rows(file)
        except ValueError as error:
            assert "any.jsonl" in str(error)
        else:
            assert read.rows


@settings(max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["prompt", "completion", "chosen", "rejected", "role", "content", "messages", "label"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_value_is_a_row_or_a_clear_error(value: Any) -> None:
    try:
        read = read_rows(iter([value]))
    except ValueError as error:
        assert str(error).startswith("row 0: ")
    else:
        assert read.rows[0].prompt_key and read.rows[0].key
