"""The desk at which people judge: what the page asks for, and what it is told. JSON in, JSON out; no network.

Every request is answered in one breath with what it changes: nothing that the page was told is lost, and nothing that it sends
twice counts twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from tutelage.feedback.state import Event, Finished, State, Waiting
from tutelage.feedback.store import Store
from tutelage.feedback.tasks import (
    FLAGS,
    LETTERS,
    SKIP_REASONS,
    AnswerError,
    blind_order,
    check_answer,
    check_comment,
    check_labeller,
    check_reason,
    check_seconds,
    check_submission,
    shown_answer,
    shown_messages,
    shown_note,
    shown_text,
)

Json = dict[str, Any]

_REUSED = "this submission was used before, for something else"


class Conflict(ValueError):  # noqa: N818 (what it is on the wire)
    """A request that came too late or twice: somebody else, or another tab, was first."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.instead: Json = {}
        """What the page may go on with."""


def take(store: Store, state: State, labeller: str, request: Mapping[str, Any], kind: Literal["answer", "skip"]) -> None:
    """Keeps an answer or a skip, once for each submission. Raises AnswerError and Conflict."""
    submission = check_submission(request.get("submission"))
    item = request.get("item")
    if isinstance(item, bool) or not isinstance(item, int):
        raise AnswerError("item must be the number of an item")
    before = state.submissions.get(submission)
    if before is not None:
        if (before.labeller, before.item, before.kind) != (labeller, item, kind):
            raise Conflict(_REUSED)
        return
    order = state.order(labeller, item)
    if order is None:
        raise Conflict(f"item {item} was not given to {labeller}")
    standing = state.standing(labeller, item)
    if standing is not None:
        done = "answered" if standing.kind == "answer" else "skipped"
        raise Conflict(f"you have {done} this item already, perhaps in another tab; undo takes that back")
    if kind == "answer":
        body = check_answer(store.settings.task, order, request.get("answer"))
    else:
        body = {"reason": check_reason(request.get("reason"))}
    comment = check_comment(request.get("comment"))
    seconds = check_seconds(request.get("seconds", 0.0))
    store.add(kind, labeller, item, body, submission=submission, seconds=seconds, comment=comment)


def take_back(store: Store, state: State, labeller: str, submission: object, item: int | None = None) -> int | None:
    """Takes the labeller's last answer or skip back, once for each submission; its item, or None if that was done before.

    item: the only one that may be taken back; None: any. Raises AnswerError and Conflict.
    """
    submission = None if submission is None else check_submission(submission)
    before = None if submission is None else state.submissions.get(submission)
    if before is not None:
        if (before.labeller, before.kind) != (labeller, "undo"):
            raise Conflict(_REUSED)
        return None
    last = state.last(labeller)
    if last is None:
        raise Conflict("there is nothing to take back")
    if item is not None and last.item != item:
        raise Conflict("something else was judged since then, perhaps in another tab; only the last can be taken back")
    store.add("undo", labeller, last.item, {"event": last.id}, submission=submission)
    return last.item


def _no_problem() -> str | None:
    return None


class Desk:
    """Serves one session.

    problem: says why no more answers will come, if so. title, guidelines: to show; "" and None: as the session has them.
    """

    def __init__(
        self, store: Store, problem: Callable[[], str | None] = _no_problem, title: str = "", guidelines: str | None = None
    ) -> None:
        self._store = store
        self._problem = problem
        self._title = title or store.settings.title
        self._guidelines = store.settings.guidelines if guidelines is None else guidelines

    # ---- reading

    def session(self, labeller: object = None) -> Json:
        """What the page needs to know once. Raises AnswerError for a name that is none."""
        name = None if labeller in (None, "") else check_labeller(labeller)
        settings = self._store.settings
        with self._store.locked() as state:
            return {
                "task": settings.task,
                "k": settings.k,
                "title": self._title,
                "guidelines": self._guidelines,
                "labellers": state.labellers,
                "flags": _listed(FLAGS) if settings.task == "rate" else [],
                "skip_reasons": _listed(SKIP_REASONS),
                **self._standing(state, name),
            }

    def progress(self, labeller: object = None) -> Json:
        """How far it is. Raises AnswerError."""
        name = None if labeller in (None, "") else check_labeller(labeller)
        with self._store.locked() as state:
            return {**self._standing(state, name), "problem": self._problem()}

    def _standing(self, state: State, labeller: str | None) -> Json:
        return {
            "progress": dataclasses.asdict(state.progress(labeller)),
            "agreement": dataclasses.asdict(state.agreement()),
        }

    # ---- working

    def next(self, request: Mapping[str, Any]) -> Json:
        """The item for this labeller to judge. Raises AnswerError."""
        labeller = check_labeller(request.get("labeller"))
        with self._store.locked() as state:
            return self._next(state, labeller)

    def submit(self, request: Mapping[str, Any]) -> Json:
        """Keeps an answer; the next item. Raises AnswerError and Conflict."""
        with self._store.locked() as state:
            return self._take(state, request, "answer")

    def skip(self, request: Mapping[str, Any]) -> Json:
        """Keeps that an item was skipped, and why; the next item. Raises AnswerError and Conflict."""
        with self._store.locked() as state:
            return self._take(state, request, "skip")

    def undo(self, request: Mapping[str, Any]) -> Json:
        """Takes the labeller's last answer or skip back: its item, with what was said as the draft.

        With a submission it may be sent again as well: it takes back once. Raises AnswerError and Conflict.
        """
        labeller = check_labeller(request.get("labeller"))
        with self._store.locked() as state:
            try:
                item = take_back(self._store, state, labeller, request.get("submission"))
            except Conflict as conflict:
                if state.last(labeller) is not None:
                    conflict.instead = {"next": self._next(state, labeller)}
                raise
            return self._next(state, labeller) if item is None else {"item": self._shown(state, labeller, item)}

    def _take(self, state: State, request: Mapping[str, Any], kind: Any) -> Json:
        labeller = check_labeller(request.get("labeller"))
        try:
            take(self._store, state, labeller, request, kind)
        except Conflict as conflict:
            conflict.instead = {"next": self._next(state, labeller)}
            raise
        return self._next(state, labeller)

    def _next(self, state: State, labeller: str) -> Json:
        now = self._store.now()
        found = state.next_item(labeller, now)
        if isinstance(found, Waiting):
            return {"waiting": True, "problem": self._problem(), **self._standing(state, labeller)}
        if isinstance(found, Finished):
            return {"finished": True, **self._standing(state, labeller)}
        if state.open_item(labeller) != found:
            responses = state.items[found].responses
            assert responses is not None  # only items whose answers are there are in the queue
            order = state.order(labeller, found) or blind_order(self._store.settings.seed, found, labeller, len(responses))
            self._store.add("shown", labeller, found, {"order": order})
        return {"item": self._shown(state, labeller, found)}

    def _shown(self, state: State, labeller: str, number: int) -> Json:
        item, order = state.items[number], state.order(labeller, number)
        assert item.responses is not None and order is not None
        draft = state.draft(labeller, number)
        return {
            "id": number,
            "number": state.number(labeller),
            "prompt": shown_messages(item.prompt),
            "note": shown_note(item),
            "answers": [{"id": LETTERS[at], "text": shown_text(item.responses[place])} for at, place in enumerate(order)],
            "draft": self._draft(order, draft),
            "comment": "" if draft is None else draft.comment,
            **self._standing(state, labeller),
        }

    def _draft(self, order: tuple[int, ...], event: Event | None) -> Json | None:
        if event is None or event.kind != "answer":
            return None
        return shown_answer(self._store.settings.task, order, event.body)


def _listed(named: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"id": name, "label": label} for name, label in named.items()]
