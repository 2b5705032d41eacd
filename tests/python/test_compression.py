from __future__ import annotations

import gzip
import lzma
import math

import pytest

from tutelage.data.compression import bits_per_byte, compression_baselines

DOCUMENTS = ["the cat sat on the mat. " * 40, "東京は日本の首都です。" * 30, "short"]


def test_bits_per_byte() -> None:
    # 10 bytes whose every byte costs as much as one of 256 equally likely ones: 8 bits each
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="n_bytes must be at least 1"):
        bits_per_byte(1.0, 0)


def test_baselines_are_what_the_compressors_reach() -> None:
    data = [document.encode() for document in DOCUMENTS]
    stream = b"".join(data)
    bits = 8 / len(stream)
    assert compression_baselines(DOCUMENTS) == {
        "gzip_per_document": pytest.approx(bits * sum(len(gzip.compress(d, 9)) for d in data)),
        "gzip_stream": pytest.approx(bits * len(gzip.compress(stream, 9))),
        # the real preset 9: our smaller dictionary must not cost a byte
        "xz_per_document": pytest.approx(bits * sum(len(lzma.compress(d, preset=9)) for d in data)),
        "xz_stream": pytest.approx(bits * len(lzma.compress(stream, preset=9))),
    }


def test_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="no text to compress"):
        compression_baselines([])
