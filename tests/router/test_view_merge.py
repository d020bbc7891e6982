"""One view out of two lists: what may never happen, in any order of events, and what must happen in each case named."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.view_merge import Source, ViewMerge

_LEASE_S = 3.0
_NAMES = ("decode-0", "decode-1")
_INCARNATIONS = (b"A", b"B", b"C", b"")
_STATES = ("starting", "ready", "draining", "dead")


def _status(name: str, incarnation: bytes, state: str = "ready", running: int = 0) -> pb.WorkerStatus:
    load = pb.WorkerLoad(running_requests=running)
    return pb.WorkerStatus(instance_id=name, role="decode", state=state, incarnation=incarnation, load=load)


class _Merge(ViewMerge):
    """A merge of registry and Redis, with the pairs of its view at hand."""

    def __init__(self) -> None:
        self.registry, self.redis = Source(), Source(linger_s=_LEASE_S)
        super().__init__([self.registry, self.redis], lease_s=_LEASE_S)

    def pairs(self, now_s: float) -> set[tuple[str, bytes]]:
        return {(status.instance_id, status.incarnation) for status in self.view(now_s)}


_statuses = st.lists(
    st.builds(_status, st.sampled_from(_NAMES), st.sampled_from(_INCARNATIONS), st.sampled_from(_STATES)), max_size=3
)
_events = st.lists(
    st.one_of(
        st.tuples(st.just("heard"), st.integers(0, 1), _statuses, st.booleans(), st.sampled_from([b"x", b"y"])),
        st.tuples(st.just("lost"), st.integers(0, 1)),
        st.tuples(st.just("time"), st.floats(0.0, 4.0)),
    ),
    max_size=30,
)


@settings(max_examples=400, deadline=None)
@given(_events)
def test_in_any_order_of_events(events: Iterable[tuple[object, ...]]) -> None:
    merge, now_s = _Merge(), 0.0
    over: set[tuple[str, bytes]] = set()  # called dead, with their incarnation
    answers = [False, False]
    for event in events:
        before = merge.pairs(now_s)
        if event[0] == "time":
            assert isinstance(event[1], float)
            now_s += event[1]
        elif event[0] == "lost":
            assert isinstance(event[1], int)
            merge.lost(merge.sources[event[1]], now_s)
            answers[event[1]] = False
        else:
            _, which, statuses, is_partial, author = event
            assert isinstance(which, int)
            assert isinstance(statuses, list)
            assert isinstance(author, bytes)
            merge.heard(merge.sources[which], statuses, now_s, is_partial=bool(is_partial), author=author)
            answers[which] = True
            over |= {(s.instance_id, s.incarnation) for s in statuses if s.state == "dead" and s.incarnation}
        view = merge.view(now_s)
        names = [status.instance_id for status in view]
        assert len(names) == len(set(names))
        assert all(status.state != "dead" for status in view)
        pairs = {(status.instance_id, status.incarnation) for status in view}
        assert not pairs & over
        if not any(answers) and event[0] != "heard":
            assert pairs == before, "with both away the last view stays"
        if event[0] == "heard" and is_partial:
            spoken_for = {status.instance_id for status in statuses}
            assert {name for name, _ in before} <= {*names, *spoken_for}, "who is missing in a partial list is not gone"
        if event[0] == "heard" and not is_partial:
            here = {name for source in merge.sources for name in source.entries}
            assert here <= set(names), "what either source has is in the view"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"A", b"B", b"C", b"D"]), min_size=1, max_size=12), st.integers(0, 1))
def test_a_replaced_incarnation_never_comes_back(order: list[bytes], which: int) -> None:
    merge = _Merge()
    newest: list[bytes] = []
    for incarnation in order:
        merge.heard(merge.sources[which], [_status("decode-0", incarnation)], 0.0)
        if incarnation not in newest:
            newest.append(incarnation)
        now = merge.pairs(0.0)
        # One that was replaced and speaks again is nobody; who replaced it is back with its next announcement.
        assert now <= {("decode-0", newest[-1])}
    merge.heard(merge.sources[which], [_status("decode-0", newest[-1])], 0.0)
    assert merge.pairs(0.0) == {("decode-0", newest[-1])}


def test_either_source_is_enough() -> None:
    merge = _Merge()
    merge.heard(merge.registry, [_status("decode-0", b"A")], 0.0)
    merge.heard(merge.redis, [_status("decode-1", b"B")], 0.0)
    assert merge.pairs(0.0) == {("decode-0", b"A"), ("decode-1", b"B")}
    merge.heard(merge.registry, [], 10.0)
    assert merge.pairs(10.0) == {("decode-1", b"B")}


def test_dead_in_one_ends_it_in_both() -> None:
    merge = _Merge()
    for source in merge.sources:
        merge.heard(source, [_status("decode-0", b"A")], 0.0)
    merge.heard(merge.redis, [_status("decode-0", b"A", "dead")], 1.0)
    assert merge.pairs(1.0) == set()
    merge.heard(merge.registry, [_status("decode-0", b"A", "draining")], 1.1)
    assert merge.pairs(1.1) == set()
    merge.heard(merge.registry, [_status("decode-0", b"B")], 2.0)
    assert merge.pairs(2.0) == {("decode-0", b"B")}


def test_a_registry_that_calls_an_instance_dead_means_whom_it_named() -> None:
    merge = _Merge()
    for source in merge.sources:
        merge.heard(source, [_status("decode-0", b"A")], 0.0, author=b"x")
    merge.heard(merge.registry, [_status("decode-0", b"", "dead")], 1.0, author=b"x")
    assert merge.pairs(1.0) == set()
    merge.heard(merge.redis, [_status("decode-0", b"B")], 2.0)
    merge.heard(merge.registry, [_status("decode-0", b"", "dead")], 2.0, author=b"x")
    assert merge.pairs(2.0) == {("decode-0", b"B")}
    merge.heard(merge.registry, [_status("decode-0", b"B")], 2.1, author=b"x")
    # Another process has taken the registry's place: it has never named B.
    merge.heard(merge.registry, [_status("decode-0", b"", "dead")], 3.0, author=b"y")
    assert merge.pairs(3.0) == {("decode-0", b"B")}


def test_a_registry_that_starts_anew_drops_nobody() -> None:
    merge = ViewMerge([Source()], lease_s=_LEASE_S)
    registry = merge.sources[0]
    merge.heard(registry, [_status("decode-0", b"A"), _status("decode-1", b"B")], 0.0, author=b"x")
    merge.lost(registry, 1.0)
    assert len(merge.view(1000.0)) == 2
    merge.heard(registry, [_status("decode-1", b"B"), _status("decode-0", b"", "starting")], 1001.0, is_partial=True)
    assert {status.incarnation for status in merge.view(1001.0)} == {b"A", b"B"}
    merge.heard(registry, [_status("decode-1", b"B"), _status("decode-0", b"", "starting")], 1004.0)
    assert {status.incarnation for status in merge.view(1004.0)} == {b"B"}


def test_with_the_registry_away_redis_serves_and_lets_go() -> None:
    merge = _Merge()
    both = [_status("decode-0", b"A"), _status("decode-1", b"B")]
    for source in merge.sources:
        merge.heard(source, both, 0.0)
    merge.lost(merge.registry, 10.0)
    only = [_status("decode-0", b"A")]
    for now_s in (10.5, 11.5, 12.5):
        merge.heard(merge.redis, only, now_s)
        assert len(merge.pairs(now_s)) == 2
    merge.heard(merge.redis, only, 13.6)
    assert merge.pairs(13.6) == {("decode-0", b"A")}


def test_with_redis_away_the_registry_serves_and_lets_go() -> None:
    merge = _Merge()
    for source in merge.sources:
        merge.heard(source, [_status("decode-0", b"A")], 0.0)
    merge.lost(merge.redis, 10.0)
    merge.heard(merge.registry, [], 11.0)
    assert merge.pairs(11.0) == {("decode-0", b"A")}
    assert merge.pairs(13.5) == set()


def test_a_redis_that_lost_its_data_drops_nobody() -> None:
    merge = _Merge()
    merge.heard(merge.redis, [_status("decode-0", b"A"), _status("decode-1", b"B")], 0.0)
    merge.lost(merge.registry, 0.0)
    merge.heard(merge.redis, [], 20.0)
    assert len(merge.pairs(20.5)) == 2
    merge.heard(merge.redis, [_status("decode-1", b"B")], 21.0)
    merge.heard(merge.redis, [_status("decode-0", b"A"), _status("decode-1", b"B")], 22.0)
    merge.heard(merge.redis, [_status("decode-1", b"B")], 23.5)
    assert len(merge.pairs(24.0)) == 2
    merge.heard(merge.redis, [_status("decode-1", b"B")], 26.6)
    assert merge.pairs(26.6) == {("decode-1", b"B")}


def test_what_redis_still_holds_of_a_replaced_worker_is_ignored() -> None:
    merge = _Merge()
    for source in merge.sources:
        merge.heard(source, [_status("decode-0", b"A")], 0.0)
    merge.heard(merge.registry, [_status("decode-0", b"B")], 1.0)
    merge.heard(merge.redis, [_status("decode-0", b"A")], 1.5)
    assert merge.pairs(1.5) == {("decode-0", b"B")}


def test_the_further_state_and_the_fresher_load_count() -> None:
    merge = _Merge()
    merge.heard(merge.registry, [_status("decode-0", b"A", "ready", running=1)], 0.0)
    merge.heard(merge.redis, [_status("decode-0", b"A", "ready", running=2)], 0.0)
    assert merge.view(0.0)[0].load.running_requests == 2
    merge.heard(merge.registry, [_status("decode-0", b"A", "draining", running=3)], 0.1)
    assert merge.view(0.1)[0].state == "draining"
    merge.heard(merge.redis, [_status("decode-0", b"A", "ready")], 0.2)
    assert merge.view(0.2)[0].state == "draining"


def test_a_placeholder_is_seen_where_nobody_is() -> None:
    merge = _Merge()
    merge.heard(merge.registry, [_status("decode-0", b"", "starting")], 0.0)
    assert merge.pairs(0.0) == {("decode-0", b"")}
    merge.heard(merge.redis, [_status("decode-0", b"A")], 0.1)
    assert merge.pairs(0.1) == {("decode-0", b"A")}
