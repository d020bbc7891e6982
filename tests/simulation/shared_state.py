"""The shared state of a simulated cluster: the product's own `MemoryState`, seen from several processes, at a distance.

It can be away (every operation takes its timeout and fails) and can lose all it holds, as a Redis that is restarted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable
from types import SimpleNamespace
from typing import TypeVar

from tests.simulation.world import World

from baton.errors import UnavailableError
from baton.state.memory import MemoryState

__all__ = ["SharedStore", "SimState"]

_T = TypeVar("_T")
_TIMEOUT_S = 0.3


class SharedStore:
    """What all processes share.

    Attributes:
        is_away: nobody reaches it.
    """

    def __init__(self, world: World) -> None:
        self.memory = MemoryState(SimpleNamespace(now_s=lambda: world.now_s))
        self.is_away = False

    def flush(self) -> None:
        """Lose everything."""
        self.memory._values.clear()
        self.memory._streams.clear()


class SimState:
    """A process's connection; see `baton.state.base.SharedState`."""

    def __init__(self, store: SharedStore, chance: random.Random) -> None:
        self._store = store
        self._chance = chance

    async def _reach(self, work: Awaitable[_T]) -> _T:
        try:
            await asyncio.sleep(self._chance.uniform(1e-4, 1e-3))
            if self._store.is_away:
                await asyncio.sleep(_TIMEOUT_S)
                raise UnavailableError("the shared state does not answer")
            result = await work
        finally:
            if asyncio.iscoroutine(work):
                work.close()
        await asyncio.sleep(self._chance.uniform(1e-4, 1e-3))
        return result

    async def get(self, key: str) -> bytes | None:
        """See `SharedState`."""
        return await self._reach(self._store.memory.get(key))

    async def put(self, key: str, value: bytes, *, ttl_s: float) -> None:
        """See `SharedState`."""
        await self._reach(self._store.memory.put(key, value, ttl_s=ttl_s))

    async def put_new(self, key: str, value: bytes, *, ttl_s: float) -> bytes | None:
        """See `SharedState`."""
        return await self._reach(self._store.memory.put_new(key, value, ttl_s=ttl_s))

    async def replace(self, key: str, old: bytes, value: bytes, *, ttl_s: float) -> bool:
        """See `SharedState`."""
        return await self._reach(self._store.memory.replace(key, old, value, ttl_s=ttl_s))

    async def delete(self, key: str) -> None:
        """See `SharedState`."""
        await self._reach(self._store.memory.delete(key))

    async def scan(self, group: str) -> dict[str, bytes]:
        """See `SharedState`."""
        return await self._reach(self._store.memory.scan(group))

    async def take_tokens(
        self, key: str, *, least: float, most: float, tokens_per_s: float, burst_tokens: float
    ) -> tuple[float, float]:
        """See `SharedState`."""
        work = self._store.memory.take_tokens(
            key, least=least, most=most, tokens_per_s=tokens_per_s, burst_tokens=burst_tokens
        )
        return await self._reach(work)

    async def return_tokens(self, key: str, tokens: float, *, burst_tokens: float) -> None:
        """See `SharedState`."""
        await self._reach(self._store.memory.return_tokens(key, tokens, burst_tokens=burst_tokens))

    async def publish(self, channel: str, message: bytes) -> None:
        """See `SharedState`."""
        await self._reach(self._store.memory.publish(channel, message))

    async def listen(self, channel: str) -> AsyncIterator[bytes]:
        """See `SharedState`."""
        if self._store.is_away:
            await asyncio.sleep(_TIMEOUT_S)
            raise UnavailableError("the shared state does not answer")
        async for message in self._store.memory.listen(channel):
            if self._store.is_away:
                raise UnavailableError("the shared state went away")
            yield message

    async def append(self, stream: str, event: bytes, *, max_events: int, ttl_s: float) -> None:
        """See `SharedState`."""
        await self._reach(self._store.memory.append(stream, event, max_events=max_events, ttl_s=ttl_s))

    async def end(self, stream: str) -> str:
        """See `SharedState`."""
        return await self._reach(self._store.memory.end(stream))

    async def read(self, stream: str, after: str, *, max_events: int, wait_s: float) -> tuple[str, list[bytes]]:
        """See `SharedState`."""
        return await self._reach(self._store.memory.read(stream, after, max_events=max_events, wait_s=wait_s))

    async def close(self) -> None:
        """See `SharedState`."""
