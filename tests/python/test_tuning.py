"""Adapters in every loop: what learns, one base for all, the same bits through any kill, cut and thread count (P4, P5)."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import children as loops
from chats_for_tests import turns
from forked import Forker, forker
from models_for_tests import bits, threads
from runs_for_tests import digest, kill_rounds, killed_and_resumed, uninterrupted, write_rows
from trying_for_tests import ANSWER, newest, save_policy, save_prompts
from tutelage import Model
from tutelage.checkpoint import load_checkpoint
from tutelage.cli import main
from tutelage.hub import hugging_face
from tutelage.hub.model_card import read_lineage
from tutelage.train.configs import DpoConfig, SftConfig
from tutelage.train.picture import read_metrics
from tutelage.train.tuning import TuningResult, before, content, start

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
EVERY = ["sft", "reward", "dpo", "orpo", "ppo", "grpo"]
every_loop = pytest.mark.parametrize("loop", EVERY)


@dataclasses.dataclass(frozen=True)
class World:
    """Folders of a language model, an adapter of a reward model on it, and the rows of each loop."""

    base: Path
    judge: Path
    rows: dict[str, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = save_policy(folder / "base")
    judge = Model.from_pretrained(base).with_lora(2, 4, ("q_proj", "down_proj"), "scalar", seed=5)
    judge.params += 0.3 * torch.randn(judge.params.numel(), generator=torch.Generator().manual_seed(4))
    judge.reward_bias = 0.25
    judge.save_pretrained(folder / "judge")
    shown = [{"messages": turns(f"{'say ' * (i % 4)}{i}", f"it is {i * 7 % 10}")} for i in range(20)]
    pairs = [
        {"prompt": f"{'say ' * (i % 4)}{i}", "chosen": f" it is {i % 10}", "rejected": f" so{' so' * (i % 3)}"}
        for i in range(16)
    ]
    compared = write_rows(folder / "pairs.jsonl", pairs)
    prompts = save_prompts(folder)
    rows = {"sft": write_rows(folder / "shown.jsonl", shown), "ppo": prompts, "grpo": prompts}
    return World(base, folder / "judge", {**dict.fromkeys(["reward", "dpo", "orpo"], compared), **rows})


TRYING: dict[str, Any] = {"max_completion_length": ANSWER, "num_mini_batches": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {**TRYING, "num_ppo_epochs": 2, "ema_decay": 0.5, "kl_coef": 0.2},
    "grpo": {**TRYING, "num_generations": 3, "beta": 0.1},
}


def fields(loop: str, world: World, folder: Path, **others: Any) -> dict[str, Any]:
    judged = {"reward_model": str(world.judge)} if loop in ("ppo", "grpo") else {}
    return {
        "output_dir": str(folder),
        "model": str(world.base),
        "data": [str(world.rows[loop])],
        "eval_fraction": 0.2,
        "batch_size": 4,
        "micro_batch_tokens": 80,
        "max_steps": STEPS,
        "learning_rate": 2e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "eval_steps": 2,
        "plot": False,
        "lora_rank": 3,
        "lora_alpha": 6.0,
        **judged,
        **OPTIONS.get(loop, {}),
        **others,
    }


def run(loop: str, world: World, folder: Path, **others: Any) -> TuningResult:
    _, train, config = loops.LOOPS[loop]
    values = fields(loop, world, folder, **others)
    result = train(config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}))
    assert isinstance(result, TuningResult)
    return result


def state_of(folder: Path) -> list[bytes]:
    """Of a finished run: its last checkpoint's tensors and its model."""
    weights = next((folder / "model").glob("*model.safetensors"))
    return [(newest(folder) / "tensors.safetensors").read_bytes(), weights.read_bytes()]


# ---- what learns


@every_loop
def test_every_loop_learns_an_adapter(loop: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(loop, world, tmp_path)
    names = {path.name for path in result.folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names and "config.json" not in names
    model, base = Model.from_pretrained(result.folder), Model.from_pretrained(world.base)
    assert model.base is not None and model.lora is not None and model.lora.rank == 3
    assert bits(model.base.params) == bits(base.params) and model.base.is_from(world.base)
    fresh = base.with_lora(3, 6, (), model.head)
    assert bits(model.params) != bits(fresh.params) and torch.isfinite(model.params).all()
    tensors = load_checkpoint(newest(tmp_path)).tensors
    assert tensors["params"].numel() == tensors["exp_avg"].numel() == model.params.numel() < base.params.numel()
    if loop == "ppo":  # the critic is the reward model's adapter, on the same base
        assert tensors["critic.params"].numel() == Model.from_pretrained(world.judge, base=base).params.numel()
    assert f"{model.params.numel():,} parameters beside the {base.params.numel():,} of its base" in capsys.readouterr().out
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    unmoved = {"dpo": "rewards/margins", "ppo": "objective/kl", "grpo": "kl"}
    if loop in unmoved:
        assert lines[0][unmoved[loop]] == 0.0, "the reference is the base: an adapter that adds nothing has its bits"
        assert lines[-1][unmoved[loop]] != 0.0


@pytest.mark.parametrize("loop", ["ppo", "grpo", "dpo", "sft"])
def test_the_base_is_in_memory_once(loop: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    read = hugging_face.read_tensors

    def counted(folder: Path, *arguments: Any, **others: Any) -> Any:
        loaded.append(Path(folder))
        return read(folder, *arguments, **others)

    monkeypatch.setattr(hugging_face, "read_tensors", counted)
    others: dict[str, Any] = {"ref_model": str(world.base)} if loop in ("grpo", "dpo") else {}
    run(loop, world, tmp_path, **{"reward_model": str(world.judge), "select_by": "eval_reward"} if loop == "sft" else others)
    assert loaded == [world.base]


def test_without_a_reward_model_the_critic_is_an_adapter_on_the_same_base(world: World, tmp_path: Path) -> None:
    functions = [f"{Path(__file__).with_name('rewards_for_tests.py')}:letters"]
    run("ppo", world, tmp_path, reward_model=None, reward_funcs=functions, lora_target_modules=["q_proj"], max_steps=2)
    tensors = load_checkpoint(newest(tmp_path)).tensors
    hidden = Model.from_pretrained(world.base).config.hidden_size
    assert tensors["critic.params"].numel() == tensors["params"].numel() + hidden


def test_a_reward_model_of_its_own_is_the_base_of_the_critic(world: World, tmp_path: Path) -> None:
    Model.from_pretrained(world.judge).merge().save_pretrained(tmp_path / "judge")
    run("ppo", world, tmp_path / "run", reward_model=str(tmp_path / "judge"), max_steps=2)
    tensors = load_checkpoint(newest(tmp_path / "run")).tensors
    assert tensors["critic.params"].numel() < 2 * tensors["params"].numel()


def test_a_reward_models_adapter_judges_a_policy_that_learns_whole(world: World, tmp_path: Path) -> None:
    result = run("ppo", world, tmp_path, lora_rank=0, max_steps=2)
    assert Model.from_pretrained(result.folder).base is None
    tensors = load_checkpoint(newest(tmp_path)).tensors
    assert abs(tensors["critic.params"].numel() - tensors["params"].numel()) < 100


def test_the_best_adapter_is_saved(world: World, tmp_path: Path) -> None:
    result = run(
        "sft",
        world,
        tmp_path,
        select_by="eval_loss",
        learning_rate=30.0,
        eval_steps=1,
        max_steps=5,
        lr_scheduler_type="constant",
    )
    measured = [line["eval_loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in line]
    assert result.eval_loss == min(measured) and result.selected_step == measured.index(min(measured)) + 1 < 5


# ---- one adapter after the other


def test_a_merged_model_is_saved_on_request(world: World, tmp_path: Path) -> None:
    adapter = Model.from_pretrained(run("sft", world, tmp_path / "adapter").folder)
    merged = Model.from_pretrained(run("sft", world, tmp_path / "merged", lora_merge=True).folder)
    assert merged.base is None and bits(merged.params) == bits(adapter.merge().params)
    assert merged.eos_token_ids == adapter.eos_token_ids


def test_an_adapters_folder_is_trained_on(world: World, tmp_path: Path) -> None:
    taught = run("sft", world, tmp_path / "sft").folder
    run("dpo", world, tmp_path / "dpo", model=str(taught), loss_type="ipo")
    lines = read_metrics(tmp_path / "dpo" / "metrics.jsonl")
    assert lines[0]["rewards/margins"] == 0.0, "the reference is the adapter as it began"
    preferring = Model.from_pretrained(tmp_path / "dpo" / "model")
    assert [stage.command for stage in read_lineage(tmp_path / "dpo" / "model").stages] == ["sft", "dpo"]
    assert preferring.base is not None and preferring.base.is_from(world.base)
    run("ppo", world, tmp_path / "ppo", model=str(taught), max_steps=2)
    assert next(iter(read_metrics(tmp_path / "ppo" / "metrics.jsonl")))["objective/kl"] == 0.0

    config = DpoConfig(**{**fields("dpo", world, tmp_path, model=str(taught)), "data": ("x",)})
    adapter = Model.from_pretrained(taught)
    assert bits(start(config, "lm").params) == bits(adapter.params)
    critic = start(config, "scalar")
    assert critic.head == "scalar" and torch.equal(critic.params[: adapter.params.numel()], adapter.params)
    whole = start(dataclasses.replace(config, lora_rank=0), "lm")
    assert whole.base is None and bits(whole.params) == bits(adapter.merge().params)
    with pytest.raises(ValueError, match=re.escape(
        f"{taught} holds an adapter of lora_rank 3, lora_alpha 6 and lora_target_modules q_proj k_proj v_proj o_proj gate_proj "
        "up_proj down_proj: give the same to train it on, or merge it into a model first (--lora_merge)"
    )):  # fmt: skip
        start(dataclasses.replace(config, lora_rank=4), "lm")


def test_the_other_commands_take_an_adapters_folder(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(run("sft", world, tmp_path / "run", max_steps=2).folder)
    assert main(["generate", "--model", folder, "--prompt", "say 3", "--max_new_tokens", "4", "--weights", "bfloat16"]) == 0
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "say 3", "completion": " it is 1"}])
    assert main(["eval", "kl", "--model", folder, "--against", str(world.base), "--data", str(rows)]) == 0
    assert main(["data", "check", str(world.rows["sft"]), "--model", folder]) == 0
    config = tmp_path / "run" / "model" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(world.base), str(tmp_path / "nowhere")))
    assert main(["generate", "--model", folder, "--prompt", "say 3"]) == 2
    assert "which is no folder here (tutelage downloads nothing)" in capsys.readouterr().err


def test_before_is_the_base_until_the_adapter_has_learned(world: World) -> None:
    base = Model.from_pretrained(world.base)
    policy = base.with_lora(2)
    assert before(policy) is base and before(base) is not base
    assert content(policy) != content(base)
    policy.params += 0.1
    copy = before(policy)
    assert copy is not policy and copy.base is base and bits(copy.params) == bits(policy.params)
    assert content(copy) == content(policy)
    base.params += 1
    assert content(copy) == content(policy) != content(base.with_lora(2))


# ---- the same bits


@every_loop
def test_any_cut_and_any_number_of_threads_end_in_the_same_state(loop: str, world: World, tmp_path: Path) -> None:
    run(loop, world, tmp_path / "expected", max_steps=2)
    expected = state_of(tmp_path / "expected")
    with threads(2):
        run(loop, world, tmp_path / "cut", max_steps=2, micro_batch_tokens=300)
    assert state_of(tmp_path / "cut") == expected
    run(loop, world, tmp_path / "control", max_steps=2, seed=1)
    assert state_of(tmp_path / "control") != expected


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("children"), "children", "torch._dynamo") as parent:
        yield parent


def killed(children: Forker, loop: str, world: World, folder: Path, kill: dict[str, int], **others: Any) -> str:
    return killed_and_resumed(children, loop, fields(loop, world, folder), kill, **others)


@pytest.mark.parametrize("loop", ["ppo", *(pytest.param(loop, marks=pytest.mark.slow) for loop in EVERY if loop != "ppo")])
def test_a_kill_changes_no_bit(loop: str, children: Forker, world: World, tmp_path: Path) -> None:
    whole = uninterrupted(children, loop, fields(loop, world, tmp_path / "whole"))
    assert killed(children, loop, world, tmp_path / "early", {"point": whole.points * 2 // 3}) == whole.digest
    if loop == "ppo":
        forgetful = killed(children, loop, world, tmp_path / "control", {"point": whole.points * 2 // 3}, forget_cursor=True)
        assert forgetful != whole.digest


@kill_rounds(2, 25)
def test_many_kills(children: Forker, world: World, tmp_path: Path, rounds: int) -> None:
    whole = uninterrupted(children, "ppo", fields("ppo", world, tmp_path / "whole"))
    chance = random.Random(0)
    for number in range(rounds):
        kill = {"operation": chance.randint(1, whole.operations)} if number % 2 else {"point": chance.randint(1, whole.points)}
        assert killed(children, "ppo", world, tmp_path / str(number), kill) == whole.digest, kill


def test_a_resume_with_another_adapter_or_base_is_refused(world: World, tmp_path: Path) -> None:
    run("sft", world, tmp_path / "run", max_steps=2)
    for name, value in {"lora_rank": 4, "lora_alpha": 7.0, "lora_target_modules": ["q_proj"]}.items():
        with pytest.raises(ValueError, match=f"cannot resume .*: {name} is "):
            run("sft", world, tmp_path / "run", resume="auto", **{"max_steps": 2, name: value})
    other = save_policy(tmp_path / "other", seed=9)
    config = json.loads((newest(tmp_path / "run") / "state.json").read_text())["state"]["config"]
    assert config["model"] == str(world.base)
    content_before = {path: path.read_bytes() for path in world.base.iterdir()}
    try:
        for path in other.iterdir():
            (world.base / path.name).write_bytes(path.read_bytes())
        with pytest.raises(ValueError, match="the model to start from is not what that run started from"):
            run("sft", world, tmp_path / "run", max_steps=2, resume="auto")
    finally:
        for path, old in content_before.items():
            path.write_bytes(old)
    run("sft", world, tmp_path / "run", max_steps=2, resume="auto", lora_merge=True)
    assert digest(tmp_path / "run", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, "lora_rank must be at least 0, but it is -1"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "lora_alpha must be positive and finite, but it is 0.0"),
        ({"lora_target_modules": ("q_proj",)}, "lora_target_modules is for an adapter: give a lora_rank too"),
        ({"lora_merge": True}, "lora_merge is for an adapter: give a lora_rank too"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SftConfig(**options)
