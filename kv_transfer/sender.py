"""The prefill worker's side of all handovers: links to decode workers, and one `Shipment` per handover.

    engine thread                  event loop                                     link's staging thread
    shipment.offer(pages) ───────> SenderHandover ── Stage ─────────────────────> stage, gather, sum
    shipment.complete(token) ────>   │  <─────────── staged ─────────────────────┘
                                     ├── Post, PageOffer, ShipComplete ──> decode worker
    await shipment.settled() <───────┴── Ticket, PageAck, ShipSettled <──

The engine thread only queues: pages are gathered by the staging thread, so the blocks must stay as they are until the
shipment has settled. Everything else runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from baton.errors import BatonError, HandoverError, StaleError
from baton.kv_transfer.checksum import Checksum, payload_checksum
from baton.kv_transfer.handover import (
    BreakLink,
    Fail,
    HandoverKey,
    Offer,
    Post,
    Release,
    SendAbort,
    SendComplete,
    SenderAction,
    Settle,
    Stage,
)
from baton.kv_transfer.handover_sender import SenderHandover, SenderState
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import PageRange, cell_bytes
from baton.kv_transfer.sender_link import ChannelFactory, SenderLink, open_channel
from baton.kv_transfer.transports.base import Staged, Transport
from baton.kv_transfer.wire import FirstToken, completion_to_proto, offer_to_proto, terms_from_proto
from baton.proto.baton.v1 import worker_pb2

__all__ = ["Gather", "HandoverSender", "ShipResult", "Shipment"]

_log = logging.getLogger(__name__)

# (layer_begin, layer_end, token_begin, token_end, out): fills `out` (uint8) with the bytes of
# [layers, 2, heads, tokens, head_dim]. The ranges lie within those of the offer: what the receiver holds already is
# left out, and what does not fit into one payload comes in several calls.
Gather = Callable[[int, int, int, int, torch.Tensor], None]

_TICK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ShipResult:
    """What a handover that succeeded moved.

    Attributes:
        num_bytes, num_tokens: shipped; tokens that the receiver held already are not among them.
        exposed_s: seconds from the completion of the prefill until the receiver had attached the pages.
    """

    num_bytes: int
    num_tokens: int
    exposed_s: float


@dataclass(slots=True, eq=False)
class _Payload:
    pages: PageRange
    staged: Staged | None = None
    checksum: int = 0


class Shipment:
    """One handover as the prefill worker sees it; `offer`, `complete`, `abort` and `failure` are for any thread."""

    def __init__(
        self,
        key: HandoverKey,
        sender: HandoverSender,
        *,
        timeout_s: float,
        on_failed: Callable[[HandoverKey, str], None] | None,
    ) -> None:
        self._key = key
        self._sender = sender
        self._loop = asyncio.get_running_loop()
        self._machine = SenderHandover(
            cell_num_bytes=sender.cell_num_bytes,
            ticket_timeout_s=timeout_s,
            lease_s=sender.lease_s,
            now_s=sender.clock(),
        )
        self._on_failed = on_failed
        self._failure: HandoverError | None = None
        self._link: SenderLink | None = None
        self._sources: list[tuple[PageRange, Gather]] = []
        self._payloads: dict[int, _Payload] = {}
        self._shipped_bytes = 0
        self._completed_s = 0.0
        self._settled: asyncio.Future[ShipResult] = self._loop.create_future()
        # Whoever does not wait for the end must not be told at interpreter exit that nobody looked.
        self._settled.add_done_callback(lambda future: future.exception())

    # ---------------------------------------------------------------- any thread

    @property
    def key(self) -> HandoverKey:
        """Whose pages."""
        return self._key

    @property
    def failure(self) -> HandoverError | None:
        """Why the handover failed: the engine need not compute on. None while it goes well."""
        return self._failure

    def offer(self, layer_begin: int, layer_end: int, token_begin: int, token_end: int, gather: Gather) -> None:
        """These pages are computed and stay as they are until the shipment has settled. Queues, never blocks.

        `gather` is called on the staging thread, up to once per payload, only before the shipment has settled.
        """
        pages = PageRange(layer_begin, layer_end, 0, self._sender.num_kv_heads, token_begin, token_end)
        self._call(lambda: self._computed(pages, gather))

    def complete(self, first_token: FirstToken) -> None:
        """Everything is offered, and this token was sampled. Queues, never blocks."""
        self._call(lambda: self._complete(first_token))

    def abort(self, reason: str) -> None:
        """Give up: the receiver is told. Queues, never blocks; `settled` tells when the blocks are free."""
        self._call(lambda: self._perform(self._machine.aborted(reason)))

    def _call(self, event: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(event)

    # ---------------------------------------------------------------- the loop's thread

    async def settled(self) -> ShipResult:
        """Wait until nothing reads the prefill worker's blocks for this shipment any more.

        The wait is bounded by the lease. Cancelling it does not abort the shipment.

        Raises:
            HandoverError: the pages were not handed over; the decode worker computes the prompt itself.
        """
        return await asyncio.shield(self._settled)

    @property
    def state(self) -> SenderState:
        """Of the handover."""
        return self._machine.state

    @property
    def reservation_id(self) -> int:
        """Of the ticket, while this shipment waits for the receiver; else 0."""
        terms = self._machine.terms
        return 0 if terms is None or self._machine.state is SenderState.SETTLED else terms.reservation_id

    def start(self, link: SenderLink) -> None:
        """The link is there: ask for the ticket."""
        if not self._machine.is_open:
            return
        link.request_ticket(self)
        self._link = link

    def on_reply(self, reply: worker_pb2.ShipReply) -> None:
        """Called by the link."""
        machine, now_s = self._machine, self._sender.clock()
        match reply.WhichOneof("reply"):
            case "ticket":
                assert self._link is not None
                if reply.ticket.refusal:
                    self._perform(machine.refused(reply.ticket.refusal))
                    return
                terms = terms_from_proto(reply.ticket)
                if machine.state is not SenderState.COMPUTING:
                    reason = machine.reason or "the shipment is over"
                    self._link.send_abort(self.key, terms.reservation_id, terms.epoch, reason)
                    return
                limit = self._link.data_path.max_payload_bytes
                self._perform(machine.granted(terms, max_payload_bytes=limit, now_s=now_s))
            case "ack":
                if self._is_mine(reply.ack.epoch):
                    self._perform(machine.acked(reply.ack.seq, reply.ack.refusal, now_s))
            case "settled":
                if self._is_mine(reply.settled.epoch):
                    self._perform(machine.peer_settled(reply.settled.reason))

    def on_renewed(self) -> None:
        """Called by the link."""
        self._perform(self._machine.renewed(self._sender.clock()))

    def on_link_lost(self, reason: str) -> None:
        """Called by the link, and when none could be made."""
        self._perform(self._machine.link_lost(reason))

    def tick(self) -> None:
        """Look at the deadlines."""
        self._perform(self._machine.tick(self._sender.clock()))

    def fail(self, error: HandoverError) -> None:
        """There is no link, for this reason."""
        if self._failure is None:
            self._failure = error
        self._perform(self._machine.link_lost(str(error)))

    def _is_mine(self, epoch: int) -> bool:
        return self._machine.terms is not None and epoch == self._machine.terms.epoch

    def _computed(self, pages: PageRange, gather: Gather) -> None:
        if self._machine.is_open:
            self._sources.append((pages, gather))
            self._perform(self._machine.computed(pages))

    def _complete(self, first_token: FirstToken) -> None:
        self._completed_s = self._sender.clock()
        self._perform(self._machine.completed(first_token))

    # ---------------------------------------------------------------- actions

    def _perform(self, actions: tuple[SenderAction, ...]) -> None:
        """Carry out what the machine asks for, in order."""
        link, terms = self._link, self._machine.terms
        for action in actions:
            match action:
                case Stage(seq, pages):
                    self._stage(seq, pages)
                case Post(seq):
                    self._post(seq)
                case Release(seq):
                    assert link is not None
                    staged = self._payloads.pop(seq).staged
                    assert staged is not None
                    link.data_path.release(staged)
                case SendComplete(completion):
                    assert link is not None
                    assert terms is not None
                    complete = completion_to_proto(completion, terms, self._sender.peer.incarnation)
                    link.send(worker_pb2.ShipMessage(complete=complete))
                case SendAbort(reason):
                    if link is not None:
                        reservation_id, epoch = (terms.reservation_id, terms.epoch) if terms else (0, 0)
                        link.send_abort(self.key, reservation_id, epoch, reason)
                case BreakLink(reason):
                    assert link is not None
                    link.close(reason)
                case Fail(reason):
                    self._fail(reason)
                case Settle():
                    self._settle()

    def _stage(self, seq: int, pages: PageRange) -> None:
        link = self._link
        assert link is not None
        gather = next(gather for source, gather in self._sources if pages.within(source))
        payload = self._payloads[seq] = _Payload(pages)
        num_bytes = pages.num_cells * self._sender.cell_num_bytes
        machine, data_path, sender = self._machine, link.data_path, self._sender

        def job() -> None:
            if not machine.is_open:
                raise HandoverError("not wanted any more")
            staged = data_path.stage(num_bytes, sender.lease_s)
            try:
                gather(pages.layer_begin, pages.layer_end, pages.token_begin, pages.token_end, staged.payload)
                payload.checksum = sender.checksum(staged.payload.numpy().data)
            except BaseException:
                data_path.release(staged)
                raise
            payload.staged = staged

        def done(error: str) -> None:
            if error:
                del self._payloads[seq]
                self._perform(machine.stage_failed(seq, error))
            else:
                self._perform(machine.staged(seq))

        link.run(job, done)

    def _post(self, seq: int) -> None:
        link, terms, payload = self._link, self._machine.terms, self._payloads[seq]
        assert link is not None
        assert terms is not None
        assert payload.staged is not None
        try:
            locator = link.data_path.post(payload.staged)
        except HandoverError as error:
            link.close(str(error))
            return
        num_bytes = payload.staged.payload.numel()
        self._shipped_bytes += num_bytes
        offer = Offer(seq=seq, pages=payload.pages, num_bytes=num_bytes, checksum=payload.checksum, locator=locator)
        link.send(worker_pb2.ShipMessage(offer=offer_to_proto(offer, terms, self._sender.peer.incarnation)))

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = HandoverError(f"handover {self.key} failed: {reason}")
        _log.warning("%s", self._failure)
        if self._on_failed is not None:
            self._on_failed(self.key, reason)

    def _settle(self) -> None:
        self._sources.clear()
        self._sender.forget(self)
        if self._link is not None:
            self._link.shipments.pop(self.key, None)
        if self._failure is not None:
            self._settled.set_exception(self._failure)
            return
        terms = self._machine.terms
        assert terms is not None
        self._settled.set_result(
            ShipResult(
                num_bytes=self._shipped_bytes,
                num_tokens=terms.num_tokens - terms.cached_tokens,
                exposed_s=self._sender.clock() - self._completed_s,
            )
        )


class HandoverSender:
    """All links and shipments of a prefill worker.

    Args:
        peer: this worker.
        transports: best first; the sender closes none of them.
        lease_s: silence of a receiver after which a shipment is given up, where its ticket does not say.
        renew_s: how often leases are renewed.
        connect_timeout_s: how long making a link may take.
        max_links: the least recently used idle link gives way to a new one beyond this.
        clock: monotonic seconds.
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
        checksum: Checksum = payload_checksum,
        channel_factory: ChannelFactory = open_channel,
    ) -> None:
        self.peer = peer
        self.lease_s = lease_s
        self.clock = clock
        self.checksum = checksum
        self.cell_num_bytes = cell_bytes(peer.layout)
        self.num_kv_heads = peer.layout.num_kv_heads
        self._transports = tuple(transports)
        self._renew_s = renew_s
        self._connect_timeout_s = connect_timeout_s
        self._max_links = max_links
        self._channel_factory = channel_factory
        self._links: OrderedDict[str, asyncio.Task[SenderLink]] = OrderedDict()
        self._shipments: set[Shipment] = set()
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
        """The link to a decode worker, made when there is none or the last one broke; concurrent callers share it.

        Raises:
            HandoverError: no link can be had (IncompatibleError where the peers do not fit).
        """
        task = self._links.get(address)
        if task is not None and task.done():
            link = _result(task)
            if link is None or link.is_closed:
                del self._links[address]
                task = None
        if task is None:
            self._make_room()
            task = self._links[address] = asyncio.get_running_loop().create_task(self._connect(address))
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        self._links.move_to_end(address)
        return await asyncio.shield(task)

    async def begin(
        self,
        key: HandoverKey,
        decode_address: str,
        decode_incarnation: bytes,
        timeout_s: float,
        *,
        on_failed: Callable[[HandoverKey, str], None] | None = None,
    ) -> Shipment:
        """Start a handover: the link and the ticket are asked for in the background, computing can start at once.

        Args:
            decode_incarnation: the process that the router meant; another one behind the address is a stranger.
            timeout_s: how long link and ticket may take together.
            on_failed: told once, on the loop's thread, as soon as the handover cannot succeed any more.
        """
        shipment = Shipment(key, self, timeout_s=timeout_s, on_failed=on_failed)
        self._shipments.add(shipment)
        task = asyncio.get_running_loop().create_task(self._start(shipment, decode_address, decode_incarnation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return shipment

    def forget(self, shipment: Shipment) -> None:
        """A shipment has settled; called by it."""
        self._shipments.discard(shipment)

    def tick(self) -> None:
        """Look at the deadlines of all shipments; called by the sender's own task."""
        for shipment in list(self._shipments):
            shipment.tick()

    def renew_leases(self) -> None:
        """Renew the leases of all shipments, and close links that are silent; called by the sender's own task."""
        for task in list(self._links.values()):
            link = _result(task)
            if link is not None:
                link.renew_leases(self.lease_s)

    async def close(self) -> None:
        """Abort every shipment, close every link, and wait for both."""
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
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None

    async def _connect(self, address: str) -> SenderLink:
        link = SenderLink(self.peer, address, self._transports, self._channel_factory, self.clock)
        await link.connect(self._connect_timeout_s)
        return link

    async def _start(self, shipment: Shipment, address: str, incarnation: bytes) -> None:
        try:
            link = await self.link(address)
            if link.peer.incarnation != incarnation:
                raise StaleError(
                    f"{address} is now {link.peer}, not the process {incarnation.hex()[:8]} that was asked for"
                )
            shipment.start(link)
        except BatonError as error:
            shipment.fail(error if isinstance(error, HandoverError) else HandoverError(str(error)))
        except asyncio.CancelledError:
            shipment.fail(HandoverError(f"the prefill worker stops before a link to {address} is up"))
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
        next_renewal_s = self.clock() + self._renew_s
        while True:
            await asyncio.sleep(min(_TICK_S, self._renew_s))
            self.tick()
            if self.clock() >= next_renewal_s:
                next_renewal_s = self.clock() + self._renew_s
                self.renew_leases()


def _result(task: asyncio.Task[SenderLink]) -> SenderLink | None:
    """The link that a task made; None while it works and when it failed."""
    if not task.done() or task.cancelled() or task.exception() is not None:
        return None
    return task.result()


def _is_busy(task: asyncio.Task[SenderLink]) -> bool:
    link = _result(task)
    return link is not None and not link.is_closed and bool(link.shipments)
