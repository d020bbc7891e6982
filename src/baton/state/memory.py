"""Shared state of one process: the same interface, nothing shared."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from baton.clock import Clock, MonotonicClock
from baton.state import rate_limits
from baton.state.base import check_value, group_of

__all__ = ["MemoryState"]

_MAX_UNREAD = 1024
_FEW_STALE = 64
"""Stale ends that are not worth the sweeping."""


@dataclass(slots=True)
class _Stream:
    """Events, the number of the last one, when they are over, and who waits for more."""

    events: deque[bytes] = field(default_factory=deque)
    last: int = 0
    until_s: float = 0.0
    readers: set[asyncio.Event] = field(default_factory=set)


class MemoryState:
    """Keeps values in a dictionary; those whose time is over go when the dictionary is next written to or scanned.

    Implements `SharedState`; never unavailable.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._values: dict[str, tuple[bytes, float]] = {}
        self._ends: list[tuple[float, str]] = []
        """A heap of when values' time is over; the end of a value that was set anew since, or dropped, is stale."""
        self._buckets: dict[str, tuple[float, float, float]] = {}
        """Level, when it was that, and when it is full again."""
        self._listeners: dict[str, set[asyncio.Queue[bytes]]] = {}
        self._streams: dict[str, _Stream] = {}

    async def get(self, key: str) -> bytes | None:
        """The value, or None where there is none or its time is over."""
        value, until_s = self._values.get(key, (None, 0.0))
        return value if until_s > self._clock.now_s() else None

    async def put(self, key: str, value: bytes, *, ttl_s: float) -> None:
        """Set the value for `ttl_s` seconds, whatever was there."""
        group_of(key)
        check_value(value)
        self._drop_old()
        until_s = self._clock.now_s() + ttl_s
        self._values[key] = (value, until_s)
        heapq.heappush(self._ends, (until_s, key))
        if len(self._ends) > 2 * len(self._values) + _FEW_STALE:
            self._ends = [(until_s, key) for key, (_, until_s) in self._values.items()]
            heapq.heapify(self._ends)

    async def put_new(self, key: str, value: bytes, *, ttl_s: float) -> bytes | None:
        """Set the value unless there is one, and return the one that is there."""
        there = await self.get(key)
        if there is None:
            await self.put(key, value, ttl_s=ttl_s)
        return there

    async def replace(self, key: str, old: bytes, value: bytes, *, ttl_s: float) -> bool:
        """Set the value if `old` is there."""
        if await self.get(key) != old:
            return False
        await self.put(key, value, ttl_s=ttl_s)
        return True

    async def delete(self, key: str) -> None:
        """Drop the value, if there is one."""
        self._values.pop(key, None)

    async def scan(self, group: str) -> dict[str, bytes]:
        """All values of a group, by their whole key."""
        self._drop_old()
        return {key: value for key, (value, _) in self._values.items() if group_of(key) == group}

    async def take_tokens(
        self, key: str, *, least: float, most: float, tokens_per_s: float, burst_tokens: float
    ) -> tuple[float, float]:
        """Tokens of a bucket, and how long to wait where none are given."""
        group_of(key)
        now_s = self._clock.now_s()
        for name in [name for name, (_, _, full_s) in self._buckets.items() if full_s <= now_s]:
            del self._buckets[name]
        level, at_s, _ = self._buckets.get(key, (burst_tokens, now_s, 0.0))
        level, granted, wait_s = rate_limits.take(
            level, now_s - at_s, least=least, most=most, tokens_per_s=tokens_per_s, burst_tokens=burst_tokens
        )
        self._buckets[key] = level, now_s, now_s + (burst_tokens - level) / tokens_per_s + 1
        return granted, wait_s

    async def return_tokens(self, key: str, tokens: float, *, burst_tokens: float) -> None:
        """Put back what was taken from a bucket and not used."""
        if key in self._buckets:
            level, at_s, full_s = self._buckets[key]
            self._buckets[key] = min(level + tokens, burst_tokens), at_s, full_s

    async def publish(self, channel: str, message: bytes) -> None:
        """Tell whoever listens now; a listener that reads too slowly misses it."""
        for queue in self._listeners.get(channel, ()):
            if not queue.full():
                queue.put_nowait(message)

    async def listen(self, channel: str) -> AsyncIterator[bytes]:
        """What is published from now on."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(_MAX_UNREAD)
        self._listeners.setdefault(channel, set()).add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._listeners[channel].discard(queue)

    async def append(self, stream: str, event: bytes, *, max_events: int, ttl_s: float) -> None:
        """Add an event, and drop older ones than the last `max_events`."""
        check_value(event)
        there = self._stream(stream)
        there.events.append(event)
        there.last += 1
        there.until_s = self._clock.now_s() + ttl_s
        while len(there.events) > max_events:
            there.events.popleft()
        for is_new in there.readers:
            is_new.set()

    async def end(self, stream: str) -> str:
        """The place behind the last event."""
        return str(self._stream(stream).last)

    async def read(self, stream: str, after: str, *, max_events: int, wait_s: float) -> tuple[str, list[bytes]]:
        """The next events behind a place, and the place behind them."""
        there, place = self._stream(stream), int(after)
        if place >= there.last:
            is_new = asyncio.Event()
            there.readers.add(is_new)
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await is_new.wait()
            finally:
                there.readers.discard(is_new)
        there = self._stream(stream)
        begin = max(place - (there.last - len(there.events)), 0)
        found = list(there.events)[begin : begin + max_events]
        return str(there.last - len(there.events) + begin + len(found)), found

    async def close(self) -> None:
        """Nothing to let go of."""

    def _stream(self, name: str) -> _Stream:
        there = self._streams.setdefault(name, _Stream())
        if there.until_s <= self._clock.now_s():
            there.events.clear()
        return there

    def _drop_old(self) -> None:
        now_s = self._clock.now_s()
        while self._ends and self._ends[0][0] <= now_s:
            until_s, key = heapq.heappop(self._ends)
            if key in self._values and self._values[key][1] == until_s:
                del self._values[key]
