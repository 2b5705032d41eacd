"""`tutelage label`: the labelling page, the answers that are judged on it, and the file that people's judgements go into;
`tutelage label export`: that file as rows to learn from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tutelage import files
from tutelage.batch import pack
from tutelage.data.examples import load_sft
from tutelage.data.rows import BadRows, Row, read_rows
from tutelage.evaluate import load_reward_model, sequence_rewards
from tutelage.feedback.answers import Answerer, AnswerSettings, Background, Spreads, prompt_row
from tutelage.feedback.desk import Desk
from tutelage.feedback.export import Exported, export_rows
from tutelage.feedback.state import Settings
from tutelage.feedback.store import Store, create
from tutelage.feedback.tasks import ANSWERS, Item
from tutelage.model import Model
from tutelage.train.configs import LabelConfig, LabelExportConfig
from tutelage.train.run import ignore
from tutelage.train.serving import place, web
from tutelage.train.tuning import content

_ANSWERS: Mapping[str, int] = {"rank": 4, "compare": 2, "rate": 4, "write": 1}
# Of one forward of the reward model.
_SCORED_TOKENS = 8192


def label(config: LabelConfig, *, fault: Callable[[str], None] = ignore) -> None:
    """Serves the labelling page until Ctrl-C, which goes on as KeyboardInterrupt, or, where the config says so, until
    everything is judged.

    Raises ImportError without starlette and uvicorn; ValueError naming file and line of a row that does not fit the task, a
    session of another kind in `out`, a model that cannot answer; OSError for an address that is taken; RunFolderError for a
    file that another server holds. None of them leaves a new file behind.
    """
    path = Path(config.out)
    console = Console(stderr=True)

    def say(text: str, style: str = "dim") -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    with ExitStack() as stack:
        here = stack.enter_context(place(config.host, config.port, config.allowed_hosts))
        models = _Models()
        plan = None if path.exists() and not (config.responses or config.prompts) else _plan(config, models, say)
        if not path.parent.is_dir():
            files.make_folder(path.parent)
        stack.enter_context(files.lock_file(path))
        if path.exists():
            _check_same(path, config, plan)
        elif plan is None:
            raise ValueError(
                f"there is nothing to judge: pass --responses FILE, or --model FOLDER --prompts FILE, to begin {path}"
            )
        else:
            create(path, plan.settings, plan.items, plan.source)
        store = Store(path, fault=fault)
        stack.callback(store.close)
        if config.stop_when_complete and store.state.is_complete:
            say(f"complete already: {_told(store)}")
            return
        background = _background(store, models, say)
        stack.callback(background.close)
        desk = Desk(store, lambda: background.problem, config.title, _guidelines(config))
        background.start()
        try:
            here.serve(
                web().label_api(desk),
                config.addresses,
                config.browser,
                say,
                _told(store),
                lambda: config.stop_when_complete and store.state.is_complete,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_told(store)) from None
        say(f"complete: {_told(store)}")


def export(config: LabelExportConfig) -> Exported:
    """Writes what was judged as rows to learn from; returns them.

    Raises StoreError for a file that is none, and ValueError as `export_rows`.
    """
    store = Store(Path(config.feedback), read_only=True)
    try:
        exported = export_rows(store.state, config.to, config.labellers)
    finally:
        store.close()
    output = Path(config.output)
    if not output.parent.is_dir():
        files.make_folder(output.parent)
    files.write_file_atomic(output, "".join(json.dumps(row) + "\n" for row in exported.rows).encode())
    left = "".join(f"; left out, {reason}: {count}" for reason, count in exported.left_out.items() if count)
    Console().print(
        f"{output}: {len(exported.rows)} rows ({config.to}) of {exported.judgements} judgements{left}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return exported


def _told(store: Store) -> str:
    with store.locked() as state:
        progress, answers = state.progress(None), len(state.answers())
    return f"{store.path} holds {answers} judgements of {progress.total} prompts"


def _guidelines(config: LabelConfig) -> str | None:
    if config.guidelines is None:
        return None
    try:
        return Path(config.guidelines).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{config.guidelines} is no UTF-8 text: {error.reason} at byte {error.start}") from error


# --- a new session ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What a file of feedback begins with."""

    settings: Settings
    items: list[Item]
    source: dict[str, Any]


class _Models:
    """Models by folder, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str], Model] = {}

    def answering(self, folder: str, weights: Any) -> Model:
        key = (folder, weights)
        if key not in self._loaded:
            self._loaded[key] = Model.from_pretrained(folder, weights=weights)
        return self._loaded[key]


def _plan(config: LabelConfig, models: _Models, say: Any) -> _Plan:
    """The session that `config` begins, all of it checked."""
    source: dict[str, Any] = {"responses": config.responses, "prompts": config.prompts, "reward_model": config.reward_model}
    given = config.responses or config.prompts
    if given is None:
        raise ValueError(
            f"there is nothing to judge: pass --responses FILE, or --model FOLDER --prompts FILE, to begin {config.out}"
        )
    read = read_rows(given, ("responses" if config.responses else "prompt_only",), BadRows(config.on_bad_row))
    for line in read.bad:
        say(f"left out: {line}", "yellow")
    if len({schema.conversational for schema in read.schemas.values()}) > 1:
        described = ", ".join(
            f"{name} has {'messages' if schema.conversational else 'strings'}" for name, schema in read.schemas.items()
        )
        raise ValueError(f"prompts must all be strings or all be messages, but {described}: label them apart")
    rows = list(read.rows)
    if config.responses is not None:
        for row in rows:
            _check_count(row, config)
        k = max(len(row.responses) for row in rows)
    elif config.model is None:
        if config.task != "write":
            raise ValueError(f"who answers the prompts? Pass --model FOLDER; without answers there is nothing to {config.task}")
        k = 0
    else:
        k = config.k or _ANSWERS[config.task]
        settings = _answer_settings(config, k)
        model = models.answering(config.model, config.weights)
        readable = Answerer(model, settings).read(given, config.on_bad_row)
        fit = {prompt.where for prompt in readable.examples}
        for row in rows:
            if row.where not in fit:
                say(f"left out: {row.where}: the model cannot read this prompt", "yellow")
        rows = [row for row in rows if row.where in fit]
        source |= {
            "model": config.model,
            "weights": config.weights,
            "content": content(model),
            "answers": dataclasses.asdict(settings),
        }
    if config.order == "spread":
        if config.reward_model is None:
            raise ValueError("order spread needs a judge: give the folder of a reward_model")
        load_reward_model(config.reward_model, _tokenizer_of(config.reward_model))  # what is wrong with it is told now
    no_answer = None if config.model is not None else ()
    items = [
        Item(number, row.prompt or "", row.responses if config.responses else no_answer, None, _columns(row))
        for number, row in enumerate(rows)
    ]
    source["rows"] = _digest(items)
    guidelines = _guidelines(config) or ""
    return _Plan(Settings(config.task, k, config.order, config.overlap, config.seed, config.title, guidelines), items, source)


def _check_count(row: Row, config: LabelConfig) -> None:
    least, most = ANSWERS[config.task]
    if not least <= len(row.responses) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise ValueError(f"{row.where}: field 'responses' has {len(row.responses)}, but the task {config.task} takes {wanted}")


def _columns(row: Row) -> dict[str, Any]:
    """Everything of a row besides prompt and answers; what the chat template is told is part of the prompt."""
    columns = dict(row.columns)
    if row.tools is not None:
        columns["tools"] = list(row.tools)
    if row.template_options is not None:
        columns["chat_template_kwargs"] = dict(row.template_options)
    return columns


def _answer_settings(config: LabelConfig, k: int) -> AnswerSettings:
    return AnswerSettings(k, config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.min_p, config.seed)


def _digest(items: Sequence[Item]) -> str:
    """SHA-256 of what is judged."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.prompt, item.responses, item.columns], sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


# --- a session to go on with ----------------------------------------------------------------------------------------


def begun(path: Path) -> tuple[Settings, dict[str, Any]]:
    """What a file of feedback was begun with."""
    store = Store(path, read_only=True)
    try:
        return store.settings, store.source
    finally:
        store.close()


def _check_same(path: Path, config: LabelConfig, plan: _Plan | None) -> None:
    """Raises ValueError where the file was begun with something else than what `config` says.

    Without rows to begin a session of, options that are at their default are taken as the file has them.
    """
    settings, source = begun(path)
    advice = "give the same, or another --out"
    for name in ("task", "order", "overlap", "seed"):
        said, found = getattr(config, name), getattr(settings, name)
        if said != found and (plan is not None or said != LabelConfig.__dataclass_fields__[name].default):
            raise ValueError(f"{path} was begun with {name} {found}, not {said}: {advice}")
    if plan is not None and plan.source["rows"] != source["rows"]:
        raise ValueError(f"{path} was begun with other rows than those of {config.responses or config.prompts}: {advice}")
    if plan is not None and plan.source.get("answers") != source.get("answers"):
        raise ValueError(f"{path} was begun with other settings of the model ({source.get('answers')}): {advice}")


def _background(store: Store, models: _Models, say: Any) -> Background:
    """What gives the items their answers and spreads, as the file says."""
    source, answerer, spreads = store.source, None, None
    with store.locked() as state:
        unanswered = any(item.responses is None for item in state.items.values())
        unscored = store.settings.order == "spread" and any(item.spread is None for item in state.items.values())
    if unanswered:
        model = models.answering(source["model"], source["weights"])
        if content(model) != source["content"]:
            raise ValueError(
                f"{source['model']} is not the model that {store.path} was begun with, and its answers are not all there yet: "
                "bring it back, or begin anew with another --out"
            )
        answerer = Answerer(model, AnswerSettings(**source["answers"]))
    if unscored:
        spreads = _spreads(source["reward_model"])
    seed = source["answers"]["seed"] if "answers" in source else 0
    return Background(store, seed, answerer, spreads, lambda problem: say(problem, "bold red"))


def _tokenizer_of(folder: str) -> Any:
    from tutelage.data.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(folder)


def _spreads(folder: str) -> Spreads:
    """Scores the answers of items with the reward model in `folder`."""
    tokenizer = _tokenizer_of(folder)
    judge = load_reward_model(folder, tokenizer)
    longest = judge.config.max_position_embeddings

    def spreads(items: Sequence[Item]) -> dict[int, float]:
        rows = [
            {**prompt_row(item), "completion": response if isinstance(response, str) else list(response)}
            for item in items
            for response in item.responses or ()
        ]
        read = load_sft(rows, tokenizer, longest, on_long="truncate")
        rewards = sequence_rewards(judge, pack([example.tokens for example in read.examples]), _SCORED_TOKENS).tolist()
        found, start = {}, 0
        for item in items:
            own = rewards[start : start + len(item.responses or ())]
            start += len(own)
            if not all(map(math.isfinite, own)):
                raise ValueError(f"the reward model {folder} gives an answer to item {item.id} a reward that is no number")
            found[item.id] = max(own) - min(own)
        return found

    return spreads
