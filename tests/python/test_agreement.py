"""Agreement: published examples, values worked out by hand, and what comes and goes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tutelage.feedback.agreement import Agreement, AgreementCounter, Coincidences, krippendorff_alpha, ranks


def units(*observers: str) -> list[list[str]]:
    """Values by unit, of one string of values an observer; a dot is none."""
    return [[value for value in unit if value != "."] for unit in zip(*observers, strict=True)]


# K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011: the examples of its sections A, B and C, D.
BINARY = units("0100000010", "1110010000")
NOMINAL = units("aabbdcccedda", "babbbcccedd" + "d")
FOUR = units("123321412...", "1233224125.3", ".3332342251.", "1233244125" + "1.")


def test_published_binary() -> None:
    # o_01 = 4, n_0 = 14, n_1 = 6: 1 - 19 * 4 / (14 * 6)
    assert krippendorff_alpha(BINARY, "nominal") == pytest.approx(1 - 76 / 84, abs=1e-12)
    assert round(krippendorff_alpha(BINARY, "nominal") or 0, 3) == 0.095


def test_published_nominal() -> None:
    # 9 of 12 units agree; n_a … n_e = 4, 6, 6, 6, 2
    assert krippendorff_alpha(NOMINAL, "nominal") == pytest.approx((23 * 18 - 104) / (24 * 23 - 104), abs=1e-12)
    assert round(krippendorff_alpha(NOMINAL, "nominal") or 0, 3) == 0.692


def test_published_four_observers_with_missing_values() -> None:
    assert round(krippendorff_alpha(FOUR, "nominal") or 0, 3) == 0.743
    assert round(krippendorff_alpha(FOUR, "ordinal") or 0, 3) == 0.815


def test_ordinal_by_hand() -> None:
    # Two people, three units: (1, 1), (2, 3), (3, 3). n_1 = 2, n_2 = 1, n_3 = 3, n = 6; o_23 = 1.
    # d_12 = (2 + 1 - 1.5)^2 = 2.25, d_13 = (2 + 1 + 3 - 2.5)^2 = 12.25, d_23 = (1 + 3 - 2)^2 = 4
    # expected = 2 * 1 * 2.25 + 2 * 3 * 12.25 + 1 * 3 * 4 = 90; alpha = 1 - 5 * 4 / 90
    assert krippendorff_alpha([[1, 1], [2, 3], [3, 3]], "ordinal") == pytest.approx(1 - 20 / 90, abs=1e-12)


def test_ends_of_the_scale() -> None:
    assert krippendorff_alpha([[1, 1], [2, 2]], "ordinal") == 1
    # as many equal as unequal pairs, each value as often: less than chance, as a pair is drawn without replacement
    assert krippendorff_alpha([[1, 2], [2, 1]], "nominal") == pytest.approx(1 - 3 * 2 / 4)
    assert krippendorff_alpha([[1, 1], [1, 1]], "nominal") is None
    assert krippendorff_alpha([[1], [2]], "nominal") is None
    assert krippendorff_alpha([], "ordinal") is None


def test_order_matters_to_ordinal_only() -> None:
    """Negative control: the metrics are two."""
    near, far = [[1, 2], [3, 3], [1, 1], [2, 2]], [[1, 3], [2, 2], [1, 1], [3, 3]]
    assert krippendorff_alpha(near, "nominal") == krippendorff_alpha(far, "nominal")
    assert (krippendorff_alpha(near, "ordinal") or 0) > (krippendorff_alpha(far, "ordinal") or 0)


def test_taking_out_leaves_nothing_behind() -> None:
    chance = random.Random(0)
    kept, both = Coincidences(), Coincidences()
    passing = []
    for number in range(200):
        values = [chance.randrange(5) for _ in range(chance.randrange(1, 5))]
        both.add(values)
        if number % 3:
            kept.add(values)
        else:
            passing.append(values)
    for values in passing:
        both.add(values, -1)
    assert both.alpha("ordinal") == kept.alpha("ordinal")
    assert both.alpha("nominal") == kept.alpha("nominal")


def test_ranks() -> None:
    assert ranks([[2], [0, 3], [1]]) == {2: 1, 0: 2.5, 3: 2.5, 1: 4}


def counted(task: Any, *judged: list[dict[str, Any]]) -> Agreement:
    counter = AgreementCounter(task)
    for bodies in judged:
        for number in range(len(bodies)):
            counter.replace(bodies[:number], bodies[: number + 1])
    return counter.agreement()


def test_of_rankings() -> None:
    # Of the six pairs of answers, {0, 1} is turned around and {2, 3} is tied by one: 4 of 6. The ranks are (1, 2), (2, 1),
    # (3, 3.5), (4, 3.5): n_1 = n_2 = n_3.5 = 2, n_3 = n_4 = 1, in order 1, 2, 3, 3.5, 4; o_12 = 2, o_3,3.5 = o_3.5,4 = 1.
    # d_12 = (4 - 2)^2 = 4, d_13 = (5 - 1.5)^2, d_1,3.5 = (7 - 2)^2, d_14 = (8 - 1.5)^2, d_23 = (3 - 1.5)^2,
    # d_2,3.5 = (5 - 2)^2, d_24 = (6 - 1.5)^2, d_3,3.5 = (3 - 1.5)^2, d_34 = (4 - 1)^2, d_3.5,4 = (3 - 1.5)^2
    # expected = 4*4 + 2*12.25 + 4*25 + 2*42.25 + 2*2.25 + 4*9 + 2*20.25 + 2*2.25 + 1*9 + 2*2.25 = 324
    # seen = 2*4 + 2.25 + 2.25 = 12.5; alpha = 1 - 7 * 12.5 / 324
    found = counted("rank", [{"ranking": [[0], [1], [2], [3]]}, {"ranking": [[1], [0], [2, 3]]}])
    assert found == Agreement(1, pytest.approx(100 * 4 / 6), pytest.approx(1 - 7 * 12.5 / 324, abs=1e-12))


def test_of_ratings_and_choices() -> None:
    def rated(*scores: int) -> dict[str, Any]:
        return {"ratings": [{"score": score, "flags": []} for score in scores]}

    assert counted("rate", [rated(1, 5), rated(1, 6)], [rated(3), rated(3)]) == Agreement(
        2, pytest.approx(200 / 3), krippendorff_alpha([[1, 1], [5, 6], [3, 3]], "ordinal")
    )
    choices = [[{"choice": 0}, {"choice": 0}, {"choice": "tie"}], [{"choice": "both_bad"}, {"choice": "both_bad"}]]
    assert counted("compare", *choices) == Agreement(
        2, 50.0, krippendorff_alpha([[0, 0, "tie"], ["both_bad", "both_bad"]], "nominal")
    )
    assert counted("write", [{"text": "a"}, {"text": "a"}]) == Agreement(0, None, None)


def test_of_one_person_there_is_none() -> None:
    assert counted("compare", [{"choice": 0}], [{"choice": 1}]) == Agreement(0, None, None)


def test_a_judgement_taken_back_does_not_count() -> None:
    counter = AgreementCounter("compare")
    same, other = {"choice": 0}, {"choice": 1}
    counter.replace([same], [same, other])
    assert counter.agreement().percent == 0
    counter.replace([same, other], [same])
    assert counter.agreement() == Agreement(0, None, None)
    counter.replace([same], [same, same])
    assert counter.agreement() == Agreement(1, 100.0, None)
