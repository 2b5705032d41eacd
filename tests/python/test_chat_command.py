"""`tutelage chat`: what is typed, what is answered, what is kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chats_for_tests import CHATML, TEMPLATES, turns, with_template
from tutelage import Model, ModelConfig, StreamedToken, Tokenizer
from tutelage.cli import main
from tutelage.data.chat_check import check_template, stop_token_ids
from tutelage.train.chat import chat
from tutelage.train.configs import ChatConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 96


def save_model(folder: Path, template: str | None, head: str = "lm", context: int = CONTEXT) -> Path:
    tokenizer = with_template(template)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=context,
    )
    model = Model(config, head=head)  # type: ignore[arg-type]
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), CHATML)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Makes the model answer with given tokens; None among them is Ctrl-C. Returns what it was asked."""

    def script(*answers: Sequence[int | None]) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def stream(self: Model, prompts: list[list[int]], **settings: Any) -> Iterator[StreamedToken]:
            asked.append({"prompt": prompts[0], **settings})
            for number in answers[len(asked) - 1]:
                if number is None:
                    raise KeyboardInterrupt
                yield StreamedToken(0, number, 0.0, "stop" if number in settings["stop_token_ids"] else None)

        monkeypatch.setattr(Model, "generate_stream", stream)
        return asked

    return script


def encoded(text: str) -> list[int]:
    tokenizer = with_template(CHATML)
    return [*tokenizer.encode(text), *stop_token_ids(tokenizer)]


def test_answers_are_those_of_generate_on_the_whole_conversation(
    folder: Path, typed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("hello", "", "  so it is ", "/quit", "not read")
    options = {"max_new_tokens": 6, "temperature": 0.7, "top_k": 200, "top_p": 0.99, "min_p": 0.001}
    messages = chat(ChatConfig(str(folder), system="be", seed=5, **options))  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    model = Model.from_pretrained(folder)
    assert model.tokenizer is not None
    expected: list[dict[str, str]] = [{"role": "system", "content": "be"}]
    for number, line in enumerate(("hello", "so it is")):
        expected.append({"role": "user", "content": line})
        prompt = model.tokenizer.chat_ids(expected, add_generation_prompt=True)
        answer = model.generate([prompt], stop_token_ids=[0, 3], seed=5 + number, **options)  # type: ignore[arg-type]
        assert answer.texts is not None
        expected.append({"role": "assistant", "content": answer.texts[0]})
    assert messages == expected
    assert printed.count("cut off after max_new_tokens = 6\n") == 2 and "> " not in printed


def test_history_reset_help_and_unknown_commands(
    folder: Path, typed: Callable[..., None], says: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = says(encoded("yes"), encoded("no"), encoded("so"))
    typed("one", "//two", "/reset", "three", "/help", "/rest")  # the end of the input ends
    assert chat(ChatConfig(str(folder), system="be")) == turns("three", "so", system="be")
    tokenizer = with_template(CHATML)
    conversations = (turns("one", system="be"), turns("one", "yes", "/two", system="be"), turns("three", system="be"))
    assert [question["prompt"] for question in asked] == [tokenizer.chat_ids(c, True) for c in conversations]
    printed = capsys.readouterr().out
    assert printed.startswith("yes\nno\na new conversation\nso\n/reset      forget")
    assert printed.endswith("there is no command /rest; /help lists them, and a message may begin with //\n")


def test_a_character_split_over_tokens_appears_whole(
    folder: Path, typed: Callable[..., None], says: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(CHATML)
    spelled = tokenizer.token_bytes()
    answer = [spelled.index(bytes([byte])) for byte in "a😀é\x1b[2J".encode()]
    says([*answer, *stop_token_ids(tokenizer)])
    typed("x")
    written: list[str] = []
    monkeypatch.setattr("tutelage.train.chat.Console.out", lambda self, text, **style: written.append(text))
    assert chat(ChatConfig(str(folder))) == turns("x", "a😀é\x1b[2J")
    assert written == ["a", "😀", "é", "␛", "[", "2", "J", "\n"]  # an escape sequence stays harmless


def test_bytes_that_are_no_text_appear_at_the_end_as_such(
    folder: Path, typed: Callable[..., None], says: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = with_template(CHATML)
    says([*tokenizer.encode("a"), tokenizer.token_bytes().index(b"\xf0"), *stop_token_ids(tokenizer)])
    typed("x")
    assert chat(ChatConfig(str(folder)))[-1]["content"] == "a\ufffd"
    assert capsys.readouterr().out == "a\ufffd\n"


def test_ctrl_c_keeps_what_there_is(
    folder: Path, typed: Callable[..., None], says: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    half = with_template(CHATML).token_bytes().index(b"\xf0")
    says([*encoded("yes")[:-1], half, None], [None], encoded("no"))
    typed("one", "two", "three")
    assert chat(ChatConfig(str(folder))) == turns("one", "yes", "three", "no")
    assert capsys.readouterr().out == (
        "yes\nstopped; the conversation keeps what there is\n\nstopped before the answer began; the message was left out\nno\n"
    )


def test_ctrl_c_at_the_prompt_quits(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(io.StringIO):
        def readline(self, *size: Any) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Stopped())
    assert main(["chat", "--model", str(folder)]) == 130
    assert capsys.readouterr().err.endswith("tutelage chat: interrupted\n")


def test_save_adds_rows_that_the_loaders_read(
    folder: Path, typed: Callable[..., None], says: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says(encoded("yés"), encoded("no"))
    file, open_ended = tmp_path / "new folder" / "chats.jsonl", tmp_path / "other.jsonl"
    open_ended.write_text('{"text"')
    typed("/save", f"/save {file}", "one", f"/save {file}", "two", f"/save {file}", f"/save {open_ended}", f"/save {tmp_path}")
    chat(ChatConfig(str(folder), system="be"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"messages": turns("one", "yés", system="be")}, {"messages": turns("one", "yés", "two", "no", system="be")}]
    from tutelage import load_sft

    assert len(load_sft(file, with_template(CHATML), 999)) == 2
    printed = capsys.readouterr().out
    for told in (
        "/save needs a file, as in /save chats.jsonl",
        "there is nothing to save yet",
        f"a row of 3 messages added to {file}",
        f"{open_ended} ends in the middle of a line; save to another file",
        f"Is a directory: '{tmp_path}'",
    ):
        assert told in printed
    assert open_ended.read_text() == '{"text"'


def test_a_conversation_that_outgrows_the_context(
    folder: Path, typed: Callable[..., None], says: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    says(encoded("yes"), encoded("no"))
    typed("one", "z" * 99, "two")
    assert chat(ChatConfig(str(folder))) == turns("one", "yes", "two", "no"), "what was said before is kept"
    tokens = len(with_template(CHATML).chat_ids(turns("one", "yes", "z" * 99), True))
    assert (
        f"with this message the conversation has {tokens} tokens, but {folder} reads at most {CONTEXT}, its answer "
        "included; the message was left out: send a shorter one, or begin anew\n"
    ) in capsys.readouterr().out


def test_an_answer_that_fills_the_context(folder: Path, typed: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = with_template(CHATML)
    line = next("z" * n for n in range(99) if len(tokenizer.chat_ids(turns("z" * n), True)) == CONTEXT - 1)
    typed(line)
    assert len(chat(ChatConfig(str(folder)))) == 2
    assert f"the context of {CONTEXT} tokens is full; /reset begins anew\n" in capsys.readouterr().out


def test_text_that_is_no_unicode_is_told(folder: Path, typed: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    typed("a\udcff")
    assert chat(ChatConfig(str(folder))) == []
    assert "has a lone surrogate at character " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "head", "options", "message"),
    [
        (None, "lm", [], "has no chat template, so it was not taught to chat: complete texts with `tutelage generate --model "),
        (TEMPLATES["mistral"], "lm", ["--system", "be"], "only user and assistant roles"),
        (CHATML, "scalar", [], "this model has a scalar head; load it with head='lm' to generate tokens"),
        (CHATML, "lm", ["--top_p", "2"], "top_p must lie in (0, 1], but it is 2.0"),
        (CHATML, "lm", ["--system", "z" * 99], f"reads at most {CONTEXT}; shorten --system"),
    ],
)
def test_what_cannot_chat_is_told_before_the_first_prompt(
    tmp_path: Path,
    typed: Callable[..., None],
    template: str | None,
    head: str,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed("one")
    assert main(["chat", "--model", str(save_model(tmp_path, template, head)), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err


def test_without_a_tokenizer_and_wrong_options(folder: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(folder)
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json, so text cannot become tokens"):
        chat(ChatConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, but it is 0"):
        ChatConfig(max_new_tokens=0)
    with pytest.raises(ValueError, match="seed must be at least 0, but it is -1"):
        ChatConfig(seed=-1)


@pytest.mark.parametrize("name", ["chatml", "chatml-marked", "qwen2", "llama3", "mistral"])
def test_the_stop_token_is_the_one_that_training_teaches(name: str) -> None:
    tokenizer = with_template(TEMPLATES[name])
    assert stop_token_ids(tokenizer) == (check_template(tokenizer).stop_token_id,)


def test_a_template_without_a_stop_token_can_be_used() -> None:
    tokenizer: Tokenizer = with_template("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    assert stop_token_ids(tokenizer) == ()
