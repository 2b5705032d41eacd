"""The loop closes: people judge on the page, and models learn from what they said, with no conversion between."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser_for_tests import Person, chrome
from forked import Forker, forker
from labelling_for_tests import Page, address_of
from runs_for_tests import write_rows
from tutelage import ModelConfig, Tokenizer, load_rankings, train_tokenizer
from tutelage.cli import main
from tutelage.feedback.export import export_rows
from tutelage.feedback.store import Store
from tutelage.model import Model
from tutelage.school.data import fact_of, practice
from tutelage.school.draws import Draws
from tutelage.school.labeller import SimulatedLabeller
from tutelage.school.world import ATTRIBUTES, Fact, Tone, World, answers
from tutelage.train.configs import DpoConfig, EvalConfig, PpoConfig, RewardConfig, SftConfig
from tutelage.train.dpo import dpo
from tutelage.train.evaluate_command import evaluate
from tutelage.train.ppo import ppo
from tutelage.train.reward import reward
from tutelage.train.sft import sft

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ITEMS, HELD_OUT = 60, 100


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("forks"), "children", "tutelage.feedback.server") as found:
        yield found


def asked(world: World, count: int) -> list[dict[str, Any]]:
    """Practice questions of the storyworld, each with a right and a wrong answer in either tone, in random order."""
    draws, rows = Draws("label loop", world.seed), []
    for row in practice(world, count):
        fact = fact_of(row)
        wrong = Fact(fact.person, fact.attribute, next(v for v in ATTRIBUTES[fact.attribute].values if v != fact.value))
        tones: tuple[Tone, ...] = ("kind", "rude")
        texts = [" " + draws.choice(answers(said, tone)) for said in (fact, wrong) for tone in tones]
        rows.append({**row, "responses": draws.shuffled(texts)})
    return rows


def fresh_model(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A language model that knows nothing, and a tokenizer of these rows."""
    tokenizer = train_tokenizer([text for row in rows for text in (row["prompt"], *row["responses"])], 400)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = Model(shape, seed=0)
    model.tokenizer = tokenizer
    assert tokenizer.eos_token_id is not None
    model.eos_token_ids = (tokenizer.eos_token_id,)
    model.save_pretrained(folder)
    return folder


def run(folder: Path, **options: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "seed": 0, "plot": False, "eval_fraction": 0.0, **options}


def test_what_was_said_on_the_page_is_what_models_learn(tmp_path: Path, forks: Forker) -> None:
    world = World(0, 16)
    rows = asked(world, ITEMS + HELD_OUT)
    base = fresh_model(tmp_path / "base", rows)
    labeller = SimulatedLabeller(0, noise=0.05)
    given, exam = rows[:ITEMS], rows[ITEMS:]
    held_out = write_rows(
        tmp_path / "held_out.jsonl",
        [row for question in exam if (row := SimulatedLabeller(0, 0.0).label(question, question["responses"])) is not None],
    )

    # the scripted labeller reads the page in a browser, and types
    facts = {row["prompt"]: fact_of(row) for row in given}

    def judge(person: Person) -> None:
        shown = person.texts()
        prompt, letters = person.prompt(), list(shown)
        for group in labeller.rank(prompt, list(shown.values()), facts[prompt]):
            for tied, place in enumerate(group):
                person.press(letters[place], *("=" for _ in range(min(tied, 1))))
        person.press("Enter")

    responses = write_rows(tmp_path / "responses.jsonl", [{k: row[k] for k in ("prompt", "responses")} for row in given])
    out = tmp_path / "feedback.db"
    config = {"out": str(out), "responses": str(responses), "stop_when_complete": True}
    child = forks.start("children:serve", config=config)
    with chrome() as browser:
        person = Person(browser.new_context()).begin(address_of(child.output))
        for number in range(ITEMS):
            person.at_item(number + 1)
            judge(person)
        person.finished()
        assert person.complaints == []
    assert child.wait() == 0

    exported = tmp_path / "rankings.jsonl"
    assert main(["label", "export", str(out), "--to", "ranking", str(exported)]) == 0
    in_memory = [row for question in given if (row := labeller.label(question, question["responses"])) is not None]
    assert len(in_memory) > ITEMS * 0.9

    def accuracy(name: str, data: Path) -> float:
        options = run(tmp_path / name, data=(str(data),), model=str(base), num_train_epochs=12.0, learning_rate=3e-3)
        reward(RewardConfig(**options))
        judged = evaluate(EvalConfig("reward_accuracy", str(tmp_path / name / "model"), (str(held_out),)))
        return float(judged["rate"])

    from_page = accuracy("page", exported)
    from_memory = accuracy("memory", write_rows(tmp_path / "in_memory.jsonl", in_memory))
    assert abs(from_page - from_memory) <= 0.03 and from_page > 0.85, (from_page, from_memory)
    tokenizer = Tokenizer.from_pretrained(base)  # what is learned from is the same to the last token, order and group
    read = [load_rankings(path, tokenizer, 128).fingerprint for path in (exported, tmp_path / "in_memory.jsonl")]
    assert read[0] == read[1]
    # the negative control: letters that were not turned back into places
    store = Store(out, read_only=True)
    confused = []
    for row in export_rows(store.state, "ranking").rows:
        order = store.state.order("Ann", row["item"])
        assert order is not None
        confused.append({**row, "ranking": [[order.index(place) for place in group] for group in row["ranking"]]})
    store.close()
    assert accuracy("confused", write_rows(tmp_path / "confused.jsonl", confused)) < from_page - 0.03

    # and the other loops take what the same file gives
    for form in ("preference", "preference_implicit", "unpaired"):
        assert main(["label", "export", str(out), "--to", form, str(tmp_path / f"{form}.jsonl")]) == 0
        kind: Any = "kto" if form == "unpaired" else "sigmoid"
        options = run(tmp_path / form, data=(str(tmp_path / f"{form}.jsonl"),), model=str(base), max_steps=2, loss_type=kind)
        dpo(DpoConfig(**options))
        assert (tmp_path / form / "model" / "config.json").exists()
    options = run(tmp_path / "ppo", data=(str(exported),), model=str(base), max_steps=1, batch_size=8)
    judge_folder = str(tmp_path / "page" / "model")
    ppo(PpoConfig(**options, reward_model=judge_folder, max_completion_length=8))
    assert (tmp_path / "ppo" / "model" / "config.json").exists()


def test_what_was_written_is_what_a_model_is_taught(tmp_path: Path, forks: Forker) -> None:
    world = World(0, 16)
    rows = asked(world, 12)
    base = fresh_model(tmp_path / "base", rows)
    facts = {row["prompt"]: fact_of(row) for row in rows}
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    out = tmp_path / "feedback.db"
    child = forks.start("children:serve", config={"out": str(out), "prompts": str(prompts), "task": "write"})
    page = Page(address_of(child.output))
    page.judge_all(lambda item: {"text": answers(facts[item["prompt"][0]["content"]], "kind")[0]})
    page.close()
    written = tmp_path / "demonstrations.jsonl"
    assert main(["label", "export", str(out), "--to", "demonstrations", str(written)]) == 0
    assert [json.loads(line)["completion"] for line in written.read_text().splitlines()] == [
        " " + answers(facts[row["prompt"]], "kind")[0] for row in rows
    ]
    options = run(tmp_path / "sft", data=(str(written),), model=str(base), num_train_epochs=10.0, batch_size=4)
    result = sft(SftConfig(**options))
    assert dataclasses.asdict(result) and (tmp_path / "sft" / "model" / "config.json").exists()
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130
