"""When the signal of a worker's blocks is complete, and when it is stale."""

from __future__ import annotations

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.block_feed import BlockFeed, Freshness, Verdict


def _batch(seq: int) -> pb.BlockEvents:
    return pb.BlockEvents(seq=seq, stored=[seq])


def _snapshot(seq: int, *, more: bool = False) -> pb.BlockEvents:
    return pb.BlockEvents(seq=seq, snapshot=True, more=more)


def _synced(seq: int = 4) -> BlockFeed:
    feed = BlockFeed(stale_after_s=3.0)
    feed.opened(0.0)
    assert feed.accept(_snapshot(seq), 0.0) is Verdict.BEGIN_SNAPSHOT
    assert feed.freshness is Freshness.SYNCED
    return feed


def test_a_snapshot_in_parts_then_batches() -> None:
    feed = BlockFeed()
    assert feed.freshness is Freshness.UNKNOWN
    assert not feed.look(1e6)
    feed.opened(0.0)
    assert feed.freshness is Freshness.RESYNCING
    assert feed.accept(_batch(7), 0.0) is Verdict.IGNORE
    assert feed.accept(_snapshot(7, more=True), 0.0) is Verdict.BEGIN_SNAPSHOT
    assert feed.accept(_snapshot(7, more=True), 0.0) is Verdict.APPLY
    assert feed.freshness is Freshness.RESYNCING
    assert feed.accept(_snapshot(7), 0.0) is Verdict.APPLY
    assert feed.freshness is Freshness.SYNCED
    assert feed.accept(_batch(7), 0.0) is Verdict.IGNORE
    assert feed.accept(_batch(8), 0.0) is Verdict.APPLY
    assert feed.accept(_snapshot(8), 0.0) is Verdict.BEGIN_SNAPSHOT


def test_a_gap_is_asked_about_once_and_goes_stale_unanswered() -> None:
    feed = _synced()
    assert feed.accept(_batch(6), 10.0) is Verdict.ASK
    assert "batches 5 to 5" in feed.reason
    assert feed.accept(_batch(7), 10.0) is Verdict.IGNORE
    assert not feed.look(13.0)
    assert feed.look(13.1)
    assert feed.freshness is Freshness.STALE
    assert not feed.look(14.0)
    feed.opened(15.0)  # another stream does not make it true by itself
    assert feed.freshness is Freshness.STALE
    feed.accept(_snapshot(7), 16.0)
    assert feed.freshness is Freshness.SYNCED
    feed.closed(20.0)
    assert not feed.look(22.0)
    assert feed.look(24.0)


def test_a_short_absence_is_no_episode() -> None:
    feed = _synced()
    feed.closed(1.0)
    feed.opened(2.0)
    assert feed.freshness is Freshness.RESYNCING
    feed.accept(_snapshot(9), 3.0)
    assert not feed.look(100.0)


def test_what_cannot_be_taken_is_stale_at_once() -> None:
    feed = _synced()
    feed.refuse("full")
    assert feed.look(0.0)
    assert feed.accept(_batch(5), 0.0) is Verdict.IGNORE
    assert feed.accept(_snapshot(5, more=True), 0.0) is Verdict.BEGIN_SNAPSHOT
    assert feed.freshness is Freshness.STALE
