"""The safetensors format, written a piece at a time: no second copy of the tensors in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tutelage.files import Buffer

METADATA = "__metadata__"
"""The entry of a safetensors header that is no tensor."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PIECE_BYTES = 16 << 20
"""A tensor on a device is copied to the host in pieces of this size."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_ALIGNMENT = 8  # the widest element, so that every tensor can be viewed in place in the file's bytes


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to write that is made when its turn comes: `pieces` gives its elements in order, as `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[torch.Tensor]]
    layout: torch.layout = torch.strided

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel() * self.element_size()


def safetensors_chunks(
    tensors: Mapping[str, torch.Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Iterator[Buffer]:
    """The bytes of a safetensors file, for `files.write_file_atomic` or a checkpoint, a piece at a time.

    Widest elements first, then by name, as the safetensors library does it: each tensor is aligned to its
    element. The metadata {"format": "pt"}, which transformers asks for, is added.

    dtypes: what to store a tensor as, where not as what it is; converted a piece at a time.

    Raises TypeError naming a tensor whose name, dtype or layout the format does not have.
    """
    stored = {name: (dtypes or {}).get(name, tensor.dtype) for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (-stored[name].itemsize, name))
    header: dict[str, Any] = {METADATA: {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        if name == METADATA:
            raise TypeError(f"no tensor can be named {name!r}: the format uses that name itself")
        if stored[name] not in _DTYPE_NAMES or tensor.layout != torch.strided:
            raise TypeError(f"the tensor {name!r} is {stored[name]}, {tensor.layout}: a safetensors file cannot hold it")
        begin, end = end, end + tensor.numel() * stored[name].itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[stored[name]],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(math.ceil(len(text) / _HEADER_ALIGNMENT) * _HEADER_ALIGNMENT)
    return _chunks(text, [(tensors[name], stored[name]) for name in names])


def _chunks(header: bytes, tensors: Iterable[tuple[torch.Tensor | LazyTensor, torch.dtype]]) -> Iterator[Buffer]:
    yield len(header).to_bytes(8, "little") + header
    for tensor, dtype in tensors:
        for piece in tensor.pieces() if isinstance(tensor, LazyTensor) else (tensor,):
            flat = piece.detach().contiguous().reshape(-1)
            for part in torch.split(flat, PIECE_BYTES // flat.element_size()):
                if len(part):  # an empty tensor is one empty part
                    yield part.to(dtype).view(torch.uint8).cpu().numpy().data
