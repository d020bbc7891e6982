"""How a process keeps itself listed: in the controller's registry, and in the shared state where there is one.

    announcing --each third of the lease, and at once when something changed--> announcing --stop--> "dead", once
    announcing --another incarnation stands in its place--> silent, while it does

A process that starts takes its instance's place, whoever was there; after that it gives way to a later one, so that
what the shared state names last is the newest, also when a process that was given up for dead speaks again.
Registry or state may be away for as long as it likes: the other goes on, and what is away is told again once back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from baton.errors import UnavailableError
from baton.proto.announce import Announcer
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.state.base import SharedState
from baton.state.instances import CHANNEL, LEASE_S, content_of, decode_instance, encode_instance, key_of

__all__ = ["Announcements", "StateAnnouncer"]

_log = logging.getLogger(__name__)
_RETRY_S = 0.5


class StateAnnouncer:
    """Puts `make_status()` into `state`, again within a third of the lease, and at `nudge()`.

    Args:
        make_status: this process's present status; called on the event loop.
    """

    def __init__(self, state: SharedState, make_status: Callable[[], pb.WorkerStatus]) -> None:
        self._state = state
        self._make_status = make_status
        self._nudged = asyncio.Event()
        self._written: bytes | None = None
        self._told = b""
        self._is_replaced = False

    def nudge(self) -> None:
        """Announces at once (a state has changed). Call it on the event loop."""
        self._nudged.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Announces until `stop` is set, then says that this process is gone; cancel it otherwise."""
        while not stop.is_set():
            self._nudged.clear()
            try:
                await self._tell(self._make_status())
                wait_s = LEASE_S / 3
            except UnavailableError:
                wait_s = _RETRY_S  # the state itself logs that it is away
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), wait_s)
        last = pb.WorkerStatus()
        last.CopyFrom(self._make_status())
        last.state = "dead"
        with contextlib.suppress(UnavailableError):
            await self._tell(last)

    async def _tell(self, status: pb.WorkerStatus) -> None:
        is_replaced = not await self._write(status)
        if is_replaced and not self._is_replaced:
            _log.warning("another process is %s now; this one is listed no more", status.instance_id)
        self._is_replaced = is_replaced
        content = content_of(status)
        if content != self._told and not is_replaced:
            await self._state.publish(CHANNEL, status.instance_id.encode())
            self._told = content

    async def _write(self, status: pb.WorkerStatus) -> bool:
        """Whether this incarnation stands in its place."""
        key, value = key_of(status.instance_id), encode_instance(status)
        if self._written is None:
            await self._state.put(key, value, ttl_s=LEASE_S)
        elif not await self._state.replace(key, self._written, value, ttl_s=LEASE_S):
            found = await self._state.put_new(key, value, ttl_s=LEASE_S)
            if found is not None:
                other = decode_instance(key, found)
                if isinstance(other, pb.WorkerStatus) and other.incarnation != status.incarnation:
                    return False
                # Nonsense, or this process's own of an announcement whose answer was lost.
                await self._state.put(key, value, ttl_s=LEASE_S)
        self._written = value
        return True


class Announcements:
    """Announces one process wherever it has to be announced.

    Args:
        registry_address: host:port of the controller's registry.
        make_status: this process's present status; called on the event loop.
        state: None where no other process sees it.
    """

    def __init__(
        self, registry_address: str, make_status: Callable[[], pb.WorkerStatus], state: SharedState | None = None
    ) -> None:
        self._announcers: list[Announcer | StateAnnouncer] = [Announcer(registry_address, make_status)]
        if state is not None:
            self._announcers.append(StateAnnouncer(state, make_status))

    def nudge(self) -> None:
        """Announces at once (a state has changed). Call it on the event loop."""
        for announcer in self._announcers:
            announcer.nudge()

    async def run(self, stop: asyncio.Event) -> None:
        """Announces until `stop` is set; cancel it otherwise."""
        await asyncio.gather(*(announcer.run(stop) for announcer in self._announcers))
