"""The GGUF format: metadata and tensors of one file, read strictly and written a piece at a time.

A file is: the letters GGUF, version, counts; the metadata (typed values under names); a line for every tensor (name,
shape, type, place); then the tensors, each aligned. Nothing that a file says of itself is believed before it is
compared with the file's length, so a damaged or hostile file is an error and never a large allocation. What blocks
of quantised weights mean is the `gguf` library's knowledge.
"""

from __future__ import annotations

import importlib
import math
import mmap
import reprlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from tutelage.files import Buffer

Value = bool | int | float | str | Sequence[Any]

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that hold numbers one by one."""
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""The types that hold blocks of small integers with a scale; a row is whole blocks."""

# (number in the file, elements of a block, its bytes); ggml.h
_TYPES: Mapping[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "BF16": (30, 1, 2),
}
_TYPE_NAMES = {number: name for name, (number, _, _) in _TYPES.items()}
# Other types a file may hold: known by name, so that the error can say it.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LARGEST_RANK = 4
# Vocabularies of 256,000 tokens have headers of 10 MB; a list of strings takes some ten times its bytes in memory.
_HEADER_BYTES = 64 << 20
_LONGEST_NAME = 1 << 16
_LARGEST_QUANTISED = 127 * 65504.0
_PIECE_ELEMENTS = 4 << 20  # of a tensor in memory at a time: 16 MiB as float32


def library() -> Any:
    """The `gguf` package. Raises ImportError saying how to install it."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError("quantised GGUF tensors need the gguf package: pip install 'tutelage[hub]'") from error


# --- in -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `shape` is in torch's order, the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GgufFile:
    """A GGUF file, mapped into memory: its `metadata` and `tensors`, by name. Use it in a `with`.

    Raises:
        ValueError: naming the file and what is wrong with it; OSError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            self.size = self.path.stat().st_size
            if self.size < len(_MAGIC):
                raise ValueError(f"{self.path} is no GGUF file: it has {self.size} bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            reader = _Reader(self.path, self._map)
            self.metadata, self.tensors = reader.read()
        except BaseException:
            self._map.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """The rows of a tensor, in order and in pieces of at most 16 MiB or one row: as stored, and float32 where quantised.

        Raises ValueError naming the tensor that holds NaN or an infinity.
        """
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        step = max(1, _PIECE_ELEMENTS // width)
        _, block, block_bytes = _TYPES[tensor.type]
        row_bytes = width // block * block_bytes
        for first in range(0, rows, step):
            count = min(step, rows - first)
            begin, end = (tensor.offset + row * row_bytes for row in (first, first + count))
            data = self._map[begin:end]  # a copy: torch refuses read-only memory
            page = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, page, end - page)  # what has been read need not stay in memory
            piece = _decode(data, tensor.type, count, width)
            if not bool(torch.isfinite(piece).all()):
                raise ValueError(f"{self.path}: the tensor {name} holds NaN or an infinity; get the file again")
            yield piece


def _decode(data: bytes, kind: str, rows: int, width: int) -> torch.Tensor:
    if kind in DTYPES:
        return torch.frombuffer(bytearray(data), dtype=DTYPES[kind]).view(rows, width)
    gguf = library()
    blocks = np.frombuffer(data, np.uint8).reshape(rows, -1)
    with np.errstate(all="ignore"):  # scales of a damaged file; what comes of them is looked at
        values: np.ndarray[Any, np.dtype[np.float32]] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values)


class _Reader:
    """Walks through a header; `place` is where it is."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.end = min(len(data), _HEADER_BYTES)
        self.place = 0

    def read(self) -> tuple[dict[str, Value], dict[str, StoredTensor]]:
        if self.data[:4] != _MAGIC:
            raise ValueError(f"{self.path} is no GGUF file: it begins with {self.data[:4]!r}, not with {_MAGIC!r}")
        self.place = 4
        version = self._number("I", "the version")
        if version & 0xFFFF == 0:
            self._fail("is big-endian, which is not supported: convert it with gguf's gguf-convert-endian")
        if version not in (2, _VERSION):
            self._fail(f"has GGUF version {version}; 2 and {_VERSION} are read")
        tensors = self._number("Q", "the number of tensors")
        values = self._number("Q", "the number of metadata values")
        self._check_count(tensors, 24, "tensors")
        self._check_count(values, 13, "metadata values")
        metadata: dict[str, Value] = {}
        for index in range(values):
            name = self._text(f"the name of metadata value {index}", _LONGEST_NAME)
            if name in metadata:
                self._fail(f"has the metadata value {_shown(name)} twice")
            metadata[name] = self._value(self._number("I", f"the type of {_shown(name)}"), name)
        return metadata, self._tensors(tensors, metadata)

    def _tensors(self, count: int, metadata: Mapping[str, Value]) -> dict[str, StoredTensor]:
        alignment = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            self._fail(f"has the {_ALIGNMENT} {reprlib.repr(alignment)}, which is no power of two up to a million")
        found: dict[str, StoredTensor] = {}
        for index in range(count):
            name = self._text(f"the name of tensor {index}", _LONGEST_NAME)
            if name in found:
                self._fail(f"has the tensor {_shown(name)} twice")
            found[name] = self._tensor(name, alignment)
        start = -(-self.place // alignment) * alignment
        placed = {
            name: StoredTensor(name, tensor.shape, tensor.type, start + tensor.offset, tensor.nbytes)
            for name, tensor in found.items()
        }
        previous: StoredTensor | None = None
        for tensor in sorted(placed.values(), key=lambda tensor: tensor.offset):
            if tensor.offset + tensor.nbytes > len(self.data):
                self._fail(
                    f"ends at byte {len(self.data):,}, but its tensor {_shown(tensor.name)} would end at byte "
                    f"{tensor.offset + tensor.nbytes:,}: it was cut short; copy or fetch it again"
                )
            if previous is not None and tensor.offset < previous.offset + previous.nbytes:
                self._fail(f"is damaged: its tensors {_shown(previous.name)} and {_shown(tensor.name)} overlap")
            previous = tensor
        return placed

    def _tensor(self, name: str, alignment: int) -> StoredTensor:
        what = f"the tensor {_shown(name)}"
        rank = self._number("I", f"the rank of {what}")
        if not 1 <= rank <= _LARGEST_RANK:
            self._fail(f"is damaged: {what} has {rank} dimensions (1 to {_LARGEST_RANK} are possible)")
        shape = tuple(self._number("Q", f"the shape of {what}") for _ in range(rank))[::-1]
        if 0 in shape:
            self._fail(f"is damaged: {what} has the shape {list(shape)}")
        number = self._number("I", f"the type of {what}")
        if number not in _TYPE_NAMES:
            kind = _OTHER_TYPES.get(number, f"of the unknown type {number}")
            self._fail(f"cannot be read: {what} is {kind}; tutelage reads {', '.join(_TYPES)}")
        kind = _TYPE_NAMES[number]
        _, block, block_bytes = _TYPES[kind]
        if shape[-1] % block:
            self._fail(f"is damaged: {what} has rows of {shape[-1]}, which are no whole {kind} blocks of {block}")
        offset = self._number("Q", f"the place of {what}")
        if offset % alignment:
            self._fail(f"is damaged: {what} lies at {offset}, which is no multiple of the alignment {alignment}")
        return StoredTensor(name, shape, kind, offset, math.prod(shape) // block * block_bytes)

    def _value(self, kind: int, name: str) -> Value:
        what = f"the metadata value {_shown(name)}"
        if kind == _STRING:
            return self._text(what)
        if kind in _SCALARS:
            return self._scalar(kind, what)
        if kind != _ARRAY:
            self._fail(f"is damaged: {what} has the unknown type {kind}")
        element = self._number("I", f"the type of {what}")
        count = self._number("Q", f"the length of {what}")
        if element == _STRING:
            self._check_count(count, 8, f"strings in {what}")
            return [self._text(what) for _ in range(count)]
        if element not in _SCALARS:
            self._fail(f"has {what} with elements of type {element}, which is not supported")
        # numpy's array and not a list: a byte of the file would become eight
        kind_of_element = np.dtype(_SCALARS[element]).newbyteorder("<")
        self._check_count(count, kind_of_element.itemsize, f"elements in {what}")
        begin = self._skip(count * kind_of_element.itemsize, what)
        array: Sequence[Any] = np.frombuffer(self.data[begin : self.place], kind_of_element)  # type: ignore[assignment]
        return array

    def _scalar(self, kind: int, what: str) -> bool | int | float:
        form = _SCALARS[kind]
        value: bool | int | float = struct.unpack_from("<" + form, self.data, self._skip(struct.calcsize(form), what))[0]
        return value

    def _number(self, form: str, what: str) -> int:
        value: int = struct.unpack_from("<" + form, self.data, self._skip(struct.calcsize("<" + form), what))[0]
        return value

    def _text(self, what: str, longest: int = _HEADER_BYTES) -> str:
        length = self._number("Q", f"the length of {what}")
        if length > longest:
            self._fail(f"is damaged: {what} is a text of {length:,} bytes")
        begin = self._skip(length, what)
        try:
            return self.data[begin : self.place].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is damaged: {what} is no UTF-8 at byte {begin + error.start}") from error

    def _skip(self, count: int, what: str) -> int:
        begin = self.place
        if count > self.end - begin:
            if self.end < len(self.data):
                self._fail(f"has a header of more than {_HEADER_BYTES >> 20} MiB, which no model needs")
            self._fail(f"ends at byte {self.end:,}, inside {what}: it is damaged or was cut short")
        self.place = begin + count
        return begin

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self.end - self.place:
            self._fail(f"is damaged: it claims {count:,} {what}, more than its {len(self.data):,} bytes can hold")

    def _fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.path} {problem}")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


# --- out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor that is made when its turn comes. `rows` gives its rows, in order, as float32 pieces [n, width]."""

    name: str
    shape: tuple[int, ...]
    type: str
    rows: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Its length in the file."""
        _, block, block_bytes = _TYPES[self.type]
        return math.prod(self.shape) // block * block_bytes


def gguf_chunks(metadata: Mapping[str, Value], tensors: Sequence[TensorToWrite]) -> Iterator[Buffer]:
    """The bytes of a GGUF file, for `files.write_file_atomic`: the header, then a piece of a tensor at a time.

    Metadata: str, bool, int (as uint32), float (as float32), list of str, numpy array of int32 or float32.

    Raises ValueError naming the tensor that cannot be stored as its type.
    """
    header = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for name, value in metadata.items():
        header += _packed_text(name) + _packed_value(value)
    place = 0
    for tensor in tensors:
        number, block, _ = _TYPES[tensor.type]
        if tensor.shape[-1] % block:
            raise ValueError(
                f"{tensor.name} has rows of {tensor.shape[-1]}, which are no whole {tensor.type} blocks of {block}: "
                "choose float32, float16 or bfloat16"
            )
        header += _packed_text(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        header += struct.pack("<IQ", number, place)
        place += tensor.nbytes + -tensor.nbytes % _DEFAULT_ALIGNMENT
    yield bytes(header) + bytes(-len(header) % _DEFAULT_ALIGNMENT)
    for tensor in tensors:
        for piece in tensor.rows():
            yield _encode(piece, tensor)
        yield bytes(-tensor.nbytes % _DEFAULT_ALIGNMENT)


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed_value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _packed_text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, np.ndarray):
        element = {"i": 5, "f": 6}[value.dtype.char]
        return struct.pack("<IIQ", _ARRAY, element, len(value)) + value.tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_packed_text, value))


def _encode(piece: torch.Tensor, tensor: TensorToWrite) -> Buffer:
    stored = piece.to(DTYPES.get(tensor.type, torch.float32)).contiguous()
    # A block's scale is float16: its largest number / 127 (Q8_0).
    fits = stored.abs().max() < _LARGEST_QUANTISED if tensor.type not in DTYPES else torch.isfinite(stored).all()
    if not bool(fits):  # NaN is not below anything
        raise ValueError(f"{tensor.name} holds a number that {tensor.type} cannot hold")
    if tensor.type in DTYPES:
        data: Buffer = stored.view(torch.uint8).numpy().data
        return data
    gguf = library()
    blocks: np.ndarray[Any, Any] = gguf.quants.quantize(stored.numpy(), gguf.GGMLQuantizationType[tensor.type])
    return blocks.data
