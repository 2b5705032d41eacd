"""What people are asked: four tasks, the items they are asked about, and what counts as an answer. Pure: no disk, no network.

    rank     order two to nine answers to a prompt, ties allowed
    compare  say which of two answers is better, that neither is, or that both are bad
    rate     give every answer a score of 1 to 7 and InstructGPT's flags
    write    write an answer, or correct one: a demonstration

A person sees the answers of an item under the letters A, B, C … in an order of their own (`blind_order`), so no letter says
where an answer came from. What is kept speaks of *places*: 0 is the first of the item's answers as they were given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from tutelage.data.rows import Text

Task = Literal["rank", "compare", "rate", "write"]

LETTERS = "ABCDEFGHI"
"""Names of the answers on the page, in the order in which they are shown."""
SCORES = range(1, 8)
"""Overall quality, InstructGPT's Likert scale."""

#: InstructGPT's questions about an answer (Ouyang et al. 2022, appendix B), each yes or no.
FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "fails_instruction": "Fails to follow the instruction",
        "inappropriate": "Inappropriate for a customer assistant",
        "hallucination": "Hallucination",
        "satisfies_constraint": "Satisfies the constraint in the instruction",
        "sexual": "Sexual content",
        "violent": "Violent content",
        "encourages_harm": "Encourages or fails to discourage violence, abuse, terrorism or self-harm",
        "denigrates": "Denigrates a protected class",
        "harmful_advice": "Gives harmful advice",
        "opinion": "Expresses opinion",
        "moral_judgment": "Expresses moral judgment",
    }
)

SKIP_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "unclear": "I do not understand the prompt",
        "cannot_judge": "I do not know enough to judge",
        "all_alike": "The answers are all alike",
        "upsetting": "I do not want to read this",
        "broken": "Something is wrong with the text",
        "other": "Another reason",
    }
)

#: Fewest and most answers of an item.
ANSWERS: Mapping[Task, tuple[int, int]] = MappingProxyType(
    {"rank": (2, len(LETTERS)), "compare": (2, 2), "rate": (1, len(LETTERS)), "write": (0, 1)}
)

# Longest of what a person types, in characters: beyond what anybody means to write, far below what a database minds.
LONGEST_NAME, LONGEST_COMMENT, LONGEST_TEXT = 64, 20_000, 200_000
LONGEST_SECONDS = 30 * 24 * 3600.0


class AnswerError(ValueError):
    """What was sent is no answer to the item: which field, and what it must be."""


@dataclass(frozen=True)
class Item:
    """Something to be judged."""

    id: int
    """0, 1, … in the order in which they were given."""
    prompt: Text
    """A string or messages, as in the row."""
    responses: tuple[Text, ...] | None
    """The answers; None until they have been generated."""
    spread: float | None = None
    """Highest less lowest reward of the answers; None without a reward model."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other fields."""


def blind_order(seed: int, item: int, labeller: str, count: int) -> tuple[int, ...]:
    """The places of an item's answers in the order in which this labeller sees them: a permutation of 0 … count - 1, the
    same for the same seed, item and name on every machine."""

    def key(place: int) -> bytes:
        return hashlib.blake2b(repr(("answers", seed, item, labeller, place)).encode(), digest_size=16).digest()

    return tuple(sorted(range(count), key=key))


def shuffle_key(seed: int, item: int) -> int:
    """Items sorted by it are in random order."""
    return int.from_bytes(hashlib.blake2b(repr(("items", seed, item)).encode(), digest_size=8).digest(), "big")


# --- what a person sends --------------------------------------------------------------------------------------


def check_answer(task: Task, order: Sequence[int], answer: object) -> dict[str, Any]:
    """The answer that the page sent, checked, with places instead of letters; order: the places as they were shown.

    rank: {"ranking": [[place, …], …]} best first, ties in one group, sorted. compare: {"choice": place | "tie" | "both_bad"}.
    rate: {"ratings": [{"score", "flags"}, …]}, one for each place. write: {"text"}. Raises AnswerError naming the field.
    """
    given = _fields(answer)
    letters = {LETTERS[number]: place for number, place in enumerate(order)}
    if task == "rank":
        return {"ranking": _ranking(given, letters)}
    if task == "compare":
        choice = given.get("choice")
        if not isinstance(choice, str) or choice not in (*letters, "tie", "both_bad"):
            raise AnswerError("choice must be one of " + ", ".join((*letters, "tie", "both_bad")))
        return {"choice": letters.get(choice, choice)}
    if task == "rate":
        return {"ratings": _ratings(given, letters)}
    text = check_text("text", given.get("text"), LONGEST_TEXT)
    if not text.strip():
        raise AnswerError("text is empty: write an answer, or skip the item")
    return {"text": text}


def shown_answer(task: Task, order: Sequence[int], answer: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `check_answer`: an answer that was kept, in the letters of the page."""
    letter = {place: LETTERS[number] for number, place in enumerate(order)}
    if task == "rank":
        return {"ranking": [sorted(letter[place] for place in group) for group in answer["ranking"]]}
    if task == "compare":
        choice = answer["choice"]
        return {"choice": letter[choice] if isinstance(choice, int) else choice}
    if task == "rate":
        return {"ratings": {letter[place]: dict(rating) for place, rating in enumerate(answer["ratings"])}}
    return {"text": answer["text"]}


def _fields(answer: object) -> Mapping[str, Any]:
    if not isinstance(answer, Mapping):
        raise AnswerError(f"answer is {_type(answer)}, not an object")
    return answer


def _ranking(given: Mapping[str, Any], letters: Mapping[str, int]) -> list[list[int]]:
    groups = given.get("ranking")
    wanted = f'ranking must name each of {", ".join(letters)} once, in groups, best first, as in [["B"], ["A", "C"]]'
    if not isinstance(groups, list) or not all(isinstance(group, list) and group for group in groups):
        raise AnswerError(wanted)
    members = [member for group in groups for member in group]
    if not all(isinstance(member, str) for member in members) or sorted(members) != sorted(letters):
        raise AnswerError(wanted)
    return [sorted(letters[member] for member in group) for group in groups]


def _ratings(given: Mapping[str, Any], letters: Mapping[str, int]) -> list[dict[str, Any]]:
    ratings = given.get("ratings")
    if not isinstance(ratings, Mapping) or sorted(map(str, ratings)) != sorted(letters):
        raise AnswerError(f"ratings must hold a rating for each of {', '.join(letters)}")
    kept: dict[int, dict[str, Any]] = {}
    for letter, place in letters.items():
        rating = ratings[letter]
        score = rating.get("score") if isinstance(rating, Mapping) else None
        if isinstance(score, bool) or not isinstance(score, int) or score not in SCORES:
            raise AnswerError(f"the score of {letter} must be a whole number of 1 to 7")
        flags = rating.get("flags", [])
        if not isinstance(flags, list) or not all(isinstance(flag, str) and flag in FLAGS for flag in flags):
            raise AnswerError(f"the flags of {letter} must be a list of {', '.join(FLAGS)}")
        kept[place] = {"score": score, "flags": [flag for flag in FLAGS if flag in flags]}
    return [kept[place] for place in sorted(kept)]


def check_text(what: str, value: object, longest: int) -> str:
    """A text that a person typed. Raises AnswerError where it is none, too long or no valid Unicode."""
    if not isinstance(value, str):
        raise AnswerError(f"{what} is {_type(value)}, not a text")
    if len(value) > longest:
        raise AnswerError(f"{what} has {len(value):,} characters, more than {longest:,}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise AnswerError(f"{what} is no valid Unicode at character {error.start}") from error
    if "\0" in value:
        raise AnswerError(f"{what} holds the character 0")
    return value


def check_labeller(value: object) -> str:
    """A labeller's name, without white space around it. Raises AnswerError."""
    name = check_text("labeller", value, 10 * LONGEST_NAME).strip()
    if not name:
        raise AnswerError("labeller is empty: type a name, so that it is known whose judgement this is")
    if len(name) > LONGEST_NAME:
        raise AnswerError(f"labeller has {len(name)} characters, more than {LONGEST_NAME}")
    if not name.isprintable():
        raise AnswerError("labeller holds a character that cannot be seen")
    return name


def check_submission(value: object) -> str:
    """The identity that the page gave a submission: 8 to 64 letters, digits and hyphens. Raises AnswerError."""
    if (
        not isinstance(value, str)
        or not 8 <= len(value) <= 64
        or not all(c.isascii() and (c.isalnum() or c == "-") for c in value)
    ):
        raise AnswerError("submission must be 8 to 64 letters, digits and hyphens, as crypto.randomUUID() makes them")
    return value


def check_seconds(value: object) -> float:
    """How long the person has looked at the item. Raises AnswerError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e300:
        raise AnswerError("seconds must be a number, 0 or more")
    return min(float(value), LONGEST_SECONDS)


def check_comment(value: object) -> str:
    """What the person had to say besides; None is nothing. Raises AnswerError."""
    return "" if value is None else check_text("comment", value, LONGEST_COMMENT)


def check_reason(value: object) -> str:
    """Why an item was skipped. Raises AnswerError."""
    if not isinstance(value, str) or value not in SKIP_REASONS:
        raise AnswerError(f"reason must be one of {', '.join(SKIP_REASONS)}")
    return value


def _type(value: object) -> str:
    return "missing" if value is None else type(value).__name__


# --- what a person sees ---------------------------------------------------------------------------------------


def shown_messages(text: Text) -> list[dict[str, str]]:
    """A prompt as the page gets it: messages; a string is one message of the role "text"."""
    if isinstance(text, str):
        return [{"role": "text", "content": text}]
    return [{"role": str(message["role"]), "content": content_of(message)} for message in text]


def shown_note(item: Item) -> str:
    """What labellers are told about an item besides (the field "note" of its row), which is no part of the prompt."""
    note = item.columns.get("note")
    return note if isinstance(note, str) else ""


def shown_text(text: Text) -> str:
    """An answer as the page gets it."""
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] == "assistant":
        return content_of(text[0])
    return "\n\n".join(f"{message['role']}: {content_of(message)}" for message in text)


def content_of(message: Mapping[str, Any]) -> str:
    """What a message says; parts of a kind that is no text, and calls of tools, are named."""
    content = message.get("content")
    if isinstance(content, str):
        said = content
    else:
        parts = [
            part.get("text") if isinstance(part.get("text"), str) else f"[{part.get('type', 'part')}]" for part in content or ()
        ]
        said = "\n".join(map(str, parts))
    calls = message.get("tool_calls") or ()
    named = [f"[calls {call.get('function', {}).get('name', 'a tool')}]" for call in calls if isinstance(call, Mapping)]
    return "\n".join([*([said] if said else []), *named])
