"""Supervised fine-tuning: it learns what it is shown and nothing else, in the same bits through any kill, cut and
thread count (P1, P4, P5; RELIABILITY rows 1, 12–14)."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chats_for_tests import CHATML, turns
from forked import Forker, forker
from models_for_tests import bits, threads
from runs_for_tests import (
    Whole,
    digest,
    done_to,
    kill_rounds,
    killed_and_resumed,
    save_model,
    uninterrupted,
    weights,
    write_rows,
)
from tutelage import Model, Tokenizer, load_sft, pack, split_examples
from tutelage.cli import main
from tutelage.evaluate import held_out_loss
from tutelage.files import newest_complete
from tutelage.objectives import cross_entropy
from tutelage.train.configs import SftConfig
from tutelage.train.picture import read_metrics
from tutelage.train.sft import sft

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6


def conversations() -> list[dict[str, Any]]:
    """Questions of several lengths, each with the answer that its number has."""
    return [{"messages": turns(f"{'say ' * (i % 4)}{i}", f"it is {i * 7 % 10}"), "weight": i % 3} for i in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", conversations())


def fields(base: Path, rows: Path, folder: Path, **others: Any) -> dict[str, Any]:
    """Options of a short run: several micro-batches a step, saves beside the lines of metrics, a wrap of the epoch."""
    return {
        "output_dir": str(folder),
        "model": str(base),
        "data": [str(rows)],
        "eval_fraction": 0.2,
        "batch_size": 8,
        "micro_batch_tokens": 100,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "save_steps": 2,
        "logging_steps": 4,
        "eval_steps": 3,
        "plot": False,
        **others,
    }


def config(base: Path, rows: Path, folder: Path, **others: Any) -> SftConfig:
    values = fields(base, rows, folder, **others)
    return SftConfig(**{**values, "data": tuple(values["data"])})


# --- it learns ----------------------------------------------------------------------------------------------


def test_it_learns_the_answers_and_stops_where_the_turn_ends(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"what is red": "a rose", "what is blue": "the sky", "who are you": "me"}
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns(*pair)} for pair in answers.items()])
    figures = tmp_path / "figures.json"
    options = {"eval_fraction": 0.0, "batch_size": 3, "max_steps": 120, "logging_steps": 1, "plot": True}
    result = sft(config(base, rows, tmp_path / "run", json=str(figures), **options))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > 4 and losses[-1] < 0.05

    model = Model.from_pretrained(result.folder)
    (stage,) = done_to(result.folder)
    assert stage.command == "sft" and stage.figures["loss"] == result.loss and stage.figures["data"] == ["rows.jsonl"]
    assert not {"output_dir", "seconds", "model", "json"} & set(stage.figures)
    assert model.tokenizer is not None
    for question, answer in answers.items():
        prompt = model.tokenizer.chat_ids(turns(question), True)
        out = model.generate([prompt], max_new_tokens=30, temperature=0)
        assert out.texts == [f"{answer}<|im_end|>"] or out.texts == [answer]
        assert out.finish_reasons == ["stop"]

    assert (result.eval_loss, result.steps, result.selected_step, result.examples) == (None, 120, 120, 3)
    written = json.loads(figures.read_text())
    assert (written["command"], written["loss"], written["tokens"]) == ("sft", losses[-1], result.tokens)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "3 rows, 3 examples; note: 1" in output and "generation must stop at both" in output
    assert "█" in output and "(nats per token)" in output


def test_the_stop_token_of_the_turn_is_saved_as_an_end(base: Path, rows: Path, tmp_path: Path) -> None:
    """Negative control: the base model ends at the end of text alone."""
    before = Model.from_pretrained(base)
    assert before.tokenizer is not None and before.eos_token_ids == (before.tokenizer.eos_token_id,)
    stop = before.tokenizer.backend.token_to_id("<|im_end|>")
    result = sft(config(base, rows, tmp_path / "run", max_steps=1))
    after = Model.from_pretrained(result.folder)
    assert after.eos_token_ids == (before.tokenizer.eos_token_id, stop)
    for name in ("generation_config.json", "config.json"):
        assert json.loads((result.folder / name).read_text())["eos_token_id"] == list(after.eos_token_ids)


def test_only_the_answers_are_learned_unless_it_is_said_otherwise(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hello", "completion": " world"}] * 2)
    tokens = {
        only: sft(
            config(base, rows, tmp_path / str(only), completion_only_loss=only, eval_fraction=0.0, max_steps=1, batch_size=2)
        ).tokens
        for only in (True, False)
    }
    tokenizer = Tokenizer.from_pretrained(base)
    assert tokens[True] == 2 * (len(tokenizer.encode_next(" world")) + 1)
    assert tokens[False] == tokens[True] + 2 * (len(tokenizer.encode("hello")) - (not tokenizer.adds_bos))


def test_what_is_measured(base: Path, rows: Path, tmp_path: Path) -> None:
    result = sft(config(base, rows, tmp_path / "run", logging_steps=1))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    names = {"step", "loss", "learning_rate", "grad_norm", "num_tokens", "epoch", "entropy"}
    assert all(set(line) == names for line in training) and len(training) == STEPS
    assert training[-1]["learning_rate"] == pytest.approx(5e-4)
    assert training[0]["epoch"] == 8 / result.examples and training[-1]["num_tokens"] == result.tokens
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert result.eval_loss == lines[-1]["eval_loss"]


def test_epochs_decide_how_many_steps_where_max_steps_does_not(base: Path, rows: Path, tmp_path: Path) -> None:
    result = sft(config(base, rows, tmp_path / "run", max_steps=0, num_train_epochs=1.5, eval_fraction=0.0, batch_size=10))
    assert (result.examples, result.steps) == (24, 4)


# --- the same bits ------------------------------------------------------------------------------------------


def test_any_cut_into_micro_batches_and_any_number_of_threads_end_in_the_same_model(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    """8 examples a step: packed together, cut into a few, one by one. Negative control: another order of the data."""
    found = set()
    for name, (tokens, count) in enumerate([(8192, 1), (100, 2), (100, 3), (48, 4)]):
        with threads(count):
            result = sft(config(base, rows, tmp_path / str(name), micro_batch_tokens=tokens))
        found.add((weights(result.folder), result.eval_loss))
    assert len(found) == 1
    assert (weights(sft(config(base, rows, tmp_path / "other", seed=1)).folder), result.eval_loss) not in found


def test_the_held_out_loss_is_the_mean_over_tokens_one_by_one(base: Path) -> None:
    model = Model.from_pretrained(base)
    seqs, masks = [[5, 6, 7, 8], [9, 10, 11]], [[False, False, True, True], [False, True, True]]
    with torch.no_grad():
        alone = [model.score(pack([seq])).logprobs[torch.tensor(mask)] for seq, mask in zip(seqs, masks, strict=True)]
    whole = held_out_loss(model, pack(seqs, masks), 100)
    assert whole == pytest.approx(-float(torch.cat(alone).double().mean()))
    assert held_out_loss(model, pack(seqs, masks), 4) == whole


# --- P5 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("children"), "children", "torch._dynamo") as parent:
        yield parent


SELECT = {"select_by": "eval_loss"}


@pytest.fixture(scope="module")
def whole(children: Forker, base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return uninterrupted(children, "sft", fields(base, rows, tmp_path_factory.mktemp("whole"), **SELECT))


Killed = Callable[..., str]


@pytest.fixture
def killed(children: Forker, base: Path, rows: Path, tmp_path: Path) -> Killed:
    """The digest of a run that is killed once and resumed."""
    numbers = itertools.count()

    def run(kill: dict[str, int], **others: Any) -> str:
        options = fields(base, rows, tmp_path / f"run-{next(numbers)}", **SELECT)
        return killed_and_resumed(children, "sft", options, kill, **others)

    return run


def test_a_kill_changes_no_bit(whole: Whole, killed: Killed) -> None:
    moments = random.Random(1)
    assert killed({"point": moments.randint(1, whole.points)}) == whole.digest
    assert killed({"operation": moments.randint(1, whole.operations)}, threads=2) == whole.digest


@kill_rounds(10, 45)
def test_many_kills(whole: Whole, killed: Killed, rounds: int) -> None:
    moments = random.Random(rounds)
    for _ in range(rounds):
        assert killed({"point": moments.randint(1, whole.points)}) == whole.digest
        assert killed({"operation": moments.randint(1, whole.operations)}) == whole.digest


def test_a_resume_that_forgets_where_the_data_was_ends_elsewhere(whole: Whole, killed: Killed) -> None:
    """The negative control of the kill tests."""
    assert killed({"point": whole.points * 3 // 4}, forget_cursor=True) != whole.digest


def test_ctrl_c_lets_the_step_finish_and_a_resume_changes_no_bit(
    children: Forker, base: Path, rows: Path, whole: Whole, tmp_path: Path
) -> None:
    options = fields(base, rows, tmp_path / "run", **SELECT)
    signals = {"name": "updated", "point": 3, "number": signal.SIGINT}
    status, output = children.run("children:command", loop="sft", config=options, **signals)
    assert status == 128 + signal.SIGINT
    assert "stopped by SIGINT after step 3, which is saved" in output
    status, output = children.run("children:train", loop="sft", config={**options, "resume": "auto"})
    assert status == 0, output
    assert digest(tmp_path / "run", STEPS) == whole.digest


def test_a_resume_from_another_model_or_other_data_is_refused(rows: Path, tmp_path: Path) -> None:
    base, changed = save_model(tmp_path / "base"), tmp_path / "rows.jsonl"
    changed.write_bytes(rows.read_bytes())
    sft(config(base, changed, tmp_path / "run", max_steps=1))
    again = config(base, changed, tmp_path / "run", max_steps=1, resume="auto")
    sft(again)
    save_model(base, seed=1)
    with pytest.raises(ValueError, match="the model to start from is not what that run started from; bring it back"):
        sft(again)
    save_model(base)
    write_rows(changed, conversations()[1:])
    with pytest.raises(ValueError, match="the data or the tokenizer is not what that run read"):
        sft(again)


# --- which model is saved -----------------------------------------------------------------------------------


def overfitting(base: Path, rows: Path, folder: Path, **others: Any) -> SftConfig:
    """Few rows, a high rate: the held-out loss falls, then rises."""
    options = {"max_steps": 40, "eval_steps": 2, "eval_fraction": 0.5, "learning_rate": 2e-2, "save_steps": 100}
    return config(base, rows, folder, **{**options, **others})


def test_the_model_of_the_lowest_held_out_loss_is_saved(base: Path, rows: Path, tmp_path: Path) -> None:
    """Negative control: the last one is another, and worse."""
    last = sft(overfitting(base, rows, tmp_path / "last"))
    best = sft(overfitting(base, rows, tmp_path / "best", select_by="eval_loss"))
    lines = [line for line in read_metrics(tmp_path / "best" / "metrics.jsonl") if "eval_loss" in line]
    lowest = min(lines, key=lambda line: line["eval_loss"])
    assert (best.selected_step, best.eval_loss) == (lowest["step"], lowest["eval_loss"])
    assert best.selected_step < best.steps == last.selected_step
    assert last.eval_loss is not None and best.eval_loss is not None and best.eval_loss < last.eval_loss
    assert weights(best.folder) != weights(last.folder)
    # The bits of a run that had ended there, were it not for the schedule: at a constant rate they can be compared.
    steady = {"min_lr_ratio": 1.0}
    best = sft(overfitting(base, rows, tmp_path / "steady", select_by="eval_loss", **steady))
    assert best.selected_step < best.steps
    short = sft(overfitting(base, rows, tmp_path / "short", max_steps=best.selected_step, **steady))
    assert weights(short.folder) == weights(best.folder)


def test_a_resume_behind_the_best_step_still_saves_its_model(base: Path, rows: Path, tmp_path: Path) -> None:
    best = sft(overfitting(base, rows, tmp_path / "best", select_by="eval_loss"))

    class StopError(Exception):
        pass

    updates = itertools.count(1)

    def stop_behind_the_best(point: str) -> None:
        if point == "updated" and next(updates) == best.selected_step + 2:
            raise StopError

    options = {"select_by": "eval_loss", "save_steps": 1}
    with pytest.raises(StopError):
        sft(overfitting(base, rows, tmp_path / "again", **options), fault=stop_behind_the_best)
    again = sft(overfitting(base, rows, tmp_path / "again", **options, resume="auto"))
    assert (again.selected_step, again.eval_loss) == (best.selected_step, best.eval_loss)
    assert weights(again.folder) == weights(best.folder)
    # In another folder too, which has nothing of the first run but the path of a checkpoint.
    newest = newest_complete(tmp_path / "again")
    moved = sft(overfitting(base, rows, tmp_path / "moved", **options, resume=str(newest), plot=True))
    assert weights(moved.folder) == weights(best.folder)


def test_the_model_whose_answers_a_reward_model_likes_best_is_saved(base: Path, rows: Path, tmp_path: Path) -> None:
    """InstructGPT's choice. Each figure is that of the answers made and judged one by one; the last model is another."""
    judge = save_model(tmp_path / "judge", head="scalar", seed=3)
    options = {"reward_model": str(judge), "max_completion_length": 7}
    last = sft(overfitting(base, rows, tmp_path / "last", **options))
    best = sft(overfitting(base, rows, tmp_path / "best", select_by="eval_reward", **options))
    lines = [line for line in read_metrics(tmp_path / "best" / "metrics.jsonl") if "eval_reward" in line]
    highest = max(lines, key=lambda line: line["eval_reward"])
    assert (best.selected_step, best.eval_reward) == (highest["step"], highest["eval_reward"])
    assert best.selected_step < best.steps == last.selected_step
    assert last.eval_reward == lines[-1]["eval_reward"] < highest["eval_reward"]

    model, reader = Model.from_pretrained(best.folder), Model.from_pretrained(judge)
    assert model.tokenizer is not None
    _, held_out = split_examples(load_sft([str(rows)], model.tokenizer, 96), 0.5, 0)
    rewards = []
    for example in held_out.examples:
        prompt = example.tokens[: example.mask.tolist().index(True)].tolist()
        answer = model.generate([prompt], 7, temperature=0)
        rewards.append(reader.values(pack([[*prompt, *answer.tokens[0].tolist()]]))[-1].item())
    assert best.eval_reward == math.fsum(rewards) / len(rewards)


# --- a loss of one's own ------------------------------------------------------------------------------------


def same_loss(out: Any, batch: Any, columns: Any) -> torch.Tensor:
    return cross_entropy(out.logprobs, batch.completion_mask, columns["denominator"])


def weighted(out: Any, batch: Any, columns: Any) -> torch.Tensor:
    """By a field of the rows: wrong where the columns are not those of the micro-batch's sequences."""
    factors = torch.tensor(columns["weight"], dtype=torch.float32)
    return -torch.dot(batch.sum(out.logprobs), factors) / columns["denominator"]


def test_an_objective_that_computes_the_same_ends_in_the_same_bits(base: Path, rows: Path, tmp_path: Path) -> None:
    built_in = sft(config(base, rows, tmp_path / "built-in"))
    called = sft(config(base, rows, tmp_path / "called"), same_loss)
    named = sft(config(base, rows, tmp_path / "named", objective=f"{__file__}:same_loss"))
    assert weights(called.folder) == weights(named.folder) == weights(built_in.folder)
    assert weights(sft(config(base, rows, tmp_path / "other"), weighted).folder) != weights(built_in.folder)


def test_an_objective_gets_the_fields_of_its_sequences(base: Path, rows: Path, tmp_path: Path) -> None:
    """Whatever the cut: rows of weight 0 are as good as absent, so that a mix-up would show."""
    seen: list[list[int]] = []

    def objective(out: Any, batch: Any, columns: Any) -> torch.Tensor:
        assert len(columns["weight"]) == len(batch)
        seen.append(columns["weight"])
        return weighted(out, batch, columns)

    for name, tokens in {"whole": 8192, "cut": 100}.items():
        seen.clear()
        sft(config(base, rows, tmp_path / name, max_steps=1, micro_batch_tokens=tokens), objective)
        steps = [weight for part in seen for weight in part]
        assert len(steps) == 8 and (len(seen) == 1) == (name == "whole")
        if name == "whole":
            expected = steps
    assert steps == expected and len(set(steps)) > 1


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda out, batch, columns: 1.0, "the objective must return a scalar tensor, but it returned float"),
        (lambda out, batch, columns: out.logprobs, r"must return a scalar, but the shape of its loss is \[\d+\]"),
        (lambda out, batch, columns: torch.tensor(1.0), r"has no gradient: compute it from out\.logprobs or out\.entropy"),
    ],
)
def test_an_objective_that_returns_something_else_is_refused(
    base: Path, rows: Path, tmp_path: Path, objective: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sft(config(base, rows, tmp_path / "run"), objective)


def test_a_base_model_without_a_chat_template_is_given_one(base: Path, rows: Path, tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", template=None)
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    with pytest.raises(ValueError, match="no chat template, so messages cannot become text"):
        sft(config(plain, rows, tmp_path / "refused"))
    given = sft(config(plain, rows, tmp_path / "given", chat_template_path=str(path)))
    own = sft(config(base, rows, tmp_path / "own"))
    models = [Model.from_pretrained(result.folder) for result in (given, own)]
    assert bits(models[0].params) == bits(models[1].params)
    assert models[0].tokenizer.chat(turns("a", "b")) == models[1].tokenizer.chat(turns("a", "b"))
    assert (given.folder / "chat_template.jinja").read_text() == CHATML


# --- errors -------------------------------------------------------------------------------------------------


def test_a_row_of_which_nothing_is_learned_is_an_error(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns("a", "b")}, {"messages": turns("say " * 60, "b")}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: the row has no token to learn of the 20 that are kept"):
        sft(config(base, rows, tmp_path / "run", max_length=20, on_long="truncate"))
    result = sft(config(base, rows, tmp_path / "run", max_length=20, on_long="truncate", on_bad_row="skip:1", max_steps=1))
    assert result.examples == 1


def test_what_does_not_fit_is_named(base: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="nothing to learn from; pass examples, as in `tutelage sft --data"):
        sft(config(base, rows, run, data=[]))
    with pytest.raises(ValueError, match=r"max_length is 200, but the model reads at most 96 tokens: lower it"):
        sft(config(base, rows, run, max_length=200))
    with pytest.raises(ValueError, match=r"line \d+: the row has \d+ tokens, more than micro_batch_tokens = 5: raise it"):
        sft(config(base, rows, run, micro_batch_tokens=5))
    one = write_rows(tmp_path / "one.jsonl", [{"messages": turns("a", "b")}])
    with pytest.raises(ValueError, match="there is only one prompt: use select_by last"):
        sft(config(base, one, run, **SELECT))
    named = write_rows(tmp_path / "named.jsonl", [{"messages": turns("a", "b"), "denominator": 1}])
    with pytest.raises(ValueError, match=r"line 1: the field 'denominator' has a meaning to objectives: give it another"):
        sft(config(base, named, run, eval_fraction=0.0), same_loss)
    with pytest.raises(ValueError, match="holds a reward model, and fine-tuning needs a language model"):
        sft(config(save_model(tmp_path / "scalar", head="scalar"), rows, run))
    bare = save_model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json in .*bare: put the model's tokenizer there"):
        sft(config(bare, rows, run))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": -1}, "max_length must be at least 0, but it is -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, but it is 0"),
        ({"num_train_epochs": 0.0}, "num_train_epochs must be positive, but it is 0.0"),
        ({"eval_fraction": 1.0}, "eval_fraction must be at least 0 and below 1, but it is 1.0"),
        ({"eval_fraction": 0.0, **SELECT}, "select_by eval_loss needs held-out examples: give an eval_fraction above 0"),
        ({"select_by": "eval_reward"}, "select_by eval_reward needs a judge: give the folder of a reward_model"),
        ({"eval_fraction": 0.0, "reward_model": "a"}, "judges answers to held-out prompts: give an eval_fraction above 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, but it is 0"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1, but it is 0"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must lie between 0 and 1, but it is 1.5"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SftConfig(**options)


# --- the command line ---------------------------------------------------------------------------------------


def test_the_command(base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["sft", "--help"])
    assert "--select_by" in capsys.readouterr().out
    run, figures = tmp_path / "run", tmp_path / "figures.json"
    options = ["--model", str(base), "--data", str(rows), "--output_dir", str(run), "--json", str(figures)]
    assert main(["sft", *options, "--num_train_epochs", "1", "--no_plot"]) == 0
    written = json.loads(figures.read_text())
    assert {"command", "loss", "eval_loss", "tokens", "tokens_per_second", "folder", "format_version"} <= set(written)
    assert bits(Model.from_pretrained(written["folder"]).params) != bits(Model.from_pretrained(base).params)
    capsys.readouterr()
    assert main(["sft", *options, "--no_plot"]) == 2
    assert "tutelage sft: " in capsys.readouterr().err
