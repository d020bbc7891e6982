"""A prefill and a decode worker without a model: plain KV pools behind the real handover, for tests."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import grpc
import torch

from baton.engine.kv_layout import KvLayout
from baton.kv_transfer.checksum import payload_checksum
from baton.kv_transfer.handover import Fail, HandoverKey, RefusalCause
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import PageRange, block_spans, cell_bytes, driver_rank, rank_pages
from baton.kv_transfer.receiver import HandoverReceiver
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.shipment import DecodeTarget, Gather, RankAddress, Shipment
from baton.kv_transfer.transports.base import Transport
from baton.kv_transfer.wire import FirstToken
from baton.proto.baton.v1 import worker_pb2_grpc

WAIT_S = 20.0


class FakePool:
    """KV pages of one rank, in the layout of an engine. Starts full of NaN: pages nobody wrote are never equal.

    `num_writes[block, layer, head, slot]` counts how often `write_pages` wrote a cell.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, rank: int = 0) -> None:
        self.layout = layout
        self.held = rank_pages(layout, rank, 0, 0)
        self.num_layers = self.held.layer_end - self.held.layer_begin
        self.num_heads = self.held.head_end - self.held.head_begin
        shape = (num_blocks, self.num_layers, 2, self.num_heads, layout.block_size, layout.head_dim)
        self.kv = torch.full(shape, float("nan"), dtype=torch.float32)
        self.num_writes = torch.zeros(num_blocks, self.num_layers, self.num_heads, layout.block_size, dtype=torch.int32)
        self._next_block = 0

    def take(self, num_tokens: int) -> tuple[int, ...]:
        """Blocks for `num_tokens` tokens, in an order that is not ascending."""
        begin = self._next_block
        self._next_block += self.layout.num_blocks_for(num_tokens)
        return tuple(reversed(range(begin, self._next_block)))

    def gather(self, block_ids: Sequence[int]) -> Gather:
        def fill(pages: PageRange, out: torch.Tensor) -> int:
            view = self._view(out, pages)
            for block, slots, at in self._spans(block_ids, pages):
                page = self.kv[block, slice(*pages.layers), :, slice(*pages.heads), slots]
                view[:, :, :, at : at + page.shape[3]] = page
            return payload_checksum(out)

        return fill

    def write_pages(self, block_ids: Sequence[int], pages: PageRange, payload: torch.Tensor) -> int:
        view = self._view(payload, pages)
        for block, slots, at in self._spans(block_ids, pages):
            page = self.kv[block, slice(*pages.layers), :, slice(*pages.heads), slots]
            page.copy_(view[:, :, :, at : at + page.shape[3]])
            self.num_writes[block, slice(*pages.layers), slice(*pages.heads), slots] += 1
        return payload_checksum(payload)

    def fill(self, block_ids: Sequence[int], content: torch.Tensor) -> None:
        """Put this rank's part of `content` [layers, 2, heads, tokens, head_dim] of the whole model into its blocks."""
        mine = content[slice(*self.held.layers), :, slice(*self.held.heads)].contiguous()
        pages = self._all(mine.shape[3])
        self.write_pages(block_ids, pages, mine.view(-1).view(torch.uint8))
        self.num_writes.zero_()

    def read(self, block_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
        """[layers, 2, heads, tokens, head_dim]"""
        pages = self._all(num_tokens)
        out = torch.empty(pages.num_cells * cell_bytes(self.layout), dtype=torch.uint8)
        self.gather(block_ids)(pages, out)
        return self._view(out, pages)

    def writes(self, block_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
        """[layers, heads, tokens]"""
        return torch.cat([self.num_writes[block] for block in block_ids], dim=2)[:, :, :num_tokens]

    def _all(self, num_tokens: int) -> PageRange:
        return PageRange(0, self.num_layers, 0, self.num_heads, 0, num_tokens)

    def _spans(self, block_ids: Sequence[int], pages: PageRange) -> Iterator[tuple[int, slice, int]]:
        for span in block_spans(self.layout.block_size, *pages.tokens):
            slots = slice(span.slot_begin, span.slot_end)
            yield block_ids[span.block_index], slots, span.token_begin - pages.token_begin

    def _view(self, flat: torch.Tensor, pages: PageRange) -> torch.Tensor:
        num_layers, num_heads, num_tokens = (end - begin for begin, end in (pages.layers, pages.heads, pages.tokens))
        return flat.view(torch.float32).view(num_layers, 2, num_heads, num_tokens, self.layout.head_dim)


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class DecodeWorker:
    """A gRPC server with the Handover service; records what its receiver calls back."""

    def __init__(self, peer: LocalPeer, transports: Sequence[Transport], num_blocks: int, **options: object) -> None:
        self.peer = peer
        self.pool = FakePool(peer.layout, num_blocks, peer.rank)
        self.landed: dict[HandoverKey, FirstToken | None] = {}
        self.failed: dict[HandoverKey, str] = {}
        self.failures: dict[HandoverKey, Fail] = {}
        self.refused: list[RefusalCause] = []
        self.settled: list[HandoverKey] = []
        self.before_write: Callable[[], None] = lambda: None
        self.when_failed: Callable[[HandoverKey, str], None] = lambda key, reason: None
        self._changed = asyncio.Event()
        self.receiver = HandoverReceiver(
            peer,
            transports=transports,
            write_pages=self._write_pages,
            on_landed=self._on_landed,
            on_failed=self._on_failed,
            on_settled=self._on_settled,
            on_refused=self.refused.append,
            **options,  # type: ignore[arg-type]
        )
        self.address = ""

    async def start(self) -> DecodeWorker:
        self.server = grpc.aio.server()
        worker_pb2_grpc.add_HandoverServicer_to_server(self.receiver, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        self.receiver.start()
        return self

    async def stop(self) -> None:
        await self.receiver.close()
        await self.server.stop(None)

    async def ended(self, key: HandoverKey) -> None:
        """Wait until the reservation has settled, and check that it had one outcome."""
        await self.until(lambda: key in self.settled)
        assert (key in self.landed) != (key in self.failed), "exactly one outcome"

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _write_pages(self, *arguments: object) -> int:
        self.before_write()
        return self.pool.write_pages(*arguments)  # type: ignore[arg-type]

    def _on_landed(self, key: HandoverKey, first_token: FirstToken | None) -> None:
        assert key not in self.landed
        assert key not in self.failed
        assert key not in self.settled
        self.landed[key] = first_token
        self._changed.set()

    def _on_failed(self, key: HandoverKey, failure: Fail) -> None:
        assert key not in self.landed
        assert key not in self.failed
        assert key not in self.settled
        self.failed[key] = failure.reason
        self.failures[key] = failure
        self._changed.set()
        self.when_failed(key, failure.reason)

    def _on_settled(self, key: HandoverKey) -> None:
        assert key not in self.settled
        self.settled.append(key)
        self._changed.set()


class PrefillWorker:
    """A sender with a pool of random pages."""

    def __init__(self, peer: LocalPeer, transports: Sequence[Transport], num_blocks: int, **options: object) -> None:
        self.peer = peer
        self.pool = FakePool(peer.layout, num_blocks, peer.rank)
        self.pool.kv.normal_(generator=torch.Generator().manual_seed(1))
        self.sender = HandoverSender(peer, transports=transports, **options)  # type: ignore[arg-type]
        self.sender.start()

    async def begin(self, key: HandoverKey, decode: DecodeWorker, **options: object) -> Shipment:
        target = DecodeTarget((RankAddress(decode.address, decode.peer.incarnation),))
        return self.sender.begin(key, target, WAIT_S, **options)  # type: ignore[arg-type]

    def compute(
        self,
        shipment: Shipment,
        block_ids: Sequence[int],
        num_tokens: int,
        *,
        chunk_tokens: int = 48,
        token_id: int = 7,
    ) -> None:
        """What an engine thread does: offers chunk by chunk, group of layers by group, then completes."""
        gather = self.pool.gather(block_ids)
        num_layers = self.pool.num_layers
        for begin in range(0, num_tokens, chunk_tokens):
            end = min(begin + chunk_tokens, num_tokens)
            for layer in range(0, num_layers, 2):
                shipment.offer(layer, min(layer + 2, num_layers), begin, end, gather)
        first = (
            FirstToken(token_id=token_id, cached_tokens=3, prefill_s=0.5)
            if self.peer.rank == driver_rank(self.peer.layout)
            else None
        )
        shipment.complete(first)


def make_peer(name: str, rank: int = 0, **changes: object) -> LocalPeer:
    layout = {"num_layers": 5, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, "dtype": "float32"}
    layout.update({k: v for k, v in changes.items() if k in KvLayout.__dataclass_fields__})  # type: ignore[misc]
    fields = {"model_fingerprint": "model-1", "host_id": "host-1", "protocol_version": 1}
    fields.update({k: v for k, v in changes.items() if k in fields})  # type: ignore[misc]
    return LocalPeer(
        instance_id=name,
        rank=rank,
        incarnation=os.urandom(16),
        layout=KvLayout(**layout),  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    for _ in range(int(WAIT_S / 0.002)):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("did not come true in time")


def baton_threads() -> list[str]:
    """Names of threads that links own."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("baton-")]
