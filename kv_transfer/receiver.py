"""A decode rank's side of all handovers: serves `Handover.Ship`, holds the reservations, drives their machines.

    worker                                   HandoverReceiver                            prefill ranks
    open_reservation(key, blocks, ...) ────> Reservation <────── TicketRequest, PageOffer, ShipComplete, ... Ship
    on_landed | on_failed   <────────────────┤
    on_settled              <────────────────┘ ──> Ticket, PageAck, ShipSettled

Threads: every method and every callback runs on the event loop's thread, except `write_pages`, which runs on the
fetching threads of the link concerned. A link's lane has a thread of its own, which tells the machines about offers and
payloads itself: a lock is around every event, what an event asks for is queued under it, and carried out on the loop's
thread in the order of the events, but for two things that the lane's thread does at once, to fetch and to ack.

For each reservation exactly one of `on_landed` and `on_failed` is called (a `cancel` is a failure too), and then
`on_settled` exactly once: before that the reserved blocks may still be written to.

Another prefill worker may try again what one could not: `open_reservation` with the next handover number, over the same
blocks, once the reservation before has settled. Ticket requests that are ahead of it wait, those of tries before it are
refused.

Every rank of a decode instance has a receiver and reservations of its own, for the layers and heads that it holds. They
know nothing of each other: what happens to a request on one rank is told through the callbacks, at once, to whoever
drives the instance. That is who attaches when every rank has landed, and when one has failed cancels on the others and
computes locally as soon as every rank has settled.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from baton.errors import DeadlineError, HandoverError, IncompatibleError
from baton.kv_transfer.checksum import Checksum, payload_checksum
from baton.kv_transfer.handover import (
    Ack,
    Discard,
    Fail,
    Fetch,
    GrantTicket,
    HandoverKey,
    Land,
    Offer,
    RefusalCause,
    RefuseTicket,
    Settle,
    TellSettled,
    TicketTerms,
)
from baton.kv_transfer.peer import LocalPeer, peer_to_proto
from baton.kv_transfer.plan import PageRange, rank_pages
from baton.kv_transfer.receiver_link import ReceiverLink, WritePayload
from baton.kv_transfer.receiver_links import ReceiverLinks
from baton.kv_transfer.reservation import Reservation, ReservationAction, Source, ToPair
from baton.kv_transfer.transports.base import ReceiveSetup, Transport
from baton.kv_transfer.transports.failures import TransportFailures
from baton.kv_transfer.wire import FirstToken, completion_from_proto, offer_from_proto, ticket_to_proto
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc
from baton.proto.stream_order import SequenceGapError, StreamOrder

__all__ = ["HandoverReceiver", "WritePages"]

_log = logging.getLogger(__name__)

# (block_ids, pages, payload): payload is uint8, the bytes of [layers, 2, heads, tokens, head_dim]. Layers and heads
# count within the rank's own pool, token positions from the prompt's start, block_ids from token 0. Returns the
# checksum of what it wrote where the receiver is made without one of its own; else what it returns is ignored.
WritePages = Callable[[tuple[int, ...], PageRange, torch.Tensor], int | None]

_Event = Callable[[Reservation], tuple[ReservationAction, ...]]

_MAX_ENDED = 4096
_MAX_WAITING = 4096
_TICK_S = 0.5


@dataclass(slots=True, eq=False)
class _Reserved:
    """`links` holds the sender of each pair that has its ticket, by prefill rank."""

    key: HandoverKey
    block_ids: tuple[int, ...]
    machine: Reservation
    links: dict[int, ReceiverLink] = field(default_factory=dict)

    def is_bound_to(self, link: ReceiverLink) -> bool:
        return self.links.get(link.peer.rank) is link


class HandoverReceiver(worker_pb2_grpc.HandoverServicer):
    """Servicer of the Handover service on a decode rank.

    Args:
        peer: this rank.
        transports: best first; the receiver closes none of them.
        write_pages: copies a payload into reserved blocks; called on fetching threads, several at a time.
        on_landed, on_failed, on_settled: see the module's text. The first token is None on every rank but the driver.
        on_refused: told whenever pages, a ticket or a link are refused, for a metric; may be called by any thread.
        lease_s: silence after which a reservation is given up, and an idle link closed.
        fetch_timeout_s: how long one payload may take to come.
        max_links: prefill ranks at a time; the least recently used idle link gives way to a new one beyond this.
        clock: monotonic seconds.
        checksum: of a payload, verified before `write_pages` is called. None where `write_pages` returns it: one pass
            over memory, verified when the payload is in the blocks. Those are the reservation's own (pages that were
            cached are never offered) and nobody reads them before it has landed, which a wrong checksum prevents.
    """

    def __init__(
        self,
        peer: LocalPeer,
        *,
        transports: Sequence[Transport],
        write_pages: WritePages,
        on_landed: Callable[[HandoverKey, FirstToken | None], None],
        on_failed: Callable[[HandoverKey, Fail], None],
        on_settled: Callable[[HandoverKey], None],
        on_refused: Callable[[RefusalCause], None] = lambda cause: None,
        lease_s: float = 30.0,
        fetch_timeout_s: float = 10.0,
        max_links: int = 64,
        clock: Callable[[], float] = time.monotonic,
        checksum: Checksum | None = payload_checksum,
    ) -> None:
        self._peer = peer
        self._transports = tuple(transports)
        self._failures = TransportFailures()
        self._write_pages = write_pages
        self._on_landed = on_landed
        self._on_failed = on_failed
        self._on_settled = on_settled
        self._on_refused = on_refused
        self._lease_s = lease_s
        self._fetch_timeout_s = fetch_timeout_s
        self._clock = clock
        self._checksum = checksum
        self._held = rank_pages(peer.layout, peer.rank, 0, 0)
        self._next_id = 1
        self._reservations: dict[HandoverKey, _Reserved] = {}
        # The open reservation of a dispatch: there is never more than one.
        self._newest: dict[tuple[str, int], HandoverKey] = {}
        self._by_id: dict[int, _Reserved] = {}
        self._ended: OrderedDict[HandoverKey, str] = OrderedDict()
        # When the wait of a ticket request ends, by who asked for what.
        self._waiting: dict[tuple[HandoverKey, ReceiverLink], float] = {}
        self._lock = threading.Lock()
        # What the machines asked for and is not carried out yet; appended to under the lock.
        self._asked: deque[tuple[_Reserved, tuple[ReservationAction, ...], ReceiverLink | None]] = deque()
        self._links: ReceiverLinks[ReceiverLink] = ReceiverLinks(max_links=max_links, silence_s=lease_s)
        self._idle = asyncio.Event()
        self._idle.set()
        self._ticker: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------- for the worker

    @property
    def num_reservations(self) -> int:
        """Reservations that are not settled."""
        return len(self._reservations)

    @property
    def num_links(self) -> int:
        """Streams that are open."""
        return len(self._links)

    def start(self) -> None:
        """Begin to watch leases; needs a running event loop."""
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick_for_ever(), name="baton-receiver-leases")

    def open_reservation(
        self, key: HandoverKey, block_ids: Sequence[int], *, cached_tokens: int, num_tokens: int
    ) -> None:
        """Blocks are reserved for this request: answer the ticket request that waits, or the one that will come.

        Args:
            block_ids: of the whole prompt, in order.
            cached_tokens: leading tokens whose pages are in these blocks already; a multiple of the block size.
            num_tokens: prompt length.
        """
        layout = self._peer.layout
        assert key.dispatch not in self._newest, f"{key}: {self._newest[key.dispatch]} is not settled"
        assert cached_tokens % layout.block_size == 0, f"{cached_tokens} cached tokens are not whole blocks"
        assert 0 <= cached_tokens < num_tokens <= len(block_ids) * layout.block_size, f"{key} does not fit its blocks"
        terms = TicketTerms(
            reservation_id=self._next_id,
            epoch=0,
            cached_tokens=cached_tokens,
            num_tokens=num_tokens,
            lease_s=self._lease_s,
        )
        self._next_id += 1
        machine = Reservation(terms, layout, self._peer.rank, draw_epoch=_draw_epoch, now_s=self._clock())
        reservation = _Reserved(key, tuple(block_ids), machine)
        self._reservations[key] = reservation
        self._newest[key.dispatch] = key
        self._idle.clear()
        self._by_id[terms.reservation_id] = reservation
        self._ended.pop(key, None)
        for waiting in {asked for asked, _ in self._waiting if _is_superseded(asked, key)}:
            for link in self._take_waiting(waiting):
                self._refuse_ticket(link, waiting, f"{key} has taken its place", RefusalCause.ENDED)
        for link in self._take_waiting(key):
            self._request_ticket(reservation, link)

    def cancel(self, key: HandoverKey, reason: str) -> None:
        """Give up on the pages of a request: client gone, timeout, or there will be no reservation at all.

        With a reservation, `on_failed` follows unless it has landed or failed before, and `on_settled` when nothing
        writes to the blocks any more. Without one, a ticket request for it is refused, now or when it comes.
        """
        reservation = self._reservations.get(key)
        if reservation is not None:
            self._tell(reservation, lambda machine: machine.cancelled(reason))
            return
        self._remember_ended(key, reason)
        for link in self._take_waiting(key):
            self._refuse_ticket(link, key, reason, RefusalCause.ENDED)

    def tick(self) -> None:
        """Look at the leases; called by the receiver's own task."""
        now_s = self._clock()
        for reservation in list(self._reservations.values()):
            self._tell(reservation, lambda machine: machine.tick(now_s))
        for (key, link), deadline_s in list(self._waiting.items()):
            if now_s >= deadline_s:
                del self._waiting[key, link]
                self._refuse_ticket(link, key, f"no reservation within {self._lease_s:g} s", RefusalCause.ENDED)
        for link in self._links.silent(now_s, self._is_busy):
            self._drop(link, f"nothing heard from {link.peer} for {self._lease_s:g} s")

    async def close(self) -> None:
        """Fail what is open, end all links and the lease task, and wait until the copies that run have ended.

        Raises:
            DeadlineError: a copy did not end within the fetch deadline; the blocks it writes to must not be used.
        """
        for key in list(self._reservations):
            self.cancel(key, "the decode worker stops")
        for link in self._links:
            self._drop(link, "the decode worker stops")
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None
        try:
            async with asyncio.timeout(2 * self._fetch_timeout_s):
                await self._idle.wait()
        except TimeoutError:
            keys = ", ".join(map(str, self._reservations))
            raise DeadlineError(f"copies for {keys} did not end within {2 * self._fetch_timeout_s:g} s") from None

    # ---------------------------------------------------------------- the stream

    async def Ship(
        self, request_iterator: AsyncIterator[worker_pb2.ShipMessage], context: Any
    ) -> AsyncIterator[worker_pb2.ShipReply]:
        """One prefill rank's stream, for as long as it lives."""
        del context
        order = StreamOrder()
        try:
            link, setup = await self._introduce(request_iterator, order)
        except HandoverError as error:
            _log.warning("link refused: %s", error)
            if isinstance(error, IncompatibleError):
                self._on_refused(RefusalCause.LAYOUT)
            refusal = worker_pb2.LinkWelcome(receiver=peer_to_proto(self._peer), refusal=str(error))
            yield worker_pb2.ShipReply(welcome=refusal, seq=1)
            return
        reader = asyncio.create_task(self._read(link, setup, request_iterator, order))
        try:
            async for reply in link.replies():
                yield reply
        finally:
            reader.cancel()
            self._drop(link, "the sender went away")

    async def _introduce(
        self, messages: AsyncIterator[worker_pb2.ShipMessage], order: StreamOrder
    ) -> tuple[ReceiverLink, ReceiveSetup]:
        try:
            async with asyncio.timeout(self._fetch_timeout_s):
                first = await anext(messages)
        except TimeoutError:
            raise HandoverError(f"no LinkHello within {self._fetch_timeout_s:g} s") from None
        except StopAsyncIteration:
            raise HandoverError("the stream ended before LinkHello") from None
        if first.WhichOneof("message") != "hello":
            raise HandoverError(f"the first message must be a hello, not {first.WhichOneof('message')}")
        order.accept(first.seq)
        evicted = self._links.begin_introduction(self._is_busy)
        if evicted is not None:
            self._drop(evicted, "another link needs the room")
        link = None
        try:
            peer, name, setup = await asyncio.to_thread(
                ReceiverLink.choose, first.hello, self._peer, self._transports, self._failures
            )
            link = ReceiverLink(
                peer,
                name,
                checksum=self._checksum,
                fetch_timeout_s=self._fetch_timeout_s,
                on_refused=self._on_refused,
            )
        finally:
            self._links.end_introduction(link, self._clock())
        link.welcome(self._peer, setup.options)
        return link, setup

    def _is_busy(self, link: ReceiverLink) -> bool:
        """A link that is being set up, or that a handover or a payload needs."""
        return (
            link.is_at_work
            or any(asker is link for _, asker in self._waiting)
            or any(reservation.is_bound_to(link) for reservation in self._reservations.values())
        )

    async def _read(
        self,
        link: ReceiverLink,
        setup: ReceiveSetup,
        messages: AsyncIterator[worker_pb2.ShipMessage],
        order: StreamOrder,
    ) -> None:
        try:
            try:
                await link.connect(setup)
            except HandoverError as error:
                link.withdraw(self._peer, f"{link.transport_name} could not be set up: {error}")
                raise
            _log.info("link from %s is up over %s", link.peer, link.transport_name)
            link.listen(partial(self._dispatch, link), partial(self._on_lane_offer, link))
            async for message in messages:
                await link.wait_for_room()
                if self._is_next(link, order, message):
                    self._dispatch(link, message)
            link.close("the sender ended the stream")
        except HandoverError as error:
            _log.warning("link from %s failed: %s", link.peer, error)
            link.close(str(error))
        finally:
            # A bug here must not leave the stream open and unread: its reservations fail and are computed locally.
            link.close("the stream is read no more")

    def _is_next(self, link: ReceiverLink, order: StreamOrder, message: worker_pb2.ShipMessage) -> bool:
        try:
            return order.accept(message.seq)
        except SequenceGapError as error:
            self._on_refused(RefusalCause.GAP)
            raise HandoverError(f"a message of {link.peer} is missing: {error}") from error

    def _drop(self, link: ReceiverLink, reason: str) -> None:
        self._links.discard(link)
        link.close(reason)
        self._waiting = {asked: deadline_s for asked, deadline_s in self._waiting.items() if asked[1] is not link}
        for reservation in [r for r in self._reservations.values() if r.is_bound_to(link)]:
            lost = f"link to {link.peer} ended: {link.close_reason}"
            self._tell(reservation, _link_lost(link.peer.rank, lost))

    # ---------------------------------------------------------------- messages in

    def _dispatch(self, link: ReceiverLink, message: worker_pb2.ShipMessage) -> None:
        self._links.heard(link, self._clock(), is_use=message.WhichOneof("message") != "renewal")
        match message.WhichOneof("message"):
            case "ticket_request":
                self._on_ticket_request(link, message.ticket_request)
            case "offer":
                self._on_offer(link, message.offer)
            case "complete":
                self._on_complete(link, message.complete)
            case "abort":
                self._on_abort(link, message.abort)
            case "renewal":
                self._on_renewal(link, message.renewal)
            case other:
                raise HandoverError(f"{link.peer} sent {other}, which has no place here")

    def _on_ticket_request(self, link: ReceiverLink, request: worker_pb2.TicketRequest) -> None:
        key = HandoverKey(request.request_id, request.attempt, request.handover)
        reservation, newest = self._reservations.get(key), self._newest.get(key.dispatch)
        if request.receiver_incarnation != self._peer.incarnation:
            reason = f"incarnation {request.receiver_incarnation.hex()[:8]} is not mine"
            self._refuse_ticket(link, key, reason, RefusalCause.INCARNATION)
        elif reservation is not None:
            self._request_ticket(reservation, link)
        elif key in self._ended:
            self._refuse_ticket(link, key, f"the reservation has ended: {self._ended[key]}", RefusalCause.ENDED)
        elif newest is not None and _is_superseded(key, newest):
            self._refuse_ticket(link, key, f"stale: {newest} has taken its place", RefusalCause.ENDED)
        elif (key, link) in self._waiting or len(self._waiting) >= _MAX_WAITING:
            reason = "asked for twice, or too many tickets are waited for"
            self._refuse_ticket(link, key, reason, RefusalCause.MALFORMED)
        else:
            self._waiting[key, link] = self._clock() + self._lease_s

    def _take_waiting(self, key: HandoverKey) -> list[ReceiverLink]:
        links = [link for waiting, link in self._waiting if waiting == key]
        for link in links:
            del self._waiting[key, link]
        return links

    def _request_ticket(self, reservation: _Reserved, link: ReceiverLink) -> None:
        peer = link.peer
        source, now_s = Source(peer.instance_id, peer.layout), self._clock()
        self._tell(
            reservation,
            lambda machine: machine.ticket_requested(source, peer.rank, peer.incarnation, now_s),
            asker=link,
        )

    def _on_offer(self, link: ReceiverLink, message: worker_pb2.PageOffer) -> None:
        offer = offer_from_proto(message)
        reservation = self._by_id.get(message.reservation_id)
        if reservation is None or not reservation.is_bound_to(link):
            refusal = f"stale: reservation {message.reservation_id} is not open on this link"
            self._on_refused(RefusalCause.ENDED)
            link.refuse(offer, message.reservation_id, message.epoch, refusal)
            return
        self._tell(reservation, self._offered(link, offer, message))

    def _offered(self, link: ReceiverLink, offer: Offer, message: worker_pb2.PageOffer) -> _Event:
        epoch, sender, now_s = message.epoch, message.sender_incarnation, self._clock()
        return lambda machine: machine.offered(link.peer.rank, offer, epoch=epoch, sender=sender, now_s=now_s)

    def _on_complete(self, link: ReceiverLink, message: worker_pb2.ShipComplete) -> None:
        reservation = self._by_id.get(message.reservation_id)
        if reservation is None or not reservation.is_bound_to(link):
            return
        epoch, sender, now_s = message.epoch, message.sender_incarnation, self._clock()
        completion = completion_from_proto(message, link.peer.instance_id, now_s=now_s)
        self._tell(
            reservation,
            lambda machine: machine.completed(link.peer.rank, completion, epoch=epoch, sender=sender, now_s=now_s),
        )

    def _on_abort(self, link: ReceiverLink, message: worker_pb2.ShipAbort) -> None:
        key = HandoverKey(message.request_id, message.attempt, message.handover)
        self._waiting.pop((key, link), None)
        reservation = self._reservations.get(key)
        if reservation is None or not reservation.is_bound_to(link):
            return
        # Without an epoch the sender gave up before its ticket arrived; the link says that the ticket was its own.
        rank, reason, epoch = link.peer.rank, message.reason, message.epoch
        self._tell(reservation, lambda machine: machine.sender_aborted(rank, reason, epoch=epoch))

    def _on_renewal(self, link: ReceiverLink, message: worker_pb2.LeaseRenewal) -> None:
        now_s = self._clock()
        alive: list[int] = []
        for reservation_id in message.reservation_ids:
            reservation = self._by_id.get(reservation_id)
            if reservation is None or not reservation.is_bound_to(link):
                continue
            with self._lock:
                if reservation.machine.renewed(link.peer.rank, now_s, sender=link.peer.incarnation):
                    alive.append(reservation_id)
        link.send(worker_pb2.ShipReply(renewal=worker_pb2.LeaseRenewal(reservation_ids=alive)))

    # ---------------------------------------------------------------- actions out

    def _tell(self, reservation: _Reserved, event: _Event, *, asker: ReceiverLink | None = None) -> None:
        """Tell a machine of an event, and carry out what it asks for, behind what was asked for before."""
        with self._lock:
            self._asked.append((reservation, event(reservation.machine), asker))
        self._carry_out()

    def _carry_out(self) -> None:
        while self._asked:
            reservation, actions, asker = self._asked.popleft()
            self._perform(reservation, actions, asker)

    def _perform(
        self, reservation: _Reserved, actions: tuple[ReservationAction, ...], asker: ReceiverLink | None
    ) -> None:
        """Carry out what a machine asks for, in order."""
        key, machine = reservation.key, reservation.machine
        for action in actions:
            match action:
                case ToPair():
                    self._perform_for_pair(reservation, action, asker)
                case Land(completion):
                    first_token = completion.first_token
                    assert first_token is None or isinstance(first_token, FirstToken)
                    self._on_landed(key, first_token)
                    self._tell(reservation, lambda machine: machine.attached())
                case Fail(reason):
                    _log.warning("handover %s failed: %s", key, reason)
                    self._on_failed(key, action)
                case Settle():
                    del self._reservations[key]
                    del self._newest[key.dispatch]
                    if not self._reservations:
                        self._idle.set()
                    del self._by_id[machine.terms.reservation_id]
                    self._remember_ended(key, machine.reason or "landed")
                    self._on_settled(key)

    def _perform_for_pair(self, reservation: _Reserved, to_pair: ToPair, asker: ReceiverLink | None) -> None:
        key = reservation.key
        if isinstance(to_pair.action, RefuseTicket):
            assert asker is not None
            self._refuse_ticket(asker, key, to_pair.action.reason, to_pair.action.cause)
            return
        if isinstance(to_pair.action, GrantTicket):
            assert asker is not None
            reservation.links[to_pair.source_rank] = asker
        link, terms = reservation.links[to_pair.source_rank], reservation.machine.pairs[to_pair.source_rank].terms
        match to_pair.action:
            case GrantTicket():
                ticket = ticket_to_proto(key, terms, self._peer.incarnation, reservation.block_ids)
                link.send(worker_pb2.ShipReply(ticket=ticket))
            case Fetch(offer):
                self._fetch(reservation, link, offer)
            case Discard(offer, epoch, refusal, cause):
                self._on_refused(cause)
                link.refuse(offer, terms.reservation_id, epoch, refusal)
            case Ack(seq, refusal):
                link.ack(terms.reservation_id, terms.epoch, seq, refusal)
            case TellSettled(reason):
                link.send(
                    worker_pb2.ShipReply(
                        settled=worker_pb2.ShipSettled(
                            reservation_id=terms.reservation_id,
                            epoch=terms.epoch,
                            request_id=key.request_id,
                            attempt=key.attempt,
                            handover=key.handover,
                            reason=reason,
                        )
                    )
                )

    def _fetch(self, reservation: _Reserved, link: ReceiverLink, offer: Offer) -> None:
        rank, machine = link.peer.rank, reservation.machine

        def ended(refusal: str) -> None:
            self._tell(reservation, lambda machine: machine.fetched(rank, offer.seq, refusal))

        link.fetch(offer, self._write(reservation, offer), wanted=lambda: machine.is_open, ended=ended)

    def _write(self, reservation: _Reserved, offer: Offer) -> WritePayload:
        local = offer.pages.shifted(-self._held.layer_begin, -self._held.head_begin)
        return lambda payload: self._write_pages(reservation.block_ids, local, payload)

    # ---------------------------------------------------------------- the threads of lanes

    def _on_lane_offer(self, link: ReceiverLink, message: worker_pb2.PageOffer) -> None:
        """Take an offer on the lane's thread: what is usual at once, what is not on the loop's thread."""
        reservation, offer = self._by_id.get(message.reservation_id), offer_from_proto(message)
        if reservation is None or not reservation.is_bound_to(link):
            link.call_soon(partial(self._on_offer, link, message))
            return
        machine, rank = reservation.machine, link.peer.rank
        with self._lock:
            actions = self._offered(link, offer, message)(machine)
            to_fetch = actions == (ToPair(rank, Fetch(offer)),)
            if not to_fetch:
                self._asked.append((reservation, actions, None))
        if not to_fetch:
            link.call_soon(self._carry_out)
            return
        refusal = link.fetch_now(offer, self._write(reservation, offer), wanted=lambda: machine.is_open)
        with self._lock:
            actions = machine.fetched(rank, offer.seq, refusal)
            to_ack = actions == (ToPair(rank, Ack(offer.seq)),)
            if not to_ack:
                self._asked.append((reservation, actions, None))
        if to_ack:
            link.ack(message.reservation_id, message.epoch, offer.seq, "")
        else:
            link.call_soon(self._carry_out)

    def _refuse_ticket(self, link: ReceiverLink, key: HandoverKey, reason: str, cause: RefusalCause) -> None:
        self._on_refused(cause)
        ticket = worker_pb2.Ticket(
            request_id=key.request_id, attempt=key.attempt, handover=key.handover, refusal=reason
        )
        link.send(worker_pb2.ShipReply(ticket=ticket))

    def _remember_ended(self, key: HandoverKey, reason: str) -> None:
        self._ended[key] = reason
        self._ended.move_to_end(key)
        while len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick()


def _draw_epoch() -> int:
    return secrets.randbits(63)


def _link_lost(source_rank: int, reason: str) -> _Event:
    return lambda machine: machine.link_lost(source_rank, reason)


def _is_superseded(key: HandoverKey, by: HandoverKey) -> bool:
    return key.dispatch == by.dispatch and key.handover < by.handover
