from __future__ import annotations

import itertools
import random

import pytest

from tutelage.data.examples import load_preferences, load_rankings
from tutelage.data.tokenizer import train_tokenizer
from tutelage.school.data import fact_of, practice
from tutelage.school.labeller import SimulatedLabeller, preference_rows
from tutelage.school.world import Fact, World, answers

FACT = Fact("Ada Hill", "home", "Oslo")
WRONG = Fact("Ada Hill", "home", "Rome")
RIGHT_KIND, RIGHT_RUDE = answers(FACT, "kind")[0], answers(FACT, "rude")[0]
WRONG_KIND, WRONG_RUDE = answers(WRONG, "kind")[0], answers(WRONG, "rude")[0]
NONSENSE = "Oslo Oslo"
BEST_FIRST = [RIGHT_KIND, RIGHT_RUDE, WRONG_KIND, NONSENSE, WRONG_RUDE]
EXACT = SimulatedLabeller(seed=0, noise=0.0)


def test_right_before_wrong_then_kind_before_rude() -> None:
    for order in itertools.permutations(range(5)):
        ranking = EXACT.rank("?", [BEST_FIRST[i] for i in order], FACT)
        assert [[order[i] for i in group] for group in ranking] == [[0], [1], [2], [3], [4]]


def test_ties_where_it_sees_no_difference() -> None:
    others = [answers(FACT, "kind")[3], answers(WRONG, "rude")[2]]
    assert EXACT.rank("?", [WRONG_RUDE, RIGHT_KIND, *others, RIGHT_KIND], FACT) == [[1, 2, 4], [0, 3]]


def test_the_truth_decides_what_is_right() -> None:
    assert EXACT.rank("?", [RIGHT_KIND, WRONG_KIND], FACT) == [[0], [1]]
    assert EXACT.rank("?", [RIGHT_KIND, WRONG_KIND], WRONG) == [[1], [0]]


# --- noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_each_judgement_is_turned_around_with_the_stated_probability(noise: float) -> None:
    labeller = SimulatedLabeller(seed=1, noise=noise)
    judged = [labeller.judge(f"prompt {number}", RIGHT_KIND, FACT) for number in range(4_000)]
    deviation = 4 * (noise * (1 - noise) / 4_000) ** 0.5
    assert sum(not is_right for is_right, _ in judged) / 4_000 == pytest.approx(noise, abs=deviation)
    assert sum(niceness == 0 for _, niceness in judged) / 4_000 == pytest.approx(noise, abs=deviation)
    both = sum(not is_right and niceness == 0 for is_right, niceness in judged) / 4_000
    assert both == pytest.approx(noise**2, abs=4 * (noise**2 * (1 - noise**2) / 4_000) ** 0.5)  # independent


def test_noise_depends_on_seed_prompt_and_answer_alone() -> None:
    prompts = [f"prompt {number}" for number in range(300)]
    labeller = SimulatedLabeller(seed=1, noise=0.3)
    judged = [labeller.judge(prompt, RIGHT_KIND, FACT) for prompt in prompts]
    assert judged == [SimulatedLabeller(seed=1, noise=0.3).judge(prompt, RIGHT_KIND, FACT) for prompt in prompts]
    assert judged != [SimulatedLabeller(seed=2, noise=0.3).judge(prompt, RIGHT_KIND, FACT) for prompt in prompts]
    assert judged != [labeller.judge(prompt, answers(FACT, "kind")[1], FACT) for prompt in prompts]
    for prompt in prompts[:50]:  # the order and the company of an answer change nothing
        mixed = random.Random(prompt).sample(range(5), 5)
        plain = labeller.rank(prompt, BEST_FIRST, FACT)
        ranking = labeller.rank(prompt, [BEST_FIRST[i] for i in mixed] + [RIGHT_KIND], FACT)
        assert [{BEST_FIRST[[*mixed, 0][i]] for i in group} for group in ranking] == [
            {BEST_FIRST[i] for i in group} for group in plain
        ]


@pytest.mark.parametrize("noise", [-0.1, 0.51, float("nan")])
def test_noise_out_of_range(noise: float) -> None:
    with pytest.raises(ValueError, match=f"^noise is a probability of 0 to 0.5, but it is {noise}$"):
        SimulatedLabeller(0, noise)


# --- rows ---------------------------------------------------------------------------------------------------


def test_rows_of_our_schema() -> None:
    world = World(0)
    texts, rankings, pairs = [], [], []
    for row in practice(world, 20):
        wrong = world.fact(world.lesson[0], row["attribute"])
        responses = [" " + answers(fact, how)[0] for fact in (wrong, fact_of(row)) for how in ("kind", "rude")]
        labelled = EXACT.label(row, responses)
        assert labelled == {"prompt": row["prompt"], "responses": responses, "ranking": [[2], [3], [0], [1]]}
        texts += [row["prompt"] + response for response in responses]
        rankings.append(labelled)
        pairs += preference_rows(labelled)
    tokenizer = train_tokenizer(texts, 600)
    loaded = load_rankings(rankings, tokenizer, 256)
    assert [example.ranking for example in loaded.examples] == [((2,), (3,), (0,), (1,))] * 20
    assert loaded.report.counts == {}
    assert len(load_preferences(pairs, tokenizer, 256)) == 20 * 6


def test_all_tied_is_no_row() -> None:
    row = practice(World(0), 1)[0]
    kind = answers(fact_of(row), "kind")
    assert EXACT.label(row, kind[:3]) is None
    assert EXACT.label(row, kind[:1]) is None
    assert EXACT.label(row, [kind[0], answers(fact_of(row), "rude")[0]]) is not None


def test_pairs_are_every_two_that_are_not_tied() -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranking": [[1], [0, 3], [2]]}
    pairs = [(pair["chosen"], pair["rejected"]) for pair in preference_rows(row)]
    assert pairs == [("b", "a"), ("b", "d"), ("b", "c"), ("a", "c"), ("d", "c")]
    assert {pair["prompt"] for pair in preference_rows(row)} == {"p"}


def test_equal_responses_give_a_pair_once() -> None:
    row = {"prompt": "p", "responses": ["a", "b", "a"], "ranking": [[0, 2], [1]]}
    assert preference_rows(row) == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
