"""Every write of the project goes through here: atomic files, checkpoint folders, the lock on a run folder.

The bottom layer is `Disk`: nine primitive operations, each announced to an observer before it happens. A test
that hands in its own observer sees the log of operations, can make any of them fail, and can replay any
prefix of the log as a power loss would leave it. Everything above is written in terms of these nine and takes
`disk=`.

A checkpoint is a folder `<run>/checkpoints/step-00000042`. `save_folder` writes it in the one order that
survives a power loss at any instant (Pillai et al. 2014, "All File Systems Are Not Created Equal", lists what
goes wrong in others): temporary folder, files, fsync of each, manifest last, fsync of the folder, rename,
fsync of the parent, and only then are older checkpoints removed. So a folder with a final name and a manifest
is complete, and anything that disagrees with its manifest is damage, never an interrupted save.

No torch here: the lock and the protocol must be cheap to start and to test.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Buffer = bytes | bytearray | memoryview

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
TEMPORARY = ".tmp-"
LOCK = ".lock"
LOCK_GUARD = ".lock-guard"

_CHUNK_BYTES = 4 << 20  # one system call: long enough to cost nothing, short enough for a prompt Ctrl-C
_LOCK_BYTES = 512  # the owner's record fills one sector: an old one is overwritten without truncation
_STEP_NAME = re.compile(r"step-([0-9]{8,})(?:-([0-9]+))?")
_ADVICE = {
    errno.ENOSPC: "free some space on this file system",
    errno.EDQUOT: "your disk quota is used up: free some space",
    errno.EFBIG: "the file system or `ulimit -f` allows no larger files",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "you have no permission there: choose another folder",
    errno.EIO: "the device reports an error: look at the kernel log, then choose another disk",
}


class FileError(OSError):
    """The operating system refused an operation; the message names the file and what to do."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.errno = code


class RunFolderError(FileError):
    """The run folder belongs to another process, or holds something that would be lost."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: not one, or of a newer format."""


class DamagedCheckpointError(CheckpointError):
    """A file of a complete checkpoint is not what its manifest says it is."""


@dataclass(frozen=True)
class Operation:
    """One primitive operation, as the observer of a `Disk` sees it before it happens.

    name: "mkdir", "create", "write", "append", "fsync" (a file or a folder), "rename", "unlink", "rmdir",
    "lock". target: the new path of a rename. data, offset: the bytes of a write and where they go; `data` is
    a view that is valid only during the call.
    """

    name: str
    path: Path
    target: Path | None = None
    data: Buffer = b""
    offset: int = 0


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file: its size in bytes and the SHA-256 of its content in hexadecimal."""

    size: int
    sha256: str


def _ignore(operation: Operation) -> None:
    pass


class Disk:
    """The primitive operations; every OSError leaves them as a FileError.

    before: called ahead of each operation; it may record it, raise OSError, or never return.
    """

    def __init__(self, before: Callable[[Operation], None] = _ignore) -> None:
        self._before = before

    @contextmanager
    def _operation(self, operation: Operation) -> Iterator[None]:
        try:
            self._before(operation)
            yield
        except OSError as error:
            raise _problem(operation.name, operation.path, error) from error

    def mkdir(self, path: Path) -> None:
        """Makes a folder; one that exists already is left as it is."""
        with self._operation(Operation("mkdir", path)):
            path.mkdir(exist_ok=True)

    def create(self, path: Path) -> int:
        """Makes a file that must not exist yet and returns a descriptor to write to."""
        with self._operation(Operation("create", path)):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, path: Path, descriptor: int, data: Buffer, offset: int) -> None:
        """Writes all of `data` (bytes) at `offset`."""
        with self._operation(Operation("write", path, data=data, offset=offset)), memoryview(data) as view:
            written = 0
            while written < len(view):  # the kernel may take less than it is given, a nearly full disk does
                written += os.pwrite(descriptor, view[written:], offset + written)

    def append(self, path: Path, data: bytes) -> None:
        """Adds `data` at the end of a file, made if missing. Not durable before an `fsync`."""
        with self._operation(Operation("append", path, data=data)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                written = 0
                while written < len(data):
                    written += os.write(descriptor, data[written:])
            finally:
                os.close(descriptor)

    def fsync(self, path: Path, descriptor: int | None = None) -> None:
        """Waits until a file's bytes, or a folder's entries, survive a power loss.

        A file just written is given by its descriptor, because a failed write-back is reported only to
        descriptors that were open when it happened.
        """
        with self._operation(Operation("fsync", path)):
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if descriptor is None else descriptor
            try:
                os.fsync(opened)
            finally:
                if descriptor is None:
                    os.close(opened)

    def rename(self, path: Path, target: Path) -> None:
        """Gives a file or folder another name on the same file system, replacing a file of that name."""
        with self._operation(Operation("rename", path, target)):
            path.rename(target)

    def unlink(self, path: Path) -> None:
        """Removes a file or a symbolic link."""
        with self._operation(Operation("unlink", path)):
            path.unlink()

    def rmdir(self, path: Path) -> None:
        """Removes an empty folder."""
        with self._operation(Operation("rmdir", path)):
            path.rmdir()

    def lock(self, path: Path, wait: bool) -> int | None:
        """Takes the exclusive lock of a file, made if missing: a descriptor, or None where another holds the
        lock.

        The lock ends with the descriptor, so with the process, however that ends.
        """
        with self._operation(Operation("lock", path)):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    return None
                raise
            return descriptor


DISK = Disk()


def _problem(action: str, path: Path, error: OSError) -> FileError:
    advice = f" ({_ADVICE[error.errno]})" if error.errno in _ADVICE else ""
    return FileError(f"cannot {action} {path}: {error.strerror or error}{advice}", error.errno)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _problem("read", path, error) from error


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name; nothing where there is no folder."""
    with _reading(folder):
        return sorted(folder.iterdir()) if folder.is_dir() else []


# --- files --------------------------------------------------------------------------------------------------


def make_folder(folder: Path, disk: Disk = DISK) -> None:
    """Makes a folder and its missing parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent, disk)
        disk.mkdir(folder)
        disk.fsync(folder.parent)


def remove(path: Path, disk: Disk = DISK) -> None:
    """Removes a file, a link (not what it points to) or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        for entry in _entries(path):
            remove(entry, disk)
        disk.rmdir(path)
    elif os.path.lexists(path):
        disk.unlink(path)


def write_file(path: Path, chunks: Iterable[Buffer], disk: Disk = DISK) -> FileRecord:
    """Writes a new file from C-contiguous buffers, one after the other, and fsyncs it; `path` must not exist.

    Holds one chunk at a time: a generator may feed a file larger than memory. Returns the size and SHA-256.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = disk.create(path)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            if not view.nbytes:  # an empty view of several dimensions cannot be cast
                continue
            view = view.cast("B")
            for start in range(0, len(view), _CHUNK_BYTES):
                piece = view[start : start + _CHUNK_BYTES]
                disk.write(path, descriptor, piece, size)
                digest.update(piece)
                size += len(piece)
        disk.fsync(path, descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(size, digest.hexdigest())


def write_file_atomic(path: Path, data: bytes | Iterable[Buffer], disk: Disk = DISK) -> FileRecord:
    """Writes or replaces one file: whatever happens, `path` holds the old content or the new, whole.

    Raises FileError; `path` is then as it was (or, if only the last fsync failed, already new).
    """
    temporary = path.with_name(TEMPORARY + path.name)
    remove(temporary, disk)
    try:
        record = write_file(temporary, [data] if isinstance(data, bytes) else data, disk)
        disk.rename(temporary, path)
    except FileError:
        _remove_if_possible(temporary, disk)
        raise
    disk.fsync(path.parent)
    return record


def _remove_if_possible(path: Path, disk: Disk) -> None:
    """Gives the space of a failed write back; what cannot be removed now is removed by the next write."""
    with suppress(FileError):
        remove(path, disk)


def append_json_line(path: Path, record: Mapping[str, Any], disk: Disk = DISK) -> None:
    """Adds one line to a .jsonl file. Not durable before `sync_file`."""
    disk.append(path, json.dumps(record).encode() + b"\n")


def sync_file(path: Path, disk: Disk = DISK) -> None:
    """Makes a file that was appended to, and its name, durable."""
    disk.fsync(path)
    disk.fsync(path.parent)


def rewind_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool], disk: Disk = DISK) -> None:
    """Cuts a .jsonl file at the first record that `keep` refuses or that a crash left half written.

    A resumed run calls this before it appends, so that the file continues from the checkpoint's step.
    """
    if not path.exists():
        return
    with _reading(path):
        lines = path.read_bytes().splitlines(keepends=True)
    kept = 0
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or not keep(record):
            break
        kept += 1
    if kept < len(lines):
        write_file_atomic(path, lines[:kept], disk)


# --- folders with a manifest --------------------------------------------------------------------------------


def write_folder(target: Path, files: Mapping[str, Iterable[Buffer]], disk: Disk = DISK) -> None:
    """Writes files and their manifest; the folder `target`, a new one, appears complete or not at all."""
    temporary = target.with_name(TEMPORARY + target.name)
    remove(temporary, disk)
    try:
        disk.mkdir(temporary)
        records = {name: write_file(temporary / name, chunks, disk) for name, chunks in files.items()}
        listing = {name: {"size": record.size, "sha256": record.sha256} for name, record in records.items()}
        manifest = json.dumps({"format_version": FORMAT_VERSION, "files": listing}, indent=1)
        write_file(temporary / MANIFEST, [manifest.encode()], disk)
        disk.fsync(temporary)
        disk.rename(temporary, target)
    except FileError:
        _remove_if_possible(temporary, disk)
        raise
    disk.fsync(target.parent)


def check_version(file: Path, version: object) -> None:
    """Raises CheckpointError if this release cannot read the `format_version` that `file` carries."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DamagedCheckpointError(f"{file} is damaged: its format_version is {version!r}, not a number from 1 up")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version {version}, but this tutelage reads up to {FORMAT_VERSION}: "
            "it was written by a newer release, install that one"
        )


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files of a complete folder, by name; each is there and has the size that the manifest says.

    Raises CheckpointError: no manifest, or of a newer format; DamagedCheckpointError: anything else that is
    wrong.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    with _reading(path):
        content = path.read_bytes()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise DamagedCheckpointError(f"{path} is damaged: it is not a JSON object")
    check_version(path, manifest.get("format_version"))
    listing = manifest.get("files")
    if not isinstance(listing, dict):
        raise DamagedCheckpointError(f"{path} is damaged: it lists no files")
    return {name: _read_record(folder, name, entry) for name, entry in listing.items()}


def _read_record(folder: Path, name: str, entry: object) -> FileRecord:
    if name != Path(name).name:
        raise DamagedCheckpointError(f"{folder / MANIFEST} is damaged: {name!r} is not a file of its folder")
    match entry:
        case {"size": int(size), "sha256": str(sha256)}:
            record = FileRecord(size, sha256)
        case _:
            raise DamagedCheckpointError(f"{folder / MANIFEST} is damaged: {name!r} has no size and sha256")
    path = folder / name
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: the manifest lists it, but it is missing") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != record.size:
        raise DamagedCheckpointError(f"{path} is damaged: it has {status.st_size} bytes, the manifest says {record.size}")
    return record


def read_checked(path: Path, record: FileRecord, buffer: memoryview | None = None) -> None:
    """Reads a whole file, into `buffer` (record.size bytes) if there is one, and checks its SHA-256.

    Raises DamagedCheckpointError; what is in `buffer` is then not to be used.
    """
    digest = hashlib.sha256()
    scratch = memoryview(bytearray(_CHUNK_BYTES if buffer is None else 0))
    size = 0
    with _reading(path), path.open("rb", buffering=0) as file:
        while True:
            window = scratch if buffer is None else buffer[size : size + _CHUNK_BYTES]
            count = file.readinto(window)
            if not count:
                break
            digest.update(window[:count])
            size += count
    if size != record.size or digest.hexdigest() != record.sha256:
        raise DamagedCheckpointError(
            f"{path} is damaged: its SHA-256 is {digest.hexdigest()}, the manifest says {record.sha256}"
        )


def verify_folder(folder: Path) -> None:
    """Compares every file of a folder with its manifest; raises as `read_manifest` and `read_checked`."""
    for name, record in read_manifest(folder).items():
        read_checked(folder / name, record)


# --- checkpoints of a run -----------------------------------------------------------------------------------


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, newest (highest step) first; leftovers are not among them."""
    found = [path for path in _entries(run_folder / CHECKPOINTS) if _STEP_NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=_order, reverse=True)


def newest_complete(run_folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None. Its files are verified when they are read."""
    return next(iter(complete_checkpoints(run_folder)), None)


def _order(checkpoint: Path) -> tuple[int, int]:
    """(step, repetition): a second save of a step is step-00000042-1, so that it displaces nothing."""
    match = _STEP_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not named like a checkpoint (step-00000042)")
    return int(match[1]), int(match[2] or 0)


class Crew(Protocol):
    """Processes that write one folder together; `tutelage.distributed.Ranks` is one."""

    rank: int
    count: int

    def exchange(self, value: Any) -> list[Any]:
        """What every process gave, a JSON value, in their order; the first one leads."""


def save_folder(
    run_folder: Path,
    step: int,
    files: Mapping[str, Iterable[Buffer]],
    keep: int = 2,
    disk: Disk = DISK,
    crew: Crew | None = None,
) -> Path:
    """Saves the files of a checkpoint at `step` (≥ 0) and returns its folder; the `keep` newest stay.

    Checkpoints of later steps are removed too: they belong to a course of the run that was left by resuming
    from an earlier one, and `newest_complete` must not go back to it. Raises FileError that names the
    newest complete checkpoint; none is touched before the new one is durable.

    crew: the processes that each write files of their own into the folder; the first one writes the one manifest
    when all files are durable. Where one of them fails all give up, naming it, and nothing of the save stays.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"a checkpoint needs step >= 0 and keep >= 1, not step={step}, keep={keep}")
    try:
        if crew is None or crew.count == 1:
            target = _new_target(run_folder / CHECKPOINTS, step, disk)
            write_folder(target, files, disk)
            _prune(run_folder, target, keep, disk)
        else:
            target = _save_together(run_folder, step, files, keep, disk, crew)
    except FileError as problem:
        newest = newest_complete(run_folder)
        still = f"the newest complete checkpoint is {newest}" if newest else "no checkpoint is complete yet"
        raise FileError(f"saving step {step} failed: {problem}; {still}", problem.errno) from problem
    return target


def _new_target(folder: Path, step: int, disk: Disk) -> Path:
    make_folder(folder, disk)
    _remove_leftovers(folder, disk)
    target = folder / f"step-{step:08d}"
    repetition = 0
    while os.path.lexists(target):
        repetition += 1
        target = folder / f"step-{step:08d}-{repetition}"
    return target


def _save_together(
    run_folder: Path, step: int, files: Mapping[str, Iterable[Buffer]], keep: int, disk: Disk, crew: Crew
) -> Path:
    """The order of `write_folder`, each part of it begun when all processes have done the one before."""
    leads = crew.rank == 0
    targets: list[Path] = []

    def temporary() -> Path:
        return targets[0].with_name(TEMPORARY + targets[0].name)

    def begin() -> str:
        targets.append(_new_target(run_folder / CHECKPOINTS, step, disk))
        disk.mkdir(temporary())
        return targets[0].name

    def write() -> dict[str, Any]:
        records = {name: write_file(temporary() / name, chunks, disk) for name, chunks in files.items()}
        return {name: {"size": record.size, "sha256": record.sha256} for name, record in records.items()}

    def end() -> None:
        listing = {name: record for written in records for name, record in written.items()}
        manifest = json.dumps({"format_version": FORMAT_VERSION, "files": listing}, indent=1)
        write_file(temporary() / MANIFEST, [manifest.encode()], disk)
        disk.fsync(temporary())
        disk.rename(temporary(), targets[0])
        disk.fsync(targets[0].parent)
        _prune(run_folder, targets[0], keep, disk)

    try:
        name = _all_do(crew, begin if leads else None)[0]
        targets[:] = [run_folder / CHECKPOINTS / name]
        records = _all_do(crew, write)
        _all_do(crew, end if leads else None)
    except FileError:
        if leads and targets:
            _remove_if_possible(temporary(), disk)
        raise
    return targets[0]


def _all_do(crew: Crew, work: Callable[[], Any] | None) -> list[Any]:
    """What the work of each process came to (None: it has none to do). Raises FileError in all where it fails in one."""
    problem: FileError | None = None
    try:
        own = {"done": work() if work else None}
    except FileError as error:
        own, problem = {"failed": str(error), "errno": error.errno}, error
    told = crew.exchange(own)
    for rank, other in enumerate(told):
        if "failed" in other:
            raise FileError(f"rank {rank}: {other['failed']}", other["errno"]) from problem
    return [other["done"] for other in told]


def _remove_leftovers(folder: Path, disk: Disk) -> None:
    for entry in _entries(folder):
        if entry.name.startswith(TEMPORARY):
            remove(entry, disk)


def _prune(run_folder: Path, saved: Path, keep: int, disk: Disk) -> None:
    """Removes all but `saved` and the `keep - 1` complete ones before it, incomplete folders too."""
    step = _order(saved)[0]
    earlier = [path for path in complete_checkpoints(run_folder) if _order(path)[0] < step]
    kept = {saved, *earlier[: keep - 1]}
    folder = run_folder / CHECKPOINTS
    stale = [path for path in _entries(folder) if _STEP_NAME.fullmatch(path.name) and path not in kept]
    discard(stale, disk)


def discard(paths: list[Path], disk: Disk) -> None:
    """Removes entries of one folder: all lose their names, durably, before the first loses a file.

    So a half removed checkpoint never looks like a complete one.
    """
    if not paths:
        return
    renamed = [path.with_name(f"{TEMPORARY}old-{path.name}") for path in paths]
    for path, temporary in zip(paths, renamed, strict=True):
        remove(temporary, disk)
        disk.rename(path, temporary)
    disk.fsync(paths[0].parent)
    for temporary in renamed:
        remove(temporary, disk)


# --- the run folder -----------------------------------------------------------------------------------------


@contextmanager
def lock_folder(folder: Path, disk: Disk = DISK) -> Iterator[None]:
    """Holds the lock of a folder, which must exist; raises RunFolderError naming the owner's pid and host."""
    with _lock(folder, folder / LOCK, folder / LOCK_GUARD, disk):
        yield


@contextmanager
def lock_file(path: Path, disk: Disk = DISK) -> Iterator[None]:
    """Holds the lock of a file, which need not exist; raises RunFolderError naming the owner's pid and host.

    The lock lies beside the file, in hidden ones, so that neither replacing the file nor another lock on it matters.
    """
    with _lock(path, path.with_name(f".{path.name}{LOCK}"), path.with_name(f".{path.name}{LOCK_GUARD}"), disk):
        yield


@contextmanager
def _lock(what: Path, lock: Path, guard_file: Path, disk: Disk) -> Iterator[None]:
    """The guard, a second lock held for microseconds, makes taking the lock and writing the owner's record one
    step: who finds the lock taken never reads the record of an earlier owner. The kernel frees both when a
    process dies, and with it every child that was forked while the lock was held.
    """
    guard = disk.lock(guard_file, wait=True)
    try:
        held = disk.lock(lock, wait=False)
        if held is None:
            raise RunFolderError(f"{what} is in use by {_owner(lock)}: wait for it to end, or stop it")
        try:
            owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            disk.write(lock, held, owner.encode().ljust(_LOCK_BYTES), 0)
        except BaseException:
            os.close(held)
            raise
    finally:
        if guard is not None:
            os.close(guard)
    try:
        yield
    finally:
        os.close(held)


def _owner(path: Path) -> str:
    with _reading(path):
        content = path.read_bytes()
    try:
        record = json.loads(content)
        return f"process {record['pid']} on {record['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


@contextmanager
def claim_run_folder(
    folder: Path, resume: str | None = None, overwrite: bool = False, disk: Disk = DISK
) -> Iterator[Path | None]:
    """Locks a run folder, made if missing, for a `with`; yields the checkpoint to start from, or None.

    resume: None, "auto" (the newest complete checkpoint; None if there is none yet) or the path of a
    checkpoint: one of this run, or one of any other if this folder is empty. overwrite: remove an earlier run
    first. Raises RunFolderError where something would be lost or mixed up; a folder that was never a run's
    is left untouched.
    """
    if resume is not None and overwrite:
        raise RunFolderError("--resume and --overwrite contradict each other: pass one of them")
    make_folder(folder, disk)
    if _contents(folder) and not (folder / LOCK).exists():
        raise RunFolderError(
            f"{folder} is not empty and not the folder of a run, so nothing in it was touched: pass another --output_dir"
        )
    with lock_folder(folder, disk):
        _remove_leftovers(folder, disk)
        yield _starting_point(folder, resume, overwrite, disk)


def _contents(folder: Path) -> list[Path]:
    """What a run has left in its folder, locks apart."""
    return [path for path in _entries(folder) if path.name not in (LOCK, LOCK_GUARD)]


def _starting_point(folder: Path, resume: str | None, overwrite: bool, disk: Disk) -> Path | None:
    newest = newest_complete(folder)
    if resume == "auto":
        return newest
    if resume is not None:
        return _given_checkpoint(folder, Path(resume))
    contents = _contents(folder)
    if contents and not overwrite:
        found = f"its newest checkpoint, {newest.name}" if newest else "the start, as it has no complete checkpoint"
        raise RunFolderError(
            f"{folder} holds an earlier run: pass --resume auto to continue from {found}, "
            "--overwrite to remove it, or another --output_dir"
        )
    discard(contents, disk)
    return None


def _given_checkpoint(folder: Path, checkpoint: Path) -> Path:
    if not (checkpoint / MANIFEST).is_file():
        newest = newest_complete(folder)
        other = f"pass --resume {shlex.quote(str(newest))}" if newest else "this run has none yet"
        raise RunFolderError(f"--resume {checkpoint} is not a complete checkpoint (it has no {MANIFEST}): {other}")
    if _contents(folder) and checkpoint.resolve().parent != (folder / CHECKPOINTS).resolve():
        raise RunFolderError(
            f"{folder} holds another run than --resume {checkpoint}: pass an empty --output_dir to continue that one"
        )
    return checkpoint
