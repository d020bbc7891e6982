"""A prefill rank's side of all handovers: links to decode ranks, leases, and the shipments that are under way."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from baton.errors import BatonError, HandoverError, StaleError
from baton.kv_transfer.checksum import Checksum, payload_checksum
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.pair_shipment import PairShipment, ShipmentContext
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.sender_link import ChannelFactory, SenderLink, open_channel
from baton.kv_transfer.shipment import DecodeTarget, Shipment
from baton.kv_transfer.transports.base import Transport
from baton.kv_transfer.transports.failures import TransportFailures

__all__ = ["HandoverSender"]

_log = logging.getLogger(__name__)

_TICK_S = 0.5
_BUSY_RENEW_S = 1.0
_RENEWALS_PER_LEASE = 3


class HandoverSender:
    """All links and shipments of a prefill rank.

    Args:
        peer: this rank.
        transports: best first; the sender closes none of them.
        lease_s: silence of a receiver after which a shipment is given up, where its ticket does not say.
        renew_s: how often leases are renewed, more often where the lease is short; on links with shipments every
            second, so that one whose receiver does not answer is found within some seconds.
        connect_timeout_s: how long making a link may take.
        max_links: the least recently used idle link gives way to a new one beyond this.
        clock: monotonic seconds.
        checksum: of a gathered payload; None where the shipments' `Gather` returns it, of the same bytes.
    """

    def __init__(
        self,
        peer: LocalPeer,
        *,
        transports: Sequence[Transport],
        lease_s: float = 30.0,
        renew_s: float = 5.0,
        connect_timeout_s: float = 10.0,
        max_links: int = 32,
        clock: Callable[[], float] = time.monotonic,
        checksum: Checksum | None = payload_checksum,
        channel_factory: ChannelFactory = open_channel,
    ) -> None:
        self._peer = peer
        self._lease_s = lease_s
        self._clock = clock
        self._transports = {transport.name: transport for transport in transports}
        self._failures = TransportFailures()
        self._renew_s = min(renew_s, lease_s / _RENEWALS_PER_LEASE)
        self._connect_timeout_s = connect_timeout_s
        self._max_links = max_links
        self._channel_factory = channel_factory
        self._links: OrderedDict[str, asyncio.Task[SenderLink | HandoverError]] = OrderedDict()
        self._shipments: set[Shipment] = set()
        self._context = ShipmentContext(peer=peer, lease_s=lease_s, clock=clock, checksum=checksum)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None

    @property
    def num_shipments(self) -> int:
        """Shipments that are not settled."""
        return len(self._shipments)

    def start(self) -> None:
        """Begin to renew leases and to watch deadlines; needs a running event loop."""
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick_for_ever(), name="baton-sender-leases")

    async def link(self, address: str) -> SenderLink:
        """The link to a decode rank, made when there is none or the last one broke; concurrent callers share it.

        Raises:
            HandoverError: no link can be had (IncompatibleError where the peers do not fit).
        """
        task = self._links.get(address)
        if task is not None and task.done():
            link = _result(task)
            if link is None or link.is_closed:
                if link is not None and link.failed_transport:
                    self._note_failure(link)
                del self._links[address]
                task = None
        if task is None:
            self._make_room()
            task = self._links[address] = asyncio.get_running_loop().create_task(self._try(address))
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        self._links.move_to_end(address)
        found = await asyncio.shield(task)
        if isinstance(found, HandoverError):
            raise copy.copy(found)
        return found

    async def warm_up(self, target: DecodeTarget) -> None:
        """Make the links to those ranks of a decode instance that need something from this rank, off the data path.

        Raises:
            HandoverError: one of them cannot be had.
        """
        ranks = target.ranks_for(self._peer)
        await asyncio.gather(*(self.link(target.ranks[rank].address) for rank in ranks))

    def begin(
        self,
        key: HandoverKey,
        target: DecodeTarget,
        timeout_s: float,
        *,
        on_failed: Callable[[HandoverKey, str], None] | None = None,
    ) -> Shipment:
        """Start a handover: links and tickets are asked for in the background, computing can start at once.

        Call it on the event loop.

        Args:
            target: the decode instance; only those of its ranks are met that need something from this rank.
            timeout_s: how long link and ticket may take together.
            on_failed: told once, on the loop's thread, as soon as the handover cannot succeed any more.

        Raises:
            IncompatibleError: the target's layout does not fit its ranks, or this rank's layout.
        """
        shipment = Shipment(
            key,
            self._context,
            target,
            timeout_s=timeout_s,
            on_failed=on_failed,
            forget=self._shipments.discard,
        )
        self._shipments.add(shipment)
        for pair in shipment.pairs.values():
            task = asyncio.get_running_loop().create_task(self._start(pair, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return shipment

    def tick(self) -> None:
        """Look at the deadlines of all shipments; called by the sender's own task."""
        for shipment in list(self._shipments):
            shipment.tick()

    def renew_leases(self, *, only_busy: bool = False) -> None:
        """Renew the leases of all shipments, and close links that are silent; called by the sender's own task."""
        for task in list(self._links.values()):
            link = _result(task)
            if link is not None and (link.shipments or not only_busy):
                link.renew_leases(self._lease_s)

    async def close(self) -> None:
        """Abort every shipment, close every link, and wait for both, for a lease at most."""
        ends = [asyncio.ensure_future(shipment.settled()) for shipment in self._shipments]
        for shipment in list(self._shipments):
            shipment.abort("the prefill worker stops")
        await asyncio.sleep(0)
        for starting in self._tasks:
            starting.cancel()
        tasks = list(self._links.values())
        self._links.clear()
        for task in tasks:
            task.cancel()
        for link in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(link, SenderLink):
                link.close("the prefill worker stops")
                await link.closed()
        if ends:
            _, late = await asyncio.wait(ends, timeout=self._lease_s)
            for end in late:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None

    async def _try(self, address: str) -> SenderLink | HandoverError:
        """A link, or why there is none: as a result, since an error that is raised keeps the frames it goes through."""
        try:
            return await self._connect(address)
        except HandoverError as error:
            return copy.copy(error)

    async def _connect(self, address: str) -> SenderLink:
        """A link over the best transport that can be set up: one that fails is not offered in the next try."""
        names = self._failures.usable(address, tuple(self._transports), self._clock()) or tuple(self._transports)
        while True:
            transports = [self._transports[name] for name in names]
            link = SenderLink(self._peer, address, transports, self._channel_factory, self._clock)
            try:
                await link.connect(self._connect_timeout_s)
                return link
            except HandoverError as error:
                if not link.failed_transport:
                    raise
                self._note_failure(link)
                names = tuple(name for name in names if name != link.failed_transport)
                if not names:
                    reasons = self._failures.reasons(address)
                    texts = "; ".join(f"{name}: {reasons[name]}" for name in self._transports if name in reasons)
                    raise HandoverError(f"no transport to {address} can be set up: {texts}") from error

    def _note_failure(self, link: SenderLink) -> None:
        address, name, reason = link.address, link.failed_transport, link.close_reason
        is_news = self._failures.note(address, name, reason, self._clock())
        level = logging.WARNING if is_news else logging.DEBUG
        _log.log(level, "transport %s to %s fails, trying the others: %s", name, address, reason)

    async def _start(self, pair: PairShipment, target: DecodeTarget) -> None:
        meant = target.ranks[pair.rank]
        try:
            link = await self.link(meant.address)
            if link.peer.incarnation != meant.incarnation:
                raise StaleError(
                    f"{meant.address} is now {link.peer}, not the process {meant.incarnation.hex()[:8]} that was "
                    "asked for"
                )
            pair.start(link, len(target.ranks))
        except BatonError as error:
            pair.fail(error if isinstance(error, HandoverError) else HandoverError(str(error)))
        except asyncio.CancelledError:
            pair.fail(HandoverError(f"the prefill worker stops before a link to {meant.address} is up"))
            raise

    def _make_room(self) -> None:
        while len(self._links) >= self._max_links:
            idle = (address for address, task in self._links.items() if task.done() and not _is_busy(task))
            address = next(idle, None)
            if address is None:
                raise HandoverError(f"{len(self._links)} links are all busy, which is the limit")
            link = _result(self._links.pop(address))
            if link is not None:
                link.close("another link needs the room")

    async def _tick_for_ever(self) -> None:
        busy_s = min(_BUSY_RENEW_S, self._renew_s)
        next_renewal_s = next_busy_s = self._clock() + busy_s
        while True:
            await asyncio.sleep(min(_TICK_S, self._renew_s))
            self.tick()
            now_s = self._clock()
            if now_s >= next_busy_s:
                next_busy_s = now_s + busy_s
                self.renew_leases(only_busy=now_s < next_renewal_s)
                if now_s >= next_renewal_s:
                    next_renewal_s = now_s + self._renew_s


def _result(task: asyncio.Task[SenderLink | HandoverError]) -> SenderLink | None:
    """The link that a task made; None while it works and when it failed."""
    if not task.done() or task.cancelled() or task.exception() is not None:
        return None
    found = task.result()
    return found if isinstance(found, SenderLink) else None


def _is_busy(task: asyncio.Task[SenderLink | HandoverError]) -> bool:
    link = _result(task)
    return link is not None and not link.is_closed and bool(link.shipments)
