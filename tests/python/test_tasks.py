"""What counts as an answer, and what does not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.feedback.tasks import (
    FLAGS,
    LETTERS,
    AnswerError,
    blind_order,
    check_answer,
    check_comment,
    check_labeller,
    check_reason,
    check_seconds,
    check_submission,
    check_text,
    shown_answer,
    shown_messages,
    shown_text,
)

ORDER = (2, 0, 1)  # A is place 2


def test_letters_become_places_and_back() -> None:
    given_answers: dict[Any, dict[str, Any]] = {
        "rank": {"ranking": [["B"], ["A", "C"]]},
        "compare": {"choice": "A"},
        "rate": {"ratings": {letter: {"score": n, "flags": ["opinion"]} for n, letter in enumerate("ABC", 1)}},
        "write": {"text": " Yes.\n"},
    }
    kept = {task: check_answer(task, ORDER, answer) for task, answer in given_answers.items()}
    assert kept["rank"] == {"ranking": [[0], [1, 2]]}
    assert kept["compare"] == {"choice": 2}
    assert [rating["score"] for rating in kept["rate"]["ratings"]] == [2, 3, 1]
    for task, answer in given_answers.items():
        assert shown_answer(task, ORDER, kept[task]) == answer
    assert check_answer("compare", ORDER, {"choice": "both_bad"}) == {"choice": "both_bad"}
    assert shown_answer("compare", ORDER, {"choice": "tie"}) == {"choice": "tie"}


def test_flags_are_kept_once_and_in_order() -> None:
    flags = ["opinion", "sexual", "opinion"]
    kept = check_answer("rate", (0,), {"ratings": {"A": {"score": 7, "flags": flags}}})
    assert kept == {"ratings": [{"score": 7, "flags": ["sexual", "opinion"]}]}
    assert len(FLAGS) == 11  # InstructGPT's


def all_of(rating: object) -> dict[str, object]:
    return dict.fromkeys("ABC", rating)


BAD: list[tuple[Any, object, str]] = [
    ("rank", None, "answer is missing, not an object"),
    ("rank", [], "answer is list"),
    ("rank", {}, "ranking must name each of A, B, C once"),
    ("rank", {"ranking": [["A"], ["B"]]}, "ranking must name"),
    ("rank", {"ranking": [["A"], ["B"], ["C"], []]}, "ranking must name"),
    ("rank", {"ranking": [["A"], ["B"], ["C", "A"]]}, "ranking must name"),
    ("rank", {"ranking": [["A"], ["B"], ["D"]]}, "ranking must name"),
    ("rank", {"ranking": [["A"], ["B"], [2]]}, "ranking must name"),
    ("rank", {"ranking": "ABC"}, "ranking must name"),
    ("compare", {"choice": "D"}, "choice must be one of A, B, C, tie, both_bad"),
    ("compare", {"choice": 0}, "choice must be one of"),
    ("compare", {"choice": ["A"]}, "choice must be one of"),
    ("rate", {"ratings": {}}, "ratings must hold a rating for each of A, B, C"),
    ("rate", {"ratings": all_of({"score": 0})}, "the score of A must be a whole number of 1 to 7"),
    ("rate", {"ratings": all_of({"score": 8})}, "the score of A"),
    ("rate", {"ratings": all_of({"score": True})}, "the score of A"),
    ("rate", {"ratings": all_of({"score": 4.0})}, "the score of A"),
    ("rate", {"ratings": all_of(4)}, "the score of A"),
    ("rate", {"ratings": all_of({"score": 4, "flags": ["rude"]})}, "the flags of A must be a list of"),
    ("rate", {"ratings": all_of({"score": 4, "flags": [[]]})}, "the flags of A"),
    ("write", {"text": " \n"}, "text is empty: write an answer, or skip the item"),
    ("write", {"text": None}, "text is missing, not a text"),
    ("write", {"text": "a" * 200_001}, "text has 200,001 characters, more than 200,000"),
    ("write", {"text": "a\ud800"}, "text is no valid Unicode at character 1"),
    ("write", {"text": "a\0"}, "text holds the character 0"),
]


@pytest.mark.parametrize(("task", "answer", "message"), BAD)
def test_what_is_no_answer(task: Any, answer: object, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        check_answer(task, ORDER, answer)


@given(
    st.sampled_from(["rank", "compare", "rate", "write"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from("ABC"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["ranking", "choice", "ratings", "text", "A", "B", "C", "score", "flags"]), inner)
        ),
        max_leaves=12,
    ),
)
def test_anything_is_an_answer_or_an_answer_error(task: Any, answer: object) -> None:
    try:
        kept = check_answer(task, ORDER, answer)
    except AnswerError:
        return
    assert check_answer(task, ORDER, shown_answer(task, ORDER, kept)) == kept


def test_names_submissions_seconds_reasons_comments() -> None:
    assert check_labeller("  Ann Å ") == "Ann Å"
    for name, message in [
        ("", "labeller is empty"),
        ("  ", "labeller is empty"),
        (None, "labeller is missing"),
        ("a" * 65, "labeller has 65 characters, more than 64"),
        ("a" * 10_000, "labeller has 10,000 characters"),
        ("a\u202eb", "labeller holds a character that cannot be seen"),
        ("a\nb", "cannot be seen"),
        ("a\udc00", "no valid Unicode"),
    ]:
        with pytest.raises(AnswerError, match=message):
            check_labeller(name)
    assert check_submission("0f9c2a1e-aaaa-4bbb-8ccc-0123456789ab")
    for submission in (None, 7, "short", "a" * 65, "0f9c2a1e aaaa", "0f9c2a1e-äöüß"):
        with pytest.raises(AnswerError, match="submission must be 8 to 64"):
            check_submission(submission)
    assert check_seconds(3) == 3.0 and check_seconds(1e300) == 30 * 24 * 3600
    for seconds in (None, "3", True, -1, float("nan"), float("inf"), 10**400):
        with pytest.raises(AnswerError, match="seconds must be a number"):
            check_seconds(seconds)
    assert check_reason("unclear") == "unclear"
    for reason in (None, "", "lazy", ["unclear"]):
        with pytest.raises(AnswerError, match="reason must be one of unclear"):
            check_reason(reason)
    assert check_comment(None) == "" and check_comment("ok") == "ok"
    for comment in (3, "a" * 20_001, [], "\0"):
        with pytest.raises(AnswerError, match="comment"):
            check_comment(comment)
    assert check_text("text", "ok", 2) == "ok"


def test_orders_are_blind_and_fixed() -> None:
    assert blind_order(0, 5, "Ann", 4) == (3, 1, 0, 2)  # the same on every machine, for ever
    orders = [blind_order(0, item, "Ann", 4) for item in range(4000)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    for place in range(4):  # every answer stands everywhere a quarter of the time: 5 standard deviations are 137
        for letter in range(4):
            assert abs(sum(order[letter] == place for order in orders) - 1000) < 140
    assert orders != [blind_order(1, item, "Ann", 4) for item in range(4000)]
    assert orders != [blind_order(0, item, "Bob", 4) for item in range(4000)]


def test_what_is_shown() -> None:
    assert shown_messages("Why?") == [{"role": "text", "content": "Why?"}]
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]})
    assert shown_messages(chat) == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert shown_text(" So.") == " So."
    assert shown_text(({"role": "assistant", "content": "So."},)) == "So."
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "this"}]}
    assert shown_messages((image,)) == [{"role": "user", "content": "[image]\nthis"}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    assert shown_text((call, {"role": "tool", "content": "3"})) == "assistant: [calls add]\n\ntool: 3"
    assert len(set(LETTERS)) == 9
