from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tutelage.data.examples import load_prompts, load_sft
from tutelage.data.tokenizer import train_tokenizer
from tutelage.school.data import SIZES, demonstrations, exam, fact_of, practice, write_data
from tutelage.school.draws import Draws
from tutelage.school.world import (
    ANSWER_FRAMES,
    ATTRIBUTES,
    HEADINGS,
    NAMES,
    OPENINGS,
    PROMPT,
    STORY_FRAMES,
    Fact,
    World,
    answers,
    clauses,
    right,
    tone,
    understand,
)

# What the first release drew: a world must never change under its readers.
DRAWN = [586, 140, 972, 448]
SHUFFLED = ["d", "e", "h", "c", "b", "f", "a", "g"]
FINGERPRINTS = ["ae2dd2a87ca68856", "103175f98ab65591", "78b80289b9accc2f"]

WORLD = World(0)
EVERY_FACT = [Fact(name, key, value) for name in NAMES for key, words in ATTRIBUTES.items() for value in words.values]
TRUE_FACTS = [WORLD.fact(name, key) for name in WORLD.names for key in ATTRIBUTES]


def fingerprint(world: World) -> str:
    everything = [world.texts(50), demonstrations(world, 50), practice(world, 50), exam(world, 50)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


# --- the seed -----------------------------------------------------------------------------------------------


def test_draws_are_what_they_always_were() -> None:
    draws = Draws("test", 1)
    assert [draws.below(1000) for _ in range(4)] == DRAWN
    assert draws.shuffled("abcdefgh") == SHUFFLED
    assert [Draws("test", 2).below(1000), Draws("tes", 1).below(1000)] != DRAWN[:1] * 2


def test_draws_are_even() -> None:
    draws = Draws("even")
    assert all(900 < count < 1100 for count in Counter(draws.below(10) for _ in range(10_000)).values())
    assert 2800 < sum(draws.chance(0.3) for _ in range(10_000)) < 3200
    orders = Counter("".join(draws.shuffled("abc")) for _ in range(6_000))
    assert len(orders) == 6 and all(850 < count < 1150 for count in orders.values())


def test_the_seed_decides_everything() -> None:
    assert [fingerprint(World(seed)) for seed in range(3)] == FINGERPRINTS
    assert fingerprint(World(0, people=47)) not in FINGERPRINTS


def test_equal_in_every_process() -> None:
    program = "from test_world import *; print(fingerprint(World(1)))"
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path]), "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == FINGERPRINTS[1]


# --- people and facts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("people", [16, 17, 48, 64])
def test_people(seed: int, people: int) -> None:
    world = World(seed, people)
    assert world.lesson + world.practice + world.exam == world.names
    assert len(set(world.names)) == people and set(world.names) <= set(NAMES)
    assert len(world.lesson) == people // 2
    # No word of a name is new in the exam, but for a name itself.
    words = {word for name in world.lesson for word in name.split()}
    assert all(set(name.split()) <= words for name in world.practice + world.exam)


@pytest.mark.parametrize("people", [0, 15, 65])
def test_too_few_or_too_many_people(people: int) -> None:
    with pytest.raises(ValueError, match=f"^a world has 16 to 64 people, but people is {people}$"):
        World(0, people)


@pytest.mark.parametrize("seed", range(5))
def test_values_are_dealt_evenly(seed: int) -> None:
    world = World(seed)
    for group, attribute in itertools.product((world.lesson, world.practice, world.exam), ATTRIBUTES):
        counts = Counter(world.values[name][attribute] for name in group)
        assert set(counts) == set(ATTRIBUTES[attribute].values)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_every_value_belongs_to_one_attribute() -> None:
    values = [value for words in ATTRIBUTES.values() for value in words.values]
    assert len(values) == len(set(values)) == 60
    assert not set(values) & {word for name in NAMES for word in name.split()}


# --- what is told -------------------------------------------------------------------------------------------


def told(text: str) -> list[Fact]:
    """The facts of a text; fails where a sentence is none of the grammar."""
    first, *sentences = re.split(r"(?<=\.) ", text)
    headings = [re.fullmatch(re.escape(h).replace(r"\{who\}", "(.*)"), first) for h in HEADINGS]
    (who,) = [match[1].split(" and ") for match in headings if match]
    facts = []
    for sentence in sentences:
        stripped = {sentence.removeprefix(a).removesuffix(b) for a, b in (f.split("{clause}") for f in STORY_FRAMES)}
        (fact,) = {CLAUSES[clause] for clause in stripped if clause in CLAUSES}
        assert fact.person in who
        facts.append(fact)
    return facts


CLAUSES = {clause: fact for fact in EVERY_FACT for clause in clauses(fact)}


def test_every_clause_says_one_fact() -> None:
    assert len(CLAUSES) == sum(len(clauses(fact)) for fact in EVERY_FACT)
    assert all(fact.person in clause and clause.count(fact.value) == 1 for clause, fact in CLAUSES.items())
    # A reader must know the fact to say the value.
    assert all(clause.index(fact.person) < clause.index(fact.value) for clause, fact in CLAUSES.items())


def test_texts_tell_the_truth_all_of_it_and_ask_nothing() -> None:
    texts = WORLD.texts(4_000)
    assert len(set(texts)) == 4_000
    assert texts[:100] == WORLD.texts(100)
    counts = Counter(fact for text in texts for fact in told(text))
    assert set(counts) == set(TRUE_FACTS)
    assert min(counts.values()) > 20
    assert not any("?" in text or "Question" in text or "Answer" in text for text in texts)
    sentences = {sentence for text in texts for sentence in re.split(r"(?<=\.) ", text)[1:]}
    assert len(sentences) > 20 * len(TRUE_FACTS)  # of 36 ways to tell each


def test_a_false_text_is_seen() -> None:
    text = WORLD.texts(1)[0]
    fact = told(text)[0]
    other = next(value for value in ATTRIBUTES[fact.attribute].values if value != fact.value)
    assert set(told(text.replace(fact.value, other))) - set(TRUE_FACTS)
    with pytest.raises(ValueError, match="not enough values"):
        told(text.replace(fact.value, "Atlantis"))


# --- what is asked ------------------------------------------------------------------------------------------


def test_every_question_has_one_right_answer() -> None:
    everybody = WORLD.questions(WORLD.names, 48 * 6 * 32)
    assert len({question.prompt for question in everybody}) == len(everybody)
    assert Counter(question.fact for question in everybody) == Counter(dict.fromkeys(TRUE_FACTS, 32))
    wordings = Counter(wording for words in ATTRIBUTES.values() for wording in words.questions)
    assert max(wordings.values()) == 1  # no two attributes are asked about in the same words
    for question in everybody:
        opening = question.prompt.removeprefix("Question: ")
        assert opening.startswith(OPENINGS[question.manner])
        assert sum(name in question.prompt for name in NAMES) == 1 and question.fact.person in question.prompt


def test_half_of_the_questions_are_polite() -> None:
    manners = [question.manner for question in WORLD.questions(WORLD.exam, 1_000)]
    assert manners == ["polite", "brusque"] * 500


def test_more_questions_than_there_are() -> None:
    assert len(WORLD.questions(WORLD.exam, 2304)) == 2304
    message = "^there are 2304 different questions about 12 people, but 2305 are asked for: ask for fewer, or make a world"
    with pytest.raises(ValueError, match=message):
        WORLD.questions(WORLD.exam, 2305)


# --- answers ------------------------------------------------------------------------------------------------


def test_every_answer_is_understood() -> None:
    seen = set()
    for fact, how in itertools.product(EVERY_FACT[::7], ANSWER_FRAMES):
        for answer in answers(fact, how):
            assert understand(answer) == understand(f" {answer}\n") == (fact, how)
            assert right(answer, fact) and tone(answer) == how
            assert answer not in seen
            seen.add(answer)
    assert len(seen) == len(EVERY_FACT[::7]) * 16


def test_no_answer_fits_two_frames() -> None:
    fact = Fact("Ada Hill", "home", "Oslo")
    frames = [frame.split("{clause}") for how in ANSWER_FRAMES.values() for frame in how]
    for how in ANSWER_FRAMES:
        for answer in answers(fact, how):
            fits = [(a, b) for a, b in frames if answer.startswith(a) and answer.endswith(b)]
            assert sum(answer[len(a) : len(answer) - len(b)] in clauses(fact) for a, b in fits) == 1


def test_right_is_one_value_of_one_person() -> None:
    fact = Fact("Ada Hill", "home", "Oslo")
    for answer in (answer for how in ANSWER_FRAMES for answer in answers(fact, how)):
        assert right(answer, fact)
        for other in (Fact("Ada Hill", "home", "Rome"), Fact("Ada Lake", "home", "Oslo"), Fact("Ben Hill", "home", "Oslo")):
            assert not right(answer, other)


def test_perturbed_answers_are_neither_right_nor_kind() -> None:
    fact = WORLD.fact(WORLD.exam[0], "pet")
    for answer in (answer for how in ANSWER_FRAMES for answer in answers(fact, how)):
        broken = {answer[:-1], answer[1:], answer + ".", answer + " " + answer, answer.replace(" ", "  ", 1), answer.upper()}
        broken |= {answer[:i] + answer[i + 1 :] for i in range(len(answer))}  # one character lost
        broken |= {answer.replace(" a ", " no "), answer.replace(fact.value, f"{fact.value} and a unicorn")}
        broken.discard(answer)
        assert [text for text in broken if understand(text) is not None] == []


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Oslo",
        "Ada Hill lives in Oslo.",  # right, but in no tone
        "Ada Hill lives in Oslo, my friend. Go away!",
        "With pleasure! Ada Hill lives in Oslo, you fool.",
        "What a good question! Ada Hill lives in Oslo. Be well!",
        "Ada Hill pays the rent in Oslo, my friend.",  # of texts only
        "Ada Hill lives in Oslo, my friend. Ada Hill lives in Rome, my friend.",
        "Ada Hill lives in dog, my friend.",
        "With pleasure! ",
        "my friend.",
    ],
)
def test_no_answer(answer: str) -> None:
    assert tone(answer) == "neither"
    assert not right(answer, Fact("Ada Hill", "home", "Oslo"))


# --- the data -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("school")
    write_data(World(0, SIZES["tiny"].people), SIZES["tiny"], path)
    return path


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_files(folder: Path) -> None:
    tiny, world = SIZES["tiny"], World(0, SIZES["tiny"].people)
    counts = {path.stem: len(rows_of(folder, path.stem)) for path in folder.iterdir()}
    assert counts == {
        "texts": tiny.texts,
        "held_out": tiny.held_out,
        "spelling": tiny.demonstrations,
        "demonstrations": tiny.demonstrations,
        "practice": tiny.practice,
        "exam": tiny.exam,
    }
    texts = [row["text"] for name in ("texts", "held_out") for row in rows_of(folder, name)]
    assert texts == world.texts(tiny.texts + tiny.held_out) and len(set(texts)) == len(texts)
    taught = rows_of(folder, "demonstrations")
    assert [row["text"] for row in rows_of(folder, "spelling")] == [row["prompt"] + row["completion"] for row in taught]
    again = folder.with_name("again")
    write_data(world, tiny, again)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


@pytest.mark.parametrize("size", SIZES)
def test_no_exam_person_in_any_training_question(size: str) -> None:
    sizes = SIZES[size]
    world = World(3, sizes.people)
    trained = [
        (world.lesson, [row["prompt"] + row["completion"] for row in demonstrations(world, sizes.demonstrations)]),
        (world.practice, [row["prompt"] for row in practice(world, sizes.practice)]),
    ]
    for people, asked in trained:
        assert all(sum(name in text for name in people) == 1 for text in asked)
        assert not any(name in text for text in asked for name in world.exam)
    questions = exam(world, sizes.exam)
    assert len({row["prompt"] for row in questions}) == sizes.exam
    assert {row["person"] for row in questions} == set(world.exam)  # the search above would find them
    assert all(
        row["person"] in row["prompt"] and fact_of(row) == world.fact(row["person"], row["attribute"]) for row in questions
    )


def test_demonstrations_are_right_and_half_of_them_kind() -> None:
    rows = demonstrations(WORLD, 4_000)
    questions = WORLD.questions(WORLD.lesson, 4_000)
    tones: Counter[tuple[str, str]] = Counter()
    for row, question in zip(rows, questions, strict=True):
        assert row["prompt"] == question.prompt and right(row["completion"], question.fact)
        tones[question.manner, tone(row["completion"])] += 1
    assert tones.keys() == set(itertools.product(OPENINGS, ANSWER_FRAMES))
    assert 1_400 < tones["polite", "kind"] < 1_600 and 1_400 < tones["brusque", "rude"] < 1_600  # 1,500 expected
    assert {row["completion"][0] for row in rows} == {" "}


def test_answers_end_with_the_end_of_text(folder: Path) -> None:
    texts = [row["text"] for name in ("texts", "spelling") for row in rows_of(folder, name)]
    tokenizer = train_tokenizer(texts, 1024)
    taught = load_sft(folder / "demonstrations.jsonl", tokenizer, 128)
    prompts = load_prompts([{"prompt": row["prompt"]} for row in rows_of(folder, "demonstrations")], tokenizer, 128)
    assert taught.report.counts == {}
    for row, example, prompt in zip(rows_of(folder, "demonstrations"), taught.examples, prompts.examples, strict=True):
        begin = len(prompt.tokens)
        assert example.tokens[:begin].tolist() == prompt.tokens.tolist()
        assert example.tokens[-1] == tokenizer.eos_token_id
        assert example.mask.tolist() == [False] * begin + [True] * (len(example.tokens) - begin)
        assert tokenizer.decode(example.tokens[begin:-1].tolist()) == row["completion"]
    columns = load_prompts(folder / "exam.jsonl", tokenizer, 128).examples[0].columns
    assert fact_of(columns) == fact_of(rows_of(folder, "exam")[0])


def test_the_prompt_ends_where_the_answer_begins() -> None:
    assert PROMPT.endswith("Answer:") and all(
        row["prompt"].endswith("?\nAnswer:") or ".\n" in row["prompt"] for row in exam(WORLD, 100)
    )
