"""`tutelage eval`: bits per byte, accuracy, win rate, KL divergence and reward of a model, and accuracy of a reward model."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tutelage.batch import PackedBatch, pack
from tutelage.data.documents import read_documents
from tutelage.data.examples import ExampleSet, Prompt, load_prompts, load_rankings
from tutelage.data.tokenizer import Tokenizer
from tutelage.evaluate import (
    documents_to_score,
    exact_match,
    held_out_bits_per_byte,
    kl_divergence,
    load_reward_model,
    rate,
    sequence_rewards,
)
from tutelage.model import Model
from tutelage.objectives import ranking_pairs
from tutelage.rollouts import Generation, GenerationSettings, Rollouts
from tutelage.train.bar import progress
from tutelage.train.configs import EvalConfig
from tutelage.train.run import write_json
from tutelage.user_code import load_function

Figures = dict[str, Any]


def evaluate(config: EvalConfig) -> Figures:
    """Measures and prints as `config` says; returns the figures.

    Raises ValueError for a model without a tokenizer, rows that lack what is compared, models of different tokenizers, a
    score outside of 0 .. 1, a language model where a reward model is needed; otherwise as `read_documents`, `load_prompts`,
    `load_rankings`, `load_function` and `Model.generate`.
    """
    if not config.data:
        raise ValueError("there is nothing to measure on; pass files with --data")
    measures = {
        "bits_per_byte": _bits_per_byte,
        "accuracy": _accuracy,
        "win_rate": _win_rate,
        "kl": _kl,
        "reward": _reward,
        "reward_accuracy": _reward_accuracy,
    }
    figures = measures[config.measure](config)
    table = Table(title=config.measure)
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(Text(name), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if config.json is not None:
        write_json(Path(config.json), {"command": "eval", "measure": config.measure, "model": config.model, **figures})
    return figures


def _model(folder: str, device: str) -> tuple[Model, Tokenizer]:
    model = Model.from_pretrained(folder, device=device)
    if model.tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer.json, so text cannot become tokens")
    return model, model.tokenizer


def _bits_per_byte(config: EvalConfig) -> Figures:
    model, tokenizer = _model(config.model, config.device)
    sources = documents_to_score(read_documents(config.data, 0.0, config.on_bad_row), tokenizer)
    context = model.config.max_position_embeddings
    pieces = sum(len(source.sequences(context)) for source in sources)
    with _bar("pieces of text", pieces) as done:
        bits: Figures = dict(
            held_out_bits_per_byte(model, sources, context, max(config.micro_batch_tokens, context), done=done)
        )
    return {**bits, "bytes": sum(source.bytes for source in sources)}


def _accuracy(config: EvalConfig) -> Figures:
    score: Callable[..., Any] = _matches
    if config.scorer is not None:
        score = load_function(config.scorer, "scorer", ("prompt", "answer", "row"))
    model, tokenizer = _model(config.model, config.device)
    prompts = _prompts(config, tokenizer)
    if config.scorer is None:
        for prompt in prompts.examples:  # before the answers, which take their time
            _expected(prompt)
    answers = _texts(_answers(config, model, prompts))
    scores = [
        _checked(score(prompt.prompt, answer, prompt if config.scorer is None else prompt.columns), "scorer", prompt)
        for prompt, answer in zip(prompts.examples, answers, strict=True)
    ]
    return dataclasses.asdict(rate(scores))


def _win_rate(config: EvalConfig) -> Figures:
    assert config.against is not None  # the config has checked it
    judge: Callable[..., Any] | None = None
    if config.judge is not None:
        judge = load_function(config.judge, "judge", ("prompt", "answer", "other", "row"))
    answers, rewards = [], []
    for folder in (config.model, config.against):
        model, tokenizer = _model(folder, config.device)
        prompts = _prompts(config, tokenizer)
        reward_model = (
            None
            if config.reward_model is None
            else load_reward_model(config.reward_model, tokenizer, model.base, model.device_name)
        )
        answers.append(_answers(config, model, prompts))
        if reward_model is not None:
            rewards.append(_rewards(reward_model, answers[-1].pack(), config.micro_batch_tokens).tolist())
    if judge is None:
        scores = [0.5 if ours == theirs else float(ours > theirs) for ours, theirs in zip(*rewards, strict=True)]
    else:
        scores = [
            _checked(judge(prompt.prompt, ours, theirs, prompt.columns), "judge", prompt)
            for prompt, ours, theirs in zip(prompts.examples, *map(_texts, answers), strict=True)
        ]
    return {**dataclasses.asdict(rate(scores)), "ties": scores.count(0.5)}


def _kl(config: EvalConfig) -> Figures:
    assert config.against is not None  # the config has checked it
    model, tokenizer = _model(config.model, config.device)
    reference, other = _model(config.against, config.device)
    if other.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{config.model} and {config.against} have different tokenizers, so their tokens cannot be compared")
    rollouts = _answers(config, model, _prompts(config, tokenizer))
    temperature = 1.0 if config.temperature is None else config.temperature
    with _bar("answers read by the other model", len(rollouts)) as done:
        return dataclasses.asdict(kl_divergence(rollouts, reference, temperature, config.micro_batch_tokens, done))


def _reward(config: EvalConfig) -> Figures:
    assert config.reward_model is not None  # the config has checked it
    model, tokenizer = _model(config.model, config.device)
    reward_model = load_reward_model(config.reward_model, tokenizer, model.base, model.device_name)
    answers = _answers(config, model, _prompts(config, tokenizer))
    rewards = _rewards(reward_model, answers.pack(), config.micro_batch_tokens).tolist()
    mean = math.fsum(rewards) / len(rewards)
    error = statistics.stdev(rewards) / math.sqrt(len(rewards)) if len(rewards) > 1 else None
    return {"reward": mean, "standard_error": error, "count": len(rewards)}


def _reward_accuracy(config: EvalConfig) -> Figures:
    model, tokenizer = _model(config.model, config.device)
    if model.head != "scalar":
        raise ValueError(f"{config.model} holds a language model, and reward_accuracy needs a reward model")
    rows = load_rankings(config.data, tokenizer, model.config.max_position_embeddings, config.on_bad_row)
    batch = pack([response.tokens for prompt in rows.examples for response in prompt.responses])
    rewards = _rewards(model, batch, config.micro_batch_tokens)
    pairs = ranking_pairs([prompt.ranking for prompt in rows.examples])
    leads = (rewards[pairs.winners] - rewards[pairs.losers]).tolist()
    return {**dataclasses.asdict(rate([float(lead > 0) for lead in leads])), "prompts": len(rows.examples)}


def _prompts(config: EvalConfig, tokenizer: Tokenizer) -> ExampleSet[Prompt]:
    return load_prompts(config.data, tokenizer, 2**31 - 1, config.on_bad_row)


def _answers(config: EvalConfig, model: Model, prompts: ExampleSet[Prompt]) -> Rollouts:
    stops = [*model.eos_token_ids, *([] if prompts.turn is None else [prompts.turn.stop_token_id])]
    default = 1.0 if config.measure == "kl" else 0.0
    settings = GenerationSettings(
        config.max_new_tokens,
        temperature=default if config.temperature is None else config.temperature,
        stop_token_ids=stops,
        seed=config.seed,
    )
    generation, finished = Generation(model, [prompt.tokens.tolist() for prompt in prompts.examples], settings), 0
    with _bar("answers", len(prompts.examples)) as done:
        while generation.step():
            finished += sum(token.finish_reason is not None for token in generation.streamed())
            done(finished)
    return generation.rollouts()


def _rewards(model: Model, batch: PackedBatch, max_tokens: int) -> torch.Tensor:
    with _bar("rewards", len(batch)) as done:
        return sequence_rewards(model, batch, max_tokens, done)


def _bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """On standard error, so that the figures can be sent elsewhere."""
    return progress(Console(stderr=True), what, total, transient=True)


def _texts(rollouts: Rollouts) -> list[str]:
    assert rollouts.texts is not None  # the model has a tokenizer
    return rollouts.texts


def _matches(_: object, answer: str, prompt: Prompt) -> bool:
    return exact_match(answer, _expected(prompt))


def _expected(prompt: Prompt) -> str:
    """The row's completion: a string, or one message."""
    completion = prompt.columns.get("completion")
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content")
    if not isinstance(completion, str):
        raise ValueError(
            f'{prompt.where}: accuracy needs a field "completion" to compare with, a string or one message; '
            "or pass --scorer module:name"
        )
    return completion


def _checked(score: object, who: str, prompt: Prompt) -> float:
    if not isinstance(score, (bool, int, float)) or not 0 <= score <= 1:
        raise ValueError(f"{prompt.where}: the {who} must return a number in 0 .. 1, but it returned {score!r}")
    return float(score)
