"""`python examples/speed.py`: conversion and load of SmolLM2-135M-Instruct, and whether its weights make training, scoring
or rollouts slower than random ones of the same shape. Two minutes on two cores, 4 GiB.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = Path("runs/packages")
ROUNDS, SEQUENCES, LENGTH, PROMPT, ANSWER = 5, 2, 512, 64, 64


def seconds(work: Callable[[], object]) -> float:
    """Of one run."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Prints the figures."""
    import torch

    from common.model import smollm2
    from common.plain import articles
    from tutelage import AdamW, Model, objectives, pack

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        print(f"conversion: {seconds(lambda: smollm2(PACKAGES, folder)):.2f} s")
        loads = [seconds(lambda: Model.from_pretrained(folder)) for _ in range(ROUNDS)]
        print(f"load: {statistics.median(loads):.2f} s ({min(loads):.2f} to {max(loads):.2f})")
        real = Model.from_pretrained(folder)
    assert real.tokenizer is not None
    models = {"real": real, "random": Model(real.config, seed=0)}
    tokens = [token for text in articles(PACKAGES) for token in real.tokenizer.encode(text)]
    batch = pack([tokens[row * LENGTH : (row + 1) * LENGTH] for row in range(SEQUENCES)])
    prompts = [tokens[row * PROMPT : (row + 1) * PROMPT] for row in range(8)]
    optimizers = {name: AdamW(model, lr=1e-6) for name, model in models.items()}

    def score(name: str) -> None:
        with torch.no_grad():
            models[name].score(batch)

    def step(name: str) -> None:
        logprobs = models[name].score(batch).logprobs
        objectives.cross_entropy(logprobs, batch.completion_mask, denominator=sum(batch.completion_counts)).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    def rollout(name: str) -> None:
        rows = models[name].generate(prompts, ANSWER, seed=1, stop_token_ids=[])
        assert sum(rows.lengths) == len(prompts) * ANSWER, "both models decode the same number of tokens"

    for what, work in {"scoring": score, "training": step, "rollout": rollout}.items():
        times: dict[str, list[float]] = {name: [] for name in models}
        for place in range(ROUNDS + 1):
            for name in models if place % 2 else reversed(models):
                times[name].append(seconds(functools.partial(work, name)))
        own, other = (times[name][1:] for name in models)  # the first run of each touches new memory
        ratios = [one / two for one, two in zip(own, other, strict=True)]
        print(
            f"{what}: {statistics.median(own):.3f} s, random weights {statistics.median(other):.3f} s, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported, as the command line does
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
