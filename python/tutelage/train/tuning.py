"""What the loops share that start from a model and learn from rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage.batch import PackedBatch, pack
from tutelage.config import Head
from tutelage.data.examples import Example, ExampleSet, Item, Preference, Prompt, Unpaired, sequences, split_examples
from tutelage.data.tokenizer import Tokenizer
from tutelage.model import Model
from tutelage.train import picture
from tutelage.train.configs import TuningConfig
from tutelage.train.run import METRICS, Run, write_json

UserObjective = Callable[..., torch.Tensor]
"""f(out, batch, columns) -> a micro-batch's share of the step's loss, a scalar.

out: what `model.score(batch)` returns. columns: "denominator", the number in the whole step of what the loop's
mean is over, what else the loop says, and every other field of the rows by its name, a list with one entry for
each row of the micro-batch (None where the row has no such field). A mean over the step is a sum over the
micro-batch, divided by the denominator.
"""


@dataclass(frozen=True)
class TuningResult:
    """What a finished run has come to."""

    folder: Path
    """The model and its tokenizer: `Model.from_pretrained(folder)`."""
    steps: int
    selected_step: int
    """Whose weights the model in `folder` has."""
    examples: int
    """Trained on."""
    tokens: int
    """Learned, all processes of the run together; a token that is seen twice counts twice."""
    loss: float
    """Of the last step."""
    eval_loss: float | None
    """Of the model in `folder` on the held-out examples; None where nothing is held out."""
    seconds: float
    """Of this process's steps."""
    tokens_per_second: float


def base_model(config: TuningConfig, head: Head = "lm") -> tuple[Model, Tokenizer]:
    """The model to start from, and its tokenizer with the chat template that is to be used.

    A scalar head is drawn anew (config.seed) where the folder holds a language model. Raises ValueError for a
    reward model where a language model is wanted, a folder without a tokenizer, a max_length that the model
    cannot read, and as `start`.
    """
    model = start(config, head)
    if model.head != head:
        raise ValueError(f"{config.model} holds a reward model, and fine-tuning needs a language model")
    if model.tokenizer is None:
        raise ValueError(f"there is no tokenizer.json in {config.model}: put the model's tokenizer there")
    context = model.config.max_position_embeddings
    if config.max_length > context:
        raise ValueError(f"max_length is {config.max_length}, but the model reads at most {context} tokens: lower it")
    if config.chat_template_path is not None:
        model.tokenizer = model.tokenizer.with_chat_template(config.chat_template_path)
    return model, model.tokenizer


def start(config: TuningConfig, head: Head) -> Model:
    """What learns, in its first state: the model of config.model, or with a lora_rank an adapter on it.

    An adapter's folder with a lora_rank is that adapter, trained on; without one its merged model. Raises ValueError for an
    adapter that is not the one that the config asks for.
    """
    wanted: Head | None = "scalar" if head == "scalar" else None
    if not config.lora_rank:
        model = Model.from_pretrained(config.model, wanted, config.device, seed=config.seed)
        return model if model.base is None else model.merge()
    model = Model.from_pretrained(config.model, device=config.device)
    if model.base is None:
        return with_adapter(model, config, wanted)
    lora = model.lora
    assert lora is not None
    targets = set(config.lora_target_modules) or set(lora.target_modules)
    if (lora.rank, lora.alpha, set(lora.target_modules)) != (config.lora_rank, config.lora_alpha, targets):
        raise ValueError(
            f"{config.model} holds an adapter of lora_rank {lora.rank}, lora_alpha {lora.alpha:g} and lora_target_modules "
            f"{' '.join(lora.target_modules)}: give the same to train it on, or merge it into a model first (--lora_merge)"
        )
    return Model.from_pretrained(config.model, wanted, config.device, base=model.base, seed=config.seed)


def with_adapter(model: Model, config: TuningConfig, head: Head | None = None) -> Model:
    """A fresh adapter on the model, as the config asks for it."""
    return model.with_lora(config.lora_rank, config.lora_alpha, config.lora_target_modules, head, config.seed)


def before(model: Model) -> Model:
    """The model as it is now, whatever it learns later: its copy. Of an adapter a copy of that alone, and of one that adds
    nothing yet the base, whose bits it has."""
    if model.base is None or model.base.head != model.head:
        return model.clone()
    untrained = not any(bool(view.any()) for name, view in model.named_parameters() if name.endswith(".lora_B.weight"))
    return model.base if untrained else model.clone()


def size(model: Model) -> str:
    """What the reader is told of how much learns."""
    own = f"{model.params.numel():,}"
    return (
        f"{own} parameters" if model.base is None else f"{own} parameters beside the {model.base.params.numel():,} of its base"
    )


def save(run: Run, model: Model, config: TuningConfig, command: str, /, **came_to: float | None) -> Path:
    """Writes the finished model into the run's folder: an adapter as such, or merged where the config says so.

    came_to: see `Run.save_model`.
    """
    return run.save_model(model.merge() if config.lora_merge else model, command, **came_to)


def content(model: Model) -> str:
    """SHA-256 of the weights and the shape: equal means the same model."""
    digest = hashlib.sha256(repr(model.config).encode())
    if model.base is not None:
        digest.update(repr(model.lora).encode())
        digest.update(model.base.params.cpu().numpy().data)
    digest.update(model.params.cpu().numpy().data)
    return digest.hexdigest()


def check_same(run: Run, state: Mapping[str, Any], name: str, key: str, what: str) -> None:
    """Raises ValueError where the checkpoint was made with another `what`; key: what it is known by, `name`: in the state."""
    if state.get(name, key) != key:
        raise ValueError(
            f"cannot resume {run.folder}: {what} is not what that run used; "
            "bring it back, or start a new run in another --output_dir"
        )


def check_rows(loaded: ExampleSet[Item], max_tokens: int, reserved: Sequence[str] = ()) -> None:
    """Raises ValueError naming the row that has more than `max_tokens` tokens or a field with a reserved name."""
    for item in loaded.examples:
        together = sequences(item)
        length = sum(len(sequence.tokens) for sequence in together)
        if length > max_tokens:
            what = "the row has" if len(together) == 1 else "the responses, which are learned together, have"
            raise ValueError(
                f"{item.where}: {what} {length} tokens, more than micro_batch_tokens = {max_tokens}: "
                "raise it, or lower max_length"
            )
        name = next((name for name in reserved if name in item.columns), None)
        if name is not None:
            raise ValueError(f"{item.where}: the field {name!r} has a meaning to objectives: give it another name")


def split(loaded: ExampleSet[Item], config: TuningConfig) -> tuple[ExampleSet[Item], ExampleSet[Item]]:
    """(training, held out). Raises ValueError where nothing is held out but select_by needs it."""
    training, held_out = split_examples(loaded, config.eval_fraction, config.seed)
    if config.select_by != "last" and not len(held_out):
        raise ValueError(
            f"select_by {config.select_by} needs held-out examples, but there is only one prompt: use select_by last"
        )
    return training, held_out


def stops(model: Model, tokenizer: Tokenizer, examples: ExampleSet[Item]) -> tuple[int, ...]:
    """What ends a completion: what already does, the end of text, and the end of a turn that is learned here."""
    learned: list[int | None] = [tokenizer.eos_token_id, None if examples.turn is None else examples.turn.stop_token_id]
    return tuple(dict.fromkeys([*model.eos_token_ids, *(number for number in learned if number is not None)]))


def packed(examples: Sequence[Example]) -> PackedBatch:
    """The examples laid end to end."""
    return pack([example.tokens for example in examples], [example.mask for example in examples])


def columns_of(rows: Sequence[Example | Preference | Unpaired | Prompt]) -> dict[str, Any]:
    """The rows' other fields by name, one entry for each row; None where the row has no such field."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {name: [row.columns.get(name) for row in rows] for name in names}


def checked(loss: Any) -> torch.Tensor:
    """What a user's objective has returned. Raises ValueError where that is no scalar with a gradient."""
    if not isinstance(loss, torch.Tensor):
        raise ValueError(f"the objective must return a scalar tensor, but it returned {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"the objective must return a scalar, but the shape of its loss is {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("the objective's loss has no gradient: compute it from out.logprobs or out.entropy")
    return loss


class Best:
    """Of the models that were measured the one that select_by asks for; none with select_by last."""

    def __init__(self, config: TuningConfig, state: Mapping[str, Any]) -> None:
        """state: of the loop, as a checkpoint has it."""
        self._by: str = config.select_by
        self.state: dict[str, Any] = {name: state[name] for name in ("best", "best_step", "best_params") if name in state}
        """Belongs into every checkpoint."""

    def offer(self, model: Model, step: int, measured: Mapping[str, float]) -> None:
        """Keeps a copy of the weights where `measured` is better than all before; the first of equals stays."""
        if self._by == "last":
            return
        sign = 1 if self._by == "eval_reward" else -1
        if "best" not in self.state or sign * measured[self._by] > sign * self.state["best"][self._by]:
            self.state = {"best": dict(measured), "best_step": step, "best_params": model.params.clone()}

    def restore(self, model: Model, last: int, measured: Mapping[str, float]) -> tuple[int, Mapping[str, float]]:
        """Gives the model its best weights; returns the step that they are of and what was measured then. Without any:
        the last step's."""
        if not self.state:
            return last, measured
        with torch.no_grad():
            model.params.copy_(self.state["best_params"])
        return self.state["best_step"], self.state["best"]


def conclude(run: Run, result: TuningResult, config: TuningConfig, command: str, unit: str) -> None:
    """Draws the loss, says what the run has come to, and writes the figures for `--json`.

    unit: of the losses, as in "nats per token" or "per example".
    """
    if not run.ranks.leads:
        return
    if config.plot and (run.folder / METRICS).exists():  # not where a finished run was resumed in another folder
        run.say(picture.show(run.folder / METRICS, run.folder / "loss.png", unit))
    measured = "" if result.eval_loss is None else f", {result.eval_loss:.3f} on the held-out examples"
    run.say(f"loss {result.loss:.3f}{measured} ({unit}); {result.tokens_per_second:,.0f} tokens/s")
    run.say(f"model and tokenizer, of step {result.selected_step}: {result.folder}")
    if config.json is not None:
        figures: Mapping[str, Any] = {**dataclasses.asdict(result), "folder": str(result.folder)}
        write_json(Path(config.json), {"command": command, **figures})
