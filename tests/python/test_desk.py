"""What the page is told: who gets which item, what counts, what is taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelling_for_tests import in_order, items, new_store
from tutelage.feedback.desk import Conflict, Desk
from tutelage.feedback.state import HOLD_SECONDS, Event, Settings, State
from tutelage.feedback.store import Store
from tutelage.feedback.tasks import AnswerError, blind_order

RANKED = {"ranking": [["A"], ["B"], ["C"], ["D"]]}


def submit(desk: Desk, labeller: str, item: int, submission: str, answer: object = None, **others: Any) -> Any:
    request = {"labeller": labeller, "item": item, "submission": submission, "seconds": 1, "answer": answer or RANKED}
    return desk.submit({**request, **others})


def conflict(call: Any, message: str) -> Conflict:
    with pytest.raises(Conflict, match=message) as raised:
        call()
    return raised.value


def test_a_whole_session(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db", count=3)
    desk = Desk(store, title="Kindness", guidelines="Kind before rude.")
    told = desk.session()
    assert (told["task"], told["k"], told["title"], told["guidelines"]) == ("rank", 4, "Kindness", "Kind before rude.")
    assert told["labellers"] == [] and told["progress"]["total"] == told["progress"]["ready"] == 3 and told["flags"] == []
    found = desk.next({"labeller": " Ann "})
    item = found["item"]
    assert item["id"] == 0 and item["number"] == 1 and item["draft"] is None and item["comment"] == ""
    assert [answer["id"] for answer in item["answers"]] == ["A", "B", "C", "D"]
    order = blind_order(0, 0, "Ann", 4)
    assert [answer["text"] for answer in item["answers"]] == [f" answer 0.{place}" for place in order]
    assert desk.next({"labeller": "Ann"}) == found  # a reload shows the same
    answer = in_order(item)
    found = submit(desk, "Ann", 0, "submission-0", answer, comment="hm", seconds=3)
    assert found["item"]["id"] == 1 and found["item"]["number"] == 2 and found["item"]["progress"]["done_by_me"] == 1
    found = desk.skip({"labeller": "Ann", "item": 1, "submission": "submission-1", "reason": "unclear"})
    assert found["item"]["progress"]["skipped_by_me"] == 1
    found = submit(desk, "Ann", 2, "submission-2", seconds=5)
    assert found["finished"] and found["progress"] == {
        "total": 3,
        "ready": 3,
        "done_by_me": 2,
        "done": 2,
        "skipped_by_me": 1,
        "seconds_median": 4.0,
    }
    # what is kept speaks of places
    kept = store.state.answers()[0]
    assert kept.body == {"ranking": [[0], [1], [2], [3]]} and kept.comment == "hm" and kept.seconds == 3
    assert desk.session("Ann")["labellers"] == ["Ann"]
    store.close()


def test_sent_twice_counts_once(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db")
    desk = Desk(store)
    desk.next({"labeller": "Ann"})
    first = submit(desk, "Ann", 0, "the-same-one")
    assert submit(desk, "Ann", 0, "the-same-one") == first
    assert submit(desk, "Ann", 0, "the-same-one", {"ranking": [["A", "B", "C", "D"]]}) == first  # whatever it says now
    assert store.state.answers()[0].body != {"ranking": [[0, 1, 2, 3]]}
    assert len(store.state.answers()) == 1 and first["item"]["id"] == 1
    # after an undo, the one that was lost on the way does not come back
    assert desk.undo({"labeller": "Ann"})["item"]["id"] == 0
    assert submit(desk, "Ann", 0, "the-same-one")["item"]["id"] == 0 and store.state.answers() == []
    reused = conflict(lambda: submit(desk, "Ann", 1, "the-same-one"), "this submission was used before, for something else")
    assert reused.instead["next"]["item"]["id"] == 0
    conflict(lambda: submit(desk, "Bob", 0, "the-same-one"), "used before")
    store.close()


def test_two_tabs(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db")
    desk = Desk(store)
    one, other = desk.next({"labeller": "Ann"}), desk.next({"labeller": "Ann"})
    assert one == other
    submit(desk, "Ann", 0, "from-one-tab")
    late = conflict(lambda: submit(desk, "Ann", 0, "from-the-other"), "you have answered this item already, perhaps in another")
    assert late.instead["next"]["item"]["id"] == 1 and len(store.state.answers()) == 1
    conflict(
        lambda: desk.skip({"labeller": "Ann", "item": 0, "submission": "skip-from-it", "reason": "other"}), "answered this item"
    )
    desk.skip({"labeller": "Ann", "item": 1, "submission": "skip-from-one", "reason": "other"})
    conflict(lambda: submit(desk, "Ann", 1, "and-answer-it"), "you have skipped this item already")
    store.close()


def test_undo(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db")
    desk = Desk(store)
    assert str(conflict(lambda: desk.undo({"labeller": "Ann"}), "there is nothing to take back")) and desk.next(
        {"labeller": "Ann"}
    )
    answer = {"ranking": [["C"], ["A", "D"], ["B"]]}
    submit(desk, "Ann", 0, "submission-0", answer, comment="close")
    desk.skip({"labeller": "Ann", "item": 1, "submission": "submission-1", "reason": "broken", "comment": "odd"})
    back = desk.undo({"labeller": "Ann"})["item"]
    assert back["id"] == 1 and back["draft"] is None and back["comment"] == "odd" and back["number"] == 2
    back = desk.undo({"labeller": "Ann"})["item"]
    assert back["id"] == 0 and back["draft"] == answer and back["comment"] == "close" and back["number"] == 1
    assert back["progress"]["done_by_me"] == back["progress"]["skipped_by_me"] == 0
    conflict(lambda: desk.undo({"labeller": "Ann"}), "nothing to take back")
    assert desk.next({"labeller": "Ann"})["item"] == back  # also after a reload
    # said anew, then the one that was on the screen before comes again
    found = submit(desk, "Ann", 0, "submission-2")
    assert found["item"]["id"] == 1 and found["item"]["comment"] == "odd"
    assert submit(desk, "Ann", 1, "submission-3")["item"]["id"] == 2
    assert submit(desk, "Ann", 2, "submission-4")["finished"]
    assert desk.undo({"labeller": "Ann"})["item"]["id"] == 2  # also from the end
    assert len(store.state.answers()) == 2
    store.close()


def test_undo_sent_twice_takes_back_once(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db")
    desk = Desk(store)
    desk.next({"labeller": "Ann"})
    submit(desk, "Ann", 0, "submission-0")
    submit(desk, "Ann", 1, "submission-1")
    request = {"labeller": "Ann", "submission": "take-it-back"}
    first = desk.undo(request)
    assert first["item"]["id"] == 1 and desk.undo(request) == first and len(store.state.answers()) == 1
    assert desk.undo({"labeller": "Ann"})["item"]["id"] == 0  # the negative control: without one it is another
    conflict(lambda: desk.undo({"labeller": "Ann", "submission": "submission-0"}), "used before, for something else")
    conflict(lambda: submit(desk, "Ann", 0, "take-it-back"), "used before, for something else")
    with pytest.raises(AnswerError, match="submission must be"):
        desk.undo({"labeller": "Ann", "submission": 7})
    store.close()
    again = Store(tmp_path / "f.db")
    assert Desk(again).undo(request)["item"]["id"] == 0 and again.state.answers() == []
    again.close()


def test_drafts_of_every_task(tmp_path: Path) -> None:
    answers: dict[Any, Any] = {
        "compare": {"choice": "B"},
        "rate": {"ratings": {letter: {"score": 2, "flags": ["violent"]} for letter in "ABC"}},
        "write": {"text": "Well."},
    }
    for task, answer in answers.items():
        store = new_store(tmp_path / f"{task}.db", task)
        desk = Desk(store)
        item = desk.next({"labeller": "Ann"})["item"]
        assert len(item["answers"]) == {"compare": 2, "rate": 3, "write": 1}[task]
        submit(desk, "Ann", 0, "submission-0", answer)
        assert desk.undo({"labeller": "Ann"})["item"]["draft"] == answer
        assert len(desk.session()["flags"]) == (11 if task == "rate" else 0)
        store.close()
    store = new_store(tmp_path / "none.db", "write", answers=0)
    assert Desk(store).next({"labeller": "Ann"})["item"]["answers"] == []
    store.close()


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def test_several_labellers_and_overlap(tmp_path: Path) -> None:
    clock = Clock()
    store = new_store(tmp_path / "f.db", count=2, overlap=2, clock=clock)
    desk = Desk(store)

    def shown(name: str) -> Any:
        found = desk.next({"labeller": name})
        return found["item"]["id"] if "item" in found else "waiting" if "waiting" in found else "finished"

    assert [shown("Ann"), shown("Bob")] == [0, 0]  # two are wanted
    assert shown("Cem") == 1  # and the first has two
    submit(desk, "Ann", 0, "ann-on-the-first")
    submit(desk, "Bob", 0, "bob-on-the-first")
    assert desk.progress()["progress"]["done"] == 1 and desk.progress()["agreement"]["items"] == 1
    # the second is on Cem's and on Ann's screen (shown after her submission): Bob's too would be one too many
    assert shown("Ann") == 1 and shown("Bob") == "waiting"
    clock.now += HOLD_SECONDS  # Cem has gone to lunch, and so has Ann
    assert shown("Bob") == 1
    submit(desk, "Bob", 1, "bob-on-the-second")
    submit(desk, "Cem", 1, "cem-on-the-second")  # back again: nothing that is said is lost
    assert shown("Bob") == "finished" and shown("Dee") == "finished"
    submit(desk, "Ann", 1, "ann-on-the-second")
    assert desk.progress("Ann")["progress"]["done"] == 2 and desk.progress()["agreement"]["items"] == 2
    assert store.state.is_complete
    store.close()


def test_what_one_skips_another_gets(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db", count=1)
    desk = Desk(store)
    desk.next({"labeller": "Ann"})
    assert desk.skip({"labeller": "Ann", "item": 0, "submission": "skip-this", "reason": "upsetting"})["finished"]
    assert store.state.is_complete
    assert desk.next({"labeller": "Bob"})["item"]["id"] == 0
    store.close()


def test_orders_of_items(tmp_path: Path) -> None:
    def met(name: str, **options: Any) -> list[int]:
        store = new_store(tmp_path / f"{name}.db", count=6, **options)
        desk, found = Desk(store), []
        if options.get("order") == "spread":
            store.add_spreads({number: (number * 7) % 6 / 10 for number in range(6)})
        shown = desk.next({"labeller": "Ann"})
        while "item" in shown:
            found.append(shown["item"]["id"])
            shown = submit(desk, "Ann", found[-1], f"submission-{found[-1]}")
        store.close()
        return found

    assert met("given") == [0, 1, 2, 3, 4, 5]
    assert met("spread", order="spread") == [5, 4, 3, 2, 1, 0]
    shuffled = [met(f"seed-{seed}", order="shuffled", seed=seed) for seed in (0, 1)]
    assert shuffled[0] != shuffled[1] and all(sorted(found) == [0, 1, 2, 3, 4, 5] for found in shuffled)
    assert met("again", order="shuffled", seed=1) == shuffled[1]


def test_what_is_refused_leaves_no_trace(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db")
    desk = Desk(store)
    desk.next({"labeller": "Ann"})
    count = store._connection.execute("SELECT count(*) FROM event").fetchone()
    base = {"labeller": "Ann", "item": 0, "submission": "submission-0", "seconds": 1, "answer": RANKED, "comment": ""}
    for field, value, message in [
        ("labeller", "", "labeller is empty"),
        ("item", None, "item must be the number of an item"),
        ("item", "0", "item must be the number"),
        ("item", True, "item must be the number"),
        ("submission", "", "submission must be"),
        ("seconds", -1, "seconds must be"),
        ("answer", {"ranking": []}, "ranking must name"),
        ("comment", 3, "comment is int"),
    ]:
        with pytest.raises(AnswerError, match=message):
            desk.submit({**base, field: value})
    for item in (1, 99, -1, 10**30):
        assert "item" in conflict(lambda item=item: desk.submit({**base, "item": item}), "was not given to Ann").instead["next"]
    with pytest.raises(AnswerError, match="reason must be one of"):
        desk.skip({**base, "reason": "none"})
    assert store._connection.execute("SELECT count(*) FROM event").fetchone() == count
    assert submit(desk, "Ann", 0, "submission-0")["item"]["id"] == 1
    store.close()


def test_a_problem_is_told(tmp_path: Path) -> None:
    store = new_store(tmp_path / "f.db", order="spread")
    assert Desk(store, lambda: "no more answers come: oh")._next(store.state, "Ann")["problem"] == "no more answers come: oh"
    assert Desk(store).progress()["problem"] is None
    store.close()


@given(st.data())
@settings(max_examples=60)
def test_whatever_happens_the_counts_are_those_of_the_events(data: st.DataObject) -> None:
    """Against a plain recount of the whole history, after every event."""
    names, overlap = ["Ann", "Bob", "Cem"], data.draw(st.integers(1, 3))
    state = State(Settings("compare", 2, overlap=overlap))
    for item in items(3, 2):
        state.add_item(item)
    history: list[Event] = []
    for number in range(data.draw(st.integers(0, 25))):
        name = data.draw(st.sampled_from(names))
        last, held = state.last(name), state.open_item(name)
        kinds = ["undo"] * (last is not None) + ["answer", "skip"] * (held is not None) + ["shown"]
        kind = data.draw(st.sampled_from(kinds))
        body: dict[str, Any] = {"order": [0, 1]}
        if kind == "shown":
            found = state.next_item(name, 0.0)
            if not isinstance(found, int) or found == held:
                continue
            item_id = found
        elif kind == "undo":
            assert last is not None
            item_id, body = last.item, {"event": last.id}
        else:
            assert held is not None
            item_id, body = (
                held,
                {"choice": data.draw(st.sampled_from([0, 1, "tie"]))} if kind == "answer" else {"reason": "other"},
            )
        event = Event(number + 1, 0.0, kind, name, item_id, None, float(number), body)  # type: ignore[arg-type]
        history.append(event)
        state.apply(event)
        standing = {(e.labeller, e.item): e for e in history if e.kind in ("answer", "skip")}
        for e in history:
            if e.kind == "undo":
                standing = {key: kept for key, kept in standing.items() if kept.id != e.body["event"]}
        answers = [e for e in standing.values() if e.kind == "answer"]
        assert {e.id for e in state.answers()} == {e.id for e in answers}
        by_item = {number: [e for e in answers if e.item == number] for number in range(3)}
        dealt = {number: [e for e in standing.values() if e.item == number] for number in range(3)}
        progress = state.progress(name)
        assert progress.done == sum(len(found) >= overlap for found in by_item.values())
        assert state.is_complete == all(len(found) >= overlap for found in dealt.values())
        assert progress.done_by_me == sum(e.labeller == name for e in answers)
        assert progress.skipped_by_me == sum(e.labeller == name and e.kind == "skip" for e in standing.values())
        assert state.agreement().items == sum(len(found) >= 2 for found in by_item.values())
        seconds = sorted(e.seconds for e in answers if e.labeller == name)
        assert (progress.seconds_median is None) == (not seconds)
