"""What the events of a labelling session come to: who has said what, what comes next, how far it is. Pure: no disk.

An event is a fact that is never changed: an item was shown, answered, skipped, an answer was taken back. The state is a
function of the settings, the items and the events in their order, so a server that was killed makes the same state again.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tutelage.feedback.agreement import Agreement, AgreementCounter
from tutelage.feedback.tasks import Item, Task, shuffle_key

Order = Literal["given", "shuffled", "spread"]
Kind = Literal["shown", "answer", "skip", "undo"]

HOLD_SECONDS = 15 * 60.0
"""So long an item that was shown to one labeller is kept from the others: longer than a judgement takes, shorter than lunch."""


@dataclass(frozen=True)
class Settings:
    """What a session is; fixed when it begins, and stored with it."""

    task: Task
    k: int
    """Answers of an item (the most, where rows differ)."""
    order: Order = "given"
    overlap: int = 1
    """Labellers that each item should have."""
    seed: int = 0
    title: str = ""
    guidelines: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    id: int
    at: float
    """Seconds since 1970."""
    kind: Kind
    labeller: str
    item: int
    submission: str | None = None
    """Identity of a submission: the same one is never taken twice."""
    seconds: float = 0.0
    """How long the person looked at the item."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """shown: {"order"}; answer: what `check_answer` returns; skip: {"reason"}; undo: {"event"}."""
    comment: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a session is."""

    total: int
    """Items."""
    ready: int
    """Items whose answers are there."""
    done_by_me: int
    done: int
    """Items that have as many judgements as are wanted."""
    skipped_by_me: int
    seconds_median: float | None
    """Of this labeller's judgements."""


@dataclass
class _Labeller:
    """What one person has done."""

    current: dict[int, Event] = field(default_factory=dict)
    """Answers and skips that stand, by item, in the order in which they were given."""
    open: dict[int, float] = field(default_factory=dict)
    """Items on a screen, and since when; the last is the one to go on with."""
    orders: dict[int, tuple[int, ...]] = field(default_factory=dict)
    drafts: dict[int, Event] = field(default_factory=dict)
    """What was taken back, by item."""
    skipped: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of the answers, sorted."""


@dataclass(frozen=True)
class Waiting:
    """There is nothing to judge now, but there will be."""


@dataclass(frozen=True)
class Finished:
    """There is nothing left to judge for this labeller."""


class State:
    """The state of a session after the events that were applied to it.

    settings: of the session. Items are added with `add_item`, and again when their answers are there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.items: dict[int, Item] = {}
        self.submissions: dict[str, Event] = {}
        self._labellers: dict[str, _Labeller] = {}
        self._answers: dict[int, dict[str, Event]] = {}  # item → labeller → the answer that stands
        self._holders: dict[int, dict[str, float]] = {}  # item → labeller → since when it is on a screen
        self._queue: list[tuple[float, int]] = []  # items whose answers are there, in the order to show
        self._done = 0  # items with enough answers
        self._dealt: Counter[int] = Counter()  # item → its answers and skips that stand
        self._settled = 0  # items with enough of those
        self._agreement = AgreementCounter(settings.task)

    # ---- what happens

    def add_item(self, item: Item) -> None:
        """An item, or one whose answers (or their spread) are there now."""
        before = self.items.get(item.id)
        self.items[item.id] = item
        if self._is_ready(item) and not (before is not None and self._is_ready(before)):
            bisect.insort(self._queue, (self._key(item), item.id))

    def _is_ready(self, item: Item) -> bool:
        return item.responses is not None and (self.settings.order != "spread" or item.spread is not None)

    def _key(self, item: Item) -> float:
        if self.settings.order == "shuffled":
            return shuffle_key(self.settings.seed, item.id)
        if self.settings.order == "spread":
            assert item.spread is not None
            return -item.spread
        return item.id

    def apply(self, event: Event) -> None:
        """One more event."""
        labeller = self._labellers.setdefault(event.labeller, _Labeller())
        if event.submission is not None:
            self.submissions[event.submission] = event
        if event.kind == "shown":
            labeller.orders[event.item] = tuple(event.body["order"])
            self._open(labeller, event)
        elif event.kind == "undo":
            taken = labeller.current.pop(event.item)
            labeller.drafts[event.item] = taken
            self._take_back(labeller, taken)
            self._open(labeller, event)
        else:
            self._close(labeller, event)
            labeller.current[event.item] = event
            labeller.drafts.pop(event.item, None)
            self._deal(event.item, 1)
            if event.kind == "answer":
                bisect.insort(labeller.seconds, event.seconds)
                self._change(event.item, event.labeller, event)
            else:
                labeller.skipped += 1

    def _open(self, labeller: _Labeller, event: Event) -> None:
        labeller.open.pop(event.item, None)  # to the end
        labeller.open[event.item] = event.at
        self._holders.setdefault(event.item, {})[event.labeller] = event.at

    def _close(self, labeller: _Labeller, event: Event) -> None:
        labeller.open.pop(event.item, None)
        self._holders.get(event.item, {}).pop(event.labeller, None)

    def _deal(self, item: int, by: int) -> None:
        before = self._dealt[item] >= self.settings.overlap
        self._dealt[item] += by
        self._settled += (self._dealt[item] >= self.settings.overlap) - before

    def _take_back(self, labeller: _Labeller, event: Event) -> None:
        self._deal(event.item, -1)
        if event.kind == "answer":
            del labeller.seconds[bisect.bisect_left(labeller.seconds, event.seconds)]
            self._change(event.item, event.labeller, None)
        else:
            labeller.skipped -= 1

    def _change(self, item: int, labeller: str, answer: Event | None) -> None:
        """Puts a labeller's answer in, or takes it out."""
        answers = self._answers.setdefault(item, {})
        before, was_done = [event.body for event in answers.values()], len(answers) >= self.settings.overlap
        if answer is None:
            del answers[labeller]
        else:
            answers[labeller] = answer
        self._done += (len(answers) >= self.settings.overlap) - was_done
        self._agreement.replace(before, [event.body for event in answers.values()])

    # ---- what there is

    @property
    def labellers(self) -> list[str]:
        """Names so far, in the order in which they came."""
        return list(self._labellers)

    def answers(self) -> list[Event]:
        """Every answer that stands, in the order in which they were given."""
        return sorted((event for found in self._answers.values() for event in found.values()), key=lambda event: event.id)

    def standing(self, labeller: str, item: int) -> Event | None:
        """The answer or skip of this labeller about this item, if it stands."""
        known = self._labellers.get(labeller)
        return None if known is None else known.current.get(item)

    def last(self, labeller: str) -> Event | None:
        """What an undo would take back."""
        known = self._labellers.get(labeller)
        return None if known is None or not known.current else next(reversed(known.current.values()))

    def order(self, labeller: str, item: int) -> tuple[int, ...] | None:
        """The order in which this labeller was shown the item's answers, if ever."""
        known = self._labellers.get(labeller)
        return None if known is None else known.orders.get(item)

    def draft(self, labeller: str, item: int) -> Event | None:
        """What this labeller has taken back about the item and not said anew."""
        known = self._labellers.get(labeller)
        return None if known is None else known.drafts.get(item)

    def number(self, labeller: str) -> int:
        """Of the item on the screen, counted from 1, for this labeller."""
        known = self._labellers.get(labeller)
        return 1 if known is None else len(known.current) + 1

    def open_item(self, labeller: str) -> int | None:
        """The item that this labeller was shown last and has not dealt with."""
        known = self._labellers.get(labeller)
        return None if known is None or not known.open else next(reversed(known.open))

    def next_item(self, labeller: str, now: float) -> int | Waiting | Finished:
        """The item to show to this labeller next: the one on the screen, or the first that has not enough judgements."""
        held = self.open_item(labeller)
        if held is not None:
            return held
        known = self._labellers.get(labeller)
        mine: Mapping[int, Event] = {} if known is None else known.current
        wait = len(self._queue) < len(self.items)
        for _, number in self._queue:
            if number in mine:
                continue
            have = len(self._answers.get(number, ()))
            if have >= self.settings.overlap:
                continue
            holders = self._holders.get(number)
            if holders and have + sum(now - since < HOLD_SECONDS for since in holders.values()) >= self.settings.overlap:
                wait = True
                continue
            return number
        return Waiting() if wait else Finished()

    def progress(self, labeller: str | None) -> Progress:
        known = _Labeller() if labeller is None else self._labellers.get(labeller, _Labeller())
        seconds = known.seconds
        middle = (seconds[(len(seconds) - 1) // 2] + seconds[len(seconds) // 2]) / 2 if seconds else None
        return Progress(
            len(self.items), len(self._queue), len(known.current) - known.skipped, self._done, known.skipped, middle
        )

    def agreement(self) -> Agreement:
        return self._agreement.agreement()

    @property
    def is_complete(self) -> bool:
        """Whether every item was judged, or skipped, by as many people as are wanted."""
        return self._settled == len(self.items)


def shown_first(state: State) -> list[Item]:
    """All items, those first that are shown first as far as it is known before their answers are there."""
    shuffled = state.settings.order == "shuffled"
    return sorted(state.items.values(), key=lambda item: shuffle_key(state.settings.seed, item.id) if shuffled else item.id)
