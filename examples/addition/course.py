"""The course: SmolLM2-135M-Instruct → SFT on sums, few steps → PPO and GRPO with an exact-match reward → what each has learned.

There is no reward model and nobody to ask: the reward is a function of ten lines, `reward.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addition.sums import sums
from common.course import Course, CourseConfig
from common.measures import MICRO_BATCH_TOKENS, openings, perplexity
from common.model import smollm2
from common.page import Measure, Results, Sample
from common.plain import articles
from common.stage import Figures, Stage, Taken, loop
from tutelage import Model, files
from tutelage.evaluate import kl_divergence, rate
from tutelage.school.data import read_rows, write_rows
from tutelage.train.configs import GrpoConfig, PpoConfig, SftConfig
from tutelage.train.grpo import grpo
from tutelage.train.ppo import ppo
from tutelage.train.sft import sft


@dataclass(frozen=True)
class AdditionConfig(CourseConfig):
    """A second worked case: SmolLM2-135M-Instruct learns two-digit addition from a reward that can be checked.

    At the start no answer has the exact form. SFT shows it a few hundred sums; PPO and GRPO then let it try others and say
    only whether the answer was exactly right. About twenty minutes on two cores; every stage can be resumed.
    """

    output_dir: str = "runs/addition"
    """Folder of the course: report.html, figures.json, a folder for each stage."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    exam: int = 500
    """Sums that nothing learns from."""
    shown: int = 1500
    """Sums that SFT may read."""
    longest: int = 4
    """Tokens of an answer: three digits and the end."""
    window: int = 512
    """Tokens of each article that perplexity is measured on."""
    articles: int = 12
    sft_batch: int = 32
    sft_steps: int = 80
    batch: int = 128
    """Answers of a step, for PPO and GRPO alike."""
    group: int = 4
    """Of them answers to one sum, for GRPO."""
    ppo_steps: int = 40
    grpo_steps: int = 90
    """More of them, as each asks only `batch / group` sums and has no critic to teach."""
    lora_rank: int = 16


QUICK = Sizes(exam=32, shown=100, window=128, articles=4, sft_steps=4, batch=16, group=4, ppo_steps=2, grpo_steps=2)


@dataclass(frozen=True)
class Sources:
    """What a course begins with; tests give their own."""

    model: Callable[[Path], None]
    """Makes the folder of the model to start from."""
    articles: Callable[[], list[str]]


def packaged(packages: Path) -> Sources:
    """From the public packages."""
    return Sources(lambda folder: smollm2(packages, folder), lambda: articles(packages))


#: Models that sit the exam, by the stage that makes them.
EXAMINED = ("base", "sft", "ppo", "grpo")


def addition(config: AdditionConfig, sources: Sources | None = None, sizes: Sizes | None = None) -> Mapping[str, Any]:
    """Holds the course as `config` says; prints a table, writes figures.json and report.html into output_dir. The figures.

    Raises as `Course.open`, as the packages, and as the commands of the stages.
    """
    case = _Addition(config, sources or packaged(Path(config.packages)), sizes or (QUICK if config.quick else Sizes()))
    with case.course.open():
        taken = case.course.take(case.stages())
        return case.conclude(taken)


class _Addition:
    def __init__(self, config: AdditionConfig, sources: Sources, sizes: Sizes) -> None:
        self.course = Course(config, "addition")
        self._config, self._sources, self._sizes = config, sources, sizes

    # ---- what every loop is told

    def _run(self, stage: str, **others: Any) -> dict[str, Any]:
        return {
            **self.course.run(stage),
            "micro_batch_tokens": MICRO_BATCH_TOKENS,
            "lora_rank": self._sizes.lora_rank,
            "warmup_ratio": 0.1,
            **others,
        }

    def _sft(self) -> SftConfig:
        return SftConfig(
            **self._run("sft", lora_merge=True),  # one model, upon which the adapters of PPO and GRPO stand
            model=self.course.model("base"),
            data=(self.course.data("shown"),),
            batch_size=self._sizes.sft_batch,
            max_steps=self._sizes.sft_steps,
            learning_rate=1e-3,
        )

    def _ppo(self) -> PpoConfig:
        return PpoConfig(
            **self._run("ppo", logging_steps=1),
            model=self.course.model("sft"),
            reward_funcs=(f"{_HERE / 'reward.py'}:exact_match",),
            data=(self.course.data("tried"),),
            max_completion_length=self._sizes.longest,
            batch_size=self._sizes.batch,
            max_steps=self._sizes.ppo_steps,
            num_mini_batches=2,
            learning_rate=5e-4,
            critic_learning_rate=1e-3,
            kl_coef=0.0,  # the reward cannot be cheated, so there is nothing to hold it back from
        )

    def _grpo(self) -> GrpoConfig:
        return GrpoConfig(
            **self._run("grpo", logging_steps=1),
            model=self.course.model("sft"),
            reward_funcs=(f"{_HERE / 'reward.py'}:exact_match",),
            data=(self.course.data("tried"),),
            max_completion_length=self._sizes.longest,
            batch_size=self._sizes.batch // self._sizes.group,
            num_generations=self._sizes.group,
            max_steps=self._sizes.grpo_steps,
            num_mini_batches=2,
            learning_rate=5e-4,
        )

    # ---- the course

    def stages(self) -> list[Stage]:
        """In their order: each reads only what those before it have left."""
        return [
            Stage(
                "sums",
                "Sums",
                "All 8,100 sums of two two-digit numbers, in three parts: those of the exam, those that SFT shows, and those "
                "that PPO and GRPO try. 47+35 and 35+47 are in the same part.",
                self._sums,
            ),
            Stage(
                "base",
                "A real model",
                "SmolLM2-135M-Instruct from its package. It goes on after “47+35=”, but it does not stop behind the sum.",
                self._base,
            ),
            loop(
                "sft",
                "Being shown",
                f"Supervised fine-tuning: {self._sizes.sft_steps} steps. Enough for the form, and for about half of the sums.",
                "sft",
                sft,
                self._sft(),
                unit="nats per token",
            ),
            self._exam_stage("base"),
            self._exam_stage("sft"),
            loop(
                "ppo",
                "Trying, with a critic",
                "PPO: an answer to each sum; 1 if it is exactly right and 0 if not. A critic learns to foresee it.",
                "ppo",
                ppo,
                self._ppo(),
                curve="objective/scores",
                unit="share of right answers",
            ),
            self._exam_stage("ppo"),
            loop(
                "grpo",
                "Trying, in groups",
                f"GRPO: {self._sizes.group} answers to each sum, compared with one another. No critic.",
                "grpo",
                grpo,
                self._grpo(),
                curve="reward",
                unit="share of right answers",
            ),
            self._exam_stage("grpo"),
        ]

    def _exam_stage(self, name: str) -> Stage:
        return Stage(
            f"exam_{name}",
            f"The exam of {name}",
            "Sums that nothing learned from, and plain text: what has it learned, and what has it forgotten?",
            functools.partial(self._exam, name),
        )

    def _sums(self) -> Figures:
        parts = sums(self._sizes.exam, self._sizes.shown, self._config.seed)
        tried = [{"prompt": row["prompt"], "answer": row["answer"]} for row in parts.tried]
        plain = [{"text": text} for text in self._sources.articles()[: self._sizes.articles]]
        rows = {"exam": parts.exam, "shown": parts.shown, "tried": tried, "plain": plain}
        for name, found in rows.items():
            write_rows(Path(self.course.data(name)), found)
        self.course.say(", ".join(f"{len(found):,} {name}" for name, found in rows.items()))
        return {name: len(found) for name, found in rows.items()}

    def _base(self) -> Figures:
        files.make_folder(self.course.folder / "base")
        self._sources.model(Path(self.course.model("base")))
        return {}

    # ---- the exam

    def _answers(self, name: str) -> Path:
        return self.course.folder / f"exam_{name}" / "answers.jsonl"

    def _exam(self, name: str) -> Figures:
        taught = Model.from_pretrained(self.course.model("sft"))
        model = taught if name == "sft" else Model.from_pretrained(self.course.model(name), base=taught)
        tokenizer, questions = model.tokenizer, read_rows(Path(self.course.data("exam")))
        assert tokenizer is not None
        plain = openings([row["text"] for row in read_rows(Path(self.course.data("plain")))], tokenizer, self._sizes.window)
        prompts = [row["prompt"] for row in questions]
        likeliest, drawn = (
            model.generate(prompts, self._sizes.longest, temperature=heat, seed=self._config.seed) for heat in (0.0, 1.0)
        )
        model.free_caches()
        assert likeliest.texts is not None and drawn.texts is not None  # the model has a tokenizer
        right, at_random = (
            rate([float(text == row["answer"]) for text, row in zip(texts, questions, strict=True)])
            for texts in (likeliest.texts, drawn.texts)
        )
        divergence = kl_divergence(drawn, taught, 1.0, MICRO_BATCH_TOKENS)
        figures = {
            "right": right.rate,
            "right_low": right.low,
            "right_high": right.high,
            "right_at_random": at_random.rate,
            "ended": likeliest.finish_reasons.count("stop") / len(likeliest),
            "kl": divergence.per_sequence,
            "perplexity": perplexity(model, plain),
        }
        files.make_folder(self._answers(name).parent)
        rows = [{**row, "said": text} for row, text in zip(questions, likeliest.texts, strict=True)]
        write_rows(self._answers(name), rows)
        self.course.say(", ".join(f"{measure.name} {measure.written(figures[measure.key])}" for measure in MEASURES))
        return figures

    # ---- the report

    def conclude(self, taken: Mapping[str, Taken]) -> Mapping[str, Any]:
        """Prints and writes what the course has come to."""
        rows = {name: taken[f"exam_{name}"].figures for name in EXAMINED}
        answers = {name: read_rows(self._answers(name)) for name in EXAMINED}
        samples = [
            Sample(question["prompt"], {name: _said(found[place]) for name, found in answers.items()})
            for place, question in enumerate(answers["sft"][:5])
        ]
        results = Results(
            title="A small model learns to add from being told whether it was right",
            opening=_OPENING if not self._config.quick else f"{_OPENING} This was a quick look: nothing here was learned well.",
            measures=MEASURES,
            models=rows,
            bars={name: {"right": figures["right"]} for name, figures in rows.items()},
            facts=(),
            samples=samples,
            taken=taken,
        )
        return self.course.conclude(results, dataclasses.asdict(self._sizes))


def _said(row: Mapping[str, str]) -> tuple[str, str]:
    return row["said"], "right" if row["said"] == row["answer"] else f"not {row['answer']}"


_HERE = Path(__file__).resolve().parent

MEASURES = (
    Measure(
        "right",
        "right",
        "held-out sums answered exactly right, the likeliest token each time, and the 95 % Wilson interval",
        lambda x: f"{x:.1%}",
        ("right_low", "right_high"),
    ),
    Measure(
        "right_at_random",
        "right, drawn",
        "the same sums, every token drawn at random as in training",
        lambda x: f"{x:.1%}",
    ),
    Measure("ended", "ended", "answers that came to their end", lambda x: f"{x:.1%}"),
    Measure("kl", "KL to sft", "how far the model has moved from where SFT left it, in nats an answer", lambda x: f"{x:.2f}"),
    Measure("perplexity", "perplexity", "of encyclopedia text: what is lost elsewhere", lambda x: f"{x:.2f}"),
)

_OPENING = (
    "SmolLM2-135M-Instruct learns to write the sum of two two-digit numbers and nothing else. It is shown some sums, and then "
    "tries others and is told only whether its answer was exactly right: the reward is a function, not a model."
)
