"""A real shipment to two decode ranks, on links of the test's own, against receivers that answer anything."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from fake_workers import FakeClock, make_peer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.errors import HandoverError
from baton.kv_transfer.handover import HandoverKey, TicketTerms
from baton.kv_transfer.pair_shipment import ShipmentContext
from baton.kv_transfer.plan import PageRange, cell_bytes
from baton.kv_transfer.shipment import DecodeTarget, RankAddress, Shipment, ShipResult
from baton.kv_transfer.wire import FirstToken, ticket_to_proto
from baton.proto.baton.v1 import worker_pb2 as pb

KEY = HandoverKey("r", 1, 2)
LEASE_S, TICKET_S, NUM_TOKENS, CACHED = 30.0, 20.0, 8, 2
LAYOUT = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 1, "block_size": 2}
RIGHT = st.sampled_from([True] * 9 + [False])
RANK = st.integers(0, 1)


class Memory:
    """The data path of a link: buffers that are out."""

    def __init__(self, limit_bytes: int) -> None:
        self.max_payload_bytes = limit_bytes
        self.out: list[Any] = []

    def stage(self, num_bytes: int, deadline_s: float) -> Any:
        staged = SimpleNamespace(payload=torch.zeros(num_bytes, dtype=torch.uint8))
        self.out.append(staged)
        return staged

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        yield

    def release(self, staged: Any) -> None:
        assert any(staged is other for other in self.out), "given back twice"
        self.out = [other for other in self.out if other is not staged]


class FakeLink:
    """What a `PairShipment` needs of a `SenderLink`; jobs and messages wait for the test."""

    def __init__(self, peer: Any, limit_bytes: int) -> None:
        self.peer, self.address = peer, peer.instance_id
        self.is_closed = False
        self.shipments: dict[HandoverKey, Any] = {}
        self.data_path = Memory(limit_bytes)
        self.jobs: list[tuple[Callable[[], None], Callable[[str], None]]] = []
        self.messages: list[pb.ShipMessage] = []
        self.soon: list[Callable[[], None]] = []

    def request_ticket(self, shipment: Any) -> None:
        self.shipments[shipment.key] = shipment

    def run(self, job: Callable[[], None], failed: Callable[[str], None]) -> None:
        self.jobs.append((job, failed))

    def post(self, staged: Any, to_message: Callable[[str], pb.ShipMessage], on_posted: Callable[[], None]) -> None:
        if self.is_closed:
            raise HandoverError("closed")
        on_posted()
        self.messages.append(to_message("here"))

    def send(self, message: pb.ShipMessage) -> None:
        self.messages.append(message)

    def send_abort(self, key: HandoverKey, reservation_id: int, epoch: int, reason: str) -> None:
        assert key == KEY
        self.messages.append(pb.ShipMessage(abort=pb.ShipAbort(reservation_id=reservation_id, epoch=epoch)))

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def close(self, reason: str) -> None:
        if not self.is_closed:
            self.is_closed = True
            for shipment in list(self.shipments.values()):
                shipment.on_link_lost(reason)


class ShipmentAlone(RuleBasedStateMachine):
    """One shipment from its first page to its end."""

    @initialize(limit_cells=st.integers(1, 8))
    def begin(self, limit_cells: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock()
        me = make_peer("prefill-0", **LAYOUT)
        peers = [make_peer("decode-0", rank, tensor_parallel=2, **LAYOUT) for rank in range(2)]
        self.links = [FakeLink(peer, limit_cells * cell_bytes(me.layout)) for peer in peers]
        self.failures: list[str] = []
        self.forgotten = 0
        self.meanwhile: Callable[[], None] = lambda: None
        self.started: set[int] = set()
        self.terms: dict[int, TicketTerms] = {}
        self.work = [(layer, begin, begin + 4) for begin in (0, 4) for layer in range(2)]
        self.is_complete = False
        context = ShipmentContext(peer=me, lease_s=LEASE_S, clock=self.clock, checksum=lambda payload: 7)
        target = DecodeTarget(tuple(RankAddress(p.instance_id, p.incarnation) for p in peers), peers[0].layout)

        async def make() -> Shipment:
            return Shipment(
                KEY, context, target, timeout_s=TICKET_S, on_failed=self.on_failed, forget=self.on_forgotten
            )

        self.shipment = self.loop.run_until_complete(make())
        self.end: asyncio.Future[ShipResult | None] = self.shipment._settled

    def on_failed(self, key: HandoverKey, reason: str) -> None:
        self.failures.append(reason)
        assert not self.end.done(), "failed after the end"

    def on_forgotten(self, shipment: Shipment) -> None:
        self.forgotten += 1

    def gather(self, pages: PageRange, out: torch.Tensor) -> None:
        assert not self.end.done(), "blocks are read after the end"
        assert pages.token_begin >= CACHED, "what the receiver holds is sent"
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        assert not self.end.done(), "it ended while blocks are read"

    def run_loop(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))

    # ---------------------------------------------------------------- this side

    @rule()
    def compute(self) -> None:
        if self.work:
            layer, begin, end = self.work.pop(0)
            self.shipment.offer(layer, layer + 1, begin, end, self.gather)
        elif not self.is_complete:
            self.is_complete = True
            self.shipment.complete(FirstToken(token_id=5))
        self.run_loop()

    @rule(rank=RANK, can=RIGHT)
    def link_is_there(self, rank: int, can: bool) -> None:
        if rank in self.started:
            return
        self.started.add(rank)
        pair = self.shipment.pairs[rank]
        if can:
            pair.start(self.links[rank], 2)  # type: ignore[arg-type]
        else:
            pair.fail(HandoverError("no link"))

    @rule(rank=RANK, index=st.integers(0, 7), ends_meanwhile=RIGHT.map(lambda right: not right))
    def stage(self, rank: int, index: int, ends_meanwhile: bool = False) -> None:
        link = self.links[rank]
        if link.jobs:
            if ends_meanwhile:
                self.meanwhile = self.both_settle
            job, failed = link.jobs.pop(index % len(link.jobs))
            try:
                job()
            except HandoverError as error:
                failed(str(error))
            self.meanwhile = lambda: None

    @rule(rank=RANK)
    def soon(self, rank: int) -> None:
        link = self.links[rank]
        callbacks, link.soon = link.soon, []
        for callback in callbacks:
            callback()

    @precondition(lambda self: self.is_complete)
    @rule(what=st.sampled_from(["abort", "time", "link lost", "ticket time"]), rank=RANK)
    def mishap(self, what: str, rank: int) -> None:
        if what == "abort":
            self.shipment.abort("the client left")
            self.run_loop()
        elif what == "link lost":
            self.links[rank].close("lost")
        else:
            self.clock.now_s += LEASE_S + 1 if what == "time" else TICKET_S / 2
            self.shipment.tick()

    # ---------------------------------------------------------------- receivers

    def reply(self, rank: int, reply: pb.ShipReply) -> None:
        link = self.links[rank]
        shipment = link.shipments.get(KEY)
        if shipment is not None and not link.is_closed:
            shipment.on_reply(reply)

    @rule(rank=RANK, granted=RIGHT)
    def ticket(self, rank: int, granted: bool) -> None:
        terms = TicketTerms(
            reservation_id=rank + 1, epoch=rank + 50, cached_tokens=CACHED, num_tokens=NUM_TOKENS, lease_s=LEASE_S
        )
        self.terms[rank] = terms
        ticket = ticket_to_proto(KEY, terms, b"x" * 16, (1, 2)) if granted else pb.Ticket(refusal="no")
        self.reply(rank, pb.ShipReply(ticket=ticket))

    @rule(rank=RANK, index=st.integers(0, 7), right_epoch=RIGHT, refusal=st.sampled_from([""] * 9 + ["damaged"]))
    def ack(self, rank: int, index: int, right_epoch: bool, refusal: str) -> None:
        """Also of what was acked before, and of what was never offered."""
        offers = [message.offer.seq for message in self.links[rank].messages if message.HasField("offer")]
        seq = offers[index % len(offers)] if offers and index != 7 else index
        epoch = rank + 50 + (not right_epoch)
        self.reply(rank, pb.ShipReply(ack=pb.PageAck(reservation_id=rank + 1, epoch=epoch, seq=seq, refusal=refusal)))

    @rule(rank=RANK, right_epoch=RIGHT, reason=st.sampled_from(["", "", "", "cancelled"]))
    def settled(self, rank: int, right_epoch: bool, reason: str) -> None:
        if not self.is_complete:
            return
        epoch = rank + 50 + (not right_epoch)
        told = pb.ShipSettled(reservation_id=rank + 1, epoch=epoch, reason=reason)
        self.reply(rank, pb.ShipReply(settled=told))

    def both_settle(self) -> None:
        for rank in (0, 1):
            self.settled(rank=rank, right_epoch=True, reason="")

    # ---------------------------------------------------------------- the promises

    @invariant()
    def promises_hold(self) -> None:
        if not hasattr(self, "shipment"):
            return
        assert len(self.failures) <= 1, "the outcome was decided twice"
        assert (self.shipment.failure is not None) == bool(self.failures)
        assert self.forgotten == self.end.done()
        for link in self.links:
            completions = [message for message in link.messages if message.HasField("complete")]
            assert len(completions) <= 1
            if self.end.done():
                assert not link.data_path.out, "settled with buffers that may be read"
        result = self.end.result() if self.end.done() else None
        assert not self.end.done() or (result is None) == bool(self.failures)
        if result is not None:
            sizes = [sum(m.offer.num_bytes for m in link.messages if m.HasField("offer")) for link in self.links]
            assert sum(sizes) == result.num_bytes
            assert self.is_complete, "a success of what was never complete"

    def teardown(self) -> None:
        if not hasattr(self, "shipment"):
            return
        self.shipment.abort("the end")
        self.run_loop()
        for rank, link in enumerate(self.links):
            self.link_is_there(rank=rank, can=False)
            link.close("the end")
            while link.jobs:
                self.stage(rank=rank, index=0)
            self.soon(rank=rank)
        self.run_loop()
        assert self.end.done(), "it did not settle"
        self.promises_hold()
        self.loop.close()


TestShipmentAlone = ShipmentAlone.TestCase
TestShipmentAlone.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
