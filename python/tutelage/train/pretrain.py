"""Pretraining: predict every next token of real text; mean of −log p, AdamW (Radford et al. 2019; Brown et
al. 2020).

The model is a small Llama: RMSNorm, rotary positions, SwiGLU, tied embeddings (Touvron et al. 2023). What it
has learned is measured in bits per byte on documents that it never saw, beside what gzip and xz need for the
same documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tutelage.batch import PackedBatch, pack
from tutelage.config import ModelConfig
from tutelage.data.compression import compression_baselines
from tutelage.data.corpus import Corpus, HeldOut
from tutelage.data.documents import DocumentSet
from tutelage.data.packing import Cursor, PackedEpochs
from tutelage.data.tokenizer import Tokenizer, train_tokenizer
from tutelage.evaluate import held_out_bits_per_byte
from tutelage.files import DISK, Disk
from tutelage.model import Model
from tutelage.objectives import cross_entropy
from tutelage.train import picture
from tutelage.train.configs import PretrainConfig
from tutelage.train.reading import read_text
from tutelage.train.run import METRICS, Run, ignore, learning_rate, open_run, write_json


@dataclass(frozen=True)
class Size:
    """What `--size` stands for: the model's shape, and the defaults of the options of the same names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    context: int
    batch_tokens: int
    max_steps: int
    learning_rate: float


SIZES: Mapping[str, Size] = {
    "tiny": Size(64, 176, 2, 4, 1024, 128, 1024, 400, 5e-3),
    # About three minutes of two cores at 89 GFLOP/s: 16 TFLOP. A token costs 6 flops for every entry of a matrix, forward and
    # backward, and attention on top: 8 MFLOP; so 2 million tokens, the home library more than twice. A larger model would see
    # less of it, and at this budget it learns less.
    "small": Size(128, 352, 4, 4, 3072, 256, 1024, 2000, 3e-3),
    "base": Size(512, 1408, 8, 8, 4096, 1024, 4096, 600, 1e-3),
}


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run has come to."""

    folder: Path
    """The model and its tokenizer: `Model.from_pretrained(folder)`."""
    steps: int
    parameters: int
    tokens: int
    """Predicted in training, all processes of the run together."""
    bits_per_byte: Mapping[str, float]
    """Held out, by source, and "all"; empty where nothing is held out."""
    baselines: Mapping[str, float]
    """What gzip -9 and xz -9 need for the same documents: see `compression_baselines`."""
    seconds: float
    """Of this process's steps."""
    tokens_per_second: float


def pretrain(config: PretrainConfig, *, disk: Disk = DISK, fault: Callable[[str], None] = ignore) -> PretrainResult:
    """Trains a model as `config` says and saves it in output_dir/model.

    disk, fault: for tests, see `open_run`. Raises as `open_run`, `read_documents`, `Run.start` and
    `Run.accumulate`.
    """
    config = with_defaults(config)
    with open_run(config, disk, fault) as run:
        documents = read_text(config.data, config.code, config.held_out_fraction, config.on_bad_row)
        tokenizer = _tokenizer(config, documents)
        corpus = run.led(lambda: Corpus.build(documents, tokenizer, run.folder / "corpus"))
        data = PackedEpochs(corpus, config.context, config.seed)
        held_out = corpus.held_out()
        model = Model(_shape(config, tokenizer.vocab_size), seed=config.seed, device=config.device)
        model.tokenizer = tokenizer
        optimizer = run.optimizer(model, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
        _introduce(run, corpus, model, config)

        def objective(part: PackedBatch, denominator: int, _: range) -> torch.Tensor:
            return cross_entropy(model.score(part).logprobs, part.completion_mask, denominator)

        state = run.start(model, optimizer, data.fingerprint)
        cursor = Cursor(**state.get("cursor", {}))
        tokens, bits = state.get("tokens", 0), state.get("bits", {})
        for step in run.steps(config.max_steps):
            optimizer.lr = learning_rate(config, step, config.max_steps)
            bins, cursor = data.take(cursor, config.batch_tokens // config.context)
            batch = pack([piece for pieces in bins for piece in pieces])
            optimizer.zero_grad()
            loss = run.accumulate(model, batch, config.micro_batch_tokens, objective)
            grad_norm = run.update(optimizer)
            count = int(batch.completion_mask.sum())
            tokens += count
            run.log(
                loss,
                count,
                learning_rate=optimizer.lr,
                grad_norm=grad_norm,
                num_tokens=tokens,
                epoch=cursor.epoch + cursor.index / len(data.epoch(cursor.epoch)),
            )
            if step % config.eval_steps == 0 or step == config.max_steps:
                bits = held_out_bits_per_byte(model, held_out, config.context, config.micro_batch_tokens, run.share)
                _log_bits(run, bits)
                _show_sample(run, model, held_out)
            state = {"cursor": dataclasses.asdict(cursor), "tokens": tokens, "bits": bits}
            run.end_step(model, optimizer, state)

        run.save_model(model, "pretrain", steps=config.max_steps, tokens=tokens, bits_per_byte=bits.get("all"))
        result = PretrainResult(
            folder=run.folder / "model",
            steps=config.max_steps,
            parameters=model.params.numel(),
            tokens=tokens,
            bits_per_byte=bits,
            baselines=_baselines(held_out),
            seconds=run.seconds,
            tokens_per_second=run.tokens / run.seconds if run.tokens else 0.0,
        )
        _conclude(run, result, config)
        return result


def with_defaults(config: PretrainConfig) -> PretrainConfig:
    """Fills in what the size decides. Raises ValueError where batch_tokens is no multiple of context."""
    size = SIZES[config.size]
    context = config.context or size.context
    filled = dataclasses.replace(
        config,
        vocab_size=0 if config.tokenizer else config.vocab_size or size.vocab_size,
        context=context,
        batch_tokens=config.batch_tokens or max(size.batch_tokens, context),
        max_steps=config.max_steps or size.max_steps,
        learning_rate=config.learning_rate or size.learning_rate,
    )
    if filled.batch_tokens % context:
        raise ValueError(f"batch_tokens = {filled.batch_tokens} must be a multiple of context = {context}")
    if filled.micro_batch_tokens < context:
        raise ValueError(f"micro_batch_tokens = {filled.micro_batch_tokens} must be at least context = {context}")
    return filled


def _tokenizer(config: PretrainConfig, documents: DocumentSet) -> Tokenizer:
    if config.tokenizer is not None:
        return Tokenizer.from_pretrained(config.tokenizer)
    return train_tokenizer(documents.training_texts(), config.vocab_size)


def _shape(config: PretrainConfig, vocab_size: int) -> ModelConfig:
    size = SIZES[config.size]
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
    )


def _introduce(run: Run, corpus: Corpus, model: Model, config: PretrainConfig) -> None:
    for source in corpus.sources:
        dropped = [
            f"{source.duplicates} duplicates" if source.duplicates else "",
            f"{source.empty} empty documents" if source.empty else "",
            f"{len(source.bad_rows)} bad rows" if source.bad_rows else "",
        ]
        run.say(
            f"{source.name}: {source.documents} documents, {source.bytes / 1e6:.2f} MB, "
            f"{source.tokens:,} tokens; held out: {source.held_out_documents}, "
            f"{source.held_out_bytes / 1e6:.2f} MB"
            + (f"; left out: {', '.join(filter(None, dropped))}" if any(dropped) else "")
        )
        for row in source.bad_rows:
            run.say(f"  {row}")
    run.say(
        f"model: {model.params.numel():,} parameters, {model.config.vocab_size} tokens; "
        f"{config.max_steps} steps of {config.batch_tokens} tokens on {torch.get_num_threads()} threads"
    )


def _log_bits(run: Run, bits: Mapping[str, float]) -> None:
    if bits:
        several = {f"eval_bits_per_byte/{name}": value for name, value in bits.items() if name != "all"}
        run.write_metrics({"eval_bits_per_byte": bits["all"], **(several if len(several) > 1 else {})})
        run.say(f"step {run.step}: {bits['all']:.3f} bits per byte on the held-out documents")


def _show_sample(run: Run, model: Model, held_out: list[HeldOut]) -> None:
    """How the model goes on from the beginning of a document that it has not read; the same draw every time."""
    tokenizer = model.tokenizer
    if not held_out or tokenizer is None or not run.ranks.leads:
        return
    prompt = tokenizer.encode(held_out[0].documents[0][:60])
    room = model.config.max_position_embeddings // 2
    sample = model.generate([prompt[:room]], max_new_tokens=min(40, room), temperature=0.7)
    model.free_caches()
    assert sample.texts is not None
    run.say(f"  {tokenizer.decode(prompt[:room])!r} … {sample.texts[0]!r}")


def _baselines(held_out: list[HeldOut]) -> dict[str, float]:
    documents = [document for source in held_out for document in source.documents]
    return compression_baselines(documents) if documents else {}


def _conclude(run: Run, result: PretrainResult, config: PretrainConfig) -> None:
    if not run.ranks.leads:
        return
    if config.plot and (run.folder / METRICS).exists():  # not where a finished run was resumed in another folder
        run.say(picture.show(run.folder / METRICS, run.folder / "loss.png", "bits per byte"))
    if result.bits_per_byte:
        run.console.print(_comparison(result))
    run.say(f"model and tokenizer: {result.folder}")
    if config.json is not None:
        figures: dict[str, Any] = {**dataclasses.asdict(result), "folder": str(result.folder)}
        write_json(Path(config.json), {"command": "pretrain", "size": config.size, **figures})


def _comparison(result: PretrainResult) -> Table:
    """The model's bits per byte beside the compressors' on the same documents."""
    table = Table(title="Bits per byte on the held-out documents (lower is better)", title_justify="left")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    sources = [name for name in result.bits_per_byte if name != "all"]
    table.add_row("this model, which has read the other documents", f"{result.bits_per_byte['all']:.3f}")
    for name in sources if len(sources) > 1 else []:
        table.add_row(f"  on {name}", f"{result.bits_per_byte[name]:.3f}")
    for compressor in ("gzip", "xz"):
        table.add_row(f"{compressor} -9, document by document", f"{result.baselines[f'{compressor}_per_document']:.3f}")
        table.add_row(f"{compressor} -9, all in one stream", f"{result.baselines[f'{compressor}_stream']:.3f}")
    return table
