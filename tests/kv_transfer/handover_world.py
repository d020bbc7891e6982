"""Both halves of a handover, several tries of it, and what goes wrong between them, for stateful tests.

    DecodeSide    RemotePrefill + one Reservation at a time      blocks: who may write, what was written
    Try           SenderHandover per rank of a prefill instance  jobs that gather, buffers that are posted
    Link          two lists of messages, which a test delivers, drops, doubles and turns round

The shells do what the real ones do with the actions, and check the promises where they carry them out; what no action
shows is checked by `World.check`. Time is a number.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from baton.decode_worker import remote_prefill as remote
from baton.engine.kv_layout import KvLayout
from baton.kv_transfer.handover import (
    Ack,
    BreakLink,
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
from baton.kv_transfer.handover_sender import SenderHandover, SenderState
from baton.kv_transfer.plan import PageRange, cell_bytes, driver_rank, pair_pages, rank_pages, transfer_pairs
from baton.kv_transfer.reservation import Reservation, ReservationState, Source, ToPair

LEASE_S = 30.0
NUM_LAYERS, NUM_HEADS, NUM_TOKENS, CACHED = 2, 2, 6, 2
Cell = tuple[int, int, int]


def layout(tensor_parallel: int = 1) -> KvLayout:
    return KvLayout(
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_HEADS,
        head_dim=1,
        block_size=2,
        dtype="float32",
        tensor_parallel=tensor_parallel,
    )


HERE = layout()
CELL_BYTES = cell_bytes(HERE)


def cells(pages: PageRange) -> set[Cell]:
    return set(itertools.product(range(*pages.layers), range(*pages.heads), range(*pages.tokens)))


@dataclass(eq=False)
class Link:
    """Between one rank of a try and the decode rank; each side learns for itself that it is lost."""

    half: Half
    to_decode: list[tuple[str, Any]] = field(default_factory=list)
    to_prefill: list[tuple[str, Any]] = field(default_factory=list)
    is_up_here: bool = True
    is_up_there: bool = True


@dataclass(eq=False)
class Job:
    """A fetch that runs on the decode side."""

    held: Held
    link: Link
    rank: int
    offer: Offer
    is_damaged: bool
    has_written: bool = False


@dataclass(eq=False)
class Held:
    """A reservation and what it has said."""

    handover: int
    machine: Reservation
    links: dict[int, Link] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    acks: Counter[tuple[int, int]] = field(default_factory=Counter)
    offered: Counter[tuple[int, int]] = field(default_factory=Counter)


class Half:
    """One rank of a prefill instance in one try."""

    def __init__(self, world: World, owner: Try, rank: int) -> None:
        self.world, self.owner, self.rank = world, owner, rank
        self.machine = SenderHandover(
            cell_num_bytes=CELL_BYTES, ticket_timeout_s=60.0, lease_s=LEASE_S, now_s=world.now_s
        )
        self.link = Link(self)
        self.counts: Counter[str] = Counter()
        self.staging: dict[int, PageRange] = {}
        self.posted: dict[int, PageRange] = {}
        self.is_dead = False
        self.link.to_decode.append(("ticket", world.decode.incarnation))

    def do(self, actions: tuple[Any, ...]) -> None:
        for action in actions:
            assert not self.counts["Settle"], f"{action} after the end"
            self.counts[type(action).__name__] += 1
            match action:
                case Stage(seq, pages):
                    assert not self.counts["Fail"], "staged after the outcome"
                    self.staging[seq] = pages
                case Release(seq):
                    del self.posted[seq]
                    reading = [j for j in self.world.decode.jobs if j.link is self.link and j.offer.seq == seq]
                    assert not (self.link.is_up_here and reading), "a buffer is given back while it is read"
                case SendComplete(completion):
                    self.tell(("complete", completion))
                case SendAbort(reason):
                    self.tell(("abort", reason))
                case BreakLink():
                    self.lose_link()
                case Fail(reason):
                    self.owner.failed(self, reason)
                case Settle():
                    assert not self.staging
                    assert not self.posted, "settled with buffers that may be read"
        assert self.counts["Fail"] <= 1
        assert self.counts["SendComplete"] <= 1
        assert (self.machine.state is SenderState.SETTLED) == bool(self.counts["Settle"])

    def tell(self, message: tuple[str, Any]) -> None:
        if self.link.is_up_here:
            terms = self.machine.terms
            self.link.to_decode.append((message[0], (terms, message[1])))

    def end_staging(self, seq: int, ok: bool) -> None:
        pages = self.staging.pop(seq)
        if not ok or not self.machine.is_open:
            self.do(self.machine.stage_failed(seq, "no room"))
            return
        offer = Offer(seq=seq, pages=pages, num_bytes=pages.num_cells * CELL_BYTES, checksum=0, locator="")
        self.posted[seq] = pages
        self.do(self.machine.posted(seq))
        self.tell(("offer", offer))

    def take(self, message: tuple[str, Any]) -> None:
        kind, value = message
        if self.is_dead or not self.link.is_up_here:
            return
        machine, terms = self.machine, self.machine.terms
        is_mine = terms is not None and value[0] == terms.epoch
        if kind == "granted":
            if machine.state is not SenderState.COMPUTING:
                self.link.to_decode.append(("abort", (value, "the shipment is over")))
                return
            wanted = pair_pages(self.owner.layout, self.rank, HERE, 0, value.cached_tokens, value.num_tokens)
            self.do(machine.granted(value, wanted, max_payload_bytes=4 * CELL_BYTES, now_s=self.world.now_s))
        elif kind == "refused":
            self.do(machine.refused(value))
        elif kind == "ack" and is_mine:
            self.do(machine.acked(value[1], value[2], self.world.now_s))
        elif kind == "settled" and is_mine:
            self.do(machine.peer_settled(value[1]))
        elif kind == "renewed" and is_mine:
            self.do(machine.renewed(self.world.now_s))

    def lose_link(self) -> None:
        if self.link.is_up_here:
            self.link.is_up_here = False
            if not self.is_dead:
                self.do(self.machine.link_lost("the link broke"))


class Try:
    """A prefill instance that computes and ships the prompt once."""

    def __init__(self, world: World, handover: int, tensor_parallel: int) -> None:
        self.handover = handover
        self.layout = layout(tensor_parallel)
        self.incarnation = bytes([world.next_incarnation]) * 16
        world.next_incarnation += 1
        self.ranks = sorted(source for source, _ in transfer_pairs(self.layout, HERE))
        self.halves = [Half(world, self, rank) for rank in self.ranks]
        self.work = [(0, 0, 3), (1, 0, 3), (0, 3, NUM_TOKENS), (1, 3, NUM_TOKENS)]
        self.is_complete = False
        self.has_failed = False

    def compute(self) -> None:
        """The next layer of a chunk, or the completion, on every rank."""
        if self.is_complete:
            return
        piece = self.work.pop(0) if self.work else None
        self.is_complete = piece is None
        for half in self.halves:
            if half.is_dead:
                continue
            if piece is None:
                token = "token" if half.rank == driver_rank(self.layout) else None
                half.do(half.machine.completed(token))
            else:
                held = rank_pages(self.layout, half.rank, 0, 0)
                layer, begin, end = piece
                half.do(half.machine.computed(PageRange(layer, layer + 1, *held.heads, begin, end)))

    def failed(self, by: Half, reason: str) -> None:
        if self.has_failed:
            return
        self.has_failed = True
        for half in self.halves:
            if half is not by and not half.is_dead:
                half.do(half.machine.aborted(reason))

    def crash(self) -> None:
        for half in self.halves:
            half.is_dead = True
            half.staging.clear()
            half.posted.clear()
            half.lose_link()


class DecodeSide:
    """A decode rank with one request, as `HandoverReceiver` and `DecodeWorker` carry out what is asked for."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.incarnation = bytes([world.next_incarnation]) * 16
        world.next_incarnation += 1
        self.remote = remote.RemotePrefill()
        self.open: Held | None = None
        self.all: list[Held] = []
        self.ended: set[int] = set()
        self.waiting: list[tuple[int, Link]] = []
        self.jobs: list[Job] = []
        self.written: set[Cell] = set()
        self.owner = "nobody"
        self.outcomes: Counter[str] = Counter()
        self.word_due: int | None = None

    # ---------------------------------------------------------------- what RemotePrefill asks for

    def decide(self, actions: tuple[remote.Action, ...]) -> None:
        for action in actions:
            match action:
                case remote.Open(handover):
                    self._open(handover)
                case remote.Cancel(handover, reason):
                    self._cancel(handover, reason)
                case remote.AwaitWord(handover):
                    self.word_due = handover
                case remote.PrefillHere():
                    self._hand_over("PrefillHere")
                case remote.Release():
                    self._hand_over("Release")
            assert sum(self.outcomes[name] for name in ("PrefillHere", "Land")) <= 1, "one outcome"
            assert self.outcomes["Release"] <= 1

    def _hand_over(self, outcome: str) -> None:
        assert self.open is None, f"{outcome} while reservation {self.open} is open"
        assert not self.jobs, f"{outcome} while something may write"
        self.outcomes[outcome] += 1
        self.owner = "engine"

    def _open(self, handover: int) -> None:
        assert self.open is None, "two reservations of the same blocks"
        assert self.owner != "engine", "the blocks are the engine's"
        assert not self.jobs
        world = self.world
        world.next_id += 1
        terms = TicketTerms(
            reservation_id=world.next_id, epoch=0, cached_tokens=CACHED, num_tokens=NUM_TOKENS, lease_s=LEASE_S
        )
        machine = Reservation(terms, HERE, 0, draw_epoch=lambda: next(world.epochs), now_s=world.now_s)
        self.open = Held(handover, machine)
        self.all.append(self.open)
        self.owner, self.written = "tries", set()
        for number, link in [each for each in self.waiting if each[0] <= handover]:
            self.waiting.remove((number, link))
            self.ask(link, number)

    def _cancel(self, handover: int, reason: str) -> None:
        if self.open is not None and self.open.handover == handover:
            self.do(self.open, self.open.machine.cancelled(reason))
            return
        self.ended.add(handover)
        for number, link in [each for each in self.waiting if each[0] == handover]:
            self.waiting.remove((number, link))
            link.to_prefill.append(("refused", reason))

    # ---------------------------------------------------------------- what a sender says

    def take(self, link: Link, message: tuple[str, Any], is_damaged: bool = False) -> None:
        if not link.is_up_there:
            return
        kind, value = message
        half, now_s = link.half, self.world.now_s
        if kind == "ticket":
            if value != self.incarnation:
                link.to_prefill.append(("refused", "another process"))
            else:
                self.ask(link, half.owner.handover)
            return
        terms, body = value
        held = next((h for h in self.all if h.links.get(half.rank) is link), None)
        if held is None:
            if kind == "offer":
                link.to_prefill.append(("ack", (terms.epoch, body.seq, "not open on this link")))
            return
        who = {"epoch": terms.epoch if terms else 0, "sender": half.owner.incarnation, "now_s": now_s}
        if kind == "offer":
            before = len(self.jobs)
            held.offered[half.rank, body.seq] += 1
            self.do(held, held.machine.offered(half.rank, body, **who))
            for job in self.jobs[before:]:
                job.is_damaged = is_damaged
        elif kind == "complete":
            self.do(held, held.machine.completed(half.rank, body, **who))
        elif kind == "abort":
            self.do(held, held.machine.sender_aborted(half.rank, body, epoch=who["epoch"]))

    def ask(self, link: Link, number: int) -> None:
        """`number`: the try that the link's other side stands for."""
        half = link.half
        if self.open is not None and self.open.handover == number:
            source = Source(f"prefill-{half.owner.incarnation.hex()}", half.owner.layout)
            actions = self.open.machine.ticket_requested(source, half.rank, half.owner.incarnation, self.world.now_s)
            self.do(self.open, actions, asker=link)
        elif number in self.ended or (self.open is not None and number < self.open.handover):
            link.to_prefill.append(("refused", "the reservation has ended"))
        else:
            self.waiting.append((number, link))

    def renew(self, link: Link) -> None:
        held = self.open
        if held is not None and held.links.get(link.half.rank) is link and link.is_up_there and not link.half.is_dead:
            epoch = held.machine.pairs[link.half.rank].terms.epoch
            if held.machine.renewed(link.half.rank, self.world.now_s, sender=link.half.owner.incarnation):
                link.to_prefill.append(("renewed", (epoch,)))

    def lose_link(self, link: Link) -> None:
        if not link.is_up_there:
            return
        link.is_up_there = False
        self.waiting = [each for each in self.waiting if each[1] is not link]
        for held in self.all:
            if held.links.get(link.half.rank) is link and held is self.open:
                self.do(held, held.machine.link_lost(link.half.rank, "the link broke"))

    # ---------------------------------------------------------------- accessors

    def write(self, job: Job) -> None:
        """A fetching thread copies into the blocks."""
        held, link = job.held, job.link
        assert held is self.open, "a payload of a reservation that is over is written"
        assert self.owner == "tries", "written into blocks of the engine"
        pair = held.machine.pairs[job.rank]
        assert pair.sender == link.half.owner.incarnation, "a stranger writes"
        assert link.half.machine.terms is not None
        assert pair.terms.epoch == link.half.machine.terms.epoch, "written under another epoch"
        assert not cells(job.offer.pages) & self.written, "written twice"
        assert min(job.offer.pages.tokens) >= CACHED, "cached pages are written"
        job.has_written = True
        if not job.is_damaged:
            self.written |= cells(job.offer.pages)

    def end_fetch(self, job: Job) -> None:
        if job.held.machine.is_open and not job.has_written:
            self.write(job)
        self.jobs.remove(job)
        refusal = "checksum differs" if job.is_damaged or not job.has_written else ""
        self.do(job.held, job.held.machine.fetched(job.rank, job.offer.seq, refusal))

    # ---------------------------------------------------------------- what a Reservation asks for

    def do(self, held: Held, actions: tuple[Any, ...], asker: Link | None = None) -> None:
        for action in actions:
            if held.counts["Settle"]:
                late = isinstance(action, ToPair) and isinstance(action.action, Discard | RefuseTicket)
                assert late, f"{action} after the end"
            match action:
                case ToPair():
                    self._do_for_pair(held, action, asker)
                case Land(completion):
                    held.counts["Land"] += 1
                    assert completion.first_token == "token"
                    wanted = PageRange(0, NUM_LAYERS, 0, NUM_HEADS, CACHED, NUM_TOKENS)
                    assert self.written == cells(wanted), "landed with pages missing or damaged"
                    assert not self.jobs
                    self.remote.landed(held.handover)
                    assert self.remote.phase is remote.Phase.LANDED, "landed when nobody wanted it any more"
                    self.outcomes["Land"] += 1
                    self.owner = "engine"
                    self.do(held, held.machine.attached())
                case Fail():
                    held.counts["Fail"] += 1
                    self.decide(self.remote.failed(held.handover, action))
                case Settle():
                    held.counts["Settle"] += 1
                    assert held.counts["Settle"] == 1
                    assert not [job for job in self.jobs if job.held is held], "settled while something may write"
                    assert all(held.acks[key] for key in held.offered), "an offer was never answered"
                    assert held is self.open
                    self.open = None
                    self.ended.add(held.handover)
                    self.decide(self.remote.settled(held.handover))
        assert held.counts["Land"] + held.counts["Fail"] <= 1, "landed and failed exclude each other"
        assert (held.machine.state is ReservationState.SETTLED) <= (held.counts["Land"] + held.counts["Fail"] == 1)

    def _do_for_pair(self, held: Held, to_pair: ToPair, asker: Link | None) -> None:
        rank = to_pair.source_rank
        if isinstance(to_pair.action, GrantTicket | RefuseTicket):
            assert asker is not None
        match to_pair.action:
            case GrantTicket(terms):
                assert rank not in held.links, "a ticket was given twice"
                assert asker is not None
                held.links[rank] = asker
                asker.to_prefill.append(("granted", terms))
            case RefuseTicket(reason):
                assert asker is not None
                asker.to_prefill.append(("refused", reason))
            case Fetch(offer):
                self.jobs.append(Job(held, held.links[rank], rank, offer, is_damaged=False))
            case Discard(offer, epoch, refusal):
                self._ack(held, rank, epoch, offer.seq, refusal)
            case Ack(seq, refusal):
                running = [j for j in self.jobs if j.held is held and (j.rank, j.offer.seq) == (rank, seq)]
                assert not running, "acked while it is read"
                self._ack(held, rank, held.machine.pairs[rank].terms.epoch, seq, refusal)
            case TellSettled(reason):
                epoch = held.machine.pairs[rank].terms.epoch
                held.links[rank].to_prefill.append(("settled", (epoch, reason)))

    def _ack(self, held: Held, rank: int, epoch: int, seq: int, refusal: str) -> None:
        held.acks[rank, seq] += 1
        assert held.acks[rank, seq] <= held.offered[rank, seq], "acked more often than it was offered"
        held.links[rank].to_prefill.append(("ack", (epoch, seq, refusal)))


class World:
    """One request: its decode worker, the tries, the time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.next_incarnation = 1
        self.next_id = 0
        self.epochs = itertools.count(1000)
        self.decode = DecodeSide(self)
        self.tries: list[Try] = []

    @property
    def halves(self) -> list[Half]:
        return [half for each in self.tries for half in each.halves]

    def tick(self) -> None:
        for held in list(self.decode.all):
            self.decode.do(held, held.machine.tick(self.now_s))
        for half in self.halves:
            if not half.is_dead:
                half.do(half.machine.tick(self.now_s))

    def check(self) -> None:
        """What must hold between any two events."""
        decode = self.decode
        if decode.open is None:
            assert not decode.jobs
        for held in decode.all:
            if held is not decode.open:
                assert held.counts["Settle"] == 1, "a reservation was forgotten"
                assert held.machine.state is ReservationState.SETTLED, "a settled reservation was revived"
        for half in self.halves:
            if not half.is_dead:
                assert half.machine.num_accessors == len(half.staging) + len(half.posted)

    def quiesce(self) -> None:
        """Nothing more comes, every job ends, time goes by."""
        decode = self.decode
        for job in list(decode.jobs):
            decode.end_fetch(job)
        for half in self.halves:
            half.lose_link()
            decode.lose_link(half.link)
            for seq in list(half.staging):
                half.end_staging(seq, ok=False)
        self.now_s += 10 * LEASE_S
        self.tick()
        for job in list(decode.jobs):
            decode.end_fetch(job)
        decode.decide(decode.remote.out_of_time("the time is over"))
        self.check()
        assert decode.open is None, "the reservation did not settle"
        for half in self.halves:
            if not half.is_dead:
                assert half.counts["Settle"] == 1, "a sender did not settle"
