"""A stuck engine is told from a slow one, and its process ends."""

from __future__ import annotations

import asyncio
import os
from typing import Any, cast

import pytest

from baton.worker import watchdog
from baton.worker.watchdog import EXIT_STUCK, StepLimit, watch_steps


def test_the_limit_follows_the_longest_of_the_last_steps() -> None:
    limit = StepLimit(2.0, factor=10)
    assert limit.limit_s == 2.0
    limit.observe(0.1)
    assert limit.limit_s == 2.0
    limit.observe(0.5)
    assert limit.limit_s == 5.0
    for _ in range(300):
        limit.observe(0.01)
    assert limit.limit_s == 2.0


class _Loop:
    def __init__(self, *seen: tuple[int, float | None, float | None]) -> None:
        self.seen = list(seen)

    def progress(self) -> tuple[int, float | None, float | None]:
        return self.seen.pop(0) if len(self.seen) > 1 else self.seen[0]


async def test_a_stuck_step_ends_the_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Ended(Exception):
        pass

    def end(code: int) -> None:
        assert code == EXIT_STUCK
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(watchdog, "_PERIOD_S", 0.001)
    monkeypatch.setattr(watchdog.logging, "shutdown", lambda: None)
    # A step of 0.4 s allows 8 s; then one hangs.
    loop = _Loop((0, None, None), (1, None, 0.4), (2, 7.9, 0.4), (3, 0.1, 0.4), (3, 8.1, 0.4))
    with pytest.raises(Ended):
        await asyncio.wait_for(watch_steps(cast(Any, loop), instance_id="decode-0", floor_s=1.0), 10)
    assert "decode-0 is stuck: step 3 has run for 8.1 s" in caplog.text
