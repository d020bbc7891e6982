"""Who waits for the end of a rank, and who is told that its time is over."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from baton.cluster.launchers.watch_point import WatchPoint

DEADLINE_S = 10.0


def watching(pool: ThreadPoolExecutor, point: WatchPoint, generation: int) -> Future[tuple[bool, str]]:
    """A watch that has begun."""
    future = pool.submit(point.watch, generation)
    until_s = time.monotonic() + DEADLINE_S
    while point.generation != generation:
        assert time.monotonic() < until_s
        threading.Event().wait(0.001)
    return future


def test_the_newest_generation_is_told_and_those_before_are_over() -> None:
    point = WatchPoint()
    with ThreadPoolExecutor() as pool:
        first = watching(pool, point, 1)
        second = watching(pool, point, 2)
        assert first.result(DEADLINE_S) == (False, "")
        # A word of an older one that arrives late takes nothing from the newer one.
        assert point.watch(1) == (False, "")
        again = watching(pool, point, 2)
        point.end("out of memory")
        assert second.result(DEADLINE_S) == again.result(DEADLINE_S) == (True, "out of memory")


def test_an_end_is_told_at_once_to_whoever_comes_later() -> None:
    point = WatchPoint()
    point.end("")
    assert point.watch(1) == (True, "")
    assert point.watch(2) == (True, "")
