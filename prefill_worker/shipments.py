"""Handovers as a prefill instance sees them: one shipment on every rank, one outcome.

    begin --> every rank ships its layers and heads --all settled, none failed--> ShipResult
                                                    --one failed--> the others abort --all settled--> HandoverError

The blocks of a sequence are the same on every rank and belong to the shipment until all ranks have settled it. Lives on
the driver's event loop; for an instance of one rank there are no followers to tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.engine.pages import KvPages
from baton.errors import HandoverError, RefusedError
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.shipment import DecodeTarget, ShipResult
from baton.kv_transfer.wire import FirstToken
from baton.prefill_worker.rank_shipments import RankShipments
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.codec import layout_to_proto
from baton.worker.parts import Parts

__all__ = ["InstanceShipment", "Shipments"]


@dataclass(slots=True, eq=False)
class InstanceShipment:
    """One handover of the whole instance.

    Attributes:
        tag: names it towards all ranks.
        settled: the outcome, once no rank reads the blocks any more: a result, or HandoverError.
        is_refused: it failed because the decode side wants no pages any more.
    """

    key: HandoverKey
    tag: int
    parts: Parts
    settled: asyncio.Future[ShipResult]
    results: list[ShipResult] = field(default_factory=list)
    is_refused: bool = False


class Shipments:
    """All handovers of a prefill instance.

    Args:
        peer, sender, pages: of the driver's own rank.
        tell_followers: sends a command to every other rank.

    Attributes:
        own: this rank's shipments; the engine's thread tells them of rows.
    """

    def __init__(
        self,
        peer: LocalPeer,
        sender: HandoverSender,
        pages: KvPages,
        *,
        tell_followers: Callable[[pb.RankCommand], None],
    ) -> None:
        driver = peer.rank
        self._ranks = tuple(range(peer.num_ranks))
        self._tell = tell_followers
        self._loop = asyncio.get_running_loop()
        self._live: dict[int, InstanceShipment] = {}
        self._tags: dict[HandoverKey, int] = {}
        self._next_tag = 1
        self.own = RankShipments(
            peer,
            sender,
            pages,
            is_driver=True,
            on_failed=lambda tag, reason, by_peer: self._failed(driver, tag, reason, by_peer),
            on_settled=lambda tag, result: self._settled(driver, tag, result),
        )

    def begin(
        self, key: HandoverKey, target: DecodeTarget, *, timeout_s: float, num_tokens: int, in_one_message: bool
    ) -> InstanceShipment:
        """Starts a handover on every rank. See `RankShipments.begin`."""
        tag = self._next_tag
        self.own.begin(tag, key, target, timeout_s=timeout_s, num_tokens=num_tokens, in_one_message=in_one_message)
        self._next_tag += 1
        self._tell(
            pb.RankCommand(
                begin_shipment=pb.BeginShipment(
                    tag=tag,
                    request_id=key.request_id,
                    attempt=key.attempt,
                    handover=key.handover,
                    decode_ranks=[
                        pb.RankAddress(address=rank.address, incarnation=rank.incarnation) for rank in target.ranks
                    ],
                    decode_layout=None if target.layout is None else layout_to_proto(target.layout),
                    timeout_s=timeout_s,
                    num_tokens=num_tokens,
                    in_one_message=in_one_message,
                )
            )
        )
        settled: asyncio.Future[ShipResult] = self._loop.create_future()
        # Whoever does not wait for the end must not be told at interpreter exit that nobody looked.
        settled.add_done_callback(lambda future: future.cancelled() or future.exception())
        shipment = InstanceShipment(key, tag, Parts(self._ranks), settled)
        self._live[tag] = shipment
        self._tags[key] = tag
        return shipment

    def complete(self, shipment: InstanceShipment, first_token: FirstToken) -> None:
        """The first token is known; the other ranks see by themselves when all pages are offered."""
        if shipment.tag in self._live:
            self.own.complete(shipment.tag, first_token)

    def abort(self, shipment: InstanceShipment, reason: str) -> None:
        """Gives up on every rank, where it is not over."""
        if shipment.tag in self._live:
            self.own.abort(shipment.tag, reason)
            self._tell(pb.RankCommand(abort_shipment=pb.AbortShipment(tag=shipment.tag, reason=reason)))

    def on_part(self, rank: int, event: pb.PartEvent) -> None:
        """What a follower says of its part."""
        tag = self._tags[HandoverKey(event.request_id, event.attempt, event.handover)]
        if event.kind == pb.PartEvent.FAILED:
            self._failed(rank, tag, event.reason, event.by_peer)
        elif event.kind == pb.PartEvent.SETTLED:
            result = ShipResult(
                num_bytes=event.shipped_bytes, num_tokens=event.shipped_tokens, exposed_s=event.exposed_s
            )
            self._settled(rank, tag, None if event.reason else result)

    def _failed(self, rank: int, tag: int, reason: str, by_peer: bool) -> None:
        shipment = self._live[tag]
        if shipment.parts.failed(rank, reason):
            shipment.is_refused = by_peer
            self.abort(shipment, f"rank {rank} failed: {reason}" if len(self._ranks) > 1 else reason)

    def _settled(self, rank: int, tag: int, result: ShipResult | None) -> None:
        shipment = self._live[tag]
        if result is not None:
            shipment.results.append(result)
        if not shipment.parts.settled(rank):
            return
        del self._live[tag]
        del self._tags[shipment.key]
        # Not before this call is over: `own` may be telling of its own part just now.
        self._loop.call_soon(self.own.forget, tag)
        self._tell(pb.RankCommand(forget_shipment=pb.ForgetShipment(tag=tag)))
        if shipment.settled.done():
            return
        if shipment.parts.failure or len(shipment.results) < len(self._ranks):
            reason = shipment.parts.failure or "given up"
            kind = RefusedError if shipment.is_refused else HandoverError
            shipment.settled.set_exception(kind(f"handover {shipment.key} failed: {reason}"))
            return
        shipment.settled.set_result(
            ShipResult(
                num_bytes=sum(part.num_bytes for part in shipment.results),
                num_tokens=max(part.num_tokens for part in shipment.results),
                exposed_s=max(part.exposed_s for part in shipment.results),
            )
        )
