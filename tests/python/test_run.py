"""What the loops share: schedules, accumulation, metrics, signals, NaN (RELIABILITY row 9), pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tutelage import AdamW, Model, ModelConfig, PackedBatch, pack
from tutelage.files import newest_complete
from tutelage.objectives import cross_entropy
from tutelage.train import picture
from tutelage.train.configs import RunConfig
from tutelage.train.run import Interrupted, NonFiniteError, Run, open_run, schedule

CONFIG = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass
class Loop:
    """The smallest loop: one batch, over and over."""

    model: Model = dataclasses.field(default_factory=lambda: Model(CONFIG))
    batch: PackedBatch = dataclasses.field(default_factory=lambda: pack([[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12]]))
    max_tokens: int = 5

    def __post_init__(self) -> None:
        self.optimizer = AdamW(self.model, 1e-2)

    def objective(self, part: PackedBatch, denominator: int, _: range) -> torch.Tensor:
        return cross_entropy(self.model.score(part).logprobs, part.completion_mask, denominator)

    def step(self, run: Run, objective: Any = None) -> float:
        self.optimizer.zero_grad()
        loss = run.accumulate(self.model, self.batch, self.max_tokens, objective or self.objective)
        norm = run.update(self.optimizer)
        run.log(loss, 9, grad_norm=norm)
        return loss

    def run(self, config: RunConfig, last: int, fault: Any = lambda point: None) -> None:
        with open_run(config, fault=fault) as run:
            run.start(self.model, self.optimizer, "data")
            for _ in run.steps(last):
                self.step(run)
                run.end_step(self.model, self.optimizer, {})


def lines(folder: Path) -> list[dict[str, float]]:
    return picture.read_metrics(folder / "metrics.jsonl")


# --- schedules ----------------------------------------------------------------------------------------------


def test_the_schedules_at_their_corners() -> None:
    cosine = [schedule("cosine", step, 10, 2, 0.3, 0.1) for step in range(1, 11)]
    assert cosine[:2] == [0.5, 1.0]
    assert cosine[5] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1)
    wsd = [schedule("wsd", step, 10, 2, 0.5, 0.0) for step in range(1, 11)]
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.0])
    linear = [schedule("linear", step, 4, 0, 0.3, 0.2) for step in range(1, 6)]
    assert linear == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])  # the fifth: a step behind the last
    assert [schedule("linear", step, 4, 2, 0.3, 0.0) for step in range(1, 5)] == pytest.approx([0.5, 1, 2 / 3, 1 / 3])
    assert [schedule("constant", step, 4, 2, 0.3, 0.0) for step in range(1, 5)] == [0.5, 1, 1, 1]


@given(
    kind=st.sampled_from(["cosine", "wsd", "linear", "constant"]),
    steps=st.integers(1, 50),
    warmup=st.integers(0, 50),
    decay=st.floats(0, 1),
    least=st.floats(0, 1),
)
def test_a_schedule_rises_then_falls_and_stays_within_its_bounds(
    kind: str, steps: int, warmup: int, decay: float, least: float
) -> None:
    warmup = min(warmup, steps)
    rates = [schedule(kind, step, steps, warmup, decay, least) for step in range(1, steps + 1)]
    top = max(warmup - 1, 0)
    assert all(0 < rate <= 1 + 1e-12 for rate in rates[:top])
    assert rates[:top] == sorted(rates[:top])
    assert all(least - 1e-12 <= rate <= 1 + 1e-12 for rate in rates[top:])
    assert rates[top:] == sorted(rates[top:], reverse=True)


# --- one step -----------------------------------------------------------------------------------------------


def test_accumulation_over_micro_batches_gives_the_bits_of_one_batch(tmp_path: Path) -> None:
    """And the negative control: with each part's own denominator the gradient is another."""
    gradients = {}
    for name, max_tokens in {"whole": 12, "split": 5}.items():
        loop = Loop(max_tokens=max_tokens)
        with open_run(RunConfig(output_dir=str(tmp_path / name))) as run:
            run.accumulate(loop.model, loop.batch, max_tokens, loop.objective)
        gradients[name] = loop.model.grads.clone()
    assert torch.equal(gradients["whole"], gradients["split"])

    loop = Loop()

    def wrong(part: PackedBatch, denominator: int, sequences: range) -> torch.Tensor:
        return loop.objective(part, int(part.completion_mask.sum()), sequences)

    with open_run(RunConfig(output_dir=str(tmp_path / "wrong"))) as run:
        run.accumulate(loop.model, loop.batch, 5, wrong)
    assert not torch.equal(loop.model.grads, gradients["whole"])


def test_the_points_of_a_step_are_passed_in_order(tmp_path: Path) -> None:
    points: list[str] = []
    Loop().run(RunConfig(output_dir=str(tmp_path / "run"), logging_steps=1, save_steps=1), 1, points.append)
    assert points == ["micro-batch"] * 3 + ["updated", "logged", "saved"]


def test_metrics_hold_the_mean_loss_and_the_resolved_config_is_written(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    losses: list[float] = []
    loop = Loop()
    with open_run(RunConfig(output_dir=str(run_folder), logging_steps=2)) as run:
        run.start(loop.model, loop.optimizer, "data")
        for _ in run.steps(5):
            losses.append(loop.step(run))
            run.end_step(loop.model, loop.optimizer, {})
    written = lines(run_folder)
    assert [line["step"] for line in written] == [2, 4, 5]
    assert [line["loss"] for line in written] == [
        math.fsum(losses[0:2]) / 2,
        math.fsum(losses[2:4]) / 2,
        losses[4],
    ]
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert (config["format_version"], config["logging_steps"]) == (1, 2)


def test_metrics_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    config = RunConfig(output_dir=str(run_folder), logging_steps=1, save_steps=2)
    Loop().run(config, 6)
    whole = (run_folder / "metrics.jsonl").read_bytes()

    class StopError(Exception):
        pass

    updates: list[str] = []

    def stop_in_the_fourth_step(point: str) -> None:
        updates.extend([point] * (point == "logged"))
        if len(updates) == 5:
            raise StopError

    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    with pytest.raises(StopError):
        Loop().run(again, 6, stop_in_the_fourth_step)
    assert len(lines(tmp_path / "again")) == 5
    Loop().run(dataclasses.replace(again, resume="auto"), 6)
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == whole


# --- further models and the time's parts --------------------------------------------------------------------


def two_models(run: Run, last: int) -> list[torch.Tensor]:
    """Two loops in one run, the second one's model as a further one; the weights of both at the end."""
    first, second = Loop(), Loop(Model(CONFIG, seed=1))
    run.start(first.model, first.optimizer, "data", others={"critic": second.optimizer})
    for _ in run.steps(last):
        for loop in (first, second):
            loop.optimizer.zero_grad()
            run.accumulate(loop.model, loop.batch, 5, loop.objective)
        with run.timed("train"), run.timed("inner"):
            run.update(first.optimizer, second.optimizer)
        run.log(0.0, 9, "told in words")
        run.end_step(first.model, first.optimizer, {})
    return [first.model.params, second.model.params]


def test_a_further_model_is_saved_and_restored_with_its_optimizer(tmp_path: Path) -> None:
    """Negative control: one that is not, begins anew."""
    found = []
    for name, cuts in {"whole": (4,), "cut": (2, 4)}.items():
        for last in cuts:
            config = RunConfig(output_dir=str(tmp_path / name), resume="auto", logging_steps=1)
            with open_run(config) as run:
                params = two_models(run, last)
        found.append(params)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert not torch.equal(Loop(Model(CONFIG, seed=1)).model.params, found[0][1])


def test_no_model_is_updated_where_the_gradient_of_one_is_not_finite(tmp_path: Path) -> None:
    first, second = Loop(), Loop(Model(CONFIG, seed=1))
    before = [loop.model.params.clone() for loop in (first, second)]
    for loop in (first, second):
        loop.optimizer.zero_grad()
        loop.objective(loop.batch, 9, range(3)).backward()  # type: ignore[no-untyped-call]
    second.model.grads[3] = math.inf
    with (
        pytest.raises(NonFiniteError, match="is the first parameter whose gradient is not finite"),
        open_run(RunConfig(output_dir=str(tmp_path / "run"))) as run,
    ):
        run.update(first.optimizer, second.optimizer)
    assert all(torch.equal(a, loop.model.params) for a, loop in zip(before, (first, second), strict=True))


def test_the_parts_of_the_time_are_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part within another is the outer one's; what is left is other; without parts there is nothing."""
    with open_run(RunConfig(output_dir=str(tmp_path / "run"), logging_steps=2)) as run:
        two_models(run, 3)
        assert set(run.shares()) == {"train", "other"} and sum(run.shares().values()) == pytest.approx(1)
    output = capsys.readouterr().out
    assert "step 2/3  told in words  " in output and "  train " in output and "  other " in output
    timed = picture.read_metrics(tmp_path / "run" / "times.jsonl")
    assert [line["step"] for line in timed] == [2, 3] and set(timed[0]) == {"step", "seconds", "train", "other"}
    Loop().run(RunConfig(output_dir=str(tmp_path / "plain"), logging_steps=1), 1)
    assert not (tmp_path / "plain" / "times.jsonl").exists()


def test_another_figure_can_be_drawn_in_the_losses_place(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 9.0, "objective/scores": 1.0}\n{"step": 2, "objective/scores": 3.0}\n')
    assert picture.show(metrics, tmp_path / "x.png", "", "points", "objective/scores") == "scores 1.00 ▁█ 3.00"
    assert picture.show(metrics, tmp_path / "x.png", "", "points", "reward") == "reward: there is none"


# --- NaN and infinity ---------------------------------------------------------------------------------------


def poisoned(loop: Loop, stage: str) -> Any:
    """An objective that makes, or meets, a number that is not finite at the given stage."""

    def objective(part: PackedBatch, denominator: int, sequences: range) -> torch.Tensor:
        loss = loop.objective(part, denominator, sequences)
        if stage == "loss":
            return loss * float("nan")
        if stage == "gradient":
            return loss + _InfiniteGradient.apply(loss)
        return loss

    return objective


class _InfiniteGradient(torch.autograd.Function):
    """0, with an infinite derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("inf")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("loss", r"step 1: the loss is nan; the update was not applied\. Every log-prob is finite"),
        ("gradient", r"step 1: the gradient's norm is nan: .* is the first parameter whose gradient is not"),
        ("weight", r"step 1: the loss is nan; .* model\.norm\.weight is the first parameter that is not"),
        ("overflow", r"step 1: the loss is .*; .* Sequences 0, 1, 2 of the step have log-probs that are not"),
    ],
)
def test_a_number_that_is_not_finite_stops_before_the_update(tmp_path: Path, stage: str, message: str) -> None:
    loop = Loop(max_tokens=12)
    with torch.no_grad():
        if stage == "weight":
            dict(loop.model.named_parameters())["model.norm.weight"][3] = float("nan")
        if stage == "overflow":
            dict(loop.model.named_parameters())["lm_head.weight"].fill_(3e38)
    before = loop.model.params.clone()
    with (
        pytest.raises(NonFiniteError, match=message) as raised,
        open_run(RunConfig(output_dir=str(tmp_path / "run"))) as run,
    ):
        run.start(loop.model, loop.optimizer, "data")
        for _ in run.steps(2):
            loop.step(run, poisoned(loop, stage))
    assert "There is no checkpoint yet; a lower learning_rate" in str(raised.value)
    assert torch.equal(before.view(torch.int32), loop.model.params.view(torch.int32))
    assert loop.optimizer.steps == 0
    assert newest_complete(tmp_path / "run") is None


def test_a_reward_that_is_not_finite_is_named(tmp_path: Path) -> None:
    loop = Loop(Model(CONFIG, head="scalar"))

    def objective(part: PackedBatch, denominator: int, sequences: range, factor: float = 1.0) -> torch.Tensor:
        return part.last(loop.model.values(part)).sum() * factor

    with open_run(RunConfig(output_dir=str(tmp_path / "run"))) as run:
        with pytest.raises(NonFiniteError, match="Every reward is finite: the objective makes the number"):
            run.accumulate(loop.model, loop.batch, 5, lambda *given: objective(*given, factor=math.nan))
        with torch.no_grad():
            dict(loop.model.named_parameters())["score.weight"].fill_(3e38)
        with pytest.raises(NonFiniteError, match="Sequences 0 of the step have rewards that are not finite"):
            run.accumulate(loop.model, loop.batch, 5, objective)


def test_groups_are_never_cut_apart(tmp_path: Path) -> None:
    loop, seen = Loop(), []

    def objective(part: PackedBatch, denominator: int, sequences: range) -> torch.Tensor:
        seen.append(sequences)
        return loop.objective(part, denominator, sequences)

    with open_run(RunConfig(output_dir=str(tmp_path / "run"))) as run:
        run.accumulate(loop.model, loop.batch, 8, objective, [1, 2])
        run.accumulate(loop.model, loop.batch, 8, objective)
    assert seen == [range(1), range(1, 3), range(2), range(2, 3)]


# --- signals ------------------------------------------------------------------------------------------------


def test_a_signal_before_the_first_step_acts_at_once_and_handlers_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(Interrupted, match="stopped by SIGTERM before anything was saved") as raised,
        open_run(RunConfig(output_dir=str(tmp_path / "run"))),
    ):
        assert signal.getsignal(signal.SIGTERM) is not before
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was not delivered")
    assert raised.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with open_run(RunConfig(output_dir=str(tmp_path / "run"))):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# --- reports ------------------------------------------------------------------------------------------------


def test_tensorboard_is_refused_clearly_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.raises(ImportError, match=r"needs the tensorboard package: pip install 'tutelage\[log\]'"),
        open_run(RunConfig(output_dir=str(tmp_path / "run"), report_to="tensorboard")),
    ):
        pytest.fail("the run has begun")


def test_a_sparkline_shows_means_between_the_lowest_and_the_highest() -> None:
    assert picture.sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert picture.sparkline([8, 8, 1, 1], width=2) == "█▁"
    assert picture.sparkline([3.0]) == "▁"
    assert len(picture.sparkline(list(range(1000)))) == 60


def test_a_checkpoint_holds_the_losses_since_the_last_line_of_metrics(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    Loop().run(RunConfig(output_dir=str(run_folder), logging_steps=4, save_steps=3), 6)
    kept = [run_folder / "checkpoints" / f"step-0000000{step}" / "state.json" for step in (3, 6)]
    losses = [json.loads(path.read_text())["state"]["losses"] for path in kept]
    assert [len(window) for window in losses] == [3, 0]
