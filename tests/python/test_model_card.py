"""Model cards: what a saved model says of itself, and what is taken of a stranger's card."""

from __future__ import annotations

import itertools
import logging
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tutelage.hub.model_card import CARD, Lineage, Stage, adapter_card, adapter_lineage, card, may_replace, read_lineage
from tutelage.lora import LoraConfig

SFT = Stage("sft", {"data": ["rows.jsonl"], "steps": 40, "loss": 1.25})
PPO = Stage("ppo", {"reward_funcs": ["judge.py:right"], "score": -0.5, "whiten": True})


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).write_text(text)
    return folder


def front_matter(text: str) -> dict[str, Any]:
    document = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(document, dict)
    return document


def made(lineage: Lineage, head: Any = "lm", reward_bias: float = 0.0) -> str:
    return card(head, "LlamaForCausalLM", 1234567, "bfloat16", lineage, reward_bias).decode()


def test_a_card_says_what_was_done() -> None:
    lineage = Lineage("org/base", {"license": "apache-2.0", "language": ["en", "de"]}).then(SFT).then(None).then(PPO)
    text = made(lineage)
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "tags": ["tutelage", "sft", "ppo"],
        "tutelage": [
            {"command": "sft", "data": ["rows.jsonl"], "steps": 40, "loss": 1.25},
            {"command": "ppo", "reward_funcs": ["judge.py:right"], "score": -0.5, "whiten": True},
        ],
    }
    assert "LlamaForCausalLM, 1,234,567 parameters, stored as bfloat16. It began as `org/base`." in text
    assert "1. `tutelage sft`\n\n   * data: rows.jsonl\n   * steps: 40\n   * loss: 1.25\n" in text
    assert "2. `tutelage ppo`" in text and "reward_bias" not in text
    assert "It began with random weights." in made(Lineage()) and "How it was made" not in made(Lineage())


def test_a_reward_models_card_tells_of_the_bias_and_of_padding() -> None:
    text = made(Lineage(), "scalar", 0.75)
    assert front_matter(text)["pipeline_tag"] == "text-classification"
    assert "`reward_bias` in config.json is 0.75" in text and "AutoModelForSequenceClassification" in text
    assert "a padding token that no text ends with" in text


BASE = Lineage("org/base", {"license": "mit"}).then(Stage("convert", {"source": "base.gguf"}))


def adapters(lineage: Lineage, base: Lineage = BASE, head: Any = "lm", lora: LoraConfig | None = None) -> str:
    lora = lora or LoraConfig(8, 16, ("q_proj", "v_proj"))
    return adapter_card(head, lora, 4321, 1234567, lineage, base, 0.75).decode()


def test_an_adapters_card_says_what_was_done_to_it_and_what_to_the_model_under_it() -> None:
    text = adapters(BASE.then(SFT))
    assert front_matter(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "license": "mit",
        "tags": ["tutelage", "lora", "convert", "sft"],
        "tutelage": [
            {"command": "convert", "source": "base.gguf"},
            {"command": "sft", "data": ["rows.jsonl"], "steps": 40, "loss": 1.25},
        ],
    }
    assert (
        "LoRA of rank 8, alpha 16, on q_proj, v_proj: 4,321 parameters, as float32. It goes on the model of 1,234,567 "
        "parameters that `base_model_name_or_path` in adapter_config.json names, which began as `org/base` and had been "
        "through `convert`.\n"
    ) in text
    assert "1. `tutelage convert` (the model under it)\n" in text and "2. `tutelage sft`\n" in text
    assert "reward_bias" not in text and "num_labels" not in text
    published, own = Lineage("org/base"), Lineage()
    assert "names, which is `org/base`.\n" in adapters(published.then(SFT), published)
    assert "(the model under it)" not in adapters(published.then(SFT), published)
    text = adapters(own.then(SFT), own, lora=LoraConfig(8, 16, (), use_rslora=True))
    assert "alpha 16 / √rank, on all linear layers: 4,321" in text and "names, which began with random weights.\n" in text
    assert "base_model" not in front_matter(text)


def test_a_reward_adapters_card_tells_of_the_bias_and_of_padding() -> None:
    text = adapters(BASE.then(Stage("reward")), head="scalar")
    assert front_matter(text)["pipeline_tag"] == "text-classification"
    assert (
        "`reward_bias` in the metadata of adapter_model.safetensors is 0.75. tutelage subtracts it from every reward and PEFT"
        in text
    )
    assert 'AutoModelForSequenceClassification.from_pretrained("the model under it", num_labels=1)' in text
    assert "a padding token that no text ends with" in text


def test_an_adapters_history_is_that_of_its_card(tmp_path: Path) -> None:
    assert adapter_lineage(tmp_path / "none", BASE) == BASE
    write(tmp_path / "ours", adapters(BASE.then(SFT)))
    assert adapter_lineage(tmp_path / "ours", BASE) == BASE.then(SFT)
    write(tmp_path / "theirs", "---\nlicense: apache-2.0\nlanguage: de\nbase_model: runs/base\n---\n# Their words\n")
    theirs = adapter_lineage(tmp_path / "theirs", BASE)
    assert theirs == Lineage("theirs", {"license": "apache-2.0", "language": "de"}, BASE.stages)
    text = adapters(theirs.then(SFT))
    assert "which began as `org/base` and had been through `convert`. The adapter began as `theirs`.\n" in text
    assert "1. `tutelage convert` (the model under it)" in text and "2. `tutelage sft`\n" in text


def test_a_line_of_models_keeps_its_history(tmp_path: Path) -> None:
    first = Lineage("org/base", {"license": "mit"}).then(SFT)
    write(tmp_path / "sft", made(first))
    second = read_lineage(tmp_path / "sft")
    assert second == first
    write(tmp_path / "ppo", made(second.then(PPO)))
    assert read_lineage(tmp_path / "ppo") == first.then(PPO)
    write(tmp_path / "own", made(Lineage().then(Stage("pretrain"))))
    assert read_lineage(tmp_path / "own") == Lineage(stages=(Stage("pretrain"),))  # the folder's name is nobody's base model


@pytest.mark.parametrize(
    ("folder", "name"),
    [("SmolLM2-135M", "SmolLM2-135M"), ("models--Org--SmolLM2-135M/snapshots/0123abcd", "Org/SmolLM2-135M")],
)
def test_a_published_model_is_the_base_model(tmp_path: Path, folder: str, name: str) -> None:
    assert read_lineage(tmp_path / folder) == Lineage(name)
    theirs = "license: apache-2.0\nlanguage:\n- en\nbase_model: other\nwidget: [1]\ntutelage: [{command: sft}]\n"
    text = f"---\n{theirs}---\n# Their words\n"
    given = read_lineage(write(tmp_path / folder, text))
    assert given == Lineage(name, {"license": "apache-2.0", "language": ["en"]})


def test_only_our_own_card_is_replaced(tmp_path: Path) -> None:
    assert may_replace(tmp_path / CARD)
    write(tmp_path, made(Lineage()))
    assert may_replace(tmp_path / CARD)
    write(tmp_path, "\n".join(line for line in made(Lineage()).splitlines() if not line.startswith("<!--")))
    assert not may_replace(tmp_path / CARD)


DEEP = "[" * 5_000
BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}]\n" for p, n in itertools.pairwise("abcdefghijklmnopq")
)


@pytest.mark.parametrize(
    "front",
    [
        "license: [",
        DEEP,
        "license: 2001-99-99",
        "{a: b",
        "- just\n- a list",
        "license: !!python/object:os.system ls",
        "\x00",
        "a: b\n" * 20_000,
    ],
)
def test_a_card_that_is_no_yaml_passes_nothing_on(tmp_path: Path, front: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_lineage(write(tmp_path / "base", f"---\n{front}\n---\n")) == Lineage("base")
    assert (
        front.startswith("- just") or "base/README.md: the front matter cannot be read and passes nothing on: " in caplog.text
    )


def test_of_a_strangers_card_only_short_plain_values_are_taken(tmp_path: Path) -> None:
    fields = f"license: {'x' * 301}\nlanguage: {{a: b}}\ndatasets: [one, 2, [three], null]\nlicense_name: *q\n"
    given = read_lineage(write(tmp_path / "base", f"---\n{BOMB}{fields}---\n"))
    assert given == Lineage("base", {"datasets": ["one"]})
    assert len(made(given)) < 1000
    ours = front_matter(made(Lineage().then(SFT)))
    hostile: list[Any] = [
        "x",
        {"command": 3},
        {"command": "rm -rf"},
        {"command": "sft", "deep": {"a": 1}, 7: 8, "loss": math.inf, "big": 10**400, "long": "y" * 301, "list": [1, None, [2]]},
    ]
    mark = next(line for line in made(Lineage()).splitlines() if line.startswith("<!--"))
    write(tmp_path / "ours", f"---\n{yaml.safe_dump({**ours, 'tutelage': hostile})}---\n{mark}\n")
    (stage,) = read_lineage(tmp_path / "ours").stages
    assert stage == Stage("sft", {"list": [1], "loss": math.inf})
    assert "loss: inf" in made(Lineage().then(stage))


def test_a_card_that_is_too_large_passes_nothing_on(tmp_path: Path) -> None:
    text = "---\nlicense: mit\n---\n" + "x" * (1 << 20)
    assert read_lineage(write(tmp_path / "base", text)) == Lineage("base")


def test_mutated_cards_are_read_or_pass_nothing_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    chance = random.Random(0)
    whole = made(Lineage("org/base", {"license": "mit"}).then(SFT).then(PPO)).encode()
    for _ in range(300):
        text = bytearray(whole)
        for _ in range(chance.randint(1, 5)):
            at = chance.randrange(len(text))
            text[at : at + chance.randrange(4)] = chance.choice([b"&a", b"*a", b"[", b"\xff", b"- ", b"\n", b"{", b": ", b""])
        (tmp_path / CARD).write_bytes(bytes(text))
        made(read_lineage(tmp_path))
