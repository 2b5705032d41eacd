"""TRL's trainers, a step at a time, for ``tutelage bench loops``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import time
from pathlib import Path
from typing import Any

import torch

LOSSES = {"sft": ("SFT", {}), "dpo": ("DPO", {}), "dpo cached": ("DPO", {"precompute_ref_log_probs": True})}
"""Name -> (which trainer, its options). DPOTrainer runs the reference in every step unless it is told not to."""


def installed() -> bool:
    """Whether there is a TRL to measure."""
    return importlib.util.find_spec("trl") is not None


class Trainer:
    """One of TRL's trainers as it is fastest on a CPU: float32 (bfloat16 is many times slower), all activations kept."""

    def __init__(self, name: str, folder: Path, rows: Path, batch_size: int, max_length: int) -> None:
        """name: of LOSSES. folder: of model and tokenizer. rows: JSON lines, batch_size of them a step."""
        trl, transformers, datasets = map(importlib.import_module, ("trl", "transformers", "datasets"))
        kind, options = LOSSES[name]
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=batch_size,
            max_length=max_length,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        data = [json.loads(line) for line in rows.read_text().splitlines()]
        with contextlib.redirect_stdout(io.StringIO()):
            self._trainer: Any = getattr(trl, f"{kind}Trainer")(
                model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
                args=arguments,
                train_dataset=datasets.Dataset.from_list(data),
                processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            )
        self._clock = _clock(transformers.TrainerCallback)
        self._trainer.add_callback(self._clock)

    def seconds(self) -> float:
        """Of one more step, from its batch to the updated weights. What `train` does around it is not counted."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._trainer.train()
        return float(self._clock.seconds)


def _clock(base: type[Any]) -> Any:
    """A callback that takes the time of the last step."""

    class Clock(base):  # type: ignore[misc]
        begin = seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.begin

    return Clock()
