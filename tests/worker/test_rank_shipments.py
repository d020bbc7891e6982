"""Shipments of one rank: rows find their shipment whether they come before or after it, and not once it is over."""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from baton.engine.kv_layout import KvLayout
from baton.engine.pages import KvPages
from baton.errors import HandoverError
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.shipment import DecodeTarget, RankAddress, ShipResult
from baton.prefill_worker.rank_shipments import RankShipments, ShippedRows

LAYOUT = KvLayout(num_layers=4, num_kv_heads=2, head_dim=2, block_size=4, dtype="float32")
TARGET = DecodeTarget((RankAddress("127.0.0.1:1", b"d" * 16),))


class FakeShipment:
    def __init__(self) -> None:
        self.offers: list[tuple[int, int, int, int]] = []
        self.completed = False
        self.future: asyncio.Future[ShipResult] = asyncio.get_running_loop().create_future()

    def offer(self, *pages: Any) -> None:
        self.offers.append(pages[:4])

    def complete(self, first_token: Any) -> None:
        self.completed = True

    def abort(self, reason: str) -> None:
        self.future.set_exception(HandoverError(reason))

    async def settled(self) -> ShipResult:
        return await self.future


class FakeSender:
    def __init__(self) -> None:
        self.shipments: list[FakeShipment] = []

    def begin(self, *_: Any, **__: Any) -> FakeShipment:
        self.shipments.append(FakeShipment())
        return self.shipments[-1]


class Rank:
    def __init__(self, *, is_driver: bool = False) -> None:
        peer = LocalPeer(
            instance_id="prefill-0", incarnation=b"p" * 16, model_fingerprint="m", layout=LAYOUT, host_id=""
        )
        self.sender = FakeSender()
        self.settled: list[tuple[int, ShipResult | None]] = []
        self.shipments = RankShipments(
            peer,
            self.sender,  # type: ignore[arg-type]
            KvPages(torch.zeros(8, 4, 2, 2, 4, 2), 4),
            is_driver=is_driver,
            on_failed=lambda tag, reason, by_peer: None,
            on_settled=lambda tag, result: self.settled.append((tag, result)),
        )

    def begin(self, tag: int, *, in_one_message: bool = False) -> None:
        self.shipments.begin(
            tag, HandoverKey(f"r{tag}", 0), TARGET, timeout_s=1.0, num_tokens=10, in_one_message=in_one_message
        )

    async def rows(self, begin: int, end: int, *rows: ShippedRows) -> None:
        self.shipments.on_rows(rows, begin, end)
        await asyncio.sleep(0)


async def test_rows_that_come_before_their_shipment_wait_for_it() -> None:
    rank = Rank()
    await rank.rows(0, 2, ShippedRows(1, [3, 5], 4, 3))
    await rank.rows(2, 4, ShippedRows(1, [3, 5], 4, 3))
    rank.begin(1)
    shipment = rank.sender.shipments[0]
    # What the prefix cache held comes first, with all layers.
    assert shipment.offers == [(0, 4, 0, 4), (0, 2, 4, 7), (2, 4, 4, 7)]
    assert not shipment.completed
    await rank.rows(0, 2, ShippedRows(1, [3, 5, 6], 7, 3))
    assert not shipment.completed
    await rank.rows(2, 4, ShippedRows(1, [3, 5, 6], 7, 3))
    assert shipment.offers[3:] == [(0, 2, 7, 10), (2, 4, 7, 10)]
    assert shipment.completed


async def test_short_prompts_go_in_one_message_and_the_driver_completes_with_its_token() -> None:
    rank = Rank(is_driver=True)
    rank.begin(1, in_one_message=True)
    await rank.rows(0, 2, ShippedRows(1, [3], 0, 10))
    await rank.rows(2, 4, ShippedRows(1, [3], 0, 10))
    assert rank.sender.shipments[0].offers == [(0, 4, 0, 10)]
    assert not rank.sender.shipments[0].completed


async def test_rows_of_what_is_over_mean_nothing() -> None:
    rank = Rank()
    rank.begin(1)
    rank.begin(2)
    rank.shipments.abort(1, "the client left")
    await asyncio.sleep(0.01)
    assert rank.settled == [(1, None)]
    rank.shipments.forget(1)
    await rank.rows(0, 4, ShippedRows(1, [3], 0, 4), ShippedRows(2, [4], 0, 4))
    assert [shipment.offers for shipment in rank.sender.shipments] == [[], [(0, 4, 0, 4)]]
    rank.shipments.abort(1, "again")
    rank.sender.shipments[1].future.set_result(ShipResult(num_bytes=5, num_tokens=4, exposed_s=0.0))
    await asyncio.sleep(0.01)
    assert [tag for tag, _ in rank.settled] == [1, 2]
