"""Rows to examples: ids, masks, lengths, reports, the split and the order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tutelage as tl
from chats_for_tests import (
    CHATML,
    CHATML_MARKED,
    NO_PROMPT,
    NOT_PRESERVING,
    SHIFTED,
    STOP_OUTSIDE,
    TEMPLATES,
    plain_tokenizer,
    turns,
    with_template,
)
from test_rows import BAD, GOOD
from tutelage.data import examples as examples_module
from tutelage.data.chat import ChatTemplateError
from tutelage.data.examples import (
    Example,
    ExampleSet,
    Prompt,
    Report,
    load_preferences,
    load_prompts,
    load_rankings,
    load_sft,
    load_unpaired,
    sequences,
    split_examples,
)
from tutelage.data.packing import Cursor
from tutelage.data.tokenizer import Tokenizer

TOKENIZER = with_template(CHATML)
EOS = TOKENIZER.eos_token_id
LOADERS: dict[str, Callable[..., ExampleSet[Any]]] = {
    "language_modeling": load_sft,
    "prompt_completion": load_sft,
    "prompt_only": load_prompts,
    "preference": load_preferences,
    "unpaired_preference": load_unpaired,
    "ranking": load_rankings,
}


def text(example: Example | Prompt) -> str:
    return TOKENIZER.decode(example.tokens.tolist())


def learned(example: Example) -> str:
    return TOKENIZER.decode(example.tokens[example.mask].tolist())


def sft(row: dict[str, Any], tokenizer: Tokenizer = TOKENIZER, **kwargs: Any) -> Example:
    return load_sft([row], tokenizer, 200, **kwargs).examples[0]


def adds_bos() -> Tokenizer:
    """As Llama's tokenizers do."""
    from tokenizers import processors

    backend = type(TOKENIZER.backend).from_str(TOKENIZER.backend.to_str())
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer.from_contents(dict(TOKENIZER.contents) | {"tokenizer.json": backend.to_str().encode()}, "test")


# --- every schema -------------------------------------------------------------------------------------------


def test_language_modelling() -> None:
    example = sft({"text": "hello world", "id": 3})
    assert (text(example), learned(example)) == ("hello world</s>", " world</s>")  # nothing predicts the first token
    assert example.tokens.dtype == np.int32 and example.mask.dtype == np.bool_
    assert (example.columns, example.where) == ({"id": 3}, "row 0")
    conversation = {"messages": turns("hi", "yes", "so", "no")}
    assert learned(sft(conversation)) == "yes<|im_end|>no<|im_end|>"
    whole = sft(conversation, assistant_only_loss=False)
    assert learned(whole) == text(whole).removeprefix("<|im_start|>")
    assert whole.tokens.tolist() == TOKENIZER.chat(turns("hi", "yes", "so", "no"))[0]


def test_prompt_and_completion() -> None:
    example = sft({"prompt": "hello", "completion": " world"})
    assert (text(example), learned(example)) == ("hello world</s>", " world</s>")
    assert learned(sft({"prompt": "hello x", "completion": " world"}, completion_only_loss=False)) == " x world</s>"
    chat = {"prompt": turns("hi"), "completion": [{"role": "assistant", "content": "yes"}]}
    example = sft(chat)
    assert text(example) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert learned(example) == "yes<|im_end|>"
    more = {"prompt": turns("hi", "yes", "so"), "completion": turns("", "no", "why", "it is")[1:]}
    assert learned(sft(more)) == "no<|im_end|>it is<|im_end|>"
    assert learned(sft(more, completion_only_loss=False)) == "yes<|im_end|>no<|im_end|>it is<|im_end|>"
    both = sft(more, completion_only_loss=False, assistant_only_loss=False)
    assert learned(both) == text(both).removeprefix("<|im_start|>")


def test_preferences() -> None:
    (pair,) = load_preferences([{"prompt": "a", "chosen": " b", "rejected": " c", "margin": 2, "x": 1}], TOKENIZER, 99).examples
    assert (learned(pair.chosen), learned(pair.rejected)) == (" b</s>", " c</s>")
    assert (text(pair.chosen), pair.margin, pair.columns) == ("a b</s>", 2.0, {"x": 1})
    (implicit,) = load_preferences([{"chosen": "a b", "rejected": "a c"}], TOKENIZER, 99).examples
    assert [s.tokens.tolist() for s in sequences(implicit)] == [s.tokens.tolist() for s in sequences(pair)]
    assert implicit.margin is None
    (chat,) = load_preferences([GOOD["implicit-chat"][1]], TOKENIZER, 99).examples
    (explicit,) = load_preferences([GOOD["preference-chat"][1]], TOKENIZER, 99).examples
    assert [text(s) for s in sequences(chat)] == [text(s) for s in sequences(explicit)]
    assert (learned(chat.chosen), learned(chat.rejected)) == ("yes<|im_end|>", "no<|im_end|>")


def test_unpaired() -> None:
    rows = [GOOD["unpaired"][1], {"prompt": "a", "completion": "c", "label": False}]
    read = load_unpaired(rows, TOKENIZER, 99).examples
    assert [(learned(u.example), u.label) for u in read] == [("b</s>", True), ("c</s>", False)]


def test_rankings_and_pairs_as_rankings() -> None:
    (ranking,) = load_rankings([GOOD["ranking"][1]], TOKENIZER, 99).examples
    assert [learned(r) for r in ranking.responses] == ["b</s>", "c</s>", "d</s>", "e</s>"]
    assert ranking.ranking == ((0,), (2, 1), (3,))
    (pair,) = load_rankings([GOOD["preference-chat"][1] | {"margin": 1}], TOKENIZER, 99).examples
    assert [learned(r) for r in pair.responses] == ["yes<|im_end|>", "no<|im_end|>"]
    assert (pair.ranking, pair.margin) == (((0,), (1,)), 1.0)


def test_prompts() -> None:
    read = load_prompts([{"prompt": turns("hi"), "answer": "42"}], TOKENIZER, 99)
    (prompt,) = read.examples
    assert text(prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (prompt.prompt, prompt.columns) == (tuple(turns("hi")), {"answer": "42"})
    assert read.turn is not None and read.turn.stop_token == "<|im_end|>"
    assert text(load_prompts([{"prompt": "hello"}], TOKENIZER, 99).examples[0]) == "hello"


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template])
@settings(max_examples=40)
@given(
    content=st.text(st.sampled_from("ab \n<猫"), min_size=1, max_size=6),
    answer=st.text(st.sampled_from("ab \n<猫"), max_size=6),
)
def test_the_prompts_ids_are_a_prefix_of_the_whole(name: str, content: str, answer: str) -> None:
    """So the model is taught what it sees when it generates."""
    tokenizer = with_template(TEMPLATES[name])
    prompt, completion = turns(content), [{"role": "assistant", "content": answer}]
    asked = load_prompts([{"prompt": prompt}], tokenizer, 999).examples[0].tokens.tolist()
    for example in (
        load_sft([{"prompt": prompt, "completion": completion}], tokenizer, 999).examples[0],
        load_sft([{"messages": prompt + completion}], tokenizer, 999).examples[0],
    ):
        first = int(example.mask.argmax())
        assert example.tokens[:first].tolist() == asked
        assert example.tokens[example.mask][-1] == tokenizer.backend.token_to_id(
            {"llama3": "<|eot_id|>"}.get(name, "<|im_end|>" if "<|im_end|>" in TEMPLATES[name] else "</s>")
        )


@given(prompt=st.text(max_size=9), completion=st.text(max_size=9))
def test_the_prompts_ids_are_a_prefix_of_the_whole_for_strings(prompt: str, completion: str) -> None:
    assume(prompt or completion)
    example = sft({"prompt": prompt, "completion": completion}, plain_tokenizer())
    ids = plain_tokenizer().encode(prompt)
    assert example.tokens[: len(ids)].tolist() == ids
    assert TOKENIZER.decode(example.tokens.tolist()) == prompt + completion + "</s>" or "</s>" in prompt + completion


def test_tools_and_template_options_reach_the_template() -> None:
    template = "{{ tools | tojson if tools }}{{ mood }}" + CHATML
    row = {"messages": turns("hi", "yes"), "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "kind"}}
    for kwargs in ({}, {"assistant_only_loss": False}):
        assert text(sft(row, with_template(template), **kwargs)).startswith('[{"name": "f"}]kind<|im_start|>')
    prompt = {"prompt": turns("hi"), **{k: row[k] for k in ("tools", "chat_template_kwargs")}}
    (read,) = load_prompts([prompt], with_template(template), 99).examples
    assert text(read).startswith('[{"name": "f"}]kind<|im_start|>')
    (pair,) = load_preferences(
        [prompt | {"chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]}], with_template(template), 99
    ).examples
    assert text(pair.rejected).startswith('[{"name": "f"}]kind<|im_start|>')


# --- bos and eos --------------------------------------------------------------------------------------------


def test_bos_stands_once() -> None:
    tokenizer = adds_bos()
    assert tokenizer.adds_bos and not TOKENIZER.adds_bos
    for row, told in (
        ({"prompt": "hello", "completion": " so"}, {}),
        ({"prompt": "<s>hello", "completion": " so"}, {"double bos": 1}),
    ):
        read = load_sft([row], tokenizer, 99)
        assert text(read.examples[0]) == "<s>hello so</s>" and read.examples[0].tokens[0] == 1
        assert read.report.counts == told
    assert "begins with '<s>', which the tokenizer adds by itself" in str(read.report)
    assert sft({"prompt": "<s>hello", "completion": " so"}).tokens.tolist()[:1] == [1]  # where it is spelled, it is meant
    assert text(load_prompts([{"prompt": "a"}], tokenizer, 9).examples[0]) == "<s>a"
    llama = with_template(TEMPLATES["llama3"].replace("bos_token + content", "bos_token + bos_token + content"))
    report = load_sft([{"messages": turns("a", "b")}], llama, 99).report
    assert report.counts == {"double bos": 1, "note": 1}
    assert "row 0: the rendered conversation begins with two bos tokens: the template writes one too many" in str(report)


def test_eos_stands_once() -> None:
    for row in ({"text": "hello"}, {"text": "hello</s>"}):
        assert sft(row).tokens.tolist() == [*TOKENIZER.encode("hello"), EOS]
    same = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b</s>"}]
    assert len({tuple(e.tokens.tolist()) for e in load_sft(same, TOKENIZER, 99).examples}) == 1


def test_a_tokenizer_without_end() -> None:
    contents = dict(TOKENIZER.contents) | {"tokenizer_config.json": b"{}"}
    with pytest.raises(ValueError, match=r"names no end of text: set eos_token in its tokenizer_config\.json"):
        load_sft([{"text": "a"}], Tokenizer.from_contents(contents, "test"), 99)


# --- templates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [STOP_OUTSIDE, SHIFTED, NO_PROMPT, NOT_PRESERVING])
@pytest.mark.parametrize("name", [name for name in GOOD if "chat" in name or name == "messages"])
def test_a_template_that_would_teach_something_else_is_refused_by_every_loader(template: str, name: str) -> None:
    kind, row = GOOD[name]
    load = LOADERS[kind]
    with pytest.raises(ChatTemplateError, match="endered\n"):
        load([row], with_template(template), 999, on_bad_row="skip:99")
    for good in (CHATML, CHATML_MARKED):
        assert len(load([row], with_template(good), 999)) == 1


def test_messages_without_a_template() -> None:
    with pytest.raises(ChatTemplateError, match="this tokenizer has no chat template, so messages cannot become text"):
        load_sft([{"messages": turns("a", "b")}], plain_tokenizer(), 99)


def test_a_conversation_that_the_template_refuses_is_a_bad_row() -> None:
    tokenizer = with_template(TEMPLATES["llama2"])
    rows = [{"messages": turns("a", "b")}, {"messages": [*turns("a"), *turns("b", "c")]}]
    with pytest.raises(ValueError, match=r"row 1: .* roles must alternate: correct it, or leave such rows out"):
        load_sft(rows, tokenizer, 99)
    read = load_sft(rows, tokenizer, 99, on_bad_row="skip:1")
    assert (len(read), read.report.counts) == (1, {"bad row": 1})


def test_a_prompt_that_is_rendered_in_another_way_with_its_completion() -> None:
    row = {"prompt": turns("x", "b", "c"), "completion": turns("", "d")[1:]}
    template = "{{ 'Long. ' if messages | length > 2 and messages[0].content == 'x' }}" + CHATML
    with pytest.raises(ValueError, match=r"row 0: .*it is not prefix-preserving"):  # nor is it the same turn by turn
        load_sft([row], with_template(template), 99)
    row = {"prompt": turns("x"), "completion": turns("", "d")[1:]}
    template = "{{ 'Long. ' if messages | length > 1 and messages[0].content == 'x' }}" + CHATML
    with pytest.raises(
        ValueError, match="row 0: the chat template renders the prompt in another way when the completion follows"
    ):
        load_sft([row], with_template(template), 99)


def test_answers_that_end_with_another_token_than_texts_are_noted() -> None:
    report = load_sft([{"messages": turns("a", "b")}], TOKENIZER, 99).report
    assert report.counts == {"note": 1}
    assert "answers end with '<|im_end|>', texts with '</s>': generation must stop at both" in str(report)
    assert not load_sft([{"messages": turns("a", "b")}], with_template(TEMPLATES["zephyr"]), 99).report.findings


# --- lengths ------------------------------------------------------------------------------------------------

LENGTH = len(TOKENIZER.encode("abcdefgh")) + 1


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_lengths_around_the_limit(extra: int) -> None:
    """Rows of max_length - 1, max_length and max_length + 1 tokens."""
    row = {"prompt": "ab", "completion": "cdefgh"}
    limit = sum(len(TOKENIZER.encode(part)) for part in row.values()) + 1 - extra
    if extra <= 0:
        for on_long in ("error", "truncate", "drop"):
            read = load_sft([row], TOKENIZER, limit, on_long=on_long)  # type: ignore[arg-type]
            assert read.report.counts == {} and text(read.examples[0]) == "abcdefgh</s>"
        return
    with pytest.raises(
        ValueError, match=rf"row 0: the row has {limit + 1} tokens, more than max_length = {limit}: raise max_length, or"
    ):
        load_sft([row], TOKENIZER, limit)
    read = load_sft([row], TOKENIZER, limit, on_long="truncate")
    assert text(read.examples[0]) == "abcdefgh" and learned(read.examples[0]) == "cdefgh"
    assert read.report.counts == {"truncated": 1, "no stop token": 1}
    assert f"row 0: the row keeps {limit} of {limit + 1} tokens" in str(read.report)
    assert "row 0: the row has no '</s>' to learn, which would end it" in str(read.report)
    read = load_sft([row, {"prompt": "a", "completion": "b"}], TOKENIZER, limit, on_long="drop")
    assert len(read) == 1 and read.report.counts == {"too long, dropped": 1}
    with pytest.raises(ValueError, match="there is no example to learn from: 1 rows, 0 examples; too long, dropped: 1"):
        load_sft([row], TOKENIZER, limit, on_long="drop")


def test_the_shortest_rows() -> None:
    with pytest.raises(ValueError, match="row 0: the row has no token to learn: the mask is empty: correct it"):
        load_sft([{"text": ""}], TOKENIZER, 9)  # one token, which nothing predicts
    read = load_sft([{"text": ""}, {"prompt": "", "completion": ""}, {"text": "a"}], TOKENIZER, 9, on_bad_row="skip:2")
    assert [text(e) for e in read.examples] == ["a</s>"]
    assert read.report.counts == {"bad row": 2, "empty completion": 1} and read.report.rows == 3
    assert learned(sft({"prompt": "a", "completion": ""})) == "</s>"
    with pytest.raises(ValueError, match="row 0: the prompt has no token"):
        load_prompts([{"prompt": ""}], TOKENIZER, 9)
    with pytest.raises(ValueError, match="max_length is 0: it must be at least 1"):
        load_sft([{"text": "a"}], TOKENIZER, 0)
    with pytest.raises(ValueError, match="row 0: the row has no token to learn of the 1 that are kept of 2: the mask is empty"):
        load_sft([{"text": "a"}], TOKENIZER, 1, on_long="truncate")


def test_a_row_truncated_until_nothing_is_learned_is_an_error() -> None:
    row = {"prompt": "a long prompt", "completion": "b"}
    limit = len(TOKENIZER.encode("a long prompt"))
    with pytest.raises(ValueError, match=rf"row 0: the row has no token to learn of the {limit} that are kept of {limit + 2}"):
        load_sft([row], TOKENIZER, limit, on_long="truncate")
    pair = {"prompt": "a long prompt", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match="row 0: chosen has no token to learn"):
        load_preferences([pair], TOKENIZER, limit, on_long="truncate")
    ranked = {"prompt": "a", "responses": ["b", "b" * 30], "ranking": [[0], [1]]}
    with pytest.raises(ValueError, match="row 0: response 1 has 32 tokens, more than max_length = 20"):
        load_rankings([ranked], TOKENIZER, 20)
    assert load_rankings([ranked], TOKENIZER, 20, on_long="truncate").report.counts == {"truncated": 1, "no stop token": 1}


def test_prompts_are_not_truncated() -> None:
    with pytest.raises(ValueError, match="on_long is 'truncate': for prompts it must be 'error' or 'drop'"):
        load_prompts([{"prompt": "a"}], TOKENIZER, 9, on_long="truncate")  # type: ignore[arg-type]
    rows = [{"prompt": "abc"}, {"prompt": "a"}]
    with pytest.raises(
        ValueError, match="row 0: the prompt has 3 tokens, more than max_length = 2: raise max_length, or pass on_long='drop'"
    ):
        load_prompts(rows, TOKENIZER, 2)
    assert [text(p) for p in load_prompts(rows, TOKENIZER, 2, on_long="drop").examples] == ["a"]
    with pytest.raises(ValueError, match="on_long is 'cut': it must be 'error', 'truncate' or 'drop'"):
        load_sft([{"text": "a"}], TOKENIZER, 9, on_long="cut")  # type: ignore[arg-type]


# --- the report ---------------------------------------------------------------------------------------------


def test_everything_suspicious_is_reported_with_its_row() -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "d", "rejected": "d"},
        {"prompt": "a", "chosen": " ", "rejected": "c"},
        {"prompt": "a <s> b", "chosen": "x<|im_end|>y", "rejected": "c"},
        {"prompt": "a", "chosen": 3, "rejected": "c"},
    ]
    report = load_preferences(rows, TOKENIZER, 99, on_bad_row="skip:1").report
    assert report.counts == {
        "bad row": 1,
        "empty completion": 1,
        "chosen equals rejected": 1,
        "duplicate row": 1,
        "spelled special token": 2,
    }
    assert (report.rows, report.examples) == (6, 5)
    for line in (
        "6 rows, 5 examples; bad row: 1, ",
        "duplicate row: row 1: says the same as row 0",
        "chosen equals rejected: row 2: chosen and rejected are the same",
        "empty completion: row 3: there is no text, so only the end token is learned",
        "spelled special token: row 4: the text spells '<|im_end|>', which is plain text, not that token",
        "bad row: row 5: field 'chosen' is int, not a string",
    ):
        assert line in str(report)
    assert str(load_sft([{"text": "ab"}], TOKENIZER, 9).report) == "1 rows, 1 examples; nothing to report"


def test_suspicious_conversations() -> None:
    rows = [{"messages": turns("a", " ")}, {"messages": turns("a<s>", "b")}]
    report = load_sft(rows, TOKENIZER, 99).report
    assert report.counts == {"empty completion": 1, "spelled special token": 1, "note": 1}
    assert "row 0: message 1 is an empty answer" in str(report)


def test_the_report_shows_twenty_of_a_kind() -> None:
    report = load_sft([{"text": "ab"}] * 40, TOKENIZER, 9).report
    assert report.counts == {"duplicate row": 39}
    assert "row 20: says" in str(report) and "row 21: says" not in str(report) and "duplicate row: … and 19 more" in str(report)
    assert len(report.findings) == 39


@pytest.mark.parametrize("name", GOOD)
def test_forty_bad_rows_of_every_schema(tmp_path: Path, name: str) -> None:
    kind, good = GOOD[name]
    changes = [json.dumps(good | change) for of, change, said in BAD if of == name and "has a key" not in said]
    bad = [(*changes, "{", "[]", '{"a": 1}')[i % (len(changes) + 3)] for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(line for b in bad for line in (json.dumps(good), b)))
    load = LOADERS[kind]
    read = load(file, TOKENIZER, 999, on_bad_row="skip:40")
    assert len(read) == 40 and read.report.counts["bad row"] == 40 and read.report.rows == 80
    found = [finding.message for finding in read.report.findings if finding.kind == "bad row"]
    assert [message.split(": ")[0] for message in found] == [f"{file}, line {number}" for number in range(2, 81, 2)]
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 80: .*that is bad row 40, more than on_bad_row='skip:39' allows"):
        load(file, TOKENIZER, 999, on_bad_row="skip:39")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: .*correct it, or leave such rows out"):
        load(file, TOKENIZER, 999)


# --- fingerprint --------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_what_is_learned() -> None:
    row = {"prompt": "a 猫", "chosen": "b", "rejected": "c", "margin": 1.0}
    base = load_preferences([row], TOKENIZER, 99).fingerprint
    assert load_preferences([row | {"id": 3}], TOKENIZER, 99).fingerprint == base
    others = [
        load_preferences([row | {"margin": 2.0}], TOKENIZER, 99),
        load_preferences([row | {"chosen": "c", "rejected": "b"}], TOKENIZER, 99),
        load_preferences([row], TOKENIZER, 99, completion_only_loss=False),
        load_preferences([row, row], TOKENIZER, 99),
        load_rankings([row], TOKENIZER, 99),
        load_unpaired([{"prompt": "a", "completion": "b", "label": True}], TOKENIZER, 99),
        load_unpaired([{"prompt": "a", "completion": "b", "label": False}], TOKENIZER, 99),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 8


def test_the_fingerprint_has_not_changed() -> None:
    """A reference's log-probs are kept under it."""
    example = Example(np.array([1, 2, 3], np.int32), np.array([False, True, True]))
    assert examples_module._fingerprint([example]) == "e3192d50e6fd538e7c4893ccf110f79f5b60ddf259213a444b5e2e914cd3c87c"


# --- split and order ----------------------------------------------------------------------------------------


def some(count: int, prompts: int) -> ExampleSet[Example]:
    rows = [{"prompt": f"p{i % prompts}", "completion": f"c{i}"} for i in range(count)]
    return load_sft(rows, TOKENIZER, 99)


@settings(max_examples=30)
@given(prompts=st.integers(2, 12), fraction=st.floats(0.01, 0.95), seed=st.integers(0, 5))
def test_equal_prompts_stand_on_one_side(prompts: int, fraction: float, seed: int) -> None:
    data = some(24, prompts)
    training, held_out = split_examples(data, fraction, seed)
    sides = [{example.prompt_key for example in side.examples} for side in (training, held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert sorted(e.where for side in (training, held_out) for e in side.examples) == sorted(e.where for e in data.examples)
    assert training.fingerprint != held_out.fingerprint and training.report.examples == len(training)


def test_negative_control_split_by_row_puts_equal_prompts_on_both_sides() -> None:
    data = some(24, 3)
    half = {e.prompt_key for e in data.examples[:12]} & {e.prompt_key for e in data.examples[12:]}
    assert half


def test_the_split_depends_on_the_prompt_and_the_seed_alone() -> None:
    few, many = some(300, 300), some(600, 600)
    held = {e.prompt_key for e in split_examples(few, 0.2)[1].examples}
    assert held == {e.prompt_key for e in split_examples(many, 0.2)[1].examples} & {e.prompt_key for e in few.examples}
    assert 30 < len(held) < 90
    assert held != {e.prompt_key for e in split_examples(few, 0.2, seed=1)[1].examples}
    conversations = load_sft([{"messages": turns("a", f"b{i}", f"c{i}", "d")} for i in range(9)], TOKENIZER, 99)
    assert {len(side) for side in split_examples(conversations, 0.5)} == {0, 9}
    training, none = split_examples(few, 0)
    assert (len(training), len(none)) == (300, 0)
    with pytest.raises(ValueError, match=r"the held-out fraction is 1\.0: it must be at least 0 and below 1"):
        split_examples(few, 1.0)


@settings(max_examples=40)
@given(count=st.integers(1, 9), takes=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 3))
def test_batches_see_every_example_once_an_epoch_and_resume(count: int, takes: list[int], seed: int) -> None:
    data = some(count, count)
    batches, cursor, taken = tl.Batches(data, seed), Cursor(), []
    for number in takes:
        before = cursor
        part, cursor = batches.take(cursor, number)
        assert [e.where for e in tl.Batches(data, seed).take(before, number)[0]] == [e.where for e in part]
        taken += part
    assert len(taken) == sum(takes) and cursor == Cursor(sum(takes) // count, sum(takes) % count)
    for epoch in range(len(taken) // count):
        seen = Counter(e.where for e in taken[epoch * count : (epoch + 1) * count])
        assert seen == Counter(e.where for e in data.examples)
    assert [e.where for e in taken] == [e.where for e in batches.take(Cursor(), sum(takes))[0]]


def test_every_epoch_and_seed_has_another_order() -> None:
    batches = tl.Batches(some(20, 20), 0)
    orders = {tuple(batches.order(epoch)) for epoch in range(5)} | {
        tuple(tl.Batches(some(20, 20), seed).order(0)) for seed in (1, 2)
    }
    assert len(orders) == 7 and len(batches) == 20
    assert batches.order(0) == [2, 7, 8, 1, 17, 11, 9, 14, 0, 3, 4, 10, 15, 18, 6, 19, 5, 16, 12, 13]  # for ever
    assert batches.fingerprint != tl.Batches(some(20, 20), 1).fingerprint != tl.Batches(some(19, 19), 1).fingerprint


def test_batches_that_cannot_be() -> None:
    batches = tl.Batches(some(3, 3))
    with pytest.raises(ValueError, match="count is 0: it must be at least 1"):
        batches.take(Cursor(), 0)
    for cursor in (Cursor(0, 4), Cursor(-1, 0), Cursor(0, -1)):
        with pytest.raises(ValueError, match="is outside of this data: it belongs to other data"):
            batches.take(cursor, 1)
    with pytest.raises(ValueError, match="there are no examples to take batches of"):
        tl.Batches(ExampleSet((), Report(0, 0), ""))


def test_examples_can_be_packed() -> None:
    read = load_sft([{"prompt": "a", "completion": "b"}, {"prompt": "cd", "completion": "e"}], TOKENIZER, 9).examples
    batch = tl.pack([e.tokens for e in read], [e.mask for e in read])
    assert batch.completion_counts == [int(e.mask.sum()) for e in read]
