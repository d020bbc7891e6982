"""The reservation of a decode rank under several senders, in random order, under the promises it makes."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.kv_layout import KvLayout
from baton.kv_transfer.handover import (
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
from baton.kv_transfer.plan import (
    PageRange,
    cell_bytes,
    driver_rank,
    pair_pages,
    rank_pages,
    split_range,
    transfer_pairs,
)
from baton.kv_transfer.reservation import Reservation, ReservationAction, ReservationState, Source, ToPair


def layout(tp: int, pp: int, block: int = 4) -> KvLayout:
    return KvLayout(
        num_layers=4,
        num_kv_heads=2,
        head_dim=1,
        block_size=block,
        dtype="float32",
        tensor_parallel=tp,
        pipeline_parallel=pp,
    )


def name_of(rank: int) -> bytes:
    return bytes([rank]) * 16


class Senders:
    """All prefill ranks of a random layout that feed one decode rank of another, and the reservation there."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now_s = 0.0
        self.source = Source("prefill-0", layout(rng.choice([1, 2, 4]), rng.choice([1, 2, 4])))
        self.layout = layout(rng.choice([1, 2, 4]), rng.choice([1, 2]), rng.choice([2, 4, 8]))
        self.rank = rng.randrange(self.layout.tensor_parallel * self.layout.pipeline_parallel)
        num_tokens = rng.randint(1, 20)
        cached = rng.randrange(num_tokens)
        terms = TicketTerms(reservation_id=1, epoch=0, cached_tokens=cached, num_tokens=num_tokens, lease_s=30)
        epochs = itertools.count(100)
        self.machine = Reservation(terms, self.layout, self.rank, draw_epoch=lambda: next(epochs), now_s=0)
        self.wanted = rank_pages(self.layout, self.rank, cached, num_tokens)
        pairs = transfer_pairs(self.source.layout, self.layout)
        self.ranks = sorted(source for source, destination in pairs if destination == self.rank)
        self.to_ask = list(self.ranks)
        self.epochs: dict[int, int] = {}
        self.offers: dict[int, list[PageRange]] = {}
        self.sent: Counter[int] = Counter()
        self.fetching: list[tuple[int, Offer]] = []
        self.lost: set[int] = set()
        self.told: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()
        self.copied: Counter[tuple[int, int, int]] = Counter()
        self.first_token: object = None

    def ask(self) -> None:
        if self.to_ask:
            rank = self.to_ask.pop(self.rng.randrange(len(self.to_ask)))
            self.do(self.machine.ticket_requested(self.source, rank, name_of(rank), self.now_s))

    def send(self) -> None:
        open_ranks = [rank for rank in self.epochs if rank not in self.lost and rank in self.offers]
        if not open_ranks:
            return
        rank = self.rng.choice(open_ranks)
        who = {"epoch": self.epochs[rank], "sender": name_of(rank), "now_s": self.now_s}
        if self.offers[rank]:
            pages = self.offers[rank].pop()
            num_bytes = pages.num_cells * cell_bytes(self.layout)
            offer = Offer(seq=self.sent[rank], pages=pages, num_bytes=num_bytes, checksum=0, locator="")
            self.sent[rank] += 1
            self.do(self.machine.offered(rank, offer, **who))
        else:
            del self.offers[rank]
            drivers = (driver_rank(self.source.layout), driver_rank(self.layout))
            token = "token" if (rank, self.rank) == drivers else None
            self.do(self.machine.completed(rank, Completion(num_offers=self.sent[rank], first_token=token), **who))

    def end_fetch(self, damage: float = 0.01) -> None:
        if self.fetching:
            rank, offer = self.fetching.pop(self.rng.randrange(len(self.fetching)))
            if self.rng.random() < damage:
                self.do(self.machine.fetched(rank, offer.seq, "damaged"))
                return
            pages = offer.pages
            self.copied.update(itertools.product(range(*pages.layers), range(*pages.heads), range(*pages.tokens)))
            self.do(self.machine.fetched(rank, offer.seq))

    def lose(self) -> None:
        granted = [rank for rank in self.epochs if rank not in self.lost]
        if granted:
            rank = self.rng.choice(granted)
            self.lost.add(rank)
            self.do(self.machine.link_lost(rank, "lost"))

    def abort(self) -> None:
        if self.epochs:
            rank = self.rng.choice(sorted(self.epochs))
            self.do(self.machine.sender_aborted(rank, "aborted", epoch=self.rng.choice([0, self.epochs[rank]])))

    def forge(self) -> None:
        """A stranger's offer and completion change nothing."""
        if self.epochs:
            rank = self.rng.choice(sorted(self.epochs))
            before = (self.machine.state, self.machine.pairs[rank].state)
            completion = Completion(num_offers=0, first_token="forged")
            actions = self.machine.completed(rank, completion, epoch=7, sender=name_of(rank), now_s=self.now_s)
            assert actions == ()
            assert self.machine.sender_aborted(rank, "forged", epoch=7) == ()
            assert (self.machine.state, self.machine.pairs[rank].state) == before

    def step(self) -> None:
        if self.rng.random() < 0.02:
            self.rng.choice([self.lose, self.abort, lambda: self.do(self.machine.cancelled("cancelled"))])()
        if self.rng.random() < 0.004:
            self.now_s += 31
        self.do(self.machine.tick(self.now_s))
        self.rng.choices([self.ask, self.send, self.end_fetch, self.forge], [2, 4, 4, 1])[0]()

    def do(self, actions: tuple[ReservationAction, ...]) -> None:
        for action in actions:
            assert not self.counts["Settle"] or (
                isinstance(action, ToPair) and isinstance(action.action, Discard | RefuseTicket)
            ), f"{action} after the end"
            match action:
                case ToPair(rank, GrantTicket(terms)):
                    self.epochs[rank] = terms.epoch
                    boxes = pair_pages(
                        self.source.layout, rank, self.layout, self.rank, terms.cached_tokens, terms.num_tokens
                    )
                    size = cell_bytes(self.layout)
                    self.offers[rank] = [
                        part for box in boxes for part in split_range(box, cell_num_bytes=size, max_bytes=5 * size)
                    ]
                case ToPair(rank, Fetch(offer)):
                    self.fetching.append((rank, offer))
                case ToPair(rank, TellSettled()):
                    assert rank in self.epochs
                    assert rank not in self.lost
                    self.told[rank] += 1
                case Land(completion):
                    self.counts["Land"] += 1
                    self.first_token = completion.first_token
                    box = self.wanted
                    everything = itertools.product(range(*box.layers), range(*box.heads), range(*box.tokens))
                    assert self.copied == Counter(everything), "each cell of this rank once"
                    assert not self.fetching
                    self.do(self.machine.attached())
                case Fail():
                    self.counts["Fail"] += 1
                case Settle():
                    self.counts["Settle"] += 1
                    assert not self.fetching, "settled while something may still write"
        assert self.counts["Land"] + self.counts["Fail"] <= 1, "one outcome"
        assert self.counts["Settle"] <= 1


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 40), num_steps=st.integers(0, 150))
def test_any_order_of_events_keeps_the_promises(seed: int, num_steps: int) -> None:
    senders = Senders(random.Random(seed))
    for _ in range(num_steps):
        senders.step()
    senders.do(senders.machine.cancelled("the end"))
    while senders.fetching:
        senders.end_fetch()
    assert senders.machine.state is ReservationState.SETTLED
    assert senders.counts["Settle"] == 1
    assert senders.counts["Land"] + senders.counts["Fail"] == 1
    assert all(senders.told[rank] == 1 for rank in senders.epochs if rank not in senders.lost), "each sender told once"


@given(seed=st.integers(0, 1 << 40))
def test_undisturbed_senders_land_together(seed: int) -> None:
    senders = Senders(random.Random(seed))
    while not senders.counts["Settle"]:
        senders.rng.choice([senders.ask, senders.send, lambda: senders.end_fetch(damage=0)])()
    assert senders.counts["Land"] == 1
    assert senders.first_token == ("token" if senders.rank == driver_rank(senders.layout) else None)
    assert senders.told == Counter(senders.ranks)


def test_the_driver_does_not_land_without_a_first_token() -> None:
    terms = TicketTerms(reservation_id=1, epoch=0, cached_tokens=0, num_tokens=4, lease_s=30)
    machine = Reservation(terms, layout(1, 1), 0, draw_epoch=lambda: 9, now_s=0)
    machine.ticket_requested(Source("p", layout(1, 1)), 0, name_of(0), 0)
    box = PageRange(0, 4, 0, 2, 0, 4)
    offer = Offer(seq=0, pages=box, num_bytes=box.num_cells * 8, checksum=0, locator="")
    machine.offered(0, offer, epoch=9, sender=name_of(0), now_s=0)
    machine.fetched(0, 0)
    actions = machine.completed(0, Completion(num_offers=1, first_token=None), epoch=9, sender=name_of(0), now_s=0)
    reason = "everything landed, but no first token came"
    assert actions == (Fail(reason), ToPair(0, TellSettled(reason)), Settle())


@pytest.mark.parametrize("asked", [0, 1])
def test_who_may_have_a_ticket(asked: int) -> None:
    terms = TicketTerms(reservation_id=1, epoch=0, cached_tokens=0, num_tokens=4, lease_s=30)
    machine = Reservation(terms, layout(1, 2), 1, draw_epoch=itertools.count(5).__next__, now_s=0)
    source = Source("p", layout(2, 2))
    (refused,) = machine.ticket_requested(source, asked, name_of(asked), 0)
    assert refused == ToPair(
        asked, RefuseTicket(f"rank {asked} holds nothing that rank 1 here needs", RefusalCause.LAYOUT)
    )
    (granted,) = machine.ticket_requested(source, 2, name_of(2), 0)
    assert isinstance(granted, ToPair)
    assert isinstance(granted.action, GrantTicket)
    (refused,) = machine.ticket_requested(Source("q", layout(2, 2)), 3, name_of(3), 0)
    assert refused == ToPair(3, RefuseTicket("the ticket was given to p before", RefusalCause.TAKEN))
    assert machine.tick(29) == ()
    actions = machine.tick(31)
    assert actions[0] == Fail("prefill rank 2: lease expired: nothing heard from sender 02020202 for 30 s")
