"""Learning from preferences: each loss is its paper's, starts where the reference stands, and ends in the same bits
through any kill, cut into whole pairs and thread count (P1, P4, P5; RELIABILITY row 1)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import signal
import weakref
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
    overflow,
    save_model,
    uninterrupted,
    weights,
    write_rows,
)
from tutelage import Model, load_preferences, load_unpaired, objectives, pack
from tutelage.cli import main
from tutelage.data.examples import Example
from tutelage.files import CheckpointError
from tutelage.train import reference
from tutelage.train.configs import DpoConfig, OrpoConfig
from tutelage.train.dpo import PreferenceResult, dpo, orpo
from tutelage.train.picture import read_metrics
from tutelage.train.run import NonFiniteError
from tutelage.train.tuning import packed

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
BETA = 0.3

# The options of every loss.
METHODS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "cdpo": {"label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "simpo_gamma": 0.7},
    "kto": {"loss_type": "kto", "desirable_weight": 1.2, "undesirable_weight": 0.8},
    "orpo": {},
}
every_method = pytest.mark.parametrize("method", METHODS)


def pairs() -> list[dict[str, Any]]:
    """Questions of several lengths; the better answer is a number."""
    return [
        {
            "prompt": f"{'say ' * (i % 4)}{i}",
            "chosen": f" it is {i * 7 % 10}",
            "rejected": f" it is{' so' * (i % 3 + 1)}",
            "weight": i % 3,
        }
        for i in range(24)
    ]


def marked() -> list[dict[str, Any]]:
    """The same answers one by one, those of one question together."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "weight": row["weight"]}
        for row in pairs()[:16]
        for side in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference with other weights."""
    return save_model(tmp_path_factory.mktemp("other") / "model", seed=7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows of both kinds."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "pairs.jsonl", pairs())
    write_rows(folder / "marked.jsonl", marked())
    return folder


def rows_of(method: str, data: Path) -> Path:
    return data / ("marked.jsonl" if method == "kto" else "pairs.jsonl")


def fields(method: str, base: Path, data: Path, folder: Path, **others: Any) -> dict[str, Any]:
    """Options of a short run: several micro-batches a step, saves beside the lines of metrics, a wrap of the epoch."""
    return {
        "output_dir": str(folder),
        "model": str(base),
        "data": [str(rows_of(method, data))],
        "eval_fraction": 0.2,
        "batch_size": 8,
        "micro_batch_tokens": 100,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "beta": BETA,
        "save_steps": 2,
        "logging_steps": 4,
        "eval_steps": 3,
        "plot": False,
        **METHODS[method],
        **others,
    }


def config(method: str, base: Path, data: Path, folder: Path, **others: Any) -> Any:
    values = fields(method, base, data, folder, **others)
    return (OrpoConfig if method == "orpo" else DpoConfig)(**{**values, "data": tuple(values["data"])})


def train(options: Any, objective: Any = None, **others: Any) -> PreferenceResult:
    loop: Any = orpo if isinstance(options, OrpoConfig) else dpo
    result: PreferenceResult = loop(options, objective, **others)
    return result


def run(method: str, base: Path, data: Path, folder: Path, **others: Any) -> PreferenceResult:
    return train(config(method, base, data, folder, **others))


def lines_of(folder: Path) -> list[dict[str, float]]:
    return read_metrics(folder / "metrics.jsonl")


# --- it learns ----------------------------------------------------------------------------------------------


def lead(folder: Path, data: Path) -> float:
    """By how much a model finds the better answers likelier, in nats per pair."""
    model = Model.from_pretrained(folder)
    assert model.tokenizer is not None
    loaded = load_preferences(data / "pairs.jsonl", model.tokenizer, 96).examples
    sums = reference.logps(model, packed([side for pair in loaded for side in (pair.chosen, pair.rejected)]), 8192)
    return float((sums[0::2] - sums[1::2]).mean())


@every_method
def test_it_learns_what_is_preferred(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    """Also of questions that it was never asked. Negative control: without steps it prefers neither."""
    result = run(method, base, data, tmp_path / "run", max_steps=40, logging_steps=1, eval_steps=40)
    assert lead(result.folder, data) > lead(base, data) + 2
    *_, stage = done_to(result.folder)
    assert stage.command == ("orpo" if method == "orpo" else "dpo") and stage.figures["steps"] == 40
    assert stage.figures["eval_loss"] == result.eval_loss and len(stage.figures["data"]) == 1
    lines = lines_of(tmp_path / "run")
    training = [line for line in lines if "loss" in line]
    assert training[-1]["rewards/margins"] > training[0]["rewards/margins"] + 0.1
    assert training[-1]["loss"] < training[0]["loss"]
    if method != "kto":
        assert result.eval_accuracy == 1 == lines[-1]["eval_rewards/accuracies"]


def test_what_it_is_told_turns_with_the_labels(base: Path, data: Path, tmp_path: Path) -> None:
    """The negative control of the test before: chosen and rejected exchanged."""
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    write_rows(swapped / "pairs.jsonl", [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs()])
    result = run("sigmoid", base, swapped, tmp_path / "run", max_steps=40)
    assert lead(result.folder, data) < lead(base, data) - 2


def test_a_run_is_told_in_words_figures_and_a_picture(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    result = run("sigmoid", base, data, tmp_path / "run", json=str(figures), plot=True)
    written = json.loads(figures.read_text())
    assert (written["command"], written["eval_accuracy"], written["tokens"]) == ("dpo", result.eval_accuracy, result.tokens)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "24 rows, 24 examples" in output and "of the pairs right on the held-out examples" in output
    assert "█" in output and "on the held-out examples (per example); " in output


PAIR_FIGURES = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")} | {
    "logps/chosen",
    "logps/rejected",
}
KTO_FIGURES = (PAIR_FIGURES - {"rewards/accuracies"}) | {"kl"}


@every_method
def test_what_is_measured(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    result = run(method, base, data, tmp_path / "run", logging_steps=1)
    names = KTO_FIGURES if method == "kto" else PAIR_FIGURES
    lines = lines_of(tmp_path / "run")
    training = [line for line in lines if "loss" in line]
    loop = {"step", "loss", "learning_rate", "grad_norm", "num_tokens", "epoch"}
    # A step of kto may have no answer of one kind.
    assert len(training) == STEPS and set().union(*training) == loop | names
    assert all(loop < set(line) for line in training)
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [3, 6]
    assert all(set(line) == {"step", "eval_loss", *(f"eval_{name}" for name in names)} for line in held_out)
    assert (result.eval_loss, result.eval_accuracy) == (lines[-1]["eval_loss"], lines[-1].get("eval_rewards/accuracies"))
    assert training[0]["epoch"] == 8 / result.examples and training[-1]["num_tokens"] == result.tokens


# --- the losses ---------------------------------------------------------------------------------------------


def log_probs(model: Model, examples: list[Example]) -> list[list[float]]:
    """Of the tokens that count, every sequence by itself."""
    found = []
    for example in examples:
        with torch.no_grad():
            logprobs = model.score(pack([example.tokens])).logprobs
        found.append(logprobs[torch.from_numpy(example.mask)].tolist())
    return found


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def expected_of_pairs(method: str, own: list[list[float]], known: list[list[float]]) -> float:
    losses = []
    for chosen, rejected, ref_chosen, ref_rejected in zip(own[0::2], own[1::2], known[0::2], known[1::2], strict=True):
        if method in ("sigmoid", "cdpo"):
            wrong = 0.1 if method == "cdpo" else 0.0
            h = BETA * ((sum(chosen) - sum(ref_chosen)) - (sum(rejected) - sum(ref_rejected)))
            losses.append(-(1 - wrong) * log_sigmoid(h) - wrong * log_sigmoid(-h))
        elif method == "ipo":
            h = (mean(chosen) - mean(ref_chosen)) - (mean(rejected) - mean(ref_rejected))
            losses.append((h - 1 / (2 * BETA)) ** 2)
        elif method == "simpo":
            losses.append(-log_sigmoid(BETA * (mean(chosen) - mean(rejected)) - 0.7))
        else:
            odds = [mean(side) - math.log(1 - math.exp(mean(side))) for side in (chosen, rejected)]
            losses.append(-mean(chosen) - BETA * log_sigmoid(odds[0] - odds[1]))
    return mean(losses)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "kto"])
def test_the_loss_of_pairs_is_the_papers(method: str, base: Path, other: Path, data: Path, tmp_path: Path) -> None:
    """Against a plain implementation, sequence by sequence; all rows in the one step, cut into micro-batches."""
    referenced = method not in ("simpo", "orpo")
    options = {"eval_fraction": 0.0, "batch_size": 24, "max_steps": 1, **({"ref_model": str(other)} if referenced else {})}
    result = run(method, base, data, tmp_path / "run", **options)
    model, known = Model.from_pretrained(base), Model.from_pretrained(other)
    assert model.tokenizer is not None
    loaded = load_preferences(data / "pairs.jsonl", model.tokenizer, 96).examples
    sequences = [side for pair in loaded for side in (pair.chosen, pair.rejected)]
    expected = expected_of_pairs(method, log_probs(model, sequences), log_probs(known, sequences))
    assert result.loss == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_kto_is_the_papers(base: Path, other: Path, data: Path, tmp_path: Path) -> None:
    """z0 over each prompt with the completion of the nearest row before that has another prompt."""
    options = {"eval_fraction": 0.0, "batch_size": 32, "max_steps": 1, "logging_steps": 1, "ref_model": str(other)}
    result = run("kto", base, data, tmp_path / "run", **options)
    model, known = Model.from_pretrained(base), Model.from_pretrained(other)
    assert model.tokenizer is not None
    loaded = load_unpaired(data / "marked.jsonl", model.tokenizer, 96).examples
    own = [row.example for row in loaded]
    mismatched = []
    for i, row in enumerate(own):
        # Rows 2 j and 2 j + 1 share a prompt: the nearest other is the second row of the pair before.
        completion = own[i // 2 * 2 - 1]
        end, begin = row.mask.tolist().index(True), completion.mask.tolist().index(True)
        tokens = [*row.tokens[:end].tolist(), *completion.tokens[begin:].tolist()]
        mask = [*row.mask[:end].tolist(), *completion.mask[begin:].tolist()]
        batch = pack([tokens], [mask])
        mismatched.append(Example(batch.tokens.numpy(), batch.completion_mask.numpy()))

    def ratios(examples: list[Example]) -> list[float]:
        both = zip(log_probs(model, examples), log_probs(known, examples), strict=True)
        return [sum(now) - sum(before) for now, before in both]

    z0 = max(0.0, mean(ratios(mismatched)))
    losses = [
        1.2 * (1 - 1 / (1 + math.exp(-BETA * (r - z0)))) if row.label else 0.8 * (1 - 1 / (1 + math.exp(-BETA * (z0 - r))))
        for row, r in zip(loaded, ratios(own), strict=True)
    ]
    assert result.loss == pytest.approx(mean(losses), rel=1e-5)
    assert lines_of(tmp_path / "run")[0]["kl"] == pytest.approx(z0, rel=1e-4, abs=1e-6)


def test_kto_needs_two_prompts(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "marked.jsonl", [{"prompt": "a", "completion": f" {i}", "label": i > 1} for i in range(4)])
    with pytest.raises(ValueError, match="kto compares a prompt with the completions of others, but there is only one prompt"):
        run("kto", base, tmp_path, tmp_path / "run", eval_fraction=0.0)


def test_at_step_0_every_margin_is_exactly_0(base: Path, other: Path, data: Path, tmp_path: Path) -> None:
    """And the loss log 2, to the last bit. Negative control: a reference of its own."""
    log_2 = -torch.nn.functional.logsigmoid(torch.zeros(1)).item()
    for tokens in (8192, 100):
        run("sigmoid", base, data, tmp_path / str(tokens), max_steps=1, logging_steps=1, micro_batch_tokens=tokens)
        first = lines_of(tmp_path / str(tokens))[0]
        assert (first["rewards/chosen"], first["rewards/rejected"], first["rewards/margins"]) == (0, 0, 0)
        assert first["loss"] == (log_2 if tokens == 8192 else pytest.approx(log_2, rel=1e-6))
    run("sigmoid", base, data, tmp_path / "other", max_steps=1, logging_steps=1, ref_model=str(other))
    assert lines_of(tmp_path / "other")[0]["rewards/margins"] != 0


def test_a_reference_that_is_named_is_the_same_as_none_where_it_is_the_same_model(
    base: Path, other: Path, data: Path, tmp_path: Path
) -> None:
    none = run("sigmoid", base, data, tmp_path / "none")
    assert weights(run("sigmoid", base, data, tmp_path / "same", ref_model=str(base)).folder) == weights(none.folder)
    assert weights(run("sigmoid", base, data, tmp_path / "other", ref_model=str(other)).folder) != weights(none.folder)


# --- the reference's log-probs ------------------------------------------------------------------------------


def references(folder: Path) -> list[Path]:
    return sorted((folder / "reference").iterdir())


def test_the_log_probs_of_the_reference_are_computed_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, changed = tmp_path / "run", tmp_path / "pairs.jsonl"
    write_rows(changed, pairs())
    calls: list[int] = []

    def counted(model: Model, batch: Any, *others: Any) -> torch.Tensor:
        calls.append(len(batch))
        return logps(model, batch, *others)

    logps = reference.logps
    monkeypatch.setattr(reference, "logps", counted)
    first = run("sigmoid", base, tmp_path, folder)
    assert calls == [48]  # held-out rows too
    (kept,) = references(folder)
    capsys.readouterr()
    again = run("sigmoid", base, tmp_path, folder, resume="auto")
    assert calls == [48] and f"reference log-probs: {kept}" in capsys.readouterr().out
    assert weights(again.folder) == weights(first.folder)
    # Other data is another key.
    write_rows(changed, pairs()[1:])
    with pytest.raises(ValueError, match="the data or the tokenizer is not what that run read"):
        run("sigmoid", base, tmp_path, folder, resume="auto")
    assert calls == [48, 46] and len(references(folder)) == 2


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: damage(folder / "tensors.safetensors"), "tensors.safetensors is damaged: its SHA-256 is"),
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
        (
            lambda folder: (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "files": {}})),
            "lists no tensors",
        ),
    ],
)
def test_log_probs_that_are_damaged_are_computed_again(
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], object],
    told: str,
) -> None:
    folder = tmp_path / "run"
    first = run("sigmoid", base, data, folder, max_steps=2)
    (kept,) = references(folder)
    before = (kept / "tensors.safetensors").read_bytes()
    harm(kept)
    capsys.readouterr()
    assert weights(run("sigmoid", base, data, folder, max_steps=2, resume="auto").folder) == weights(first.folder)
    output = capsys.readouterr().out
    assert told in output and "the reference log-probs are computed again" in output
    assert references(folder) == [kept] and (kept / "tensors.safetensors").read_bytes() == before


def test_log_probs_of_another_number_of_sequences_are_not_taken(base: Path, data: Path, tmp_path: Path) -> None:
    run("sigmoid", base, data, tmp_path / "run", max_steps=1)
    (kept,) = references(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is damaged: it does not hold 47 log-probs"):
        reference._load(kept, 47)


def test_a_loss_without_a_reference_computes_none(base: Path, data: Path, tmp_path: Path) -> None:
    for method in ("simpo", "orpo"):
        run(method, base, data, tmp_path / method, max_steps=1)
        assert not (tmp_path / method / "reference").exists()


def test_the_reference_model_is_freed_before_the_first_step(
    base: Path, other: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Model]] = []
    load = Model.from_pretrained.__func__  # type: ignore[attr-defined]

    def watched(cls: type[Model], *options: Any, **others: Any) -> Model:
        model: Model = load(cls, *options, **others)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Model, "from_pretrained", classmethod(watched))
    alive: list[list[bool]] = []

    def look(point: str) -> None:
        alive.append([model() is not None for model in loaded])

    train(config("sigmoid", base, data, tmp_path / "run", max_steps=1, ref_model=str(other)), fault=look)
    assert alive[0] == [True, False]  # the model that learns, the reference


def test_a_reference_that_gives_no_numbers_is_an_error(base: Path, data: Path, tmp_path: Path) -> None:
    broken = Model.from_pretrained(base)
    overflow(broken)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match="the reference model's log-prob of sequence 0 is nan: its weights are damaged"):
        run("sigmoid", base, data, tmp_path / "run", ref_model=str(tmp_path / "broken"))


def test_log_probs_are_the_same_bits_packed_or_one_by_one(base: Path) -> None:
    model = Model.from_pretrained(base)
    batch = pack([[5, 6, 7, 8], [9, 10, 11], [5, 6], [1, 2, 3, 4, 5, 6, 7]])
    alone = [reference.logps(model, part, 100) for part in batch.split(7)]
    seen: list[int] = []
    assert (
        bits(reference.logps(model, batch, 100))
        == bits(reference.logps(model, batch, 1, seen.append))
        == bits(torch.cat(alone))
    )
    assert seen == [2, 3, 4]


# --- the same bits ------------------------------------------------------------------------------------------


@every_method
def test_any_cut_into_whole_pairs_and_any_number_of_threads_end_in_the_same_model(
    method: str, base: Path, other: Path, data: Path, tmp_path: Path
) -> None:
    """Packed together, cut into a few, pair by pair. Negative control: another order of the data."""
    options = {} if method in ("simpo", "orpo") else {"ref_model": str(other)}
    found = set()
    for number, (tokens, count) in enumerate([(8192, 1), (100, 2), (60, 3)]):
        with threads(count):
            result = run(method, base, data, tmp_path / str(number), micro_batch_tokens=tokens, **options)
        found.add((weights(result.folder), result.eval_loss, result.eval_accuracy))
    assert len(found) == 1
    assert weights(run(method, base, data, tmp_path / "other", seed=1, **options).folder) != weights(result.folder)


# --- P5 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("children"), "children", "torch._dynamo") as parent:
        yield parent


SELECT = {"select_by": "eval_loss"}


def loop_of(method: str) -> str:
    return "orpo" if method == "orpo" else "dpo"


Wholes = Callable[[str], Whole]


@pytest.fixture(scope="module")
def wholes(children: Forker, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """An uninterrupted run of a method, made when it is asked for."""
    made: dict[str, Whole] = {}

    def whole(method: str) -> Whole:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            options = fields(method, base, data, folder, **SELECT)
            made[method] = uninterrupted(children, loop_of(method), options)
        return made[method]

    return whole


Killed = Callable[..., str]


@pytest.fixture
def killed(children: Forker, base: Path, data: Path, tmp_path: Path) -> Killed:
    """The digest of a run that is killed once and resumed."""
    numbers = itertools.count()

    def end(method: str, kill: dict[str, int], **others: Any) -> str:
        options = fields(method, base, data, tmp_path / f"run-{next(numbers)}", **SELECT)
        return killed_and_resumed(children, loop_of(method), options, kill, **others)

    return end


def test_a_kill_changes_no_bit(wholes: Wholes, killed: Killed) -> None:
    moments, whole = random.Random(1), wholes("sigmoid")
    assert killed("sigmoid", {"point": moments.randint(1, whole.points)}) == whole.digest
    assert killed("sigmoid", {"operation": moments.randint(1, whole.operations)}, threads=2) == whole.digest


def test_a_kill_while_the_reference_is_written_changes_no_bit(wholes: Wholes, killed: Killed) -> None:
    """Its files are among the first of a run to be written."""
    for operation in (3, 6, 9):
        assert killed("sigmoid", {"operation": operation}) == wholes("sigmoid").digest


@kill_rounds(2, 10)
@every_method
def test_many_kills(method: str, wholes: Wholes, killed: Killed, rounds: int) -> None:
    moments, whole = random.Random(rounds), wholes(method)
    for _ in range(rounds):
        assert killed(method, {"point": moments.randint(1, whole.points)}) == whole.digest
        assert killed(method, {"operation": moments.randint(1, whole.operations)}) == whole.digest


def test_a_resume_that_forgets_where_the_data_was_ends_elsewhere(wholes: Wholes, killed: Killed) -> None:
    """The negative control of the kill tests."""
    whole = wholes("sigmoid")
    assert killed("sigmoid", {"point": whole.points * 3 // 4}, forget_cursor=True) != whole.digest


def test_ctrl_c_lets_the_step_finish_and_a_resume_changes_no_bit(
    children: Forker, base: Path, data: Path, wholes: Wholes, tmp_path: Path
) -> None:
    options = fields("sigmoid", base, data, tmp_path / "run", **SELECT)
    signals = {"name": "updated", "point": 3, "number": signal.SIGINT}
    status, output = children.run("children:command", loop="dpo", config=options, **signals)
    assert status == 128 + signal.SIGINT
    assert "stopped by SIGINT after step 3, which is saved" in output
    status, output = children.run("children:train", loop="dpo", config={**options, "resume": "auto"})
    assert status == 0, output
    assert digest(tmp_path / "run", STEPS) == wholes("sigmoid").digest


def test_a_resume_from_other_models_is_refused(data: Path, tmp_path: Path) -> None:
    base, known = save_model(tmp_path / "base"), save_model(tmp_path / "known", seed=1)
    options = {"max_steps": 1, "ref_model": str(known)}
    run("sigmoid", base, data, tmp_path / "run", **options)
    run("sigmoid", base, data, tmp_path / "run", **options, resume="auto")
    save_model(known, seed=2)
    with pytest.raises(ValueError, match="the reference model is not what that run used; bring it back, or start a new run"):
        run("sigmoid", base, data, tmp_path / "run", **options, resume="auto")
    save_model(known, seed=1)
    save_model(base, seed=3)
    with pytest.raises(ValueError, match="the model to start from is not what that run started from"):
        run("sigmoid", base, data, tmp_path / "run", **options, resume="auto")


def test_the_model_of_the_lowest_held_out_loss_is_saved(base: Path, data: Path, tmp_path: Path) -> None:
    options = {"eval_steps": 1, "learning_rate": 5e-2, "max_steps": 10, "min_lr_ratio": 1.0}
    best = run("ipo", base, data, tmp_path / "best", **options, **SELECT)
    lowest = min((line for line in lines_of(tmp_path / "best") if "eval_loss" in line), key=lambda line: line["eval_loss"])
    assert (best.selected_step, best.eval_loss) == (lowest["step"], lowest["eval_loss"])
    assert best.eval_accuracy == lowest["eval_rewards/accuracies"]
    assert best.selected_step < best.steps
    short = run("ipo", base, data, tmp_path / "short", **{**options, "max_steps": best.selected_step})
    assert weights(short.folder) == weights(best.folder)


# --- a loss of one's own ------------------------------------------------------------------------------------


def same_dpo(out: Any, batch: Any, columns: Any) -> torch.Tensor:
    sums = batch.sum(out.logprobs)
    known = columns["ref_chosen"], columns["ref_rejected"]
    return objectives.dpo(sums[0::2], sums[1::2], *known, BETA, denominator=columns["denominator"])


def same_kto(out: Any, batch: Any, columns: Any) -> torch.Tensor:
    known = columns["ref_logps"], columns["desirable"], columns["z0"]
    return objectives.kto(batch.sum(out.logprobs), *known, BETA, 1.2, 0.8, columns["denominator"])


def weighted(out: Any, batch: Any, columns: Any) -> torch.Tensor:
    """By a field of the rows: wrong where the columns are not those of the micro-batch's pairs."""
    sums = batch.sum(out.logprobs)
    losses = -torch.nn.functional.logsigmoid(BETA * (sums[0::2] - sums[1::2]))
    return torch.dot(losses, torch.tensor(columns["weight"], dtype=torch.float32)) / columns["denominator"]


@pytest.mark.parametrize(("method", "objective"), [("sigmoid", same_dpo), ("kto", same_kto)])
def test_an_objective_that_computes_the_same_ends_in_the_same_bits(
    method: str, objective: Any, base: Path, other: Path, data: Path, tmp_path: Path
) -> None:
    options = {"ref_model": str(other)}
    built_in = run(method, base, data, tmp_path / "built-in", **options)
    called = train(config(method, base, data, tmp_path / "called", **options), objective)
    named = run(method, base, data, tmp_path / "named", **options, objective=f"{__file__}:{objective.__name__}")
    assert weights(called.folder) == weights(named.folder) == weights(built_in.folder)
    assert called.eval_loss == built_in.eval_loss


@pytest.mark.parametrize("method", ["sigmoid", "orpo"])
def test_an_objective_gets_the_fields_of_its_pairs(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    """Whatever the cut."""
    rows = [{**row, "margin": 0.5} for row in pairs()]
    write_rows(tmp_path / "pairs.jsonl", rows)
    found: dict[str, list[int]] = {}
    for name, tokens in {"whole": 8192, "cut": 100}.items():
        seen: list[list[int]] = []

        def objective(out: Any, batch: Any, columns: Any, seen: list[list[int]] = seen) -> torch.Tensor:
            assert 2 * len(columns["weight"]) == len(batch) and columns["denominator"] == 8
            assert columns["margin"] == [0.5] * len(columns["weight"])
            assert ("ref_chosen" in columns) == (method == "sigmoid")
            seen.append(columns["weight"])
            return weighted(out, batch, columns)

        train(config(method, base, tmp_path, tmp_path / name, max_steps=1, micro_batch_tokens=tokens), objective)
        assert (len(seen) == 1) == (name == "whole")
        found[name] = [weight for part in seen for weight in part]
    assert found["whole"] == found["cut"] and len(found["whole"]) == 8 and len(set(found["whole"])) > 1


def test_an_objective_that_returns_something_else_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the objective must return a scalar tensor, but it returned float"):
        train(config("orpo", base, data, tmp_path / "run"), lambda out, batch, columns: 1.0)


# --- errors -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="nothing to learn from; pass preferences, as in `tutelage dpo --data"):
        train(DpoConfig(output_dir=str(folder)))
    with pytest.raises(ValueError, match="as in `tutelage orpo --data"):
        train(OrpoConfig(output_dir=str(folder)))
    with pytest.raises(ValueError, match=r"line 1: the responses, .* have \d+ tokens, more than micro_batch_tokens = 5: raise"):
        run("sigmoid", base, data, folder, micro_batch_tokens=5)
    named = write_rows(tmp_path / "named.jsonl", [{**pairs()[0], "ref_chosen": 1}])
    with pytest.raises(ValueError, match=r"line 1: the field 'ref_chosen' has a meaning to objectives: give it another"):
        train(DpoConfig(output_dir=str(folder), model=str(base), data=(str(named),), eval_fraction=0.0), same_dpo)
    with pytest.raises(ValueError, match=r"the row's fields .* fit no schema; it needs prompt \+ completion \+ label"):
        run("sigmoid", base, data, folder, loss_type="kto")
    scalar = save_model(tmp_path / "scalar", head="scalar")
    with pytest.raises(ValueError, match="holds a reward model, and a reference must be a language model"):
        run("sigmoid", base, data, folder, ref_model=str(scalar))
    with pytest.raises(ValueError, match="holds a reward model, and fine-tuning needs a language model"):
        run("sigmoid", scalar, data, folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 400, r"the reference .* has 400 tokens, the model \d+: both must have the same tokenizer"),
        ("max_position_embeddings", 48, "the reference .* reads at most 48 tokens, but max_length is 96: lower it"),
    ],
)
def test_a_reference_that_does_not_fit_is_named(
    base: Path, data: Path, tmp_path: Path, field: str, value: int, message: str
) -> None:
    shape = Model.from_pretrained(base).config
    Model(dataclasses.replace(shape, **{field: value})).save_pretrained(tmp_path / "known")
    with pytest.raises(ValueError, match=message):
        run("sigmoid", base, data, tmp_path / "run", ref_model=str(tmp_path / "known"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, but it is 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, but it is 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing belongs to loss_type sigmoid, not to ipo"),
        ({"simpo_gamma": -1.0}, "simpo_gamma must be at least 0, but it is -1.0"),
        ({"desirable_weight": -1.0}, "desirable_weight must be at least 0, but it is -1.0"),
        ({"undesirable_weight": -1.0}, "undesirable_weight must be at least 0, but it is -1.0"),
        ({"loss_type": "simpo", "ref_model": "x"}, "simpo has no reference: leave ref_model out"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DpoConfig(**options)


def test_messages_are_rendered_and_the_end_of_their_turns_is_saved(base: Path, tmp_path: Path) -> None:
    talks = [
        {"prompt": turns(f"say {i}"), "chosen": [turns("", f"{i}")[1]], "rejected": [turns("", "no")[1]]} for i in range(4)
    ]
    write_rows(tmp_path / "pairs.jsonl", talks)
    result = run("sigmoid", base, tmp_path, tmp_path / "run", max_steps=1, eval_fraction=0.0)
    assert len(Model.from_pretrained(result.folder).eos_token_ids) == 2 and len(Model.from_pretrained(base).eos_token_ids) == 1


# --- the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["dpo", "orpo"])
def test_the_commands(command: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    told = capsys.readouterr().out
    assert "--beta" in told and ("--loss_type" in told) == (command == "dpo")
    folder, figures = tmp_path / "run", tmp_path / "figures.json"
    rows = str(data / "pairs.jsonl")
    options = ["--model", str(base), "--data", rows, "--output_dir", str(folder), "--json", str(figures), "--no_plot"]
    assert main([command, *options]) == 0
    written = json.loads(figures.read_text())
    assert written["command"] == command
    assert {"loss", "eval_loss", "eval_accuracy", "tokens", "tokens_per_second", "format_version"} <= set(written)
    assert bits(Model.from_pretrained(written["folder"]).params) != bits(Model.from_pretrained(base).params)
    capsys.readouterr()
    assert main([command, *options]) == 2
    assert f"tutelage {command}: " in capsys.readouterr().err
