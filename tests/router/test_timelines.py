"""The store of timelines: bounded, and found by the id that the client knows."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from baton.router.timelines import MAX_SPANS, Timeline, Timelines, as_json


def _timeline(request_id: str, unique: str, choice: int = 0) -> Timeline:
    return Timeline(request_id=request_id, unique_id=f"{unique}-{choice}", choice=choice, arrived_unix_s=1.0)


@given(st.integers(0, 8), st.lists(st.sampled_from("abc"), max_size=30))
def test_the_newest_stay(size: int, names: list[str]) -> None:
    store = Timelines(size)
    for number, name in enumerate(names):
        store.begin(_timeline(name, f"{name}-{number}"))
        assert len(store) == min(size, number + 1)
    kept = [f"{name}-{number}-0" for number, name in enumerate(names)][-size:] if size else []
    assert [timeline.unique_id for timeline in store.newest(100)] == kept[::-1]
    for name in "abc":
        last = max((number for number, other in enumerate(names) if other == name), default=-1)
        found = store.find(name)
        assert [timeline.unique_id for timeline in found] == [f"{name}-{last}-0" for _ in found]
        assert bool(found) == (0 <= last >= len(names) - size)


def test_all_choices_of_the_newest_request_are_found() -> None:
    store = Timelines()
    for unique in ("a-1", "a-2"):
        for choice in (1, 0):
            store.begin(_timeline("a", unique, choice))
    found = store.find("a")
    assert {timeline.unique_id for timeline in found} == {"a-2-0", "a-2-1"}
    assert [choice["choice"] for choice in as_json(found)["choices"]] == [0, 1]
    assert [timeline.unique_id for timeline in store.find("a-1-1")] == ["a-1-1"]
    assert store.find("b") == []


def test_spans_are_bounded_and_never_negative() -> None:
    timeline = _timeline("a", "a-1")
    for number in range(MAX_SPANS + 1):
        timeline.add("pause", number, -1.0, where="decode-0", attempt=number)
    shown = as_json([timeline])
    assert json.loads(json.dumps(shown)) == shown
    (choice,) = shown["choices"]
    assert choice["is_truncated"]
    assert len(choice["spans"]) == MAX_SPANS
    assert {span["duration_s"] for span in choice["spans"]} == {0.0}
