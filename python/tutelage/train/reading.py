"""The text that pretraining and tokenizer training read: the user's, or the home library."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.data.documents import DocumentSet, Source, read_documents
from tutelage.data.home_library import home_library


def read_text(data: Sequence[str], code: bool, held_out_fraction: float, on_bad_row: str) -> DocumentSet:
    """Documents of `data` (PATH or PATH:WEIGHT each), or of the home library where there is none.

    Raises as `read_documents` and `home_library`.
    """
    sources = [Source.parse(spec) for spec in data] or [
        Source(home_library(code), name="the home library" + (" (code)" if code else ""))
    ]
    return read_documents(sources, held_out_fraction, on_bad_row)
