"""The prefix index against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.block_feed import Freshness
from baton.router.predictions import Predictions
from baton.router.prefix_index import PrefixIndex

_ONE, _TWO = b"1" * 16, b"2" * 16


def _snapshot(index: PrefixIndex, name: str, *keys: int, seq: int = 1, now_s: float = 0.0, **more: object) -> bool:
    events = pb.BlockEvents(seq=seq, snapshot=True, stored=keys, **more)  # type: ignore[arg-type]
    return index.apply(name, _ONE, events, now_s)


def _synced(*names: str, **options: object) -> PrefixIndex:
    index = PrefixIndex(**options)  # type: ignore[arg-type]
    for name in names:
        index.opened(name, _ONE, 0.0)
        _snapshot(index, name, seq=0)
    return index


def test_matches_leading_blocks_only() -> None:
    index = _synced("a", "b", "c")
    _snapshot(index, "a", 1, 2, 3, 9)
    _snapshot(index, "b", 1, 3)
    assert index.match([1, 2, 3, 4], 0.0) == {"a": 3, "b": 1}
    assert index.match([4, 1, 2], 0.0) == {}
    assert index.match([], 0.0) == {}
    assert len(index) == 4
    assert index.apply("a", _ONE, pb.BlockEvents(seq=2, removed=[2, 77]), 0.0) is False
    assert index.match([1, 2, 3], 0.0) == {"a": 1, "b": 1}
    index.apply("a", _ONE, pb.BlockEvents(seq=3, cleared=True, stored=[2]), 0.0)
    assert index.match([1, 2, 3], 0.0) == {"b": 1}
    assert index.match([2], 0.0) == {"a": 1}


def test_another_incarnation_has_another_cache() -> None:
    index = _synced("a")
    _snapshot(index, "a", 1, 2)
    index.closed("a", _ONE, 1.0)
    index.opened("a", _ONE, 2.0)
    assert index.match([1, 2], 2.0) == {"a": 2}, "a stream that broke says nothing of the cache"
    index.opened("a", _TWO, 3.0)
    assert index.match([1, 2], 3.0) == {}
    assert not _snapshot(index, "a", 1, now_s=3.0), "words of the one that is gone"
    index.closed("a", _ONE, 3.0)
    assert index.freshness("a") is Freshness.RESYNCING
    index.apply("a", _TWO, pb.BlockEvents(seq=9, snapshot=True, stored=[1]), 3.0)
    assert index.match([1, 2], 3.0) == {"a": 1}
    while index.sweep(1):
        pass
    assert len(index) == 1


def test_a_snapshot_takes_the_place_of_what_was_known_only_when_it_is_whole() -> None:
    index = _synced("a")
    _snapshot(index, "a", 1, 2, 3)
    assert index.apply("a", _ONE, pb.BlockEvents(seq=5), 0.0) is True
    assert index.match([1, 2, 3], 0.0) == {"a": 3}
    _snapshot(index, "a", 1, 7, seq=5, more=True)
    assert index.match([1, 2, 3], 0.0) == {"a": 3}
    _snapshot(index, "a", 8, seq=5)
    assert index.match([1, 2, 3], 0.0) == {"a": 1}
    assert index.held("a") == {1, 7, 8}
    assert index.freshness("a") is Freshness.SYNCED


def test_of_a_stale_worker_predictions_alone_count() -> None:
    index = _synced("a", "b")
    _snapshot(index, "a", 1, 2, 3)
    assert index.apply("a", _ONE, pb.BlockEvents(seq=5), 0.0) is True
    assert index.look(1.0) == []
    index.predict("a", [1], 4.0)
    assert [name for name, _ in index.look(4.0)] == ["a"]
    assert index.stale() == ["a"]
    assert index.match([1, 2, 3], 4.0) == {"a": 1}
    _snapshot(index, "a", 1, 2, seq=5, now_s=5.0)
    assert index.stale() == []
    assert index.match([1, 2, 3], 5.0) == {"a": 2}


def test_predictions_end_by_time_or_by_an_event() -> None:
    index = _synced("a", "b", predictions=Predictions(ttl_s=4.0))
    index.predict("a", [1, 2, 3], 10.0)
    index.predict("b", [1], 10.0)
    assert index.match([1, 2, 3], 13.9) == {"a": 3, "b": 1}
    index.apply("a", _ONE, pb.BlockEvents(seq=1, stored=[1, 2]), 13.9)
    index.apply("a", _ONE, pb.BlockEvents(seq=2, removed=[2]), 13.9)
    assert index.match([1, 2, 3], 13.9) == {"a": 1, "b": 1}
    assert index.match([1, 2, 3], 17.0) == {"a": 1, "b": 1}
    assert index.match([1, 2, 3], 30.0) == {"a": 1}


def test_a_bit_is_not_used_again_while_predictions_know_it() -> None:
    index = _synced("a", predictions=Predictions(ttl_s=4.0))
    index.predict("a", [1], 0.0)
    index.forget("a")
    assert not index.sweep(10)
    index.opened("b", _ONE, 0.0)
    assert index.match([1], 0.0) == {}
    index.match([1], 100.0)
    index.opened("c", _ONE, 100.0)
    assert index.match([1], 100.0) == {}
    assert index._num_bits == 2, "the bit of a is that of c"


def test_tiers_count_for_what_they_are_worth() -> None:
    index = _synced("a", "b")
    _snapshot(index, "a", 1, more=True)
    _snapshot(index, "a", 2, 3, tier=pb.HOST, more=True)
    _snapshot(index, "a", 4, tier=pb.DISK)
    _snapshot(index, "b", 1, 2)
    assert index.match([1, 2], 0.0) == {"a": 1, "b": 2}  # 1.75
    assert index.match([1, 2, 3, 4, 5], 0.0) == {"a": 2, "b": 2}  # 2.75
    index.apply("a", _ONE, pb.BlockEvents(seq=2, stored=[2]), 0.0)
    assert index.match([1, 2, 3, 4, 5], 0.0) == {"a": 3, "b": 2}
    assert len(index) == 4


@pytest.mark.parametrize("events", [pb.BlockEvents(seq=1, stored=range(10)), pb.BlockEvents(seq=1, tier=7, stored=[1])])  # type: ignore[arg-type]
def test_what_cannot_be_taken_makes_it_stale_and_leaves_nothing(events: pb.BlockEvents) -> None:
    index = _synced("a", "b", max_entries=8)
    _snapshot(index, "b", 1, 2, 3)
    assert index.apply("a", _ONE, events, 0.0) is False
    assert index.freshness("a") is Freshness.STALE
    assert [name for name, _ in index.look(0.0)] == ["a"]
    assert len(index) == 3
    index.apply("b", _ONE, pb.BlockEvents(seq=2, stored=[4]), 0.0)
    assert index.match([1, 2, 3, 4], 0.0) == {"b": 4}


_events = st.tuples(
    st.sampled_from("abc"), st.sets(st.integers(0, 5), max_size=4), st.sets(st.integers(0, 5), max_size=4)
)


@given(st.lists(st.one_of(_events, st.tuples(st.sampled_from("abc"))), max_size=40), st.data())
def test_equals_a_plain_model(work: list[tuple[object, ...]], data: st.DataObject) -> None:
    index, model, seqs = PrefixIndex(), dict[str, set[int]](), dict[str, int]()
    for name, *change in work:
        assert isinstance(name, str)
        if not change:
            index.forget(name)
            model.pop(name, None)
            index.sweep(3)
            continue
        if name not in model:
            index.opened(name, _ONE, 0.0)
            _snapshot(index, name, seq=0)
            model[name], seqs[name] = set(), 0
        stored, removed = change
        assert isinstance(stored, set)
        assert isinstance(removed, set)
        seqs[name] += 1
        index.apply(name, _ONE, pb.BlockEvents(seq=seqs[name], stored=stored, removed=removed - stored), 0.0)
        model[name] = (model[name] - removed) | stored
    keys = data.draw(st.lists(st.integers(0, 5), unique=True))
    expected = {}
    for name, held in model.items():
        depth = next((depth for depth, key in enumerate(keys) if key not in held), len(keys))
        if depth:
            expected[name] = depth
    assert index.match(keys, 0.0) == expected
    while index.sweep(2):
        pass
    assert len(index) == len(set().union(*model.values()))
    assert index._num_entries == sum(map(len, model.values()))
