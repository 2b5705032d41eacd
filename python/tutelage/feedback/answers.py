"""Answers of the engine, generated in the background while people judge those that are there.

What an answer is depends on the weights, its prompt, the settings and the seed alone: not on when it was generated, nor on
what else was in the batch. So a session that was stopped goes on with the answers that it would have had. The engine releases
the interpreter while it computes, so the page is served meanwhile.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.data.examples import ExampleSet, Prompt, load_prompts
from tutelage.data.rows import Text
from tutelage.data.tokenizer import Tokenizer
from tutelage.feedback.state import shown_first
from tutelage.feedback.store import Store
from tutelage.feedback.tasks import Item
from tutelage.model import Model
from tutelage.rollouts import Generation, GenerationSettings

# Prompts that are answered at a time. The first person waits for the first; then enough that arithmetic is the limit.
_FIRST, _MOST = 1, 16

Spreads = Callable[[Sequence[Item]], Mapping[int, float]]


@dataclass(frozen=True)
class AnswerSettings:
    """How a model answers."""

    k: int
    """Answers to each prompt."""
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class Answerer:
    """A model that answers items. Raises ValueError for one that cannot (no tokenizer, a reward model)."""

    def __init__(self, model: Model, settings: AnswerSettings) -> None:
        if model.head != "lm":
            raise ValueError("this is a reward model, and answers come from a language model")
        if model.tokenizer is None:
            raise ValueError("this model has no tokenizer.json, so text cannot become tokens")
        self._model, self._settings = model, settings
        self._tokenizer: Tokenizer = model.tokenizer

    def read(self, data: Any, on_bad_row: str = "error") -> ExampleSet[Prompt]:
        """The prompts of rows as the model reads them. Raises as `load_prompts`, naming file and line."""
        longest = self._model.config.max_position_embeddings
        return load_prompts(data, self._tokenizer, longest, on_bad_row, answer=1)

    def answers(
        self, items: Sequence[Item], seeds: Mapping[int, int], stop: Callable[[], bool]
    ) -> Iterator[tuple[int, list[Text]]]:
        """(item, its answers), each as soon as its last one is there; ends early where `stop()` says so.

        seeds: of each item. Raises ValueError and RuntimeError as `Model.generate`.
        """
        settings, k = self._settings, self._settings.k
        read = self.read([prompt_row(item) for item in items])
        stops = [*self._model.eos_token_ids, *([] if read.turn is None else [read.turn.stop_token_id])]
        wanted = GenerationSettings(
            settings.max_new_tokens,
            k,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.min_p,
            stop_token_ids=stops,
            seed=[seeds[item.id] for item in items],
        )
        generation = Generation(self._model, [prompt.tokens.tolist() for prompt in read.examples], wanted)
        missing = dict.fromkeys(range(len(items)), k)
        while not stop() and generation.step():
            ended = [token.row // k for token in generation.streamed() if token.finish_reason is not None]
            for number in ended:
                missing[number] -= 1
            finished = [number for number in dict.fromkeys(ended) if not missing[number]]
            if finished:
                texts = generation.rollouts().texts
                assert texts is not None  # there is a tokenizer
                for number in finished:
                    yield items[number].id, [_answer(items[number], text) for text in texts[number * k : (number + 1) * k]]


def prompt_row(item: Item) -> dict[str, Any]:
    """The row that an item's prompt came from."""
    return {**item.columns, "prompt": item.prompt if isinstance(item.prompt, str) else list(item.prompt)}


def _answer(item: Item, text: str) -> Text:
    return text if isinstance(item.prompt, str) else ({"role": "assistant", "content": text},)


class Background(threading.Thread):
    """Gives every item of a store its answers, and its spread where the order asks for it, in the order in which they will be
    shown. `close()` ends it between two tokens; what it has finished is stored.

    answerer: None where all answers are given. spreads: highest less lowest reward, by item. told: called with what went
    wrong, once, after which no more answers come.
    """

    def __init__(
        self,
        store: Store,
        seed: int,
        answerer: Answerer | None,
        spreads: Spreads | None,
        told: Callable[[str], None] = lambda problem: None,
    ) -> None:
        super().__init__(name="answers", daemon=True)
        self._store, self._answerer, self._spreads, self._told = store, answerer, spreads, told
        self._seeds = _seeds(store, seed)
        self._stopped = threading.Event()
        self.problem: str | None = None

    def close(self) -> None:
        self._stopped.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # told to the person who waits, whatever it is
            self.problem = f"no more answers come: {error}"
            self._told(self.problem)

    def _work(self) -> None:
        with self._store.locked() as state:
            order = shown_first(state)
            todo = [item.id for item in order if item.responses is None or (self._spreads is not None and item.spread is None)]
        size, start = _FIRST, 0
        while start < len(todo) and not self._stopped.is_set():
            chunk, start, size = todo[start : start + size], start + size, min(4 * size, _MOST)
            self._answer(chunk)
            self._score(chunk)

    def _items(self, numbers: Sequence[int]) -> list[Item]:
        with self._store.locked() as state:
            return [state.items[number] for number in numbers]

    def _answer(self, numbers: Sequence[int]) -> None:
        silent = [item for item in self._items(numbers) if item.responses is None]
        if silent and self._answerer is not None:
            for number, responses in self._answerer.answers(silent, self._seeds, self._stopped.is_set):
                self._store.add_answers(number, responses)

    def _score(self, numbers: Sequence[int]) -> None:
        unscored = [item for item in self._items(numbers) if item.responses is not None and item.spread is None]
        if unscored and self._spreads is not None and not self._stopped.is_set():
            self._store.add_spreads(self._spreads(unscored))


def _seeds(store: Store, seed: int) -> dict[int, int]:
    """The nth item of one prompt draws with seed + n: equal prompts get answers of their own, whatever else is generated."""
    seen: Counter[str] = Counter()
    seeds = {}
    with store.locked() as state:
        for number, item in state.items.items():
            row = repr(prompt_row(item))
            seeds[number] = seed + seen[row]
            seen[row] += 1
    return seeds
