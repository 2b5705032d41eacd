"""`tutelage generate`: completions of prompts, to the terminal or a JSONL file."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from tutelage import files
from tutelage.model import Model
from tutelage.rollouts import Generation, GenerationSettings, Interrupted, Rollouts
from tutelage.train.configs import GenerateConfig
from tutelage.train.run import write_json


def generate(config: GenerateConfig) -> Rollouts:
    """Generates as `config` says; prints the completions or writes them to `output`.

    Ctrl-C prints or writes what there is and goes on as KeyboardInterrupt. Raises ValueError naming the row of prompts_file
    that holds no prompt, and as `Model.generate`.
    """
    prompts = list(config.prompt)
    if config.prompts_file is not None:
        prompts += read_prompts(Path(config.prompts_file))
    if not prompts:
        raise ValueError("there is no prompt; pass --prompt 'Once upon a time', or --prompts_file FILE.jsonl")
    model = Model.from_pretrained(config.model, device=config.device, weights=config.weights)
    if model.tokenizer is None:
        raise ValueError(f"{config.model} holds no tokenizer.json, so text cannot become tokens")
    settings = GenerationSettings(
        config.max_new_tokens,
        config.samples_per_prompt,
        config.temperature,
        config.top_k,
        config.top_p,
        config.min_p,
        stop_strings=config.stop_strings,
        seed=config.seed,
        kv_cache_bytes=config.kv_cache_bytes,
    )
    generation = Generation(model, prompts, settings)
    begin = time.monotonic()
    try:
        _run(generation, len(prompts) * config.samples_per_prompt)
    except Interrupted as stop:
        _hand_over(config, prompts, stop.partial, time.monotonic() - begin)
        raise
    rollouts = generation.rollouts()
    _hand_over(config, prompts, rollouts, time.monotonic() - begin)
    return rollouts


def read_prompts(path: Path) -> list[str]:
    """The field `prompt` of every row of a JSONL file. Raises ValueError naming file and line."""
    prompts: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{path}, line {number} must be an object with a text field "prompt"')
        prompts.append(row["prompt"])
    return prompts


def _run(generation: Generation, rows: int) -> None:
    """All steps, with a bar of finished rows and tokens a second on a terminal."""
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.completed}/{task.total} rows, {task.fields[tokens]} tokens, {task.fields[rate]:.0f} tokens/s"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=rows, tokens=0, rate=0.0)
        tokens, done, begin = 0, 0, time.monotonic()
        while generation.step():
            for token in generation.streamed():
                tokens, done = tokens + 1, done + (token.finish_reason is not None)
            bar.update(task, completed=done, tokens=tokens, rate=tokens / max(time.monotonic() - begin, 1e-9))


def _hand_over(config: GenerateConfig, prompts: list[str], rollouts: Rollouts, seconds: float) -> None:
    assert rollouts.texts is not None
    rows = [
        {
            "prompt": prompts[row // config.samples_per_prompt],
            "text": rollouts.texts[row],
            "finish_reason": rollouts.finish_reasons[row],
            "tokens": rollouts.tokens[row].tolist(),
            "logprobs": rollouts.logprobs[row].tolist(),
        }
        for row in range(len(rollouts))
    ]
    console = Console()
    if config.output is None:
        for row in rows:
            console.print(f"[bold]{_plain(row['prompt'])}[/bold]{_plain(row['text'])}", highlight=False, soft_wrap=True)
            console.print(f"({len(row['tokens'])} tokens, {row['finish_reason']})", style="dim", highlight=False)
    else:
        files.write_file_atomic(Path(config.output), "".join(json.dumps(row) + "\n" for row in rows).encode())
    tokens = sum(rollouts.lengths)
    console.print(
        f"{len(rows)} rows, {tokens} tokens, {tokens / max(seconds, 1e-9):.0f} tokens/s"
        + (f"; in {config.output}" if config.output else ""),
        highlight=False,
        soft_wrap=True,
    )
    if config.json is not None:
        figures = {"rows": len(rows), "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}
        write_json(Path(config.json), {"command": "generate", **figures})


def _plain(text: object) -> str:
    """Brackets in a text are no markup."""
    return str(text).replace("[", r"\[")
