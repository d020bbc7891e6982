"""How a process keeps itself listed: in the controller's registry, and in the shared state where there is one.

    announcing --each third of the lease, and at once when something changed--> announcing --stop--> "dead", once

Either may be away for as long as it likes: the other one goes on, and what is away is told again when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from baton.errors import UnavailableError
from baton.proto.announce import Announcer
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.state.base import SharedState
from baton.state.instances import CHANNEL, LEASE_S, content_of, encode_instance, key_of

__all__ = ["Announcements", "StateAnnouncer"]

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
        self._told = b""

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
        await self._state.put(key_of(status.instance_id), encode_instance(status), ttl_s=LEASE_S)
        content = content_of(status)
        if content != self._told:
            await self._state.publish(CHANNEL, status.instance_id.encode())
            self._told = content


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
