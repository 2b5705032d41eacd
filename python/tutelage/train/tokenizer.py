"""`tutelage tokenizer`: trains a byte-level BPE tokenizer on text and saves it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tutelage import files
from tutelage.data.tokenizer import Tokenizer, train_tokenizer
from tutelage.train.configs import TokenizerConfig
from tutelage.train.reading import read_text
from tutelage.train.run import write_json


@dataclass(frozen=True)
class TokenizerResult:
    """A trained tokenizer, where it lies, and how it does on the text it was trained on."""

    folder: Path
    tokenizer: Tokenizer
    bytes: int
    tokens: int


def tokenizer(config: TokenizerConfig) -> TokenizerResult:
    """Trains a tokenizer and saves it in output_dir.

    Raises RunFolderError where output_dir holds a tokenizer or anything else already; otherwise as
    `read_documents` and `train_tokenizer`.
    """
    folder = Path(config.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise files.RunFolderError(
            f"{folder} is not empty: pass --overwrite to replace a tokenizer in it, or another --output_dir"
        )
    texts = [d.text for d in read_text(config.data, config.code, 0.0, config.on_bad_row).documents]
    trained = train_tokenizer(texts, config.vocab_size)
    trained.save(folder)
    result = TokenizerResult(
        folder,
        trained,
        bytes=sum(len(text.encode()) for text in texts),
        tokens=sum(len(ids) for ids in trained.encode_batch(texts)),
    )
    print(
        f"{trained.vocab_size} tokens learned from {len(texts)} documents; "
        f"{result.bytes / result.tokens:.2f} bytes per token; saved in {folder}"
    )
    if config.json is not None:
        write_json(
            Path(config.json),
            {
                "command": "tokenizer",
                "folder": str(folder),
                "vocab_size": trained.vocab_size,
                "bytes": result.bytes,
                "tokens": result.tokens,
            },
        )
    return result
