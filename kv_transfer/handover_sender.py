"""The sending half of a handover, on a prefill rank: a pure state machine (chart in `handover.py`).

    state      event                          next       what is asked for
    COMPUTING  computed                       COMPUTING  (remembered)
    COMPUTING  granted                        SHIPPING   Stage for what is computed and not held by the receiver
    SHIPPING   computed                       SHIPPING   Stage
    SHIPPING   completed                      SHIPPING   SendComplete (ahead of offers that are still being staged)
    SHIPPING   posted                         SHIPPING   (the offer is on its way)
    SHIPPING   acked                          SHIPPING   Release
    SHIPPING   peer_settled, no reason        SETTLED    Release for what is not acked yet, Settle
    COMPUTING, SHIPPING   any failure         ABORTING   Fail, SendAbort (and Settle when no accessor is left)
    ABORTING   posted                         ABORTING   (the receiver refuses it, and acks)
    ABORTING   stage_failed, acked, link_lost SETTLED    Release, Settle at the last accessor
    ABORTING   tick, the lease has ended      ABORTING   BreakLink (the receiver does not answer; the link is closed)

Accessors: a job that gathers pages into a staging buffer (reads the prefill worker's blocks), and a posted staging
buffer (the receiver reads it until it acks or the link is closed).
"""

from __future__ import annotations

import enum

from baton.kv_transfer.handover import (
    BreakLink,
    Completion,
    Fail,
    Release,
    SendAbort,
    SendComplete,
    SenderAction,
    Settle,
    Stage,
    TicketTerms,
)
from baton.kv_transfer.plan import PageRange, taper_range

__all__ = ["SenderHandover", "SenderState"]

# In about so many pieces and one more, where they are not too small or too large: one is gathered while the one before
# is copied by the receiver. More of them cost more hops than they overlap.
_NUM_PIECES = 2
_MIN_PIECE_BYTES = 2 << 20

Actions = tuple[SenderAction, ...]


class SenderState(enum.StrEnum):
    """Where a shipment is in its life."""

    COMPUTING = "COMPUTING"
    SHIPPING = "SHIPPING"
    ABORTING = "ABORTING"
    SETTLED = "SETTLED"


class SenderHandover:
    """What one receiver gets of a shipment. Not thread-safe: all events come from one thread.

    Args:
        cell_num_bytes: bytes of one (layer, head, token) cell.
        ticket_timeout_s: how long to wait for the ticket.
        lease_s: how long to wait for the other side when there is no ticket to say it.
        now_s: monotonic time in seconds.
    """

    def __init__(self, *, cell_num_bytes: int, ticket_timeout_s: float, lease_s: float, now_s: float) -> None:
        self.state = SenderState.COMPUTING
        self.reason = ""
        self.terms: TicketTerms | None = None
        self._cell_num_bytes = cell_num_bytes
        self._max_payload_bytes = 0
        self._ticket_timeout_s = ticket_timeout_s
        self._lease_s = lease_s
        self._deadline_s = now_s + ticket_timeout_s
        self._wanted: tuple[PageRange, ...] = ()
        self._waiting: list[PageRange] = []
        self._next_seq = 0
        self._staging: set[int] = set()
        self._posted: set[int] = set()
        self._first_token: object | None = None
        self._completed = False
        self._complete_sent = False
        self._link_lost = False
        self._link_broken = False

    @property
    def is_open(self) -> bool:
        """No outcome is decided yet."""
        return self.state in (SenderState.COMPUTING, SenderState.SHIPPING)

    @property
    def num_accessors(self) -> int:
        """Gather jobs that run and staging buffers that the receiver may read."""
        return len(self._staging) + len(self._posted)

    # ---------------------------------------------------------------- events from this side

    def computed(self, pages: PageRange) -> Actions:
        """The engine has computed these pages."""
        if self.state is SenderState.COMPUTING:
            self._waiting.append(pages)
            return ()
        if self.state is not SenderState.SHIPPING:
            return ()
        if self._completed:
            return self._abort(f"{pages} were offered after the completion", tell=True)
        return self._stage(pages)

    def completed(self, first_token: object | None) -> Actions:
        """The engine has computed everything; the first token goes along where this pair of ranks carries it."""
        if not self.is_open:
            return ()
        if self._completed:
            return self._abort("completed twice", tell=True)
        self._completed = True
        self._first_token = first_token
        return self._complete()

    def posted(self, seq: int) -> Actions:
        """The pages of `seq` are in their staging buffer, and their offer is on its way; told before its ack is."""
        assert seq in self._staging, f"{seq} is not being staged"
        self._staging.discard(seq)
        if self._link_lost:
            return (Release(seq), *self._settle_if_idle())
        self._posted.add(seq)
        return ()

    def stage_failed(self, seq: int, reason: str) -> Actions:
        """The pages of `seq` could not be staged; no buffer is held."""
        assert seq in self._staging, f"{seq} is not being staged"
        self._staging.discard(seq)
        if self.is_open:
            return self._abort(reason, tell=True)
        return self._settle_if_idle()

    def aborted(self, reason: str) -> Actions:
        """The prefill worker gives up, or the request is cancelled."""
        return self._abort(reason, tell=True)

    def link_lost(self, reason: str) -> Actions:
        """The link is closed: what was posted on it is read no more."""
        self._link_lost = True
        released = tuple(Release(seq) for seq in sorted(self._posted))
        self._posted.clear()
        if self.is_open:
            return (*released, *self._abort(reason, tell=False))
        return (*released, *self._settle_if_idle())

    def tick(self, now_s: float) -> Actions:
        """Look at the deadlines."""
        if now_s < self._deadline_s:
            return ()
        if self.state is SenderState.COMPUTING:
            self._deadline_s = now_s + self._lease_s
            return self._abort(f"no ticket within {self._ticket_timeout_s:g} s", tell=True)
        if self.state is SenderState.SHIPPING:
            self._deadline_s = now_s + self._lease_s
            return self._abort(f"lease expired: nothing heard from the receiver for {self._lease_s:g} s", tell=True)
        if self.state is SenderState.ABORTING and self._posted and not self._link_broken:
            self._link_broken = True
            return (BreakLink(f"no answer to an abort within {self._lease_s:g} s"),)
        return ()

    # ---------------------------------------------------------------- events from the receiver

    def granted(
        self, terms: TicketTerms, wanted: tuple[PageRange, ...], *, max_payload_bytes: int, now_s: float
    ) -> Actions:
        """The ticket is here: of what is computed, `wanted` is this receiver's; longer payloads are cut."""
        if self.state is not SenderState.COMPUTING:
            return ()
        self.state = SenderState.SHIPPING
        self.terms = terms
        self._wanted = wanted
        self._lease_s = terms.lease_s
        self._max_payload_bytes = max_payload_bytes
        self._deadline_s = now_s + terms.lease_s
        actions: Actions = ()
        for pages in self._waiting:
            if self.state is SenderState.SHIPPING:
                actions += self._stage(pages)
        self._waiting.clear()
        return (*actions, *self._complete())

    def refused(self, reason: str) -> Actions:
        """There is no reservation for us."""
        if self.state is not SenderState.COMPUTING:
            return ()
        return self._abort(f"ticket refused: {reason}", tell=False, by_peer=True)

    def acked(self, seq: int, refusal: str, now_s: float) -> Actions:
        """The receiver has finished reading the payload of `seq`. An unknown `seq` is late news and says nothing."""
        if seq not in self._posted:
            return ()
        self._posted.discard(seq)
        if self.is_open:
            self.renewed(now_s)
            if refusal:
                return (Release(seq), *self._abort(f"offer {seq} refused: {refusal}", tell=True, by_peer=True))
            return (Release(seq),)
        return (Release(seq), *self._settle_if_idle())

    def peer_settled(self, reason: str) -> Actions:
        """The receiver is through with us; an empty reason says attached."""
        if not self.is_open:
            return ()
        if reason:
            return self._abort(f"receiver gave up: {reason}", tell=False, by_peer=True)
        if not self._complete_sent or self._staging:
            return self._abort("the receiver settled before everything was shipped", tell=True)
        # What was attached has been read: acks that are still on their way say nothing new.
        released = tuple(Release(seq) for seq in sorted(self._posted))
        self._posted.clear()
        self.state = SenderState.SETTLED
        return (*released, Settle())

    def renewed(self, now_s: float) -> Actions:
        """The receiver still holds the reservation."""
        if self.state is SenderState.SHIPPING:
            self._deadline_s = max(self._deadline_s, now_s + self._lease_s)
        return ()

    # ---------------------------------------------------------------- inner

    def _stage(self, pages: PageRange) -> Actions:
        assert self.terms is not None
        if pages.token_end > self.terms.num_tokens:
            return self._abort(f"{pages} reach beyond the {self.terms.num_tokens} tokens of the reservation", tell=True)
        actions: Actions = ()
        for missing in filter(None, (pages.intersection(box) for box in self._wanted)):
            num_bytes = missing.num_cells * self._cell_num_bytes
            limit = min(self._max_payload_bytes, max(_MIN_PIECE_BYTES, num_bytes // _NUM_PIECES * 17 // 16))
            for part in taper_range(missing, cell_num_bytes=self._cell_num_bytes, max_bytes=limit):
                self._staging.add(self._next_seq)
                actions += (Stage(self._next_seq, part),)
                self._next_seq += 1
        return actions

    def _complete(self) -> Actions:
        """Say how many offers there are in all, as soon as that is known: offers that still come are awaited."""
        if self.state is not SenderState.SHIPPING or not self._completed or self._complete_sent:
            return ()
        self._complete_sent = True
        return (SendComplete(Completion(num_offers=self._next_seq, first_token=self._first_token)),)

    def _abort(self, reason: str, *, tell: bool, by_peer: bool = False) -> Actions:
        if not self.is_open:
            return ()
        self.state = SenderState.ABORTING
        self.reason = reason
        self._waiting.clear()
        told: Actions = (SendAbort(reason),) if tell and not self._link_lost else ()
        return (Fail(reason, by_peer), *told, *self._settle_if_idle())

    def _settle_if_idle(self) -> Actions:
        if self.state is not SenderState.ABORTING or self._staging or self._posted:
            return ()
        self.state = SenderState.SETTLED
        return (Settle(),)
