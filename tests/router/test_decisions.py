"""The ring of decisions: it keeps the newest, finds them by the clients' ids, and stays bounded."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from baton.router.decisions import MAX_TOLD, Decisions
from baton.router.request_ids import engine_id, split_engine_id


class Told:
    """A decision that counts how often it is rendered."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rendered = 0

    def as_dict(self) -> dict[str, Any]:
        self.rendered += 1
        return {"number": self.number}


ids = st.sampled_from(["a", "b", "a-b", "a-b-0", "-", "a-0"])


@given(ids, st.sampled_from(["00ff", "1234"]), st.integers(0, 300))
def test_engine_ids_can_be_taken_apart(public_id: str, unique: str, choice: int) -> None:
    assert split_engine_id(engine_id(public_id, unique, choice)) == (public_id, unique, choice)


requests = st.lists(st.tuples(ids, st.sampled_from("xyz"), st.integers(0, 2), st.integers(0, 3)), max_size=60)


@given(requests, st.integers(1, 20))
def test_what_is_found_is_what_the_newest_request_got(recorded: list[tuple[str, str, int, int]], size: int) -> None:
    decisions = Decisions(size)
    for number, (public_id, unique, choice, attempt) in enumerate(recorded):
        decisions.record(engine_id(public_id, unique, choice), attempt, Told(number), float(number))
    kept = list(enumerate(recorded))[-size:]
    assert len(decisions) == len(kept)
    assert decisions.oldest_s() == (kept[0][0] if kept else None)
    for public_id in {each[0] for each in recorded}:
        mine = [(number, each) for number, each in kept if each[0] == public_id]
        sent = list(dict.fromkeys(each[1] for _, each in mine))
        wanted = [number for number, each in mine if each[1] == sent[-1]] if sent else []
        found = decisions.find(public_id)
        if not mine:
            continue  # what is found then may be the one choice that has this name on workers
        assert [told.as_dict(0.0)["decision"]["number"] for told in found.decisions] == wanted
        assert found.namesakes == len(sent) - 1
    for public_id, unique, choice, _ in recorded:
        name = engine_id(public_id, unique, choice)
        if any(each[0] == name for _, each in kept):
            continue
        numbers = [number for number, each in kept if each[:3] == (public_id, unique, choice)]
        assert [told.at_s for told in decisions.find(name).decisions] == numbers


def test_nothing_is_rendered_before_somebody_asks() -> None:
    decisions, told = Decisions(), Told(1)
    decisions.record(engine_id("a", "ff", 0), 0, told, 1.0)
    found = decisions.find("a")
    assert told.rendered == 0
    assert found.decisions[0].as_dict(3.5) == {
        "unique_id": "a-ff-0",
        "choice": 0,
        "attempt": 0,
        "age_s": 2.5,
        "decision": {"number": 1},
    }


def test_an_answer_is_bounded() -> None:
    decisions = Decisions()
    for attempt in range(MAX_TOLD + 7):
        decisions.record(engine_id("a", "ff", 0), attempt, Told(attempt), 0.0)
    found = decisions.find("a")
    assert (len(found.decisions), found.left_out) == (MAX_TOLD, 7)
    assert found.decisions[-1].attempt == MAX_TOLD + 6


def test_strange_ids_find_nothing() -> None:
    decisions = Decisions()
    decisions.record(engine_id("a", "ff", 0), 0, Told(0), 0.0)
    for name in ("", "-", "--", "a-", "a-ff", "a-ff-", "a-ff-x", "b", "a-ff-0-ff-0"):
        assert decisions.find(name).decisions == ()
