"""The stages of the school, as a table. No torch here: `tutelage school --help` reads only this.

All but two are commands that a user runs on data of their own: a stage is the command's name and its config, and the course
prints it as a command line before it runs it. The two are those that nobody needs who has data and people to judge answers:
the world, and the simulated labeller.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from tutelage.train.configs import (
    DpoConfig,
    GenerateConfig,
    LabelConfig,
    OrpoConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TokenizerConfig,
)

StageName = Literal["world", "tokenizer", "pretrain", "sft", "answers", "labels", "reward", "ppo", "ppo_ptx", "dpo", "orpo"]
T = TypeVar("T")

#: Longest answer in tokens; what the world's people say has about twenty.
ANSWER_TOKENS = 40
#: Answers that the simulated labeller ranks at a time.
ANSWERS_PER_PROMPT = 4


@dataclass(frozen=True)
class SchoolConfig:
    """Take a model from nothing through all stages, and see what each has taught it.

    The school makes a small world of people with homes, pets and trades, and texts about them. A model reads the texts, is
    taught to answer, and learns from preferences that kind answers are better, in four ways: PPO, PPO-ptx, DPO, ORPO. After
    each stage it sits the same exam, about people that it was never asked about: what it says of them, it knows from reading.

    Every stage is a command that runs on your own data, too; it is printed before it runs. About five minutes on two cores,
    without any download. A school that is killed and resumed ends in the same bits as one that was not.
    """

    output_dir: str = "runs/school"
    """Folder of the school: report.html, a folder for each stage with its model, exam/ with all answers."""
    size: Literal["tiny", "small"] = "small"
    """small: about five minutes, and everything is learned. tiny: seconds, to see that it runs; nothing is learned well."""
    seed: int = 0
    """Of the world, and of everything random in all stages. The same command gives the same models, bit for bit."""
    stages: tuple[StageName, ...] = ()
    """Only these stages, upon what an earlier school with --keep has left in output_dir. None: all."""
    resume: Literal["auto"] | None = None
    """auto: go on with the school in output_dir; what is finished stays as it is."""
    overwrite: bool = False
    """Remove an earlier school in output_dir and start again; with --stages only these stages and what follows from them."""
    keep: bool = False
    """Leave data and checkpoints in output_dir, so that every printed command and --stages can be run again. Otherwise the
    report, the models and the answers in the exam stay."""
    json: str | None = None
    """Write the figures of the exams to this file: {"sft": {"right": ..., "kind": ...}, "ppo": {...}, ...}."""
    human: bool = False
    """Judge the answers yourself: where the simulated labeller would rank them, a page opens on which you do, and the school
    goes on when you have ranked all. Ctrl-C leaves it; --resume auto comes back to where you were."""
    human_questions: int = 60
    """With human: rank the answers to so many questions, at least 4."""
    browser: bool = True
    """With human: open the page in the browser of this machine; its address is printed too."""
    port: int = 0
    """With human: port of the page. 0: any that is free."""

    def __post_init__(self) -> None:
        if self.human_questions < 4:
            raise ValueError(
                f"human_questions must be at least 4, so that some can be held out, but it is {self.human_questions}"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in 0 .. 2^64 - 1, but it is {self.seed}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other: pass one of them")


@dataclass(frozen=True)
class Plan:
    """A school's folder, and what its size and seed decide."""

    folder: Path
    size: Literal["tiny", "small"]
    seed: int
    human: int = 0
    """Questions whose answers a person ranks; 0: the simulated labeller does."""

    @property
    def feedback(self) -> Path:
        """What the person has said."""
        return self.folder / "labels" / "feedback.db"

    def data(self, name: str) -> str:
        return str(self.folder / "data" / f"{name}.jsonl")

    def model(self, stage: str) -> str:
        return str(self.folder / stage / "model")

    def run(self, stage: str, **others: Any) -> dict[str, Any]:
        """What all training stages are told. They have no picture of their own: the report draws them together."""
        return {
            "output_dir": str(self.folder / stage),
            "seed": self.seed,
            "logging_steps": self.by_size(5, 20),
            "eval_steps": self.by_size(20, 200),
            "plot": False,
            **others,
        }

    def by_size(self, tiny: T, small: T) -> T:
        return tiny if self.size == "tiny" else small


@dataclass(frozen=True)
class Stage:
    """A part of the course."""

    title: str
    told: str
    """What it does, to somebody who hears of it for the first time."""
    needs: tuple[StageName, ...]
    """Stages whose results it reads."""
    command: str | None = None
    """Of the command line; None: a part of the school itself."""
    config: Callable[[Plan], Any] | None = None
    """The command's options."""
    reads: tuple[str, ...] = ()
    """Data files, by name."""
    examined: bool = False
    """Whether its model sits the exam."""
    curve: str = "loss"
    """The figure of metrics.jsonl that shows its learning."""
    held_out: str = "eval_loss"
    """The figure that was measured on what is held out."""
    unit: str = ""
    """Of both."""


def _tokenizer(plan: Plan) -> TokenizerConfig:
    return TokenizerConfig(
        output_dir=str(plan.folder / "tokenizer"),
        overwrite=True,
        data=(plan.data("texts"), plan.data("spelling")),
        vocab_size=plan.by_size(512, 1024),
    )


def _pretrain(plan: Plan) -> PretrainConfig:
    return PretrainConfig(
        **plan.run("pretrain"),
        data=(plan.data("texts"),),
        tokenizer=str(plan.folder / "tokenizer"),
        size=plan.size,
        context=128,
        batch_tokens=1024,
        max_steps=plan.by_size(200, 1600),
        learning_rate=plan.by_size(5e-3, 3e-3),
        held_out_fraction=0.01,
    )


def _sft(plan: Plan) -> SftConfig:
    return SftConfig(
        **plan.run("sft"),
        model=plan.model("pretrain"),
        data=(plan.data("demonstrations"),),
        num_train_epochs=3.0,
        learning_rate=plan.by_size(3e-3, 1e-3),
    )


def _answers(plan: Plan) -> GenerateConfig:
    return GenerateConfig(
        model=plan.model("sft"),
        prompts_file=plan.data("practice"),
        output=plan.data("answers"),
        samples_per_prompt=ANSWERS_PER_PROMPT,
        max_new_tokens=ANSWER_TOKENS,
        seed=plan.seed,
    )


def judged(plan: Plan) -> LabelConfig:
    """How a person ranks the answers."""
    return LabelConfig(
        out=str(plan.feedback),
        responses=plan.data("to_judge"),
        seed=plan.seed,
        title="Which answers are better?",
        guidelines=plan.data("guidelines").removesuffix(".jsonl") + ".txt",
        stop_when_complete=True,
    )


def _reward(plan: Plan) -> RewardConfig:
    return RewardConfig(
        **plan.run("reward", eval_steps=plan.by_size(20, 50)),
        model=plan.model("sft"),
        data=(plan.data("rankings"),),
        demonstrations=plan.data("demonstrations"),
        eval_fraction=0.1,
        # A person ranks less: what there is, is seen more often.
        num_train_epochs=plan.by_size(1.0, 6.0 if plan.human else 2.0),
        learning_rate=5e-4,
    )


def _ppo(plan: Plan, stage: str = "ppo", **others: Any) -> PpoConfig:
    return PpoConfig(
        **plan.run(stage, logging_steps=1, eval_steps=plan.by_size(20, 20)),
        model=plan.model("sft"),
        reward_model=plan.model("reward"),
        data=(plan.data("practice"),),
        max_completion_length=ANSWER_TOKENS,
        max_steps=plan.by_size(4, 60),
        batch_size=plan.by_size(16, 64),
        learning_rate=3e-4,
        kl_coef=0.3,
        **others,
    )


def _ppo_ptx(plan: Plan) -> PpoConfig:
    return _ppo(plan, "ppo_ptx", ptx_coef=0.3, ptx_data=(plan.data("texts"),), ptx_ratio=0.25)


def _dpo(plan: Plan) -> DpoConfig:
    return DpoConfig(
        **plan.run("dpo"),
        model=plan.model("sft"),
        data=(plan.data("preferences"),),
        num_train_epochs=4.0 if plan.human else 1.0,
        # The simulated labeller errs; and a model that may not go far learns the tone before it forgets the facts.
        beta=1.0,
        label_smoothing=0.1,
    )


def _orpo(plan: Plan) -> OrpoConfig:
    return OrpoConfig(
        **plan.run("orpo"),
        # From the model that has only read it learns to be kind as well, but the pairs are about too few people to learn from
        # them alone how to answer about others: 79 % right in place of 98 %.
        model=plan.model("sft"),
        data=(plan.data("preferences"),),
        num_train_epochs=4.0 if plan.human else 1.0,
        learning_rate=1e-4,
        beta=0.3,
    )


#: In their order. A stage comes after all that it needs.
STAGES: Mapping[StageName, Stage] = MappingProxyType(
    {
        "world": Stage(
            title="A world to read about",
            told="People are invented, six facts about each: home, pet, colour, food, work, mood. They are told in short texts "
            "of many wordings. Nobody will ever ask the model about the exam people before the exam.",
            needs=(),
        ),
        "tokenizer": Stage(
            title="Letters become tokens",
            told="A model reads tokens, not letters. A byte-level BPE joins what often stands together, until frequent words "
            "are one token each.",
            needs=("world",),
            command="tokenizer",
            config=_tokenizer,
            reads=("texts", "spelling"),
        ),
        "pretrain": Stage(
            title="Reading",
            told="The model starts as random numbers and predicts every next token of the texts. To predict “Ada Hill lives "
            "in” well, it has to remember where she lives. It learns the world, but not that it is to answer.",
            needs=("tokenizer",),
            command="pretrain",
            config=_pretrain,
            reads=("texts",),
            examined=True,
            unit="nats per token",
            held_out="",
        ),
        "sft": Stage(
            title="Being shown",
            told="Supervised fine-tuning: examples of questions and answers, about other people than those of the exam. Half "
            "of the answers are kind, half are rude. The model learns to answer, and it answers in both tones.",
            needs=("pretrain",),
            command="sft",
            config=_sft,
            reads=("demonstrations",),
            examined=True,
            unit="nats per token",
        ),
        "answers": Stage(
            title="Trying",
            told=f"The model answers each practice question {ANSWERS_PER_PROMPT} times, drawing every token at random from its "
            "own distribution.",
            needs=("sft",),
            command="generate",
            config=_answers,
            reads=("practice",),
        ),
        "labels": Stage(
            title="Being judged by the simulated labeller",
            told="Where InstructGPT had people who ranked answers, this course has a program: the simulated labeller prefers "
            "right to wrong and kind to rude, and errs in one judgement of twenty.",
            needs=("answers",),
            reads=("practice", "answers"),
        ),
        "reward": Stage(
            title="A model of the judge",
            told="A reward model: a copy of the model with one number as its output learns to give the answer that the "
            "simulated labeller ranked higher the higher number. Then it can judge answers that nobody has ranked.",
            needs=("sft", "labels"),
            command="reward",
            config=_reward,
            reads=("rankings", "demonstrations"),
            unit="nats per pair",
        ),
        "ppo": Stage(
            title="Learning by trying",
            told="PPO: the model answers, the reward model says how good that was, and the tokens that led to better answers "
            "than expected become likelier. It costs something to move away from where it started.",
            needs=("sft", "reward"),
            command="ppo",
            config=_ppo,
            reads=("practice",),
            examined=True,
            curve="objective/scores",
            held_out="eval_reward",
            unit="reward",
        ),
        "ppo_ptx": Stage(
            title="Learning by trying, and reading on",
            told="PPO-ptx: as PPO, with some of the texts to read in every step, so that what was read is not forgotten.",
            needs=("sft", "reward"),
            command="ppo",
            config=_ppo_ptx,
            reads=("practice", "texts"),
            examined=True,
            curve="objective/scores",
            held_out="eval_reward",
            unit="reward",
        ),
        "dpo": Stage(
            title="Learning from pairs",
            told="DPO: no reward model and no trying. Of every two ranked answers the better one becomes likelier and the "
            "worse one less likely, compared with what the model thought of them before.",
            needs=("sft", "labels"),
            command="dpo",
            config=_dpo,
            reads=("preferences",),
            examined=True,
            unit="nats per pair",
        ),
        "orpo": Stage(
            title="Both at once",
            told="ORPO: from the same pairs. The model learns the better answer as an example and, in the same step, that the "
            "worse one is worse; nothing holds it to where it began. ORPO can do without SFT, but here it starts from there.",
            needs=("sft", "labels"),
            command="orpo",
            config=_orpo,
            reads=("preferences",),
            examined=True,
            unit="nats per pair",
        ),
    }
)

_BY_A_PERSON = Stage(
    title="Being judged by you",
    told="You rank the answers, as people did for InstructGPT. What you like better is what the model will learn to say: this "
    "course does not know, and whatever you decide, it goes on with.",
    needs=("answers",),
    command="label",
    config=judged,
    reads=("practice", "answers"),
)


def stage_of(name: StageName, plan: Plan) -> Stage:
    """A stage as this school holds it."""
    return _BY_A_PERSON if name == "labels" and plan.human else STAGES[name]


#: Stages whose model sits the exam, in the course's order.
EXAMINED: tuple[StageName, ...] = tuple(name for name, stage in STAGES.items() if stage.examined)


def followers(names: set[StageName]) -> set[StageName]:
    """These stages, and all that read something of theirs, directly or not."""
    found = set(names)
    for name, stage in STAGES.items():  # each after what it needs
        if found & set(stage.needs):
            found.add(name)
    return found


def command_line(command: str, config: Any) -> str:
    """What to type for the same run: every option that is not at its default, but for `overwrite` and `resume`."""
    words = ["tutelage", command]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in ("overwrite", "resume"):
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
        else:
            words += [f"--{field.name}", *map(_word, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
