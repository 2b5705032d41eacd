"""The reference model, and its log-probs: computed once, kept in the run's folder, so that the model itself can be freed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tutelage import files
from tutelage.batch import PackedBatch
from tutelage.checkpoint import TENSORS, load_tensors
from tutelage.files import DISK, CheckpointError, DamagedCheckpointError, Disk
from tutelage.model import Model
from tutelage.safetensors_io import safetensors_chunks
from tutelage.train.run import NonFiniteError, Run
from tutelage.train.tuning import content

REFERENCE = "reference"
_LOGPS = "logps"


def load_reference(folder: str, model: Model, longest: int) -> Model:
    """The reference in `folder` for `model`, whose base it shares where that came from the same folder.

    Raises ValueError where it cannot read the model's `longest` sequences.
    """
    base = model.base
    reference = (
        base
        if base is not None and base.is_from(folder)
        else Model.from_pretrained(folder, device=model.device_name, base=base)
    )
    if reference.head != "lm":
        raise ValueError(f"{folder} holds a reward model, and a reference must be a language model")
    if reference.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the reference {folder} has {reference.config.vocab_size} tokens, the model {model.config.vocab_size}: "
            "both must have the same tokenizer"
        )
    if reference.config.max_position_embeddings < longest:
        raise ValueError(
            f"the reference {folder} reads at most {reference.config.max_position_embeddings} tokens, "
            f"but max_length is {longest}: lower it"
        )
    return reference


def logps(model: Model, batch: PackedBatch, max_tokens: int, done: Callable[[int], None] | None = None) -> Tensor:
    """float32 [S]: the log-prob of each sequence's masked tokens together, without gradient.

    At most `max_tokens` tokens, or the longest sequence, go through the model at once; that changes no bit. done: told how
    many sequences are done. Raises as `Model.score`.
    """
    sums: list[Tensor] = []
    finished = 0
    with torch.no_grad():
        for part in batch.split(max(max_tokens, *batch.lengths)):
            sums.append(part.sum(model.score(part, completion_only=True).logprobs))
            finished += len(part)
            if done is not None:
                done(finished)
    return torch.cat(sums)


def reference_logps(run: Run, model: Model, batch: PackedBatch, max_tokens: int, disk: Disk = DISK) -> tuple[str, Tensor]:
    """(key, `logps` of the reference `model`), from the run's folder where they are there already.

    The key is the SHA-256 of the weights, the shape, the tokens and the masks: what is kept under it can be of nothing else.
    What is damaged is computed again, and said. Raises NonFiniteError naming the first sequence without a finite log-prob.
    """
    digest = hashlib.sha256(content(model).encode())
    for tensor in (batch.tokens, batch.cu_seqlens, batch.completion_mask):
        digest.update(tensor.numpy().data)
    key = digest.hexdigest()
    folder = run.folder / REFERENCE / key
    kept = torch.zeros(len(batch))
    if run.ranks.leads and folder.exists():
        try:
            kept = _load(folder, len(batch))
            run.say(f"reference log-probs: {folder}")
        except CheckpointError as damage:
            run.say(f"{damage}: the reference log-probs are computed again")
            files.remove(folder, disk)
    if run.ranks.exchange(folder.exists())[0]:
        run.ranks.broadcast(kept)
        return key, kept
    with run.progress("reference log-probs", len(batch)) as done:
        found = run.share(batch, lambda part: logps(model, part, max_tokens, done))
    wrong = torch.nonzero(~torch.isfinite(found)).flatten().tolist()
    if wrong:
        raise NonFiniteError(
            f"the reference model's log-prob of sequence {wrong[0]} is {found[wrong[0]].item()}: its weights are damaged"
        )
    if run.ranks.leads:
        files.make_folder(folder.parent, disk)
        metadata = {"format_version": str(files.FORMAT_VERSION)}
        files.write_folder(folder, {TENSORS: safetensors_chunks({_LOGPS: found}, metadata)}, disk)
    return key, found


def _load(folder: Path, count: int) -> Tensor:
    records = files.read_manifest(folder)
    if TENSORS not in records:
        raise DamagedCheckpointError(f"{folder} is damaged: its {files.MANIFEST} lists no {TENSORS}")
    found = load_tensors(folder / TENSORS, records).get(_LOGPS)
    if found is None or found.dtype != torch.float32 or found.shape != (count,):
        raise DamagedCheckpointError(f"{folder} is damaged: it does not hold {count} log-probs")
    return found
