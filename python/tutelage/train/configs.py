"""What each command can be told. No torch here: `tutelage --help` reads only this.

The names are Hugging Face's where they have one. A docstring under a field is its help text on the command
line.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from tutelage.feedback.tasks import ANSWERS


@dataclass(frozen=True)
class RunConfig:
    """What every training loop can be told."""

    output_dir: str = "runs/run"
    """Folder of the run: its config, metrics, checkpoints and the finished model. One process at a time may
    use it."""
    resume: str | None = None
    """Go on with an earlier run: "auto" takes the newest complete checkpoint of output_dir (and starts from
    the beginning where there is none yet), or give the path of a checkpoint. The run ends in the same bits as
    one that was never interrupted."""
    overwrite: bool = False
    """Remove an earlier run in output_dir and start again."""
    seed: int = 0
    """Of everything random: the first weights and the order of the data. The same command gives the same
    files, bit for bit."""
    device: Literal["cpu", "cuda", "cuda-sim"] = "cpu"
    """cpu; cuda: torch's current GPU, in bfloat16 with float32 weights for the optimizer; cuda-sim: the GPU's
    kernels on an emulator, a thousand times slower, to try what a GPU will do."""
    save_steps: int = 250
    """Save a checkpoint every so many steps; the last step is always saved."""
    save_total_limit: int = 2
    """Keep so many checkpoints."""
    logging_steps: int = 10
    """Write a line of metrics.jsonl every so many steps; its loss is the mean over them."""
    json: str | None = None
    """Write the final figures to this file."""
    report_to: Literal["none", "tensorboard"] = "none"
    """Also write the metrics for TensorBoard, into output_dir/tensorboard (needs: pip install
    'tutelage[log]')."""

    exact: bool = False
    """Add up gradients along one tree over the sequences of a step, so that one, two, four … processes (torchrun) end in the
    same bits. Costs time and memory; without it every number of processes has bits of its own, each reproducible."""
    exact_leaf: int = 4
    """With exact: sequences of a leaf of the tree, which one process adds up one after another. Other leaves, other bits."""
    rank_timeout: float = 600.0
    """Seconds that a process waits for another before it says which one is missing, and stops."""

    def __post_init__(self) -> None:
        for name in ("save_steps", "save_total_limit", "logging_steps", "exact_leaf"):
            at_least(self, name, 1)
        if not 0 < self.rank_timeout < math.inf:
            raise ValueError(f"rank_timeout must be positive and finite, but it is {self.rank_timeout}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in 0 .. 2^64 - 1, but it is {self.seed}")


#: A resumed run may change these: the weights do not depend on them.
FREE_FIELDS = frozenset(
    {
        "output_dir",
        "resume",
        "overwrite",
        "save_steps",
        "save_total_limit",
        "json",
        "report_to",
        "plot",
        "micro_batch_tokens",
        "lora_merge",
        "exact",  # what depends on these two is said where it does, see train/run.py
        "exact_leaf",
        "rank_timeout",
    }
)


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """What the loops that learn from given text or examples can be told besides."""

    micro_batch_tokens: int = 8192
    """Tokens of one forward and backward: less needs less memory and gives the same weights, bit for bit."""
    max_steps: int = 0
    """Steps of the optimizer."""
    learning_rate: float = 0.0
    """Highest learning rate, reached after the warm-up."""
    lr_scheduler_type: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """cosine: half a wave down. wsd: warm up, stay, then decay along a line over the last decay_ratio of the
    steps. linear: along a line, to min_lr_ratio behind the last step. constant: stay."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    decay_ratio: float = 0.3
    """Share of the steps in which wsd decays."""
    min_lr_ratio: float = 0.0
    """The last learning rate, as a share of the highest."""
    weight_decay: float = 0.0
    """Of the matrices; norms and biases do not decay."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this length where it is longer."""
    eval_steps: int = 250
    """Measure on what is held out every so many steps, and after the last."""
    plot: bool = True
    """Draw the loss at the end: in the terminal, and as output_dir/loss.png where matplotlib is installed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_steps", "learning_rate", "weight_decay"):
            at_least(self, name, 0)
        for name in ("micro_batch_tokens", "eval_steps"):
            at_least(self, name, 1)
        for name in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, but it is {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, but it is {self.max_grad_norm}")


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Pretrain a language model on text.

    Without --data it reads the home library, the prose of this Python's own standard library (about 3 MB of
    documentation), for about three minutes on two cores, and compares what it has learned with gzip and xz:
    to predict text well is to compress it well, so both are measured in bits per byte.

    A resumed run, a run cut into other micro-batches and a run with another number of threads end in the same
    bits.
    """

    output_dir: str = "runs/pretrain"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, and at the end model/ (a Hugging Face
    folder)."""
    data: tuple[str, ...] = ()
    """Text to read: .txt, .jsonl, .json, .parquet (field "text") or folders of them, each PATH or
    PATH:WEIGHT. A document of weight 2 is seen twice an epoch. None: the home library."""
    code: bool = False
    """Read the home library's source code instead of its prose only."""
    held_out_fraction: float = 0.05
    """Share of the documents that are never trained on and measure what was learned."""
    on_bad_row: str = "error"
    """What to do with a row that cannot be read: "error", or "skip:<max>" to leave out up to so many, each
    reported."""
    tokenizer: str | None = None
    """Folder of a tokenizer (`tutelage tokenizer` makes one). None: a byte-level BPE is trained on the
    training documents."""
    vocab_size: int = 0
    """Number of tokens of the tokenizer trained here. 0: as the size has it."""
    size: Literal["tiny", "small", "base"] = "small"
    """One dial for the model and what fits it: tiny takes seconds, small about three minutes, base about an
    hour on two cores. Options whose default is 0 follow it; the run's config.yaml says what they became."""
    context: int = 0
    """Longest sequence, in tokens; longer documents are read in pieces. 0: as the size has it."""
    batch_tokens: int = 0
    """Tokens of one step of the optimizer, a multiple of context. 0: as the size has it."""
    max_steps: int = 0
    """Steps of the optimizer. 0: as the size has it."""
    learning_rate: float = 0.0
    """Highest learning rate, reached after the warm-up. 0: as the size has it."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Of the matrices; norms and biases do not decay."""
    eval_steps: int = 250
    """Measure bits per byte on the held-out documents every so many steps, and after the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "context", "batch_tokens"):
            at_least(self, name, 0)
        if self.code and self.data:
            raise ValueError("code chooses what of the home library is read; it has no meaning beside data")
        if self.tokenizer is not None and self.vocab_size:
            raise ValueError("vocab_size is for training a tokenizer; the given one has its own")


@dataclass(frozen=True)
class TuningConfig(TrainingConfig):
    """What the loops that start from a model and learn from rows can be told besides."""

    model: str = "runs/pretrain/model"
    """Folder of the model to start from and its tokenizer, as `tutelage pretrain` writes it or from Hugging
    Face."""
    chat_template_path: str | None = None
    """A Jinja file that makes text of messages, for a model without a chat template; saved with it. None: the model's own."""
    data: tuple[str, ...] = ()
    """Examples: .jsonl, .json or .parquet files, or folders of them."""
    on_bad_row: str = "error"
    """What to do with a bad row, or one of which nothing is learned: "error", or "skip:<max>" to leave out up
    to so many, each reported."""
    on_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a row that is longer than max_length."""
    max_length: int = 0
    """Longest sequence in tokens. 0: as long as the model can read."""
    eval_fraction: float = 0.05
    """Share of the prompts that are never trained on and measure what was learned."""
    batch_size: int = 16
    """Examples of one step of the optimizer."""
    num_train_epochs: float = 1.0
    """How often each example is seen."""
    max_steps: int = 0
    """Steps of the optimizer. 0: as num_train_epochs has it."""
    min_lr_ratio: float = 0.1
    """The last learning rate, as a share of the highest."""
    eval_steps: int = 50
    """Measure on the held-out examples every so many steps, and after the last."""
    select_by: Literal["last", "eval_loss"] = "last"
    """Which model is saved in output_dir/model: that of the last step, or that of the lowest held-out loss."""
    lora_rank: int = 0
    """Learn a low-rank adapter (LoRA) of this rank; the model under it stays as it is and is the reference where there is
    one. Takes a higher learning_rate and much less memory; output_dir/model is then an adapter's folder as PEFT has it. An
    adapter's folder as the model is trained on. 0: learn the whole model."""
    lora_alpha: float = 32.0
    """The adapter counts lora_alpha / lora_rank times."""
    lora_target_modules: tuple[str, ...] = ()
    """Layers that get an adapter, by name ("q_proj v_proj"). None: all linear layers of the blocks."""
    lora_merge: bool = False
    """Save the whole model, the adapter merged into it. Rounded once more, so it computes other bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "lora_rank"):
            at_least(self, name, 0)
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be positive and finite, but it is {self.lora_alpha}")
        for name in ("lora_target_modules", "lora_merge"):
            if getattr(self, name) and not self.lora_rank:
                raise ValueError(f"{name} is for an adapter: give a lora_rank too")
        at_least(self, "batch_size", 1)
        if not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs must be positive, but it is {self.num_train_epochs}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be at least 0 and below 1, but it is {self.eval_fraction}")
        if self.select_by != "last" and self.eval_fraction == 0:
            raise ValueError(f"select_by {self.select_by} needs held-out examples: give an eval_fraction above 0")


@dataclass(frozen=True)
class SftConfig(TuningConfig):
    """Supervised fine-tuning: teach a model to answer as the examples do.

    Rows of TRL's schemas: {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. Only the
    answers are learned, unless it is said otherwise. `tutelage data check FILE --model FOLDER` shows what that
    is.

    A resumed run, a run cut into other micro-batches and a run with another number of threads end in the same
    bits.
    """

    output_dir: str = "runs/sft"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, and at the end model/ (a Hugging Face
    folder)."""
    completion_only_loss: bool = True
    """Of prompt and completion learn only the completion."""
    assistant_only_loss: bool = True
    """Of messages learn only what the assistant says."""
    num_train_epochs: float = 3.0
    """How often each example is seen."""
    select_by: Literal["last", "eval_loss", "eval_reward"] = "last"  # type: ignore[assignment]
    """Which model is saved in output_dir/model: that of the last step, that of the lowest held-out loss, or that whose
    own answers to the held-out prompts the reward model likes best (InstructGPT's choice)."""
    reward_model: str | None = None
    """Folder of a reward model with the same tokenizer: measures eval_reward, the mean reward of greedy answers to the
    held-out prompts."""
    max_completion_length: int = 128
    """Longest answer, in tokens, that is given to the reward model."""
    learning_rate: float = 5e-4
    """Highest learning rate. The default is for models of a few million parameters; a model of a hundred
    million needs about a tenth."""
    objective: str | None = None
    """A loss of your own, "module:name" or "file.py:name": f(out, batch, columns) -> scalar. None: the mean
    negative log-likelihood of the tokens that are learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "max_completion_length", 1)
        if self.select_by == "eval_reward" and self.reward_model is None:
            raise ValueError("select_by eval_reward needs a judge: give the folder of a reward_model")
        if self.reward_model is not None and self.eval_fraction == 0:
            raise ValueError("reward_model judges answers to held-out prompts: give an eval_fraction above 0")


@dataclass(frozen=True)
class RewardConfig(TuningConfig):
    """Train a reward model: a number for an answer, higher for the answer that people like better.

    Rows of pairs, {"prompt": ..., "chosen": ..., "rejected": ...}, or of rankings, {"prompt": ..., "responses":
    [...], "ranking": [[0], [2, 1]]}: groups of responses, best first, those of one group tied. All pairs of a
    prompt are learned together, as InstructGPT did.

    A resumed run, a run cut into other micro-batches and a run with another number of threads end in the same
    bits.
    """

    output_dir: str = "runs/reward"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, and at the end model/ (a Hugging Face folder)."""
    model: str = "runs/sft/model"
    """Folder of the model to start from and its tokenizer: a language model, which gets a new scalar head, or a
    reward model, which keeps its own."""
    demonstrations: str | None = None
    """Rows of good answers ({"prompt", "completion"}, {"messages"} or {"text"}), a file or folder: rewards are shifted so
    that these score 0 on average. None: the best responses of the training data."""
    on_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a row that is longer than max_length. The reward is read at a response's last token, so that of a
    truncated one is read where it was cut."""
    batch_size: int = 16
    """Prompts of one step of the optimizer, each with all its responses."""
    learning_rate: float = 1e-4
    """Highest learning rate. The default is for models of a few million parameters; InstructGPT's, of six billion, had 9e-6."""
    margin: bool = True
    """Ask the chosen response to lead by the field "margin" of its row, where there is one."""
    center_rewards_coefficient: float = 0.0
    """Weight of a term that draws the rewards of every pair to a sum of 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.center_rewards_coefficient < math.inf:
            value = self.center_rewards_coefficient
            raise ValueError(f"center_rewards_coefficient must be at least 0 and finite, but it is {value}")


@dataclass(frozen=True)
class PreferenceConfig(TuningConfig):
    """What the loops that learn from preferences can be told besides."""

    model: str = "runs/sft/model"
    """Folder of the model to start from and its tokenizer, as `tutelage sft` writes it or from Hugging Face."""
    learning_rate: float = 5e-5
    """Highest learning rate. The default is for models of a few million parameters; a model of a hundred
    million needs about a tenth."""
    beta: float = 0.1
    """How dear it is to leave the reference; for simpo the scale of the margin (its paper: 2.0 to 2.5), for
    orpo the weight of the odds-ratio term (the paper's lambda)."""
    objective: str | None = None
    """A loss of your own, "module:name" or "file.py:name": f(out, batch, columns) -> scalar. None: the loss
    that this command is named for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive, but it is {self.beta}")


@dataclass(frozen=True)
class DpoConfig(PreferenceConfig):
    """Direct preference optimisation: learn from pairs of answers which one is better.

    Rows of TRL's preference schema: {"prompt": ..., "chosen": ..., "rejected": ...}; for loss_type kto
    {"prompt": ..., "completion": ..., "label": true or false}. Start from a model that was taught by
    `tutelage sft`.

    A resumed run, a run cut into other micro-batches and a run with another number of threads end in the same
    bits.
    """

    output_dir: str = "runs/dpo"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, reference/ (the reference's log-probs), and
    at the end model/ (a Hugging Face folder)."""
    loss_type: Literal["sigmoid", "ipo", "simpo", "kto"] = "sigmoid"
    """sigmoid: DPO (cDPO with label_smoothing). ipo: a squared distance to a target margin. simpo: without a
    reference. kto: answers one by one, each marked as desirable or not."""
    label_smoothing: float = 0.0
    """Of sigmoid: the probability with which a label is taken to be wrong."""
    simpo_gamma: float = 0.5
    """Of simpo: the margin by which the chosen answer has to win."""
    desirable_weight: float = 1.0
    """Of kto: what a desirable answer weighs."""
    undesirable_weight: float = 1.0
    """Of kto: what an undesirable answer weighs."""
    ref_model: str | None = None
    """Folder of the reference model. None: the model that training starts from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, but it is {self.label_smoothing}")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing belongs to loss_type sigmoid, not to {self.loss_type}")
        for name in ("simpo_gamma", "desirable_weight", "undesirable_weight"):
            at_least(self, name, 0)
        if self.loss_type == "simpo" and self.ref_model is not None:
            raise ValueError("simpo has no reference: leave ref_model out")


@dataclass(frozen=True)
class OrpoConfig(PreferenceConfig):
    """Odds-ratio preference optimisation: learn to answer and which answer is better, at once and without a reference.

    Rows of TRL's preference schema: {"prompt": ..., "chosen": ..., "rejected": ...}. It may start from a model
    that was only pretrained.

    A resumed run, a run cut into other micro-batches and a run with another number of threads end in the same
    bits.
    """

    output_dir: str = "runs/orpo"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, and at the end model/ (a Hugging Face
    folder)."""
    model: str = "runs/pretrain/model"
    """Folder of the model to start from and its tokenizer, as `tutelage pretrain` writes it or from Hugging
    Face."""
    num_train_epochs: float = 3.0
    """How often each example is seen."""
    learning_rate: float = 5e-4
    """Highest learning rate. The default is for models of a few million parameters; a model of a hundred
    million needs about a tenth."""


@dataclass(frozen=True)
class TryingConfig(TuningConfig):
    """What the loops can be told besides that learn from what is said of the model's own answers."""

    model: str = "runs/sft/model"
    """Folder of the model to start from and its tokenizer, as `tutelage sft` writes it or from Hugging Face."""
    data: tuple[str, ...] = ()
    """Prompts: .jsonl, .json or .parquet files with a field "prompt", or folders of them. Reward functions get the other
    fields."""
    reward_model: str | None = None
    """Folder of a reward model with the same tokenizer, as `tutelage reward` writes it: its value at an answer's last token
    is the answer's score."""
    reward_funcs: tuple[str, ...] = ()
    """Functions that score answers, "module:name" or "file.py:name": f(prompts, completions, **columns) -> list of numbers,
    None for an answer that is to be left out. Alone or beside a reward model; all scores are added up."""
    reward_weights: tuple[float, ...] = ()
    """A factor for each reward function. None: 1 each. The reward model's is 1."""
    reward_timeout: float = 30.0
    """Seconds that a reward function has for the answers of a step."""
    reward_failure: Literal["fail", "zero", "drop"] = "fail"
    """When a reward function raises, hangs or gives no number: fail: stop. zero: its score is 0. drop: leave the answer out.
    Either way output_dir/failures.jsonl tells which answer it was."""
    ref_model: str | None = None
    """Folder of the reference model, which it costs something to leave. None: the model that training starts from."""
    on_long: Literal["error", "drop"] = "error"
    """What to do with a prompt that leaves no room for an answer."""
    max_length: int = 0
    """Longest prompt and answer together, in tokens. 0: as long as the model can read."""
    max_completion_length: int = 128
    """Longest answer, in tokens; a longer one is cut off, and has no end."""
    temperature: float = 1.0
    """Logits are divided by it, in every log-prob: of the answers, of what is learned from them, of the reference."""
    top_k: int = 0
    """Draw among the so many likeliest tokens. 0: all. See allow_truncated_sampling."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that together have this probability. See allow_truncated_sampling."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the likeliest. See allow_truncated_sampling."""
    allow_truncated_sampling: bool = False
    """Allow top_k, top_p and min_p: the answers then come from another distribution than the one that learns."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of an answer that was cut off before its end."""
    missing_eos_score: float | None = None
    """The score of an answer that was cut off before its end, whatever it says (OpenAI's -1). None: its own."""
    num_mini_batches: int = 1
    """Updates that the answers of a step are shared out to, each time anew."""
    learning_rate: float = 1e-4
    """Highest learning rate. The default is for models of a few million parameters; a model of a hundred million needs about
    a tenth."""
    lr_scheduler_type: Literal["cosine", "wsd", "linear", "constant"] = "linear"
    """linear: along a line, to min_lr_ratio behind the last step. constant: stay. cosine: half a wave down. wsd: stay, then
    decay along a line over the last decay_ratio of the steps."""
    min_lr_ratio: float = 0.0
    """The last learning rate, as a share of the highest."""
    adam_epsilon: float = 1e-5
    """Of AdamW."""
    select_by: Literal["last", "eval_reward"] = "last"  # type: ignore[assignment]
    """Which model is saved in output_dir/model: that of the last step, or that whose answers to the held-out prompts have the
    best score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_completion_length", "num_mini_batches"):
            at_least(self, name, 1)
        for name in ("temperature", "adam_epsilon", "reward_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, but it is {getattr(self, name)}")
        if (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0) and not self.allow_truncated_sampling:
            raise ValueError(
                "top_k, top_p and min_p cut the distribution that answers are drawn from, but what learns is the whole one: "
                "the ratio of the two would be wrong for every token. Leave them out, or say --allow_truncated_sampling"
            )
        if self.reward_weights and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(f"there are {len(self.reward_weights)} reward_weights for {len(self.reward_funcs)} reward_funcs")
        if self.missing_eos_penalty and self.missing_eos_score is not None:
            raise ValueError(
                "missing_eos_score takes the place of a score, so there is nothing to take missing_eos_penalty off"
            )
        for name in ("missing_eos_penalty", "missing_eos_score"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"{name} must be finite, but it is {getattr(self, name)}")


@dataclass(frozen=True)
class PpoConfig(TryingConfig):
    """Proximal policy optimisation: learn from what a reward model, or a function, says of the model's own answers.

    A step: answers to batch_size prompts; their scores; what each token has contributed to them, as a critic judges; and a
    small change of the model that makes the better tokens likelier. InstructGPT's last stage, with --ptx_coef its PPO-ptx.
    Start from a model that was taught by `tutelage sft`.

    A resumed run, a run cut into other micro-batches and a run with another number of threads end in the same bits.
    """

    output_dir: str = "runs/ppo"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, and at the end model/ (a Hugging Face folder)."""
    batch_size: int = 64
    """Answers of a step, one a prompt."""
    total_episodes: int = 0
    """Answers of the whole run, rounded up to whole steps. 0: as max_steps or num_train_epochs has it."""
    num_ppo_epochs: int = 1
    """How often a step's answers are learned from."""
    kl_coef: float = 0.05
    """How dear it is to leave the reference: so much is taken off the reward for every nat of KL. InstructGPT had 0.02."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """How the KL of a token is estimated: k1: the difference of the log-probs, right on average. k3: never negative."""
    adap_kl_ctrl: bool = False
    """Let kl_coef grow while an answer's KL is above target, and fall while it is below."""
    target: float = 6.0
    """With adap_kl_ctrl: the KL of an answer, in nats."""
    horizon: float = 10000.0
    """With adap_kl_ctrl: over so many answers kl_coef adapts."""
    gamma: float = 1.0
    """What a reward one token later is worth."""
    lam: float = 0.95
    """Of the advantages: 1: from the rewards alone. 0: from the critic alone, but for the next reward."""
    cliprange: float = 0.2
    """A token that has become likelier or less likely by this share since the answer was drawn is pushed no further."""
    cliprange_value: float = 0.2
    """The same for the critic's values, in units of the reward."""
    vf_coef: float = 0.1
    """Weight of the critic's loss. It has an optimizer of its own, so this counts against max_grad_norm and adam_epsilon
    only."""
    critic_learning_rate: float = 0.0
    """The critic's highest learning rate. 0: as learning_rate."""
    critic_warmup_steps: int = 0
    """Steps at the beginning in which only the critic learns."""
    whiten_advantages: bool = True
    """Shift and scale a step's advantages to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Scale a step's rewards to variance 1; their mean stays."""
    target_kl: float = 0.0
    """End a step before an update where the policy has moved so far since the answers were drawn (approximate KL, mean per
    token). 0: never."""
    ema_decay: float = 0.0
    """Save the average of the weights over the steps, of which each step makes so much less of what was before (InstructGPT:
    0.992). 0: save the weights themselves."""
    ptx_coef: float = 0.0
    """PPO-ptx: weight of the loss on pretraining text, which keeps what was known (InstructGPT: 27.8). 0: none."""
    ptx_data: tuple[str, ...] = ()
    """The text: files or folders, as for `tutelage pretrain`. None: the home library."""
    ptx_ratio: float = 1.0
    """Sequences of text for each answer (InstructGPT: 8)."""
    ptx_length: int = 0
    """Longest sequence of text in tokens. 0: as max_length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("total_episodes", "kl_coef", "critic_learning_rate", "critic_warmup_steps", "target_kl", "ptx_coef"):
            at_least(self, name, 0)
        at_least(self, "num_ppo_epochs", 1)
        for name in ("target", "horizon", "cliprange", "cliprange_value", "vf_coef", "ptx_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, but it is {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, but it is {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, but it is {self.ema_decay}")
        if self.num_mini_batches > self.batch_size:
            raise ValueError(f"num_mini_batches is {self.num_mini_batches}, but a step has only {self.batch_size} answers")
        if self.total_episodes and self.max_steps:
            raise ValueError("total_episodes and max_steps both say how long to train: give one of them")
        if self.ptx_length and self.ptx_length < 2:
            raise ValueError(f"ptx_length must be 0 or at least 2, but it is {self.ptx_length}")
        if self.ptx_data and not self.ptx_coef:
            raise ValueError("ptx_data is learned from with --ptx_coef only: give that too")


@dataclass(frozen=True)
class GrpoConfig(TryingConfig):
    """Group-relative policy optimisation: learn which of several answers to a prompt were better than its others.

    Like `tutelage ppo`, but several answers a prompt take the critic's place. GRPO, DAPO's token mean, Dr. GRPO and RLOO. At
    home where a function can tell right from wrong. Start from a model that was taught by `tutelage sft`.

    A resumed run, a run cut into other micro-batches and a run with another number of threads end in the same bits.
    """

    output_dir: str = "runs/grpo"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, and at the end model/ (a Hugging Face folder)."""
    batch_size: int = 8
    """Prompts of a step, each with num_generations answers."""
    num_generations: int = 8
    """Answers to each prompt; the prompt is computed once for all."""
    num_iterations: int = 1
    """How often a step's answers are learned from."""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "rloo"] = "grpo"
    """What the loss is a mean of: grpo: each answer's mean over its tokens. dapo: all tokens. dr_grpo: sums over answers,
    divided by max_completion_length, so that long wrong answers are no cheaper. rloo: whole answers, compared with the mean of
    the others (REINFORCE leave-one-out)."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """By which standard deviation of the scores an advantage is divided. None: as the papers have it: group for grpo and dapo,
    none for dr_grpo and rloo."""
    beta: float = 0.0
    """How dear it is to leave the reference: weight of the KL (k3) in the loss; for rloo in the score. 0: there is no
    reference."""
    epsilon: float = 0.2
    """A token (rloo: an answer) that has become likelier or less likely by this share since it was drawn is pushed no
    further."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "num_generations", 2)
        at_least(self, "num_iterations", 1)
        at_least(self, "beta", 0)
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, but it is {self.epsilon}")
        if self.loss_type == "rloo" and self.scale_rewards not in (None, "none"):
            raise ValueError(f"rloo does not scale its advantages: leave scale_rewards out, not {self.scale_rewards}")
        if self.ref_model is not None and not self.beta:
            raise ValueError("ref_model is compared with at a beta above 0 only: give that too")
        answers = self.batch_size * self.num_generations
        if self.num_mini_batches > answers:
            raise ValueError(f"num_mini_batches is {self.num_mini_batches}, but a step has only {answers} answers")


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face folder.

    Any text can be encoded and comes back unchanged. More tokens make shorter sequences, but a larger
    embedding that needs more text.
    """

    output_dir: str = "runs/tokenizer"
    """Folder to write: tokenizer.json and tokenizer_config.json."""
    overwrite: bool = False
    """Replace a tokenizer that is there already."""
    data: tuple[str, ...] = ()
    """Text to learn from, as for `tutelage pretrain`: files or folders. None: the home library."""
    code: bool = False
    """Read the home library's source code instead of its prose only."""
    on_bad_row: str = "error"
    """What to do with a row that cannot be read: "error", or "skip:<max>" to leave out up to so many, each
    reported."""
    vocab_size: int = 4096
    """Number of tokens: 256 bytes, the end of text, and merges."""
    json: str | None = None
    """Write the figures (tokens, bytes per token) to this file."""


@dataclass(frozen=True)
class GenerateConfig:
    """Complete prompts with a model.

    What a prompt becomes depends on the weights, the settings, the seed and the number of the sample alone, not on the other
    prompts; its log-probs are the bits that training sees.
    """

    model: str = "runs/pretrain/model"
    """Folder of the model and its tokenizer, as `tutelage pretrain` writes it or from Hugging Face."""
    prompt: tuple[str, ...] = ()
    """Texts to complete."""
    prompts_file: str | None = None
    """More of them: a JSONL file, one object with a text field "prompt" a line."""
    output: str | None = None
    """Write the completions to this JSONL file (prompt, text, finish_reason, tokens, logprobs); None: print them."""
    max_new_tokens: int = 128
    """At most so many tokens each; the end-of-text token ends a completion before."""
    samples_per_prompt: int = 1
    """Completions of each prompt, all different."""
    temperature: float = 1.0
    """Logits are divided by it: below 1 the likely becomes likelier. 0: always the likeliest token."""
    top_k: int = 0
    """Draw among the so many likeliest tokens. 0: all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the likeliest."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion."""
    seed: int = 0
    """Of the draws."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: round the matrices; half the memory to read, so faster for few prompts at a time."""
    device: Literal["cpu", "cuda", "cuda-sim"] = "cpu"
    """cpu; cuda: a GPU; cuda-sim: its kernels on an emulator."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values; more prompts than fit wait their turn. None: half of what is free."""
    json: str | None = None
    """Write the figures (rows, tokens, tokens a second) to this file."""


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model in the terminal.

    The whole conversation is the model's prompt each time, written by its chat template. Lines that begin with a slash are
    commands: /help lists them. Ctrl-C stops an answer, and at the prompt ends the chat.
    """

    model: str = "runs/sft/model"
    """Folder of the model, its tokenizer and chat template."""
    system: str | None = None
    """What a system message in front of every conversation says."""
    max_new_tokens: int = 512
    """At most so many tokens an answer."""
    temperature: float = 1.0
    """Logits are divided by it: below 1 the likely becomes likelier. 0: always the likeliest token."""
    top_k: int = 0
    """Draw among the so many likeliest tokens. 0: all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the likeliest."""
    seed: int = 0
    """Of the draws: the same lines give the same answers. The nth answer draws with seed + n."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: round the matrices; half the memory to read, so faster."""
    device: Literal["cpu", "cuda", "cuda-sim"] = "cpu"
    """cpu; cuda: a GPU; cuda-sim: its kernels on an emulator."""

    def __post_init__(self) -> None:
        at_least(self, "max_new_tokens", 1)
        at_least(self, "seed", 0)


@dataclass(frozen=True)
class EvalConfig:
    """Measure a model: `tutelage eval MEASURE --model FOLDER --data FILE...`.

    bits_per_byte: how well it predicts text. accuracy: the share of prompts that it answers right. win_rate: how often a
    judge prefers its answers to those of --against. kl: how far it is from --against, on its own answers. reward: what a
    reward model gives its answers. reward_accuracy: how often it, a reward model, puts two answers in the right order.
    """

    measure: Literal["bits_per_byte", "accuracy", "win_rate", "kl", "reward", "reward_accuracy"] = "accuracy"
    """What to measure; may stand without --measure in front."""
    model: str = "runs/pretrain/model"
    """Folder of the model and its tokenizer."""
    data: tuple[str, ...] = ()
    """Text (bits_per_byte; as for `tutelage pretrain`), pairs or rankings (reward_accuracy; as for `tutelage reward`), or
    rows with a prompt (.jsonl, .json, .parquet)."""
    against: str | None = None
    """Folder of the other model, for win_rate and kl."""
    scorer: str | None = None
    """module:name or file.py:name of a function (prompt, answer, row) -> score in 0 .. 1; row holds the other fields. None:
    1 where the answer equals the row's completion but for white space."""
    judge: str | None = None
    """module:name or file.py:name of a function (prompt, answer, other, row) -> 1 where the model's answer is better, 0
    where the other one is, 0.5 for a tie."""
    reward_model: str | None = None
    """Folder of a reward model of the same tokenizer: what reward measures with, or the judge of win_rate."""
    max_new_tokens: int = 256
    """At most so many tokens an answer."""
    temperature: float | None = None
    """Of the answers. None: 0, the likeliest token each time; for kl 1."""
    seed: int = 0
    """Of the draws."""
    on_bad_row: str = "error"
    """What to do with a bad row: "error", or "skip:<max>" to leave out up to so many, each reported."""
    micro_batch_tokens: int = 8192
    """Tokens scored at once: less needs less memory, the result is the same."""
    device: Literal["cpu", "cuda", "cuda-sim"] = "cpu"
    """cpu; cuda: a GPU; cuda-sim: its kernels on an emulator."""
    json: str | None = None
    """Write the figures to this file."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "micro_batch_tokens"):
            at_least(self, name, 1)
        if self.measure == "kl" and self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"kl needs samples, so temperature must be positive, but it is {self.temperature}")
        uses = {
            "against": ("win_rate", "kl"),
            "judge": ("win_rate",),
            "scorer": ("accuracy",),
            "reward_model": ("reward", "win_rate"),
        }
        for name, measures in uses.items():
            if getattr(self, name) is not None and self.measure not in measures:
                raise ValueError(f"{name} belongs to {' and '.join(measures)}, not to {self.measure}")
        if self.against is None and self.measure in uses["against"]:
            raise ValueError(f"{self.measure} needs --against")
        if self.measure == "win_rate" and (self.judge is None) == (self.reward_model is None):
            raise ValueError("win_rate needs one judge: --judge or --reward_model")
        if self.measure == "reward" and self.reward_model is None:
            raise ValueError("reward needs --reward_model")


@dataclass(frozen=True)
class LabelConfig:
    """Let people judge answers, on a page of their own browser.

    `tutelage label --responses answers.jsonl --out feedback.db` prints an address that works once, and opens it. The answers
    are those of a file of rows {"prompt": ..., "responses": [...]}, or a model's own, which are generated while people judge:
    `tutelage label --model folder --prompts prompts.jsonl --k 4 --out feedback.db`. Each person types a name first.

    All that is said is stored at once; a server that is killed at any instant loses nothing. The same command goes on where it
    was left, and so does `tutelage label --out feedback.db`. Ctrl-C ends it. Then, or meanwhile,
    `tutelage label export feedback.db --to ranking rankings.jsonl` writes rows to learn from, and
    `tutelage reward --data rankings.jsonl` learns from them.

    Nobody else on this machine or network reaches the page, nor another page of the same browser.
    """

    out: str = "feedback.db"
    """File that keeps what is said (SQLite). One that is there already is gone on with; then options at their default are as
    they were when it was begun."""
    task: Literal["rank", "compare", "rate", "write"] = "rank"
    """rank: put the answers in order, ties allowed. compare: say which of two is better. rate: give each a score of 1 to 7 and
    InstructGPT's flags. write: write an answer, or correct one."""
    responses: str | None = None
    """Answers made elsewhere: a file (.jsonl, .json, .parquet) or folder of rows {"prompt", "responses"}."""
    prompts: str | None = None
    """Prompts to answer: a file or folder of rows that have one. --model answers them; for write it may be left out."""
    model: str | None = None
    """Folder of the model that answers the prompts."""
    k: int = 0
    """Answers of the model to each prompt, up to 9. 0: as the task has it (rank and rate 4, compare 2, write 1)."""
    order: Literal["given", "shuffled", "spread"] = "given"
    """Order of the prompts. given: as in the file. shuffled: at random. spread: those first, of all that are ready, whose
    answers get the most unlike rewards of the reward model."""
    reward_model: str | None = None
    """Folder of a reward model, for the order spread."""
    overlap: int = 1
    """People that should judge each prompt. From two on, the page shows how far they agree."""
    seed: int = 0
    """Of the order in which the answers to a prompt are shown, of the order shuffled, and of the model's draws."""
    title: str = ""
    """Shown on the page."""
    guidelines: str | None = None
    """A text file of what to look at when judging, shown beside the answers."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but the loopback's lets others on the network reach the page, over plain HTTP."""
    port: int = 0
    """Port to listen on. 0: any that is free."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which browsers may ask for the page, besides the address itself."""
    addresses: int = 1
    """Print so many one-time addresses, one for each browser."""
    browser: bool = True
    """Open the page in the browser of this machine."""
    stop_when_complete: bool = False
    """End when every prompt was judged or skipped by as many people as are wanted."""
    on_bad_row: str = "error"
    """What to do with a bad row: "error", or "skip:<max>" to leave out up to so many, each reported."""
    max_new_tokens: int = 256
    """At most so many tokens an answer of the model."""
    temperature: float = 1.0
    """Of the model's answers: below 1 the likely becomes likelier."""
    top_k: int = 0
    """Draw among the so many likeliest tokens. 0: all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the likeliest."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: round the model's matrices; half the memory to read, so faster."""

    def __post_init__(self) -> None:
        for name, least in (("k", 0), ("overlap", 1), ("seed", 0), ("addresses", 1), ("max_new_tokens", 1)):
            at_least(self, name, least)
        check_port(self.port)
        if self.responses is not None and (self.prompts is not None or self.model is not None):
            raise ValueError("responses holds prompts and their answers: leave prompts and model out")
        least, most = ANSWERS[self.task]
        if self.k and self.model is None:
            raise ValueError("k is the number of a model's answers: give a model too")
        if self.k and not max(least, 1) <= self.k <= most:
            wanted = str(most) if least == most or most == 1 else f"{least} to {most}"
            raise ValueError(f"the task {self.task} takes {wanted} answers, but k is {self.k}")
        if self.order == "spread" and self.task == "write":
            raise ValueError("order spread compares answers, of which write has one at most: give another order")
        if self.reward_model is not None and self.order != "spread":
            raise ValueError("reward_model is for the order spread: give that too")


@dataclass(frozen=True)
class PlayConfig:
    """Talk with one or two models on a page, and say which answers are better.

    `tutelage play runs/sft/model runs/ppo/model` prints an address that works once, and opens it. Each message gets two answers
    side by side as they come: one of each model, or two draws of one. Whose is left and whose is right is drawn anew each time,
    so a judgement is blind; the conversation goes on with the better one.

    Every judgement is stored at once, in the kind of file that `tutelage label` makes, and the same command adds to it. Ctrl-C
    ends it. Then, or meanwhile, `tutelage label export play.db --to preference preferences.jsonl` writes rows to learn from,
    and `tutelage dpo` or `tutelage reward` learns from them.
    """

    models: tuple[str, ...] = ("runs/sft/model",)
    """One or two folders of a model, its tokenizer and chat template; may stand without --models in front."""
    out: str = "play.db"
    """File that keeps what is said (SQLite). One that is there already is added to."""
    labeller: str = "player"
    """Whose judgements these are."""
    reveal: bool = True
    """Tell, of an answer that was judged, which model gave it, and count how often each was better."""
    system: str | None = None
    """What a system message in front of every conversation says."""
    title: str = ""
    """Shown on the page."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but the loopback's lets others on the network reach the page, over plain HTTP."""
    port: int = 0
    """Port to listen on. 0: any that is free."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which browsers may ask for the page, besides the address itself."""
    addresses: int = 1
    """Print so many one-time addresses, one for each browser."""
    browser: bool = True
    """Open the page in the browser of this machine."""
    max_new_tokens: int = 512
    """At most so many tokens an answer."""
    temperature: float = 1.0
    """Logits are divided by it: below 1 the likely becomes likelier. 0: always the likeliest token; of two models only."""
    top_k: int = 0
    """Draw among the so many likeliest tokens. 0: all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the likeliest."""
    seed: int = 0
    """Of the draws, and of whose answer is left. The nth message that was answered draws with seed + n."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: round the matrices; half the memory to read, so faster."""
    device: Literal["cpu", "cuda", "cuda-sim"] = "cpu"
    """cpu; cuda: a GPU; cuda-sim: its kernels on an emulator."""

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("addresses", 1), ("max_new_tokens", 1)):
            at_least(self, name, least)
        check_port(self.port)
        if not 1 <= len(self.models) <= 2:
            raise ValueError(f"models takes one folder or two, but here are {len(self.models)}")
        if len(set(self.models)) == 1 and self.temperature == 0:
            raise ValueError("at temperature 0 one model gives one answer twice: pass another model, or a temperature above 0")


@dataclass(frozen=True)
class LabelExportConfig:
    """Write what people judged as rows to learn from: `tutelage label export feedback.db --to ranking rankings.jsonl`.

    ranking is what `tutelage reward` reads, preference (or preference_implicit) `tutelage dpo` and `tutelage orpo`, unpaired
    `tutelage dpo --loss_type kto`, demonstrations `tutelage sft`; `tutelage ppo` takes the prompts of any of them. ratings are
    for reading. Works while people go on judging.
    """

    feedback: str = ""
    """File that `tutelage label` keeps; may stand in front without --feedback."""
    to: Literal["ranking", "preference", "preference_implicit", "unpaired", "demonstrations", "ratings"] = "ranking"
    """The schema. ranking: prompt, responses and their order. preference: every two answers of which one is better, as prompt,
    chosen, rejected. preference_implicit: the same, the prompt in front of both. unpaired: prompt, completion, and whether it
    is good. demonstrations: prompt and completion (task write). ratings: prompt, response, score and flags (task rate)."""
    output: str = ""
    """File to write (.jsonl); may stand at the end without --output."""
    labellers: tuple[str, ...] = ()
    """Only what these people judged. None: all."""

    def __post_init__(self) -> None:
        for name in ("feedback", "output"):
            if not getattr(self, name):
                raise ValueError(f"there is no {name}: tutelage label export feedback.db --to ranking rankings.jsonl")
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"output is {self.output}: it must be a .jsonl file, so that it can be read again")


@dataclass(frozen=True)
class ConvertConfig:
    """Make a Hugging Face folder of a GGUF file, or a GGUF file of a folder: `tutelage convert SOURCE TARGET`.

    `tutelage convert model.gguf folder/` makes a folder that tutelage trains and transformers loads: config.json, weights,
    tokenizer and chat template. `tutelage convert folder/ model.gguf` makes a file that llama.cpp runs. Llama, Mistral,
    SmolLM, Qwen2, Qwen3 and GPT-2. Quantised weights need the gguf package: pip install 'tutelage[hub]'.
    """

    source: str = ""
    """A GGUF file or a model's folder; may stand in front without --source."""
    target: str = ""
    """Folder or GGUF file to write; may stand behind the source without --target."""
    dtype: Literal["auto", "float32", "float16", "bfloat16", "q8_0"] = "auto"
    """What to store the matrices as. auto: as they are; quantised weights become float32, which holds them exactly. q8_0: 8
    bits a number, in blocks of 32; for a GGUF file only."""
    overwrite: bool = False
    """Replace the model, or the file, that is there already."""
    json: str | None = None
    """Write the figures (tensors, weights, bytes, seconds) to this file."""

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            if not getattr(self, name):
                raise ValueError(f"there is no {name}: tutelage convert model.gguf folder/, or the other way round")


@dataclass(frozen=True)
class DataCheckConfig:
    """Check files of rows before a run: `tutelage data check FILE... --model FOLDER`.

    It prints the schema, what is wrong with which line, how long the rows are, and the first examples as the model will see
    them, with what is learned in green. An error is one sentence and exit status 2.
    """

    data: tuple[str, ...] = ()
    """Files (.jsonl, .json, .parquet) or folders of them, of one schema; may stand without --data in front."""
    model: str | None = None
    """Folder of the tokenizer (and its chat template). None: rows are checked, but not made into tokens."""
    chat_template_path: str | None = None
    """A Jinja file that makes text of messages, for a model without a chat template. None: the model's own."""
    max_length: int = 0
    """Longest sequence in tokens. 0: any length."""
    on_bad_row: str = "error"
    """What to do with a bad row: "error", or "skip:<max>" to leave out up to so many, each reported."""
    on_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a row that is longer than max_length."""
    completion_only_loss: bool = True
    """Of prompt and completion learn only the completion."""
    assistant_only_loss: bool = True
    """Of messages learn only what the assistant says."""
    show: int = 3
    """Show so many examples."""
    json: str | None = None
    """Write the figures (schemas, rows, findings) to this file."""

    def __post_init__(self) -> None:
        for name in ("max_length", "show"):
            at_least(self, name, 0)
        if self.chat_template_path is not None and self.model is None:
            raise ValueError("chat_template_path writes messages for a tokenizer: give its folder as --model")


def at_least(config: object, name: str, least: int) -> None:
    """Raises ValueError naming the field of `config` that is below `least`."""
    if not getattr(config, name) >= least:
        raise ValueError(f"{name} must be at least {least}, but it is {getattr(config, name)}")


def check_port(port: int) -> None:
    """Raises ValueError for a number that is no port; 0 is any that is free."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port must lie in 0 .. 65535, but it is {port}")


def resolved(config: RunConfig) -> dict[str, object]:
    """The fields as plain JSON and YAML values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()}
