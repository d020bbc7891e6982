"""Handovers between instances of several ranks: real gRPC streams, one fake pool per rank, all in one process."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_workers import WAIT_S, DecodeWorker, PrefillWorker, eventually, make_peer

from baton.engine.kv_layout import KvLayout
from baton.errors import HandoverError, IncompatibleError
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.plan import driver_rank, rank_pages, transfer_pairs
from baton.kv_transfer.shipment import DecodeTarget, RankAddress, Shipment
from baton.kv_transfer.transports.base import Transport
from baton.kv_transfer.transports.gloo import GlooTransport
from baton.kv_transfer.transports.shm import ShmTransport
from baton.kv_transfer.wire import FirstToken

ARENA_BYTES = 64 << 10
NUM_BLOCKS = 128
SHAPES = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]


class PrefillInstance:
    """All ranks of a prefill worker, each as if in a process of its own."""

    def __init__(self, transports: Sequence[Transport], name: str = "prefill-0", **layout: Any) -> None:
        num_ranks = layout.get("tensor_parallel", 1) * layout.get("pipeline_parallel", 1)
        self.ranks = [
            PrefillWorker(make_peer(name, rank, **layout), transports, NUM_BLOCKS) for rank in range(num_ranks)
        ]
        self.layout = self.ranks[0].peer.layout

    def compute_prompt(self, content: torch.Tensor) -> list[tuple[int, ...]]:
        """Every rank's pages of a prompt of this content; returns their blocks."""
        blocks = [rank.pool.take(content.shape[3]) for rank in self.ranks]
        for rank, ids in zip(self.ranks, blocks, strict=True):
            rank.pool.fill(ids, content)
        return blocks

    async def begin(self, key: HandoverKey, decode: DecodeInstance) -> list[Shipment]:
        return [rank.sender.begin(key, decode.target, WAIT_S) for rank in self.ranks]

    async def close(self) -> None:
        for rank in self.ranks:
            await rank.sender.close()


class DecodeInstance:
    """All ranks of a decode worker."""

    def __init__(self, transports: Sequence[Transport], name: str = "decode-0", **layout: Any) -> None:
        num_ranks = layout.get("tensor_parallel", 1) * layout.get("pipeline_parallel", 1)
        self.ranks = [
            DecodeWorker(make_peer(name, rank, **layout), transports, NUM_BLOCKS) for rank in range(num_ranks)
        ]
        self.layout = self.ranks[0].peer.layout

    @property
    def target(self) -> DecodeTarget:
        addresses = tuple(RankAddress(rank.address, rank.peer.incarnation) for rank in self.ranks)
        return DecodeTarget(addresses, self.layout)

    def reserve(self, key: HandoverKey, *, cached_tokens: int, num_tokens: int) -> list[tuple[int, ...]]:
        blocks = [rank.pool.take(num_tokens) for rank in self.ranks]
        for rank, ids in zip(self.ranks, blocks, strict=True):
            rank.receiver.open_reservation(key, ids, cached_tokens=cached_tokens, num_tokens=num_tokens)
        return blocks

    async def ended(self, key: HandoverKey) -> None:
        await asyncio.gather(*(rank.ended(key) for rank in self.ranks))

    def check(self, key: HandoverKey, blocks: list[tuple[int, ...]], content: torch.Tensor, cached: int) -> None:
        """Each rank holds its part of the content, and each cell was written once; what was cached was not touched."""
        num_tokens = content.shape[3]
        for i, (rank, ids) in enumerate(zip(self.ranks, blocks, strict=True)):
            held = rank_pages(self.layout, i, 0, num_tokens)
            arrived = rank.pool.read(ids, num_tokens)
            expected = content[slice(*held.layers), :, slice(*held.heads)]
            assert torch.equal(arrived[:, :, :, cached:], expected[:, :, :, cached:])
            assert arrived[:, :, :, :cached].isnan().all()
            writes = rank.pool.writes(ids, num_tokens)
            assert (writes[:, :, cached:] == 1).all()
            assert (writes[:, :, :cached] == 0).all()
            assert (rank.landed[key] is not None) == (i == driver_rank(self.layout)), (
                "the driver alone is told the first token"
            )


@asynccontextmanager
async def instances(
    transport: Transport, prefill: dict[str, Any], decode: dict[str, Any]
) -> AsyncIterator[tuple[PrefillInstance, DecodeInstance]]:
    taking = DecodeInstance([transport], **decode)
    for rank in taking.ranks:
        await rank.start()
    giving = PrefillInstance([transport], **prefill)
    try:
        yield giving, taking
    finally:
        await giving.close()
        for rank in taking.ranks:
            await rank.stop()
    for worker in giving.ranks:
        assert worker.sender.num_shipments == 0
    for rank in taking.ranks:
        assert rank.receiver.num_reservations == 0
        assert rank.receiver.num_links == 0


def shape(tp: int, pp: int, **more: Any) -> dict[str, Any]:
    return {"tensor_parallel": tp, "pipeline_parallel": pp, **more}


def random_content(layout: KvLayout, num_tokens: int, seed: int) -> torch.Tensor:
    size = (layout.num_layers, 2, layout.num_kv_heads, num_tokens, layout.head_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


async def hand_over(giving: PrefillInstance, taking: DecodeInstance, key: HandoverKey, rng: random.Random) -> None:
    num_tokens = rng.randint(1, 120)
    cached = rng.randrange(num_tokens) // taking.layout.block_size * taking.layout.block_size
    content = random_content(giving.layout, num_tokens, rng.randrange(1 << 30))
    sources = giving.compute_prompt(content)
    reserve_first = rng.random() < 0.5
    blocks = taking.reserve(key, cached_tokens=cached, num_tokens=num_tokens) if reserve_first else []
    shipments = await giving.begin(key, taking)
    for worker, shipment, ids in zip(giving.ranks, shipments, sources, strict=True):
        worker.compute(shipment, ids, num_tokens, chunk_tokens=rng.randint(10, 60), token_id=num_tokens)
    if not reserve_first:
        await asyncio.sleep(0.01)
        blocks = taking.reserve(key, cached_tokens=cached, num_tokens=num_tokens)
    results = await asyncio.wait_for(asyncio.gather(*(shipment.settled() for shipment in shipments)), WAIT_S)
    await taking.ended(key)
    taking.check(key, blocks, content, cached)
    assert taking.ranks[driver_rank(taking.layout)].landed[key] == FirstToken(
        token_id=num_tokens, cached_tokens=3, prefill_s=0.5, prefill_instance="prefill-0"
    )
    sent = sum(result.num_bytes for result in results)
    cells = [rank_pages(taking.layout, i, cached, num_tokens).num_cells for i in range(len(taking.ranks))]
    assert sent == sum(cells) * giving.layout.token_bytes // (giving.layout.num_layers * giving.layout.num_kv_heads)


@pytest.mark.parametrize("decode", SHAPES, ids=lambda s: f"to-{s[0]}x{s[1]}")
@pytest.mark.parametrize("prefill", SHAPES, ids=lambda s: f"from-{s[0]}x{s[1]}")
async def test_every_cell_arrives_once_from_a_rank_that_holds_it(
    prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    # Two KV heads: with four tensor ranks each head has a replica. Seeded by the shapes, so that a failure repeats.
    rng = random.Random(repr((prefill, decode)))
    sizes = [rng.choice([4, 8, 16, 32]) for _ in range(2)]
    transport = ShmTransport(arena_bytes=ARENA_BYTES)
    giving, taking = shape(*prefill, block_size=sizes[0]), shape(*decode, block_size=sizes[1])
    for side in (giving, taking):
        if side["pipeline_parallel"] == 2:
            side["layers_per_stage"] = rng.choice([(), (4, 1)])
    async with instances(transport, giving, taking) as (source, destination):
        for i in range(3):
            await hand_over(source, destination, HandoverKey(f"r{i}", i), rng)
        links = sum(rank.receiver.num_links for rank in destination.ranks)
        assert links == len(transfer_pairs(source.layout, destination.layout)), "only ranks that share pages meet"


async def test_the_same_over_gloo_and_several_at_once() -> None:
    rng = random.Random(5)
    transport = GlooTransport(arena_bytes=ARENA_BYTES)
    async with instances(transport, shape(2, 2), shape(4, 1, block_size=8)) as (giving, taking):
        keys = [HandoverKey(f"r{i}", 0) for i in range(6)]
        await asyncio.gather(*(hand_over(giving, taking, key, rng) for key in keys))
    transport.close()


async def test_replicas_share_the_load() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES)
    async with instances(transport, shape(4, 1), shape(1, 1)) as (giving, taking):
        key, num_tokens = HandoverKey("r", 0), 64
        content = random_content(giving.layout, num_tokens, 1)
        sources = giving.compute_prompt(content)
        blocks = taking.reserve(key, cached_tokens=0, num_tokens=num_tokens)
        shipments = await giving.begin(key, taking)
        for worker, shipment, ids in zip(giving.ranks, shipments, sources, strict=True):
            worker.compute(shipment, ids, num_tokens)
        results = await asyncio.wait_for(asyncio.gather(*(shipment.settled() for shipment in shipments)), WAIT_S)
        await taking.ended(key)
        taking.check(key, blocks, content, 0)
        assert [result.num_bytes for result in results] == [content.numel() * 4 // 4] * 4


async def prepared(
    giving: PrefillInstance, taking: DecodeInstance, num_tokens: int = 40
) -> tuple[HandoverKey, list[Shipment], list[tuple[int, ...]]]:
    """A handover whose every pair has its ticket."""
    key = HandoverKey("r", 0)
    sources = giving.compute_prompt(random_content(giving.layout, num_tokens, 2))
    taking.reserve(key, cached_tokens=0, num_tokens=num_tokens)
    shipments = await giving.begin(key, taking)
    await eventually(lambda: all(shipment.has_tickets for shipment in shipments))
    return key, shipments, sources


async def test_nothing_lands_before_every_sender_has_completed() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES)
    async with instances(transport, shape(2, 1), shape(1, 1)) as (giving, taking):
        key, shipments, sources = await prepared(giving, taking)
        giving.ranks[0].compute(shipments[0], sources[0], 40)
        pairs = taking.ranks[0].receiver._reservations[key].machine.pairs
        await eventually(lambda: pairs[0].state == "LANDED")
        giving.ranks[1].pool.gather(sources[1])
        assert not taking.ranks[0].landed
        giving.ranks[1].compute(shipments[1], sources[1], 40)
        await taking.ended(key)
        assert key in taking.ranks[0].landed


@pytest.mark.parametrize("landed_first", [False, True], ids=["pages-missing", "pages-landed"])
@pytest.mark.parametrize("how", ["abort", "link", "cancel"])
async def test_one_pair_that_fails_fails_the_reservation_of_its_rank(how: str, landed_first: bool) -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES)
    async with instances(transport, shape(2, 1), shape(1, 1)) as (giving, taking):
        key, shipments, sources = await prepared(giving, taking)
        decode = taking.ranks[0]
        if landed_first:
            giving.ranks[1].compute(shipments[1], sources[1], 40)
            pairs = decode.receiver._reservations[key].machine.pairs
            await eventually(lambda: pairs[1].state == "LANDED")
        if how == "abort":
            shipments[1].abort("rank 1 is ill")
        elif how == "link":
            link = await giving.ranks[1].sender.link(decode.address)
            link.close("the cable is cut")
        else:
            decode.receiver.cancel(key, "the client left")
        await decode.ended(key)
        expected = {"abort": "prefill rank 1: sender aborted: rank 1 is ill", "cancel": "the client left"}
        assert expected.get(how, "prefill rank 1: link to prefill-0") in decode.failed[key]
        for shipment in shipments:
            with pytest.raises(HandoverError):
                await asyncio.wait_for(shipment.settled(), WAIT_S)


async def test_one_decode_rank_that_fails_ends_the_shipments_that_feed_it_and_no_more_is_staged() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES)
    async with instances(transport, shape(1, 1), shape(2, 1)) as (giving, taking):
        key, shipments, sources = await prepared(giving, taking)
        failures: list[str] = []
        shipments[0]._on_failed = lambda _, reason: failures.append(reason)
        taking.ranks[1].receiver.cancel(key, "out of memory")
        with pytest.raises(HandoverError, match="decode rank 1: receiver gave up: out of memory"):
            await asyncio.wait_for(shipments[0].settled(), WAIT_S)
        assert failures == ["decode rank 1: receiver gave up: out of memory"]
        giving.ranks[0].compute(shipments[0], sources[0], 40)
        await taking.ended(key)
        assert "out of memory" in taking.ranks[0].failed[key], "the other rank is told at once"
        assert not taking.ranks[0].pool.num_writes.any()


async def test_a_rank_settles_only_when_the_copies_of_every_pair_have_ended() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES)
    async with instances(transport, shape(2, 1), shape(1, 1)) as (giving, taking):
        key, shipments, sources = await prepared(giving, taking)
        decode = taking.ranks[0]
        copying, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            copying.set()
            assert go_on.wait(WAIT_S)

        decode.before_write = hold
        giving.ranks[0].compute(shipments[0], sources[0], 40)
        assert await asyncio.to_thread(copying.wait, WAIT_S)
        shipments[1].abort("rank 1 is ill")
        await decode.until(lambda: key in decode.failed)
        await asyncio.sleep(0.02)
        assert decode.settled == []
        go_on.set()
        await decode.ended(key)


@pytest.mark.parametrize("seed", range(3))
async def test_random_failures_of_single_ranks_leave_nothing_behind(seed: int) -> None:
    """Whoever drives an instance hears of a rank's failure from the callbacks, and ends the request on the others."""
    rng = random.Random(seed)
    transport = ShmTransport(arena_bytes=ARENA_BYTES)
    async with instances(transport, shape(2, 2), shape(4, 2, block_size=8)) as (giving, taking):
        for rank in giving.ranks:
            await rank.sender.warm_up(taking.target)

        def fail_all(key: HandoverKey, reason: str) -> None:
            for rank in taking.ranks:
                rank.receiver.cancel(key, reason)

        for worker in taking.ranks:
            worker.when_failed = fail_all

        async def one(i: int) -> None:
            key, num_tokens = HandoverKey(f"r{i}", 0), rng.randint(1, 60)
            content = random_content(giving.layout, num_tokens, i)
            sources = giving.compute_prompt(content)
            blocks = taking.reserve(key, cached_tokens=0, num_tokens=num_tokens)
            shipments: list[Shipment] = []

            def abort_all(_: HandoverKey, reason: str) -> None:
                for shipment in shipments:
                    shipment.abort(reason)

            begun = [rank.sender.begin(key, taking.target, WAIT_S, on_failed=abort_all) for rank in giving.ranks]
            shipments.extend(begun)
            for rank, shipment, ids in zip(giving.ranks, shipments, sources, strict=True):
                rank.compute(shipment, ids, num_tokens, chunk_tokens=rng.randint(10, 60))
            await asyncio.sleep(rng.random() * 0.05)
            who = rng.choice(["nobody", "a prefill rank", "a decode rank"])
            if who == "a prefill rank":
                rng.choice(shipments).abort("whim")
            if who == "a decode rank":
                rng.choice(taking.ranks).receiver.cancel(key, "whim")
            ends = asyncio.gather(*(shipment.settled() for shipment in shipments), return_exceptions=True)
            await asyncio.wait_for(ends, WAIT_S)
            await taking.ended(key)
            if who == "nobody":
                taking.check(key, blocks, content, 0)

        await asyncio.gather(*(one(i) for i in range(12)))
        for rank in giving.ranks:
            for address in taking.target.ranks:
                if address.address in rank.sender._links:
                    link = await rank.sender.link(address.address)
                    await eventually(lambda link=link: link.data_path.staged_bytes == 0)
                    assert not link.shipments


async def test_a_second_instance_gets_no_ticket() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES)
    async with instances(transport, shape(2, 1), shape(1, 1)) as (giving, taking):
        key, shipments, sources = await prepared(giving, taking)
        other = PrefillInstance([transport], "prefill-1", tensor_parallel=2)
        for shipment in await other.begin(key, taking):
            with pytest.raises(HandoverError, match="the ticket was given to prefill-0 before"):
                await asyncio.wait_for(shipment.settled(), WAIT_S)
        for worker, shipment, ids in zip(giving.ranks, shipments, sources, strict=True):
            worker.compute(shipment, ids, 40)
        await taking.ended(key)
        assert key in taking.ranks[0].landed
        await other.close()


async def test_addresses_that_do_not_fit_the_layout_are_refused() -> None:
    transport = ShmTransport(arena_bytes=ARENA_BYTES)
    async with instances(transport, shape(1, 1), shape(2, 1)) as (giving, taking):
        sender, target = giving.ranks[0].sender, taking.target
        with pytest.raises(IncompatibleError, match=r"has 2 ranks, but .* = 1 x 1"):
            sender.begin(HandoverKey("r", 0), replace(target, layout=None), WAIT_S)
        with pytest.raises(IncompatibleError, match=r"has 1 ranks, but .* = 2 x 1"):
            sender.begin(HandoverKey("r", 1), replace(target, ranks=target.ranks[:1]), WAIT_S)
        swapped = DecodeTarget(target.ranks[::-1], target.layout)
        shipment = sender.begin(HandoverKey("r", 2), swapped, WAIT_S)
        with pytest.raises(IncompatibleError, match=r"is rank [01] of 2, not rank [01] of 2"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
        alone = DecodeTarget(target.ranks[:1])
        shipment = sender.begin(HandoverKey("r", 3), alone, WAIT_S)
        with pytest.raises(IncompatibleError, match="is rank 0 of 2, not rank 0 of 1"):
            await asyncio.wait_for(shipment.settled(), WAIT_S)
