"""Both state machines against each other and against garbage, in random order, under the promises they make."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kv_transfer.handover import (
    Ack,
    BreakLink,
    Completion,
    Discard,
    Fail,
    Fetch,
    GrantTicket,
    Land,
    Offer,
    RefuseTicket,
    Release,
    SendAbort,
    SendComplete,
    Settle,
    Stage,
    TellSettled,
    TicketTerms,
)
from baton.kv_transfer.handover_receiver import ReceiverHandover, ReceiverState
from baton.kv_transfer.handover_sender import SenderHandover, SenderState
from baton.kv_transfer.plan import PageRange

NUM_LAYERS, NUM_HEADS, CELL_BYTES, EPOCH, SENDER = 3, 2, 4, 77, b"S" * 16


class Recorder:
    """What a machine has said so far, checked as it says it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def check(self, actions: tuple[object, ...], num_accessors: int) -> None:
        for action in actions:
            assert self.counts["Settle"] == 0 or isinstance(action, Discard | RefuseTicket), f"{action} after the end"
            self.counts[type(action).__name__] += 1
        assert self.counts["Settle"] <= 1
        assert self.counts["Fail"] + self.counts["Land"] <= 1, "one outcome"
        if self.counts["Settle"]:
            assert num_accessors == 0, "settled with accessors outstanding"


class Pair:
    """A sender and a receiver, their jobs, and the messages between them (in order in each direction)."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now_s = 0.0
        num_tokens = rng.randint(1, 12)
        cached = rng.randrange(num_tokens)
        self.terms = TicketTerms(reservation_id=1, epoch=EPOCH, cached_tokens=cached, num_tokens=num_tokens, lease_s=30)
        self.wanted = (PageRange(0, NUM_LAYERS, 0, NUM_HEADS, cached, num_tokens),)
        self.receiver = ReceiverHandover(self.terms, self.wanted, cell_num_bytes=CELL_BYTES, now_s=0)
        self.sender = SenderHandover(cell_num_bytes=CELL_BYTES, ticket_timeout_s=60, lease_s=30, now_s=0)
        self.received, self.sent = Recorder(), Recorder()
        self.to_receiver: list[tuple[str, object]] = [("ticket", None)]
        self.to_sender: list[tuple[str, object]] = []
        self.fetching: list[int] = []
        self.staging: list[int] = []
        self.posted: list[int] = []
        self.staged_pages: dict[int, PageRange] = {}
        self.copied: Counter[tuple[int, int, int]] = Counter()
        self.offers: dict[int, Offer] = {}
        self.link_up = True
        chunks = sorted({0, num_tokens, *(rng.randint(0, num_tokens) for _ in range(2))})
        self.work = [
            PageRange(layer, layer + 1, 0, NUM_HEADS, begin, end)
            for begin, end in itertools.pairwise(chunks)
            for layer in range(NUM_LAYERS)
        ]

    # ---------------------------------------------------------------- events

    def engine(self) -> None:
        if self.work:
            self.do_send(self.sender.computed(self.work.pop(0)))
        elif not self.sent.counts["completed"]:
            self.sent.counts["completed"] += 1
            self.do_send(self.sender.completed("token"))

    def deliver_to_receiver(self) -> None:
        if not self.to_receiver:
            return
        kind, value = self.to_receiver.pop(0)
        machine, now_s = self.receiver, self.now_s
        if kind == "ticket":
            self.do_receive(machine.ticket_requested(SENDER, now_s))
        elif kind == "offer":
            assert isinstance(value, Offer)
            self.do_receive(machine.offered(value, epoch=EPOCH, sender=SENDER, now_s=now_s))
        elif kind == "complete":
            assert isinstance(value, Completion)
            self.do_receive(machine.completed(value, epoch=EPOCH, sender=SENDER, now_s=now_s))
        else:
            self.do_receive(machine.sender_aborted(str(value), epoch=EPOCH))

    def deliver_to_sender(self) -> None:
        if not self.to_sender:
            return
        kind, value = self.to_sender.pop(0)
        self.look_up_posted()
        if kind == "granted":
            self.do_send(self.sender.granted(self.terms, self.wanted, max_payload_bytes=64, now_s=self.now_s))
        elif kind == "refused":
            self.do_send(self.sender.refused(str(value)))
        elif kind == "ack":
            assert isinstance(value, Ack)
            self.do_send(self.sender.acked(value.seq, value.refusal, self.now_s))
        else:
            self.do_send(self.sender.peer_settled(str(value)))

    def end_fetch(self) -> None:
        if self.fetching:
            seq = self.fetching.pop(self.rng.randrange(len(self.fetching)))
            broken = not self.link_up or self.rng.random() < 0.03
            if not broken:
                pages = self.offers[seq].pages
                self.copied.update(
                    (layer, head, token)
                    for layer in range(pages.layer_begin, pages.layer_end)
                    for head in range(pages.head_begin, pages.head_end)
                    for token in range(pages.token_begin, pages.token_end)
                )
            self.do_receive(self.receiver.fetched(seq, "damaged" if broken else ""))

    def end_staging(self) -> None:
        if self.staging:
            seq = self.staging.pop(0)
            if self.rng.random() < 0.02:
                self.do_send(self.sender.stage_failed(seq, "no room"))
            else:
                self.post(seq)

    def post(self, seq: int) -> None:
        """What a staging thread does: the sender learns of it some time later, but before the ack."""
        pages = self.staged_pages[seq]
        assert pages.num_cells * CELL_BYTES <= 64
        offer = Offer(seq=seq, pages=pages, num_bytes=pages.num_cells * CELL_BYTES, checksum=0, locator="")
        if self.link_up:
            self.to_receiver.append(("offer", offer))
        self.posted.append(seq)
        if self.rng.random() < 0.5:
            self.look_up_posted()

    def look_up_posted(self) -> None:
        while self.posted:
            self.do_send(self.sender.posted(self.posted.pop(0)))

    def attach(self) -> None:
        self.do_receive(self.receiver.attached())
        self.do_receive(self.receiver.released())

    def lose_link(self) -> None:
        self.link_up = False
        self.to_receiver.clear()
        self.to_sender.clear()
        self.do_receive(self.receiver.link_lost("lost"))
        if self.rng.random() < 0.5:
            self.look_up_posted()
        self.do_send(self.sender.link_lost("lost"))

    def garbage(self) -> None:
        begin, end = self.rng.randint(0, 12), self.rng.randint(0, 12)
        pages = PageRange(self.rng.randint(0, 3), self.rng.randint(0, 4), 0, NUM_HEADS, begin, end)
        offer = Offer(
            seq=self.rng.randint(0, 6),
            pages=pages,
            num_bytes=max(pages.num_cells, 0) * CELL_BYTES,
            checksum=0,
            locator="",
        )
        sender = self.rng.choice([SENDER, b"X" * 16])
        epoch = self.rng.choice([EPOCH, 0])
        if sender == SENDER and epoch == EPOCH:
            return
        before = (self.receiver.state, self.receiver.num_accessors)
        actions = self.receiver.offered(offer, epoch=epoch, sender=sender, now_s=self.now_s)
        assert all(isinstance(action, Discard) for action in actions)
        completion = Completion(num_offers=0, first_token="forged")
        assert self.receiver.completed(completion, epoch=epoch, sender=sender, now_s=self.now_s) == ()
        assert (self.receiver.state, self.receiver.num_accessors) == before

    def step(self) -> None:
        usual = [
            self.engine,
            self.deliver_to_receiver,
            self.deliver_to_sender,
            self.end_fetch,
            self.end_staging,
            self.attach,
            self.garbage,
        ]
        weights = [3.0, 4, 4, 3, 3, 2, 1]
        if self.rng.random() < 0.02:
            self.rng.choice(
                [
                    self.lose_link,
                    lambda: self.do_receive(self.receiver.cancelled("cancelled")),
                    lambda: self.do_send(self.sender.aborted("aborted")),
                    lambda: setattr(self, "now_s", self.now_s + 31),
                ]
            )()
        self.do_receive(self.receiver.tick(self.now_s))
        self.do_send(self.sender.tick(self.now_s))
        self.rng.choices(usual, weights)[0]()

    # ---------------------------------------------------------------- actions

    def do_receive(self, actions: tuple[object, ...]) -> None:
        ended_before = self.receiver.has_ended
        state = self.receiver.state
        self.received.check(actions, self.receiver.num_accessors)
        for action in actions:
            match action:
                case GrantTicket():
                    self.to_sender.append(("granted", None))
                case Fetch(offer):
                    self.offers[offer.seq] = offer
                    self.fetching.append(offer.seq)
                case Discard(offer):
                    self.to_sender.append(("ack", Ack(offer.seq, "discarded")))
                case Ack():
                    self.to_sender.append(("ack", action))
                case TellSettled(reason):
                    self.to_sender.append(("settled", reason))
                case Land():
                    terms = self.terms
                    expected = NUM_LAYERS * NUM_HEADS * (terms.num_tokens - terms.cached_tokens)
                    assert len(self.copied) == expected
                    assert set(self.copied.values()) == {1}
                case RefuseTicket(reason):
                    self.to_sender.append(("refused", reason))
                case Fail() | Settle():
                    pass
        assert not ended_before or self.receiver.state is state, "the end is the end"
        if not self.link_up:
            self.to_sender.clear()

    def do_send(self, actions: tuple[object, ...]) -> None:
        self.sent.check(actions, self.sender.num_accessors)
        for action in actions:
            match action:
                case Stage(seq, pages):
                    self.staged_pages[seq] = pages
                    self.staging.append(seq)
                case SendComplete(completion):
                    self.to_receiver.append(("complete", completion))
                case SendAbort(reason):
                    self.to_receiver.append(("abort", reason))
                case BreakLink():
                    self.lose_link()
                case Release() | Fail() | Settle():
                    pass


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 40), num_steps=st.integers(0, 250))
def test_any_order_of_events_keeps_the_promises(seed: int, num_steps: int) -> None:
    pair = Pair(random.Random(seed))
    for _ in range(num_steps):
        pair.step()
    # Whatever happened: when the link is gone and the jobs have ended, both halves have settled.
    pair.attach()
    pair.lose_link()
    while pair.fetching:
        pair.end_fetch()
    while pair.staging:
        pair.end_staging()
    pair.look_up_posted()
    assert pair.receiver.state in (ReceiverState.SETTLED, ReceiverState.RELEASED)
    assert pair.sender.state is SenderState.SETTLED
    assert pair.received.counts["Settle"] == 1
    assert pair.sent.counts["Settle"] == 1
    assert pair.received.counts["Land"] + pair.received.counts["Fail"] == 1
    if pair.receiver.state is ReceiverState.RELEASED:
        assert pair.received.counts["Land"] == 1


def test_an_undisturbed_pair_lands() -> None:
    pair = Pair(random.Random(3))
    for _ in range(200):
        pair.engine()
        pair.deliver_to_receiver()
        pair.deliver_to_sender()
        while pair.staging:
            pair.post(pair.staging.pop(0))
        while pair.fetching:
            pair.copied.update(
                (layer, head, token)
                for pages in [pair.offers[pair.fetching[0]].pages]
                for layer in range(pages.layer_begin, pages.layer_end)
                for head in range(pages.head_begin, pages.head_end)
                for token in range(pages.token_begin, pages.token_end)
            )
            pair.do_receive(pair.receiver.fetched(pair.fetching.pop(0)))
        pair.attach()
    assert pair.receiver.state is ReceiverState.RELEASED
    assert pair.sender.state is SenderState.SETTLED
    assert pair.sender.reason == ""
