"""The table at which one talks with one or two models: a message gets two answers, side by side, and which is better is kept.

With two models an answer is by each; with one, both are draws of it. They answer the same conversation, which goes on with one
of them, so that a judgement compares two answers to one prompt: what `reward` and `dpo` learn from. The page holds the
conversation; what is kept, in the file that the labelling page keeps as well, is each message that was answered (an item) and
each judgement (an event): `tutelage label export` makes rows of them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.feedback.desk import Conflict, take, take_back
from tutelage.feedback.state import State
from tutelage.feedback.store import Store
from tutelage.feedback.tasks import LETTERS, LONGEST_TEXT, AnswerError, blind_order, check_submission, check_text
from tutelage.rollouts import Generation
from tutelage.talker import GrowingText, Message, Talker

Json = dict[str, Any]

MOST_MESSAGES = 1000
"""Of a conversation."""
# Seconds in which a turn that nobody listens to any more has ended: that of one forward of a model.
_PATIENCE = 10.0


class Table:
    """Serves one session, at which one person sits, in as many tabs as there may be.

    talkers: one or two; the system message of both is the same. store: of the task compare. names: of the talkers, to show.
    labeller: whose judgements these are. reveal: whether a judged answer tells whose it was. seed: the nth answered message of
    the file draws with seed + n.
    """

    def __init__(
        self,
        store: Store,
        talkers: Sequence[Talker],
        names: Sequence[str],
        labeller: str,
        seed: int = 0,
        reveal: bool = True,
        title: str = "",
    ) -> None:
        self._store, self._talkers, self._names = store, tuple(talkers), tuple(names)
        self._labeller, self._seed, self._reveal, self._title = labeller, seed, reveal, title
        self._engaged = threading.Lock()  # the engine answers one message at a time

    def session(self, labeller: object = None) -> Json:
        """What the page needs to know once."""
        with self._store.locked() as state:
            return {
                "title": self._title,
                "models": list(dict.fromkeys(self._names)),
                "labeller": self._labeller,
                "system": [message["content"] for message in self._talkers[0].opening],  # none or one
                "blind": not self._reveal,
                "tally": self._tally(state),
            }

    def say(self, request: Mapping[str, Any]) -> Turn:
        """The answers to a conversation, {"messages", "conversation"}. Raises AnswerError."""
        messages = _check_messages(request.get("messages"))
        conversation = check_submission(request.get("conversation"))
        prompt = [*self._talkers[0].opening, *messages]
        try:
            ids = [talker.prompt(prompt) for talker in self._talkers]
        except ValueError as error:
            raise AnswerError(str(error)) from error
        return Turn(self, prompt, ids, conversation)

    def engage(self) -> None:
        """The engine is the caller's until `release`. Raises Conflict where it stays another's."""
        if not self._engaged.acquire(timeout=_PATIENCE):
            raise Conflict("the models are answering in another tab: wait for that, or stop it there")

    def release(self) -> None:
        self._engaged.release()

    def answers(self, ids: Sequence[Sequence[int]]) -> tuple[list[Generation], list[GrowingText], dict[int, str]]:
        """Two answers on their way, of one generation or of two; their texts, and the letters under which they are shown."""
        with self._store.locked() as state:
            number = len(state.items)
        seed = self._seed + number
        if len(self._talkers) == 1:
            running = [self._talkers[0].answer(ids[0], seed=seed, samples_per_prompt=2)]
        else:
            pairs = enumerate(zip(self._talkers, ids, strict=True))  # draws of their own, even if the models are the same
            running = [talker.answer(own, seed=seed, first_sample=place) for place, (talker, own) in pairs]
        order = blind_order(self._store.settings.seed, number, self._labeller, 2)
        texts = [GrowingText(talker.tokenizer) for talker in (self._talkers * 2)[:2]]
        return running, texts, {place: LETTERS[at] for at, place in enumerate(order)}

    def keep(self, prompt: Sequence[Message], texts: Sequence[str], reasons: Sequence[str], conversation: str) -> Json:
        """Keeps a message that was answered; what the page then knows of it."""
        answers = [({"role": "assistant", "content": text},) for text in texts]
        columns = {"models": list((self._names * 2)[:2]), "finish_reasons": list(reasons), "conversation": conversation}
        with self._store.locked() as state:
            number = self._store.add_item(tuple(prompt), answers, columns)
            order = blind_order(self._store.settings.seed, number, self._labeller, 2)
            self._store.add("shown", self._labeller, number, {"order": list(order)})
            shown = [
                {"id": LETTERS[at], "text": texts[place], "finish_reason": reasons[place]} for at, place in enumerate(order)
            ]
            return {"item": number, "answers": shown, "tally": self._tally(state)}

    def judge(self, request: Mapping[str, Any]) -> Json:
        """Keeps which answer is better; whose they were. Raises AnswerError and Conflict."""
        with self._store.locked() as state:
            take(self._store, state, self._labeller, request, "answer")
            return self._told(state, request["item"])

    def undo(self, request: Mapping[str, Any]) -> Json:
        """Takes the judgement of an item back, the last there was. Raises AnswerError and Conflict."""
        item = request.get("item")
        if isinstance(item, bool) or not isinstance(item, int):
            raise AnswerError("item must be the number of an item")
        with self._store.locked() as state:
            take_back(self._store, state, self._labeller, request.get("submission"), item)
            return {"tally": self._tally(state)}

    def _told(self, state: State, item: int) -> Json:
        order, models = state.order(self._labeller, item), state.items[item].columns["models"]
        assert order is not None  # it was judged
        names = {LETTERS[at]: models[place] for at, place in enumerate(order)} if self._reveal else {}
        return {"names": names, "tally": self._tally(state)}

    def _tally(self, state: State) -> Json:
        """How often which was better, of all judgements of these two models that stand."""
        found = tally(state, self._names)
        return found if self._reveal else {"judged": found["judged"]}


def tally(state: State, names: Sequence[str]) -> Json:
    """{"judged", "ties", "better": {name: count}} of all judgements of these models that stand; of one model's draws against
    each other only how many."""
    pair = sorted((tuple(names) * 2)[:2])
    events = [event for event in state.answers() if sorted(state.items[event.item].columns.get("models", ())) == pair]
    if pair[0] == pair[1]:
        return {"judged": len(events)}
    better = dict.fromkeys(names, 0)
    for event in events:
        choice = event.body["choice"]
        if isinstance(choice, int):
            better[state.items[event.item].columns["models"][choice]] += 1
    return {"judged": len(events), "ties": len(events) - sum(better.values()), "better": better}


class Turn:
    """Two answers to a message, as they come. Lines: {"id", "text"} more of an answer; {"id", "finish_reason"}; at the end
    {"item", "answers", "tally"}, when both are kept. What was not told to its end is not kept."""

    def __init__(self, table: Table, prompt: Sequence[Message], ids: Sequence[Sequence[int]], conversation: str) -> None:
        self._table, self._prompt, self._ids, self._conversation = table, prompt, ids, conversation
        self._engaged = self._ended = False
        self._running: list[tuple[int, Generation]] = []  # and the place of its first answer
        self._texts: list[GrowingText] = []
        self._letters: dict[int, str] = {}
        self._reasons = ["", ""]

    def step(self) -> list[Mapping[str, Any]] | None:
        """What one more step of the models tells; with the last it is all kept. Raises Conflict where another turn takes too
        long, and what the engine and the store raise."""
        if not self._engaged:
            self._table.engage()
            self._engaged = True
            running, self._texts, self._letters = self._table.answers(self._ids)
            self._running = list(enumerate(running))
        told: list[Mapping[str, Any]] = []
        while self._running and not told:
            for place, generation in list(self._running):
                told += self._advance(place, generation)
        if told or self._ended:
            return told or None
        self._ended = True
        texts = [growing.text() for growing in self._texts]
        return [self._table.keep(self._prompt, texts, self._reasons, self._conversation)]

    def _advance(self, place: int, generation: Generation) -> list[Mapping[str, Any]]:
        told: list[Mapping[str, Any]] = []
        if not generation.step():
            self._running.remove((place, generation))
            return told
        for token in generation.streamed():
            at = place + token.row  # of two models, or of two draws of one
            new = self._texts[at].add(token)
            if new:
                told.append({"id": self._letters[at], "text": new})
            if token.finish_reason is not None:
                self._reasons[at] = token.finish_reason
                told.append({"id": self._letters[at], "finish_reason": token.finish_reason})
        return told

    def close(self) -> None:
        """The end, or nobody listens any more."""
        if self._engaged:
            self._table.release()
            self._engaged = False


def _check_messages(given: object) -> list[Message]:
    """A conversation that waits for an answer. Raises AnswerError naming the message."""
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_MESSAGES or len(given) % 2 == 0:
        raise AnswerError(f"messages must be those of a user and the answers between them, up to {MOST_MESSAGES:,}")
    messages: list[Message] = []
    for number, message in enumerate(given):
        role = ("user", "assistant")[number % 2]
        if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] != role:
            raise AnswerError(f'message {number} must be {{"role": "{role}", "content": ...}}')
        messages.append({"role": role, "content": check_text(f"message {number}", message["content"], LONGEST_TEXT)})
    if not messages[-1]["content"].strip():
        raise AnswerError("the message is empty")
    return messages
