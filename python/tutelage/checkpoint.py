"""Checkpoints of a training run: named tensors and a JSON state, bit for bit, saved by `files.save_folder`.

A checkpoint folder holds `tensors.safetensors` (the safetensors format, which any tool of the field reads),
`state.json` and `manifest.json`; each carries `format_version`. Equal states give equal files, byte for byte.

Of several ranks each writes its part of the flat tensors into a file of its own, `tensors-00002-of-00004.safetensors`, and
`state.json` says how they were cut. They are put together when they are read, so any number of ranks can go on.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage import files
from tutelage.distributed import Ranks
from tutelage.files import DISK, Buffer, CheckpointError, DamagedCheckpointError, Disk, FileRecord
from tutelage.safetensors_io import DTYPES, METADATA, safetensors_chunks
from tutelage.sharding import Layout

TENSORS = "tensors.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: its folder, the optimizer step of the save, its CPU tensors, its JSON state."""

    folder: Path
    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(
    run_folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    disk: Disk = DISK,
    ranks: Ranks | None = None,
    shards: Mapping[str, tuple[Layout, torch.Tensor]] | None = None,
) -> Path:
    """Saves named tensors (any device) and a JSON state; returns the checkpoint's folder.

    tensors: of float64, 32, 16, bfloat16, int64 to int8, uint8 and bool. state: dict (keys are str), list,
    str, int, float, bool, None, nested; floats come back with the same bits, NaN and infinities as Python's
    json writes them. Extra memory: 16 MiB, or one tensor where one is not contiguous. The `keep` newest
    checkpoints stay; see `files.save_folder`. Raises TypeError naming what cannot be stored, before anything
    is written, and FileError.

    ranks: that save together, all with equal tensors and state; the leading one writes those. shards: flat tensors of which
    each rank writes its part, by name: how they are cut, and this rank's part.
    """
    check_json(state, "state")
    content: dict[str, Any] = {"format_version": files.FORMAT_VERSION, "step": step, "state": state}
    metadata = {"format_version": str(files.FORMAT_VERSION)}
    parts: dict[str, Iterable[Buffer]] = {}
    if ranks is not None and shards:
        content["shards"] = {
            name: {
                "size": layout.size,
                "ranks": layout.ranks,
                "buckets": [bucket.start for bucket in layout.buckets],
                "chunk": layout.chunk,
            }
            for name, (layout, _) in shards.items()
        }
        own = {name: shard for name, (_, shard) in shards.items()}
        parts[shard_name(ranks.rank, ranks.count)] = safetensors_chunks(own, metadata)
    if ranks is None or ranks.leads:
        parts[TENSORS] = safetensors_chunks(tensors, metadata)
        parts[STATE] = [json.dumps(content, indent=1, sort_keys=True).encode()]
    return files.save_folder(run_folder, step, parts, keep, disk, ranks)


def shard_name(rank: int, count: int) -> str:
    """The file of a rank, counted from 1 as everybody names parts of a model."""
    return f"tensors-{rank + 1:05d}-of-{count:05d}.safetensors"


def load_checkpoint(folder: Path) -> Checkpoint:
    """Loads a checkpoint, every byte verified; the tensors are views of one buffer of the file's size.

    Raises CheckpointError: not a complete checkpoint, or of a newer format; DamagedCheckpointError: names the
    damaged file and the newest older checkpoint that is intact.
    """
    try:
        records = files.read_manifest(folder)
        step, state, shards = _load_state(folder / STATE, records)
        tensors = {**load_tensors(folder / TENSORS, records), **_load_shards(folder, records, shards)}
    except DamagedCheckpointError as damage:
        raise DamagedCheckpointError(f"{damage}; {_older_intact(folder)}") from damage
    return Checkpoint(folder, step, tensors, state)


def load_newest(run_folder: Path) -> Checkpoint | None:
    """Loads the newest complete checkpoint of a run; None if there is none. Raises as `load_checkpoint`."""
    folder = files.newest_complete(run_folder)
    return None if folder is None else load_checkpoint(folder)


def check_json(value: object, where: str) -> None:
    """Raises TypeError naming the place where `value` holds what JSON would not give back unchanged."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: a checkpoint's keys are strings")
            check_json(entry, f"{where}.{key}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            check_json(entry, f"{where}[{index}]")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise TypeError(
            f"{where} is a {type(value).__name__}: a checkpoint's state holds dict, list, str, int, float, bool and None"
        )


def _load_shards(folder: Path, records: Mapping[str, FileRecord], shards: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The flat tensors, whole; one rank's file is read after the other."""
    layouts: dict[str, Layout] = {}
    for name, entry in shards.items():
        match entry:
            case {"size": int(size), "ranks": int(ranks), "buckets": [0, *starts], "chunk": int(chunk)} if (
                ranks > 0 and chunk > 0 and _ascend([0, *starts, size])
            ):
                cuts = itertools.pairwise([0, *starts, size])
                layouts[name] = Layout(size, tuple(range(first, last) for first, last in cuts), ranks, chunk)
            case _:
                raise DamagedCheckpointError(f"{folder / STATE} is damaged: it does not say how {name!r} was cut")
    if len({layout.ranks for layout in layouts.values()}) > 1:
        raise DamagedCheckpointError(f"{folder / STATE} is damaged: its tensors were cut for different numbers of ranks")
    whole: dict[str, torch.Tensor] = {}
    count = next((layout.ranks for layout in layouts.values()), 0)
    for rank in range(count):  # before memory is taken for what they should hold
        _record(folder / shard_name(rank, count), records)
    for rank in range(count):
        path = folder / shard_name(rank, count)
        parts = load_tensors(path, records)
        for name, layout in layouts.items():
            part, pieces = parts.get(name), layout.of(rank)
            if part is None or part.shape != (sum(map(len, pieces)),):
                raise DamagedCheckpointError(f"{path} is damaged: it does not hold its part of {name!r}")
            flat = whole.setdefault(name, torch.empty(layout.size, dtype=part.dtype))
            first = 0
            for piece in pieces:
                flat[piece.start : piece.stop] = part[first : first + len(piece)]
                first += len(piece)
    return whole


def _ascend(starts: list[Any]) -> bool:
    return all(type(start) is int for start in starts) and starts == sorted(starts)


def _load_state(path: Path, records: Mapping[str, FileRecord]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    content = bytearray(_record(path, records).size)
    files.read_checked(path, _record(path, records), memoryview(content))
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: it is not JSON ({error})") from error
    if isinstance(document, dict):
        files.check_version(path, document.get("format_version"))
    match document:
        case {"step": int(step), "state": dict(state)}:
            shards = document.get("shards", {})
            if isinstance(shards, dict):
                return step, state, shards
            raise DamagedCheckpointError(f"{path} is damaged: its shards are no object")
        case _:
            raise DamagedCheckpointError(f"{path} is damaged: it has no step and state")


def load_tensors(path: Path, records: Mapping[str, FileRecord]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file that a manifest lists, every byte verified; views of one buffer.

    Raises CheckpointError, DamagedCheckpointError.
    """
    record = _record(path, records)
    content = torch.empty(record.size, dtype=torch.uint8)
    view = content.numpy().data
    files.read_checked(path, record, view)
    data_start = 8 + int.from_bytes(view[:8], "little")
    if not 8 <= data_start <= record.size:
        raise DamagedCheckpointError(f"{path} is damaged: its header would end at byte {data_start} of {record.size}")
    try:
        header = json.loads(bytes(view[8:data_start]))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: its header is not JSON ({error})") from error
    match header:
        case {"__metadata__": {"format_version": str(version)}}:
            files.check_version(path, int(version) if re.fullmatch("[0-9]{1,9}", version) else version)
        case _:
            raise DamagedCheckpointError(f"{path} is damaged: its header has no format_version")
    del header[METADATA]
    return {name: _view(path, content[data_start:], name, entry) for name, entry in header.items()}


def _view(path: Path, data: torch.Tensor, name: str, entry: object) -> torch.Tensor:
    """The tensor `name` as a view of `data`, the uint8 bytes behind the header."""
    wrong = DamagedCheckpointError(f"{path} is damaged: the header's entry of {name!r} does not describe its bytes")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            known = dtype in DTYPES and all(type(size) is int and size >= 0 for size in shape)
            if not known or not 0 <= begin <= end <= len(data):
                raise wrong
            try:
                return data[begin:end].view(DTYPES[dtype]).reshape(shape)
            except (RuntimeError, TypeError) as error:  # unaligned, too large, another count of elements
                raise wrong from error
        case _:
            raise wrong


def _record(path: Path, records: Mapping[str, FileRecord]) -> FileRecord:
    if path.name not in records:
        raise CheckpointError(f"{path.parent} is not a checkpoint: its {files.MANIFEST} lists no {path.name}")
    return records[path.name]


def _older_intact(folder: Path) -> str:
    """What to resume from instead of a damaged checkpoint: the newest before it that is intact."""
    folder = folder.resolve()
    siblings = files.complete_checkpoints(folder.parent.parent)
    for older in siblings[siblings.index(folder) + 1 :] if folder in siblings else []:
        try:
            files.verify_folder(older)
        except (CheckpointError, OSError):
            continue
        return f"an older one is intact: pass --resume {older}"
    return "no older one of this run is intact"
