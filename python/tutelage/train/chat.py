"""`tutelage chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from tutelage import files
from tutelage.data.chat import ChatTemplateError
from tutelage.data.chat_check import check_template, prompt_ids, stop_token_ids
from tutelage.data.tokenizer import Tokenizer
from tutelage.model import Model
from tutelage.rollouts import Generation, GenerationSettings
from tutelage.train.configs import ChatConfig

Message = dict[str, str]

_HELP = """/reset      forget the conversation and begin a new one
/save FILE  add the conversation to a .jsonl file, as a row {"messages": [...]}
/help       this
/quit       end; so does the end of input
//...       a message that begins with a slash"""

# Control characters in an answer could move the cursor or worse: they are shown as Unicode's pictures of them.
_SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def chat(config: ChatConfig) -> list[Message]:
    """Reads lines from standard input and answers each until /quit or the end of input; returns the conversation.

    Ctrl-C stops the answer being written, of which the conversation keeps what there is; at the prompt it comes through as
    KeyboardInterrupt. Raises ValueError, before the first prompt, for a model that cannot chat (no tokenizer, no chat
    template, a template that refuses the system message) and for settings that `Model.generate` refuses.
    """
    conversation = _Conversation(config)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):  # with it input() lets lines be edited; not every Python was built with it
            import readline  # noqa: F401

        conversation.note(f"{config.model}; /help lists the commands")
    try:
        while True:
            line = input("> " if on_terminal else "").strip()
            if line == "/quit":
                break
            if line:
                conversation.take(line)
    except EOFError:
        pass
    if on_terminal:
        conversation.console.out()
    return conversation.messages


def _can_be_taught(tokenizer: Tokenizer) -> bool:
    try:
        check_template(tokenizer)
    except ChatTemplateError:
        return False
    return True


class _Conversation:
    """The messages so far, and the model that answers."""

    def __init__(self, config: ChatConfig) -> None:
        self.config = config
        self.console = Console(highlight=False)
        self.model = Model.from_pretrained(config.model, device=config.device, weights=config.weights)
        if self.model.tokenizer is None:
            raise ValueError(f"{config.model} holds no tokenizer.json, so text cannot become tokens")
        self.tokenizer: Tokenizer = self.model.tokenizer
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{config.model} has no chat template, so it was not taught to chat: complete texts with "
                f"`tutelage generate --model {config.model} --prompt ...`, or put the template it was taught with into the "
                "folder as chat_template.jinja"
            )
        self.taught = _can_be_taught(self.tokenizer)
        self.opening = [] if config.system is None else [{"role": "system", "content": config.system}]
        self.messages = list(self.opening)
        self.stops = tuple(dict.fromkeys([*self.model.eos_token_ids, *stop_token_ids(self.tokenizer)]))
        self.answers = 0
        # What the template, the model or the engine refuses is told now, not after the user's first message.
        probe = self._ids([*self.opening, {"role": "user", "content": "Hello"}])
        limit = self.model.config.max_position_embeddings
        if len(probe) >= limit:
            raise ValueError(
                f"a conversation would begin with {len(probe)} tokens, but the model reads at most {limit}; shorten --system"
            )
        Generation(self.model, [probe], GenerationSettings(**self._settings()))

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "min_p": config.min_p,
            "seed": config.seed + self.answers,
            "stop_token_ids": self.stops,
        }

    def _ids(self, messages: list[Message]) -> list[int]:
        """As it is taught; a template that cannot be taught is used as transformers uses it, all in one piece."""
        if self.taught:
            return prompt_ids(self.tokenizer, messages)
        return self.tokenizer.chat_ids(messages, add_generation_prompt=True)

    def note(self, text: str) -> None:
        """Something that is no answer."""
        self.console.out(text, style="dim", highlight=False)

    def take(self, line: str) -> None:
        """A command, or a message to answer. What goes wrong is told and changes nothing."""
        try:
            if line.startswith("//"):
                self._answer(line[1:])
            elif line.startswith("/"):
                self._command(line)
            else:
                self._answer(line)
        except (ValueError, OSError) as error:
            self.note(str(error))

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name == "/help":
            self.note(_HELP)
        elif name == "/reset":
            self.messages = list(self.opening)
            self.note("a new conversation")
        elif name == "/save":
            self._save(argument.strip())
        else:
            raise ValueError(f"there is no command {name}; /help lists them, and a message may begin with //")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs a file, as in /save chats.jsonl")
        if len(self.messages) == len(self.opening):
            raise ValueError("there is nothing to save yet")
        path = Path(name)
        files.make_folder(path.parent)
        # A last line without an end would swallow the row.
        if path.exists() and not (b"\n" + path.read_bytes()).endswith(b"\n"):
            raise ValueError(f"{path} ends in the middle of a line; save to another file")
        files.append_json_line(path, {"messages": self.messages})
        files.sync_file(path)
        self.note(f"a row of {len(self.messages)} messages added to {path}")

    def _answer(self, line: str) -> None:
        asked = [*self.messages, {"role": "user", "content": line}]
        ids = self._ids(asked)
        limit = self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise ValueError(
                f"with this message the conversation has {len(ids)} tokens, but the model reads at most {limit}, its answer "
                "included; the message was left out: send a shorter one, or /reset to begin anew"
            )
        text, reason = self._stream(ids)
        self.answers += 1
        if reason == "interrupted" and not text:
            self.note("stopped before the answer began; the message was left out")
            return
        self.messages = [*asked, {"role": "assistant", "content": text}]
        if reason == "interrupted":
            self.note("stopped; the conversation keeps what there is")
        elif reason == "length":
            full = len(ids) + self.config.max_new_tokens > limit
            self.note(
                f"the context of {limit} tokens is full; /reset begins anew"
                if full
                else f"cut off after max_new_tokens = {self.config.max_new_tokens}"
            )

    def _stream(self, ids: list[int]) -> tuple[str, str]:
        """Writes an answer as it comes; (its text, why it ended)."""
        tokens: list[int] = []
        shown, reason = 0, "interrupted"
        try:
            for token in self.model.generate_stream([ids], **self._settings()):
                if token.finish_reason != "stop":
                    tokens.append(token.token)
                reason = token.finish_reason or reason
                # Behind the last whole character there may be bytes of one whose rest is still to come.
                whole = self.tokenizer.decode(tokens, errors="replace").rstrip("\ufffd")
                self._write(whole[shown:])
                shown = max(shown, len(whole))
        except KeyboardInterrupt:
            reason = "interrupted"
        text = self.tokenizer.decode(tokens, errors="replace")
        if reason == "interrupted":  # a character that was not finished is not part of what there is
            text = text.rstrip("\ufffd")
        self._write(text[shown:] + "\n")
        return text, reason

    def _write(self, text: str) -> None:
        if text:
            self.console.out(text.translate(_SHOWN), end="", highlight=False)
