"""A link that has ended leaves no socket on either side: Python's cycle collector is off in here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_workers import WAIT_S, DecodeWorker, PrefillWorker, make_peer
from tests.descriptors import descriptors

from baton import faults
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.transports.base import Transport
from baton.kv_transfer.transports.gloo import GlooTransport
from baton.kv_transfer.transports.shm import ShmTransport
from baton.proto.baton.v1 import worker_pb2

ARENA_BYTES = 64 << 10
NUM_TOKENS = 64
LINKS = 6
FEW = 3

TRANSPORTS: dict[str, Callable[[Path], Transport]] = {
    "shm": lambda folder: ShmTransport(arena_bytes=ARENA_BYTES, folder=folder),
    "gloo": lambda folder: GlooTransport(arena_bytes=ARENA_BYTES),
}


async def ship(prefill: PrefillWorker, decode: DecodeWorker, key: HandoverKey, how: str) -> None:
    """One handover over a link of its own, and the end of that."""
    source, destination = prefill.pool.take(NUM_TOKENS), decode.pool.take(NUM_TOKENS)
    decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=NUM_TOKENS)
    shipment = await prefill.begin(key, decode)
    prefill.compute(shipment, source, NUM_TOKENS)
    await asyncio.wait_for(shipment.settled(), WAIT_S)
    await decode.ended(key)
    link = await prefill.sender.link(decode.address)
    if how == "close":
        link.close("the test wants it")
    else:
        faults.replace(("any rpc.send fail",))
        link.send(worker_pb2.ShipMessage(renewal=worker_pb2.LeaseRenewal()))
    async with asyncio.timeout(WAIT_S):
        while not link.is_closed:
            await asyncio.sleep(0.01)
    faults.replace(())
    await link.closed()


@pytest.mark.parametrize(("name", "how"), [("shm", "close"), ("gloo", "close"), ("gloo", "fault")])
async def test_a_link_leaves_no_socket(
    no_collector: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, how: str
) -> None:
    monkeypatch.setattr(faults, "is_possible", how == "fault")
    transport = TRANSPORTS[name](tmp_path)
    decode = DecodeWorker(make_peer("decode-0"), [transport], 256)
    await decode.start()
    prefill = PrefillWorker(make_peer("prefill-0"), [transport], 256)
    try:
        await ship(prefill, decode, HandoverKey("first", 0), how)
        before = descriptors()
        for number in range(LINKS):
            await ship(prefill, decode, HandoverKey(f"r{number}", 0), how)
        async with asyncio.timeout(WAIT_S):
            while descriptors() > before + FEW:
                await asyncio.sleep(0.02)
    finally:
        faults.replace(())
        await prefill.sender.close()
        await decode.stop()
        transport.close()
