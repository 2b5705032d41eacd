"""GRPO, DAPO's token mean, Dr. GRPO and RLOO: gradients of a plain float64 version, several answers a prompt, the same bits
through any kill, cut and thread count (P1–P5; RELIABILITY rows 1, 9, 15)."""

from __future__ import annotations

import dataclasses
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
from torch import Tensor

from forked import Forker, forker
from models_for_tests import bits, threads
from runs_for_tests import Whole, digest, done_to, kill_rounds, killed_and_resumed, uninterrupted, weights
from trying_for_tests import (
    ANSWER,
    Watched,
    close,
    save_judge,
    save_policy,
    save_prompts,
    sequences_of,
    state_of,
    watching,
)
from tutelage import Model, pack
from tutelage.cli import main
from tutelage.train import grpo as loop
from tutelage.train.configs import GrpoConfig
from tutelage.train.experience import TryingResult, mini_batches
from tutelage.train.grpo import grpo
from tutelage.train.picture import read_metrics
from tutelage.train.run import NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
HERE = Path(__file__).with_name("rewards_for_tests.py")
BETA = 0.3

# The options of every loss, with a KL.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "batch": {"scale_rewards": "batch"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "rloo": {"loss_type": "rloo"},
}
every_method = pytest.mark.parametrize("method", METHODS)


@dataclasses.dataclass(frozen=True)
class World:
    """Folders of a policy, a reward model, another language model, and a file of prompts."""

    policy: Path
    judge: Path
    other: Path
    data: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(
        save_policy(folder / "policy"),
        save_judge(folder / "judge", bias=0.25),
        save_policy(folder / "other", seed=7),
        save_prompts(folder),
    )


def fields(world: World, folder: Path, **others: Any) -> dict[str, Any]:
    """Options of a short run: several updates a step and micro-batches an update, saves beside the lines of metrics."""
    return {
        "output_dir": str(folder),
        "model": str(world.policy),
        "reward_model": str(world.judge),
        "data": [str(world.data)],
        "eval_fraction": 0.1,
        "batch_size": 3,
        "num_generations": 4,
        "num_mini_batches": 2,
        "num_iterations": 2,
        "micro_batch_tokens": 60,
        "max_completion_length": ANSWER,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "save_steps": 2,
        "logging_steps": 3,
        "eval_steps": 2,
        "plot": False,
        **others,
    }


def config(world: World, folder: Path, **others: Any) -> GrpoConfig:
    values = fields(world, folder, **others)
    return GrpoConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def run(world: World, folder: Path, **others: Any) -> TryingResult:
    return grpo(config(world, folder, **others))


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@dataclasses.dataclass(frozen=True)
class Course:
    """A run that was watched, and its folder and options."""

    watched: Watched
    folder: Path
    config: GrpoConfig
    result: TryingResult


Watch = Callable[..., Course]
FULL: dict[str, Any] = {
    "temperature": 0.7,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 2e-2,
    "epsilon": 0.1,
    "eval_fraction": 0.0,
    "lr_scheduler_type": "constant",
    "beta": BETA,
}


@pytest.fixture(scope="module")
def watch(world: World, tmp_path_factory: pytest.TempPathFactory) -> Watch:
    """Runs and watches with these options; the same ones only once."""
    made: dict[str, Course] = {}

    def watch(**others: Any) -> Course:
        key = repr(sorted(others.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("watched")
            known = {"ref_model": str(world.other)} if others.get("beta", BETA) else {}
            options = config(world, folder, **{**FULL, **known, **others})
            with threads(1), watching(loop, "advantages_of", "ppo_policy") as watched:
                result = grpo(options)
            made[key] = Course(watched, folder, options, result)
        return made[key]

    return watch


# --- against a plain version --------------------------------------------------------------------------------


def plain_advantages(options: GrpoConfig, scores: Tensor) -> Tensor:
    """Of full groups of 4, float64."""
    groups = scores.view(-1, 4)
    if options.loss_type == "rloo":
        others = torch.stack([(group.sum() - group) / 3 for group in groups])
        return (groups - others).view(-1)
    centred = groups - groups.mean(1, keepdim=True)
    if options.scale_rewards == "batch":
        return (centred / (scores.std() + 1e-4)).view(-1)
    if options.loss_type == "dr_grpo":
        return centred.view(-1)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def plain_loss(
    options: GrpoConfig,
    sequences: list[list[int]],
    starts: list[int],
    drawn: list[Tensor],
    known: list[Tensor],
    advantages: Tensor,
    part: list[int],
    policy: Model,
) -> Tensor:
    """Of a mini-batch, answer by answer."""
    losses, tokens = [], 0
    low, high = 1 - options.epsilon, 1 + options.epsilon
    for s in part:
        start, advantage = starts[s], advantages[s]
        logprobs = policy.score(pack([sequences[s]]), options.temperature).logprobs[start:]
        tokens += len(logprobs)
        if options.loss_type == "rloo":
            ratio = (logprobs.sum() - drawn[s].sum()).exp()
            losses.append(-torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage))
            continue
        ratio = (logprobs - drawn[s]).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        apart = known[s] - logprobs
        of_tokens = -surrogate + options.beta * (apart.exp() - apart - 1)
        losses.append(of_tokens.mean() if options.loss_type == "grpo" else of_tokens.sum())
    total = torch.stack(losses).sum()
    return total / {"dapo": tokens, "dr_grpo": len(part) * ANSWER}.get(options.loss_type, len(part))


@every_method
def test_gradients_of_every_update_are_those_of_a_plain_version(method: str, world: World, watch: Watch) -> None:
    """In float64, to 1e-5, with clipping and a reference at work. Negative control: another clip, another KL."""
    course = watch(**METHODS[method])
    updates = iter(course.watched.updates)
    reference, judge = Model.from_pretrained(world.other).double(), Model.from_pretrained(world.judge).double()
    policy = Model.from_pretrained(world.policy)
    for step, answers in enumerate(course.watched.answers, 1):
        sequences, old = sequences_of(answers), policy.double()
        starts = [len(prompt) for prompt in answers.rollouts.prompts]
        scores, drawn, known = [], [], []
        for tokens, start in zip(sequences, starts, strict=True):
            scores.append(judge.values(pack([tokens])).detach()[-1])
            drawn.append(old.score(pack([tokens]), 0.7).logprobs[start:].detach())
            known.append(reference.score(pack([tokens]), 0.7).logprobs[start:].detach())
        assert close(torch.cat(answers.rollouts.logprobs), torch.cat(drawn))
        assert close(answers.scores, torch.stack(scores))
        rewards = torch.stack(scores)
        if method == "rloo":
            rewards = rewards - BETA * torch.stack([(a - b).sum() for a, b in zip(drawn, known, strict=True)])
        advantages, losses = plain_advantages(course.config, rewards), []
        for epoch in range(2):
            for part in mini_batches(12, 2, f"0 {step} {epoch}"):
                exact = policy.double()
                loss = plain_loss(course.config, sequences, starts, drawn, known, advantages, part, exact)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.item())
                update = next(updates)
                assert bits(update.params) == bits(policy.params) and close(update.grads, exact.grads)
                with torch.no_grad():
                    policy.params.copy_(update.after)
        assert lines_of(course.folder)[step - 1]["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert next(updates, None) is None and lines_of(course.folder)[-1]["policy/clipfrac_avg"] > 0
    for wrong in ({"epsilon": 1e9}, {"beta": 0.6}):
        if method != "rloo" or "epsilon" in wrong:
            before = Model.from_pretrained(world.policy).double()
            with torch.no_grad():
                before.params.copy_(update.params)
            changed = dataclasses.replace(course.config, **wrong)
            loss = plain_loss(changed, sequences, starts, drawn, known, advantages, part, before)
            loss.backward()  # type: ignore[no-untyped-call]
            assert not close(update.grads, before.grads, 1e-3)


def test_the_methods_differ(watch: Watch) -> None:
    """As do what the papers leave out."""
    courses = {method: watch(**options) for method, options in METHODS.items()}
    courses["scaled"] = watch(loss_type="dr_grpo", scale_rewards="group")
    found = {bits(course.watched.updates[0].grads) for course in courses.values()}
    assert len(found) == len(courses)
    same = watch(loss_type="rloo", scale_rewards="none")
    assert bits(same.watched.updates[0].grads) == bits(courses["rloo"].watched.updates[0].grads)


# --- rollouts and ratios ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_detail_24_first_ratio_is_exactly_one(method: str, watch: Watch) -> None:
    """On every token (of rloo: answer) of each step's first update. Negative control: the second."""
    course = watch(**METHODS[method], micro_batch_tokens=8192)
    calls = course.watched.calls["ppo_policy"]
    assert len(calls) == 8  # one for each of 2 steps · 2 epochs · 2 mini-batches
    for number, ((logprobs, old, _, mask, *_), _) in enumerate(calls):
        same = bool((torch.exp(logprobs.detach()[mask] - old[mask]) == 1).all())
        assert same == (number % 4 == 0)


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_no_log_prob_is_computed_again(beta: float, watch: Watch) -> None:
    """Forwards of one step, without gradient: one of the reward model, and one of the reference where there is one."""
    course = watch(micro_batch_tokens=8192, max_steps=1, beta=beta)
    names = [f"{head} {'learns' if gradient else 'once'}" for head, _, gradient in course.watched.forwards]
    assert names == ["scalar once", *(["lm once"] if beta else []), *["lm learns"] * 4]
    policy = next(model for head, model, gradient in course.watched.forwards if head == "lm" and gradient)
    assert policy not in {model for head, model, gradient in course.watched.forwards if not gradient}


def test_the_answers_to_a_prompt_stand_together_and_differ(watch: Watch) -> None:
    for answers in watch().watched.answers:
        assert answers.groups == [0] * 4 + [1] * 4 + [2] * 4
        for first in (0, 4, 8):
            assert len({id(prompt) for prompt in answers.prompts[first : first + 4]}) == 1
            assert len({tuple(tokens.tolist()) for tokens in answers.rollouts.tokens[first : first + 4]}) == 4


def test_answers_without_a_score_are_left_out_of_their_groups(world: World, tmp_path: Path) -> None:
    """A group is compared among the rest; a single answer with nothing, so it is left out too; a step may be empty."""
    options: dict[str, Any] = {"reward_model": None, "max_steps": 1, "logging_steps": 1, "eval_fraction": 0.0, "batch_size": 8}
    with watching(loop, "advantages_of") as watched:
        result = run(world, tmp_path / "run", **options, reward_funcs=[f"{HERE}:odd_lengths"])
    ((_, answers, _), (whole, _)) = watched.calls["advantages_of"][0]
    given = watched.answers[0]
    assert len(given) < 32 and all(len(text) % 2 for text in given.rollouts.texts or [])
    counts = [given.groups.count(group) for group in range(8)]
    assert min(counts) < 4 and result.episodes == len(answers) == sum(count for count in counts if count > 1)
    for group in set(answers.groups):
        rows = [row for row, own in enumerate(answers.groups) if own == group]
        scores = answers.scores[rows]
        expected = (scores - scores.mean()) / (scores.std() + 1e-4)
        ends = answers.batch.cu_seqlens[1:].long()[rows] - 1
        assert torch.allclose(whole.columns["advantages"][ends].double(), expected, atol=1e-5)
    assert lines_of(tmp_path / "run")[0]["episode"] == len(answers)
    with watching(loop) as watched:
        assert run(world, tmp_path / "none", **options, reward_funcs=[f"{HERE}:none"]).episodes == 0
    assert not watched.updates


def test_a_group_of_equal_scores_teaches_nothing(world: World, tmp_path: Path) -> None:
    options = {"reward_model": None, "reward_funcs": [f"{HERE}:always_one"], "max_steps": 1, "logging_steps": 1}
    result = run(world, tmp_path / "run", **options)
    line = lines_of(tmp_path / "run")[0]
    assert (line["reward"], line["reward_std"], line["frac_reward_zero_std"], line["loss"], line["grad_norm"]) == (
        1,
        0,
        1,
        0,
        0,
    )
    assert done_to(result.folder)[-1].command == "grpo"
    assert bits(Model.from_pretrained(result.folder).params) == bits(Model.from_pretrained(world.policy).params)


NAMED = {
    *(f"policy/{name}" for name in ("approxkl_avg", "clipfrac_avg", "entropy_avg")),
    *(f"val/{name}" for name in ("ratio", "ratio_var", "num_eos_tokens")),
    *(f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio")),
    *("reward", "reward_std", "frac_reward_zero_std", "kl"),
    *("episode", "epoch", "learning_rate", "grad_norm", "num_tokens", "loss", "step"),
}


@every_method
def test_what_is_measured(method: str, watch: Watch) -> None:
    course = watch(**METHODS[method])
    for step, line in enumerate(lines_of(course.folder)):
        assert set(line) == NAMED
        answers = course.watched.answers[step]
        (_, _, known), _ = course.watched.calls["advantages_of"][step]
        batch = answers.batch
        assert batch.logprobs is not None and line["episode"] == 12 * (step + 1)
        apart = torch.where(batch.completion_mask, batch.logprobs.double() - known.double(), 0)
        kl = torch.stack([x.sum() for x in torch.split(apart, batch.lengths)])
        assert line["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
        assert line["reward"] == pytest.approx(answers.scores.mean().item())
        rewards = answers.scores - BETA * kl if method == "rloo" else answers.scores
        assert line["reward_std"] == pytest.approx(rewards.view(3, 4).std(1).mean().item())
    assert "kl" not in lines_of(watch(**METHODS[method], beta=0.0).folder)[0]


# --- it learns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "dapo", "dr_grpo", "rloo"])
def test_it_learns_what_is_rewarded(method: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a critic. Negative control: the first steps."""
    options = {"reward_model": None, "reward_funcs": [f"{HERE}:ascii_only"], "num_iterations": 1, "num_mini_batches": 1}
    sizes = {"max_steps": 30, "batch_size": 6, "learning_rate": 3e-2, "micro_batch_tokens": 8192, "eval_steps": 30}
    told = {"logging_steps": 1, "plot": True, "json": str(tmp_path / "figures.json")}
    result = run(world, tmp_path / "run", **METHODS[method], **options, **sizes, **told)
    scores = [line["reward"] for line in lines_of(tmp_path / "run")]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.25
    output = capsys.readouterr().out
    assert "step 30/30  reward " in output and "rollout " in output and "█" in output and " → " in output
    written = json.loads((tmp_path / "figures.json").read_text())
    assert (written["command"], written["score"], written["episodes"]) == ("grpo", result.score, 30 * 24)


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_any_cut_and_any_number_of_threads_end_in_the_same_state(method: str, world: World, tmp_path: Path) -> None:
    """Negative control: another seed."""
    found = set()
    options: dict[str, Any] = {**METHODS[method], "beta": BETA, "select_by": "eval_reward"}
    for number, (tokens, count) in enumerate([(8192, 1), (60, 2), (24, 3), (100, 4)]):
        with threads(count):
            run(world, tmp_path / str(number), **options, micro_batch_tokens=tokens)
        found.add(state_of(tmp_path / str(number)))
    assert len(found) == 1
    run(world, tmp_path / "other", **options, seed=1)
    assert state_of(tmp_path / "other") not in found


# --- P5 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("children"), "children", "torch._dynamo") as parent:
        yield parent


JUDGED: dict[str, Any] = {"beta": BETA, "select_by": "eval_reward", "reward_funcs": [f"{HERE}:letters"]}


@pytest.fixture(scope="module")
def whole(children: Forker, world: World, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return uninterrupted(children, "grpo", fields(world, tmp_path_factory.mktemp("whole"), **JUDGED))


Killed = Callable[..., str]


@pytest.fixture
def killed(children: Forker, world: World, tmp_path: Path) -> Killed:
    """The digest of a run that is killed once and resumed."""
    numbers = itertools.count()

    def end(kill: dict[str, Any], **others: Any) -> str:
        options = fields(world, tmp_path / f"run-{next(numbers)}", **JUDGED)
        return killed_and_resumed(children, "grpo", options, kill, **others)

    return end


def test_a_kill_changes_no_bit(whole: Whole, killed: Killed) -> None:
    """Also between rollout and update."""
    assert killed({"name": "rollout", "point": 4}, threads=2) == whole.digest
    assert killed({"operation": random.Random(1).randint(1, whole.operations)}) == whole.digest


def test_a_resume_that_forgets_where_the_data_was_ends_elsewhere(whole: Whole, killed: Killed) -> None:
    """The negative control of the kill tests."""
    assert killed({"name": "scored", "point": 4}, forget_cursor=True) != whole.digest


@kill_rounds(2, 25)
def test_many_kills(whole: Whole, killed: Killed, rounds: int) -> None:
    moments = random.Random(rounds)
    for point in ("rollout", "scored", "updated"):
        assert killed({"name": point, "point": moments.randint(2, 5)}) == whole.digest
    for _ in range(rounds):
        assert killed({"point": moments.randint(1, whole.points)}, threads=2) == whole.digest
        assert killed({"operation": moments.randint(1, whole.operations)}) == whole.digest


def test_ctrl_c_lets_the_step_finish_and_a_resume_changes_no_bit(
    children: Forker, world: World, whole: Whole, tmp_path: Path
) -> None:
    options = fields(world, tmp_path / "run", **JUDGED)
    status, output = children.run(
        "children:command", loop="grpo", config=options, name="rollout", point=2, number=signal.SIGINT
    )
    assert status == 128 + signal.SIGINT
    assert "stopped by SIGINT after step 2, which is saved" in output
    status, output = children.run("children:train", loop="grpo", config={**options, "resume": "auto"})
    assert status == 0, output
    assert digest(tmp_path / "run", STEPS) == whole.digest


def test_a_resume_from_other_models_is_refused(world: World, tmp_path: Path) -> None:
    known, judge = save_policy(tmp_path / "known", seed=1), save_judge(tmp_path / "judge")
    options = {"max_steps": 1, "beta": BETA, "ref_model": str(known), "reward_model": str(judge)}
    first = run(world, tmp_path / "run", **options)
    assert weights(run(world, tmp_path / "run", **options, resume="auto").folder) == weights(first.folder)
    save_judge(judge, seed=4)
    with pytest.raises(ValueError, match="the reward model is not what that run used; bring it back"):
        run(world, tmp_path / "run", **options, resume="auto")
    save_policy(known, seed=2)
    with pytest.raises(ValueError, match="the reference model is not what that run used; bring it back"):
        run(world, tmp_path / "run", **options, resume="auto")


# --- what is no number --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("token_logprobs", "step 1: the reference's log-prob of answer 0 is nan; the update was not applied"),
        ("grpo_advantages", "step 1: the advantage of answer 0 is nan; the update was not applied"),
        ("ppo_policy", "step 1: the loss is nan; the update was not applied"),
    ],
)
def test_nothing_is_learned_from_what_is_no_number(
    stage: str, message: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = getattr(loop, stage)
    monkeypatch.setattr(loop, stage, lambda *arguments: function(*arguments) * math.nan)
    with watching(loop) as watched, pytest.raises(NonFiniteError, match=message):
        run(world, tmp_path / "run", beta=BETA)
    assert not watched.updates and not (tmp_path / "run" / "metrics.jsonl").exists()


# --- errors and the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, but it is 1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, but it is 0"),
        ({"beta": -1.0}, "beta must be at least 0, but it is -1.0"),
        ({"epsilon": 0.0}, "epsilon must be positive, but it is 0.0"),
        ({"loss_type": "rloo", "scale_rewards": "group"}, "rloo does not scale its advantages: leave scale_rewards out, not"),
        ({"ref_model": "x"}, "ref_model is compared with at a beta above 0 only: give that too"),
        ({"num_mini_batches": 65}, "num_mini_batches is 65, but a step has only 64 answers"),
        ({"top_k": 5}, "top_k, top_p and min_p cut the distribution"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrpoConfig(**options)


def test_without_data_there_is_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to learn from; pass prompts, as in `tutelage grpo --data"):
        grpo(GrpoConfig(output_dir=str(tmp_path)))


def test_the_command(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["grpo", "--help"])
    told = capsys.readouterr().out
    assert "--num_generations" in told and "--scale_rewards" in told and "--kl_coef" not in told
    figures = tmp_path / "figures.json"
    options = ["--model", str(world.policy), "--data", str(world.data), "--reward_funcs", f"{HERE}:letters"]
    sizes = ["--max_steps", "2", "--batch_size", "2", "--max_completion_length", "8", "--no_plot"]
    command = ["grpo", *options, *sizes, "--output_dir", str(tmp_path / "run"), "--json", str(figures)]
    assert main(command) == 0
    written = json.loads(figures.read_text())
    assert written["command"] == "grpo" and written["episodes"] == 32
    assert {"score", "eval_reward", "times", "tokens_per_second", "format_version"} <= set(written)
    capsys.readouterr()
    assert main(command) == 2
    assert "tutelage grpo: " in capsys.readouterr().err
