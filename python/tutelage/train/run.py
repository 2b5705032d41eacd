"""What every training loop shares, so that a loop's file holds only its algorithm.

A run is a folder: `config.yaml`, `metrics.jsonl`, `checkpoints/`, and what the loop adds. Everything that a
loop's next step depends on is in a checkpoint, so a run that is killed at any instant and resumed ends in the
same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import yaml
from rich.console import Console
from rich.progress import Progress as Bar

from tutelage import dealing, files
from tutelage.batch import PackedBatch
from tutelage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tutelage.dealing import Node
from tutelage.distributed import Ranks, join
from tutelage.files import DISK, Disk
from tutelage.hub.hugging_face import Stage
from tutelage.model import Model
from tutelage.optimizer import AdamW, NonFiniteGradientError
from tutelage.sharding import Reduction
from tutelage.train.bar import bar, progress
from tutelage.train.configs import FREE_FIELDS, RunConfig, TrainingConfig, resolved
from tutelage.train.sharing import shared

CONFIG, METRICS, TIMES = "config.yaml", "metrics.jsonl", "times.jsonl"

_FEWEST_TOKENS = 256
"""Of a micro-batch that is cut so that its logits are kept: the products of fewer rows lose more than that gains."""

T = TypeVar("T")

_LEAF = "exact_leaf"

_LOOP = "loop."
"""Begins the names of a loop's own tensors in a checkpoint."""

Objective = Callable[[PackedBatch, int, range], torch.Tensor]
"""(micro-batch, number of masked tokens in the whole step, which of the step's sequences these are) -> its
share of the step's loss, a scalar."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite; the update of that step was not applied."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, after it had saved what it had learned."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        """Of the signal. A shell expects the exit status 128 + number."""


def ignore(point: str) -> None:
    """The default of `fault`: nothing happens at any named point of a step."""


@contextmanager
def open_run(config: RunConfig, disk: Disk = DISK, fault: Callable[[str], None] = ignore) -> Iterator[Run]:
    """Claims the run's folder for a `with` and loads the checkpoint to start from.

    Args:
        config: with every default resolved.
        disk: for tests, which watch it or make it fail.
        fault: for tests, called with the name of each point of a step that is passed: "micro-batch", of several
            ranks "reduced", "updated", "logged", "saved", and what the loop adds. It may kill the process there.

    Raises:
        RunFolderError: the folder is in use, or holds what would be lost.
        CheckpointError: a checkpoint that cannot be used.
        Interrupted: by SIGINT or SIGTERM, within a step when that is finished and saved, otherwise at once.
        RankError: of several ranks, where one died, hangs or stopped.
        ValueError: of several ranks, on a device that does not work here.
    """
    folder = Path(config.output_dir)
    with join(config.rank_timeout, config.device) as ranks, ExitStack() as stack:
        start = _claimed(config, folder, ranks, disk, stack)
        run = Run(folder, config, None if start is None else load_checkpoint(start), disk, fault, ranks)
        stack.enter_context(_signals(run))
        stack.callback(run.close)
        yield run


def _claimed(config: RunConfig, folder: Path, ranks: Ranks, disk: Disk, stack: ExitStack) -> Path | None:
    """The checkpoint to start from. One rank claims the folder for all; started again by torchrun they go on by themselves."""
    start: Path | None = None
    if ranks.leads:
        again = ranks.starts > 0 and config.resume is None
        resume, overwrite = ("auto", False) if again else (config.resume, config.overwrite)
        start = stack.enter_context(files.claim_run_folder(folder, resume, overwrite, disk))
    told = ranks.exchange(None if start is None else str(start))[0]
    return None if told is None else Path(told)


class Run:
    """A run as its loop sees it; `open_run` makes one."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        checkpoint: Checkpoint | None,
        disk: Disk,
        fault: Callable[[str], None],
        ranks: Ranks | None = None,
    ) -> None:
        self.folder = folder
        self.ranks = ranks or Ranks()
        """That train together; the leading one alone writes and speaks."""
        self.console = Console(quiet=not self.ranks.leads)
        self._speaks = self.ranks.leads and self.console.is_terminal
        self.step = 0 if checkpoint is None else checkpoint.step
        """The step in progress, or the last one done; 0: none yet."""
        self.received: int | None = None
        """The signal that asked the run to stop after this step."""
        self.training = False
        """Between the first step's beginning and the last one's end: a signal then waits for `end_step`."""
        self.seconds = 0.0
        """That the steps of this process took, with the evaluations and saves between them."""
        self.tokens = 0
        """Of the steps of this process."""
        self.parts: dict[str, float] = {}
        """Seconds that went into each part of a step that a loop tells apart, see `timed`."""
        self._config = config
        self._checkpoint = checkpoint
        self._disk = disk
        self.fault = fault
        """To be called with the name of each point of a step that is passed."""
        self._first_step = self._last_step = self.step
        self._losses: list[float] = []  # of the steps since the last line of metrics
        self._fingerprint = self._base = ""
        self._started = 0.0
        self._timing = False
        self._others: Mapping[str, AdamW] = {}
        self._bar: Bar | None = None
        self._optimizers: dict[int, AdamW] = {}  # by the id of their model
        wanted = config.report_to == "tensorboard" and self.ranks.leads
        self._board = _tensorboard(folder, self.step) if wanted else None

    def say(self, text: str) -> None:
        """One line to the reader."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar on a terminal, for work before the steps; tell what is yielded how much of `total` is done."""
        if not self._speaks:
            yield lambda done: None
            return
        with progress(self.console, what, total) as done:
            yield done

    # ---- the state

    def optimizer(self, model: Model, **options: Any) -> AdamW:
        """What updates a model in this run; `accumulate` gives it the gradients of all ranks. options: see `AdamW`."""
        optimizer = AdamW(model, 0.0, ranks=self.ranks, exact=self._config.exact, **options)
        self._optimizers[id(model)] = optimizer
        return optimizer

    def start(
        self,
        model: Model,
        optimizer: AdamW,
        fingerprint: str,
        base: str = "",
        others: Mapping[str, AdamW] | None = None,
    ) -> Mapping[str, Any]:
        """Puts model and optimizer into the checkpoint's state and returns the loop's own, as `end_step` got
        it; {} at a fresh start. Writes config.yaml, and cuts metrics.jsonl back to the checkpoint's step.

        fingerprint: of the data. base: of the model that training starts from, where it was not made here.
        others: the optimizers of further models that learn, by name; saved and restored with them from now on.

        Raises ValueError naming what is not as it was when the run began.
        """
        self._fingerprint, self._base, self._others = fingerprint, base, others or {}
        loop = {} if self._checkpoint is None else self._restore(self._checkpoint, model, optimizer)
        self._checkpoint = None  # its tensors are copied: give the memory back
        if not self.ranks.leads:
            return loop
        document = {"format_version": files.FORMAT_VERSION, **resolved(self._config)}
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        files.write_file_atomic(self.folder / CONFIG, text.encode(), self._disk)
        for name in (METRICS, TIMES):
            files.rewind_json_lines(self.folder / name, lambda line: line["step"] <= self.step, self._disk)
        return loop

    def _restore(self, checkpoint: Checkpoint, model: Model, optimizer: AdamW) -> Mapping[str, Any]:
        saved, tensors = checkpoint.state, checkpoint.tensors
        begun = saved["config"]
        for name, value in self._identity().items():
            if begun.get(name) != value and name != _LEAF:
                raise ValueError(
                    f"cannot resume {checkpoint.folder}: {name} is {value!r}, but that run was started "
                    f"with {begun.get(name)!r}; give the same, or start a new run in another --output_dir"
                )
        if begun.get(_LEAF) != self._identity().get(_LEAF):
            raise ValueError(
                f"cannot resume {checkpoint.folder}: that run was started {_told_leaf(begun.get(_LEAF))}, this one is to go on "
                f"{_told_leaf(self._identity().get(_LEAF))}; give the same, or start a new run in another --output_dir"
            )
        if saved["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"cannot resume {checkpoint.folder}: the data or the tokenizer is not what that run read; "
                "bring it back, or start a new run in another --output_dir"
            )
        if saved.get("base", "") != self._base:
            raise ValueError(
                f"cannot resume {checkpoint.folder}: the model to start from is not what that run started from; "
                "bring it back, or start a new run in another --output_dir"
            )
        optimizer.load_state_dict({"steps": saved["optimizer_steps"], **tensors})
        with torch.no_grad():
            model.params.copy_(tensors["params"])
            for name, other in self._others.items():
                other.load_state_dict(
                    {
                        "steps": saved["other_steps"][name],
                        "exp_avg": tensors[f"{name}.exp_avg"],
                        "exp_avg_sq": tensors[f"{name}.exp_avg_sq"],
                    }
                )
                other.model.params.copy_(tensors[f"{name}.params"])
        self._losses = list(saved["losses"])
        self.say(f"resuming after step {self.step}")
        own = {name.removeprefix(_LOOP): tensor.clone() for name, tensor in tensors.items() if name.startswith(_LOOP)}
        return {**saved["loop"], **own}

    def _identity(self) -> dict[str, object]:
        """The options that the weights depend on."""
        own = {name: value for name, value in resolved(self._config).items() if name not in FREE_FIELDS}
        return {**own, _LEAF: self._config.exact_leaf} if self._config.exact else own

    def _save(self, model: Model, optimizer: AdamW, loop: Mapping[str, Any]) -> None:
        if self.ranks.leads and (self.folder / METRICS).exists():
            files.sync_file(self.folder / METRICS, self._disk)
        own = optimizer.state_dict()
        tensors = {name: value for name, value in loop.items() if isinstance(value, torch.Tensor)}
        ours = {_LOOP + name: tensor for name, tensor in tensors.items()}
        learned: dict[str, tuple[AdamW, torch.Tensor]] = {}
        for prefix, one in {"": optimizer, **{f"{name}.": other for name, other in self._others.items()}}.items():
            parts = {"params": one.own_part(one.model.params), "exp_avg": one.exp_avg, "exp_avg_sq": one.exp_avg_sq}
            learned |= {prefix + part: (one, tensor) for part, tensor in parts.items()}
        together = self.ranks.count > 1
        save_checkpoint(
            self.folder,
            self.step,
            ours if together else {**{name: tensor for name, (_, tensor) in learned.items()}, **ours},
            {
                "config": self._identity(),
                "fingerprint": self._fingerprint,
                "optimizer_steps": own["steps"],
                "losses": self._losses,
                "loop": {name: value for name, value in loop.items() if name not in tensors},
                **({"base": self._base} if self._base else {}),
                **({"other_steps": {name: other.steps for name, other in self._others.items()}} if self._others else {}),
            },
            keep=self._config.save_total_limit,
            disk=self._disk,
            ranks=self.ranks,
            shards={name: (one.layout, tensor) for name, (one, tensor) in learned.items()} if together else None,
        )
        self.fault("saved")

    # ---- one step after the other

    def steps(self, last: int) -> Iterator[int]:
        """The numbers of the steps still to do, up to `last`; end each with `end_step`."""
        self._first_step, self._last_step = self.step, last
        self._started = time.monotonic()
        if self._speaks and self.step < last:
            self._bar = bar(self.console)
            self._bar.start()
            self._bar.add_task("", total=last, completed=self.step, figures="")
        self.training = self.step < last
        while self.step < last:
            self.step += 1
            yield self.step
        self.seconds = time.monotonic() - self._started
        self.training = False
        self.close()
        if self.received is not None:  # it came after the last step's save
            raise self.interruption(self.received)

    def accumulate(
        self,
        model: Model,
        batch: PackedBatch,
        max_tokens: int,
        objective: Objective,
        groups: Sequence[int] | None = None,
    ) -> float:
        """Forward and backward over a step's batch, at most `max_tokens` tokens at a time; returns the loss.

        Fewer where the model would not keep the logits of so many and had to compute them again.
        groups: the sequences that the objective needs together, see `PackedBatch.split`.

        Of several ranks each does its share of the sequences, and the sum of their gradients goes to the model's optimizer.
        exact: leaf by leaf along a tree, so that the sum does not depend on the number of ranks.

        The gradients are the same bits for any max_tokens (P4). Raises NonFiniteError, and as `PackedBatch.split`.
        """
        denominator = int(batch.completion_mask.sum())
        most = min(max_tokens, _kept_at_once(model, batch, groups))
        sizes = [1] * len(batch) if groups is None else list(groups)

        def through(units: range, reduction: Reduction | None = None) -> float:
            first = sum(sizes[: units.start])
            own = sizes[units.start : units.stop]
            part = batch if len(own) == len(sizes) else batch.part(range(first, first + sum(own)))
            parts = part.split(most, None if groups is None else own)
            return self._through(model, parts, first, objective, denominator, reduction)

        if self._config.exact:
            return self._exactly(model, batch.lengths, sizes, through)
        if self.ranks.count == 1:
            return through(range(len(sizes)))
        optimizer = self._optimizers[id(model)]
        shares = dealing.deal(_sums(batch.lengths, sizes), self.ranks.count)
        own = shares[self.ranks.rank]
        reduction = optimizer.reduction([len(share) > 0 for share in shares])
        model.zero_grad()
        loss = through(own, reduction) if own else 0.0
        reduction.finish()
        self.fault("reduced")
        return math.fsum(self.ranks.exchange(loss))

    def _exactly(
        self,
        model: Model,
        lengths: Sequence[int],
        sizes: Sequence[int],
        through: Callable[[range, Reduction | None], float],
    ) -> float:
        """The gradient, and the loss, as sums along the one tree of the step's leaves."""
        leaves = dealing.leaves(sizes, self._config.exact_leaf)
        tree = dealing.tree(_sums(lengths, [len(leaf) for leaf in leaves]))
        nodes = dealing.share_out(tree, self.ranks.count)
        ends = list(itertools.accumulate(sizes, initial=0))
        reduction = self._optimizers[id(model)].reduction([node is not None for node in nodes])
        losses: list[float] = []

        def walk(node: Node, last: bool) -> None:
            """last: nothing of this rank comes after it, so that its left parts are added bucket by bucket."""
            if node.halves is None:
                leaf = leaves[node.first]
                model.zero_grad()
                units = range(ends.index(leaf.start), ends.index(leaf.stop))
                losses.append(through(units, reduction if last else None))
                return
            walk(node.halves[0], False)
            reduction.before.append(model._settled_grads().clone())
            walk(node.halves[1], last)
            if not last:
                model._settled_grads().add_(reduction.before.pop())

        own = nodes[self.ranks.rank]
        if own is not None:
            walk(own, True)
        reduction.finish()
        self.fault("reduced")
        whole: list[float] = [loss for told in self.ranks.exchange(losses) for loss in told]
        return dealing.fold_tree(tree, whole, lambda left, right: left + right)

    def _through(
        self,
        model: Model,
        parts: Sequence[PackedBatch],
        first: int,
        objective: Objective,
        denominator: int,
        reduction: Reduction | None,
    ) -> float:
        """Forward and backward over consecutive parts of a step's batch; first: which of the step's sequences is their first.

        reduction: the gradient is finished with the last part, and sent while its backward runs.
        """
        loss = 0.0
        for number, part in enumerate(parts, 1):
            graphs = model.graphs
            share = objective(part, denominator, range(first, first + len(part)))
            if not math.isfinite(share.item()):
                raise NonFiniteError(
                    f"step {self.step}: the loss is {share.item()}; the update was not applied. "
                    f"{_culprit(model, part, first)}. {self.advice()}"
                )
            if reduction is not None and number == len(parts) and model.graphs == graphs + 1:
                with model.telling(reduction.ready):
                    share.backward()  # type: ignore[no-untyped-call]
            else:
                share.backward()  # type: ignore[no-untyped-call]
            loss += share.item()
            first += len(part)
            self.fault("micro-batch")
        return loss

    def update(self, optimizer: AdamW, *others: AdamW) -> float:
        """One step of each optimizer, or of none where one has a gradient that is not finite.

        Returns the norm of the first one's gradient, before clipping. Raises NonFiniteError.
        """
        try:
            for other in others:
                other.grad_norm()
            norm = optimizer.step()
            for other in others:
                other.step()
        except NonFiniteGradientError as error:
            raise NonFiniteError(f"step {self.step}: {error}. {self.advice()}") from error
        self.fault("updated")
        return norm

    def advice(self) -> str:
        """How to go on after a number that is not finite."""
        newest = files.newest_complete(self.folder)
        back = f"The newest checkpoint is {newest}" if newest else "There is no checkpoint yet"
        return f"{back}; a lower learning_rate or max_grad_norm usually helps, in a new run"

    def gather(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the micro-batches of a step have measured, vectors, in the step's order: this rank's and the others'."""
        return self.ranks.gather(parts)

    def share(self, batch: PackedBatch, compute: Callable[[PackedBatch], torch.Tensor]) -> torch.Tensor:
        """What `compute` gives for the batch, without gradient; each rank does a part of it, see `sharing.shared`."""
        return shared(self.ranks, batch, compute)

    def led(self, work: Callable[[], T]) -> T:
        """What `work` gives, which leaves something on the disk: one rank does it first, and the others find it done."""
        if self.ranks.leads:
            found = work()
        self.ranks.barrier()
        return found if self.ranks.leads else work()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the seconds of a `with` as those of a part of the step; one within another is the outer one's."""
        if self._timing:
            yield
            return
        self._timing, begin = True, time.monotonic()
        try:
            yield
        finally:
            self._timing = False
            self.parts[part] = self.parts.get(part, 0.0) + time.monotonic() - begin

    def shares(self) -> dict[str, float]:
        """Which share of the steps' time each part took, "other" the rest; empty where nothing was `timed`."""
        if not self.parts:
            return {}
        total = max(self.seconds or time.monotonic() - self._started, 1e-9)
        found = {part: seconds / total for part, seconds in self.parts.items()}
        return {**found, "other": max(0.0, 1 - sum(found.values()))}

    @property
    def logs(self) -> bool:
        """Whether this step writes a line of metrics."""
        return self.step % self._config.logging_steps == 0 or self.step == self._last_step

    def log(self, loss: float, tokens: int, told: str = "", /, **figures: float) -> None:
        """Notes a step's loss and token count; every logging_steps a line of metrics: mean loss, figures.

        told: what the reader sees in the place of the loss.
        """
        self._losses.append(loss)
        self.tokens += tokens
        done, left = self.step - self._first_step, self._last_step - self.step
        speed = self.tokens / max(time.monotonic() - self._started, 1e-9)
        if self._bar is not None:
            shown = f"{told or f'loss {loss:.3f}'}  {speed:,.0f} tokens/s"
            self._bar.update(self._bar.task_ids[0], completed=self.step, figures=shown)
        if not self.logs:
            return
        mean = math.fsum(self._losses) / len(self._losses)
        self._losses = []
        self.write_metrics({"loss": mean, **figures})
        shares = self.shares()
        if shares and self.ranks.leads:
            record = {"step": self.step, "seconds": time.monotonic() - self._started, **shares}
            files.append_json_line(self.folder / TIMES, record, self._disk)
        if self._board is not None:
            self._board.add_scalar("tokens_per_second", speed, self.step)
            for part, share in shares.items():
                self._board.add_scalar(f"time/{part}", share, self.step)
        if self._bar is None:
            seconds = left * (time.monotonic() - self._started) / done
            split = "".join(f"  {part} {share:.0%}" for part, share in shares.items())
            self.say(
                f"step {self.step}/{self._last_step}  {told or f'loss {mean:.3f}'}  {speed:,.0f} tokens/s  "
                f"{seconds // 60:.0f}:{seconds % 60:02.0f} left{split}"
            )
        self.fault("logged")

    def write_metrics(self, figures: Mapping[str, float]) -> None:
        """Adds a line to metrics.jsonl: the step, these figures. No times: equal runs write equal bytes."""
        if not self.ranks.leads:
            return
        files.append_json_line(self.folder / METRICS, {"step": self.step, **figures}, self._disk)
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, self.step)

    def end_step(self, model: Model, optimizer: AdamW, loop: Mapping[str, Any]) -> None:
        """Saves a checkpoint where one is due; `loop` is all that the loop's next step depends on besides
        model and optimizer: JSON values and tensors.

        Raises Interrupted, when it has saved, if a signal has arrived.
        """
        # Read once: a signal that comes later than this waits for the next step. One that a rank has got stops all.
        stop = next((number for number in self.ranks.exchange(self.received) if number is not None), None)
        if stop is not None or self.step % self._config.save_steps == 0 or self.step == self._last_step:
            self._save(model, optimizer, loop)
        if stop is not None:
            raise self.interruption(stop)

    def save_model(self, model: Model, command: str, /, **came_to: float | None) -> Path:
        """Writes the finished model into the run's folder, with a card that says what was done to it; returns where.

        came_to: figures of the model as it is saved; one that is None or no number is left out.
        """
        # By name: a resumed run has them in the order of its checkpoint.
        figures = {name: value for name, value in sorted(came_to.items()) if value is not None and math.isfinite(value)}
        stage = Stage(command, {**_chosen(self._config), **figures})
        folder = self.folder / "model"
        if self.ranks.leads:
            model.save_pretrained(folder, stage=stage)
        return folder

    def interruption(self, number: int) -> Interrupted:
        """What to raise when the signal `number` stops the run now."""
        newest = files.newest_complete(self.folder)
        after = f"after step {self.step}, which is saved" if newest else "before anything was saved"
        return Interrupted(
            f"stopped by {signal.Signals(number).name} {after}: "
            "give the same command with --resume auto (and without --overwrite) to go on",
            number,
        )

    def close(self) -> None:
        """Ends the progress bar and TensorBoard's file."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._board is not None:
            self._board.close()
            self._board = None


def schedule(kind: str, step: int, max_steps: int, warmup_steps: int, decay_ratio: float, min_ratio: float) -> float:
    """The learning rate of `step` (1 … max_steps) as a share of the highest.

    Both rise along a line over warmup_steps. cosine (Loshchilov & Hutter 2017, arXiv 1608.03983): half a wave
    down to min_ratio at max_steps. wsd (warmup-stable-decay, Hu et al. 2024, arXiv 2404.06395): stays, then
    falls along a line to min_ratio over the last decay_ratio of max_steps. linear: along a line to what a step
    behind the last would have, min_ratio, so that the last one still learns. constant: stays.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    if kind == "linear":
        first = max(warmup_steps, 1)
        return min_ratio + (1 - min_ratio) * (max_steps + 1 - step) / max(max_steps + 1 - first, 1)
    if kind == "cosine":
        through = (step - warmup_steps) / max(max_steps - warmup_steps, 1)
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * through)) / 2
    left = (max_steps - step) / max(decay_ratio * max_steps, 1)
    return min_ratio + (1 - min_ratio) * min(left, 1.0)


def learning_rate(config: TrainingConfig, step: int, max_steps: int) -> float:
    """Of `step`, 1 … max_steps, as `config` schedules it."""
    return config.learning_rate * schedule(
        config.lr_scheduler_type,
        step,
        max_steps,
        round(config.warmup_ratio * max_steps),
        config.decay_ratio,
        config.min_lr_ratio,
    )


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes the final figures of a command, for `--json FILE`; makes missing folders."""
    files.make_folder(path.parent)
    document = {"format_version": files.FORMAT_VERSION, **figures}
    files.write_file_atomic(path, json.dumps(document, indent=2).encode() + b"\n")


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets the step finish, the second acts at once. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_DFL)
        if not run.training:
            raise run.interruption(number)
        run.received = number
        os.write(2, b"\nfinishing this step, then saving; once more to stop at once\n")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _chosen(config: RunConfig) -> dict[str, Any]:
    """What was set on the command line and matters to the weights; of a path only its name, which is nobody's secret."""

    def shown(value: Any) -> Any:
        if isinstance(value, tuple):
            return [shown(entry) for entry in value]
        if not isinstance(value, str) or os.sep not in value:
            return value
        path = Path(value)
        return path.parent.name if path.name == "model" else path.name  # of a run

    return {
        field.name: shown(value)
        for field in dataclasses.fields(config)
        if field.name not in FREE_FIELDS | {"model"} and (value := getattr(config, field.name)) not in (field.default, None)
    }


def _sums(lengths: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Of consecutive groups of so many sizes."""
    entries = iter(lengths)
    return [sum(itertools.islice(entries, size)) for size in sizes]


def _told_leaf(leaf: object) -> str:
    return "without exact" if leaf is None else f"with exact and exact_leaf {leaf}"


def _kept_at_once(model: Model, batch: PackedBatch, groups: Sequence[int] | None) -> int:
    """How many tokens have their logits kept between forward and backward, or what the longest group of the batch has."""
    if model.head == "scalar":
        return batch.tokens.numel()
    lengths = iter(batch.lengths)
    longest = max(sum(itertools.islice(lengths, size)) for size in groups or [1] * len(batch))
    return max(_FEWEST_TOKENS, longest, model.logits_budget // (4 * model.config.vocab_size))


def _culprit(model: Model, batch: PackedBatch, first: int) -> str:
    """Where the first number that is not finite sits: in a parameter, or else in which sequences of the
    step."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"{name} is the first parameter that is not finite"
    what = "log-prob" if model.head == "lm" else "reward"
    with torch.no_grad():
        found = (
            batch.sum(model.score(batch, completion_only=True).logprobs)
            if model.head == "lm"
            else batch.last(model.values(batch))
        )
    rows = [str(first + row) for row in torch.nonzero(~torch.isfinite(found)).flatten().tolist()]
    if not rows:
        return f"Every {what} is finite: the objective makes the number"
    return f"Sequences {', '.join(rows[:8])} of the step have {what}s that are not finite"


def _tensorboard(folder: Path, step: int) -> Any:
    """A SummaryWriter that forgets what an earlier process wrote after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--report_to tensorboard needs the tensorboard package: pip install 'tutelage[log]'") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
