"""Messages of a link that are lost or come twice: the first ends the link, the second changes nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_workers import WAIT_S, DecodeWorker, PrefillWorker, baton_threads, eventually, make_peer

from baton.errors import HandoverError
from baton.kv_transfer.handover import HandoverKey, RefusalCause
from baton.kv_transfer.numbered_lane import NumberedLane
from baton.kv_transfer.transports.base import Transport
from baton.kv_transfer.transports.gloo import GlooTransport
from baton.kv_transfer.transports.shm import ShmTransport
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.stream_order import SequenceGapError

KEY, NUM_TOKENS = HandoverKey("r", 0), 100
# shm has a lane, gloo has none.
TRANSPORTS: dict[str, Callable[[], Transport]] = {"shm": ShmTransport, "gloo": GlooTransport}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("baton-"):
            thread.join(WAIT_S)
    assert baton_threads() == []


def disturb(link: Any, times: Callable[[int], int]) -> None:
    """From now on the link's nth message, from 0, goes out so many times."""
    count = 0

    def next_times() -> int:
        nonlocal count
        count += 1
        return times(count - 1)

    if link._lane is not None:
        lane, send_lane = link._lane._lane, link._lane._lane.send

        def send(message: bytes) -> bool:
            # A lane that has ended says no; what is lost on purpose seems sent.
            sent = [send_lane(message) for _ in range(next_times())]
            return not sent or sent[0]

        lane.send = send
        return
    write = link._call.write

    async def write_disturbed(message: pb.ShipMessage) -> None:
        for _ in range(next_times()):
            await write(message)

    link._call.write = write_disturbed


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("lost", [None, 0, 1, 2])
async def test_messages_that_get_lost_or_come_twice(name: str, lost: int | None) -> None:
    transport = TRANSPORTS[name]()
    decode = await DecodeWorker(make_peer("decode-0"), [transport], 64, lease_s=60.0).start()
    prefill = PrefillWorker(make_peer("prefill-0"), [transport], 64, lease_s=60.0)
    source, destination = prefill.pool.take(NUM_TOKENS), decode.pool.take(NUM_TOKENS)
    try:
        link: Any = await prefill.sender.link(decode.address)
        disturb(link, lambda n: 2 if lost is None else int(n != lost))
        decode.receiver.open_reservation(KEY, destination, cached_tokens=0, num_tokens=NUM_TOKENS)
        shipment = await prefill.begin(KEY, decode)
        prefill.compute(shipment, source, NUM_TOKENS)
        if lost is None:
            await asyncio.wait_for(shipment.settled(), WAIT_S)
            await decode.ended(KEY)
            assert torch.equal(decode.pool.read(destination, NUM_TOKENS), prefill.pool.read(source, NUM_TOKENS))
            assert decode.pool.writes(destination, NUM_TOKENS).max() == 1
            assert not link.is_closed
            assert decode.refused == []
            return
        # The first one asks for the ticket: nothing follows it but renewals, which show the gap.
        if lost == 0:
            prefill.sender.renew_leases()
        with pytest.raises(HandoverError):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        await eventually(lambda: decode.refused == [RefusalCause.GAP])
        assert link.is_closed
        if lost:
            await decode.ended(KEY)
            before = lost + (name == "gloo")  # of the stream the hello was the first
            assert f"is missing: message {before + 2} came after {before}" in decode.failed[KEY]
            assert decode.failures[KEY].by_peer, "another prefill worker may try"
    finally:
        await prefill.sender.close()
        await decode.stop()
        transport.close()


def test_a_message_that_does_not_fit_costs_no_number() -> None:
    class Full:
        room = False
        sent: list[bytes]

        def __init__(self) -> None:
            self.sent = []

        def send(self, message: bytes) -> bool:
            if self.room:
                self.sent.append(message)
            return self.room

    inner: Any = Full()
    lane, reader = NumberedLane(inner), NumberedLane(inner)
    assert not lane.send(pb.ShipReply())
    inner.room = True
    for _ in range(3):
        assert lane.send(pb.ShipReply())
    numbers = [pb.ShipReply.FromString(message).seq for message in inner.sent]
    assert numbers == [1, 2, 3]
    assert [reader.is_new(number) for number in (1, 1, 2)] == [True, False, True]
    with pytest.raises(SequenceGapError, match="message 4 came after 2"):
        reader.is_new(4)
