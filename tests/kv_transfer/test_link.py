"""Handovers end to end: a real gRPC stream and real transports between two fake pools."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
import torch
from fake_cuda import FakeCudaIpc, FakeNccl
from fake_workers import WAIT_S, DecodeWorker, FakeClock, PrefillWorker, baton_threads, eventually, make_peer

from baton.errors import HandoverError, IncompatibleError, StaleError
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.sender_link import MAX_UNANSWERED
from baton.kv_transfer.shipment import DecodeTarget, RankAddress
from baton.kv_transfer.transports.base import ReceiveLink, ReceiveSetup, SendSetup, Transport
from baton.kv_transfer.transports.gloo import GlooTransport
from baton.kv_transfer.transports.shm import ShmTransport
from baton.kv_transfer.wire import FirstToken
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc

ARENA_BYTES = 64 << 10
# Of this test process alone: others on this host have segments of their own.
FOLDER = Path(f"/dev/shm/baton-tests-{os.getpid()}")

TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "shm": lambda: ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER),
    "gloo": lambda: GlooTransport(arena_bytes=ARENA_BYTES),
    "fake_cuda_ipc": lambda: FakeCudaIpc(arena_bytes=ARENA_BYTES),
    "fake_nccl": lambda: FakeNccl(arena_bytes=ARENA_BYTES),
}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No thread and no segment outlives a test."""
    FOLDER.mkdir()
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("baton-"):
            thread.join(WAIT_S)
    assert baton_threads() == []
    FOLDER.rmdir()


@pytest.fixture(params=sorted(TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    made = TRANSPORTS[request.param]()
    yield made
    made.close()


@asynccontextmanager
async def workers(
    transport: Transport,
    *,
    prefill_block_size: int = 16,
    receiving: Transport | None = None,
    num_blocks: int = 256,
    receiver_options: dict[str, object] | None = None,
    sender_options: dict[str, object] | None = None,
) -> AsyncIterator[tuple[PrefillWorker, DecodeWorker]]:
    decode = DecodeWorker(make_peer("decode-0"), [receiving or transport], num_blocks, **(receiver_options or {}))
    await decode.start()
    prefill = PrefillWorker(
        make_peer("prefill-0", block_size=prefill_block_size), [transport], num_blocks, **(sender_options or {})
    )
    try:
        yield prefill, decode
    finally:
        await prefill.sender.close()
        await decode.stop()
    assert prefill.sender.num_shipments == 0
    assert decode.receiver.num_reservations == 0
    assert decode.receiver.num_links == 0


def target(address: str) -> DecodeTarget:
    return DecodeTarget((RankAddress(address, b"x" * 16),))


async def settled(shipment: object) -> None:
    async with asyncio.timeout(WAIT_S):
        with suppress(HandoverError):
            await shipment.settled()  # type: ignore[attr-defined]


@pytest.mark.parametrize("prefill_block_size", [16, 5, 32])
async def test_pages_and_first_token_arrive(transport: Transport, prefill_block_size: int) -> None:
    async with workers(transport, prefill_block_size=prefill_block_size) as (prefill, decode):
        key, num_tokens = HandoverKey("r", 0), 100
        source, destination = prefill.pool.take(num_tokens), decode.pool.take(num_tokens)
        decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=num_tokens)
        shipment = await prefill.begin(key, decode)
        prefill.compute(shipment, source, num_tokens)
        result = await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)
        assert decode.landed[key] == FirstToken(
            token_id=7, cached_tokens=3, prefill_s=0.5, prefill_instance="prefill-0"
        )
        assert torch.equal(decode.pool.read(destination, num_tokens), prefill.pool.read(source, num_tokens))
        assert result.num_tokens == num_tokens
        assert result.num_bytes == num_tokens * prefill.peer.layout.token_bytes


async def test_only_the_missing_suffix_travels(transport: Transport) -> None:
    async with workers(transport) as (prefill, decode):
        key, num_tokens, cached = HandoverKey("r", 0), 90, 48
        source, destination = prefill.pool.take(num_tokens), decode.pool.take(num_tokens)
        shipment = await prefill.begin(key, decode)
        prefill.compute(shipment, source, num_tokens, chunk_tokens=40)
        decode.receiver.open_reservation(key, destination, cached_tokens=cached, num_tokens=num_tokens)
        result = await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)
        arrived = decode.pool.read(destination, num_tokens)
        assert arrived[:, :, :, :cached].isnan().all()
        assert torch.equal(arrived[:, :, :, cached:], prefill.pool.read(source, num_tokens)[:, :, :, cached:])
        assert result.num_bytes == (num_tokens - cached) * prefill.peer.layout.token_bytes


async def test_many_at_once_through_a_small_arena(transport: Transport) -> None:
    async with workers(transport, prefill_block_size=8, num_blocks=2000) as (prefill, decode):
        lengths = [1 + 37 * i % 301 for i in range(40)]

        async def one(i: int, num_tokens: int) -> None:
            key = HandoverKey(f"r{i}", i % 2)
            source, destination = prefill.pool.take(num_tokens), decode.pool.take(num_tokens)
            shipment = await prefill.begin(key, decode)
            if i % 3 == 0:
                decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=num_tokens)
            await asyncio.to_thread(prefill.compute, shipment, source, num_tokens, token_id=i)
            if i % 3:
                decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=num_tokens)
            await asyncio.wait_for(shipment.settled(), WAIT_S)
            await decode.ended(key)
            assert decode.landed[key].token_id == i
            assert torch.equal(decode.pool.read(destination, num_tokens), prefill.pool.read(source, num_tokens))

        await asyncio.gather(*(one(i, num_tokens) for i, num_tokens in enumerate(lengths)))
        assert decode.receiver.num_links == 1
        link = await prefill.sender.link(decode.address)
        assert link.data_path.staged_bytes == 0


PHASES = ("before the ticket", "ticket granted", "some offered", "all offered")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_abort_from_each_side_in_each_phase(transport: Transport, who: str, phase: str) -> None:
    async with workers(transport) as (prefill, decode):
        key, num_tokens = HandoverKey("r", 0), 64
        source, destination = prefill.pool.take(num_tokens), decode.pool.take(num_tokens)
        failures: list[str] = []
        shipment = await prefill.begin(key, decode, on_failed=lambda _, reason: failures.append(reason))
        if phase != "before the ticket":
            decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=num_tokens)
            await eventually(lambda: shipment.has_tickets)
        if phase == "some offered":
            shipment.offer(0, 2, 0, num_tokens, prefill.pool.gather(source))
        if phase == "all offered":
            shipment.offer(0, 5, 0, num_tokens, prefill.pool.gather(source))
        if who == "sender":
            shipment.abort("the client left")
        else:
            decode.receiver.cancel(key, "the client left")
        with pytest.raises(HandoverError, match="the client left"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        assert len(failures) == 1
        assert shipment.failure is not None
        if phase != "before the ticket":
            await decode.ended(key)
            assert "the client left" in decode.failed[key]
        link = await prefill.sender.link(decode.address)
        assert link.data_path.staged_bytes == 0

        # The link is as good as before.
        again = HandoverKey("r", 1)
        decode.receiver.open_reservation(again, destination, cached_tokens=0, num_tokens=num_tokens)
        shipment = await prefill.begin(again, decode)
        prefill.compute(shipment, source, num_tokens)
        await asyncio.wait_for(shipment.settled(), WAIT_S)
        assert torch.equal(decode.pool.read(destination, num_tokens), prefill.pool.read(source, num_tokens))


async def test_blocks_settle_only_after_the_copy(transport: Transport) -> None:
    async with workers(transport) as (prefill, decode):
        key = HandoverKey("r", 0)
        source, destination = prefill.pool.take(16), decode.pool.take(16)
        copying, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            copying.set()
            assert go_on.wait(WAIT_S)

        decode.before_write = hold
        decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=16)
        shipment = await prefill.begin(key, decode)
        prefill.compute(shipment, source, 16)
        assert await asyncio.to_thread(copying.wait, WAIT_S)
        decode.receiver.cancel(key, "timeout")
        assert decode.failed == {key: "timeout"}
        assert decode.settled == []
        await asyncio.sleep(0.05)
        assert decode.settled == []
        go_on.set()
        await decode.ended(key)
        await settled(shipment)


class _FlippingTransport(Transport):
    """Delivers each payload with one bit changed."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.name = inner.name

    def open_send(self, *, peer: str) -> SendSetup:
        return self._inner.open_send(peer=peer)

    def open_receive(self, options: Mapping[str, str], *, peer: str) -> ReceiveSetup:
        setup = self._inner.open_receive(options, peer=peer)
        finish = setup.finish

        def finish_flipping(deadline_s: float) -> ReceiveLink:
            link = finish(deadline_s)
            fetch = link.fetch

            def fetch_flipped(locator: str, num_bytes: int, deadline_s: float) -> torch.Tensor:
                payload = fetch(locator, num_bytes, deadline_s).clone()
                payload[num_bytes // 2] ^= 1
                return payload

            link.fetch = fetch_flipped  # type: ignore[method-assign]
            return link

        setup.finish = finish_flipping  # type: ignore[method-assign]
        return setup


@pytest.mark.parametrize("options", [{}, {"checksum": None}], ids=["before-the-copy", "while-copying"])
async def test_a_damaged_payload_is_refused(transport: Transport, options: dict[str, object]) -> None:
    flipping = _FlippingTransport(transport)
    async with workers(transport, receiving=flipping, receiver_options=options) as (prefill, decode):
        key = HandoverKey("r", 0)
        source, destination = prefill.pool.take(40), decode.pool.take(40)
        decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=40)
        shipment = await prefill.begin(key, decode)
        prefill.compute(shipment, source, 40)
        with pytest.raises(HandoverError, match="checksum"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)
        assert "checksum" in decode.failed[key]
        assert not decode.landed
        if not options:
            assert decode.pool.kv.isnan().all(), "nothing of it was copied"


async def test_checksums_made_while_copying(transport: Transport) -> None:
    summing: dict[str, object] = {"checksum": None}
    async with workers(transport, receiver_options=summing, sender_options=summing) as (prefill, decode):
        key, num_tokens = HandoverKey("r", 0), 100
        source, destination = prefill.pool.take(num_tokens), decode.pool.take(num_tokens)
        decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=num_tokens)
        shipment = await prefill.begin(key, decode)
        prefill.compute(shipment, source, num_tokens)
        await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)
        assert torch.equal(decode.pool.read(destination, num_tokens), prefill.pool.read(source, num_tokens))


async def test_the_death_of_a_sender_fails_its_reservations_only(transport: Transport) -> None:
    async with workers(transport) as (prefill, decode):
        other = PrefillWorker(make_peer("prefill-1"), [transport], 64)
        dead, alive = HandoverKey("dead", 0), HandoverKey("alive", 0)
        blocks = {key: decode.pool.take(64) for key in (dead, alive)}
        source = other.pool.take(64)
        for key in (dead, alive):
            decode.receiver.open_reservation(key, blocks[key], cached_tokens=0, num_tokens=64)
        dying = await prefill.begin(dead, decode)
        living = await other.begin(alive, decode)
        dying.offer(0, 2, 0, 64, prefill.pool.gather(prefill.pool.take(64)))
        # A payload that is on its way would fail first over some transports, for the same reason in other words.
        await eventually(lambda: bool(decode.pool.writes(blocks[dead], 64)[:2].all()))
        link = await prefill.sender.link(decode.address)
        await link._channel.close(None)
        await decode.ended(dead)
        assert "ended" in decode.failed[dead]
        with pytest.raises(HandoverError):
            await asyncio.wait_for(dying.settled(), WAIT_S)
        other.compute(living, source, 64)
        await asyncio.wait_for(living.settled(), WAIT_S)
        await decode.ended(alive)
        assert torch.equal(decode.pool.read(blocks[alive], 64), other.pool.read(source, 64))
        await other.sender.close()

        again = HandoverKey("dead", 1)
        decode.receiver.open_reservation(again, blocks[dead], cached_tokens=0, num_tokens=64)
        shipment = await prefill.begin(again, decode)
        prefill.compute(shipment, (0, 1, 2, 3), 64)
        await asyncio.wait_for(shipment.settled(), WAIT_S)


async def test_the_death_of_the_receiver_settles_the_sender(transport: Transport) -> None:
    async with workers(transport) as (prefill, decode):
        key = HandoverKey("r", 0)
        decode.receiver.open_reservation(key, decode.pool.take(64), cached_tokens=0, num_tokens=64)
        shipment = await prefill.begin(key, decode)
        shipment.offer(0, 2, 0, 64, prefill.pool.gather(prefill.pool.take(64)))
        await eventually(lambda: shipment.has_tickets)
        await decode.server.stop(None)
        with pytest.raises(HandoverError):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)


async def test_silence_ends_both_leases() -> None:
    clock = FakeClock()
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    options: dict[str, object] = {"clock": clock}
    async with workers(transport, receiver_options=options, sender_options=options) as (prefill, decode):
        key = HandoverKey("r", 0)
        decode.receiver.open_reservation(key, decode.pool.take(64), cached_tokens=0, num_tokens=64)
        shipment = await prefill.begin(key, decode)
        await eventually(lambda: shipment.has_tickets)
        clock.now_s += 29
        decode.receiver.tick()
        assert not decode.failed
        prefill.sender.renew_leases()
        machine = decode.receiver._reservations[key].machine.pairs[0]
        await eventually(lambda: machine._lease_end_s >= clock.now_s + 30)
        clock.now_s += 29
        decode.receiver.tick()
        assert not decode.failed, "renewed"
        clock.now_s += 2
        decode.receiver.tick()
        await decode.ended(key)
        assert "lease expired" in decode.failed[key]
        with pytest.raises(HandoverError, match="lease expired"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)


async def test_a_sender_gives_up_on_a_receiver_that_is_silent() -> None:
    clock = FakeClock()
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    async with workers(transport, sender_options={"clock": clock}) as (prefill, decode):
        key = HandoverKey("r", 0)
        decode.receiver.open_reservation(key, decode.pool.take(64), cached_tokens=0, num_tokens=64)
        shipment = await prefill.begin(key, decode)
        await eventually(lambda: shipment.has_tickets)
        clock.now_s += 31
        prefill.sender.tick()
        with pytest.raises(HandoverError, match="lease expired"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)


async def test_no_reservation_no_ticket() -> None:
    clock = FakeClock()
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    async with workers(transport, receiver_options={"clock": clock}) as (prefill, decode):
        never = await prefill.begin(HandoverKey("never", 0), decode)
        decode.receiver.cancel(HandoverKey("gone", 0), "the client left")
        gone = await prefill.begin(HandoverKey("gone", 0), decode)
        with pytest.raises(HandoverError, match="has ended: the client left"):
            await asyncio.wait_for(gone.settled(), WAIT_S)
        assert never.failure is None
        clock.now_s += 31
        decode.receiver.tick()
        with pytest.raises(HandoverError, match="no reservation within 30 s"):
            await asyncio.wait_for(never.settled(), WAIT_S)


async def test_incomplete_pages_never_land(transport: Transport) -> None:
    async with workers(transport) as (prefill, decode):
        key = HandoverKey("r", 0)
        decode.receiver.open_reservation(key, decode.pool.take(64), cached_tokens=0, num_tokens=64)
        shipment = await prefill.begin(key, decode)
        gather = prefill.pool.gather(prefill.pool.take(64))
        shipment.offer(0, 5, 0, 63, gather)
        shipment.offer(0, 4, 63, 64, gather)
        shipment.complete(FirstToken(token_id=1))
        with pytest.raises(HandoverError, match="2 of 640 cells missing"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)
        assert key in decode.failed


async def test_a_failing_gather_aborts(transport: Transport) -> None:
    async with workers(transport) as (prefill, decode):
        key = HandoverKey("r", 0)
        decode.receiver.open_reservation(key, decode.pool.take(16), cached_tokens=0, num_tokens=16)
        shipment = await prefill.begin(key, decode)

        def broken(*_: object) -> None:
            raise RuntimeError("no such page")

        shipment.offer(0, 5, 0, 16, broken)
        with pytest.raises(HandoverError, match="no such page"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_fingerprint": "model-2"}, "model_fingerprint: model-1 here, model-2 there"),
        ({"dtype": "bfloat16"}, "layout.dtype: float32 here, bfloat16 there"),
        ({"head_dim": 16, "num_layers": 3}, "num_layers: 5 here, 3 there; layout.head_dim: 8 here, 16 there"),
        ({"protocol_version": 2}, "protocol_version: 1 here, 2 there"),
        ({"host_id": "elsewhere"}, "no common transport"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_incompatible_peers_are_refused_with_the_difference(change: dict[str, object], expected: str) -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    async with workers(transport) as (_, decode):
        stranger = PrefillWorker(make_peer("prefill-9", **change), [transport], 4)
        with pytest.raises(IncompatibleError, match=expected):
            await stranger.sender.link(decode.address)
        shipment = await stranger.begin(HandoverKey("r", 0), decode)
        with pytest.raises(IncompatibleError, match=expected):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        await stranger.sender.close()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rank": 2, "tensor_parallel": 2}, "peer's rank is 2; its layout has ranks 0 to 1"),
        ({"pipeline_parallel": 6}, "pipeline_parallel is 6, more than its 5 layers"),
        ({"tensor_parallel": 2000}, "has 2000 ranks"),
        ({"pipeline_parallel": 2, "layers_per_stage": (4, 2)}, r"layers_per_stage is \[4, 2\]; it must be 2 numbers"),
    ],
    ids=["rank", "stages", "ranks", "layers"],
)
async def test_peers_that_cannot_be_are_refused(change: dict[str, object], expected: str) -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    async with workers(transport) as (_, decode):
        sender = HandoverSender(make_peer("prefill-9", **change), transports=[transport])
        with pytest.raises(IncompatibleError, match=expected):
            await sender.link(decode.address)
        await sender.close()


async def test_another_process_behind_the_address_is_a_stranger() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    async with workers(transport) as (prefill, decode):
        shipment = prefill.sender.begin(HandoverKey("r", 0), target(decode.address), WAIT_S)
        with pytest.raises(StaleError, match="is now decode-0"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)


async def test_nobody_at_the_address() -> None:
    sender = PrefillWorker(make_peer("prefill-0"), [ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)], 4).sender
    shipment = sender.begin(HandoverKey("r", 0), target("127.0.0.1:1"), WAIT_S)
    with pytest.raises(HandoverError, match=r"127\.0\.0\.1:1"):
        await asyncio.wait_for(shipment.settled(), WAIT_S)
    await sender.close()


async def test_unusable_shared_memory_falls_back_to_gloo(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gloo = GlooTransport(arena_bytes=ARENA_BYTES)
    decode = await DecodeWorker(make_peer("decode-0"), [ShmTransport(folder=tmp_path), gloo], 16).start()
    prefill = PrefillWorker(make_peer("prefill-0"), [ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER), gloo], 16)
    key = HandoverKey("r", 0)
    decode.receiver.open_reservation(key, decode.pool.take(64), cached_tokens=0, num_tokens=64)
    shipment = await prefill.begin(key, decode)
    prefill.compute(shipment, prefill.pool.take(64), 64)
    await asyncio.wait_for(shipment.settled(), WAIT_S)
    assert "transport shm with prefill-0" in caplog.text
    await prefill.sender.close()
    await decode.stop()
    gloo.close()


async def test_the_least_recently_used_idle_link_gives_way() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    decodes = [await DecodeWorker(make_peer(f"decode-{i}"), [transport], 16).start() for i in range(3)]
    sender = PrefillWorker(make_peer("prefill-0"), [transport], 16, max_links=2).sender
    links = [await sender.link(decode.address) for decode in decodes]
    assert [link.is_closed for link in links] == [True, False, False]
    assert await sender.link(decodes[2].address) is links[2]
    await sender.close()
    for decode in decodes:
        await decode.stop()


async def test_a_receiver_closes_its_least_recently_used_idle_link_for_a_new_one() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    async with workers(transport, receiver_options={"max_links": 2}) as (prefill, decode):
        others = [PrefillWorker(make_peer(f"prefill-{i}"), [transport], 16) for i in (1, 2, 3)]
        key = HandoverKey("r", 0)
        decode.receiver.open_reservation(key, decode.pool.take(64), cached_tokens=0, num_tokens=64)
        shipment = await prefill.begin(key, decode)
        await eventually(lambda: shipment.has_tickets)
        busy = await prefill.sender.link(decode.address)
        idle = await others[0].sender.link(decode.address)
        newer = await others[1].sender.link(decode.address)
        await eventually(lambda: idle.is_closed)
        assert not busy.is_closed
        assert not newer.is_closed
        assert decode.receiver.num_links == 2

        anew = await others[0].sender.link(decode.address)
        await eventually(lambda: newer.is_closed)
        assert not anew.is_closed

        other = HandoverKey("s", 0)
        decode.receiver.open_reservation(other, decode.pool.take(16), cached_tokens=0, num_tokens=16)
        second = await others[0].begin(other, decode)
        await eventually(lambda: second.has_tickets)
        with pytest.raises(HandoverError, match="2 links are open and busy, which is the limit"):
            await others[2].sender.link(decode.address)
        prefill.compute(shipment, prefill.pool.take(64), 64)
        others[0].compute(second, others[0].pool.take(16), 16)
        for ended in (shipment, second):
            await asyncio.wait_for(ended.settled(), WAIT_S)
        for worker in others:
            await worker.sender.close()


async def test_a_link_whose_receiver_leaves_renewals_unanswered_is_closed_and_made_anew() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    async with workers(transport) as (prefill, decode):
        link = await prefill.sender.link(decode.address)
        for _ in range(2 * MAX_UNANSWERED):
            prefill.sender.renew_leases()
            await eventually(lambda: link._unanswered == 0)
        key = HandoverKey("r", 0)
        decode.receiver.open_reservation(key, decode.pool.take(32), cached_tokens=0, num_tokens=32)
        link.send = lambda message: None  # type: ignore[method-assign]
        prefill.sender.renew_leases(only_busy=True)
        assert link._unanswered == 0
        shipment = await prefill.begin(key, decode)
        await eventually(lambda: bool(link.shipments))
        for count in range(MAX_UNANSWERED):
            prefill.sender.renew_leases(only_busy=True)
            assert link._unanswered == count + 1
        prefill.sender.renew_leases(only_busy=True)
        assert f"left {MAX_UNANSWERED} lease renewals without an answer" in link.close_reason
        with pytest.raises(HandoverError, match="lease renewals"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        assert (await prefill.sender.link(decode.address)) is not link


async def test_a_silent_link_is_closed_by_the_receiver_and_made_anew() -> None:
    clock = FakeClock()
    transport = ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)
    async with workers(transport, receiver_options={"clock": clock}) as (prefill, decode):
        link = await prefill.sender.link(decode.address)
        clock.now_s += 29.0
        prefill.sender.renew_leases()
        await eventually(lambda: list(decode.receiver._links._heard_s.values()) == [clock.now_s])
        clock.now_s += 29.0
        decode.receiver.tick()
        assert decode.receiver.num_links == 1
        clock.now_s += 2.0
        decode.receiver.tick()
        assert decode.receiver.num_links == 0
        await eventually(lambda: link.is_closed)

        key = HandoverKey("r", 0)
        decode.receiver.open_reservation(key, decode.pool.take(32), cached_tokens=0, num_tokens=32)
        shipment = await prefill.begin(key, decode)
        prefill.compute(shipment, prefill.pool.take(32), 32)
        await asyncio.wait_for(shipment.settled(), WAIT_S)
        assert (await prefill.sender.link(decode.address)) is not link


@pytest.mark.parametrize(
    "wrong",
    [
        worker_pb2.ShipMessage(),
        worker_pb2.ShipMessage(offer=worker_pb2.PageOffer(reservation_id=1, num_bytes=1 << 40, locator="../../x")),
        worker_pb2.ShipMessage(hello=worker_pb2.LinkHello()),
    ],
    ids=["empty", "offer", "hello"],
)
async def test_a_stream_that_begins_wrongly_is_refused(wrong: worker_pb2.ShipMessage) -> None:
    async with workers(ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)) as (_, decode):
        channel = grpc.aio.insecure_channel(decode.address)
        call = worker_pb2_grpc.HandoverStub(channel).Ship()
        await call.write(wrong)
        reply = await asyncio.wait_for(call.read(), WAIT_S)
        assert reply.welcome.refusal
        assert await asyncio.wait_for(call.read(), WAIT_S) is grpc.aio.EOF
        await channel.close(None)


async def test_stale_offers_are_refused_and_change_nothing() -> None:
    async with workers(ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)) as (prefill, decode):
        key = HandoverKey("r", 0)
        source, destination = prefill.pool.take(16), decode.pool.take(16)
        decode.receiver.open_reservation(key, destination, cached_tokens=0, num_tokens=16)
        shipment = await prefill.begin(key, decode)
        await eventually(lambda: shipment.has_tickets)
        link = await prefill.sender.link(decode.address)
        for reservation_id, epoch in ((shipment.pairs[0].reservation_id, 1), (99, 1)):
            offer = worker_pb2.PageOffer(
                reservation_id=reservation_id,
                epoch=epoch,
                sender_incarnation=prefill.peer.incarnation,
                layer_end=5,
                token_end=16,
                head_end=2,
                num_bytes=16 * prefill.peer.layout.token_bytes,
                locator="0",
            )
            link.send(worker_pb2.ShipMessage(offer=offer))
        prefill.compute(shipment, source, 16)
        await asyncio.wait_for(shipment.settled(), WAIT_S)
        await decode.ended(key)
        assert torch.equal(decode.pool.read(destination, 16), prefill.pool.read(source, 16))


@pytest.mark.parametrize("seed", range(3))
async def test_random_aborts_leave_nothing_behind(transport: Transport, seed: int) -> None:
    rng = random.Random(seed)
    async with workers(transport, num_blocks=600) as (prefill, decode):
        # A loop's first link of a transport may take a while; aborts shall meet handovers, not the set-up.
        await prefill.sender.link(decode.address)

        async def one(i: int) -> None:
            key, num_tokens = HandoverKey(f"r{i}", 0), rng.randint(1, 200)
            source, destination = prefill.pool.take(num_tokens), decode.pool.take(num_tokens)
            who, delay_s = rng.choice(["nobody", "sender", "receiver"]), rng.random() * 0.03
            cached = rng.randrange(num_tokens) // 16 * 16
            decode.receiver.open_reservation(key, destination, cached_tokens=cached, num_tokens=num_tokens)
            shipment = await prefill.begin(key, decode)
            prefill.compute(shipment, source, num_tokens, chunk_tokens=rng.randint(10, 100))
            await asyncio.sleep(delay_s)
            if who == "sender":
                shipment.abort("sender's whim")
            if who == "receiver":
                decode.receiver.cancel(key, "receiver's whim")
            await settled(shipment)
            await decode.ended(key)
            if who == "nobody":
                assert key in decode.landed
            if key in decode.landed:
                arrived, sent = decode.pool.read(destination, num_tokens), prefill.pool.read(source, num_tokens)
                assert torch.equal(arrived[:, :, :, cached:], sent[:, :, :, cached:])

        await asyncio.gather(*(one(i) for i in range(30)))
        link = await prefill.sender.link(decode.address)
        await eventually(lambda: link.data_path.staged_bytes == 0)
        assert not link.shipments
        assert decode.receiver.num_links == 1


class SlowShm(ShmTransport):
    """Takes its time to make a segment."""

    def open_send(self, *, peer: str) -> SendSetup:
        time.sleep(0.3)
        return super().open_send(peer=peer)


async def test_a_link_that_is_given_up_while_its_segment_is_made_leaves_none() -> None:
    decode = DecodeWorker(make_peer("decode-0"), [ShmTransport(arena_bytes=ARENA_BYTES, folder=FOLDER)], 16)
    await decode.start()
    prefill = PrefillWorker(make_peer("prefill-0"), [SlowShm(arena_bytes=ARENA_BYTES, folder=FOLDER)], 16)
    warming = asyncio.create_task(prefill.sender.warm_up(target(decode.address)))
    await asyncio.sleep(0.1)
    await prefill.sender.close()
    with pytest.raises((HandoverError, asyncio.CancelledError)):
        await warming
    await decode.stop()
    await eventually(lambda: not any(FOLDER.iterdir()))


@pytest.mark.parametrize("lease_s", [1.5, 30.0])
def test_leases_are_renewed_several_times_before_they_end(lease_s: float) -> None:
    sender = HandoverSender(make_peer("prefill-0"), transports=(), lease_s=lease_s)
    assert sender._renew_s <= min(lease_s / 3, 5.0)
