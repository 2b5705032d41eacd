"""`tutelage chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from rich.console import Console

from tutelage import files
from tutelage.talker import GrowingText, Message, Talker
from tutelage.train.configs import ChatConfig

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


class _Conversation:
    """The messages so far, and the model that answers."""

    def __init__(self, config: ChatConfig) -> None:
        self.config = config
        self.console = Console(highlight=False)
        self.talker = Talker(
            config.model,
            config.system,
            config.device,
            config.weights,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
        )
        self.messages: list[Message] = list(self.talker.opening)
        self.answers = 0

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
            self.messages = list(self.talker.opening)
            self.note("a new conversation")
        elif name == "/save":
            self._save(argument.strip())
        else:
            raise ValueError(f"there is no command {name}; /help lists them, and a message may begin with //")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs a file, as in /save chats.jsonl")
        if len(self.messages) == len(self.talker.opening):
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
        ids = self.talker.prompt(asked)
        text, reason = self._stream(ids)
        self.answers += 1
        if reason == "interrupted" and not text:
            self.note("stopped before the answer began; the message was left out")
            return
        self.messages = [*asked, {"role": "assistant", "content": text}]
        if reason == "interrupted":
            self.note("stopped; the conversation keeps what there is")
        elif reason == "length":
            limit = self.talker.max_tokens
            full = len(ids) + self.config.max_new_tokens > limit
            self.note(
                f"the context of {limit} tokens is full; /reset begins anew"
                if full
                else f"cut off after max_new_tokens = {self.config.max_new_tokens}"
            )

    def _stream(self, ids: list[int]) -> tuple[str, str]:
        """Writes an answer as it comes; (its text, why it ended)."""
        growing, reason = GrowingText(self.talker.tokenizer), "interrupted"
        try:
            for token in self.talker.stream(ids, seed=self.config.seed + self.answers):
                reason = token.finish_reason or reason
                self._write(growing.add(token))
        except KeyboardInterrupt:
            reason = "interrupted"
        text = growing.text(whole=reason == "interrupted")  # a character that was not finished is not part of what there is
        self._write(growing.rest(text) + "\n")
        return text, reason

    def _write(self, text: str) -> None:
        if text:
            self.console.out(text.translate(_SHOWN), end="", highlight=False)
