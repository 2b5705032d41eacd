"""What general compressors reach on the same text: the baselines beside a model's bits per byte."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Sequence

# liblzma's smallest dictionary
_MIN_DICTIONARY = 4096


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Bits per UTF-8 byte of a text whose tokens cost `nats` together (the sum of -log p, natural
    logarithm)."""
    if n_bytes < 1:
        raise ValueError("bits per byte of no text: n_bytes must be at least 1")
    return nats / math.log(2) / n_bytes


def compression_baselines(documents: Sequence[str]) -> dict[str, float]:
    """Bits per UTF-8 byte that `gzip -9` and `xz -9` reach on `documents`, headers and check sums included.

    Keys: `gzip_per_document` and `xz_per_document` compress each document on its own, as the model reads
    them, and add up; `gzip_stream` and `xz_stream` compress all of them, one after the other, as one file.
    """
    data = [document.encode() for document in documents]
    total = sum(map(len, data))
    if total == 0:
        raise ValueError("no text to compress")
    compressors: dict[str, Callable[[bytes], bytes]] = {"gzip": _gzip, "xz": _xz}
    baselines = {}
    for name, compress in compressors.items():
        baselines[f"{name}_per_document"] = 8 * sum(len(compress(d)) for d in data) / total
        baselines[f"{name}_stream"] = 8 * len(compress(b"".join(data))) / total
    return baselines


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=9, mtime=0)


def _xz(data: bytes) -> bytes:
    # Preset 9 asks for a dictionary of 64 MiB. One as large as the data compresses the same and is 40 times
    # faster on small documents, whose time goes into setting it up.
    dictionary = min(max(len(data), _MIN_DICTIONARY), 64 << 20)
    return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}])
