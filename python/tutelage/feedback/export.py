"""Judgements as rows to learn from: the schemas that `reward`, `dpo`, `ppo` and `sft` read, with no conversion between.

    ranking              {"prompt", "responses", "ranking"}    of rank; of rate, by score; of compare, of two
    preference           {"prompt", "chosen", "rejected"}      every two answers of which one was judged better
    preference_implicit  {"chosen", "rejected"}                the same, each with the prompt in front (TRL's implicit prompt)
    unpaired             {"prompt", "completion", "label"}     see below
    demonstrations       {"prompt", "completion"}              of write
    ratings              {"prompt", "response", "score", "flags"}    of rate

Every judgement that stands gives rows of its own, with the fields labeller, item, comment (where there is one) and those that
the prompt's row had; rows of one prompt have equal prompts, so loops that hold rows out hold all of them out together.

unpaired: of a ranking the first group is desirable and the last is not, what stands between is left out; of a choice the better
answer is and the worse is not, of "both bad" neither is; of scores 5 to 7 are and 1 to 3 are not. What ties everything says
nothing of what is better, and is left out; how much was left out is told.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tutelage.data.rows import Text
from tutelage.feedback.state import Event, State
from tutelage.feedback.tasks import Item, Task

Form = Literal["ranking", "preference", "preference_implicit", "unpaired", "demonstrations", "ratings"]
Row = dict[str, Any]

#: What each form can be made of.
TASKS: Mapping[Form, tuple[Task, ...]] = {
    "ranking": ("rank", "compare", "rate"),
    "preference": ("rank", "compare", "rate"),
    "preference_implicit": ("rank", "compare", "rate"),
    "unpaired": ("rank", "compare", "rate"),
    "demonstrations": ("write",),
    "ratings": ("rate",),
}

# Fields that mean something in a schema: of the row that an item came from they are not passed on.
_TAKEN = frozenset(
    (
        "prompt",
        "responses",
        "ranking",
        "chosen",
        "rejected",
        "completion",
        "label",
        "margin",
        "text",
        "messages",
        "response",
        "score",
        "flags",
        "labeller",
        "item",
        "comment",
    )
)

TIED, EQUAL, MIDDLE = "everything was tied", "the two answers are the same text", "neither good nor bad"


@dataclass(frozen=True)
class Exported:
    """Rows, and what gave none."""

    rows: list[Row]
    judgements: int
    left_out: Mapping[str, int]
    """How many judgements, pairs or answers, by reason."""


def export_rows(state: State, form: Form, labellers: Sequence[str] = ()) -> Exported:
    """The rows of all judgements that stand, in the order in which they were given.

    labellers: only of these people; none: of all. Raises ValueError for a form that the task does not give, an unknown
    labeller, and where there is no row.
    """
    task = state.settings.task
    if task not in TASKS[form]:
        possible = [name for name in get_args(Form) if task in TASKS[name]]
        raise ValueError(
            f"these are judgements of the task {task}, which give no {form}: export them to {' or '.join(possible)}"
        )
    for name in labellers:
        if name not in state.labellers:
            raise ValueError(f"there is no labeller {name!r}; there are {', '.join(state.labellers) or 'none yet'}")
    events = [event for event in state.answers() if not labellers or event.labeller in labellers]
    left_out: Counter[str] = Counter()
    rows = [
        {**row, **_about(event, state.items[event.item])}
        for event in events
        for row in _rows(form, task, state.items[event.item], event, left_out)
    ]
    if not rows:
        why = "; ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "nothing was judged yet"
        raise ValueError(f"there is no row to write ({why})")
    return Exported(rows, len(events), left_out)


def _about(event: Event, item: Item) -> Row:
    about: Row = {"labeller": event.labeller, "item": event.item}
    if event.comment:
        about["comment"] = event.comment
    return {**about, **{name: value for name, value in item.columns.items() if name not in _TAKEN}}


def _rows(form: Form, task: Task, item: Item, event: Event, left_out: Counter[str]) -> Iterator[Row]:
    prompt, responses = _plain(item.prompt), [_plain(response) for response in item.responses or ()]
    if form == "demonstrations":
        yield {"prompt": prompt, "completion": _completion(item.prompt, event.body["text"])}
    elif form == "ratings":
        for response, rating in zip(responses, event.body["ratings"], strict=True):
            yield {"prompt": prompt, "response": response, **rating}
    elif form == "unpaired":
        for place, label in _labels(task, event.body, left_out):
            yield {"prompt": prompt, "completion": responses[place], "label": label}
    else:
        ranking = groups(task, event.body)
        if len(ranking) < 2:
            left_out[TIED] += 1
        elif form == "ranking":
            yield {"prompt": prompt, "responses": responses, "ranking": ranking}
        else:
            for better, worse in _pairs(ranking):
                chosen, rejected = responses[better], responses[worse]
                if chosen == rejected:
                    left_out[EQUAL] += 1
                elif form == "preference":
                    yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                else:
                    yield {"chosen": prompt + chosen, "rejected": prompt + rejected}


def groups(task: Task, body: Mapping[str, Any]) -> list[list[int]]:
    """A judgement as groups of places, best first, those of a group tied; one group, or none, where nothing was preferred."""
    if task == "rank":
        return [list(group) for group in body["ranking"]]
    if task == "compare":
        choice = body["choice"]
        return [[choice], [1 - choice]] if isinstance(choice, int) else []
    scores = [rating["score"] for rating in body["ratings"]]
    return [[place for place, found in enumerate(scores) if found == score] for score in sorted(set(scores), reverse=True)]


def _pairs(ranking: Iterable[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """(better, worse) for every two places that are not tied."""
    for better, worse in itertools.combinations(ranking, 2):
        yield from itertools.product(better, worse)


def _labels(task: Task, body: Mapping[str, Any], left_out: Counter[str]) -> Iterator[tuple[int, bool]]:
    if task == "rate":
        for place, rating in enumerate(body["ratings"]):
            if rating["score"] == 4:
                left_out[MIDDLE] += 1
            else:
                yield place, rating["score"] > 4
    elif task == "compare" and body["choice"] == "both_bad":
        yield from ((0, False), (1, False))
    else:
        ranking = groups(task, body)
        if len(ranking) < 2:
            left_out[TIED] += 1
            return
        left_out[MIDDLE] += sum(map(len, ranking[1:-1]))
        yield from ((place, True) for place in ranking[0])
        yield from ((place, False) for place in ranking[-1])


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [dict(message) for message in text]


def _completion(prompt: Text, text: str) -> Any:
    """What a person wrote, as a completion: of a string it begins with the blank that goes before it."""
    if not isinstance(prompt, str):
        return [{"role": "assistant", "content": text.strip()}]
    text = text.rstrip()
    return text if text[0].isspace() or not prompt or prompt[-1].isspace() else f" {text}"
