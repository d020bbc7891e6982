"""What a decode instance's follower does besides steps: it receives its layers and heads of the pages."""

from __future__ import annotations

import asyncio

import grpc
from torch import Tensor

from baton.engine.step_message import StepBody
from baton.kv_transfer.handover import Fail, HandoverKey, RefusalCause
from baton.kv_transfer.plan import PageRange
from baton.kv_transfer.receiver import HandoverReceiver
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.worker.follower import FollowerContext
from baton.worker.peer import rank_transports

__all__ = ["DecodePart"]


class DecodePart:
    """See `RankPart`."""

    def __init__(self, context: FollowerContext) -> None:
        self._context = context
        self._event_loop = asyncio.get_running_loop()
        self._transports = rank_transports(context.config, context.placement, context.pages.device)
        self._receiver = HandoverReceiver(
            context.peer,
            transports=self._transports,
            write_pages=self._write_pages,
            on_landed=lambda key, _: self._tell(key, pb.PartEvent.LANDED),
            on_failed=lambda key, failure: self._tell(key, pb.PartEvent.FAILED, failure),
            on_settled=lambda key: self._tell(key, pb.PartEvent.SETTLED),
            on_refused=self._refused,
            lease_s=context.config.transfer.lease_s,
            checksum=None,
        )

    def add_services(self, server: grpc.aio.Server) -> None:
        """Handover: prefill ranks ship straight to this one."""
        rpc.add_HandoverServicer_to_server(self._receiver, server)

    def start(self) -> None:
        """See `RankPart`."""
        self._receiver.start()

    def on_command(self, command: pb.RankCommand) -> None:
        """Open and cancel reservations."""
        match command.WhichOneof("command"):
            case "open_reservation":
                opened = command.open_reservation
                self._receiver.open_reservation(
                    HandoverKey(opened.request_id, opened.attempt, opened.handover),
                    list(opened.block_ids),
                    cached_tokens=opened.cached_tokens,
                    num_tokens=opened.num_tokens,
                )
            case "cancel_reservation":
                cancelled = command.cancel_reservation
                key = HandoverKey(cancelled.request_id, cancelled.attempt, cancelled.handover)
                self._receiver.cancel(key, cancelled.reason)

    def on_layers(self, body: StepBody, begin: int, end: int) -> None:
        """Nothing: pages do not leave a decode worker."""

    async def close(self) -> None:
        """Ends every reservation and link."""
        await self._receiver.close()
        for transport in self._transports:
            transport.close()

    def _write_pages(self, block_ids: tuple[int, ...], pages: PageRange, payload: Tensor) -> int:
        return self._context.pages.scatter(block_ids, pages.layers, pages.tokens, payload, heads=pages.heads)

    def _refused(self, cause: RefusalCause) -> None:
        event = pb.RankEvent(part=pb.PartEvent(kind=pb.PartEvent.REFUSED, reason=cause))
        self._event_loop.call_soon_threadsafe(self._context.send, event)

    def _tell(self, key: HandoverKey, kind: pb.PartEvent.Kind, failure: Fail | None = None) -> None:
        event = pb.PartEvent(request_id=key.request_id, attempt=key.attempt, handover=key.handover, kind=kind)
        if failure is not None:
            event.reason, event.by_peer = failure.reason, failure.by_peer
        self._context.send(pb.RankEvent(part=event))
