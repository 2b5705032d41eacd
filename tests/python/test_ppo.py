"""PPO: every detail of the checklist, the gradients of a plain float64 version of it, the same bits through any kill, cut
and thread count, and nothing learned from what is no number (P1–P5; RELIABILITY rows 1, 9, 15)."""

from __future__ import annotations

import contextlib
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

from chats_for_tests import turns
from forked import Forker, forker
from models_for_tests import bits, threads
from runs_for_tests import Whole, digest, done_to, kill_rounds, killed_and_resumed, overflow, uninterrupted, weights, write_rows
from trying_for_tests import (
    ANSWER,
    Watched,
    close,
    newest,
    save_judge,
    save_policy,
    save_prompts,
    sequences_of,
    state_of,
    watching,
    with_params,
)
from tutelage import Model, ModelConfig, load_prompts, pack
from tutelage.cli import main
from tutelage.distributed import Ranks
from tutelage.files import newest_complete
from tutelage.objectives import adaptive_kl_coef, mean_std
from tutelage.rewards import RewardFunctionError
from tutelage.rollouts import Generation
from tutelage.train import experience
from tutelage.train import ppo as loop
from tutelage.train.configs import PpoConfig
from tutelage.train.experience import Tokens, mini_batches
from tutelage.train.picture import read_metrics
from tutelage.train.ppo import PpoResult, advantages_of, ppo
from tutelage.train.run import Interrupted, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
HERE = Path(__file__).with_name("rewards_for_tests.py")


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
        "batch_size": 8,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "micro_batch_tokens": 60,
        "max_completion_length": ANSWER,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "kl_coef": 0.2,
        "save_steps": 2,
        "logging_steps": 3,
        "eval_steps": 2,
        "plot": False,
        **others,
    }


def config(world: World, folder: Path, **others: Any) -> PpoConfig:
    values = fields(world, folder, **others)
    return PpoConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def run(world: World, folder: Path, **others: Any) -> PpoResult:
    return ppo(config(world, folder, **others))


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


NAMES = ("advantages_of", "gae", "ppo_policy", "ppo_value")
TEMPERATURE = 0.7
FULL: dict[str, Any] = {
    "temperature": TEMPERATURE,
    "max_steps": 2,
    "logging_steps": 1,
    "missing_eos_penalty": 0.5,
    "learning_rate": 2e-2,
    "cliprange": 0.1,
    "eval_fraction": 0.0,
    "lr_scheduler_type": "constant",
}


@dataclasses.dataclass(frozen=True)
class Course:
    """A run that was watched, and its folder and options."""

    watched: Watched
    folder: Path
    config: PpoConfig
    result: PpoResult


Watch = Callable[..., Course]


@pytest.fixture(scope="module")
def watch(world: World, tmp_path_factory: pytest.TempPathFactory) -> Watch:
    """Runs and watches with these options; the same ones only once."""
    made: dict[str, Course] = {}

    def watch(count: int = 1, **others: Any) -> Course:
        key = repr((count, sorted(others.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("watched")
            options = config(world, folder, **{**FULL, "ref_model": str(world.other), **others})
            with threads(count), watching(loop, *NAMES) as watched:
                result = ppo(options)
            made[key] = Course(watched, folder, options, result)
        return made[key]

    return watch


ONE = {"max_steps": 1, "num_mini_batches": 1, "num_ppo_epochs": 1}
"""One update."""


def wholes(course: Course) -> list[Tokens]:
    return [result[0] for _, result in course.watched.calls["advantages_of"]]


# --- the checklist ------------------------------------------------------------------------------------------


def test_detail_01_reward_model_and_critic_see_prompt_and_answer(world: World, watch: Watch) -> None:
    """Negative control: the answer alone, or another prompt, is worth something else."""
    course, judge = watch(), Model.from_pretrained(world.judge)
    answers = course.watched.answers[0]
    values = course.watched.calls["gae"][0][0][1]
    for s, sequence in enumerate(sequences_of(answers)):
        whole = judge.values(pack([sequence])).detach()
        penalty = 0.0 if answers.rollouts.finish_reasons[s] == "stop" else 0.5
        assert answers.scores[s].item() == whole[-1].item() - penalty
        begin, end = answers.batch.cu_seqlens[s : s + 2].tolist()
        assert bits(values[begin:end]) == bits(whole)  # the critic begins as the reward model
        alone = judge.values(pack([answers.rollouts.tokens[s]])).detach()
        assert alone[-1].item() != whole[-1].item()


def test_detail_02_there_are_no_pads_and_the_end_is_learned(watch: Watch) -> None:
    """A batch holds as many tokens as there are, and a stop token is one of the answer's."""
    ended = 0
    for answers in watch().watched.answers:
        assert answers.batch.tokens.tolist() == [token for sequence in sequences_of(answers) for token in sequence]
        assert answers.batch.completion_counts == answers.rollouts.lengths
        ends = answers.batch.cu_seqlens[1:].long() - 1
        assert bool(answers.batch.completion_mask[ends].all())
        ended += answers.rollouts.finish_reasons.count("stop")
    assert 0 < ended < 16  # so that both kinds are in these tests


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.9}])
def test_detail_03_truncated_sampling_is_refused_unless_it_is_asked_for(
    options: dict[str, Any], world: World, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"the ratio of the two would be wrong for every token\. Leave them out, or say --"):
        config(world, tmp_path, **options)
    with watching(loop, *NAMES) as watched:
        ppo(config(world, tmp_path / "run", **options, **ONE, eval_fraction=0.0, allow_truncated_sampling=True))
    rollouts = watched.answers[0].rollouts
    # What was drawn was cut; what is learned from is the whole distribution.
    assert bits(*rollouts.logprobs) != bits(*rollouts.support_logprobs)


def test_detail_04_every_log_prob_has_the_temperature(world: World, watch: Watch) -> None:
    """The rollout's, the reference's and the one that learns. Negative control: at 1 they are others."""
    course = watch()
    answers, known = course.watched.answers[0], course.watched.calls["advantages_of"][0][0][2]
    batch, mask = answers.batch, answers.batch.completion_mask
    policy, reference = Model.from_pretrained(world.policy), Model.from_pretrained(world.other)
    with torch.no_grad():
        for model, found in ((policy, batch.logprobs), (reference, known)):
            assert found is not None
            assert bits(model.score(batch, TEMPERATURE).logprobs[mask]) == bits(found[mask])
            assert bits(model.score(batch, 1.0).logprobs[mask]) != bits(found[mask])
    # The first update's, see detail 24: the same bits as the rollout's.


def test_detail_05_there_is_no_dropout(world: World, tmp_path: Path) -> None:
    """Whatever a config.json asks for."""
    asked = save_policy(tmp_path / "asked")
    fields = json.loads((asked / "config.json").read_text())
    (asked / "config.json").write_text(json.dumps({**fields, "attention_dropout": 0.5}))
    plain = run(world, tmp_path / "plain", max_steps=1)
    assert weights(run(world, tmp_path / "run", max_steps=1, model=str(asked)).folder) == weights(plain.folder)


def test_detail_06_the_reward_is_read_at_the_last_token(world: World, watch: Watch) -> None:
    answers, judge = watch(missing_eos_penalty=0.0).watched.answers[0], Model.from_pretrained(world.judge)
    with torch.no_grad():
        values = judge.values(answers.batch)
    ends = answers.batch.cu_seqlens[1:].long() - 1
    assert answers.scores.tolist() == values[ends].tolist()
    assert answers.scores.tolist() != values[ends - 1].tolist()


def test_detail_07_where_critic_and_reward_heads_begin(world: World, watch: Watch, tmp_path: Path) -> None:
    """The critic: the reward model; without one the policy with a head of 0. A reward head: N(0, 1/√(d + 1))."""
    assert bits(watch().watched.of("scalar")[0].params) == bits(Model.from_pretrained(world.judge).params)
    options = {**ONE, "eval_fraction": 0.0, "reward_model": None, "reward_funcs": [f"{HERE}:letters"]}
    with watching(loop, *NAMES) as watched:
        ppo(config(world, tmp_path / "run", **options))
    critic, policy = with_params(world.policy, watched.of("scalar")[0].params, "scalar"), Model.from_pretrained(world.policy)
    head = critic.state_dict()["score.weight"]
    assert not bool(head.any())
    assert all(torch.equal(critic.state_dict()[name], tensor) for name, tensor in policy.state_dict().items())
    assert not bool(watched.calls["gae"][0][0][1].any())
    assert bool(watched.of("scalar")[0].grads.any())  # 0 is no place from which it could not learn
    shape = ModelConfig(vocab_size=8, hidden_size=1024, intermediate_size=8, num_hidden_layers=1, num_attention_heads=16)
    drawn = Model(shape, head="scalar").state_dict()["score.weight"]
    assert drawn.std().item() * math.sqrt(1025) == pytest.approx(1, rel=0.1)


def test_detail_08_rewards_are_shifted_by_the_reward_models_bias(world: World, tmp_path: Path) -> None:
    found = []
    for bias in (0.0, 0.25):
        judge = save_judge(tmp_path / f"judge-{bias}", bias=bias)
        with watching(loop, *NAMES) as watched:
            options = {**ONE, "eval_fraction": 0.0}
            ppo(config(world, tmp_path / f"run-{bias}", reward_model=str(judge), **options))
        found.append((watched.answers[0].scores, watched.calls["gae"][0][0][1]))
    for with_none, with_bias in zip(*found, strict=True):
        assert torch.allclose(with_none - 0.25, with_bias, atol=1e-6)


def test_detail_09_an_answer_without_its_end_is_worth_less(watch: Watch) -> None:
    """missing_eos_score: that instead; missing_eos_penalty: so much less. Those that end keep theirs."""
    plain, penalty, fixed = (
        watch(**{**ONE, "missing_eos_penalty": 0.0}).watched.answers[0],
        watch(**ONE).watched.answers[0],
        watch(**{**ONE, "missing_eos_penalty": 0.0, "missing_eos_score": -1.0}).watched.answers[0],
    )
    ended = torch.tensor([reason == "stop" for reason in plain.rollouts.finish_reasons])
    assert bool(ended.any()) and not bool(ended.all())
    assert penalty.scores.tolist() == torch.where(ended, plain.scores, plain.scores - 0.5).tolist()
    assert fixed.scores.tolist() == torch.where(ended, plain.scores, -1.0).tolist()


def test_detail_10_nothing_follows_the_stop_token(world: World, watch: Watch) -> None:
    """Negative control: without it the same draws go on."""
    model, answers = Model.from_pretrained(world.policy), watch().watched.answers[0]
    stops = set(model.eos_token_ids)
    for tokens, reason in zip(answers.rollouts.tokens, answers.rollouts.finish_reasons, strict=True):
        assert not stops & set(tokens[:-1].tolist())
        assert (int(tokens[-1]) in stops) == (reason == "stop")
    beyond = model.generate(["say 1"] * 8, ANSWER, stop_token_ids=())
    assert any(stops & set(tokens[:-1].tolist()) for tokens in beyond.tokens)


def test_detail_11_kl_is_paid_for_every_token_and_the_score_at_the_last(watch: Watch) -> None:
    course = watch()
    for (arguments, _), (given, _) in zip(course.watched.calls["gae"], course.watched.calls["advantages_of"], strict=True):
        _, answers, known, _, kl_coef = given
        batch, drawn = answers.batch, answers.batch.logprobs
        expected = torch.where(batch.completion_mask, -kl_coef * (drawn - known), 0).double()
        assert bool((expected[batch.completion_mask] != 0).all())
        expected[batch.cu_seqlens[1:].long() - 1] += answers.scores
        assert torch.allclose(arguments[0].double(), expected, atol=1e-6)


def test_detail_11_the_kl_of_a_policy_that_is_its_reference_is_exactly_0(world: World, tmp_path: Path) -> None:
    for estimator in ("k1", "k3"):
        folder = tmp_path / estimator
        run(world, folder, max_steps=2, logging_steps=1, kl_estimator=estimator)
        first, second = lines_of(folder)
        assert (first["objective/kl"], first["objective/non_score_reward"]) == (0, 0) and second["objective/kl"] != 0
        assert estimator == "k1" or second["objective/kl"] > 0


def test_detail_12_the_kl_controller(world: World, tmp_path: Path) -> None:
    """Fixed; or adaptive, clipped to 20 % either way."""
    assert adaptive_kl_coef(0.1, 3.0, 6.0, 100, 10) == 0.1 * (1 - 0.2 * 10 / 100)
    assert adaptive_kl_coef(0.1, 6.6, 6.0, 100, 10) == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    assert adaptive_kl_coef(0.1, 60.0, 6.0, 100, 10) == 0.1 * (1 + 0.2 * 10 / 100)
    with pytest.raises(ValueError, match="target must be positive"):
        adaptive_kl_coef(0.1, 1.0, 0.0, 100, 10)
    with pytest.raises(ValueError, match="horizon must be positive"):
        adaptive_kl_coef(0.1, 1.0, 6.0, 0.0, 10)
    run(world, tmp_path / "fixed", logging_steps=1)
    assert {line["objective/kl_coef"] for line in lines_of(tmp_path / "fixed")} == {0.2}
    options = {"adap_kl_ctrl": True, "target": 0.01, "horizon": 100.0, "logging_steps": 1}
    result = run(world, tmp_path / "adaptive", **options)
    expected = 0.2
    for line in lines_of(tmp_path / "adaptive"):
        assert line["objective/kl_coef"] == expected
        expected = adaptive_kl_coef(expected, line["objective/kl"], 0.01, 100.0, 8)
    assert result.kl_coef == expected != 0.2


def test_detail_13_gamma_1_and_lambda_0_95(watch: Watch) -> None:
    """The defaults, and what they are given to."""
    assert (PpoConfig().gamma, PpoConfig().lam) == (1.0, 0.95)
    assert watch().watched.calls["gae"][0][0][3:] == (1.0, 0.95)
    course = watch(lam=1.0, whiten_advantages=False, **ONE)
    (rewards, values, batch, *_), _ = course.watched.calls["gae"][0]
    (whole,) = wholes(course)
    for s in range(len(batch)):
        begin, end = batch.cu_seqlens[s : s + 2].tolist()
        first = begin + batch.completion_mask[begin:end].tolist().index(True)
        to_go = rewards[first:end].double().flip(0).cumsum(0).flip(0) - values[first - 1 : end - 1].double()
        assert torch.allclose(whole.columns["advantages"][first:end].double(), to_go, atol=1e-5)
    assert not close(wholes(watch(whiten_advantages=False, **ONE))[0].columns["advantages"], whole.columns["advantages"])


def test_detail_14_nothing_comes_from_behind_the_end_or_from_a_neighbour(world: World, watch: Watch) -> None:
    """Each answer's advantages are those that it has alone; after its last token there is nothing."""
    course = watch(whiten_advantages=False, **ONE)
    (options, answers, known, values, kl_coef), (whole, _) = course.watched.calls["advantages_of"][0]
    for s in range(len(answers)):
        places = answers.batch.places([s])
        alone = dataclasses.replace(answers, batch=answers.batch.select([s]), scores=answers.scores[s : s + 1])
        own, _ = advantages_of(options, alone, known[places], values[places], kl_coef)
        assert all(bits(column) == bits(whole.columns[name][places]) for name, column in own.columns.items())
        rewards = course.watched.calls["gae"][0][0][0]
        last = int(places[-1])
        assert whole.columns["advantages"][last].item() == pytest.approx((rewards[last] - values[last - 1]).item(), abs=1e-6)
    assert not bool(whole.columns["advantages"][~answers.batch.completion_mask].any())


def test_detail_15_returns_are_unwhitened_advantages_and_values(watch: Watch) -> None:
    plain, white = (wholes(watch(whiten_advantages=white, **ONE))[0] for white in (False, True))
    assert bits(plain.columns["returns"]) == bits(white.columns["returns"])
    assert torch.allclose(plain.columns["advantages"] + plain.columns["old_values"], plain.columns["returns"], atol=1e-5)
    assert not torch.allclose(white.columns["advantages"] + white.columns["old_values"], white.columns["returns"], atol=0.1)


def test_detail_16_advantages_and_rewards_are_whitened_over_answers(watch: Watch) -> None:
    """A step's tokens together; rewards without a shift of their mean. Negative control: as they are."""
    (whole,) = wholes(watch(**ONE))
    mask = whole.batch.completion_mask
    assert mean_std(whole.columns["advantages"], mask) == pytest.approx((0, 1), abs=1e-5)
    (raw,) = wholes(watch(whiten_advantages=False, **ONE))
    assert mean_std(raw.columns["advantages"], mask)[1] != pytest.approx(1, abs=1e-2)
    rewards, white = (watch(whiten_rewards=white, **ONE).watched.calls["gae"][0][0][0] for white in (False, True))
    mean, deviation = mean_std(rewards, mask)
    assert mean_std(white, mask) == pytest.approx((mean, 1), abs=1e-4) and deviation != pytest.approx(1, abs=1e-2)


def test_detail_17_ratio_and_value_are_clipped(watch: Watch) -> None:
    """In later updates some tokens are, and the gradients are still those of the plain version, see below."""
    assert (PpoConfig().cliprange, PpoConfig().cliprange_value) == (0.2, 0.2)
    line = lines_of(watch().folder)[-1]
    assert 0 < line["policy/clipfrac_avg"] < 1 and 0 < line["val/clipfrac_avg"] < 1
    wide = watch(cliprange=1e9, cliprange_value=1e9)
    line = lines_of(wide.folder)[-1]
    assert line["policy/clipfrac_avg"] == 0 == line["val/clipfrac_avg"]
    for head in ("lm", "scalar"):
        assert bits(wide.watched.of(head)[-1].after) != bits(watch().watched.of(head)[-1].after)


def test_detail_18_the_critics_loss_weighs_a_tenth(watch: Watch) -> None:
    assert PpoConfig().vf_coef == 0.1
    tenth, fifth = (watch(vf_coef=weight, **ONE) for weight in (0.1, 0.2))
    assert close(2 * tenth.watched.of("scalar")[0].grads, fifth.watched.of("scalar")[0].grads)
    assert bits(tenth.watched.of("lm")[0].grads) == bits(fifth.watched.of("lm")[0].grads)
    lines = [lines_of(course.folder)[0] for course in (tenth, fifth)]
    assert lines[0]["loss/value_avg"] == pytest.approx(lines[1]["loss/value_avg"])
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss/policy_avg"] + 0.1 * lines[0]["loss/value_avg"])


def test_detail_19_a_fresh_shuffle_for_each_inner_epoch_and_one_update_a_mini_batch(watch: Watch) -> None:
    course = watch()
    assert [update.head for update in course.watched.updates] == ["lm", "scalar"] * 2 * 2 * 2  # steps, epochs, mini-batches
    assert len(course.watched.calls["ppo_policy"]) > 8  # of several micro-batches each
    for before, after in itertools.pairwise(course.watched.of("lm")):
        assert bits(before.after) == bits(after.params)  # in between nothing changed
    orders = []
    for step, epoch in itertools.product((1, 2), (0, 1)):
        parts = list(mini_batches(8, 2, f"0 {step} {epoch}"))
        assert [len(part) for part in parts] == [4, 4] and sorted(parts[0] + parts[1]) == list(range(8))
        orders.append(parts)
    assert len({repr(order) for order in orders}) == 4
    assert [len(part) for part in mini_batches(7, 3, "x")] == [2, 2, 3]
    assert [len(part) for part in mini_batches(2, 3, "x")] == [1, 1]
    # And these are the orders that the run had.
    seen = [token for (arguments, _) in course.watched.calls["ppo_policy"] for token in arguments[1].tolist()]
    expected = []
    for step, answers in enumerate(course.watched.answers):
        for part in [part for order in orders[2 * step : 2 * step + 2] for part in order]:
            logprobs = answers.batch.select(part).logprobs
            assert logprobs is not None
            expected += logprobs.tolist()
    assert seen == expected


def test_detail_20_the_mean_is_over_the_tokens_of_the_whole_mini_batch(watch: Watch) -> None:
    """Negative control: the mean of the micro-batches' means is another number."""
    whole, cut = watch(micro_batch_tokens=8192, **ONE), watch(**ONE)
    for head in ("lm", "scalar"):
        assert bits(whole.watched.of(head)[0].grads) == bits(cut.watched.of(head)[0].grads)
    (_, loss), *others = whole.watched.calls["ppo_value"]
    parts = cut.watched.calls["ppo_value"]
    assert not others and len(parts) > 1
    counts = [int(arguments[3].sum()) for arguments, _ in parts]
    assert {arguments[5] for arguments, _ in parts} == {sum(counts)}
    assert sum(part.item() for _, part in parts) == pytest.approx(loss.item(), rel=1e-5)
    own = [part.item() * sum(counts) / count for (_, part), count in zip(parts, counts, strict=True)]
    assert sum(own) / len(own) != pytest.approx(loss.item(), rel=1e-3)


def test_detail_21_adams_epsilon(watch: Watch) -> None:
    """1e-5; the first update is lr · g / (|g| + ε)."""
    assert PpoConfig().adam_epsilon == 1e-5
    for update in watch(max_grad_norm=1e9, **ONE).watched.updates:
        g = update.grads.double()
        expected = -update.lr * g / (g.abs() + 1e-5)
        assert update.eps == 1e-5 and close(update.after.double() - update.params.double(), expected, 1e-3)
        other = -update.lr * g / (g.abs() + 1e-8)
        assert not close(update.after.double() - update.params.double(), other, 1e-3)


def test_detail_22_the_learning_rate_falls_to_0_or_stays(world: World, watch: Watch, tmp_path: Path) -> None:
    run(world, tmp_path / "linear", logging_steps=1)
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "linear")]
    assert rates == pytest.approx([5e-3 * share for share in (1, 0.75, 0.5, 0.25)])  # 0 a step later
    run(world, tmp_path / "constant", logging_steps=1, lr_scheduler_type="constant")
    assert {line["learning_rate"] for line in lines_of(tmp_path / "constant")} == {5e-3}
    course = watch(critic_learning_rate=1e-3, **ONE)
    assert [update.lr for update in course.watched.updates] == [2e-2, 1e-3]


def test_detail_23_the_gradient_is_clipped_by_its_whole_length(watch: Watch) -> None:
    """Of policy and critic, each its own. Cut to 1e-5 of length, every entry is far below ε, and an update small."""
    free, clipped = watch(max_grad_norm=1e9, **ONE), watch(max_grad_norm=1e-5, **ONE)
    for head in ("lm", "scalar"):
        (update,), (other,) = free.watched.of(head), clipped.watched.of(head)
        assert bits(update.grads) == bits(other.grads)
        g = update.grads.double()
        g = g / g.norm() * 1e-5
        assert close(other.after.double() - other.params.double(), -update.lr * g / (g.abs() + 1e-5), 0.05)
        assert (other.after - other.params).norm() < 0.1 * (update.after - update.params).norm()
    norm = free.watched.of("lm")[0].grads.double().norm().item()
    assert lines_of(clipped.folder)[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_detail_24_first_ratio_is_exactly_one(watch: Watch) -> None:
    """On every token of each step's first update, though nothing is computed again. Negative control: the second."""
    course = watch()
    calls = iter(course.watched.calls["ppo_policy"])
    for step in (1, 2):
        for number, part in enumerate(part for epoch in (0, 1) for part in mini_batches(8, 2, f"0 {step} {epoch}")):
            same, tokens = True, course.watched.answers[step - 1].batch.select(part).tokens.numel()
            while tokens:
                (logprobs, old, _, mask, *_), _ = next(calls)
                ratio = torch.exp(logprobs.detach()[mask] - old[mask])
                same = same and bool((ratio == 1).all())
                tokens -= logprobs.numel()
            assert same == (number == 0)


def test_detail_24_no_log_prob_is_computed_again(watch: Watch) -> None:
    """Forwards of one step: the policy's and the critic's with gradient in the updates, and without: one of the reference,
    one of the critic and one of the reward model. None of the policy, which the rollout has gone through."""
    course = watch(micro_batch_tokens=8192, max_steps=1)
    names = [f"{head} {'learns' if gradient else 'once'}" for head, _, gradient in course.watched.forwards]
    assert names == ["scalar once", "lm once", "scalar once", *["scalar learns", "lm learns"] * 4]
    policy = next(model for head, model, gradient in course.watched.forwards if head == "lm" and gradient)
    assert policy not in {model for head, model, gradient in course.watched.forwards if not gradient}


def test_the_critic_reads_the_answers_once_where_the_first_update_takes_all(watch: Watch) -> None:
    """Of the forwards in between nothing is left to compute; test_detail_20 has the same gradients in parts, read twice."""
    course = watch(micro_batch_tokens=8192, **ONE)
    names = [f"{head} {'learns' if gradient else 'once'}" for head, _, gradient in course.watched.forwards]
    assert names == ["scalar once", "lm once", "scalar learns", "lm learns"]


NAMED = {
    *(f"objective/{name}" for name in ("kl", "kl_coef", "entropy", "non_score_reward", "rlhf_reward", "scores")),
    *(f"policy/{name}" for name in ("approxkl_avg", "clipfrac_avg", "entropy_avg", "stopped_early")),
    *(f"val/{name}" for name in ("clipfrac_avg", "ratio", "ratio_var", "num_eos_tokens", "explained_variance")),
    *(f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio")),
    *("loss/policy_avg", "loss/value_avg", "episode", "epoch", "learning_rate", "grad_norm", "num_tokens", "loss", "step"),
}


def test_detail_25_what_is_measured(watch: Watch) -> None:
    course = watch()
    lines = lines_of(course.folder)
    assert all(set(line) == NAMED for line in lines)
    assert [line["episode"] for line in lines] == [8, 16]
    for step, line in enumerate(lines):
        answers = course.watched.answers[step]
        (_, _, known, _, _), (whole, _) = course.watched.calls["advantages_of"][step]
        batch, mask = answers.batch, answers.batch.completion_mask
        assert batch.logprobs is not None
        drawn = torch.stack([x.sum() for x in torch.split(batch.logprobs.double(), batch.lengths)])
        apart = torch.where(mask, batch.logprobs.double() - known.double(), 0)
        kl = torch.stack([x.sum() for x in torch.split(apart, batch.lengths)])
        assert line["objective/kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
        assert line["objective/entropy"] == pytest.approx(-drawn.mean().item(), rel=1e-5)
        assert line["objective/non_score_reward"] == pytest.approx(-0.2 * kl.mean().item(), rel=1e-4)
        assert line["objective/scores"] == pytest.approx(answers.scores.mean().item())
        assert line["objective/rlhf_reward"] == pytest.approx(line["objective/scores"] - 0.2 * kl.mean().item(), rel=1e-4)
        returns, old = (whole.columns[name][mask].double() for name in ("returns", "old_values"))
        explained = 1 - (returns - old).var() / returns.var()
        assert line["val/explained_variance"] == pytest.approx(explained.item(), rel=1e-4)
        lengths, reasons = answers.rollouts.lengths, answers.rollouts.finish_reasons
        assert line["completions/mean_length"] == sum(lengths) / 8 and line["completions/max_length"] == max(lengths)
        assert line["val/num_eos_tokens"] == reasons.count("stop") == round(8 * (1 - line["completions/clipped_ratio"]))
    moved = torch.cat([(a[0].detach() - a[1])[a[3]] for a, _ in course.watched.calls["ppo_policy"]]).double()
    total = [sum(len(tokens) for tokens in answers.rollouts.tokens) * 2 for answers in course.watched.answers]
    for line, part in zip(lines, torch.split(moved, total), strict=True):
        assert line["policy/approxkl_avg"] == pytest.approx(0.5 * (part**2).mean().item(), rel=1e-4)
        assert line["val/ratio"] == pytest.approx(part.exp().mean().item())
        assert line["val/ratio_var"] == pytest.approx(part.exp().var(unbiased=False).item(), rel=1e-4)


def test_detail_26_a_step_ends_where_the_policy_has_moved_too_far(watch: Watch) -> None:
    """Before the update that would be the second. Negative control: never."""
    stopped = watch(target_kl=1e-9)
    assert [update.head for update in stopped.watched.updates] == ["lm", "scalar"] * 2
    assert [line["policy/stopped_early"] for line in lines_of(stopped.folder)] == [1, 1]
    assert [line["policy/stopped_early"] for line in lines_of(watch().folder)] == [0, 0]
    assert bits(stopped.watched.of("lm")[0].after) == bits(watch().watched.of("lm")[0].after)


def test_detail_27_the_average_of_the_weights_is_saved(world: World, watch: Watch) -> None:
    course = watch(ema_decay=0.75)
    steps = [update.after for update in course.watched.of("lm")[3::4]]
    expected = Model.from_pretrained(world.policy).params
    for params in steps:
        expected = expected * 0.75 + params * 0.25
    assert bits(Model.from_pretrained(course.result.folder).params) == bits(expected) != bits(steps[-1])
    plain = watch()
    assert bits(Model.from_pretrained(plain.result.folder).params) == bits(plain.watched.of("lm")[-1].after)
    assert bits(plain.watched.of("lm")[-1].after) == bits(steps[-1])  # what is learned is the same


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"the user says this to an assistant, {i} times" for i in range(40)))
    return path


def test_detail_28_ptx_adds_the_gradient_of_pretraining_text(world: World, watch: Watch, text: Path) -> None:
    """coef · the gradient of the mean negative log-likelihood of its tokens, to every update's."""
    options = {"max_grad_norm": 1e9, "ptx_data": (str(text),), "ptx_length": 24, "ptx_ratio": 0.5}
    plain, ptx = watch(max_grad_norm=1e9), watch(ptx_coef=3.0, **options)
    difference = ptx.watched.of("lm")[0].grads.double() - plain.watched.of("lm")[0].grads.double()
    # 0.5 · 4 answers are 2 sequences of text, read at temperature 1; found again by what they are made of.
    model = Model.from_pretrained(world.policy)
    assert model.tokenizer is not None
    data = loop._text(_silent(ptx), dataclasses.replace(ptx.config), model)
    assert data is not None
    bins, _ = data.take(loop.Cursor(), 2)
    batch = pack([piece for pieces in bins for piece in pieces])
    model.zero_grad()
    loss = -(model.score(batch).logprobs * batch.completion_mask).sum() / batch.completion_mask.sum()
    loss.backward()
    assert close(difference, 3.0 * model.grads, 1e-4)
    lines = lines_of(ptx.folder)
    assert set(lines[0]) == NAMED | {"loss/ptx_avg"}
    assert lines[0]["loss/ptx_avg"] < math.log(400) and lines[1]["loss/ptx_avg"] < lines[0]["loss/ptx_avg"]
    state = json.loads((newest(ptx.folder) / "state.json").read_text())["state"]["loop"]
    assert data.take(loop.Cursor(), 2 * 8)[1] == loop.Cursor(**state["ptx_cursor"])  # 8 updates
    assert bits(ptx.watched.of("scalar")[0].grads) == bits(plain.watched.of("scalar")[0].grads)


def _silent(course: Course) -> Any:
    class Silent:
        folder = course.folder

        def say(self, text: str) -> None:
            pass

        def led(self, work: Callable[[], Any]) -> Any:
            return work()

    return Silent()


def test_detail_29_what_an_answer_becomes_depends_on_its_prompt_alone(world: World, watch: Watch) -> None:
    """So any number of ranks draws the same answers: a batch's halves, in any order, give those of the whole. What is
    drawn in another step, or with another seed, is something else."""
    course = watch()
    model = Model.from_pretrained(world.policy)
    whole = course.watched.answers[0]
    arguments: Any = (course.config, model, _judge_of_nothing())
    for rows in ([6, 2, 4], [1], [7, 5, 3, 0]):
        part = experience.gather(_passing(), *arguments, [whole.prompts[row] for row in rows], "step 1")
        assert part is not None
        assert [t.tolist() for t in part.rollouts.tokens] == [whole.rollouts.tokens[row].tolist() for row in rows]
        assert bits(*part.rollouts.logprobs) == bits(*(whole.rollouts.logprobs[row] for row in rows))
    for options, purpose in ((course.config, "step 2"), (dataclasses.replace(course.config, seed=1), "step 1")):
        other = experience.gather(_passing(), options, *arguments[1:], whole.prompts, purpose)
        assert other is not None
        assert bits(*other.rollouts.tokens) != bits(*whole.rollouts.tokens)


def _judge_of_nothing() -> Any:
    class Zero:
        def scores(self, rows: Any, rollouts: Any) -> Any:
            return [0.0] * len(rollouts), {}

    return Zero()


def _passing() -> Any:
    class Passing:
        step, ranks = 1, Ranks()

        def timed(self, part: str) -> Any:
            return contextlib.nullcontext()

        def fault(self, point: str) -> None:
            pass

    return Passing()


def test_detail_30_the_critic_may_learn_first(watch: Watch) -> None:
    course = watch(critic_warmup_steps=1)
    heads = [update.head for update in course.watched.updates]
    assert heads == ["scalar"] * 4 + ["lm", "scalar"] * 4
    first, second = lines_of(course.folder)
    assert "loss/policy_avg" not in first and "loss/policy_avg" in second
    assert first["loss/value_avg"] > 0


# --- against a plain version --------------------------------------------------------------------------------


def plain_advantages(
    options: PpoConfig, sequences: list[list[int]], starts: list[int], ended: list[bool], models: dict[str, Model]
) -> dict[str, list[Tensor]]:
    """The checklist, sequence by sequence in float64: columns of each answer's tokens. models: old, reference, judge,
    critic, all of before the first update."""
    columns: dict[str, list[Tensor]] = {name: [] for name in ("drawn", "old_values", "advantages", "returns")}
    for tokens, start, end in zip(sequences, starts, ended, strict=True):
        batch = pack([tokens])
        drawn = models["old"].score(batch, options.temperature).logprobs[start:].detach()
        known = models["reference"].score(batch, options.temperature).logprobs[start:].detach()
        values = models["critic"].values(batch).detach()[start - 1 : -1]
        score = models["judge"].values(batch).detach()[-1] - (0 if end else options.missing_eos_penalty)
        rewards = -options.kl_coef * (drawn - known)
        rewards[-1] += score
        advantage, following, advantages = torch.zeros(()).double(), torch.zeros(()).double(), []
        for reward, value in zip(rewards.flip(0), values.flip(0), strict=True):
            advantage = reward + options.gamma * following - value + options.gamma * options.lam * advantage
            following = value
            advantages.insert(0, advantage)
        stacked = torch.stack(advantages)
        for name, column in (("drawn", drawn), ("old_values", values), ("advantages", stacked), ("returns", stacked + values)):
            columns[name].append(column)
    everything = torch.cat(columns["advantages"])
    mean, deviation = everything.mean(), everything.std(unbiased=False)
    columns["advantages"] = [(x - mean) / (deviation + 1e-8) for x in columns["advantages"]]
    return columns


def plain_losses(
    options: PpoConfig,
    sequences: list[list[int]],
    starts: list[int],
    columns: dict[str, list[Tensor]],
    part: list[int],
    policy: Model,
    critic: Model,
) -> tuple[Tensor, Tensor]:
    """(policy, critic) of a mini-batch."""
    surrogate, squares, count = [], [], 0
    for s in part:
        batch, start = pack([sequences[s]]), starts[s]
        ratio = (policy.score(batch, options.temperature).logprobs[start:] - columns["drawn"][s]).exp()
        advantages, returns, old = (columns[name][s] for name in ("advantages", "returns", "old_values"))
        low, high = 1 - options.cliprange, 1 + options.cliprange
        surrogate.append(torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages).sum())
        values = critic.values(batch)[start - 1 : -1]
        near = torch.minimum(torch.maximum(values, old - options.cliprange_value), old + options.cliprange_value)
        squares.append((0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)).sum())
        count += len(returns)
    return -torch.stack(surrogate).sum() / count, torch.stack(squares).sum() / count


def test_gradients_of_every_update_are_those_of_a_plain_version(world: World, watch: Watch) -> None:
    """In float64, to 1e-5, with clipping at work. Negative control: without a detail they are others."""
    course = watch()
    updates = iter(course.watched.updates)
    reference, judge = Model.from_pretrained(world.other).double(), Model.from_pretrained(world.judge).double()
    policy, critic = Model.from_pretrained(world.policy), Model.from_pretrained(world.judge)
    losses: list[list[float]] = []
    for step, answers in enumerate(course.watched.answers, 1):
        sequences = sequences_of(answers)
        starts = [len(prompt) for prompt in answers.rollouts.prompts]
        ended = [reason == "stop" for reason in answers.rollouts.finish_reasons]
        models = {"old": policy.double(), "reference": reference, "judge": judge, "critic": critic.double()}
        columns = plain_advantages(course.config, sequences, starts, ended, models)
        assert close(torch.cat(answers.rollouts.logprobs), torch.cat(columns["drawn"]))
        whole = wholes(course)[step - 1]
        mask = whole.batch.completion_mask
        for name in ("advantages", "returns", "old_values"):
            assert close(whole.columns[name][mask], torch.cat(columns[name]))
        own = []
        for epoch in range(2):
            for part in mini_batches(8, 2, f"0 {step} {epoch}"):
                exact = policy.double(), critic.double()
                pair = plain_losses(course.config, sequences, starts, columns, part, *exact)
                own.append([loss.item() for loss in pair])
                for model, plain, loss, weight in zip((policy, critic), exact, pair, (1.0, 0.1), strict=True):
                    plain.zero_grad()
                    (weight * loss).backward()  # type: ignore[no-untyped-call]
                    update = next(updates)
                    assert update.head == model.head and bits(update.params) == bits(model.params)
                    assert close(update.grads, plain.grads)
                    with torch.no_grad():
                        model.params.copy_(update.after)
        losses.append([sum(pair[side] for pair in own) / 4 for side in (0, 1)])
    for line, (of_policy, of_critic) in zip(lines_of(course.folder), losses, strict=True):
        assert line["loss/policy_avg"] == pytest.approx(of_policy, abs=1e-5)
        assert line["loss/value_avg"] == pytest.approx(of_critic, rel=1e-5)
    # Control: the last gradient without the clip, and with the KL left out.
    for wrong in ({"cliprange": 1e9}, {"kl_coef": 0.0}):
        changed = dataclasses.replace(course.config, **wrong)
        changed_columns = plain_advantages(changed, sequences, starts, ended, models)
        exact = with_params(world.policy, course.watched.of("lm")[-1].params).double(), critic.double()
        loss, _ = plain_losses(changed, sequences, starts, changed_columns, part, *exact)
        loss.backward()  # type: ignore[no-untyped-call]
        assert not close(course.watched.of("lm")[-1].grads, exact[0].grads, 1e-3)


# --- it learns ----------------------------------------------------------------------------------------------


def test_it_learns_what_is_rewarded(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a function of the text, with a critic that begins at 0; and tells so. Negative control: the first steps."""
    options = {"reward_model": None, "reward_funcs": [f"{HERE}:ascii_only"], "kl_coef": 0.01, "lr_scheduler_type": "constant"}
    sizes = {
        "max_steps": 40,
        "eval_fraction": 0.4,
        "batch_size": 16,
        "learning_rate": 2e-2,
        "critic_learning_rate": 5e-3,
        "micro_batch_tokens": 8192,
    }
    figures = tmp_path / "figures.json"
    told = {"logging_steps": 1, "eval_steps": 40, "json": str(figures), "plot": True}
    result = run(world, tmp_path / "run", **options, **sizes, **told)
    lines = lines_of(tmp_path / "run")
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.25
    assert lines[-1]["objective/kl"] > lines[1]["objective/kl"]
    assert lines[0]["rewards/ascii_only/mean"] == pytest.approx(scores[0]) and lines[0]["rewards/failed"] == 0
    assert result.eval_reward is not None and result.eval_reward > sum(scores[:5]) / 5 + 0.2
    output = capsys.readouterr().out
    assert "step 40/40  score " in output and "rollout " in output and "█" in output
    assert " → " in output and "(score " in output and "of the answers to the held-out prompts" in output
    assert (tmp_path / "run" / "score.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(figures.read_text())
    assert (written["command"], written["score"], written["episodes"]) == ("ppo", result.score, 640)
    assert {"rollout", "score", "train", "evaluate", "other"} == set(written["times"])
    assert sum(written["times"].values()) == pytest.approx(1)
    timed = [json.loads(line) for line in (tmp_path / "run" / "times.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timed] == list(range(1, 41)) and timed[0]["rollout"] > 0


# --- the same bits ------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "ema_decay": 0.9,
    "adap_kl_ctrl": True,
    "target": 0.1,
    "horizon": 50.0,
    "select_by": "eval_reward",
}


def test_any_cut_and_any_number_of_threads_end_in_the_same_state(world: World, text: Path, tmp_path: Path) -> None:
    """Model, critic, both optimizers, EMA, controller, metrics. Negative control: another seed."""
    options = {**EVERYTHING, "ptx_coef": 1.0, "ptx_data": [str(text)], "ptx_length": 24, "whiten_rewards": True}
    found = set()
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


JUDGED = {**EVERYTHING, "reward_funcs": [f"{HERE}:letters"], "reward_weights": [0.1]}
PTX = {"ptx_coef": 1.0, "ptx_length": 24}


@pytest.fixture(scope="module")
def whole(children: Forker, world: World, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    options = fields(world, tmp_path_factory.mktemp("whole"), **JUDGED, **PTX, ptx_data=[str(text)])
    return uninterrupted(children, "ppo", options)


Killed = Callable[..., str]


@pytest.fixture
def killed(children: Forker, world: World, text: Path, tmp_path: Path) -> Killed:
    """The digest of a run that is killed once and resumed."""
    numbers = itertools.count()

    def end(kill: dict[str, Any], **others: Any) -> str:
        options = fields(world, tmp_path / f"run-{next(numbers)}", **JUDGED, **PTX, ptx_data=[str(text)])
        return killed_and_resumed(children, "ppo", options, kill, **others)

    return end


def test_a_kill_changes_no_bit(whole: Whole, killed: Killed) -> None:
    """Weights of both, moments, EMA, controller, cursors, metrics; between rollout and update, too."""
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
    children: Forker, world: World, text: Path, whole: Whole, tmp_path: Path
) -> None:
    options = fields(world, tmp_path / "run", **JUDGED, **PTX, ptx_data=[str(text)])
    status, output = children.run("children:command", loop="ppo", config=options, name="rollout", point=2, number=signal.SIGINT)
    assert status == 128 + signal.SIGINT
    assert "stopped by SIGINT after step 2, which is saved" in output
    status, output = children.run("children:train", loop="ppo", config={**options, "resume": "auto"})
    assert status == 0, output
    assert digest(tmp_path / "run", STEPS) == whole.digest


def test_a_second_ctrl_c_stops_at_once(children: Forker, world: World, tmp_path: Path) -> None:
    options = fields(world, tmp_path / "run")
    status, _ = children.run(
        "children:command", loop="ppo", config=options, name="rollout", point=1, number=signal.SIGINT, times=2
    )
    assert status == -signal.SIGINT and newest_complete(tmp_path / "run") is None


def test_ctrl_c_during_a_rollout_never_cuts_it(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is not trained on part of its rollouts: the generation goes on to its end, then the step."""
    run(world, tmp_path / "whole", max_steps=2, save_steps=1)
    step, sent = Generation.step, []

    def interrupted(generation: Generation) -> bool:
        more = step(generation)
        if not sent:
            sent.append(signal.raise_signal(signal.SIGINT))
        return more

    monkeypatch.setattr(Generation, "step", interrupted)
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 1, which is saved"):
        run(world, tmp_path / "run", max_steps=2, save_steps=1)
    run(world, tmp_path / "run", max_steps=2, save_steps=1, resume="auto")
    assert digest(tmp_path / "run", 2) == digest(tmp_path / "whole", 2)


def test_a_resume_from_other_models_is_refused(world: World, tmp_path: Path) -> None:
    own = {"model": tmp_path / "policy", "ref_model": tmp_path / "known", "reward_model": tmp_path / "judge"}
    save_policy(own["model"])
    save_policy(own["ref_model"], seed=1)
    save_judge(own["reward_model"])
    options = {"max_steps": 1, **{name: str(folder) for name, folder in own.items()}}
    first = run(world, tmp_path / "run", **options)
    again = run(world, tmp_path / "run", **options, resume="auto")
    assert weights(again.folder) == weights(first.folder) and again.score == first.score
    for name, told in {"ref_model": "reference", "reward_model": "reward"}.items():
        kept = (own[name] / "model.safetensors").read_bytes()
        (save_judge if name == "reward_model" else save_policy)(own[name], seed=2)
        with pytest.raises(ValueError, match=f"the {told} model is not what that run used; bring it back, or start a new run"):
            run(world, tmp_path / "run", **options, resume="auto")
        (own[name] / "model.safetensors").write_bytes(kept)
    save_policy(own["model"], seed=2)
    with pytest.raises(ValueError, match="the model to start from is not what that run started from"):
        run(world, tmp_path / "run", **options, resume="auto")


def test_the_model_whose_answers_score_best_is_saved(world: World, tmp_path: Path) -> None:
    options = {
        "eval_steps": 1,
        "learning_rate": 5e-2,
        "max_steps": 8,
        "lr_scheduler_type": "constant",
        "kl_coef": 1.0,
        "seed": 1,
    }
    best = run(world, tmp_path / "best", **options, select_by="eval_reward")
    measured = [line for line in read_metrics(tmp_path / "best" / "metrics.jsonl") if "eval_reward" in line]
    highest = max(measured, key=lambda line: line["eval_reward"])
    assert (best.selected_step, best.eval_reward) == (highest["step"], highest["eval_reward"])
    assert best.selected_step < 8
    short = run(world, tmp_path / "short", **{**options, "max_steps": best.selected_step})
    assert weights(short.folder) == weights(best.folder)


# --- what is no number --------------------------------------------------------------------------------------


def broken(folder: Path, kept: Path) -> str:
    model = Model.from_pretrained(kept)
    overflow(model)
    model.save_pretrained(folder)
    return str(folder)


def not_finite(function: Callable[..., Any]) -> Callable[..., Any]:
    def spoiled(*arguments: Any) -> Any:
        found = function(*arguments)
        if isinstance(found, tuple):
            return (found[0] + math.inf, *found[1:])
        return found * math.nan

    return spoiled


STAGES = {
    "token_logprobs": r"step 1: the reference's log-prob of answer 0 is nan; the update was not applied\. There is no",
    "token_values": "step 1: the critic's value of answer 0 is nan; the update was not applied",
    "gae": "step 1: the advantage of answer 0 is (inf|nan); the update was not applied",
    "ppo_policy": "step 1: the loss is nan; the update was not applied",
    "ppo_value": "step 1: the loss is nan; the update was not applied",
}


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_learned_from_what_is_no_number(
    stage: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, stage, not_finite(getattr(loop, stage)))
    with watching(loop) as watched, pytest.raises(NonFiniteError, match=STAGES[stage]):
        run(world, tmp_path / "run", whiten_advantages=False)
    assert not watched.updates and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_gradient_of_the_critic_that_is_no_number_changes_neither_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is one, so only the optimizers can tell; the policy's gradient is fine. Also in a later step."""
    ppo_value, calls = loop.ppo_value, itertools.count()

    def spoiled(values: Tensor, *arguments: Any) -> Tensor:
        loss = ppo_value(values, *arguments)
        return loss if next(calls) < 1 else loss + torch.sqrt(values * 0).sum()

    monkeypatch.setattr(loop, "ppo_value", spoiled)
    with watching(loop) as watched, pytest.raises(NonFiniteError, match="is the first parameter whose gradient is not finite"):
        run(world, tmp_path / "run", num_mini_batches=1, num_ppo_epochs=1, micro_batch_tokens=8192)
    assert [update.head for update in watched.updates] == ["lm", "scalar"]  # of the first step


def test_a_reward_that_is_no_number_stops_the_run(world: World, tmp_path: Path) -> None:
    judge = broken(tmp_path / "broken", world.judge)
    with (
        watching(loop) as watched,
        pytest.raises(NonFiniteError, match="step 1: the reward of answer 0 is nan; the update was"),
    ):
        run(world, tmp_path / "run", reward_model=judge)
    assert not watched.updates
    options = {"reward_model": None, "reward_funcs": [f"{HERE}:not_a_number"]}
    with (
        watching(loop) as watched,
        pytest.raises(RewardFunctionError, match="reward function not_a_number gave nan for sample"),
    ):
        run(world, tmp_path / "functions", **options)
    assert not watched.updates and (tmp_path / "functions" / "failures.jsonl").exists()


# --- reward functions ---------------------------------------------------------------------------------------


def test_reward_model_and_functions_are_added_up(world: World, watch: Watch) -> None:
    judge, functions = watch(**ONE), watch(**ONE, reward_funcs=(f"{HERE}:letters",), reward_weights=(2.0,))
    answers = functions.watched.answers[0]
    texts = answers.rollouts.texts
    assert texts is not None
    extra = [2 * (text.count("a") + row.columns["number"] / 100) for text, row in zip(texts, answers.prompts, strict=True)]
    expected = judge.watched.answers[0].scores + torch.tensor(extra, dtype=torch.float64)
    assert torch.allclose(answers.scores, expected) and len(set(extra)) > 4
    assert lines_of(functions.folder)[0]["rewards/letters/mean"] == pytest.approx(sum(extra) / 16)


def test_answers_without_a_reward_are_left_out(world: World, watch: Watch, tmp_path: Path) -> None:
    """Of what is learned, not of what is counted of the answers. A step without any learns nothing, and goes on."""
    course = watch(**ONE, reward_funcs=(f"{HERE}:some",))
    (answers,), (drawn,) = course.watched.answers, course.watched.drawn
    numbers = [row.columns["number"] for row in answers.prompts]
    assert all(number % 3 for number in numbers) and len(answers) < len(drawn) == 8
    assert lines_of(course.folder)[0]["episode"] == len(answers) == course.result.episodes
    assert sum(int(a[3].sum()) for a, _ in course.watched.calls["ppo_policy"]) == sum(answers.batch.completion_counts)
    options = {"reward_model": None, "reward_funcs": [f"{HERE}:none"], "max_steps": 2, "plot": True}
    with watching(loop) as watched:
        result = run(world, tmp_path / "run", **options)
    assert not watched.updates and result.episodes == 0 and math.isnan(result.score)
    assert bits(Model.from_pretrained(result.folder).params) == bits(Model.from_pretrained(world.policy).params)
    dropped = {"reward_model": None, "reward_funcs": [f"{HERE}:not_a_number"], "reward_failure": "drop", "max_steps": 1}
    assert run(world, tmp_path / "dropped", **dropped).episodes == 0


def test_messages_reach_functions_as_messages(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": turns(f"say {i}")} for i in range(8)]
    data = str(write_rows(tmp_path / "talks.jsonl", rows))
    options = {"reward_model": None, "reward_funcs": [f"{HERE}:talk"], "data": [data], "max_length": 64, "max_steps": 1}
    result = run(world, tmp_path / "run", **options)
    assert result.score > 0
    assert done_to(result.folder)[-1].command == "ppo" and done_to(result.folder)[-1].figures["kl"] == result.kl
    model = Model.from_pretrained(result.folder)
    assert model.tokenizer is not None and model.tokenizer.encode("<|im_end|>") != []
    stop = load_prompts(data, model.tokenizer, 96).turn
    assert stop is not None and stop.stop_token_id in model.eos_token_ids


# --- errors -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="nothing to learn from; pass prompts, as in `tutelage ppo --data"):
        ppo(PpoConfig(output_dir=str(folder)))
    with pytest.raises(ValueError, match="nothing would judge the answers: give a reward_model, reward_funcs, or both"):
        run(world, folder, reward_model=None)
    with pytest.raises(ValueError, match="max_completion_length is 96, which leaves no room for a prompt in 96 tokens: lower"):
        run(world, folder, max_completion_length=96)
    with pytest.raises(
        ValueError, match=r"line \d+: the prompt and its answer may have \d+ tokens, more than micro_batch_tokens"
    ):
        run(world, folder, micro_batch_tokens=11)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, more than max_length = 96 less 90 for an answer"):
        run(world, folder, max_completion_length=90)
    assert (
        run(world, tmp_path / "drop", max_completion_length=90, micro_batch_tokens=96, max_steps=1, on_long="drop").steps == 1
    )
    with pytest.raises(ValueError, match="holds a language model, and rewards need a reward model"):
        run(world, folder, reward_model=str(world.policy))
    with pytest.raises(ValueError, match="holds a reward model, and a reference must be a language model"):
        run(world, folder, ref_model=str(world.judge))
    with pytest.raises(ValueError, match="holds a reward model, and fine-tuning needs a language model"):
        run(world, folder, model=str(world.judge))
    with pytest.raises(ValueError, match="ptx_length is 97, but at most 60 tokens are read at once: lower it"):
        run(world, folder, ptx_coef=1.0, ptx_length=97)
    short = Model(dataclasses.replace(Model.from_pretrained(world.judge).config, max_position_embeddings=48), head="scalar")
    short.tokenizer = Model.from_pretrained(world.judge).tokenizer
    short.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"the reward model .* reads at most 48 tokens, but max_length is 96: lower it"):
        run(world, folder, reward_model=str(tmp_path / "short"))
    with pytest.raises(RewardFunctionError, match="has no 'missing'"):
        run(world, folder, reward_funcs=[f"{HERE}:missing"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, but it is 0"),
        ({"num_mini_batches": 0}, "num_mini_batches must be at least 1, but it is 0"),
        ({"num_mini_batches": 65}, "num_mini_batches is 65, but a step has only 64 answers"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1, but it is 0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, but it is 0.0"),
        ({"adam_epsilon": 0.0}, "adam_epsilon must be positive and finite, but it is 0.0"),
        ({"reward_timeout": math.inf}, "reward_timeout must be positive and finite, but it is inf"),
        ({"reward_weights": (1.0,)}, "there are 1 reward_weights for 0 reward_funcs"),
        ({"missing_eos_score": -1.0, "missing_eos_penalty": 1.0}, "missing_eos_score takes the place of a score"),
        ({"missing_eos_score": math.nan}, "missing_eos_score must be finite, but it is nan"),
        ({"missing_eos_penalty": math.inf}, "missing_eos_penalty must be finite, but it is inf"),
        ({"total_episodes": -1}, "total_episodes must be at least 0, but it is -1"),
        ({"total_episodes": 8, "max_steps": 1}, "total_episodes and max_steps both say how long to train: give one"),
        ({"kl_coef": -1.0}, "kl_coef must be at least 0, but it is -1.0"),
        ({"vf_coef": 0.0}, "vf_coef must be positive, but it is 0.0"),
        ({"critic_learning_rate": -1.0}, "critic_learning_rate must be at least 0, but it is -1.0"),
        ({"critic_warmup_steps": -1}, "critic_warmup_steps must be at least 0, but it is -1"),
        ({"target_kl": -1.0}, "target_kl must be at least 0, but it is -1.0"),
        ({"ptx_coef": -1.0}, "ptx_coef must be at least 0, but it is -1.0"),
        ({"ptx_data": ("x",)}, "ptx_data is learned from with --ptx_coef only: give that too"),
        ({"ptx_length": 1}, "ptx_length must be 0 or at least 2, but it is 1"),
        ({"ptx_ratio": 0.0}, "ptx_ratio must be positive, but it is 0.0"),
        ({"target": 0.0}, "target must be positive, but it is 0.0"),
        ({"horizon": 0.0}, "horizon must be positive, but it is 0.0"),
        ({"cliprange": 0.0}, "cliprange must be positive, but it is 0.0"),
        ({"cliprange_value": 0.0}, "cliprange_value must be positive, but it is 0.0"),
        ({"gamma": 1.5}, "gamma must lie between 0 and 1, but it is 1.5"),
        ({"lam": -0.5}, "lam must lie between 0 and 1, but it is -0.5"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1, but it is 1.0"),
        ({"select_by": "eval_reward", "eval_fraction": 0.0}, "select_by eval_reward needs held-out examples"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PpoConfig(**options)


def test_how_long_a_run_is(world: World, tmp_path: Path) -> None:
    """total_episodes, rounded up; or epochs of the prompts."""
    assert run(world, tmp_path / "episodes", max_steps=0, total_episodes=9).steps == 2
    result = run(world, tmp_path / "epochs", max_steps=0, num_train_epochs=0.5)
    assert result.steps == math.ceil(result.examples / 2 / 8)


# --- the command line ---------------------------------------------------------------------------------------


def test_the_command(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["ppo", "--help"])
    told = capsys.readouterr().out
    assert "--kl_coef" in told and "--ptx_coef" in told and "--reward_funcs" in told
    figures = tmp_path / "figures.json"
    options = ["--model", str(world.policy), "--data", str(world.data), "--reward_model", str(world.judge)]
    sizes = ["--max_steps", "2", "--batch_size", "4", "--max_completion_length", "8", "--no_plot"]
    command = ["ppo", *options, *sizes, "--output_dir", str(tmp_path / "run"), "--json", str(figures)]
    assert main(command) == 0
    written = json.loads(figures.read_text())
    assert written["command"] == "ppo" and written["episodes"] == 8
    assert {"score", "kl", "kl_coef", "eval_reward", "times", "tokens_per_second", "format_version"} <= set(written)
    capsys.readouterr()
    assert main(command) == 2
    assert "tutelage ppo: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--top_p", "0.9"])
    assert "the ratio of the two would be wrong" in " ".join(capsys.readouterr().err.replace("│", " ").split())
