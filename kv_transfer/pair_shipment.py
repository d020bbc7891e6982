"""What one prefill rank ships to one decode rank for a request: carries out what `SenderHandover` asks for.

    Shipment                       event loop                                     link's staging threads
    computed(pages, gather) ─────> SenderHandover ── Stage ─────────────────────> stage, gather, sum, post
    completed(token) ────────────>   │  <────────── posted ──────────────────────┤
                                     │                                           └── PageOffer ──> decode rank
                                     ├── TicketRequest, ShipComplete ──> decode rank
    on_failed, on_settled <──────────┴── Ticket, PageAck, ShipSettled <──

A staging thread offers its payload itself. The event loop is not woken for it: what was posted is looked up before
each event that the machine is told, so that it learns of a posting before the ack.

Which of the pages are this decode rank's is known with its ticket, by the same plan that the receiver makes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.errors import HandoverError, IncompatibleError
from baton.kv_transfer.checksum import Checksum
from baton.kv_transfer.handover import (
    BreakLink,
    Fail,
    HandoverKey,
    Offer,
    Release,
    SendAbort,
    SendComplete,
    SenderAction,
    Settle,
    Stage,
    TicketTerms,
)
from baton.kv_transfer.handover_sender import SenderHandover, SenderState
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import PageRange, cell_bytes, pair_pages, rank_pages
from baton.kv_transfer.sender_link import SenderLink
from baton.kv_transfer.transports.base import Staged
from baton.kv_transfer.wire import FirstToken, completion_to_proto, offer_to_proto, terms_from_proto
from baton.proto.baton.v1 import worker_pb2

__all__ = ["Gather", "PairShipment", "ShipmentContext"]

# (pages, out): fills `out` (uint8) with the bytes of [layers, 2, heads, tokens, head_dim], and returns their checksum
# where the sender is made without one of its own (a copy can sum on its way); else what it returns is ignored.
# Layers and heads count
# within the rank's own pool. The pages lie within those of the offer: what the receiver holds already or does not need
# is left out, and what does not fit into one payload comes in several calls.
Gather = Callable[[PageRange, torch.Tensor], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShipmentContext:
    """What all shipments of a prefill rank share.

    Attributes:
        peer: this rank.
        lease_s: silence after which a shipment is given up, where its ticket does not say.
        clock: monotonic seconds.
        checksum: of a gathered payload; None where `Gather` returns it.
    """

    peer: LocalPeer
    lease_s: float
    clock: Callable[[], float]
    checksum: Checksum | None


class PairShipment:
    """The part of a shipment that one decode rank gets. Everything runs on the event loop's thread.

    Args:
        rank: the decode rank.
        timeout_s: how long link and ticket may take together.
        on_failed: told with the rank and the error, possibly again as more goes wrong.
        on_settled: told once, when nothing reads the blocks for this pair any more.
    """

    def __init__(
        self,
        key: HandoverKey,
        rank: int,
        context: ShipmentContext,
        *,
        timeout_s: float,
        on_failed: Callable[[int, HandoverError | Fail], None],
        on_settled: Callable[[], None],
    ) -> None:
        self.key = key
        self.rank = rank
        self.shipped_bytes = 0
        self.has_settled = False
        self._context = context
        self._held = rank_pages(context.peer.layout, context.peer.rank, 0, 0)
        self._cell_num_bytes = cell_bytes(context.peer.layout)
        self._machine = SenderHandover(
            cell_num_bytes=self._cell_num_bytes,
            ticket_timeout_s=timeout_s,
            lease_s=context.lease_s,
            now_s=context.clock(),
        )
        self._on_failed = on_failed
        self._on_settled = on_settled
        self._link: SenderLink | None = None
        self._sources: list[tuple[PageRange, Gather]] = []
        self._staged: dict[int, Staged] = {}
        # What staging threads have posted, and the machine has not been told.
        self._posted: deque[tuple[int, Staged]] = deque()

    @property
    def state(self) -> SenderState:
        """Of the handover."""
        return self._machine.state

    @property
    def reservation_id(self) -> int:
        """Of the ticket, while this pair waits for the receiver; else 0."""
        terms = self._machine.terms
        return 0 if terms is None or self._machine.state is SenderState.SETTLED else terms.reservation_id

    @property
    def num_tokens(self) -> int:
        """Tokens that the receiver wants by its ticket."""
        terms = self._machine.terms
        return 0 if terms is None else terms.num_tokens - terms.cached_tokens

    # ---------------------------------------------------------------- from the shipment

    def start(self, link: SenderLink, num_ranks: int) -> None:
        """The link is there: ask for the ticket. Raises HandoverError when it leads elsewhere than it should."""
        if not self._machine.is_open:
            return
        if (link.peer.rank, link.peer.num_ranks) != (self.rank, num_ranks):
            raise IncompatibleError(
                f"{link.address} is rank {link.peer.rank} of {link.peer.num_ranks}, not rank {self.rank} of {num_ranks}"
            )
        link.request_ticket(self)
        self._link = link

    def computed(self, pages: PageRange, gather: Gather) -> None:
        """The engine has computed these pages, in layers and heads of the whole model."""
        if self._machine.is_open:
            self._sources.append((pages, gather))
            self._perform(self._machine.computed(pages))

    def completed(self, first_token: FirstToken | None) -> None:
        """Everything is computed."""
        self._look_up_posted()
        self._perform(self._machine.completed(first_token))

    def abort(self, reason: str) -> None:
        """Give up."""
        self._look_up_posted()
        self._perform(self._machine.aborted(reason))

    def tick(self) -> None:
        """Look at the deadlines."""
        self._look_up_posted()
        self._perform(self._machine.tick(self._context.clock()))

    def fail(self, error: HandoverError) -> None:
        """There is no link, for this reason."""
        self._on_failed(self.rank, error)
        self._perform(self._machine.link_lost(str(error)))

    # ---------------------------------------------------------------- from the link

    def on_reply(self, reply: worker_pb2.ShipReply) -> None:
        """Called by the link."""
        machine, now_s = self._machine, self._context.clock()
        self._look_up_posted()
        match reply.WhichOneof("reply"):
            case "ticket":
                self._on_ticket(reply.ticket, now_s)
            case "ack":
                if self._is_mine(reply.ack.epoch):
                    self._perform(machine.acked(reply.ack.seq, reply.ack.refusal, now_s))
            case "settled":
                if self._is_mine(reply.settled.epoch):
                    self._perform(machine.peer_settled(reply.settled.reason))

    def _on_ticket(self, ticket: worker_pb2.Ticket, now_s: float) -> None:
        machine, link = self._machine, self._link
        assert link is not None
        if ticket.refusal:
            self._perform(machine.refused(ticket.refusal))
            return
        terms = terms_from_proto(ticket)
        if machine.state is not SenderState.COMPUTING:
            reason = machine.reason or "the shipment is over"
            link.send_abort(self.key, terms.reservation_id, terms.epoch, reason)
            return
        limit = link.data_path.max_payload_bytes
        self._perform(machine.granted(terms, self._wanted(link, terms), max_payload_bytes=limit, now_s=now_s))

    def _wanted(self, link: SenderLink, terms: TicketTerms) -> tuple[PageRange, ...]:
        me, peer = self._context.peer, link.peer
        return pair_pages(me.layout, me.rank, peer.layout, peer.rank, terms.cached_tokens, terms.num_tokens)

    def on_renewed(self) -> None:
        """Called by the link."""
        self._perform(self._machine.renewed(self._context.clock()))

    def on_link_lost(self, reason: str) -> None:
        """Called by the link, and when none could be made."""
        self._look_up_posted()
        self._perform(self._machine.link_lost(reason))

    def _is_mine(self, epoch: int) -> bool:
        return self._machine.terms is not None and epoch == self._machine.terms.epoch

    # ---------------------------------------------------------------- actions

    def _perform(self, actions: tuple[SenderAction, ...]) -> None:
        """Carry out what the machine asks for, in order."""
        link, terms = self._link, self._machine.terms
        for action in actions:
            match action:
                case Stage(seq, pages):
                    self._stage(seq, pages)
                case Release(seq):
                    assert link is not None
                    link.data_path.release(self._staged.pop(seq))
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
                case Fail():
                    self._on_failed(self.rank, action)
                case Settle():
                    self._sources.clear()
                    if link is not None:
                        link.shipments.pop(self.key, None)
                    self.has_settled = True
                    self._on_settled()
                    # Nor does it keep the shipment, which has it: what both hold is let go of at once.
                    self._on_failed, self._on_settled = _tell_nobody, _tell_nobody

    def _stage(self, seq: int, pages: PageRange) -> None:
        link, terms = self._link, self._machine.terms
        assert link is not None
        assert terms is not None
        gather = next(gather for source, gather in self._sources if pages.within(source))
        num_bytes = pages.num_cells * self._cell_num_bytes
        local = pages.shifted(-self._held.layer_begin, -self._held.head_begin)
        machine, data_path, context = self._machine, link.data_path, self._context

        def expect_wanted() -> None:
            if not machine.is_open:
                raise HandoverError("not wanted any more")

        def job() -> None:
            expect_wanted()
            staged = data_path.stage(num_bytes, context.lease_s)
            try:
                with data_path.filling():
                    found = gather(local, staged.payload)
                    if context.checksum is not None:
                        found = context.checksum(staged.payload)
                assert found is not None, "a gather that sums returns the checksum"
                expect_wanted()

                def to_message(locator: str) -> worker_pb2.ShipMessage:
                    offer = Offer(seq=seq, pages=pages, num_bytes=num_bytes, checksum=found, locator=locator)
                    return worker_pb2.ShipMessage(offer=offer_to_proto(offer, terms, context.peer.incarnation))

                link.post(staged, to_message, lambda: self._posted.append((seq, staged)))
            except BaseException:
                data_path.release(staged)
                raise
            if link.is_closed or not machine.is_open:
                # Nothing may come any more at which it would be looked up.
                link.call_soon(self._look_up_posted)

        link.run(job, lambda error: self._perform(machine.stage_failed(seq, error)))

    def _look_up_posted(self) -> None:
        while self._posted:
            seq, staged = self._posted.popleft()
            self._staged[seq] = staged
            self.shipped_bytes += staged.payload.numel()
            self._perform(self._machine.posted(seq))


def _tell_nobody(*_: object) -> None:
    """Of what comes after the end."""
