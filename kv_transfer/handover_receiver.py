"""The receiving half of a handover, on a decode rank: a pure state machine (chart in `handover.py`).

    state      event                         next       what is asked for
    RESERVED   ticket_requested              RESERVED   GrantTicket
    RESERVED   offered                       RECEIVING  Fetch
    RECEIVING  offered                       RECEIVING  Fetch
    RECEIVING  fetched, the last one missing LANDED     Ack, Land
    RECEIVING  completed, nothing missing    LANDED     Land
    LANDED     attached                      ATTACHED   TellSettled
    ATTACHED   released                      RELEASED   Settle
    RESERVED, RECEIVING   any failure        ABORTING   Fail, TellSettled (and Settle when no accessor is left)
    LANDED     cancelled                     ABORTING   TellSettled, Settle (the engine was told of the landing)
    ABORTING   fetched, the last accessor    SETTLED    Ack, Settle

Owners of the reserved blocks: this half from RESERVED to LANDED and in ABORTING; the engine from ATTACHED on; nobody
after `Settle` in SETTLED.
"""

from __future__ import annotations

import enum

from baton.kv_transfer.handover import (
    Ack,
    Completion,
    Discard,
    Fail,
    Fetch,
    GrantTicket,
    Land,
    Offer,
    ReceiverAction,
    RefusalCause,
    RefuseTicket,
    Settle,
    TellSettled,
    TicketTerms,
)
from baton.kv_transfer.plan import PageRange

__all__ = ["MAX_OFFERS", "ReceiverHandover", "ReceiverState"]

MAX_OFFERS = 16384

Actions = tuple[ReceiverAction, ...]


class ReceiverState(enum.StrEnum):
    """Where a reservation is in its life."""

    RESERVED = "RESERVED"
    RECEIVING = "RECEIVING"
    LANDED = "LANDED"
    ATTACHED = "ATTACHED"
    RELEASED = "RELEASED"
    ABORTING = "ABORTING"
    SETTLED = "SETTLED"


_OPEN = (ReceiverState.RESERVED, ReceiverState.RECEIVING)
_ENDED = (ReceiverState.RELEASED, ReceiverState.SETTLED)


class ReceiverHandover:
    """What one sender ships for a reservation. Not thread-safe: all events come from one thread.

    Args:
        terms: what the ticket says.
        wanted: what this sender has to deliver, in disjoint boxes; may be nothing.
        cell_num_bytes: bytes of one (layer, head, token) cell.
        now_s: monotonic time in seconds; the lease starts here.
    """

    def __init__(self, terms: TicketTerms, wanted: tuple[PageRange, ...], *, cell_num_bytes: int, now_s: float) -> None:
        self.terms = terms
        self.state = ReceiverState.RESERVED
        self.reason = ""
        self.sender: bytes | None = None
        self._wanted = wanted
        self._cell_num_bytes = cell_num_bytes
        self._lease_end_s = now_s + terms.lease_s
        self._offers: dict[int, Offer] = {}
        self._landed: set[int] = set()
        self._in_flight: set[int] = set()
        self._landed_cells = 0
        self._completion: Completion | None = None
        self._link_lost = False

    @property
    def is_open(self) -> bool:
        """No outcome is decided yet."""
        return self.state in _OPEN

    @property
    def has_ended(self) -> bool:
        """Nothing can happen any more."""
        return self.state in _ENDED

    @property
    def num_accessors(self) -> int:
        """Jobs that may still write into the reserved blocks."""
        return len(self._in_flight)

    # ---------------------------------------------------------------- events from the sender

    def ticket_requested(self, sender: bytes, now_s: float) -> Actions:
        """A sender of this incarnation asks for the ticket. The first one is bound to the reservation."""
        if not self.is_open:
            return (RefuseTicket(f"reservation is {self.state}{self._because()}", RefusalCause.ENDED),)
        if self.sender is not None:
            who = "this sender" if self.sender == sender else f"sender {self.sender.hex()[:8]}"
            return (RefuseTicket(f"the ticket was given to {who} before", RefusalCause.TAKEN),)
        self.sender = sender
        self._renew(now_s)
        return (GrantTicket(self.terms),)

    def offered(self, offer: Offer, *, epoch: int, sender: bytes, now_s: float) -> Actions:
        """A payload is ready at the sender."""
        stale = self._stale(epoch, sender)
        if stale:
            cause = RefusalCause.EPOCH if epoch != self.terms.epoch else RefusalCause.INCARNATION
            return (Discard(offer, epoch, f"stale: {stale}", cause),)
        if not self.is_open:
            return (Discard(offer, epoch, f"reservation is {self.state}{self._because()}", RefusalCause.ENDED),)
        known = self._offers.get(offer.seq)
        if known is not None:
            return self._offered_again(known, offer)
        wrong = self._wrong(offer)
        if wrong:
            discard = Discard(offer, epoch, wrong, RefusalCause.MALFORMED)
            return (discard, *self._abort(f"offer {offer.seq} refused: {wrong}"))
        self._renew(now_s)
        self.state = ReceiverState.RECEIVING
        self._offers[offer.seq] = offer
        self._in_flight.add(offer.seq)
        return (Fetch(offer),)

    def completed(self, completion: Completion, *, epoch: int, sender: bytes, now_s: float) -> Actions:
        """The sender has offered everything."""
        if self._stale(epoch, sender) or not self.is_open:
            return ()
        if self._completion is not None:
            if self._completion == completion:
                return ()
            return self._abort("the sender completed twice, differently")
        if any(seq >= completion.num_offers for seq in self._offers):
            return self._abort(f"completed with {completion.num_offers} offers, but offer {max(self._offers)} was made")
        self._renew(now_s)
        self._completion = completion
        return self._land_if_whole()

    def sender_aborted(self, reason: str, *, epoch: int) -> Actions:
        """The sender gives up. Only who holds the ticket can say so."""
        if epoch != self.terms.epoch:
            return ()
        return self._abort(f"sender aborted: {reason}", by_peer=True)

    def renewed(self, now_s: float, *, sender: bytes) -> Actions:
        """The sender still works on it."""
        if self.is_open and sender == self.sender:
            self._renew(now_s)
        return ()

    # ---------------------------------------------------------------- events from this side

    def fetched(self, seq: int, refusal: str = "") -> Actions:
        """The accessor of offer `seq` has finished; an empty refusal says verified and copied."""
        assert seq in self._in_flight, f"offer {seq} has no accessor"
        self._in_flight.discard(seq)
        if self.state is ReceiverState.ABORTING:
            ack = Ack(seq, refusal or f"reservation is {self.state}{self._because()}")
            return (ack, *self._settle_if_idle())
        assert self.state is ReceiverState.RECEIVING, f"a fetch ended in {self.state}"
        if refusal:
            return (Ack(seq, refusal), *self._abort(f"offer {seq} failed: {refusal}"))
        self._landed.add(seq)
        self._landed_cells += self._offers[seq].pages.num_cells
        return (Ack(seq), *self._land_if_whole())

    def attached(self) -> Actions:
        """The engine took the blocks over. Says nothing when a cancel came first."""
        if self.state is not ReceiverState.LANDED:
            return ()
        self.state = ReceiverState.ATTACHED
        return (TellSettled(),)

    def released(self) -> Actions:
        """The sender was told; the handover lets go of the blocks, which are the engine's."""
        if self.state is not ReceiverState.ATTACHED:
            return ()
        self.state = ReceiverState.RELEASED
        return (Settle(),)

    def cancelled(self, reason: str) -> Actions:
        """The decode worker does not want the pages any more. Before `attached` this wins also over a landing."""
        if self.state is ReceiverState.LANDED:
            self.state = ReceiverState.ABORTING
            self.reason = reason
            return (*self._tell(reason), *self._settle_if_idle())
        return self._abort(reason)

    def link_lost(self, reason: str) -> Actions:
        """The stream to the bound sender broke; nobody can be told."""
        self._link_lost = True
        return self._abort(reason, by_peer=True)

    def tick(self, now_s: float) -> Actions:
        """Look at the lease."""
        if not self.is_open or now_s < self._lease_end_s:
            return ()
        who = "any sender" if self.sender is None else f"sender {self.sender.hex()[:8]}"
        return self._abort(f"lease expired: nothing heard from {who} for {self.terms.lease_s:g} s")

    # ---------------------------------------------------------------- inner

    def _renew(self, now_s: float) -> None:
        self._lease_end_s = max(self._lease_end_s, now_s + self.terms.lease_s)

    def _because(self) -> str:
        return f" ({self.reason})" if self.reason else ""

    def _stale(self, epoch: int, sender: bytes) -> str:
        if epoch != self.terms.epoch:
            return f"epoch {epoch} is not the reservation's"
        if sender != self.sender:
            return f"incarnation {sender.hex()[:8]} does not hold the ticket"
        return ""

    def _wrong(self, offer: Offer) -> str:
        if not any(offer.pages.within(box) for box in self._wanted):
            wanted = "; ".join(map(str, self._wanted)) or "nothing"
            return f"{offer.pages} lie outside of what is wanted ({wanted})"
        expected = offer.pages.num_cells * self._cell_num_bytes
        if offer.num_bytes != expected:
            return f"{offer.pages} take {expected} bytes, not {offer.num_bytes}"
        if len(self._offers) >= MAX_OFFERS:
            return f"more than {MAX_OFFERS} offers"
        if self._completion is not None and offer.seq >= self._completion.num_offers:
            return f"the sender completed with {self._completion.num_offers} offers"
        for other in self._offers.values():
            if other.pages.overlaps(offer.pages):
                return f"{offer.pages} overlap offer {other.seq} ({other.pages})"
        return ""

    def _offered_again(self, known: Offer, offer: Offer) -> Actions:
        if known == offer:
            return (Ack(offer.seq),) if offer.seq in self._landed else ()
        reason = f"offer {offer.seq} came twice, differently"
        return (Discard(offer, self.terms.epoch, reason, RefusalCause.MALFORMED), *self._abort(reason))

    def _land_if_whole(self) -> Actions:
        if self._completion is None or self._in_flight or len(self._offers) < self._completion.num_offers:
            return ()
        num_wanted = sum(box.num_cells for box in self._wanted)
        if self._landed_cells != num_wanted:
            missing = num_wanted - self._landed_cells
            return self._abort(f"completed with {missing} of {num_wanted} cells missing")
        self.state = ReceiverState.LANDED
        return (Land(self._completion),)

    def _abort(self, reason: str, *, by_peer: bool = False) -> Actions:
        if not self.is_open:
            return ()
        self.state = ReceiverState.ABORTING
        self.reason = reason
        return (Fail(reason, by_peer), *self._tell(reason), *self._settle_if_idle())

    def _tell(self, reason: str) -> Actions:
        return () if self.sender is None or self._link_lost else (TellSettled(reason),)

    def _settle_if_idle(self) -> Actions:
        if self._in_flight:
            return ()
        self.state = ReceiverState.SETTLED
        return (Settle(),)
