"""One handover as the prefill worker sees it: carries out what `SenderHandover` asks for.

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
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.errors import HandoverError
from baton.kv_transfer.checksum import Checksum
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
from baton.kv_transfer.sender_link import SenderLink
from baton.kv_transfer.transports.base import Staged
from baton.kv_transfer.wire import FirstToken, completion_to_proto, offer_to_proto, terms_from_proto
from baton.proto.baton.v1 import worker_pb2

__all__ = ["Gather", "ShipResult", "Shipment", "ShipmentContext"]

_log = logging.getLogger(__name__)

# (layer_begin, layer_end, token_begin, token_end, out): fills `out` (uint8) with the bytes of
# [layers, 2, heads, tokens, head_dim]. The ranges lie within those of the offer: what the receiver holds already is
# left out, and what does not fit into one payload comes in several calls.
Gather = Callable[[int, int, int, int, torch.Tensor], None]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ShipmentContext:
    """What all shipments of a prefill worker share.

    Attributes:
        peer: this worker.
        lease_s: silence after which a shipment is given up, where its ticket does not say.
        clock: monotonic seconds.
        forget: told when a shipment has settled.
    """

    peer: LocalPeer
    lease_s: float
    clock: Callable[[], float]
    checksum: Checksum
    forget: Callable[[Shipment], None]

    @property
    def cell_num_bytes(self) -> int:
        """Bytes of one (layer, head, token) cell."""
        return cell_bytes(self.peer.layout)


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
        context: ShipmentContext,
        *,
        timeout_s: float,
        on_failed: Callable[[HandoverKey, str], None] | None,
    ) -> None:
        self._key = key
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._machine = SenderHandover(
            cell_num_bytes=context.cell_num_bytes,
            ticket_timeout_s=timeout_s,
            lease_s=context.lease_s,
            now_s=context.clock(),
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
        pages = PageRange(layer_begin, layer_end, 0, self._context.peer.layout.num_kv_heads, token_begin, token_end)
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
        machine, now_s = self._machine, self._context.clock()
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
        self._perform(self._machine.renewed(self._context.clock()))

    def on_link_lost(self, reason: str) -> None:
        """Called by the link, and when none could be made."""
        self._perform(self._machine.link_lost(reason))

    def tick(self) -> None:
        """Look at the deadlines."""
        self._perform(self._machine.tick(self._context.clock()))

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
        self._completed_s = self._context.clock()
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
                    complete = completion_to_proto(completion, terms, self._context.peer.incarnation)
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
        num_bytes = pages.num_cells * self._context.cell_num_bytes
        machine, data_path, context = self._machine, link.data_path, self._context

        def job() -> None:
            if not machine.is_open:
                raise HandoverError("not wanted any more")
            staged = data_path.stage(num_bytes, context.lease_s)
            try:
                gather(pages.layer_begin, pages.layer_end, pages.token_begin, pages.token_end, staged.payload)
                payload.checksum = context.checksum(staged.payload.numpy().data)
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
        link.send(worker_pb2.ShipMessage(offer=offer_to_proto(offer, terms, self._context.peer.incarnation)))

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = HandoverError(f"handover {self.key} failed: {reason}")
        _log.warning("%s", self._failure)
        if self._on_failed is not None:
            self._on_failed(self.key, reason)

    def _settle(self) -> None:
        self._sources.clear()
        self._context.forget(self)
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
                exposed_s=self._context.clock() - self._completed_s,
            )
        )
