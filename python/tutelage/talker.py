"""A model that answers conversations: what `tutelage chat` and `tutelage play` have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tutelage.data.chat import ChatTemplateError
from tutelage.data.chat_check import check_template, prompt_ids, stop_token_ids
from tutelage.data.tokenizer import Tokenizer
from tutelage.model import Model
from tutelage.rollouts import Generation, GenerationSettings, StreamedToken

Message = Mapping[str, str]


class Talker:
    """A model, its tokenizer and its chat template.

    system: what a system message in front of every conversation says. settings: of `GenerationSettings`; stop tokens are added.

    Raises ValueError, at once instead of after the first message, for a model that cannot chat (no tokenizer, no chat template,
    a template that refuses the system message) and for settings that the engine refuses.
    """

    def __init__(
        self, folder: str, system: str | None = None, device: str = "cpu", weights: Any = "float32", **settings: Any
    ) -> None:
        self.folder = folder
        self.model = Model.from_pretrained(folder, device=device, weights=weights)
        if self.model.tokenizer is None:
            raise ValueError(f"{folder} holds no tokenizer.json, so text cannot become tokens")
        self.tokenizer: Tokenizer = self.model.tokenizer
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{folder} has no chat template, so it was not taught to chat: complete texts with "
                f"`tutelage generate --model {folder} --prompt ...`, or put the template it was taught with into the "
                "folder as chat_template.jinja"
            )
        self.opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._taught = _can_be_taught(self.tokenizer)
        stops = tuple(dict.fromkeys([*self.model.eos_token_ids, *stop_token_ids(self.tokenizer)]))
        self._settings = {**settings, "stop_token_ids": stops}
        self.max_tokens: int = self.model.config.max_position_embeddings
        probe = self._ids([*self.opening, {"role": "user", "content": "Hello"}])
        if len(probe) >= self.max_tokens:
            raise ValueError(
                f"a conversation would begin with {len(probe)} tokens, but {folder} reads at most {self.max_tokens}; "
                "shorten --system"
            )
        self.answer(probe)

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        """As it is taught; a template that cannot be taught is used as transformers uses it, all in one piece."""
        if self._taught:
            return prompt_ids(self.tokenizer, messages)
        return self.tokenizer.chat_ids(messages, add_generation_prompt=True)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation to answer, the opening included in `messages`. Raises ValueError for one that is too long,
        or that the template refuses."""
        ids = self._ids(messages)
        if len(ids) >= self.max_tokens:
            raise ValueError(
                f"with this message the conversation has {len(ids)} tokens, but {self.folder} reads at most {self.max_tokens}, "
                "its answer included; the message was left out: send a shorter one, or begin anew"
            )
        return ids

    def answer(self, ids: Sequence[int], **settings: Any) -> Generation:
        """An answer, or several (samples_per_prompt), on its way. Raises ValueError as `Model.generate`."""
        return Generation(self.model, [ids], GenerationSettings(**self._settings, **settings))

    def stream(self, ids: Sequence[int], **settings: Any) -> Iterator[StreamedToken]:
        """The tokens of an answer as they come."""
        return self.model.generate_stream([ids], **self._settings, **settings)


def _can_be_taught(tokenizer: Tokenizer) -> bool:
    try:
        check_template(tokenizer)
    except ChatTemplateError:
        return False
    return True


class GrowingText:
    """A text whose tokens come one by one; the stop token is no part of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: StreamedToken) -> str:
        """What can be shown beyond what was shown before."""
        if token.finish_reason != "stop":
            self._tokens.append(token.token)
        # Behind the last whole character there may be bytes of one whose rest is still to come.
        text = self.text(whole=True)
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def text(self, whole: bool = False) -> str:
        """All of it; whole: without a last character that is not finished."""
        text = self._tokenizer.decode(self._tokens, errors="replace")
        return text.rstrip("\ufffd") if whole else text

    def rest(self, text: str) -> str:
        """What of the final text was not shown yet."""
        return text[self._shown :]
