"""TRL's trainers, a step at a time, for ``tutelage bench loops``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import time
from pathlib import Path
from typing import Any

import torch

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("SFT", {}),
    "dpo": ("DPO", {}),
    "dpo cached": ("DPO", {"precompute_ref_log_probs": True}),
    "ppo": ("PPO", {"num_ppo_epochs": 1, "num_sample_generations": 0, "temperature": 1.0, "stop_token": None}),
}
"""Name -> (which trainer, its options). DPOTrainer runs the reference in every step unless it is told not to."""


def installed() -> bool:
    """Whether there is a TRL to measure."""
    return importlib.util.find_spec("trl") is not None


def version() -> str:
    """Of the TRL there is."""
    return importlib.metadata.version("trl")


def offers(name: str) -> bool:
    """Whether the TRL there is has this one of LOSSES."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    # Looked up as a folder: an import would take seconds, and warn that it is experimental.
    return name != "ppo" or (Path(spec.origin).parent / "experimental" / "ppo").is_dir()


class Trainer:
    """One of TRL's trainers as it is fastest on a CPU: float32 (bfloat16 is many times slower), all activations kept."""

    def __init__(self, name: str, folder: Path, rows: Path, batch_size: int, max_length: int) -> None:
        """name: of LOSSES. folder: of model and tokenizer, for ppo with the reward model in its folder "reward". rows: JSON
        lines, batch_size of them a step. max_length: of ppo, where all prompts have one length: that of a prompt and its
        answer, which no end token shortens."""
        transformers, datasets = map(importlib.import_module, ("transformers", "datasets"))
        kind, options = LOSSES[name]
        trl = importlib.import_module("trl.experimental.ppo" if kind == "PPO" else "trl")
        data = [json.loads(line) for line in rows.read_text().splitlines()]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

        def policy() -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

        def judge() -> Any:
            auto = transformers.AutoModelForSequenceClassification
            return auto.from_pretrained(folder / "reward", num_labels=1, dtype=torch.float32)

        models: dict[str, Any] = {}
        if kind == "PPO":
            tokenizer.pad_token = tokenizer.eos_token  # it insists on one, and pads nothing
            data = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in data]
            models = {"ref_model": policy(), "reward_model": judge(), "value_model": judge()}
            sizes = {
                "response_length": max_length - len(data[0]["input_ids"]),
                "total_episodes": batch_size,
                "local_rollout_forward_batch_size": batch_size,
            }
        else:
            sizes = {"max_length": max_length, "max_steps": 1}
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=batch_size,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **sizes,
            **options,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self._trainer: Any = getattr(trl, f"{kind}Trainer")(
                model=policy(),
                args=arguments,
                train_dataset=datasets.Dataset.from_list(data),
                processing_class=tokenizer,
                **models,
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

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()  # PPOTrainer tells of the end of its steps only

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.begin

    return Clock()
