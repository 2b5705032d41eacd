"""Every write: order, power loss, failing operations, leftovers, the lock (RELIABILITY rows 2–5, 16, 17)."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tutelage import files
from tutelage.files import (
    CheckpointError,
    DamagedCheckpointError,
    Disk,
    FileError,
    Operation,
    RunFolderError,
    claim_run_folder,
    lock_folder,
    newest_complete,
    save_folder,
    verify_folder,
)

SECTOR = 512


def recording_disk(log: list[Operation], kind: Callable[..., Disk] = Disk) -> Disk:
    """A disk that appends each of its operations to `log`."""
    return kind(lambda operation: log.append(replace(operation, data=bytes(operation.data))))


def parts(step: int) -> dict[str, list[bytes]]:
    """The files of the checkpoint at `step`: several chunks, several sectors, other bytes at every step."""
    content = random.Random(step)
    return {"a.bin": [content.randbytes(700), content.randbytes(900)], "b.json": [content.randbytes(300)]}


def save(run: Path, step: int, keep: int = 2, disk: Disk = files.DISK) -> Path:
    return save_folder(run, step, parts(step), keep, disk)


def assert_holds(checkpoint: Path | None, step: int) -> None:
    """`checkpoint` is the one of `step`, byte for byte."""
    assert checkpoint is not None
    assert files._order(checkpoint)[0] == step
    verify_folder(checkpoint)
    for name, chunks in parts(step).items():
        assert (checkpoint / name).read_bytes() == b"".join(chunks)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- row 3: the order of a save -----------------------------------------------------------------------------


def described(log: list[Operation], root: Path) -> list[str]:
    """The log as lines such as "fsync checkpoints/step-00000001"."""

    def short(path: Path) -> str:
        return str(path.relative_to(root))

    return [f"{step.name} {short(step.path)}" + (f" -> {short(step.target)}" if step.target else "") for step in log]


def test_a_save_follows_the_protocol(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    log: list[Operation] = []
    save(tmp_path, 2, keep=1, disk=recording_disk(log))
    new, old = "checkpoints/.tmp-step-00000002", "checkpoints/.tmp-old-step-00000001"
    assert described(log, tmp_path) == [
        f"mkdir {new}",
        f"create {new}/a.bin",
        f"write {new}/a.bin",
        f"write {new}/a.bin",
        f"fsync {new}/a.bin",
        f"create {new}/b.json",
        f"write {new}/b.json",
        f"fsync {new}/b.json",
        f"create {new}/manifest.json",
        f"write {new}/manifest.json",
        f"fsync {new}/manifest.json",
        f"fsync {new}",
        f"rename {new} -> checkpoints/step-00000002",
        "fsync checkpoints",
        f"rename checkpoints/step-00000001 -> {old}",
        "fsync checkpoints",
        f"unlink {old}/a.bin",
        f"unlink {old}/b.json",
        f"unlink {old}/manifest.json",
        f"rmdir {old}",
    ]


def test_the_log_is_what_the_kernel_saw(tmp_path: Path) -> None:
    """No write goes around the Disk: Python's own audit events name no path that the log does not."""
    script = f"""
import os, sys
from pathlib import Path
from tutelage import files
logged, seen = set(), set()
def hook(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        seen.add(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        seen.add(str(arguments[0]))
sys.addaudithook(hook)
run, disk = Path({str(tmp_path)!r}) / "run", files.Disk(lambda operation: logged.add(str(operation.path)))
with files.claim_run_folder(run, disk=disk):
    files.append_json_line(run / "metrics.jsonl", {{"loss": 1.0}}, disk)
    files.rewind_json_lines(run / "metrics.jsonl", lambda record: False, disk)
    for step in range(4):
        files.save_folder(run, step, {{"a": [b"x"]}}, 1, disk)
assert len(seen) > 10 and seen <= logged, seen - logged
open(run / "outside", "w").close()
assert not seen <= logged
"""
    run_python(script)


def run_python(script: str, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    command = [*prefix, sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


# --- row 2: power loss --------------------------------------------------------------------------------------
#
# A model of a disk that promises only what POSIX does: an operation is durable once an fsync of the file
# (its bytes) or of the folder (its entries) has followed it; any other may be lost while others stay.


@dataclass
class Effect:
    """Bytes of one file, `node`, or entries of folders: (folder, name, inode; None: the name is removed)."""

    node: int
    offset: int = 0
    data: bytes = b""
    entries: list[tuple[int, str, int | None]] = field(default_factory=list)
    durable: bool = False


def effects_of(log: list[Operation], root: Path) -> list[Effect]:
    """The effects of a log, each marked durable if an fsync of it follows; inode 0 is the folder `root`."""
    tree: dict[int, dict[str, int]] = {0: {}}
    effects: list[Effect] = []

    def find(path: Path) -> int:
        node = 0
        for name in path.relative_to(root).parts:
            node = tree[node][name]
        return node

    def link(path: Path, node: int | None) -> tuple[int, str, int | None]:
        parent = find(path.parent)
        if node is None:
            del tree[parent][path.name]
        else:
            tree[parent][path.name] = node
        return parent, path.name, node

    for step in log:
        if step.name in ("mkdir", "create"):
            node = len(tree)
            tree[node] = {}
            effects.append(Effect(node, entries=[link(step.path, node)]))
            if step.name == "create":
                effects.append(Effect(node))
        elif step.name == "write":
            effects.append(Effect(find(step.path), step.offset, bytes(step.data)))
        elif step.name == "rename":
            assert step.target is not None
            node = find(step.path)
            effects.append(Effect(node, entries=[link(step.path, None), link(step.target, node)]))
        elif step.name in ("unlink", "rmdir"):
            effects.append(Effect(find(step.path), entries=[link(step.path, None)]))
        elif step.name == "fsync":
            node = find(step.path)
            for effect in effects:
                parents = {parent for parent, _, _ in effect.entries}
                effect.durable |= node in parents or (effect.node == node and not effect.entries)
        else:
            raise AssertionError(f"the model knows no {step.name}")
    return effects


def after_power_loss(effects: list[Effect], mode: str, chance: random.Random, into: Path) -> None:
    """Makes in the new folder `into` what a power loss after `effects` may leave of a folder that was empty.

    mode: "kept" (a mere kill -9), "lost" (nothing that was not fsynced), "torn" (any sectors of unsynced
    data, zeros or an early end for the others), "reordered" (any of the unsynced operations, and torn data).
    """
    folders: dict[int, dict[str, int]] = {0: {}}
    contents: dict[int, bytearray] = {}
    for effect in effects:
        kept = effect.durable or mode == "kept" or (mode == "torn" and bool(effect.entries))
        if effect.entries:
            if kept or (mode == "reordered" and chance.random() < 0.5):
                for parent, name, node in effect.entries:
                    if node is None:
                        folders.setdefault(parent, {}).pop(name, None)
                    else:
                        folders.setdefault(parent, {})[name] = node
            continue
        file = contents.setdefault(effect.node, bytearray())
        if mode != "lost" and chance.random() < 0.5:  # the size can be on the disk before the bytes are
            file.extend(bytes(max(0, effect.offset + len(effect.data) - len(file))))
        for start in range(0, len(effect.data), SECTOR):
            piece = effect.data[start : start + SECTOR]
            if kept or (mode != "lost" and chance.random() < 0.5):
                begin = effect.offset + start
                file.extend(bytes(max(0, begin + len(piece) - len(file))))
                file[begin : begin + len(piece)] = piece

    def write_out(node: int, path: Path) -> None:
        if node in contents:
            path.write_bytes(contents[node])
            return
        path.mkdir()
        for name, child in folders.get(node, {}).items():
            write_out(child, path / name)

    write_out(0, into)


def crashes(log: list[Operation], root: Path, scratch: Path, seeds: int) -> Iterator[tuple[int, str, Path]]:
    """Every prefix of a log, lost in every way: (operations done, description, the folder left)."""
    modes = [("kept", 1), ("lost", 1), ("torn", seeds), ("reordered", seeds)]
    for done in range(len(log) + 1):
        effects = effects_of(log[:done], root)
        for mode, repetitions in modes:
            for seed in range(repetitions):
                left = scratch / "left"
                shutil.rmtree(left, ignore_errors=True)
                after_power_loss(effects, mode, random.Random(f"{done} {seed}"), left)
                yield done, f"{mode}, seed {seed}, after operation {done}", left


def violations_of_saves(tmp_path: Path, kind: Callable[..., Disk], seeds: int) -> Iterator[str]:
    """Saves three checkpoints, keeping one; names the crashes that leave a checkpoint lost or wrong."""
    run = tmp_path / "run"
    run.mkdir()
    log: list[Operation] = []
    returned = []
    for step in (1, 2, 3):
        save(run, step, keep=1, disk=recording_disk(log, kind))
        returned.append(len(log))
    for done, crash, left in crashes(log, run, tmp_path, seeds):
        saved = sum(count <= done for count in returned)
        found = files.complete_checkpoints(left)
        try:
            for checkpoint in found:
                assert_holds(checkpoint, files._order(checkpoint)[0])
            assert (files._order(found[0])[0] if found else 0) >= saved
        except (AssertionError, CheckpointError) as error:
            yield f"{crash}: {error}"


def test_power_loss_never_costs_a_saved_checkpoint(tmp_path: Path) -> None:
    assert list(violations_of_saves(tmp_path, Disk, seeds=6)) == []


@pytest.mark.slow
def test_power_loss_never_costs_a_saved_checkpoint_many_seeds(tmp_path: Path) -> None:
    assert list(violations_of_saves(tmp_path, Disk, seeds=30)) == []


def without_fsync(skipped: Callable[[Path], bool]) -> Callable[..., Disk]:
    class Careless(Disk):
        def fsync(self, path: Path, descriptor: int | None = None) -> None:
            if not skipped(path):
                super().fsync(path, descriptor)

    return Careless


@pytest.mark.parametrize(
    "skipped",
    [
        pytest.param(lambda path: path.suffix == ".bin", id="a file"),
        pytest.param(lambda path: path.name == files.MANIFEST, id="the manifest"),
        pytest.param(lambda path: path.name.startswith(files.TEMPORARY), id="the new folder"),
        pytest.param(lambda path: path.name == files.CHECKPOINTS, id="the folder of checkpoints"),
        pytest.param(lambda path: path.name == "run", id="the run folder"),
    ],
)
def test_control_power_loss_finds_each_fsync_left_out(tmp_path: Path, skipped: Callable[[Path], bool]) -> None:
    assert any(violations_of_saves(tmp_path, without_fsync(skipped), seeds=6))


def test_control_power_loss_finds_a_removal_before_its_rename_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def discard(paths: list[Path], disk: Disk) -> None:
        for path in paths:
            files.remove(path, disk)

    monkeypatch.setattr(files, "discard", discard)
    assert any(violations_of_saves(tmp_path, Disk, seeds=6))


def violations_of_replacing(tmp_path: Path, kind: Callable[..., Disk]) -> Iterator[str]:
    """Writes one file twice and names the crashes after which it is neither the old content nor the new."""
    folder = tmp_path / "folder"
    folder.mkdir()
    old, new = random.Random(1).randbytes(3000), random.Random(2).randbytes(2000)
    log: list[Operation] = []
    files.write_file_atomic(folder / "file", old, recording_disk(log, kind))
    first = len(log)
    files.write_file_atomic(folder / "file", new, recording_disk(log, kind))
    for done, crash, left in crashes(log, folder, tmp_path, seeds=6):
        content = (left / "file").read_bytes() if (left / "file").exists() else None
        allowed: set[bytes | None] = {None, old} if done < first else {old, new}
        if content not in (allowed if done < len(log) else {new}):
            yield crash


def test_power_loss_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    assert list(violations_of_replacing(tmp_path, Disk)) == []


@pytest.mark.parametrize("skipped", ["file", "folder"])
def test_control_power_loss_finds_a_file_replaced_without_fsync(tmp_path: Path, skipped: str) -> None:
    assert any(violations_of_replacing(tmp_path, without_fsync(lambda path: path.name.endswith(skipped))))


# --- row 4: leftovers ---------------------------------------------------------------------------------------


def plant_empty(folder: Path) -> None:
    (folder / ".tmp-step-00000003").mkdir()


def plant_half_a_file(folder: Path) -> None:
    plant_empty(folder)
    (folder / ".tmp-step-00000003/a.bin").write_bytes(b"half")


def plant_no_manifest(folder: Path) -> None:
    shutil.copytree(folder / "step-00000002", folder / ".tmp-step-00000003")
    (folder / ".tmp-step-00000003/manifest.json").unlink()


def plant_torn_manifest(folder: Path) -> None:
    plant_not_renamed(folder)
    (folder / ".tmp-step-00000003/manifest.json").write_bytes(b'{"format_version": 1, "fil')


def plant_not_renamed(folder: Path) -> None:
    shutil.copytree(folder / "step-00000002", folder / ".tmp-step-00000003")


def plant_later_not_renamed(folder: Path) -> None:
    shutil.copytree(folder / "step-00000002", folder / ".tmp-step-00000009")


def plant_half_removed(folder: Path) -> None:
    shutil.copytree(folder / "step-00000001", folder / ".tmp-old-step-00000001")
    (folder / ".tmp-old-step-00000001/a.bin").unlink()


def plant_temporary_file(folder: Path) -> None:
    (folder / ".tmp-step-00000003").write_bytes(b"a file where a folder will be made")


def plant_dangling_link(folder: Path) -> None:
    (folder / ".tmp-step-00000003").symlink_to("nowhere")


def plant_link_to_a_folder(folder: Path) -> None:
    (folder / ".tmp-step-00000003").symlink_to(folder.parent / "precious")


def plant_incomplete_copy(folder: Path) -> None:
    shutil.copytree(folder / "step-00000002", folder / "step-00000003")
    (folder / "step-00000003/manifest.json").unlink()


def plant_empty_final(folder: Path) -> None:
    (folder / "step-00000004").mkdir()


def plant_file_of_final_name(folder: Path) -> None:
    (folder / "step-00000003").write_bytes(b"")


LEFTOVERS = [value for name, value in list(globals().items()) if name.startswith("plant_")]


@pytest.fixture
def run_of_two(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2, and a folder beside them that must survive."""
    run = tmp_path / "run"
    (run / "precious").mkdir(parents=True)
    (run / "precious/file").write_bytes(b"kept")
    save(run, 1)
    save(run, 2)
    return run


@pytest.mark.parametrize("plant", LEFTOVERS)
def test_leftovers_are_ignored_then_replaced(run_of_two: Path, plant: Callable[[Path], None]) -> None:
    plant(run_of_two / files.CHECKPOINTS)
    assert_holds(newest_complete(run_of_two), 2)
    assert len(files.complete_checkpoints(run_of_two)) == 2
    assert_holds(save(run_of_two, 3), 3)
    assert_holds(newest_complete(run_of_two), 3)
    assert [files._order(path)[0] for path in files.complete_checkpoints(run_of_two)] == [3, 2]
    assert len(names(run_of_two / files.CHECKPOINTS)) == 2
    assert (run_of_two / "precious/file").read_bytes() == b"kept"


def test_there_are_at_least_twelve_kinds_of_leftovers() -> None:
    assert len(LEFTOVERS) >= 12


def test_control_leftovers_without_the_clean_up_stay(run_of_two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_remove_leftovers", lambda folder, disk: None)
    plant_later_not_renamed(run_of_two / files.CHECKPOINTS)
    save(run_of_two, 3)
    assert len(names(run_of_two / files.CHECKPOINTS)) == 3


def test_control_leftovers_would_be_resumed_if_names_were_not_checked(
    run_of_two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_STEP_NAME", re.compile(r"(?:\.tmp-)?step-([0-9]{8,})(?:-([0-9]+))?"))
    plant_later_not_renamed(run_of_two / files.CHECKPOINTS)
    assert newest_complete(run_of_two) == run_of_two / "checkpoints/.tmp-step-00000009"


def test_a_file_write_replaces_its_leftover(tmp_path: Path) -> None:
    (tmp_path / ".tmp-config.json").write_bytes(b"half")
    files.write_file_atomic(tmp_path / "config.json", b"{}")
    assert names(tmp_path) == ["config.json"]


# --- row 5: operations that fail ----------------------------------------------------------------------------


def failing_disk(numbers: range, code: int) -> tuple[Disk, list[int]]:
    """A disk whose operation number k fails with `code` for the k in `numbers`, and those that failed."""
    failed: list[int] = []
    count = 0

    def before(operation: Operation) -> None:
        nonlocal count
        count += 1
        if count in numbers:
            failed.append(count)
            raise OSError(code, os.strerror(code))

    return Disk(before), failed


def check_every_failure(tmp_path: Path, code: int, lasting: bool, saving: Callable[..., Path]) -> int:
    """Fails operation k of a save, for every k: a good checkpoint stays, the next save works; the last k."""
    for k in range(1, 1000):
        run = tmp_path / str(k)
        save(run, 1, keep=1)
        disk, failed = failing_disk(range(k, 1000 if lasting else k + 1), code)
        try:
            saving(run, 2, 1, disk)
        except FileError as problem:
            assert problem.errno == code
            message = str(problem)
            assert message.startswith("saving step 2 failed: cannot ") and "\n" not in message
            assert os.strerror(code) in message and str(run) in message
            newest = newest_complete(run)
            assert newest is not None and message.endswith(f"the newest complete checkpoint is {newest}")
        else:
            if not failed:
                return k - 1
        newest = newest_complete(run)
        assert newest is not None
        assert_holds(newest, files._order(newest)[0])
        assert_holds(save(run, 2, keep=1), 2)
        assert len(names(run / files.CHECKPOINTS)) == 1
        shutil.rmtree(run)
    raise AssertionError("a save of more than 1000 operations")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_any_failing_operation_leaves_a_good_checkpoint(tmp_path: Path, code: int, lasting: bool) -> None:
    assert check_every_failure(tmp_path, code, lasting, save) == 20


def test_control_a_save_that_removes_first_loses_the_checkpoint(tmp_path: Path) -> None:
    def careless(run: Path, step: int, keep: int, disk: Disk) -> Path:
        files.remove(run / files.CHECKPOINTS)
        return save(run, step, keep, disk)

    with pytest.raises(AssertionError):
        check_every_failure(tmp_path, errno.ENOSPC, False, careless)


def test_any_failing_operation_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for k in range(1, 100):
        files.write_file_atomic(path, b"old")
        disk, failed = failing_disk(range(k, k + 1), errno.ENOSPC)
        try:
            files.write_file_atomic(path, [b"n", b"ew"], disk)
        except FileError:
            assert path.read_bytes() in (b"old", b"new")
            assert names(tmp_path) == ["file"]
        if not failed:
            assert k == 7
            return
    raise AssertionError("a write of more than 100 operations")


def test_a_full_disk_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    """The kernel's own ENOSPC."""
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(FileError) as caught:
        files.append_json_line(path, {"step": 1})
    assert str(caught.value) == f"cannot append {path}: No space left on device (free some space on this file system)"


LIMITED = """
import resource, sys
from pathlib import Path
from tutelage import files
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    files.save_folder(Path(sys.argv[1]), 3, {"a.bin": [bytes(49_000), bytes(49_000)]})
except files.FileError as problem:
    print(problem)
"""


def test_a_write_that_the_kernel_cuts_short_is_reported(run_of_two: Path) -> None:
    """The second chunk is written in part, then refused: a short write must not pass for a whole one."""
    printed = run_python(LIMITED, str(run_of_two))
    assert re.search(r"saving step 3 failed: cannot write \S+/a\.bin: File too large \(.*ulimit -f", printed)
    assert_holds(newest_complete(run_of_two), 2)
    assert names(run_of_two / files.CHECKPOINTS) == ["step-00000001", "step-00000002"]


def test_control_the_kernel_does_cut_writes_short(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            assert file.write(bytes(98_000)) == 50_000
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from tutelage import files
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
run = folder / "run"
files.save_folder(run, 1, {"a": [bytes(200_000)]})
def attempt(step):
    try:
        files.save_folder(run, step, {"a": [bytes(400_000)] * 5})
    except files.FileError as problem:
        print(problem)
attempt(2)
files.verify_folder(files.newest_complete(run))
files.save_folder(run, 3, {"a": [bytes(400_000)]}, keep=1)
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
attempt(4)
files.verify_folder(files.newest_complete(run))
"""


@pytest.mark.slow
def test_a_real_small_disk_and_a_real_read_only_one(tmp_path: Path) -> None:
    """In mount and user namespaces of its own, which the kernel removes with the child."""
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    printed = run_python(SMALL_DISK, str(tmp_path), prefix=("unshare", "--mount", *user, "--"))
    full, read_only = printed.splitlines()
    assert "No space left on device (free some space" in full and full.endswith("step-00000001")
    assert "Read-only file system" in read_only and read_only.endswith("step-00000003")


# --- saves: which checkpoints stay --------------------------------------------------------------------------


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step, keep=3)
    assert [path.name for path in files.complete_checkpoints(tmp_path)] == [
        "step-00000004",
        "step-00000003",
        "step-00000002",
    ]


def test_saving_after_going_back_removes_the_course_that_was_left(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 15, keep=3)
    assert [files._order(path)[0] for path in files.complete_checkpoints(tmp_path)] == [15, 10]


def test_saving_a_step_again_replaces_it_without_a_gap(tmp_path: Path) -> None:
    save(tmp_path, 7)
    log: list[Operation] = []
    again = save_folder(tmp_path, 7, {"other": [b"x"]}, disk=recording_disk(log))
    assert again.name == "step-00000007-1" and newest_complete(tmp_path) == again
    assert names(tmp_path / files.CHECKPOINTS) == ["step-00000007-1"]
    lines = described(log, tmp_path)
    assert lines.index("fsync checkpoints") < lines.index(
        "rename checkpoints/step-00000007 -> checkpoints/.tmp-old-step-00000007"
    )


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (1, 0)])
def test_impossible_saves_are_refused(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(ValueError, match="step >= 0 and keep >= 1"):
        save(tmp_path, step, keep)


def test_chunks_of_any_shape_make_one_file(tmp_path: Path) -> None:
    words = memoryview(bytes(range(24))).cast("I")
    content: list[files.Buffer] = [b"", memoryview(b""), words, bytearray(b"tail"), bytes(5 << 20)]
    record = files.write_file(tmp_path / "file", content)
    written = (tmp_path / "file").read_bytes()
    assert written == bytes(range(24)) + b"tail" + bytes(5 << 20) and record.size == len(written)
    files.read_checked(tmp_path / "file", record)
    buffer = bytearray(record.size)
    files.read_checked(tmp_path / "file", record, memoryview(buffer))
    assert buffer == written


# --- damage -------------------------------------------------------------------------------------------------


def edit_manifest(checkpoint: Path, edit: Callable[[dict[str, object]], object]) -> None:
    path = checkpoint / files.MANIFEST
    manifest = json.loads(path.read_bytes())
    edit(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "a.bin").unlink(), "a.bin is damaged: the manifest lists it, but it is missing"),
        (lambda c: os.truncate(c / "a.bin", 9), "a.bin is damaged: it has 9 bytes, the manifest says 1600"),
        (lambda c: (c / "a.bin").write_bytes(bytes(1600)), "a.bin is damaged: its SHA-256 is"),
        (lambda c: (c / "manifest.json").write_bytes(b"{"), "manifest.json is damaged: it is not JSON"),
        (
            lambda c: (c / "manifest.json").write_bytes(b"[" * 10**5),
            "manifest.json is damaged: it is not JSON",
        ),
        (
            lambda c: (c / "manifest.json").write_bytes(b"[]"),
            "manifest.json is damaged: it is not a JSON object",
        ),
        (lambda c: edit_manifest(c, lambda m: m.pop("files")), "manifest.json is damaged: it lists no files"),
        (
            lambda c: edit_manifest(c, lambda m: m.pop("format_version")),
            "manifest.json is damaged: its format_version is None, not a number from 1 up",
        ),
        (
            lambda c: edit_manifest(c, lambda m: m.update(files={"../a.bin": {}})),
            "manifest.json is damaged: '../a.bin' is not a file of its folder",
        ),
        (
            lambda c: edit_manifest(c, lambda m: m.update(files={"a.bin": {"size": 1}})),
            "manifest.json is damaged: 'a.bin' has no size and sha256",
        ),
    ],
)
def test_damage_is_refused_and_the_file_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    checkpoint = save(tmp_path, 1)
    verify_folder(checkpoint)
    damage(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=re.escape(f"{checkpoint}/{message}")):
        verify_folder(checkpoint)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a complete checkpoint: it has no manifest\.json"):
        verify_folder(tmp_path)


# --- .jsonl files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "lo', b"\0" * 700, b'"text"\n', b'{"step": 4}'])
def test_a_resumed_metrics_file_continues_from_the_checkpoint(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(4):
        files.append_json_line(path, {"step": step, "loss": 1 / 3})
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(path.read_bytes() + tail)
    files.rewind_json_lines(path, lambda record: True)
    assert path.read_bytes() == b"".join(whole)
    files.rewind_json_lines(path, lambda record: record["step"] <= 2)
    assert path.read_bytes() == b"".join(whole[:3])
    files.append_json_line(path, {"step": 3, "loss": 1 / 3})
    files.sync_file(path)
    assert path.read_bytes() == b"".join(whole)


def test_control_a_torn_line_spoils_the_next_one_if_it_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 4, "lo')
    files.append_json_line(path, {"step": 4})
    with pytest.raises(json.JSONDecodeError):
        json.loads(path.read_bytes())


def test_there_may_be_no_metrics_to_rewind(tmp_path: Path) -> None:
    files.rewind_json_lines(tmp_path / "metrics.jsonl", lambda record: True)
    assert names(tmp_path) == []


# --- row 16: the lock ---------------------------------------------------------------------------------------

STARTER = """
import sys
from pathlib import Path
from tutelage import files
if sys.argv[2] == "without a lock":
    files.fcntl.flock = lambda descriptor, operation: None
print("ready", flush=True)
sys.stdin.readline()
try:
    with files.claim_run_folder(Path(sys.argv[1]), resume="auto"):
        print("won", flush=True)
        sys.stdin.readline()
except files.RunFolderError as problem:
    print(problem, flush=True)
"""


@contextmanager
def starters(run: Path, count: int, mode: str) -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    """Processes that claim a run folder at once, and what each said; a winner holds it until the end."""
    command = [sys.executable, "-c", STARTER, str(run), mode]
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                command, env=child_environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert said(process) == "ready"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield [(process, said(process)) for process in processes]


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_eight_starters_one_wins_and_kill_frees_the_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in range(5):  # each round finds the record of a killed owner
        with starters(run, 8, "locked") as outcomes:
            winners = [process for process, line in outcomes if line == "won"]
            assert len(winners) == 1
            refusal = f"{run} is in use by process {winners[0].pid} on {socket.gethostname()}: wait for it to end, or stop it"
            assert [line for _, line in outcomes if line != "won"] == [refusal] * 7
            winners[0].send_signal(signal.SIGKILL)
            winners[0].wait()
            with lock_folder(run):
                pass


def test_control_without_a_lock_all_win(tmp_path: Path) -> None:
    with starters(tmp_path / "run", 3, "without a lock") as outcomes:
        assert [line for _, line in outcomes] == ["won"] * 3


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            lock_folder(tmp_path),
            pytest.raises(RunFolderError, match=f"process {os.getpid()} on"),
            lock_folder(tmp_path),
        ):
            pass


def test_a_lock_that_cannot_be_recorded_is_not_held(tmp_path: Path) -> None:
    disk, _ = failing_disk(range(3, 4), errno.ENOSPC)
    with pytest.raises(FileError, match="No space left"), lock_folder(tmp_path, disk):
        pass
    with lock_folder(tmp_path):
        pass


# --- row 17: what a run folder may hold ---------------------------------------------------------------------


def no_folder(run: Path) -> None:
    pass


def empty_folder(run: Path) -> None:
    run.mkdir()


def foreign_folder(run: Path) -> None:
    run.mkdir()
    (run / "thesis.tex").write_bytes(b"years of work")


def foreign_temporary(run: Path) -> None:
    run.mkdir()
    (run / ".tmp-thesis.tex").write_bytes(b"years of work")


def killed_at_once(run: Path) -> None:
    with claim_run_folder(run):
        (run / ".tmp-config.json").write_bytes(b"half")


def killed_early(run: Path) -> None:
    with claim_run_folder(run):
        (run / "config.json").write_bytes(b"{}")


def earlier_run(run: Path) -> None:
    with claim_run_folder(run):
        (run / "config.json").write_bytes(b"{}")
        for step in (5, 6):
            save(run, step)
        (run / "checkpoints/.tmp-step-00000009").mkdir()


FOREIGN = "is not empty and not the folder of a run, so nothing in it was touched: pass another --output_dir"
HELD = "holds an earlier run: pass --resume auto to continue from "
CONTRADICTION = "--resume and --overwrite contradict each other"
NO_CHECKPOINT = "is not a complete checkpoint"
ANOTHER = "holds another run than --resume"
FRESH = None


@pytest.mark.parametrize(
    ("before", "resume", "overwrite", "outcome"),
    [
        (no_folder, None, False, FRESH),
        (no_folder, None, True, FRESH),
        (no_folder, "auto", False, FRESH),
        (no_folder, "elsewhere", False, "elsewhere"),
        (no_folder, "step-00000006", False, NO_CHECKPOINT),
        (empty_folder, None, False, FRESH),
        (empty_folder, "auto", False, FRESH),
        (empty_folder, "elsewhere", False, "elsewhere"),
        (foreign_folder, None, False, FOREIGN),
        (foreign_folder, None, True, FOREIGN),
        (foreign_folder, "auto", False, FOREIGN),
        (foreign_folder, "elsewhere", False, FOREIGN),
        (foreign_temporary, None, False, FOREIGN),
        (killed_at_once, None, False, FRESH),
        (killed_at_once, "auto", False, FRESH),
        (killed_early, None, False, HELD + "the start, as it has no complete checkpoint"),
        (killed_early, None, True, FRESH),
        (killed_early, "auto", False, FRESH),
        (killed_early, "elsewhere", False, ANOTHER),
        (earlier_run, None, False, HELD + "its newest checkpoint, step-00000006"),
        (earlier_run, None, True, FRESH),
        (earlier_run, "auto", False, "step-00000006"),
        (earlier_run, "step-00000005", False, "step-00000005"),
        (earlier_run, "step-00000009", False, NO_CHECKPOINT),
        (earlier_run, "elsewhere", False, ANOTHER),
        (earlier_run, "auto", True, CONTRADICTION),
        (earlier_run, "step-00000005", True, CONTRADICTION),
    ],
)
def test_what_a_run_folder_may_hold(
    tmp_path: Path, before: Callable[[Path], None], resume: str | None, overwrite: bool, outcome: str | None
) -> None:
    run = tmp_path / "run"
    elsewhere = save(tmp_path / "other", 3)
    before(run)
    held = sorted(run.rglob("*")) if run.exists() else []
    folders = {"elsewhere": elsewhere, "step-00000005": run / "checkpoints/step-00000005"}
    folders |= {name: run / "checkpoints" / name for name in ("step-00000006", "step-00000009")}
    given = str(folders[resume]) if resume in folders else resume
    if outcome is None or outcome in folders:
        with claim_run_folder(run, given, overwrite) as checkpoint:
            assert checkpoint == (None if outcome is None else folders[outcome])
            if overwrite:
                assert names(run) == [".lock", ".lock-guard"]
            with pytest.raises(RunFolderError, match="is in use by"), claim_run_folder(run, "auto"):
                pass
    else:
        with (
            pytest.raises(RunFolderError, match=re.escape(outcome)) as caught,
            claim_run_folder(run, given, overwrite),
        ):
            pass
        assert "\n" not in str(caught.value)
        assert not held or sorted(run.rglob("*")) == held
    with lock_folder(tmp_path / "other"):
        assert_holds(elsewhere, 3)


def test_an_overwrite_cut_short_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    for k in range(1, 100):
        run = tmp_path / str(k)
        earlier_run(run)
        disk, failed = failing_disk(range(k, k + 1), errno.EIO)
        try:
            with claim_run_folder(run, overwrite=True, disk=disk):
                pass
        except FileError:
            for checkpoint in files.complete_checkpoints(run):
                verify_folder(checkpoint)
        with claim_run_folder(run, overwrite=True):
            assert names(run) == [".lock", ".lock-guard"]
        if not failed:
            assert k > 15
            return
    raise AssertionError("an overwrite of more than 100 operations")
