"""`tutelage data check`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chats_for_tests import CHATML, STOP_OUTSIDE, save_tokenizer, turns
from test_rows import GOOD
from tutelage.cli import main, parse
from tutelage.data.tokenizer import Tokenizer
from tutelage.train.configs import DataCheckConfig
from tutelage.train.data_check import data_check


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "model", CHATML)


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", GOOD)
def test_every_schema_is_shown(tmp_path: Path, model: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, row = GOOD[name]
    file = write(tmp_path / "rows.jsonl", row | {"id": 7}, row | {"id": 8})
    assert main(["data", "check", str(file), "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert (
        f"{file}: {kind.replace('_', ' ')} ({'conversational' if 'chat' in name or name == 'messages' else 'strings'})" in shown
    )
    assert "other fields: id" in shown and "2 rows, 2 examples; " in shown and "duplicate row: 1" in shown
    assert " tokens; half up to " in shown
    assert main(["data", "check", str(file)]) == 0  # without a tokenizer
    assert " characters; half up to " in capsys.readouterr().out


def test_what_is_learned_stands_in_brackets_where_there_is_no_colour(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", {"messages": turns("hi [b]", "yes", "so", "no")}, {"messages": turns("a", "b")})
    assert main(["data", "check", str(file), "--model", str(model), "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert (
        "<|im_start|>user\nhi [b]<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n<|im_start|>user\nso<|im_end|>\n"
        "<|im_start|>assistant\n⟦no<|im_end|>⟧\n"
    ) in shown
    assert f"── {file}, line 1\n" in shown and f"── {file}, line 2\n" not in shown
    ids = Tokenizer.from_pretrained(model).encode("yesnob")
    assert f" tokens, {len(ids) + 3} of them learned" in shown


def test_what_is_learned_is_green(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    script = f"from tutelage.cli import main; main(['data', 'check', {str(file)!r}, '--model', {str(model)!r}])"
    environment = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "\x1b[2ma\x1b[0m\x1b[1;32mb</s>\x1b[0m" in done.stdout and "⟦" not in done.stdout


def test_a_pair_shows_both_and_figures_are_written(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", {"prompt": "a", "chosen": "b", "rejected": "b"}, "{")
    target = tmp_path / "figures.json"
    options = ["--on_bad_row", "skip:1", "--json", str(target)]
    assert main(["data", "check", "--data", str(file), "--model", str(model), *options]) == 0
    shown = capsys.readouterr().out
    assert "line 1, 1 of 2\n" in shown and "line 1, 2 of 2\n" in shown and shown.count("a⟦b</s>⟧") == 2
    assert "chosen equals rejected: " in shown and f"bad row: {file}, line 2: no valid JSON" in shown
    figures = json.loads(target.read_text())
    assert figures["findings"] == {"bad row": 1, "chosen equals rejected": 1}
    assert (figures["command"], figures["rows"], figures["examples"], figures["longest"]) == ("data check", 2, 1, 3)
    assert len(figures["fingerprint"]) == 64


@pytest.mark.parametrize(
    ("rows", "template", "options", "message"),
    [
        (["{"], CHATML, [], "rows.jsonl, line 1: no valid JSON"),
        ([{"other": 1}], CHATML, [], "line 1: the row's fields (other) fit no schema"),
        ([{"text": "abc"}], CHATML, ["--max_length", "2"], "line 1: the row has 4 tokens, more than max_length = 2"),
        ([{"prompt": "abc"}], CHATML, ["--max_length", "2", "--on_long", "truncate"], "line 1: the prompt has 3 tokens"),
        ([{"messages": turns("a", "b")}], STOP_OUTSIDE, [], "the stop token '<|im_end|>' of answer 0 is outside of the mask"),
        ([{"messages": turns("a", "b")}], None, [], "this tokenizer has no chat template"),
        ([{"text": "a"}], CHATML, ["--on_bad_row", "ignore"], "on_bad_row is 'ignore': it must be"),
    ],
)
def test_what_is_wrong_is_told_and_the_status_is_2(
    tmp_path: Path,
    rows: list[object],
    template: str | None,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save_tokenizer(tmp_path / "model", template)
    file = write(tmp_path / "rows.jsonl", *rows)
    assert main(["data", "check", str(file), "--model", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tutelage data check: ") and message in error


def test_other_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check"]) == 2
    assert "there is nothing to check; pass a file, as in `tutelage data check rows.jsonl`" in capsys.readouterr().err
    assert main(["data", "check", "no.jsonl"]) == 2
    assert "no.jsonl does not exist" in capsys.readouterr().err
    write(tmp_path / "a.jsonl", {"text": "a"})
    write(tmp_path / "b.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert main(["data", "check", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    with pytest.raises(ValueError, match="show must be at least 0, but it is -1"):
        DataCheckConfig(show=-1)
    assert "the files are of different schemas, check them apart: " in error and "b.jsonl is preference (strings)" in error


def test_files_stand_in_front_or_behind_a_name_or_in_yaml(tmp_path: Path) -> None:
    expected = DataCheckConfig(data=("a", "b"), show=1)
    (tmp_path / "c.yaml").write_text("data: [a, b]\nshow: 1\n")
    for arguments in (["a", "b", "--show", "1"], ["--show", "1", "--data", "a", "b"], ["--config", str(tmp_path / "c.yaml")]):
        assert parse("data check", arguments) == expected


def test_the_options_reach_the_loaders(tmp_path: Path, model: Path) -> None:
    conversation = write(tmp_path / "a.jsonl", {"messages": turns("a", "b")})
    pair = write(tmp_path / "b.jsonl", {"prompt": "ab", "completion": "c"})
    masks = []
    for file, options in (
        (conversation, {}),
        (conversation, {"assistant_only_loss": False}),
        (pair, {}),
        (pair, {"completion_only_loss": False}),
    ):
        result = data_check(DataCheckConfig(data=(str(file),), model=str(model), **options))
        assert result.examples is not None
        masks.append(int(result.examples.examples[0].mask.sum()))
    assert masks[0] < masks[1] and masks[2] < masks[3]
    long = write(tmp_path / "c.jsonl", {"prompt": "a" * 30, "completion": "b"}, {"prompt": "a", "completion": "b"})
    dropped = data_check(DataCheckConfig(data=(str(long),), model=str(model), max_length=9, on_long="drop"))
    assert dropped.report.counts == {"too long, dropped": 1}


def test_a_template_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = save_tokenizer(tmp_path / "plain", None)
    rows = write(tmp_path / "rows.jsonl", {"messages": turns("hello", "there")})
    assert main(["data", "check", str(rows), "--model", str(plain)]) == 2
    assert "no chat template" in capsys.readouterr().err
    template = tmp_path / "own.jinja"
    template.write_text(CHATML)
    assert main(["data", "check", str(rows), "--model", str(plain), "--chat_template_path", str(template)]) == 0
    assert "there<|im_end|>" in capsys.readouterr().out
    template.write_text("{% for %}")
    assert main(["data", "check", str(rows), "--model", str(plain), "--chat_template_path", str(template)]) == 2
    assert f"{template}: chat_template.jinja" in capsys.readouterr().err
    with pytest.raises(ValueError, match="chat_template_path writes messages for a tokenizer: give its folder as --model"):
        DataCheckConfig(data=(str(rows),), chat_template_path=str(template))
