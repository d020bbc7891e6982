"""Who waits for the end of a rank, and who is told that its time is over."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from baton.cluster.launchers.watch_point import WatchPoint

DEADLINE_S = 10.0


def watching(pool: ThreadPoolExecutor, point: WatchPoint, name: str) -> Future[tuple[bool, str]]:
    """A watch that has begun."""
    future = pool.submit(point.watch, name)
    until_s = time.monotonic() + DEADLINE_S
    while point._watcher != name:
        assert time.monotonic() < until_s
        threading.Event().wait(0.001)
    return future


def test_the_newest_watcher_is_told_and_those_before_are_over() -> None:
    point = WatchPoint()
    with ThreadPoolExecutor() as pool:
        first = watching(pool, point, "first")
        second = watching(pool, point, "second")
        assert first.result(DEADLINE_S) == (False, "")
        point.end("out of memory")
        assert second.result(DEADLINE_S) == (True, "out of memory")


def test_an_end_is_told_at_once_to_whoever_comes_later() -> None:
    point = WatchPoint()
    point.end("")
    assert point.watch("first") == (True, "")
    assert point.watch("second") == (True, "")
