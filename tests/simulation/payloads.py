"""How KV pages travel in the simulation: a transport with the product's own staging arena, and its lane.

Two kinds, by the name under which it is offered: "shm" hands the sender's memory over, so a buffer that is used again
too early shows; "gloo" copies, over the network path of the two processes. With the sender's death what it posted stays
readable on shm and is lost on gloo.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import torch
from tests.simulation.network import Network
from tests.simulation.process import Process
from tests.simulation.threads import Thread, current_thread

from baton.errors import DeadlineError, HandoverError
from baton.kv_transfer.transports.base import ReceiveLink, ReceiveSetup, SendLink, SendSetup, Staged, Transport

__all__ = ["Payloads", "SimLane", "SimTransport"]

_LANE_S = 8e-6


class SimLane:
    """One side of a lane: see `baton.kv_transfer.transports.lane.Lane`."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.other: SimLane | None = None
        self.on_readable: Callable[[], object] | None = None
        self._messages: deque[bytes] = deque()
        self._is_open = True
        self._ended = False
        self._reader: Thread | None = None
        process.on_death.append(self.close)
        self._number = len(process.world.lanes)
        process.world.lanes.append(self)

    @staticmethod
    def pair(one: Process, two: Process) -> tuple[SimLane, SimLane]:
        """Both sides."""
        first, second = SimLane(one), SimLane(two)
        first.other, second.other = second, first
        return first, second

    @property
    def is_readable(self) -> bool:
        """Whether `receive` would return at once."""
        return bool(self._messages) or self._ended

    def fileno(self) -> int:
        """By which the event loop knows it."""
        return self._number

    def send(self, message: bytes) -> bool:
        """See `Lane`."""
        other = self.other
        if not self._is_open or other is None or not other._is_open or self.process.is_dead:
            return False
        self.process.world.after(_LANE_S, lambda: other._take(message))
        return True

    def _take(self, message: bytes | None) -> None:
        if message is None:
            self._ended = True
        elif self._is_open:
            self._messages.append(message)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None:
            self._reader.unpark()
        if self.on_readable is not None:
            self.on_readable()

    def receive(self, *, wait: bool) -> bytes | None:
        """See `Lane`."""
        while self._is_open:
            if self._messages:
                return self._messages.popleft()
            if self._ended:
                return b""
            if not wait:
                return None
            self._reader = current_thread()
            assert self._reader is not None
            try:
                self._reader.park()
            finally:
                self._reader = None
        return b""

    def close(self) -> None:
        """See `Lane`."""
        if not self._is_open:
            return
        self._is_open = False
        if self._reader is not None:
            self._reader.unpark()
        other = self.other
        if other is not None:
            self.process.world.after(_LANE_S, lambda: other._take(None))


class Payloads:
    """What all links of a run share.

    Attributes:
        has_lanes: shm links have a lane.
        spoil: told of each payload that is fetched, may answer "flip" or "fail".
        links: open ones.
    """

    def __init__(self, network: Network, *, has_lanes: bool, seconds_per_byte: float) -> None:
        self.network = network
        self.world = network.world
        self.has_lanes = has_lanes
        self.seconds_per_byte = seconds_per_byte
        self.spoil: Callable[[str, str], str] = lambda sender, receiver: ""
        self.setups: dict[str, _SendSetup] = {}
        self.num_setups = 0
        self.send_links: list[SimSendLink] = []


class SimTransport(Transport):
    """Of one process."""

    def __init__(self, name: str, payloads: Payloads, process: Process, arena_bytes: int) -> None:
        self.name = name
        self._payloads = payloads
        self._process = process
        self._arena_bytes = arena_bytes

    def open_send(self, *, peer: str) -> SendSetup:
        """See `Transport`."""
        current = current_thread()
        assert current is not None
        current.park(200e-6)
        return _SendSetup(self.name, self._payloads, self._process, self._arena_bytes, peer)

    def open_receive(self, options: Mapping[str, str], *, peer: str) -> ReceiveSetup:
        """See `Transport`."""
        setup = self._payloads.setups.get(options.get(f"{self.name}.id", ""))
        if setup is None:
            raise HandoverError(f"{peer} offers no segment of this host")
        return _ReceiveSetup(self._process, setup)


class _SendSetup(SendSetup):
    def __init__(self, name: str, payloads: Payloads, process: Process, arena_bytes: int, peer: str) -> None:
        self.payloads = payloads
        self.process = process
        self.peer = peer
        payloads.num_setups += 1
        self.id = f"{process.name}-{payloads.num_setups}"
        self.options = {f"{name}.id": self.id}
        self.memory = torch.zeros(arena_bytes, dtype=torch.uint8)
        self.is_shared = name == "shm"
        self.receive: SimReceiveLink | None = None
        self.send: SimSendLink | None = None
        self.lanes: tuple[SimLane, SimLane] | None = None
        payloads.setups[self.id] = self

    def finish(self, options: Mapping[str, str], deadline_s: float) -> SendLink:
        """See `SendSetup`."""
        current = current_thread()
        assert current is not None
        current.park(100e-6)
        if options.get("accepted") != self.id:
            raise HandoverError(f"{self.peer} has not opened the segment")
        self.send = SimSendLink(self)
        self.payloads.send_links.append(self.send)
        return self.send

    def cancel(self) -> None:
        """See `SendSetup`."""
        self.payloads.setups.pop(self.id, None)


class _ReceiveSetup(ReceiveSetup):
    def __init__(self, process: Process, setup: _SendSetup) -> None:
        self._setup = setup
        self.options = {"accepted": setup.id}
        if setup.payloads.has_lanes and setup.is_shared:
            setup.lanes = SimLane.pair(setup.process, process)
        self._link = setup.receive = SimReceiveLink(process, setup)

    def finish(self, deadline_s: float) -> ReceiveLink:
        """See `ReceiveSetup`."""
        current = current_thread()
        assert current is not None
        current.park(100e-6)
        return self._link

    def cancel(self) -> None:
        """See `ReceiveSetup`."""
        self._link.close()


class SimSendLink(SendLink):
    """See `SendLink`; `posted` holds (when it can be fetched, offset, bytes) by number."""

    def __init__(self, setup: _SendSetup) -> None:
        lane = None if setup.lanes is None else setup.lanes[0]
        super().__init__(setup.memory, peer=setup.peer, lane=lane)  # type: ignore[arg-type]
        self.process = setup.process
        self._setup = setup
        self._num_posted = 0
        self.is_closed = False

    def post(self, staged: Staged) -> str:
        """See `SendLink`."""
        if self.is_closed:
            raise HandoverError(f"link to {self._peer} is closed")
        self._num_posted += 1
        number, payload = self._num_posted, staged.payload
        receive, setup = self._setup.receive, self._setup
        assert receive is not None
        if not setup.is_shared:
            payload = payload.clone()
        world, payloads = setup.payloads.world, setup.payloads
        delay_s = 5e-6 if setup.is_shared else 100e-6 + payloads.seconds_per_byte * payload.numel()

        def arrive() -> None:
            path = payloads.network.path(self.process.name, receive.process.name)
            if setup.is_shared or not path.is_cut:
                if setup.is_shared or not self.process.is_dead:
                    receive.take(number, payload)
            else:
                world.after(0.2, arrive)

        world.after(delay_s, arrive)
        return str(number)

    def close(self) -> None:
        """See `SendLink`."""
        self.is_closed = True
        super().close()


class SimReceiveLink(ReceiveLink):
    """See `ReceiveLink`."""

    def __init__(self, process: Process, setup: _SendSetup) -> None:
        self.process = process
        self.lane = None if setup.lanes is None else setup.lanes[1]  # type: ignore[assignment]
        self._setup = setup
        self._arrived: dict[int, torch.Tensor] = {}
        self._fetchers: list[Thread] = []
        self.is_closed = False

    def take(self, number: int, payload: torch.Tensor) -> None:
        """A payload can be fetched."""
        self._arrived[number] = payload
        for fetcher in self._fetchers:
            fetcher.unpark()

    def fetch(self, locator: str, num_bytes: int, deadline_s: float) -> torch.Tensor:
        """See `ReceiveLink`."""
        me, world, number = current_thread(), self.process.world, int(locator)
        assert me is not None
        end_s = world.now_s + deadline_s
        me.park(20e-6)
        while number not in self._arrived:
            if self.is_closed:
                raise HandoverError("the link is closed")
            if world.now_s >= end_s:
                raise DeadlineError(f"payload {locator} did not come within {deadline_s:g} s")
            self._fetchers.append(me)
            me.park(min(0.5, end_s - world.now_s))
            self._fetchers.remove(me)
        payload = self._arrived.pop(number)
        assert payload.numel() == num_bytes, (payload.numel(), num_bytes)
        me.park(2e-5 + self._setup.payloads.seconds_per_byte * num_bytes)
        verdict = self._setup.payloads.spoil(self._setup.process.name, self.process.name)
        if verdict == "fail":
            raise HandoverError("reading the segment failed")
        if verdict == "flip":
            payload = payload.clone()
            place = world.random(f"flip {world.now_s}").randrange(payload.numel())
            payload[place] ^= 1 << (place % 8)
        return payload

    def discard(self, locator: str, num_bytes: int, deadline_s: float) -> None:
        """See `ReceiveLink`."""
        self.fetch(locator, num_bytes, deadline_s)

    def close(self) -> None:
        """See `ReceiveLink`."""
        self.is_closed = True
        if self.lane is not None:
            self.lane.close()
        for fetcher in self._fetchers:
            fetcher.unpark()
