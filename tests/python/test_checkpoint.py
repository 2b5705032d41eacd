"""Checkpoints: the same bits back, damage always found, versions, no pickle (RELIABILITY rows 2–6, 8, 25)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage import checkpoint, files
from tutelage.checkpoint import load_checkpoint, load_newest, save_checkpoint
from tutelage.files import CheckpointError, DamagedCheckpointError, Operation
from tutelage.safetensors_io import DTYPES, PIECE_BYTES, safetensors_chunks

GOLDEN = Path(__file__).parent / "golden"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of any bit patterns, NaNs with payloads and denormals included."""
    content = bytearray(random.Random(seed).randbytes(math.prod(shape) * dtype.itemsize))
    if not content:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        content = bytearray(byte & 1 for byte in content)
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


def training_state(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "params": random_bits(seed, torch.float32, 40),
        "adam.m": random_bits(seed + 1, torch.float32, 40),
        "half": random_bits(seed + 2, torch.bfloat16, 3, 3),
    }
    return tensors, {"seed": seed, "loss": 0.1 + seed, "cursor": {"epoch": 0, "document": 17}, "note": "é"}


def assert_same(loaded: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor), name


# --- the same bits back -------------------------------------------------------------------------------------


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    tensors = {
        f"{dtype} {shape}": random_bits(7, dtype, *shape)
        for dtype in DTYPES.values()
        for shape in [(), (1,), (5,), (3, 1, 7), (0,), (2, 0, 3)]
    }
    matrix = random_bits(8, torch.float32, 6, 10)
    tensors |= {"transposed": matrix.T, "strided": matrix[::2, 1::3], "expanded": matrix[:1].expand(4, 10)}
    tensors["graph"] = torch.ones(3, requires_grad=True) * 2
    folder = save_checkpoint(tmp_path, 3, tensors, {})
    loaded = load_checkpoint(folder)
    expected = {name: tensor.detach() for name, tensor in tensors.items()}
    assert loaded.folder == folder and loaded.step == 3 and loaded.state == {}
    assert_same(loaded.tensors, expected)
    assert_same(safetensors.torch.load_file(folder / checkpoint.TENSORS), expected)  # the format's own library
    loaded.tensors["transposed"].zero_()  # writable, and nobody else's memory
    assert bits(loaded.tensors["strided"]) == bits(expected["strided"])


def test_every_number_of_the_state_comes_back(tmp_path: Path) -> None:
    draw = random.Random(5)
    patterns = [struct.unpack("<d", draw.randbytes(8))[0] for _ in range(5000)]
    numbers = [number for number in patterns if not math.isnan(number)]
    numbers += [0.0, -0.0, 5e-324, 0.1, 1 / 3, 1.7976931348623157e308, math.inf, -math.inf]
    state = {
        "numbers": numbers,
        "nan": math.nan,
        "seed": 2**64 - 1,
        "texts": ["", "é\ud800\n\0"],
        "none": None,
    }
    save_checkpoint(tmp_path, 1, {}, state)
    newest = load_newest(tmp_path)
    assert newest is not None
    back = newest.state
    assert struct.pack(f"<{len(numbers)}d", *back["numbers"]) == struct.pack(f"<{len(numbers)}d", *numbers)
    assert math.isnan(back["nan"])
    assert {name: back[name] for name in ("seed", "texts", "none")} == {name: state[name] for name in ("seed", "texts", "none")}


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    tensors, state = training_state()
    first = save_checkpoint(tmp_path / "first", 1, tensors, state)
    turned = dict(reversed(tensors.items())), dict(reversed(state.items()))
    second = save_checkpoint(tmp_path / "second", 1, *turned)
    for name in (checkpoint.TENSORS, checkpoint.STATE, files.MANIFEST):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_save_copies_no_tensor() -> None:
    """The chunks are the tensors' own memory: a state of 1.5 GB needs no second 1.5 GB."""
    tensor = torch.zeros(2 * PIECE_BYTES // 4 + 3)
    header, *pieces = safetensors_chunks({"params": tensor})
    assert len(header) < 1000 and len(pieces) == 3
    address = tensor.data_ptr()
    for piece in pieces:
        view = torch.frombuffer(piece, dtype=torch.uint8)
        assert view.data_ptr() == address
        address += len(view)
    assert address == tensor.data_ptr() + 4 * len(tensor)


def test_control_a_strided_tensor_is_copied() -> None:
    tensor = torch.zeros(4, 4)
    _, piece = safetensors_chunks({"params": tensor[:, ::2]})
    assert torch.frombuffer(piece, dtype=torch.uint8).data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize(
    ("tensors", "state", "message"),
    [
        (
            {"z": torch.zeros(2, dtype=torch.complex64)},
            {},
            "the tensor 'z' is torch.complex64, torch.strided",
        ),
        ({"s": torch.eye(2).to_sparse()}, {}, "the tensor 's' is torch.float32, torch.sparse_coo"),
        ({"__metadata__": torch.zeros(2)}, {}, "no tensor can be named '__metadata__'"),
        ({}, {"rng": {"state": (1, 2)}}, "state.rng.state is a tuple: a checkpoint's state holds dict, list"),
        ({}, {"losses": [1.0, torch.zeros(1)]}, "state.losses[1] is a Tensor"),
        ({}, {"counts": {3: 1}}, "state.counts has the key 3: a checkpoint's keys are strings"),
    ],
)
def test_what_cannot_come_back_is_refused_before_anything_is_written(
    tmp_path: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        save_checkpoint(tmp_path, 1, tensors, state)
    assert not list(tmp_path.iterdir())


def test_the_newest_of_several_loads(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, *training_state(step), keep=2)
    newest = load_newest(tmp_path)
    assert newest is not None and newest.step == 3
    assert_same(newest.tensors, training_state(3)[0])
    assert newest.state == training_state(3)[1]
    assert [path.name for path in files.complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]


def test_the_files_of_a_save_come_in_order(tmp_path: Path) -> None:
    log: list[Operation] = []
    save_checkpoint(tmp_path, 1, *training_state(), disk=files.Disk(log.append))
    created = [step.path.name for step in log if step.name == "create"]
    assert created == [checkpoint.TENSORS, checkpoint.STATE, files.MANIFEST]


# --- row 6: bit rot -----------------------------------------------------------------------------------------


def unnoticed_flips(folder: Path, count: int) -> int:
    """Flips random bits of a checkpoint's files, one at a time, `count` in all: how many were not noticed."""
    draw = random.Random(0)
    contents = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    unnoticed = 0
    for _ in range(count):
        path = draw.choice(list(contents))
        bit = draw.randrange(8 * len(contents[path]))
        flipped = bytearray(contents[path])
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            load_checkpoint(folder)
            unnoticed += 1
        except CheckpointError as error:
            if path.name != files.MANIFEST:
                assert str(error).startswith(f"{path} is damaged: its SHA-256 is")
            assert str(folder) in str(error)
        path.write_bytes(contents[path])
    load_checkpoint(folder)
    return unnoticed


@pytest.mark.parametrize(
    "count", [1_000, pytest.param(10_000, marks=pytest.mark.slow), pytest.param(100_000, marks=pytest.mark.soak)]
)
def test_every_flipped_bit_is_found(tmp_path: Path, count: int) -> None:
    assert unnoticed_flips(save_checkpoint(tmp_path, 1, *training_state()), count) == 0


def test_control_without_the_hash_flipped_bits_go_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(tmp_path, 1, *training_state())

    def unchecked(path: Path, record: files.FileRecord, buffer: memoryview) -> None:
        buffer[:] = path.read_bytes()

    monkeypatch.setattr(files, "read_checked", unchecked)
    with pytest.raises(AssertionError):
        assert unnoticed_flips(folder, 100) == 0


def test_damage_offers_the_newest_intact_older_checkpoint(tmp_path: Path) -> None:
    folders = [save_checkpoint(tmp_path, step, *training_state(step), keep=4) for step in (1, 2, 3, 4)]
    for folder in folders[2:]:
        os.truncate(folder / checkpoint.TENSORS, 10)
    offered = f"; an older one is intact: pass --resume {folders[1]}"
    for damaged in folders[2:]:
        with pytest.raises(DamagedCheckpointError, match=re.escape(f"{damaged}/tensors.safetensors is damaged")) as caught:
            load_checkpoint(damaged)
        assert str(caught.value).endswith(offered)
    with pytest.raises(DamagedCheckpointError, match=re.escape(offered)):
        load_newest(tmp_path)
    assert load_checkpoint(folders[1]).step == 2
    for folder in folders[:2]:
        (folder / checkpoint.STATE).unlink()
    with pytest.raises(DamagedCheckpointError, match=r"; no older one of this run is intact$"):
        load_newest(tmp_path)


# --- hostile content under an honest manifest ---------------------------------------------------------------


def forge(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """A checkpoint folder of any contents whose manifest is right."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    listing = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in contents.items()
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / files.MANIFEST).write_text(json.dumps({"format_version": 1, "files": listing}))
    return folder


STATE = b'{"format_version": 1, "step": 1, "state": {}}'


def tensor_file(entry: object, data: bytes = bytes(16), version: object = "1") -> bytes:
    header = json.dumps({"__metadata__": {"format_version": version}, "t": entry}).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_control_a_forged_checkpoint_loads(tmp_path: Path) -> None:
    loaded = load_checkpoint(forge(tmp_path / "forged", {checkpoint.TENSORS: tensor_file(entry()), checkpoint.STATE: STATE}))
    assert_same(loaded.tensors, {"t": torch.zeros(4)})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(7),
        b"\xff" * 16,
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
        tensor_file(entry(), version=1),
        tensor_file(entry(), version="zero"),
        tensor_file(entry(), version="1" * 10**4),
        tensor_file(None),
        tensor_file(entry(dtype="F128")),
        tensor_file(entry(dtype=["F32"])),
        tensor_file(entry(shape=[5])),
        tensor_file(entry(shape=[-4])),
        tensor_file(entry(shape=[-1])),
        tensor_file(entry(shape=[4.0])),
        tensor_file(entry(shape=[True, 4])),
        tensor_file(entry(shape=[10**30, 0], offsets=[0, 0])),
        tensor_file(entry(shape=[2**62, 2**62, 0], offsets=[0, 0])),
        tensor_file(entry(offsets=[0, 17])),
        tensor_file(entry(offsets=[-16, 0])),
        tensor_file(entry(offsets=[16, 0])),
        tensor_file(entry(offsets=[0])),
        tensor_file(entry(shape=[3], offsets=[2, 14])),
        tensor_file(entry(shape=[3], offsets=[0, 14])),
    ],
)
def test_a_hostile_tensor_file_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = forge(tmp_path / "forged", {checkpoint.TENSORS: content, checkpoint.STATE: STATE})
    with pytest.raises(DamagedCheckpointError, match=r"tensors\.safetensors is damaged: .+; no older one"):
        load_checkpoint(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "BF16", "BOOL", "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner),
    max_leaves=8,
)
sizes = st.lists(st.integers(-1, 20) | st.integers(), max_size=3)
entries = st.builds(entry, st.sampled_from(["F32", "F64", "BF16", "U8"]), sizes, sizes) | json_values


@given(entry=entries, data=st.binary(max_size=40))
def test_any_header_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, entry: object, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile"
    forge(folder, {checkpoint.TENSORS: tensor_file(entry, data), checkpoint.STATE: STATE})
    try:
        tensor = load_checkpoint(folder).tensors["t"]
    except DamagedCheckpointError:
        return
    assert tensor.numel() * tensor.element_size() <= len(data)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"format_version": 1}', b"[" * 10**5])
def test_a_hostile_state_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = forge(tmp_path / "forged", {checkpoint.TENSORS: tensor_file(entry()), checkpoint.STATE: content})
    with pytest.raises(DamagedCheckpointError, match=r"state\.json is damaged: "):
        load_checkpoint(folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: its manifest\.json lists no state\.json"):
        load_checkpoint(forge(tmp_path / "forged", {"weights": b"x"}))


# --- row 8: no pickle ---------------------------------------------------------------------------------------

WATCHED = """
import collections, pickle, sys
from pathlib import Path
import torch
from tutelage.checkpoint import load_newest, save_checkpoint
watched = []
sys.addaudithook(lambda event, arguments: watched.append(event) if event == "pickle.find_class" else None)
save_checkpoint(Path(sys.argv[1]), 1, {"params": torch.zeros(3)}, {"seed": 1})
assert load_newest(Path(sys.argv[1])).state == {"seed": 1}
assert watched == [], watched
pickle.loads(pickle.dumps(collections.OrderedDict()))
assert watched == ["pickle.find_class"], "the hook sees nothing"
"""


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", WATCHED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- row 25: old and new versions ---------------------------------------------------------------------------


def golden_contents(path: Path) -> dict[str, bytes]:
    """The files of a golden checkpoint, kept as hexadecimal text."""
    return {name: bytes.fromhex("".join(lines)) for name, lines in json.loads(path.read_text()).items()}


def golden_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "params": torch.tensor([[1.0, -2.5], [1e-45, math.inf]]),
        "adam.step": torch.tensor(12, dtype=torch.int64),
        "half": torch.tensor([1.0, 0.333], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
    }
    return tensors, {
        "seed": 2**63,
        "loss": 0.1,
        "cursor": {"epoch": 1, "documents": [3, 1, 2]},
        "done": False,
    }


@pytest.fixture(params=sorted(GOLDEN.glob("checkpoint_v*.json")), ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "run" / files.CHECKPOINTS / "step-00000012"
    folder.mkdir(parents=True)
    for name, content in golden_contents(request.param).items():
        (folder / name).write_bytes(content)
    return folder


def test_golden_checkpoints_load(golden: Path) -> None:
    loaded = load_newest(golden.parent.parent)
    assert loaded is not None and loaded.step == 12
    assert_same(loaded.tensors, golden_state()[0])
    assert loaded.state == golden_state()[1]


def test_there_is_a_golden_checkpoint_of_every_version() -> None:
    found = [path.stem for path in sorted(GOLDEN.glob("checkpoint_v*.json"))]
    assert found == [f"checkpoint_v{version}" for version in range(1, files.FORMAT_VERSION + 1)]


def test_the_format_does_not_change_without_its_number(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 12, *golden_state())
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert written == golden_contents(GOLDEN / f"checkpoint_v{files.FORMAT_VERSION}.json")


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (files.MANIFEST, lambda content: content.replace(b'"format_version": 1', b'"format_version": 2')),
        (checkpoint.STATE, lambda content: content.replace(b'"format_version": 1', b'"format_version": 2')),
        (
            checkpoint.TENSORS,
            lambda content: content.replace(b'"format_version":"1"', b'"format_version":"2"'),
        ),
    ],
)
def test_a_newer_version_is_refused_by_name(tmp_path: Path, name: str, edit: Callable[[bytes], bytes]) -> None:
    contents = golden_contents(GOLDEN / "checkpoint_v1.json")
    contents.pop(files.MANIFEST)
    newer = {**contents, name: edit(contents[name])} if name in contents else contents
    folder = forge(tmp_path / "newer", newer)
    if name == files.MANIFEST:
        (folder / name).write_bytes(edit((folder / name).read_bytes()))
    refusal = f"{folder / name} has format_version 2, but this tutelage reads up to 1: it was"
    with pytest.raises(CheckpointError, match=re.escape(refusal)) as caught:
        load_checkpoint(folder)
    assert not isinstance(caught.value, DamagedCheckpointError)
