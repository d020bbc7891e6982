"""A prefill and a decode worker without a model: plain KV pools behind the real handover, for tests."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence

import grpc
import torch

from baton.engine.kv_layout import KvLayout
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import block_spans
from baton.kv_transfer.receiver import HandoverReceiver
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.shipment import Gather, Shipment
from baton.kv_transfer.transports.base import Transport
from baton.kv_transfer.wire import FirstToken
from baton.proto.baton.v1 import worker_pb2_grpc

WAIT_S = 20.0


class FakePool:
    """KV pages in the layout of an engine. Starts full of NaN, so that pages nobody wrote are never equal."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        shape = (num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        self.layout = layout
        self.kv = torch.full(shape, float("nan"), dtype=torch.float32)
        self._next_block = 0

    def take(self, num_tokens: int) -> tuple[int, ...]:
        """Blocks for `num_tokens` tokens, in an order that is not ascending."""
        begin = self._next_block
        self._next_block += self.layout.num_blocks_for(num_tokens)
        return tuple(reversed(range(begin, self._next_block)))

    def gather(self, block_ids: Sequence[int]) -> Gather:
        def fill(layer_begin: int, layer_end: int, token_begin: int, token_end: int, out: torch.Tensor) -> None:
            view = self._view(out, layer_begin, layer_end, token_begin, token_end)
            for span in block_spans(self.layout.block_size, token_begin, token_end):
                at = span.token_begin - token_begin
                page = self.kv[
                    block_ids[span.block_index], layer_begin:layer_end, :, :, span.slot_begin : span.slot_end
                ]
                view[:, :, :, at : at + page.shape[3]] = page

        return fill

    def write_pages(
        self,
        block_ids: Sequence[int],
        layer_begin: int,
        layer_end: int,
        token_begin: int,
        token_end: int,
        payload: torch.Tensor,
    ) -> None:
        view = self._view(payload, layer_begin, layer_end, token_begin, token_end)
        for span in block_spans(self.layout.block_size, token_begin, token_end):
            at = span.token_begin - token_begin
            page = self.kv[block_ids[span.block_index], layer_begin:layer_end, :, :, span.slot_begin : span.slot_end]
            page.copy_(view[:, :, :, at : at + page.shape[3]])

    def read(self, block_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
        """[layers, 2, heads, tokens, head_dim]"""
        layout = self.layout
        out = torch.empty(num_tokens * layout.token_bytes, dtype=torch.uint8)
        self.gather(block_ids)(0, layout.num_layers, 0, num_tokens, out)
        return self._view(out, 0, layout.num_layers, 0, num_tokens)

    def _view(self, flat: torch.Tensor, layer_begin: int, layer_end: int, begin: int, end: int) -> torch.Tensor:
        layout = self.layout
        return flat.view(torch.float32).view(
            layer_end - layer_begin, 2, layout.num_kv_heads, end - begin, layout.head_dim
        )


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class DecodeWorker:
    """A gRPC server with the Handover service; records what its receiver calls back."""

    def __init__(self, peer: LocalPeer, transports: Sequence[Transport], num_blocks: int, **options: object) -> None:
        self.peer = peer
        self.pool = FakePool(peer.layout, num_blocks)
        self.landed: dict[HandoverKey, FirstToken] = {}
        self.failed: dict[HandoverKey, str] = {}
        self.settled: list[HandoverKey] = []
        self.before_write: Callable[[], None] = lambda: None
        self._changed = asyncio.Event()
        self.receiver = HandoverReceiver(
            peer,
            transports=transports,
            write_pages=self._write_pages,
            on_landed=self._on_landed,
            on_failed=self._on_failed,
            on_settled=self._on_settled,
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

    def _write_pages(self, *arguments: object) -> None:
        self.before_write()
        self.pool.write_pages(*arguments)  # type: ignore[arg-type]

    def _on_landed(self, key: HandoverKey, first_token: FirstToken) -> None:
        assert key not in self.landed
        assert key not in self.failed
        assert key not in self.settled
        self.landed[key] = first_token
        self._changed.set()

    def _on_failed(self, key: HandoverKey, reason: str) -> None:
        assert key not in self.landed
        assert key not in self.failed
        assert key not in self.settled
        self.failed[key] = reason
        self._changed.set()

    def _on_settled(self, key: HandoverKey) -> None:
        assert key not in self.settled
        self.settled.append(key)
        self._changed.set()


class PrefillWorker:
    """A sender with a pool of random pages."""

    def __init__(self, peer: LocalPeer, transports: Sequence[Transport], num_blocks: int, **options: object) -> None:
        self.peer = peer
        self.pool = FakePool(peer.layout, num_blocks)
        self.pool.kv.normal_(generator=torch.Generator().manual_seed(1))
        self.sender = HandoverSender(peer, transports=transports, **options)  # type: ignore[arg-type]
        self.sender.start()

    async def begin(self, key: HandoverKey, decode: DecodeWorker, **options: object) -> Shipment:
        return await self.sender.begin(key, decode.address, decode.peer.incarnation, WAIT_S, **options)  # type: ignore[arg-type]

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
        num_layers = self.peer.layout.num_layers
        for begin in range(0, num_tokens, chunk_tokens):
            end = min(begin + chunk_tokens, num_tokens)
            for layer in range(0, num_layers, 2):
                shipment.offer(layer, min(layer + 2, num_layers), begin, end, gather)
        shipment.complete(FirstToken(token_id=token_id, cached_tokens=3, prefill_s=0.5))


def make_peer(name: str, **changes: object) -> LocalPeer:
    layout = {"num_layers": 5, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, "dtype": "float32"}
    layout.update({k: v for k, v in changes.items() if k in KvLayout.__dataclass_fields__})  # type: ignore[misc]
    fields = {"model_fingerprint": "model-1", "host_id": "host-1", "protocol_version": 1}
    fields.update({k: v for k, v in changes.items() if k in fields})  # type: ignore[misc]
    return LocalPeer(
        instance_id=name,
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
