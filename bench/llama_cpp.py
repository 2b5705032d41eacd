"""llama.cpp as a peer of ``bench rollout``: the same weights in a GGUF file, decoded through its C interface (its Python
package, extra ``[bench-llama]``)."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from tutelage import files
from tutelage.hub import gguf_model
from tutelage.hub.gguf_file import gguf_chunks
from tutelage.model import Model


def installed() -> bool:
    """Whether the peer can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def write_gguf(model: Model, path: Path, kind: str) -> None:
    """A model without a tokenizer, its matrices of `kind` "F32", "F16" or "BF16"."""
    architecture, described = gguf_model.describe(model.config, path)
    weights = model.state_dict()
    tensors = [
        place.to_write(kind, functools.partial(weights.__getitem__, place.ours))
        for place in gguf_model.places(model.config, architecture)
    ]
    metadata = {"general.architecture": architecture, **described, "tokenizer.ggml.model": "no_vocab"}
    files.write_file_atomic(path, gguf_chunks(metadata, [*tensors, *gguf_model.extra_tensors(model.config)]))


class LlamaCpp:
    """Its decoder: `batch` sequences in one call, no sampling. Use as a context manager."""

    def __init__(self, path: Path, batch: int, context: int, threads: int) -> None:
        self._lib: Any = importlib.import_module("llama_cpp")
        lib = self._lib
        # It logs every tensor it loads; the callback must outlive the library's use of it.
        self._silence = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._silence, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.n_batch = batch * context, batch, max(512, batch)
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = False  # a cache for each sequence: the faster of its two ways here
        self._context = lib.llama_init_from_model(self._model, options)
        self._rows = lib.llama_batch_init(max(512, batch), 0, 1)
        self.batch = batch
        self.position = 0

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_batch_free(self._rows)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def read(self, prompts: list[list[int]]) -> None:
        """Prompts of one length; forgets what was read before."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self.position = len(prompts[0])
        for row, prompt in enumerate(prompts):
            self._decode([(token, place, row, place == len(prompt) - 1) for place, token in enumerate(prompt)])

    def step(self, tokens: list[int]) -> None:
        """One more token of every sequence."""
        self._decode([(token, self.position, row, True) for row, token in enumerate(tokens)])
        self.position += 1

    def logits(self, row: int, vocab: int) -> torch.Tensor:
        """Of sequence `row`, after the latest step."""
        return torch.tensor(self._lib.llama_get_logits_ith(self._context, row)[:vocab])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self._rows
        batch.n_tokens = len(rows)
        for i, (token, place, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, place, 1, sequence
            batch.logits[i] = wanted
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def rate(self, prompts: list[list[int]], new_tokens: int, seconds: float, least: int) -> float:
        """Tokens a second of decoding, over about so many seconds and at least `least` steps, to `new_tokens` behind them."""
        if not len(prompts[0]) <= self.position <= len(prompts[0]) + new_tokens // 2:
            self.read(prompts)
        tokens = [prompt[-1] for prompt in prompts]
        steps, begin = 0, time.perf_counter()
        while steps < least or (time.perf_counter() - begin < seconds and self.position < len(prompts[0]) + new_tokens):
            self.step(tokens)
            steps += 1
        return self.batch * steps / (time.perf_counter() - begin)
