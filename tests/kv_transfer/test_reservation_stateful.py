"""A reservation alone against senders, and strangers, that say anything at any time."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from handover_world import CACHED, CELL_BYTES, HERE, LEASE_S, NUM_HEADS, NUM_LAYERS, NUM_TOKENS, cells, layout
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.kv_transfer.handover import (
    Ack,
    Completion,
    Discard,
    Fail,
    Fetch,
    GrantTicket,
    Land,
    Offer,
    RefusalCause,
    RefuseTicket,
    Settle,
    TellSettled,
    TicketTerms,
)
from baton.kv_transfer.plan import PageRange
from baton.kv_transfer.reservation import Reservation, ReservationState, Source, ToPair

SENDERS = (b"A" * 16, b"B" * 16, b"C" * 16)
INDEX = st.integers(0, 63)
RIGHT = st.sampled_from([True] * 9 + [False])


class ReservationAlone(RuleBasedStateMachine):
    """Two prefill ranks fill it, one half of the heads each; `pieces` are what each has not offered yet."""

    @initialize()
    def begin(self) -> None:
        self.now_s = 0.0
        epochs = itertools.count(100)
        terms = TicketTerms(reservation_id=1, epoch=0, cached_tokens=CACHED, num_tokens=NUM_TOKENS, lease_s=LEASE_S)
        self.machine = Reservation(terms, HERE, 0, draw_epoch=lambda: next(epochs), now_s=0.0)
        self.tickets: dict[int, tuple[int, bytes]] = {}
        self.pieces = {
            rank: [
                PageRange(layer, layer + 1, rank, rank + 1, begin, begin + 2)
                for layer in range(NUM_LAYERS)
                for begin in range(CACHED, NUM_TOKENS, 2)
            ]
            for rank in (0, 1)
        }
        self.offers: dict[int, list[Offer]] = {0: [], 1: []}
        self.jobs: list[tuple[int, Offer]] = []
        self.landed: Counter[Any] = Counter()
        self.acks: Counter[tuple[int, int]] = Counter()
        self.told: Counter[int] = Counter()
        self.lost: set[int] = set()
        self.counts: Counter[str] = Counter()

    def do(self, actions: tuple[Any, ...], rank: int | None = None) -> None:
        for action in actions:
            if self.counts["Settle"]:
                assert isinstance(action, ToPair), f"{action} after the end"
                assert isinstance(action.action, Discard | RefuseTicket), f"{action} after the end"
            match action:
                case ToPair(source_rank, Fetch(offer)):
                    assert source_rank == rank
                    assert self.machine.is_open
                    self.jobs.append((source_rank, offer))
                case ToPair(source_rank, Ack(seq, refusal)):
                    assert (source_rank, seq) not in [(r, offer.seq) for r, offer in self.jobs], "acked while read"
                    self.acks[source_rank, seq] += not refusal
                case ToPair(source_rank, TellSettled()):
                    assert source_rank in self.tickets
                    assert source_rank not in self.lost, "told over a link that is lost"
                    self.told[source_rank] += 1
                case Land(completion):
                    assert completion.first_token == "token"
                    assert not self.jobs
                    wanted = cells(PageRange(0, NUM_LAYERS, 0, NUM_HEADS, CACHED, NUM_TOKENS))
                    assert self.landed == Counter(wanted), "landed with cells missing, or written twice"
                    self.counts["Land"] += 1
                case Fail():
                    self.counts["Fail"] += 1
                case Settle():
                    assert not self.jobs, "settled while something may write"
                    self.counts["Settle"] += 1
        assert self.counts["Land"] + self.counts["Fail"] <= 1, "landed and failed exclude each other"
        assert self.counts["Settle"] <= 1

    # ---------------------------------------------------------------- what senders say

    @rule(rank=st.integers(0, 2), usual=RIGHT, who=st.sampled_from(SENDERS))
    def ask(self, rank: int, usual: bool, who: bytes) -> None:
        source = Source("prefill-0", layout(2)) if usual else Source("prefill-1", layout(1))
        before = self.machine.state
        (answer, *more) = self.machine.ticket_requested(source, rank, SENDERS[0] if usual else who, self.now_s)
        assert not more
        assert isinstance(answer, ToPair)
        if isinstance(answer.action, GrantTicket):
            assert before is ReservationState.OPEN
            assert rank not in self.tickets, "two senders hold the same ticket"
            epoch = answer.action.terms.epoch
            assert epoch not in [other for other, _ in self.tickets.values()], "two tickets of one epoch"
            self.tickets[rank] = (epoch, SENDERS[0] if usual else who)
        else:
            assert isinstance(answer.action, RefuseTicket)

    @precondition(lambda self: self.tickets)
    @rule(index=INDEX, usual=RIGHT, epoch_off=st.booleans(), again=st.sampled_from([False] * 6 + [True]))
    def offer(self, index: int, usual: bool, epoch_off: bool, again: bool) -> None:
        rank = sorted(self.tickets)[index % len(self.tickets)]
        epoch, sender = self.tickets[rank]
        pieces, made = self.pieces.setdefault(rank, []), self.offers.setdefault(rank, [])
        if again and made:
            offer = made[index % len(made)]
        elif pieces:
            pages = pieces[index % len(pieces)]
            offer = Offer(seq=len(made), pages=pages, num_bytes=pages.num_cells * CELL_BYTES, checksum=0, locator="")
        else:
            return
        if not usual:
            epoch, sender = (epoch + 1, sender) if epoch_off else (epoch, SENDERS[2])
            cause = RefusalCause.EPOCH if epoch_off else RefusalCause.INCARNATION
            if sender == self.tickets[rank][1] and not epoch_off:
                return
            before = (self.machine.state, self.machine.pairs[rank].num_accessors)
            actions = self.machine.offered(rank, offer, epoch=epoch, sender=sender, now_s=self.now_s)
            (refused,) = actions
            assert isinstance(refused, ToPair)
            assert isinstance(refused.action, Discard), "a stranger writes"
            assert refused.action.cause is cause
            assert (self.machine.state, self.machine.pairs[rank].num_accessors) == before
            return
        if offer not in made:
            pieces.remove(offer.pages)
            made.append(offer)
        self.do(self.machine.offered(rank, offer, epoch=epoch, sender=sender, now_s=self.now_s), rank)

    @precondition(lambda self: self.tickets)
    @rule(index=INDEX, seq=st.integers(0, 5), right_bytes=st.booleans(), begin=st.integers(0, NUM_TOKENS))
    def offer_nonsense(self, index: int, seq: int, right_bytes: bool, begin: int) -> None:
        """By who holds the ticket: it fails the reservation, or is refused, but never writes what is not wanted."""
        if index % 8:
            return
        rank = sorted(self.tickets)[index % len(self.tickets)]
        epoch, sender = self.tickets[rank]
        pages = PageRange(0, 1, 0, 2, begin, NUM_TOKENS + 1)
        num_bytes = pages.num_cells * CELL_BYTES + (not right_bytes)
        offer = Offer(seq=seq, pages=pages, num_bytes=num_bytes, checksum=0, locator="")
        actions = self.machine.offered(rank, offer, epoch=epoch, sender=sender, now_s=self.now_s)
        assert not any(isinstance(action, ToPair) and isinstance(action.action, Fetch) for action in actions)
        self.do(actions, rank)

    @precondition(lambda self: self.tickets)
    @rule(index=INDEX, usual=RIGHT, off=st.sampled_from([0] * 9 + [-1, 1]))
    def complete(self, index: int, usual: bool, off: int) -> None:
        rank = sorted(self.tickets)[index % len(self.tickets)]
        epoch, sender = self.tickets[rank]
        num_offers = len(self.offers.get(rank, [])) + len(self.pieces.get(rank, [])) + off
        completion = Completion(num_offers=max(0, num_offers), first_token="token" if rank == 0 else None)
        if usual:
            self.do(self.machine.completed(rank, completion, epoch=epoch, sender=sender, now_s=self.now_s))
        else:
            assert self.machine.completed(rank, completion, epoch=epoch + 1, sender=sender, now_s=self.now_s) == ()

    @precondition(lambda self: self.tickets)
    @rule(index=INDEX, what=st.sampled_from(["renewed"] * 6 + ["aborted", "forged abort", "lost"]))
    def sender_says(self, index: int, what: str) -> None:
        rank = sorted(self.tickets)[index % len(self.tickets)]
        epoch, sender = self.tickets[rank]
        if what == "renewed":
            self.machine.renewed(rank, self.now_s, sender=sender)
        elif what == "aborted":
            self.do(self.machine.sender_aborted(rank, "aborted", epoch=epoch))
        elif what == "forged abort":
            assert self.machine.sender_aborted(rank, "aborted", epoch=epoch + 1) == ()
        elif rank not in self.lost:
            self.lost.add(rank)
            self.do(self.machine.link_lost(rank, "lost"))

    # ---------------------------------------------------------------- what happens here

    @precondition(lambda self: self.jobs)
    @rule(index=INDEX, damaged=st.sampled_from([False] * 15 + [True]))
    def fetched(self, index: int, damaged: bool) -> None:
        rank, offer = self.jobs.pop(index % len(self.jobs))
        if not damaged:
            self.landed.update(cells(offer.pages))
        self.do(self.machine.fetched(rank, offer.seq, "damaged" if damaged else ""))

    @rule(what=st.sampled_from(["attached"] * 4 + ["cancelled", "time"]))
    def here(self, what: str) -> None:
        if what == "attached":
            self.do(self.machine.attached())
        elif what == "cancelled" and self.landed:
            self.do(self.machine.cancelled("cancelled"))
        elif what == "time" and self.landed:
            self.now_s += LEASE_S / 2
            self.do(self.machine.tick(self.now_s))

    # ---------------------------------------------------------------- the promises

    @invariant()
    def promises_hold(self) -> None:
        if not hasattr(self, "machine"):
            return
        is_settled = self.machine.state is ReservationState.SETTLED
        assert is_settled == bool(self.counts["Settle"]), "revived, or forgotten"
        assert sum(pair.num_accessors for pair in self.machine.pairs.values()) == len(self.jobs)

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        self.do(self.machine.attached())
        self.do(self.machine.cancelled("the end"))
        while self.jobs:
            self.fetched(index=0, damaged=False)
        assert self.machine.state is ReservationState.SETTLED
        assert self.counts["Settle"] == 1
        assert self.counts["Land"] + self.counts["Fail"] == 1
        for rank in self.tickets:
            assert self.told[rank] <= 1
            assert self.told[rank] == 1 or rank in self.lost, "a sender was not told of the end"


TestReservationAlone = ReservationAlone.TestCase
TestReservationAlone.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
