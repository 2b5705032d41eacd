"""`tutelage eval`, each measure against the same figure made by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from chats_for_tests import CHATML, turns
from runs_for_tests import save_model
from tutelage import Model, load_rankings, pack
from tutelage.cli import main, parse
from tutelage.data.documents import read_documents
from tutelage.evaluate import documents_to_score, held_out_bits_per_byte, kl_divergence, rate
from tutelage.train.configs import EvalConfig
from tutelage.train.evaluate_command import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

JUDGE = """
def longer(prompt, answer, other, row):
    return 0.5 if prompt == "tie" else row["wins"]
def score(prompt, answer, row):
    return row.get("score", answer == row.get("completion"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), CHATML)


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Model.from_pretrained(folder)
    model.params *= 1.5
    target = tmp_path_factory.mktemp("other")
    model.save_pretrained(target)
    return target


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> int:
    return main(["eval", *map(str, arguments)])


def test_bits_per_byte(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello naïve world\n" * 20)  # longer than the context
    target = tmp_path / "figures.json"
    assert run("bits_per_byte", "--model", folder, "--data", text, "--json", target) == 0
    figures = json.loads(target.read_text())
    model = Model.from_pretrained(folder)
    assert model.tokenizer is not None
    expected = held_out_bits_per_byte(model, documents_to_score(read_documents([str(text)], 0.0), model.tokenizer), 96, 96)
    assert figures[str(text)] == figures["all"] == expected["all"] and figures["bytes"] == 19 * 20
    assert figures["measure"] == "bits_per_byte" and f"{figures['all']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("chat", [False, True])
def test_accuracy_by_exact_match(folder: Path, tmp_path: Path, chat: bool) -> None:
    """One row has what the model says, spelled with other white space; one has something else."""
    prompt: Any = turns("hello") if chat else "hello"
    model = Model.from_pretrained(folder)
    assert model.tokenizer is not None
    ids = model.tokenizer.chat_ids(turns("hello"), True) if chat else model.tokenizer.encode("hello")
    answers = model.generate([ids], 5, temperature=0, stop_token_ids=[0, 3]).texts
    assert answers is not None
    right, wrong = f"  {answers[0]}\n", f"{answers[0]}x"
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in (right, wrong)]
    rows = write(tmp_path / "rows.jsonl", *({"prompt": prompt, "completion": c} for c in completions))
    figures = evaluate(EvalConfig("accuracy", str(folder), (str(rows),), max_new_tokens=5))
    assert figures["rate"] == 0.5 and figures["count"] == 2


def test_accuracy_by_a_scorer_and_win_rate_by_a_judge(folder: Path, other: Path, tmp_path: Path) -> None:
    code = tmp_path / "judge.py"
    code.write_text(JUDGE)
    rows = write(tmp_path / "rows.jsonl", *({"prompt": p, "wins": 1, "score": 0.25} for p in ("a", "tie", "b")))
    common: dict[str, Any] = {"model": str(folder), "data": (str(rows),), "max_new_tokens": 3}
    assert evaluate(EvalConfig("accuracy", scorer=f"{code}:score", **common))["rate"] == 0.25
    figures = evaluate(EvalConfig("win_rate", judge=f"{code}:longer", against=str(other), **common))
    expected = rate([1, 0.5, 1])
    assert figures == {"rate": expected.rate, "low": expected.low, "high": expected.high, "count": 3, "ties": 1}


def test_the_judge_gets_the_model_first(folder: Path, other: Path, tmp_path: Path) -> None:
    code = tmp_path / "judge.py"
    code.write_text("def judge(prompt, answer, other, row):\n    return [answer, other] == row['answers']\n")
    texts = [Model.from_pretrained(place).generate(["hello"], 4, temperature=0).texts for place in (folder, other)]
    both = [text[0] for text in texts if text is not None]
    rows = write(tmp_path / "rows.jsonl", {"prompt": "hello", "answers": both})
    config = EvalConfig("win_rate", str(folder), (str(rows),), str(other), judge=f"{code}:judge", max_new_tokens=4)
    assert evaluate(config)["rate"] == 1


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("judge") / "model", head="scalar", seed=5)


def test_a_reward_model_measures_and_judges(folder: Path, judge: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    noisy = Model.from_pretrained(folder)
    noisy.params += 0.3 * torch.randn(noisy.params.shape, generator=torch.Generator().manual_seed(1))
    noisy.save_pretrained(other)
    prompts = ["yes", "no", "a", "hello", "so it is", "12", "say 7", "x y"]
    rows = write(tmp_path / "rows.jsonl", *({"prompt": prompt} for prompt in prompts))
    options: dict[str, Any] = {"data": (str(rows),), "reward_model": str(judge), "max_new_tokens": 6}
    rewards = []
    for place in (folder, other):
        figures = evaluate(EvalConfig("reward", str(place), **options))
        model, reader = Model.from_pretrained(place), Model.from_pretrained(judge)
        rollouts = model.generate(prompts, 6, temperature=0)
        one_by_one = [
            reader.values(pack([torch.cat([prompt, answer])]))[-1].item()
            for prompt, answer in zip(rollouts.prompts, rollouts.tokens, strict=True)
        ]
        assert figures["reward"] == math.fsum(one_by_one) / 8 and figures["count"] == 8 and figures["standard_error"] > 0
        rewards.append(one_by_one)
    figures = evaluate(EvalConfig("win_rate", str(folder), against=str(other), **options))
    scores = [0.5 if a == b else float(a > b) for a, b in zip(*rewards, strict=True)]
    assert figures["rate"] == sum(scores) / 8 and figures["ties"] == scores.count(0.5)
    assert {0.0, 1.0} <= set(scores)  # it is not one model that always wins
    same = evaluate(EvalConfig("win_rate", str(folder), against=str(folder), **options))
    assert same["rate"] == 0.5 and same["ties"] == 8


def test_accuracy_of_a_reward_model(judge: Path, folder: Path, tmp_path: Path) -> None:
    """Pairs in the model's own order are all right, the same pairs turned round are all wrong, and a tie is no pair."""
    model = Model.from_pretrained(judge)
    assert model.tokenizer is not None
    answers = [f" {word}" for word in ("yes", "no", "perhaps", "never", "so")]
    unranked = [{"prompt": "hello", "responses": answers, "ranking": [[n] for n in range(5)]}]
    loaded = load_rankings([str(write(tmp_path / "unranked.jsonl", *unranked))], model.tokenizer, 96).examples[0]
    values = [model.values(pack([response.tokens]))[-1].item() for response in loaded.responses]
    order = sorted(range(5), key=lambda n: -values[n])
    right = [[order[0]], [order[1], order[2]], [order[3]], [order[4]]]
    for ranking, expected in ((right, 1.0), (right[::-1], 0.0)):
        rows = write(tmp_path / "rows.jsonl", {**unranked[0], "ranking": ranking})
        figures = evaluate(EvalConfig("reward_accuracy", str(judge), (str(rows),)))
        assert (figures["rate"], figures["count"], figures["prompts"]) == (expected, 9, 1)
    with pytest.raises(ValueError, match="holds a language model, and reward_accuracy needs a reward model"):
        evaluate(EvalConfig("reward_accuracy", str(folder), (str(rows),)))


def test_kl(folder: Path, other: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", *({"prompt": "hello" * n} for n in range(1, 9)))
    options: dict[str, Any] = {"data": (str(rows),), "max_new_tokens": 8, "seed": 3}
    figures = evaluate(EvalConfig("kl", str(folder), against=str(other), **options))
    model, reference = Model.from_pretrained(folder), Model.from_pretrained(other)
    rollouts = model.generate(["hello" * n for n in range(1, 9)], 8, stop_token_ids=model.eos_token_ids, seed=3)
    expected = kl_divergence(rollouts, reference, 1.0, 10)
    assert figures["per_token"] == expected.per_token and figures["standard_error"] == expected.standard_error
    assert figures["per_token"] != 0
    assert evaluate(EvalConfig("kl", str(folder), against=str(folder), temperature=0.5, **options))["per_sequence"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "win_rate", "judge": "a:b"}, "win_rate needs --against"),
        ({"measure": "win_rate", "against": "a"}, "win_rate needs one judge: --judge or --reward_model"),
        ({"measure": "win_rate", "against": "a", "judge": "a:b", "reward_model": "c"}, "win_rate needs one judge"),
        ({"measure": "reward"}, "reward needs --reward_model"),
        ({"reward_model": "a"}, "reward_model belongs to reward and win_rate, not to accuracy"),
        ({"measure": "kl"}, "kl needs --against"),
        ({"measure": "kl", "against": "a", "temperature": 0.0}, "so temperature must be positive, but it is 0"),
        ({"against": "a"}, "against belongs to win_rate and kl, not to accuracy"),
        ({"judge": "a:b"}, "judge belongs to win_rate, not to accuracy"),
        ({"measure": "bits_per_byte", "scorer": "a:b"}, "scorer belongs to accuracy, not to bits_per_byte"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)


def test_errors_name_the_row(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = tmp_path / "judge.py"
    code.write_text(JUDGE)
    rows = write(tmp_path / "rows.jsonl", {"prompt": "a", "wins": "no", "score": 2})
    common = ("--model", folder, "--data", rows, "--max_new_tokens", 2)
    for arguments, message in (
        (("accuracy", "--model", folder), "there is nothing to measure on; pass files with --data"),
        (
            ("accuracy", *common),
            'line 1: accuracy needs a field "completion" to compare with, a string or one message; or pass',
        ),
        (("accuracy", *common, "--scorer", f"{code}:score"), "line 1: the scorer must return a number in 0 .. 1, but it retur"),
        (("win_rate", *common, "--against", folder, "--judge", f"{code}:longer"), "line 1: the judge must return a number in"),
        (("win_rate", *common, "--against", folder, "--judge", f"{code}:score"), "cannot be called as score(prompt, answer, "),
        (("accuracy", *common, "--scorer", f"{code}:none"), "scorer: "),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_models_that_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", {"prompt": "a"})
    model = Model.from_pretrained(folder)
    model.tokenizer = None
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare holds no tokenizer\.json, so text cannot become tokens"):
        evaluate(EvalConfig("kl", str(folder), (str(rows),), against=str(tmp_path / "bare")))
    renamed = save_model(tmp_path / "renamed", CHATML)
    options = json.loads((renamed / "tokenizer_config.json").read_text()) | {"bos_token": "</s>"}
    (renamed / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="have different tokenizers, so their tokens cannot be compared"):
        evaluate(EvalConfig("kl", str(folder), (str(rows),), against=str(renamed)))
    with pytest.raises(ValueError, match="renamed holds a language model, and rewards need a reward model: make one with"):
        evaluate(EvalConfig("reward", str(folder), (str(rows),), reward_model=str(renamed)))
    scalar = save_model(tmp_path / "scalar", head="scalar")
    with pytest.raises(ValueError, match="scalar has another tokenizer than the model, so it cannot read its answers"):
        evaluate(EvalConfig("reward", str(renamed), (str(rows),), reward_model=str(scalar)))


def test_the_measure_stands_in_front() -> None:
    assert parse("eval", ["bits_per_byte", "--data", "a"]) == EvalConfig("bits_per_byte", data=("a",))


@pytest.mark.parametrize(
    ("measure", "bars"),
    [
        ("bits_per_byte", ["pieces of text"]),
        ("accuracy", ["answers"]),
        ("kl", ["answers", "answers read by the other model"]),
        ("reward", ["answers", "rewards"]),
        ("win_rate", ["answers", "rewards"]),
        ("reward_accuracy", ["rewards"]),
    ],
)
def test_a_bar_on_a_terminal_and_nowhere_else(
    measure: str,
    bars: list[str],
    folder: Path,
    other: Path,
    judge: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = [" yes", " no", " so"]
    row = {"prompt": "hello", "completion": "x", "responses": answers, "ranking": [[0], [1], [2]]}
    fields = ("prompt", "responses", "ranking") if measure == "reward_accuracy" else ("prompt", "completion")
    rows = write(tmp_path / "rows.jsonl", *2 * [{name: row[name] for name in fields}])
    if measure == "bits_per_byte":
        rows = write(tmp_path / "rows.jsonl", {"text": "hello world"}, {"text": "one more " * 40})
    config = EvalConfig(
        measure,  # type: ignore[arg-type]
        str(judge if measure == "reward_accuracy" else folder),
        (str(rows),),
        str(other) if measure in ("kl", "win_rate") else None,
        reward_model=str(judge) if measure in ("reward", "win_rate") else None,
        max_new_tokens=4,
        micro_batch_tokens=96,
    )
    figures = evaluate(config)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    assert evaluate(config) == figures
    shown = capsys.readouterr()
    for name in bars:
        assert name in shown.err and name not in shown.out
    states = re.findall(r"(\d+)/(\d+)", shown.err)
    totals = {total for _, total in states}
    assert totals and {(total, total) for total in totals} <= set(states)  # every bar came to its end
    assert all(int(done) <= int(total) for done, total in states)
