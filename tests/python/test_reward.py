"""Reward models: they learn an order, all pairs of a prompt at once, in the same bits through any kill, cut and thread
count; and demonstrations score 0 (P1, P4, P5; RELIABILITY rows 1, 9, 12–14)."""

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

from chats_for_tests import turns
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
from tutelage import Model, PackedBatch, load_rankings, load_sft, pack, split_examples
from tutelage.cli import main
from tutelage.data.examples import Ranking
from tutelage.evaluate import sequence_rewards
from tutelage.train.configs import RewardConfig
from tutelage.train.picture import read_metrics
from tutelage.train.reward import reward

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
ANSWERS = ("yes it is", "maybe so", "no", "not at all")
"""Best first."""


def rankings(learnable: bool = True) -> list[dict[str, Any]]:
    """Three or four answers to each prompt, in changing order; in every fifth row the two worst are tied.

    learnable: otherwise the order of the answers is another one for every prompt.
    """
    rows = []
    for i in range(24):
        responses = [ANSWERS[(i + k) % 4] for k in range(3 + i % 2)]
        order = sorted(range(len(responses)), key=lambda k: ANSWERS.index(responses[k]))
        if not learnable:
            random.Random(i).shuffle(order)
        groups = [[k] for k in order]
        if i % 5 == 0:
            groups[-2:] = [groups[-2] + groups[-1]]
        rows.append({"prompt": f"{'say ' * (i % 3)}{i}? ", "responses": responses, "ranking": groups})
    return rows


def pairs(margin: float | None = None) -> list[dict[str, Any]]:
    rows = [{"prompt": f"is it {i}? ", "chosen": ANSWERS[i % 2], "rejected": ANSWERS[2 + i % 2]} for i in range(8)]
    return rows if margin is None else [{**row, "margin": margin} for row in rows]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: rankings, and pairs with a margin."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "rankings.jsonl", rankings())
    write_rows(folder / "pairs.jsonl", pairs(0.5))
    return folder


def fields(base: Path, rows: Path, folder: Path, **others: Any) -> dict[str, Any]:
    """Options of a short run: several micro-batches a step, saves beside the lines of metrics, a wrap of the epoch."""
    return {
        "output_dir": str(folder),
        "model": str(base),
        "data": [str(rows)],
        "eval_fraction": 0.2,
        "batch_size": 6,
        "micro_batch_tokens": 130,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "save_steps": 2,
        "logging_steps": 4,
        "eval_steps": 3,
        "plot": False,
        **others,
    }


def config(base: Path, rows: Path, folder: Path, **others: Any) -> RewardConfig:
    values = fields(base, rows, folder, **others)
    return RewardConfig(**{**values, "data": tuple(values["data"])})


def raw(folder: Path) -> Model:
    """A saved model without its bias."""
    model = Model.from_pretrained(folder)
    model.reward_bias = 0.0
    return model


def best(prompts: tuple[Ranking, ...]) -> PackedBatch:
    """The best responses of each prompt."""
    return pack([prompt.responses[index].tokens for prompt in prompts for index in prompt.ranking[0]])


def mean_reward(model: Model, batch: PackedBatch) -> float:
    return math.fsum(sequence_rewards(model, batch, 500).tolist()) / len(batch)


def lines(folder: Path) -> list[dict[str, float]]:
    """Of a run's metrics, those of training."""
    return [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


# --- it learns ----------------------------------------------------------------------------------------------


def test_it_learns_which_answers_are_preferred(base: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    """On prompts it has never seen. Negative control: from rows without an order in them it learns none."""
    figures = tmp_path / "figures.json"
    options = {"max_steps": 40, "batch_size": 8, "logging_steps": 1, "eval_steps": 1, "plot": True}
    result = reward(config(base, rows, tmp_path / "run", json=str(figures), **options))
    accuracies = [line["accuracy"] for line in lines(tmp_path / "run")]
    held_out = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_accuracy" in line]
    assert accuracies[0] < 0.8 and min(accuracies[-5:]) > 0.95
    assert held_out[0]["eval_accuracy"] < 0.9 and result.eval_accuracy == held_out[-1]["eval_accuracy"] == 1.0
    assert result.eval_loss == held_out[-1]["eval_loss"] < held_out[0]["eval_loss"] / 2

    written = json.loads(figures.read_text())
    assert (written["command"], written["eval_accuracy"], written["tokens"]) == ("reward", 1.0, result.tokens)
    assert written["reward_bias"] == result.reward_bias and written["loss"] == result.loss
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "█" in output and "100.0% of the held-out pairs in the right order" in output
    assert "is subtracted, so that the best responses of the training data score 0 on average" in output

    noise = write_rows(tmp_path / "noise.jsonl", rankings(learnable=False))
    unlearned = reward(config(base, noise, tmp_path / "noise", **{**options, "plot": False, "eval_fraction": 0.4}))
    assert unlearned.eval_accuracy is not None and unlearned.eval_accuracy < 0.85


def test_what_is_measured(base: Path, rows: Path, tmp_path: Path) -> None:
    result = reward(config(base, rows, tmp_path / "run", logging_steps=1))
    training = lines(tmp_path / "run")
    names = {"step", "loss", "learning_rate", "grad_norm", "num_tokens", "epoch"}
    figures = {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
    assert all(set(line) == names | figures for line in training) and len(training) == STEPS
    assert all(line["min_reward"] < line["mean_reward"] < line["max_reward"] for line in training)
    assert training[-1]["learning_rate"] == pytest.approx(3e-4)
    assert training[0]["epoch"] == 6 / result.examples and training[-1]["num_tokens"] == result.tokens
    measured = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in measured] == [3, 6]
    assert {"eval_loss": result.eval_loss, "eval_accuracy": result.eval_accuracy, "step": 6} == measured[-1]


def test_one_epoch_is_the_default(base: Path, rows: Path, tmp_path: Path) -> None:
    result = reward(config(base, rows, tmp_path / "run", max_steps=0, eval_fraction=0.0, batch_size=10))
    assert (result.examples, result.steps, result.eval_loss, result.eval_accuracy) == (32, 4, None, None)


# --- all pairs of a prompt ----------------------------------------------------------------------------------


def first_step(base: Path, rows: list[dict[str, Any]], folder: Path, **others: Any) -> dict[str, float]:
    """What the first step measures on all rows at once."""
    data = write_rows(folder.with_suffix(".jsonl"), rows)
    options = {"eval_fraction": 0.0, "batch_size": len(rows), "max_steps": 1, "micro_batch_tokens": 500}
    reward(config(base, data, folder, **options, **others))
    return lines(folder)[0]


def test_a_ranking_is_the_mean_of_its_pairs(base: Path, tmp_path: Path) -> None:
    """Of loss and gradient. Negative control: of a ranking with a tie it is another."""
    prompt = {"prompt": "is it? "}
    several = {**prompt, "responses": list(ANSWERS), "ranking": [[2], [0], [3], [1]]}
    order = [ANSWERS[index] for (index,) in several["ranking"]]
    couples = [{**prompt, "chosen": a, "rejected": b} for a, b in itertools.combinations(order, 2)]
    whole = first_step(base, [several], tmp_path / "whole")
    apart = first_step(base, couples, tmp_path / "apart")
    tied = first_step(base, [{**several, "ranking": [[2], [0], [3, 1]]}], tmp_path / "tied")
    for name in ("loss", "grad_norm", "accuracy", "margin"):
        assert whole[name] == pytest.approx(apart[name], rel=1e-4)
    for name in ("loss", "grad_norm"):
        assert tied[name] != pytest.approx(apart[name], rel=1e-2)


def test_a_prompt_of_k_responses_costs_k_forwards(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[int] = []
    original = Model.values

    def counting(model: Model, batch: PackedBatch) -> torch.Tensor:
        if torch.is_grad_enabled():
            forwards.append(len(batch))
        return original(model, batch)

    monkeypatch.setattr(Model, "values", counting)
    several = {"prompt": "is it? ", "responses": list(ANSWERS), "ranking": [[2], [0], [3], [1]]}
    first_step(base, [several], tmp_path / "run")
    assert forwards == [4]


def test_the_reward_of_a_packed_sequence_is_that_of_the_sequence_alone(base: Path) -> None:
    model = Model.from_pretrained(base, head="scalar")
    sequences = [[5, 6, 7, 8], [9, 10, 11], [12], [13] * 20]
    alone = torch.cat([sequence_rewards(model, pack([sequence]), 20) for sequence in sequences])
    for most in (20, 28):
        assert bits(sequence_rewards(model, pack(sequences), most)) == bits(alone)
    assert alone.unique().numel() == len(sequences)
    with torch.no_grad():
        assert alone[0] == model.values(pack([sequences[0]]))[-1]


def test_margin_and_centring_are_options(base: Path, tmp_path: Path) -> None:
    """At a margin m the loss is −log σ(lead − m): known where the first rewards are."""
    plain = first_step(base, pairs(), tmp_path / "plain")
    assert first_step(base, pairs(2.0), tmp_path / "ignored", margin=False) == plain
    with_margin = first_step(base, pairs(2.0), tmp_path / "margin")
    assert with_margin["loss"] > plain["loss"] and with_margin["margin"] == plain["margin"]
    leads = sequence_leads(base, pairs(), tmp_path)
    expected = math.fsum(math.log1p(math.exp(2.0 - lead)) for lead, _ in leads) / len(leads)
    assert with_margin["loss"] == pytest.approx(expected, rel=1e-5)
    centred = first_step(base, pairs(), tmp_path / "centred", center_rewards_coefficient=0.5)
    squares = math.fsum(0.5 * total**2 for _, total in leads) / len(leads)
    assert centred["loss"] == pytest.approx(plain["loss"] + squares, rel=1e-5) and squares > 0.01


def sequence_leads(base: Path, rows: list[dict[str, Any]], folder: Path) -> list[tuple[float, float]]:
    """(r_w − r_l, r_w + r_l) of every pair, of the model before its first step."""
    model = Model.from_pretrained(base, head="scalar", seed=0)
    assert model.tokenizer is not None
    loaded = load_rankings(write_rows(folder / "leads.jsonl", rows), model.tokenizer, 96).examples
    values = [sequence_rewards(model, pack([r.tokens for r in pair.responses]), 500).tolist() for pair in loaded]
    return [(won - lost, won + lost) for won, lost in values]


# --- the head and the bias ----------------------------------------------------------------------------------


def test_the_head_is_drawn_from_the_seed_and_a_reward_model_keeps_its_own(base: Path, rows: Path, tmp_path: Path) -> None:
    """No step moves anything at a rate of 0, so that the model that is saved is the one that was started from."""
    options = {"learning_rate": 0.0, "max_steps": 1}
    first = reward(config(base, rows, tmp_path / "first", seed=1, **options))
    fresh = Model.from_pretrained(base, head="scalar", seed=1)
    assert bits(raw(first.folder).params) == bits(fresh.params)
    assert weights(reward(config(base, rows, tmp_path / "other", seed=2, **options)).folder) != weights(first.folder)
    again = reward(config(first.folder, rows, tmp_path / "again", seed=2, **options))
    assert weights(again.folder) == weights(first.folder)
    # The new bias takes the place of the old one: it is no bias on top of a bias.
    assert fresh.tokenizer is not None
    training, _ = split_examples(load_rankings(rows, fresh.tokenizer, 96), 0.2, 2)
    assert again.reward_bias == mean_reward(fresh, best(training.examples)) != first.reward_bias


def test_the_best_responses_of_the_training_data_score_0_on_average(base: Path, rows: Path, tmp_path: Path) -> None:
    """Negative control: without the bias they do not."""
    result = reward(config(base, rows, tmp_path / "run"))
    model = Model.from_pretrained(result.folder)
    assert model.tokenizer is not None and model.reward_bias == result.reward_bias
    batch = best(split_examples(load_rankings(rows, model.tokenizer, 96), 0.2, 0)[0].examples)
    assert done_to(result.folder)[-1].figures["reward_bias"] == result.reward_bias
    assert abs(mean_reward(model, batch)) < 1e-6 < 1e-2 < abs(mean_reward(raw(result.folder), batch))
    assert mean_reward(raw(result.folder), batch) == result.reward_bias


def test_demonstrations_of_a_file_score_0_on_average(base: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    """Read where a rollout ends: at the stop token, not at the line break that the template writes behind it."""
    shown = [{"messages": turns("is it", "yes it is")}, {"messages": turns("really", "yes", "oh", "no")}]
    demonstrations = write_rows(tmp_path / "demonstrations.jsonl", shown)
    result = reward(config(base, rows, tmp_path / "run", demonstrations=str(demonstrations)))
    assert "so that the demonstrations score 0 on average" in capsys.readouterr().out
    model = Model.from_pretrained(result.folder)
    assert model.tokenizer is not None
    stop = model.tokenizer.backend.token_to_id("<|im_end|>")
    whole = [example.tokens.tolist() for example in load_sft(demonstrations, model.tokenizer, 96).examples]
    assert all(tokens[-1] != stop for tokens in whole)
    ended = [tokens[: len(tokens) - tokens[::-1].index(stop)] for tokens in whole]
    assert abs(mean_reward(model, pack(ended))) < 1e-6 < abs(mean_reward(model, pack(whole)))
    # They move the bias and nothing else.
    without = reward(config(base, rows, tmp_path / "without"))
    assert weights(without.folder) == weights(result.folder) and without.reward_bias != result.reward_bias


# --- the same bits ------------------------------------------------------------------------------------------


def test_any_cut_into_whole_prompts_and_any_number_of_threads_end_in_the_same_model(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    """6 prompts a step: packed together, cut into a few, one by one. Negative control: another order of the data."""
    found, counts = set(), []
    for name, (tokens, count) in enumerate([(8192, 1), (250, 2), (250, 3), (130, 4)]):
        points: list[str] = []
        with threads(count):
            result = reward(config(base, rows, tmp_path / str(name), micro_batch_tokens=tokens), fault=points.append)
        counts.append(points.count("micro-batch"))
        found.add((weights(result.folder), result.eval_loss, result.eval_accuracy, result.reward_bias))
    assert len(found) == 1
    assert counts[0] == STEPS < counts[1] == counts[2] < counts[3]
    assert weights(reward(config(base, rows, tmp_path / "other", seed=1)).folder) != weights(result.folder)


# --- P5 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("children"), "children", "torch._dynamo") as parent:
        yield parent


@pytest.fixture(scope="module")
def whole(children: Forker, base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return uninterrupted(children, "reward", fields(base, rows, tmp_path_factory.mktemp("whole")))


Killed = Callable[..., str]


@pytest.fixture
def killed(children: Forker, base: Path, rows: Path, tmp_path: Path) -> Killed:
    """The digest of a run that is killed once and resumed."""
    numbers = itertools.count()

    def run(kill: dict[str, int], **others: Any) -> str:
        options = fields(base, rows, tmp_path / f"run-{next(numbers)}")
        return killed_and_resumed(children, "reward", options, kill, **others)

    return run


def test_a_kill_changes_no_bit(whole: Whole, killed: Killed) -> None:
    assert killed({"point": random.Random(1).randint(1, whole.points)}, threads=2) == whole.digest


@kill_rounds(2, 45)
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
    options = fields(base, rows, tmp_path / "run")
    signals = {"name": "updated", "point": 3, "number": signal.SIGINT}
    status, output = children.run("children:command", loop="reward", config=options, **signals)
    assert status == 128 + signal.SIGINT
    assert "stopped by SIGINT after step 3, which is saved" in output
    status, output = children.run("children:train", loop="reward", config={**options, "resume": "auto"})
    assert status == 0, output
    assert digest(tmp_path / "run", STEPS) == whole.digest


def test_a_resume_with_other_demonstrations_or_from_another_model_is_refused(rows: Path, tmp_path: Path) -> None:
    base, shown = save_model(tmp_path / "base"), write_rows(tmp_path / "shown.jsonl", [{"prompt": "a", "completion": "b"}])
    options = {"max_steps": 1, "demonstrations": str(shown)}
    first = reward(config(base, rows, tmp_path / "run", **options))
    again = config(base, rows, tmp_path / "run", resume="auto", **options)
    second = reward(again)
    assert first.eval_loss is not None
    for name in ("reward_bias", "loss", "eval_loss", "eval_accuracy", "tokens"):
        assert getattr(second, name) == getattr(first, name)
    save_model(base, seed=1)
    with pytest.raises(ValueError, match="the model to start from is not what that run started from; bring it back"):
        reward(again)
    save_model(base)
    write_rows(shown, [{"prompt": "a", "completion": "c"}])
    with pytest.raises(ValueError, match="the data or the tokenizer is not what that run read"):
        reward(again)


# --- errors -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(base: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="nothing to learn from; pass rankings, as in `tutelage reward --data"):
        reward(config(base, rows, run, data=[]))
    with pytest.raises(ValueError, match=r"max_length is 200, but the model reads at most 96 tokens: lower it"):
        reward(config(base, rows, run, max_length=200))
    message = (
        r"line \d+: the responses, which are learned together, have \d+ tokens, more than micro_batch_tokens = 20: raise it"
    )
    with pytest.raises(ValueError, match=message):
        reward(config(base, rows, run, micro_batch_tokens=20))
    short = write_rows(tmp_path / "short.jsonl", pairs())
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "a", "completion": " b" * 40}])
    with pytest.raises(ValueError, match=r"long\.jsonl, line 1: the row has 8\d tokens, more than micro_batch_tokens = 70"):
        reward(config(base, short, run, demonstrations=str(long), micro_batch_tokens=70))
    with pytest.raises(ValueError, match=r"line 1: the row's fields \(completion, prompt\) fit no schema; it needs prompt"):
        reward(config(base, long, run))
    bare = save_model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json in .*bare: put the model's tokenizer there"):
        reward(config(bare, rows, run))


@pytest.mark.parametrize("value", [-0.5, math.inf, math.nan])
def test_an_impossible_coefficient_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=f"center_rewards_coefficient must be at least 0 and finite, but it is {value}"):
        RewardConfig(center_rewards_coefficient=value)


# --- the command line ---------------------------------------------------------------------------------------


def test_the_command(base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["reward", "--help"])
    assert "--center_rewards_coefficient" in capsys.readouterr().out
    run, figures = tmp_path / "run", tmp_path / "figures.json"
    options = ["--model", str(base), "--data", str(rows), "--output_dir", str(run), "--json", str(figures), "--no_plot"]
    assert main(["reward", *options, "--no_margin"]) == 0
    written = json.loads(figures.read_text())
    assert {"command", "loss", "eval_loss", "eval_accuracy", "reward_bias", "folder", "format_version"} <= set(written)
    assert Model.from_pretrained(written["folder"]).reward_bias == written["reward_bias"]
    capsys.readouterr()
    assert main(["reward", *options]) == 2
    assert "tutelage reward: " in capsys.readouterr().err
