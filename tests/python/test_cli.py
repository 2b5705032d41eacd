"""The command line: quick help, YAML, errors in one sentence, the doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tutelage import Model, ModelConfig, Tokenizer, __version__, _core, train_tokenizer
from tutelage.cli import COMMANDS, main, parse
from tutelage.doctor import DoctorConfig, doctor, level_finding, openmp_finding
from tutelage.rollouts import Generation, Interrupted
from tutelage.train.configs import PretrainConfig


def python(script: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout


# --- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], *([*c.split(), "--help"] for c in COMMANDS)])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    printed = python(
        f"""
import sys
from tutelage.cli import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert stop.code == 0
heavy = {{"torch", "numpy", "transformers", "tokenizers", "matplotlib"}} & set(sys.modules)
print("heavy:", sorted(heavy))
"""
    )
    assert printed.endswith("heavy: []\n"), printed[-200:]
    assert len(printed) > 12


def test_the_module_runs_and_lists_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tutelage", "--help"], capture_output=True, text=True, check=True)
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


# --- options and YAML ---------------------------------------------------------------------------------------


def test_underscores_and_hyphens_are_the_same() -> None:
    for flag in ("--learning_rate", "--learning-rate"):
        assert parse("pretrain", [flag, "0.5"]).learning_rate == 0.5


def test_yaml_gives_options_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "format_version: 1\nlearning-rate: 3e-3\nmax_steps: 7\nplot: false\nresume: null\n"
        "data: [a.txt, 'b.txt:2']\nlr_scheduler_type: wsd\n"
    )
    for arguments in (["--config", str(file), "--max_steps", "9"], ["--max_steps", "9", f"--config={file}"]):
        assert parse("pretrain", arguments) == PretrainConfig(
            learning_rate=3e-3,
            max_steps=9,
            plot=False,
            data=("a.txt", "b.txt:2"),
            lr_scheduler_type="wsd",
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("leraning_rate: 1", "there is no option 'leraning_rate'; did you mean learning_rate?"),
        ("zzz: 1", "there is no option 'zzz'\n"),
        ("- a", "must hold options, one `name: value` a line"),
        ("a: [", "is no YAML: "),
        ("data: {a: 1}", "data must be a value or a list of values"),
        ("format_version: 99", "has format_version 99, but this tutelage reads up to 1"),
    ],
)
def test_a_bad_yaml_file_is_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert main(["pretrain", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(file) in error
    assert len(error.splitlines()) == 1


def test_a_value_of_the_wrong_type_is_refused_from_yaml_as_from_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: many")
    for arguments in (["--config", str(file)], ["--max_steps", "many"]):
        with pytest.raises(SystemExit, match="2"):
            main(["pretrain", *arguments])
        error = capsys.readouterr().err
        assert "--max_steps" in error and "many" in error


def test_the_model_may_stand_in_front() -> None:
    for command in ("chat", "generate"):
        assert parse(command, ["folder/", "--seed", "3"]) == parse(command, ["--seed", "3", "--model", "folder/"])
    assert parse("eval", ["kl", "--model", "m", "--against", "n"]).measure == "kl"


def test_an_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["pretrain", "--lerning_rate", "1"])
    assert "--learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "--help"]])
def test_a_group_of_commands_shows_its_own(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "bench kernels" in shown and "bench train" in shown and "pretrain" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretran"], "unknown command 'pretran'; did you mean 'pretrain'?"),
        (["bench", "xyz"], "unknown command 'bench'; there are bench kernels, bench train"),
        (["xyz"], "unknown command 'xyz'; there are school, tokenizer, pretrain"),
        (["pretrain", "--config"], "--config needs a file"),
        (["pretrain", "--config", "/no/such.yaml"], "No such file or directory: '/no/such.yaml'"),
    ],
)
def test_what_cannot_be_understood_is_told_in_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


# --- errors of a command ------------------------------------------------------------------------------------


@pytest.fixture
def bad_rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"txt": "bad"}\n')
    return path


def test_a_bad_row_is_told_in_one_sentence(bad_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", "--data", str(bad_rows), "--output_dir", str(run)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"tutelage pretrain: {bad_rows}, line 2: no field 'text' (it has: txt): "
        "correct it, or leave such rows out with on_bad_row='skip:<max>'\n"
    )
    # Nothing is left behind that the next attempt would have to overwrite.
    assert main(["pretrain", "--data", str(tmp_path / "none.txt"), "--output_dir", str(run)]) == 2
    assert "none.txt does not exist" in capsys.readouterr().err


def test_the_traceback_is_shown_when_asked_for(bad_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="line 2: no field 'text'"):
        main(["tokenizer", "--data", str(bad_rows), "--output_dir", str(tmp_path / "tokenizer")])


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: DoctorConfig) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("tutelage.doctor.doctor", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["doctor"])


# --- tokenizer ----------------------------------------------------------------------------------------------


def test_tokenizer_trains_saves_and_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 20)
    folder, figures = tmp_path / "tokenizer", tmp_path / "figures.json"
    arguments = ["tokenizer", "--data", str(text), "--output_dir", str(folder), "--vocab_size", "270"]
    assert main([*arguments, "--json", str(figures)]) == 0
    trained = Tokenizer.from_pretrained(folder)
    assert trained.decode(trained.encode("the cat")) == "the cat"
    assert json.loads(figures.read_text())["vocab_size"] == trained.vocab_size
    assert "bytes per token" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "is not empty: pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


# --- doctor -------------------------------------------------------------------------------------------------


def test_the_doctor_names_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "doctor.json"
    findings = {finding.subject: finding for finding in doctor(DoctorConfig(json=str(figures)))}
    printed = capsys.readouterr().out
    assert all(finding.text in printed for finding in findings.values())
    assert __version__ in findings["tutelage"].text
    assert findings["device, cuda-sim"].text == "works: an emulator of the GPU's kernels, for tests"
    assert findings["device, cuda"].text.startswith(("works: ", "does not work here: "))
    for name, supported in _core.levels():
        assert (findings[f"kernels, {name}"].text == "not on this CPU") != supported
    assert "in use" in findings[f"kernels, {_core.active_level()}"].text
    assert len(json.loads(figures.read_text())["findings"]) == len(findings)


def test_the_doctor_tells_tested_from_self_checked() -> None:
    assert level_finding("avx512", False, "", False).text == "not on this CPU"
    assert level_finding("avx512", True, "", True).text == "self-checked at load, in use"
    assert level_finding("avx2", True, "", False).text == "tested"
    wrong = level_finding("avx2", True, "matmul", False)
    assert wrong.problem and "matmul differs from the scalar level" in wrong.text


def test_the_doctor_counts_openmp_runtimes() -> None:
    torch_own, other = "/site/torch/lib/libgomp.so.1", "/usr/lib/libiomp5.so"
    assert not openmp_finding([torch_own, "/usr/lib/libc.so.6"]).problem
    both = openmp_finding([torch_own, other, "/usr/lib/libompt-not-openmp.txt"])
    assert both.problem and "2 runtimes in one process" in both.text and other in both.text
    assert openmp_finding([]).text == "none loaded"


def test_the_doctor_comes_without_torch() -> None:
    """Torch is there but cannot be imported, the way it usually fails."""
    printed = python(
        """
import builtins
real = builtins.__import__
def broken(name, *others, **options):
    if name == "torch" or name.startswith("torch."):
        raise ImportError("libtorch.so: cannot open shared object file")
    return real(name, *others, **options)
builtins.__import__ = broken
from tutelage.cli import main
assert main(["doctor"]) == 0
"""
    )
    assert "! torch" in printed and "cannot be imported: libtorch.so" in printed


# --- generate -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and its tokenizer."""
    tokenizer = train_tokenizer(["one two three [four] five " * 4], 280)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = Model(config)
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("speaker")
    model.save_pretrained(folder)
    return folder


def test_generate_prints_and_writes(speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "two"}\n\n{"prompt": "[three]", "other": 1}\n')
    common = ["generate", "--model", str(speaker), "--max_new_tokens", "9", "--prompts_file", str(tmp_path / "prompts.jsonl")]
    assert main([*common, "--prompt", "one"]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("one", "two", "[three]", "3 rows, ")) and "tokens/s" in printed
    output, figures = tmp_path / "out.jsonl", tmp_path / "figures.json"
    assert main([*common, "--output", str(output), "--samples_per_prompt", "2", "--json", str(figures)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["two", "two", "[three]", "[three]"]
    model = Model.from_pretrained(speaker)
    expected = model.generate(["two", "[three]"], 9, samples_per_prompt=2)
    assert [row["tokens"] for row in rows] == [tokens.tolist() for tokens in expected.tokens]
    assert [row["text"] for row in rows] == expected.texts
    assert [row["finish_reason"] for row in rows] == expected.finish_reasons
    assert rows[0]["logprobs"] == expected.logprobs[0].tolist()
    assert json.loads(figures.read_text())["tokens"] == sum(expected.lengths)


def test_generate_hands_over_what_there_is_at_ctrl_c(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, steps = Generation.step, 0

    def step(self: Generation) -> bool:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Interrupted(self.rollouts())
        return whole(self)

    monkeypatch.setattr(Generation, "step", step)
    output = tmp_path / "out.jsonl"
    assert main(["generate", "--model", str(speaker), "--prompt", "one", "--output", str(output)]) == 130
    assert json.loads(output.read_text())["finish_reason"] == "interrupted"
    assert "interrupted after 0 of 1 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{]", "line 1 is not valid JSON"),
        ('{"prompt": "x"}\n{"text": "y"}', 'line 2 must be an object with a text field "prompt"'),
        ("", "there is no prompt; pass --prompt 'Once upon a time', or --prompts_file FILE.jsonl"),
    ],
)
def test_prompts_that_cannot_be_read(
    speaker: Path, tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    assert main(["generate", "--model", str(speaker), "--prompts_file", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_tokenizer_cannot_read_text(
    speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model.from_pretrained(speaker)
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "one"]) == 2
    assert "holds no tokenizer.json, so text cannot become tokens" in capsys.readouterr().err


def test_what_runs_in_one_process_is_not_started_by_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", "--model", "m", "--prompt", "one"]) == 2
    assert (
        "this command runs in one process, so start it without torchrun (WORLD_SIZE); these can: pretrain, sft, reward, dpo"
        in (capsys.readouterr().err)
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["generate", "--model", "m", "--prompt", "one"]) == 2
    assert "torchrun" not in capsys.readouterr().err
