"""What a prefill instance's follower does besides steps: it ships its layers and heads."""

from __future__ import annotations

import asyncio

import grpc

from baton.engine.step_message import StepBody
from baton.errors import BatonError, RefusedError
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.shipment import ShipResult
from baton.prefill_worker.link_warmer import warm_links
from baton.prefill_worker.rank_shipments import RankShipments, ShippedRows
from baton.prefill_worker.targets import decode_target
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.worker.follower import FollowerContext
from baton.worker.peer import rank_transports

__all__ = ["PrefillPart"]


class PrefillPart:
    """See `RankPart`."""

    def __init__(self, context: FollowerContext) -> None:
        transfer = context.config.transfer
        self._context = context
        self._keys: dict[int, HandoverKey] = {}
        self._warming: set[asyncio.Task[None]] = set()
        self._transports = rank_transports(context.config, context.placement, context.pages.device)
        self._sender = HandoverSender(
            context.peer, transports=self._transports, lease_s=transfer.lease_s, checksum=None
        )
        self._shipments = RankShipments(
            context.peer, self._sender, context.pages, is_driver=False, on_failed=self._failed, on_settled=self._settled
        )

    def add_services(self, server: grpc.aio.Server) -> None:
        """None: prefill ranks call decode ranks."""

    def start(self) -> None:
        """See `RankPart`."""
        self._sender.start()

    def on_command(self, command: pb.RankCommand) -> None:
        """Begin, abort, forget shipments; make links."""
        match command.WhichOneof("command"):
            case "begin_shipment":
                self._begin(command.begin_shipment)
            case "abort_shipment":
                self._shipments.abort(command.abort_shipment.tag, command.abort_shipment.reason)
            case "forget_shipment":
                self._keys.pop(command.forget_shipment.tag, None)
                self._shipments.forget(command.forget_shipment.tag)
            case "warm_links":
                self._warm(command.warm_links)

    def on_layers(self, body: StepBody, begin: int, end: int) -> None:
        """Offers the pages of layers [begin, end) that this step has computed."""
        rows, first_block = [], 0
        for tag, count, context in zip(
            body.tags.tolist(), body.counts.tolist(), body.context_lens.tolist(), strict=True
        ):
            num_blocks = -(-context // body.block_size)
            if tag:
                blocks = body.blocks[first_block : first_block + num_blocks].tolist()
                rows.append(ShippedRows(tag, blocks, context - count, count))
            first_block += num_blocks
        self._shipments.on_rows(rows, begin, end)

    async def close(self) -> None:
        """Ends every shipment and link."""
        for task in self._warming:
            task.cancel()
        await self._sender.close()
        # What the sender's end has settled is told in callbacks.
        await asyncio.sleep(0)
        for transport in self._transports:
            transport.close()

    def _warm(self, message: pb.WarmLinks) -> None:
        done = pb.RankEvent(links_warm=pb.LinksWarm(serial=message.serial))
        target = decode_target(message.decode_ranks, message.decode_layout)
        task = asyncio.create_task(warm_links(self._sender, target, lambda: self._context.send(done)))
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)

    def _begin(self, message: pb.BeginShipment) -> None:
        key = HandoverKey(message.request_id, message.attempt, message.handover)
        self._keys[message.tag] = key
        try:
            self._shipments.begin(
                message.tag,
                key,
                decode_target(message.decode_ranks, message.decode_layout),
                timeout_s=message.timeout_s,
                num_tokens=message.num_tokens,
                in_one_message=message.in_one_message,
            )
        except BatonError as error:
            # The driver's own part has the same target, so it has failed in the same way.
            self._failed(message.tag, str(error), isinstance(error, RefusedError))
            self._settled(message.tag, None)

    def _failed(self, tag: int, reason: str, by_peer: bool) -> None:
        self._send(tag, pb.PartEvent(kind=pb.PartEvent.FAILED, reason=reason, by_peer=by_peer))

    def _settled(self, tag: int, result: ShipResult | None) -> None:
        event = pb.PartEvent(kind=pb.PartEvent.SETTLED, reason="" if result else "failed")
        if result is not None:
            event.shipped_bytes = result.num_bytes
            event.shipped_tokens = result.num_tokens
            event.exposed_s = result.exposed_s
        self._send(tag, event)

    def _send(self, tag: int, event: pb.PartEvent) -> None:
        key = self._keys[tag]
        event.request_id, event.attempt, event.handover = key.request_id, key.attempt, key.handover
        self._context.send(pb.RankEvent(part=event))
