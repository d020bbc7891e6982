"""The reservation of one request on one decode rank, filled by every prefill rank that holds a part of it: pure.

    state    event                                next      what is asked for
    OPEN     the first ticket is asked for        OPEN      GrantTicket; the plan says which prefill ranks must come
    OPEN     the last pair of ranks has landed    LANDED    Land
    LANDED   attached                             ATTACHED  TellSettled to every sender, the last Ack, Settle
    OPEN     any pair fails, or cancelled         ABORTING  Fail, TellSettled to every sender that is not lost
    LANDED   cancelled                            ABORTING  the last Ack, TellSettled (the engine knew of the landing)
    ABORTING the last pair has settled            SETTLED   Settle

Each pair of ranks is a `ReceiverHandover` with an epoch, a lease and pages of its own; an action that concerns one of
them comes as `ToPair`. All pairs belong to the prefill instance whose rank came first. What has landed counts only
together: one failure, also after a pair's own pages have landed, fails the whole reservation at once.

The first token travels from the driver of the prefill instance, which samples it, to the driver of the decode instance,
which goes on from it: a pair in every plan. The other pairs complete without.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

from baton.engine.kv_layout import KvLayout
from baton.kv_transfer.handover import (
    Ack,
    Completion,
    Fail,
    Land,
    Offer,
    ReceiverAction,
    RefusalCause,
    RefuseTicket,
    Settle,
    TicketTerms,
)
from baton.kv_transfer.handover_receiver import ReceiverHandover, ReceiverState
from baton.kv_transfer.plan import cell_bytes, driver_rank, pair_pages, transfer_pairs

__all__ = ["Reservation", "ReservationAction", "ReservationState", "Source", "ToPair"]


@dataclass(frozen=True, slots=True)
class Source:
    """The prefill instance that fills a reservation."""

    instance_id: str
    layout: KvLayout


@dataclass(frozen=True, slots=True)
class ToPair:
    """An action for the pair with this prefill rank."""

    source_rank: int
    action: ReceiverAction


ReservationAction = ToPair | Land | Fail | Settle
Actions = tuple[ReservationAction, ...]


class ReservationState(enum.StrEnum):
    """Where a reservation is in its life."""

    OPEN = "OPEN"
    LANDED = "LANDED"
    ATTACHED = "ATTACHED"
    ABORTING = "ABORTING"
    SETTLED = "SETTLED"


class Reservation:
    """One reservation. Not thread-safe: all events come from one thread.

    Args:
        terms: what every ticket says; each pair gets an epoch of its own.
        layout: of the decode instance.
        rank: of this process in it.
        draw_epoch: a fresh random fencing number per call.
        now_s: monotonic time in seconds; the lease starts here.
    """

    def __init__(
        self, terms: TicketTerms, layout: KvLayout, rank: int, *, draw_epoch: Callable[[], int], now_s: float
    ) -> None:
        self.terms = terms
        self.state = ReservationState.OPEN
        self.reason = ""
        self.source: Source | None = None
        self.pairs: dict[int, ReceiverHandover] = {}
        self._layout = layout
        self._rank = rank
        self._draw_epoch = draw_epoch
        self._lease_end_s = now_s + terms.lease_s
        self._completions: dict[int, Completion] = {}
        self._last_ack: Actions = ()

    @property
    def is_open(self) -> bool:
        """No outcome is decided yet."""
        return self.state is ReservationState.OPEN

    # ---------------------------------------------------------------- events from the senders

    def ticket_requested(self, source: Source, source_rank: int, sender: bytes, now_s: float) -> Actions:
        """A rank of a prefill instance asks for its ticket. The first one binds the reservation to its instance."""
        if not self.is_open:
            because = f" ({self.reason})" if self.reason else ""
            return (ToPair(source_rank, RefuseTicket(f"reservation is {self.state}{because}", RefusalCause.ENDED)),)
        if self.source is None:
            self._bind(source, now_s)
        if source != self.source:
            assert self.source is not None
            given = f"the ticket was given to {self.source.instance_id} before"
            return (ToPair(source_rank, RefuseTicket(given, RefusalCause.TAKEN)),)
        if source_rank not in self.pairs:
            nothing = f"rank {source_rank} holds nothing that rank {self._rank} here needs"
            return (ToPair(source_rank, RefuseTicket(nothing, RefusalCause.LAYOUT)),)
        return self._absorb(source_rank, self.pairs[source_rank].ticket_requested(sender, now_s))

    def offered(self, source_rank: int, offer: Offer, *, epoch: int, sender: bytes, now_s: float) -> Actions:
        """A payload is ready at a sender that has a ticket."""
        pair = self.pairs[source_rank]
        return self._absorb(source_rank, pair.offered(offer, epoch=epoch, sender=sender, now_s=now_s))

    def completed(
        self, source_rank: int, completion: Completion, *, epoch: int, sender: bytes, now_s: float
    ) -> Actions:
        """A sender has offered everything."""
        pair = self.pairs[source_rank]
        return self._absorb(source_rank, pair.completed(completion, epoch=epoch, sender=sender, now_s=now_s))

    def sender_aborted(self, source_rank: int, reason: str, *, epoch: int) -> Actions:
        """A sender gives up. Without an epoch (0) it gave up before its ticket came."""
        pair = self.pairs[source_rank]
        if epoch not in (0, pair.terms.epoch):
            return ()
        if pair.state is ReceiverState.LANDED:
            return self._end(self._fail(self._named(source_rank, f"sender aborted: {reason}"), by_peer=True))
        return self._absorb(source_rank, pair.sender_aborted(reason, epoch=pair.terms.epoch))

    def renewed(self, source_rank: int, now_s: float, *, sender: bytes) -> bool:
        """A sender still works on it, or waits for the others. False when the reservation is over."""
        pair = self.pairs[source_rank]
        pair.renewed(now_s, sender=sender)
        return self.is_open and (pair.is_open or pair.state is ReceiverState.LANDED)

    def link_lost(self, source_rank: int, reason: str) -> Actions:
        """The stream to a sender that has a ticket broke."""
        pair = self.pairs[source_rank]
        actions = self._absorb(source_rank, pair.link_lost(reason))
        if self.is_open:
            actions += self._end(self._fail(self._named(source_rank, reason), by_peer=True))
        return actions

    # ---------------------------------------------------------------- events from this side

    def fetched(self, source_rank: int, seq: int, refusal: str = "") -> Actions:
        """The accessor of a pair's offer `seq` has finished; an empty refusal says verified and copied."""
        actions = self._absorb(source_rank, self.pairs[source_rank].fetched(seq, refusal))
        if self.state is not ReservationState.LANDED:
            return actions
        # Senders wait for the end, not for the last ack: that is said behind it.
        self._last_ack = tuple(a for a in actions if isinstance(a, ToPair) and isinstance(a.action, Ack))
        return tuple(action for action in actions if action not in self._last_ack)

    def attached(self) -> Actions:
        """The engine took the blocks over. Says nothing when a cancel came first."""
        if self.state is not ReservationState.LANDED:
            return ()
        self.state = ReservationState.ATTACHED
        actions: Actions = ()
        for rank, pair in self.pairs.items():
            actions += self._translate(rank, pair.attached())
            actions += self._translate(rank, pair.released())
        return self._end((*actions, *self._last_ack))

    def cancelled(self, reason: str) -> Actions:
        """The pages are not wanted any more. Before `attached` this wins also over a landing."""
        if self.state is ReservationState.LANDED:
            self.state = ReservationState.ABORTING
            self.reason = reason
            return self._end((*self._last_ack, *self._cancel_pairs(reason)))
        return self._end(self._fail(reason))

    def tick(self, now_s: float) -> Actions:
        """Look at the leases."""
        if not self.is_open:
            return ()
        if self.source is None:
            if now_s < self._lease_end_s:
                return ()
            return self._end(self._fail(f"lease expired: nothing heard from any sender for {self.terms.lease_s:g} s"))
        actions: Actions = ()
        for rank, pair in self.pairs.items():
            actions += self._absorb(rank, pair.tick(now_s))
        return actions

    # ---------------------------------------------------------------- inner

    def _bind(self, source: Source, now_s: float) -> None:
        self.source = source
        for source_rank, rank in sorted(transfer_pairs(source.layout, self._layout)):
            if rank == self._rank:
                wanted = pair_pages(
                    source.layout,
                    source_rank,
                    self._layout,
                    self._rank,
                    self.terms.cached_tokens,
                    self.terms.num_tokens,
                )
                self.pairs[source_rank] = ReceiverHandover(
                    replace(self.terms, epoch=self._draw_epoch()),
                    wanted,
                    cell_num_bytes=cell_bytes(self._layout),
                    now_s=now_s,
                )

    def _absorb(self, source_rank: int, actions: tuple[ReceiverAction, ...]) -> Actions:
        return self._end(self._translate(source_rank, actions))

    def _translate(self, source_rank: int, actions: tuple[ReceiverAction, ...]) -> Actions:
        """What a pair asks for, as the reservation asks for it; outcomes and the end are said once for all pairs."""
        out: Actions = ()
        for action in actions:
            match action:
                case Land(completion):
                    self._completions[source_rank] = completion
                    out += self._land_if_whole()
                case Fail(reason, by_peer):
                    out += self._fail(self._named(source_rank, reason), by_peer=by_peer)
                case Settle():
                    pass
                case _:
                    out += (ToPair(source_rank, action),)
        return out

    def _land_if_whole(self) -> Actions:
        if not self.is_open or any(pair.state is not ReceiverState.LANDED for pair in self.pairs.values()):
            return ()
        first_token = None
        if self._rank == driver_rank(self._layout):
            assert self.source is not None
            first_token = self._completions[driver_rank(self.source.layout)].first_token
            if first_token is None:
                return self._fail("everything landed, but no first token came")
        self.state = ReservationState.LANDED
        num_offers = sum(completion.num_offers for completion in self._completions.values())
        return (Land(Completion(num_offers=num_offers, first_token=first_token)),)

    def _fail(self, reason: str, *, by_peer: bool = False) -> Actions:
        if not self.is_open:
            return ()
        self.state = ReservationState.ABORTING
        self.reason = reason
        return (Fail(reason, by_peer), *self._cancel_pairs(reason))

    def _cancel_pairs(self, reason: str) -> Actions:
        actions: Actions = ()
        for rank, pair in self.pairs.items():
            actions += self._translate(rank, pair.cancelled(reason))
        return actions

    def _end(self, actions: Actions) -> Actions:
        ending = (ReservationState.ABORTING, ReservationState.ATTACHED)
        if self.state not in ending or any(not pair.has_ended for pair in self.pairs.values()):
            return actions
        self.state = ReservationState.SETTLED
        return (*actions, Settle())

    def _named(self, source_rank: int, reason: str) -> str:
        return f"prefill rank {source_rank}: {reason}" if len(self.pairs) > 1 else reason
