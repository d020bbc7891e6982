"""A reader of the log of blocks ends up with what the worker holds, however slowly it reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.block_journal import BlockChange
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.worker.block_log import BlockLog, BlockReader

_MAX_KEYS = 4


class _Follower:
    """Applies what a reader says, and checks its numbers."""

    def __init__(self, log: BlockLog) -> None:
        self.reader = BlockReader(log)
        self.held: set[int] = set()
        self.seq: int | None = None
        self.parts: list[pb.BlockEvents] = []

    def read(self) -> bool:
        events = self.reader.next()
        if events is None:
            return False
        assert len(events.stored) + len(events.removed) <= _MAX_KEYS
        if events.snapshot:
            assert not self.parts or self.parts[0].seq == events.seq
            self.parts.append(events)
            if not events.more:
                self.held = {key for part in self.parts for key in part.stored}
                self.seq, self.parts = events.seq, []
        else:
            assert not self.parts
            assert self.seq is not None
            assert events.seq == self.seq + 1
            self.seq = events.seq
            BlockChange(list(events.stored), list(events.removed), events.cleared).apply(self.held)
        return True

    def read_all(self) -> None:
        while self.read():
            pass


_keys = st.sets(st.integers(0, 30), max_size=12)
_work = st.lists(
    st.one_of(
        st.tuples(st.just("change"), _keys, _keys, st.booleans()),
        st.tuples(st.just("read"), st.integers(0, 3)),
        st.tuples(st.just("restart")),
        st.tuples(st.just("join")),
    ),
    max_size=60,
)


@given(_work)
def test_every_reader_ends_with_what_is_held(work: list[tuple[object, ...]]) -> None:
    log = BlockLog(max_batch_keys=_MAX_KEYS, max_kept_keys=200)
    followers, held = [_Follower(log)], set[int]()
    for step in work:
        if step[0] == "change":
            _, come, go, is_cleared = step
            assert isinstance(come, set)
            assert isinstance(go, set)
            before = set() if is_cleared else held
            change = BlockChange(sorted(come - before), sorted(before & go - come), bool(is_cleared))
            log.append(change)
            change.apply(held)
        elif step[0] == "read":
            for _ in range(int(str(step[1]))):
                followers[0].read()
        elif step[0] == "restart":
            followers[0].reader.restart()
            followers[0].parts = []
        else:
            followers.append(_Follower(log))
        assert log.held == held
    for follower in followers:
        follower.read_all()
        assert follower.held == held
        assert follower.seq == log.seq
        assert not follower.reader.has_more


def test_who_does_not_read_costs_no_more_than_what_is_kept() -> None:
    log = BlockLog(max_batch_keys=_MAX_KEYS, max_kept_keys=100)
    follower = _Follower(log)
    follower.read_all()
    for number in range(1000):
        log.append(BlockChange([number], [number - 10] if number >= 10 else []))
    assert len(log._kept) <= 3
    assert log.after(log.seq - 1) is not None
    assert log.after(0) is None
    follower.read_all()
    assert follower.held == set(range(990, 1000))
    assert follower.seq == 1000


def test_an_empty_worker_has_a_snapshot_too() -> None:
    log = BlockLog()
    reader = BlockReader(log)
    assert reader.has_more
    assert reader.next() == pb.BlockEvents(snapshot=True)
    assert not reader.has_more
    log.append(BlockChange([], []))
    assert reader.next() is None
