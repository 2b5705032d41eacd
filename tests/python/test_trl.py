"""Beside TRL: on the same model, rows and settings, sft, dpo and reward have the losses of its trainers, step by step."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chats_for_tests import CHATML_MARKED, TEMPLATES, turns
from runs_for_tests import save_model, write_rows
from tutelage import Tokenizer, load_preferences, load_sft
from tutelage.bench import trl as bench_trl
from tutelage.data.examples import Batches, ExampleSet
from tutelage.train.configs import DpoConfig, RewardConfig, SftConfig
from tutelage.train.dpo import dpo
from tutelage.train.picture import read_metrics
from tutelage.train.reward import reward
from tutelage.train.sft import sft

pytestmark = [
    pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11"),
    pytest.mark.slow,  # TRL alone takes ten seconds to import
    pytest.mark.usefixtures("one_thread", "offline"),
    pytest.mark.filterwarnings("ignore"),  # TRL's own
]

STEPS, BATCH, ROWS, LONGEST = 10, 8, 30, 96
EQUAL = 1e-4
"""Within this the losses agree, in nats; measured: 1e-6."""
DIFFERENT = 1e-3
"""Beyond this they do not."""

Rows = Sequence[dict[str, Any]]
Losses = list[float]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked for on the hub, or sent there."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")


# ---- the rows: of several lengths, and not a multiple of the batch, so that an epoch ends within a step


def answer(i: int) -> str:
    return f" it is {i * 7 % 10}{' so' * (i % 5)}"


def asked(i: int) -> str:
    return f"{'say ' * (i % 4)}{i}"


PROMPT_COMPLETION = [{"prompt": asked(i), "completion": answer(i)} for i in range(ROWS)]
TEXT = [{"text": asked(i) + answer(i)} for i in range(ROWS)]
MESSAGES = [{"messages": turns(asked(i), answer(i), "and" + answer(i), asked(i))} for i in range(ROWS)]
# The two answers of a pair differ by one figure, so that they are not told apart in a step or two.
PAIRS = [{"prompt": asked(i), "chosen": answer(i), "rejected": answer(i + 1 + i % 3)} for i in range(ROWS)]
CHATS = [
    {"prompt": turns(row["prompt"]), **{side: turns("", row[side])[1:] for side in ("chosen", "rejected")}} for row in PAIRS
]
MARGINS = [{**row, "margin": 0.5 * (i % 3)} for i, row in enumerate(PAIRS)]

# A template that writes a line break behind the stop token would not do: TRL learns it too, we do not (see examples.py). One
# whose prompts end with a line break neither: TRL encodes prompt and answer as one text, so the two may share a token.
MISTRAL = TEMPLATES["mistral"]


# ---- a run of each


@dataclass(frozen=True)
class Stage:
    """A loop of ours and the trainer that does the same."""

    train: Callable[[Any], Any]
    config: type[Any]
    load: Callable[..., ExampleSet[Any]]
    trainer: str
    """TRL's, and its arguments' with Config in the place of Trainer."""
    model: str
    """transformers' class of the model."""


SFT = Stage(sft, SftConfig, load_sft, "SFTTrainer", "AutoModelForCausalLM")
DPO = Stage(dpo, DpoConfig, load_preferences, "DPOTrainer", "AutoModelForCausalLM")
REWARD = Stage(reward, RewardConfig, load_preferences, "RewardTrainer", "AutoModelForSequenceClassification")

# What both call by one name. Large steps, so that ten of them lead far away and every setting shows.
SETTINGS = {"learning_rate": 5e-3, "weight_decay": 1.0, "max_grad_norm": 1.0, "max_steps": STEPS}


def ours(stage: Stage, base: Path, rows: Rows, folder: Path, **options: Any) -> Losses:
    config = stage.config(
        output_dir=str(folder / "ours"),
        model=str(base),
        data=(str(write_rows(folder / "rows.jsonl", rows)),),
        eval_fraction=0.0,
        batch_size=BATCH,
        micro_batch_tokens=250,  # several micro-batches a step
        min_lr_ratio=1.0,  # a constant learning rate
        logging_steps=1,
        plot=False,
        **{**SETTINGS, **options},
    )
    stage.train(config)
    return [line["loss"] for line in read_metrics(folder / "ours" / "metrics.jsonl")]


def in_our_order(stage: Stage, base: Path, rows: Rows) -> Rows:
    """The rows as the loop takes them, one epoch after the other."""
    data = Batches(stage.load(rows, Tokenizer.from_pretrained(base), LONGEST), SftConfig().seed)
    count = STEPS * BATCH
    return [rows[index] for epoch in range(-(-count // len(rows))) for index in data.order(epoch)][:count]


def theirs(stage: Stage, base: Path, rows: Rows, folder: Path, **options: Any) -> Losses:
    trl, transformers, datasets = map(importlib.import_module, ("trl", "transformers", "datasets"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = "<|eot_id|>"  # not the end token: its reward model would read before it
    arguments = getattr(trl, stage.trainer.replace("Trainer", "Config"))(
        output_dir=str(folder / "theirs"),
        max_length=LONGEST,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{**SETTINGS, **options},
    )
    trainer = getattr(trl, stage.trainer)(
        model=getattr(transformers, stage.model).from_pretrained(base, dtype="float32"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(list(in_our_order(stage, base, rows))),
        processing_class=tokenizer,
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def largest_difference(mine: Losses, its: Losses) -> float:
    assert len(mine) == len(its) == STEPS
    return max(abs(a - b) for a, b in zip(mine, its, strict=True))


@dataclass(frozen=True)
class Case:
    stage: Stage
    rows: Rows
    template: str | None
    both: dict[str, Any]
    """Options of one name."""
    other: dict[str, Any]
    """The control: with this option of ours, which TRL is not told, the losses must differ."""
    trl: dict[str, Any]
    """Options of TRL's only."""


CASES = {
    "sft, prompt-completion": Case(SFT, PROMPT_COMPLETION, None, {}, {"learning_rate": 6e-3}, {}),
    "sft, prompt and completion learned": Case(
        SFT, PROMPT_COMPLETION, None, {"completion_only_loss": False}, {"completion_only_loss": True}, {}
    ),
    "sft, text": Case(SFT, TEXT, None, {}, {"weight_decay": 0.0}, {}),
    "sft, messages": Case(SFT, MESSAGES, CHATML_MARKED, {"assistant_only_loss": True}, {"assistant_only_loss": False}, {}),
    "dpo": Case(DPO, PAIRS, None, {"beta": 0.1}, {"beta": 0.12}, {}),
    "dpo, its reference computed before": Case(
        DPO, PAIRS, None, {"beta": 0.1}, {"seed": 1}, {"precompute_ref_log_probs": True}
    ),
    "dpo, messages": Case(DPO, CHATS, MISTRAL, {"beta": 0.5}, {"beta": 0.4}, {}),
    "ipo": Case(DPO, PAIRS, None, {"loss_type": "ipo", "beta": 0.5}, {"loss_type": "sigmoid"}, {}),
    "reward": Case(REWARD, PAIRS, None, {}, {"learning_rate": 4e-3}, {}),
    "reward, messages": Case(REWARD, CHATS, MISTRAL, {}, {"max_grad_norm": 100.0}, {}),
    "reward, centred": Case(REWARD, PAIRS, None, {"center_rewards_coefficient": 0.1}, {"center_rewards_coefficient": 0.0}, {}),
    "reward, margins": Case(REWARD, MARGINS, None, {}, {"margin": False}, {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_losses_of_ten_steps_are_trls(case: Case, tmp_path: Path) -> None:
    head = "scalar" if case.stage is REWARD else "lm"
    base = save_model(tmp_path / "base", case.template, head=head)
    its = theirs(case.stage, base, case.rows, tmp_path, **case.both, **case.trl)
    mine = ours(case.stage, base, case.rows, tmp_path, **case.both)
    assert largest_difference(mine, its) < EQUAL
    assert max(mine) - min(mine) > 20 * DIFFERENT  # the model has not stood still
    (tmp_path / "other").mkdir()
    different = ours(case.stage, base, case.rows, tmp_path / "other", **{**case.both, **case.other})
    assert largest_difference(different, its) > DIFFERENT, case.other


# The PPO trainer is TRL 1.12's; later versions, as the one that the tests install, have none.
@pytest.mark.parametrize("name", sorted(bench_trl.LOSSES.keys() - {"ppo"}))
def test_the_trainers_of_the_benchmark_take_one_step_after_the_other(name: str, tmp_path: Path) -> None:
    base, sft_rows = save_model(tmp_path / "base"), name == "sft"
    rows = write_rows(tmp_path / "rows.jsonl", (PROMPT_COMPLETION if sft_rows else PAIRS)[:4])
    trainer = bench_trl.Trainer(name, base, rows, 4, LONGEST)
    weight = trainer._trainer.model.model.norm.weight
    seen = [weight.detach().clone()]
    for _ in range(3):
        assert 0 < trainer.seconds() < 10
        seen.append(weight.detach().clone())
    assert all(not before.equal(after) for before, after in itertools.pairwise(seen))
    assert trainer._trainer.optimizer.state[weight]["step"] == 3  # one optimizer throughout
