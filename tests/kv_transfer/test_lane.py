"""The message socket of links over shared memory: whole messages, known ends, and handovers when it fails them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from fake_workers import WAIT_S, DecodeWorker, PrefillWorker, baton_threads, eventually, make_peer

from baton.errors import HandoverError
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.sender_link import SenderLink
from baton.kv_transfer.shipment import Shipment
from baton.kv_transfer.transports import shm
from baton.kv_transfer.transports.lane import Lane, LaneListener, connect_lane
from baton.kv_transfer.transports.shm import ShmTransport

FOLDER = Path(f"/dev/shm/baton-tests-{os.getpid()}-lanes")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    FOLDER.mkdir()
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("baton-"):
            thread.join(WAIT_S)
    assert baton_threads() == []
    FOLDER.rmdir()


@pytest.fixture
def lanes() -> Iterator[tuple[Lane, Lane]]:
    listener = LaneListener(FOLDER, "lane")
    theirs = connect_lane(FOLDER, "lane")
    mine = listener.accept(1.0)
    listener.close()
    yield mine, theirs
    mine.close()
    theirs.close()


def test_messages_come_whole_and_in_order(lanes: tuple[Lane, Lane]) -> None:
    mine, theirs = lanes
    messages = [bytes([i]) * (1 + 997 * i % 5000) for i in range(20)]
    assert all(mine.send(message) for message in messages)
    assert [theirs.receive(wait=True) for _ in messages] == messages
    assert theirs.receive(wait=False) is None
    assert theirs.send(b"answer")
    assert mine.receive(wait=True) == b"answer"


def test_what_does_not_fit_is_refused_at_once(lanes: tuple[Lane, Lane]) -> None:
    mine, theirs = lanes
    assert not mine.send(bytes(64 << 10))
    num_sent = 0
    while mine.send(bytes([num_sent % 256]) * 4096):
        num_sent += 1
        assert num_sent < 10_000, "the buffer has no end"
    assert num_sent > 0
    assert [theirs.receive(wait=False) for _ in range(num_sent)] == [bytes([i % 256]) * 4096 for i in range(num_sent)]
    assert theirs.receive(wait=False) is None
    assert mine.send(b"there is room again")


def test_the_end_is_told_behind_the_last_message(lanes: tuple[Lane, Lane]) -> None:
    mine, theirs = lanes
    assert mine.send(b"last")
    mine.close()
    mine.close()
    assert not mine.send(b"more")
    assert theirs.receive(wait=True) == b"last"
    assert theirs.receive(wait=True) == b""
    assert theirs.receive(wait=False) == b""
    assert mine.receive(wait=True) == b""
    assert mine.fileno() == -1


def test_closing_wakes_who_waits(lanes: tuple[Lane, Lane]) -> None:
    mine, _ = lanes
    received: list[bytes | None] = []
    thread = threading.Thread(target=lambda: received.append(mine.receive(wait=True)))
    thread.start()
    mine.close()
    thread.join(WAIT_S)
    assert received == [b""]
    assert mine.fileno() == -1


def _send_for_ever(pipe: Connection, name: str) -> None:
    lane = connect_lane(FOLDER, name)
    pipe.send("up")
    while True:
        lane.send(b"m" * 3000)


def test_a_killed_sender_leaves_whole_messages_and_an_end() -> None:
    listener = LaneListener(FOLDER, "lane")
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_send_for_ever, args=(theirs, "lane"), daemon=True)
    process.start()
    lane = listener.accept(WAIT_S)
    listener.close()
    assert mine.poll(WAIT_S)
    assert lane.receive(wait=True) == b"m" * 3000
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(WAIT_S)
    while message := lane.receive(wait=True):
        assert message == b"m" * 3000
    lane.close()


def test_nobody_comes_or_listens() -> None:
    listener = LaneListener(FOLDER, "lane")
    with pytest.raises(HandoverError, match=r"nobody came to .*/lane within 0\.05 s"):
        listener.accept(0.05)
    with pytest.raises(HandoverError, match=r"no socket .*/lane can be made"):
        LaneListener(FOLDER, "lane")
    listener.close()
    listener.close()
    with pytest.raises(HandoverError, match=r"no socket .*/lane can be reached"):
        connect_lane(FOLDER, "lane")
    with pytest.raises(HandoverError, match="No such file"):
        connect_lane(FOLDER / "absent", "lane")


async def start() -> tuple[PrefillWorker, DecodeWorker]:
    transport = ShmTransport(arena_bytes=64 << 10, folder=FOLDER)
    decode = await DecodeWorker(make_peer("decode-0"), [transport], 400).start()
    return PrefillWorker(make_peer("prefill-0"), [transport], 400), decode


async def begin(prefill: PrefillWorker, decode: DecodeWorker, key: HandoverKey, num_tokens: int = 64) -> Shipment:
    decode.receiver.open_reservation(key, decode.pool.take(num_tokens), cached_tokens=0, num_tokens=num_tokens)
    return await prefill.begin(key, decode)


async def hand_over(prefill: PrefillWorker, decode: DecodeWorker, number: int, num_tokens: int = 64) -> None:
    key, source, destination = (HandoverKey(f"r{number}", 0), prefill.pool.take(64), decode.pool.take(64))
    decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=num_tokens)
    shipment = await prefill.begin(key, decode)
    prefill.compute(shipment, source, num_tokens)
    await asyncio.wait_for(shipment.settled(), WAIT_S)
    await decode.ended(key)
    assert torch.equal(decode.pool.read(destination, num_tokens), prefill.pool.read(source, num_tokens))


def lane_of(link: SenderLink) -> Lane:
    lane = link.data_path.lane
    assert lane is not None
    return lane


async def stop(prefill: PrefillWorker, decode: DecodeWorker) -> None:
    await prefill.sender.close()
    await decode.stop()
    assert decode.receiver.num_reservations == 0
    assert decode.receiver.num_links == 0


@pytest.mark.parametrize("which", ["no lane", "refused", "now and then"])
async def test_handovers_without_a_lane_that_takes_everything(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, send = random.Random(0), Lane.send

    def refuse(folder: Path, name: str) -> LaneListener:
        raise HandoverError("not here")

    if which == "no lane":
        monkeypatch.setattr(shm, "LaneListener", refuse)
    elif which == "refused":
        monkeypatch.setattr(Lane, "send", lambda lane, message: False)
    else:
        # So messages overtake each other.
        monkeypatch.setattr(Lane, "send", lambda lane, message: rng.random() < 0.5 and send(lane, message))
    prefill, decode = await start()
    for number in range(10):
        await hand_over(prefill, decode, number)
    await stop(prefill, decode)


@pytest.mark.parametrize("seed", range(3))
async def test_random_aborts_while_messages_overtake_each_other(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, send = random.Random(seed), Lane.send
    monkeypatch.setattr(Lane, "send", lambda lane, message: rng.random() < 0.7 and send(lane, message))
    prefill, decode = await start()
    # Aborts shall meet handovers, not the set-up.
    await prefill.sender.link(decode.address)

    async def one(i: int) -> None:
        key, num_tokens = HandoverKey(f"r{i}", 0), rng.randint(1, 150)
        source, destination = prefill.pool.take(num_tokens), decode.pool.take(num_tokens)
        who, delay_s = rng.choice(["nobody", "sender", "receiver"]), rng.random() * 0.02
        decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=num_tokens)
        shipment = await prefill.begin(key, decode)
        prefill.compute(shipment, source, num_tokens, chunk_tokens=rng.randint(10, 100))
        await asyncio.sleep(delay_s)
        if who == "sender":
            shipment.abort("sender's whim")
        if who == "receiver":
            decode.receiver.cancel(key, "receiver's whim")
        async with asyncio.timeout(WAIT_S):
            with suppress(HandoverError):
                await shipment.settled()
        await decode.ended(key)
        if who == "nobody":
            assert key in decode.landed
        if key in decode.landed:
            assert torch.equal(decode.pool.read(destination, num_tokens), prefill.pool.read(source, num_tokens))

    await asyncio.gather(*(one(i) for i in range(30)))
    link = await prefill.sender.link(decode.address)
    await eventually(lambda: link.data_path.staged_bytes == 0)
    await stop(prefill, decode)


async def test_bytes_that_are_no_message_end_the_link_and_nothing_else() -> None:
    prefill, decode = await start()
    for number, garbage in enumerate((b"\xff" * 40, b"\x0a\xff\x01")):
        key = HandoverKey(f"hit{number}", 0)
        shipment = await begin(prefill, decode, key)
        await eventually(lambda shipment=shipment: shipment.has_tickets)
        assert lane_of(await prefill.sender.link(decode.address)).send(garbage)
        with pytest.raises(HandoverError):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)
        assert "are no message" in decode.failed[key]
        await hand_over(prefill, decode, number)
    await stop(prefill, decode)


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_a_lane_that_ends_ends_the_link(side: str) -> None:
    prefill, decode = await start()
    key = HandoverKey("hit", 0)
    shipment = await begin(prefill, decode, key)
    await eventually(lambda: shipment.has_tickets)
    link = await prefill.sender.link(decode.address)
    (receiving,) = decode.receiver._links
    lane = lane_of(link) if side == "sender" else receiving._lane._lane
    assert lane is not None
    # Not `close`: that is the owner's, who knows of it.
    lane._socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(HandoverError, match=r"closed its message lane|the sender|the receiver|stream"):
        await asyncio.wait_for(shipment.settled(), WAIT_S)
    await decode.ended(key)
    await eventually(lambda: link.is_closed)
    await hand_over(prefill, decode, 0)
    await stop(prefill, decode)
