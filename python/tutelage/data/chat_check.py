"""What can silently be wrong with a chat template, found before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.data.chat import ChatTemplateError
from tutelage.data.tokenizer import Tokenizer, covered

_PROBE = (
    {"role": "user", "content": "What is blue?"},
    {"role": "assistant", "content": "Skies are."},
    {"role": "user", "content": "And green?"},
    {"role": "assistant", "content": "Meadows in May."},
)


@dataclass(frozen=True)
class TurnFormat:
    """How a template writes a turn of the assistant."""

    stop_token_id: int
    """Ends the turn: what generation must stop at."""
    stop_token: str
    generation_prompt: str
    """What the template writes to ask for an answer; "" where nothing is needed."""


def check_template(tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, Any]]] = ()) -> TurnFormat:
    """Refuse a chat template that would teach something else than answering; say how it ends a turn.

    Two questions with answers of our own, and each of `conversations`, must show:

    * what is rendered for a question with the generation prompt is how the rendered answer begins;
    * there is a generation prompt where an answer has a header;
    * an answer ends with a special token, the stop token, and the mask of every turn holds it: else the model
      never learns to stop;
    * the mask begins where the generation prompt ends, and is not empty;
    * a longer conversation begins as the shorter one (the template is prefix-preserving): in one piece and turn by turn it
      is the same tokens.

    Raises ChatTemplateError with the rendered example; ⟦ and ⟧ stand around what the mask holds.
    """
    question, probe = tokenizer.render_chat(_PROBE[:1], True).text, tokenizer.render_chat(_PROBE[:2]).text
    silent = tokenizer.render_chat(_PROBE[:1], False).text
    _check_start(question, probe)
    content = _PROBE[1]["content"]
    header, found, ending = probe[len(question) :].partition(content)
    if not found:
        raise ChatTemplateError(f"the chat template leaves out the answer {content!r}. It rendered\n{probe}")
    if header.strip() and question == silent:
        raise ChatTemplateError(
            f"the chat template has no generation prompt: add_generation_prompt=True should make it end with {header!r}, "
            f"or the model is asked in another way than it was taught. It rendered\n{question}\nand with the answer\n{probe}"
        )
    stop = _first_special(tokenizer, ending)
    if stop is None:
        raise ChatTemplateError(
            f"the chat template ends an answer with {ending!r}, which holds no special token of the tokenizer, so the model "
            f"could not learn to stop: write eos_token behind what an assistant says. It rendered\n{probe}"
        )
    turn = TurnFormat(*stop, question.removeprefix(silent) if question.startswith(silent) else "")
    for conversation in (_PROBE[:2], _PROBE, *conversations):
        masked_conversation(tokenizer, turn, conversation)
    return turn


def stop_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token with which the template ends an answer, if it does; for templates that are only used, not taught.

    Raises ChatTemplateError without a template, or for one that cannot render a question and its answer.
    """
    content = _PROBE[1]["content"]
    stop = _first_special(tokenizer, tokenizer.render_chat(_PROBE[:2]).text.rpartition(content)[2])
    return () if stop is None else stop[:1]


def _first_special(tokenizer: Tokenizer, text: str) -> tuple[int, str] | None:
    """Id and spelling of the first special token in the text; of several at one place the longest."""
    special = tokenizer.special_tokens.items()
    found = [(text.index(token), -len(token), number, token) for number, token in special if token in text]
    return min(found)[2:] if found else None


def _check_start(shorter: str, longer: str) -> None:
    if not longer.startswith(shorter):
        raise ChatTemplateError(
            "the chat template's generation prompt is not how an answer begins. With the generation prompt it rendered\n"
            f"{shorter}\nbut with the answer\n{longer}"
        )


def masked_conversation(
    tokenizer: Tokenizer,
    turn: TurnFormat,
    conversation: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a conversation, checked as `check_template` says.

    The text is cut before every answer, as generation begins there: so no token reaches from the prompt into the
    answer, and the ids in front of the first answer are those of the prompt alone.
    """
    rendered = tokenizer.render_chat(conversation, False, tools, template_options, answers=True)
    places = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
    if len(rendered.answers) < max(len(places), 1):
        raise ChatTemplateError(
            f"the mask is empty or lacks an answer: the conversation has {len(places)}, the mask {len(rendered.answers)}; "
            f"{{% generation %}} and {{% endgeneration %}} must stand around each. It rendered\n{rendered.marked()}"
        )
    for number, place in enumerate(places):
        if place == 0:
            continue
        before = tokenizer.render_chat(conversation[:place], True, tools, template_options).text
        if number == len(places) - 1:
            _check_start(before, rendered.text)
        elif not rendered.text.startswith(before):
            raise ChatTemplateError(
                f"the chat template renders what stands before answer {number} in another way when more follows, so the "
                "conversation in one piece is not what it is turn by turn: give every answer a row of its own, as the last of "
                f"its conversation. It rendered\n{before}\nand\n{rendered.text}"
            )
        begin = rendered.answers[number][0] if len(rendered.answers) == len(places) else len(before)
        if begin != len(before):
            between = rendered.text[min(begin, len(before)) : max(begin, len(before))]
            raise ChatTemplateError(
                f"the mask is shifted: it begins {len(between)} characters too {'early' if begin < len(before) else 'late'} "
                f"({between!r}); put {{% generation %}} right behind the generation prompt. It rendered\n{rendered.marked()}"
            )
    ids, spans = tokenizer.encode_rendered(rendered, [begin for begin, _ in rendered.answers])
    mask = covered(spans, rendered.answers)
    for index, (begin, end) in enumerate(rendered.answers):
        inside = [number for number, place in zip(ids, spans, strict=True) if begin <= place[0] and place[1] <= end]
        if len(rendered.answers) == len(places) and inside[-1:] != [turn.stop_token_id]:
            raise ChatTemplateError(
                f"the stop token {turn.stop_token!r} of answer {index} is outside of the mask, so the model would not learn to "
                f"stop: put it inside of {{% generation %}}. It rendered\n{rendered.marked()}"
            )
    return ids, mask


def prompt_ids(
    tokenizer: Tokenizer,
    conversation: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids that ask for the next answer: with these `masked_conversation` of the longer conversation begins.

    So what was answered before is encoded as it was when it was asked for and learned, each answer from its own beginning.
    Raises ChatTemplateError as `Tokenizer.chat`.
    """
    rendered = tokenizer.render_chat(conversation, True, tools, template_options, answers=True)
    return tokenizer.encode_rendered(rendered, [begin for begin, _ in rendered.answers])[0]
