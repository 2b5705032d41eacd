"""``tutelage bench kernels|train|rollout|loops|label``: speeds as fractions of the machine's ceilings, as ratios to peers.

Ceilings, peers and ours are measured in one run, alternating, because machines change their speed by the
hour. Nothing here imports torch before :func:`run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["KernelsConfig", "LabelConfig", "LoopsConfig", "RolloutConfig", "TrainConfig", "run"]


@dataclass(frozen=True)
class KernelsConfig:
    """Every kernel, forward and backward, on transformer shapes, against torch (matmul: numpy too).

    Args:
        only: names of kernels (none: all).
        quick: the first shape of each kernel, short samples, two rounds.
        rounds: samples of each contender.
        device: cuda: the GPU's kernels, timed by CUDA events with a cold L2, as fractions of the data sheet's peak and against
            torch; each is checked against float64 first. cuda-sim: checked at small shapes, nothing timed.
        json: a file to write the JSON line to as well.
    """

    only: tuple[str, ...] = ()
    quick: bool = False
    rounds: int = 5
    device: Literal["cpu", "cuda", "cuda-sim"] = "cpu"
    json: Path | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Whole training steps, forward, backward and AdamW, against plain torch modules of the same shapes.

    Args:
        shapes: names of shapes (none: all).
        steps: steps of each contender.
        peers: measure torch too.
        memory: measure the peak memory of each, in a process of its own.
        json: a file to write the JSON line to as well.
    """

    shapes: tuple[str, ...] = ()
    steps: int = 3
    peers: bool = True
    memory: bool = True
    json: Path | None = None


@dataclass(frozen=True)
class RolloutConfig:
    """Generation, prompt 64 and 128 new tokens on the SmolLM2-135M shape, against the roofline, transformers and
    llama.cpp.

    The roofline of a step is the larger of (bytes of weights, keys and values / memory read ceiling) and (flops / FMA peak),
    both ceilings measured right before and after each window of steps.

    Args:
        batch: sequences at a time.
        weights: how they are kept: float32, bfloat16.
        rounds: windows of steps of each contender.
        peers: measure transformers (float32) and llama.cpp (F32; beside bfloat16 F16 and BF16) where they are installed.
        lora_rank: measure the model under an adapter of this rank too, as one of the peers: the ratio is what it costs. 0: not.
        json: a file to write the JSON line to as well.
    """

    batch: tuple[int, ...] = (1, 8, 32, 128)
    weights: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    rounds: int = 5
    peers: bool = True
    lora_rank: int = 0
    json: Path | None = None


@dataclass(frozen=True)
class LoopsConfig:
    """Steps of the loops, `tutelage sft`, `tutelage dpo` and `tutelage ppo` as they are, on the SmolLM2-135M shape: which part
    takes how long, of its roofline, and the whole against TRL's trainers.

    sft: 2 sequences of 512 tokens; dpo: 4 pairs of 256. A quarter of each is the prompt. ppo: answers of 64 tokens to 8 prompts
    of 64, learned from once; critic, reward model and reference have the policy's size. A part that computes is measured by the
    FMA peak, a step of decoding by the roofline of `tutelage bench rollout`, the optimizer by the memory read ceiling. Beside
    the step: the old log-probs computed again, which a loop must whose rollout is not exact, and this one need not.

    Args:
        loops: which of them.
        rounds: steps of each contender.
        micro_batch_tokens: as the loops': tokens of one forward and backward.
        peers: measure TRL too, where it is installed. Its last PPO trainer is that of 1.12; a later TRL has none.
        memory: measure the peak memory of each, in a process of its own.
        json: a file to write the JSON line to as well.
    """

    loops: tuple[Literal["sft", "dpo", "ppo"], ...] = ("sft", "dpo", "ppo")
    rounds: int = 3
    micro_batch_tokens: int = 8192
    peers: bool = True
    memory: bool = True
    json: Path | None = None


@dataclass(frozen=True)
class LabelConfig:
    """How long a person waits for the labelling page's server: for the page, and for the next item after an answer was sent.

    Beside it, what it takes this disk to sync 4 KiB, which an answer has to wait for, before it is confirmed.

    Args:
        items: in the session; most of them are judged already.
        rounds: requests of each kind.
        folder: where to put the file of feedback while measuring.
        browser: measure it in Chromium too, where Playwright and a Chromium are installed.
        json: a file to write the JSON line to as well.
    """

    items: int = 10_000
    rounds: int = 200
    folder: Path = Path()
    browser: bool = True
    json: Path | None = None


def run(config: KernelsConfig | TrainConfig | RolloutConfig | LoopsConfig | LabelConfig) -> dict[str, Any]:
    """Measures, prints a table and one line of JSON, and returns what that line says.

    Raises:
        ValueError: naming a kernel or shape that there is none of; fewer than one round or step; a device that does not
            work here, and why.
    """
    from . import gpu, kernels, loops, rollout, train

    if isinstance(config, KernelsConfig) and config.device != "cpu":
        return gpu.run(config)
    if isinstance(config, LabelConfig):
        from . import label  # alone needs a web server

        return label.run(config)

    if isinstance(config, RolloutConfig):
        return rollout.run(config)
    if isinstance(config, LoopsConfig):
        return loops.run(config)
    return kernels.run(config) if isinstance(config, KernelsConfig) else train.run(config)
