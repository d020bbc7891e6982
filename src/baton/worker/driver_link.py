"""A follower's stream to the driver of its instance: found through the registry, open for as long as the rank lives.

find --registry: where is the driver?--> join --welcome--> commands ... StopRank | the driver is gone
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.errors import UnavailableError
from baton.placement import Placement
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.channels import open_channel
from baton.worker.keepalive import CHANNEL_OPTIONS

__all__ = ["DriverLink"]

# The type stubs of grpc lack it.
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_FLUSH_S = 0.5
_MEET_S = 10.0


class DriverLink:
    """One follower's stream. Everything runs on the event loop.

    Attributes:
        welcome: where the ranks meet.
    """

    def __init__(self, channel: grpc.aio.Channel, call: Any, placement: Placement, welcome: pb.RankWelcome) -> None:
        """See `join`."""
        self.welcome = welcome
        self._channel = channel
        self._call = call
        self._placement = placement
        self._outbox: asyncio.Queue[pb.RankEvent] = asyncio.Queue()
        self._sender = asyncio.create_task(self._send_all(), name="events to the driver")

    @classmethod
    async def join(
        cls, registry_address: str, placement: Placement, incarnation: bytes, timeout_s: float
    ) -> DriverLink:
        """Finds the driver and joins it.

        Args:
            timeout_s: how long the driver may take to start.

        Raises:
            UnavailableError: no driver, or it refuses this rank.
        """
        me = placement.name
        async with asyncio.timeout(timeout_s) as deadline:
            address = await _find_driver(registry_address, placement, timeout_s)
            channel = open_channel(address, CHANNEL_OPTIONS)
            try:
                call: Any = rpc.RanksStub(channel).Join(wait_for_ready=True)
                hello = pb.RankHello(
                    instance_id=placement.instance_id,
                    start_id=placement.start_id,
                    rank=placement.rank,
                    pid=os.getpid(),
                    incarnation=incarnation,
                    host=placement.host,
                )
                await call.write(pb.RankEvent(hello=hello))
                first = await call.read()
            except grpc.aio.AioRpcError as error:
                await channel.close(None)
                raise UnavailableError(f"{me}: the driver at {address} broke off: {error.details()}") from error
        assert not deadline.expired()
        if first is _EOF or first.WhichOneof("command") != "welcome" or first.welcome.refusal:
            await channel.close(None)
            said = "nothing" if first is _EOF else first.welcome.refusal or "no welcome"
            raise UnavailableError(f"{me}: the driver at {address} refuses this rank: {said}")
        return cls(channel, call, placement, first.welcome)

    def send(self, event: pb.RankEvent) -> None:
        """Queues an event; the driver gets all of them in order."""
        self._outbox.put_nowait(event)

    async def commands(self) -> AsyncIterator[pb.RankCommand]:
        """Commands of the driver until it lets this rank end.

        Raises:
            UnavailableError: the driver is gone.
        """
        gone = f"{self._placement.name}: the driver of {self._placement.instance_id} is gone"
        try:
            while (command := await self._call.read()) is not _EOF:
                if command.WhichOneof("command") == "stop":
                    return
                yield command
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(f"{gone} ({error.code().name})") from error
        raise UnavailableError(gone)

    async def close(self) -> None:
        """Sends what is queued, for half a second at most, and ends the stream."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._outbox.join(), _FLUSH_S)
        self._sender.cancel()
        await asyncio.gather(self._sender, return_exceptions=True)
        self._call.cancel()
        await self._channel.close(None)

    async def _send_all(self) -> None:
        try:
            while True:
                await self._call.write(await self._outbox.get())
                self._outbox.task_done()
        except grpc.aio.AioRpcError:
            # `commands` tells that the driver is gone.
            return


async def _find_driver(registry_address: str, placement: Placement, timeout_s: float) -> str:
    """host:port of the driver's Ranks service; asks until it is there."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    async with open_channel(registry_address) as channel:
        stub = rpc.RegistryStub(channel)
        while True:
            left_s = end_s - loop.time()
            if left_s <= 0:
                raise UnavailableError(
                    f"{placement.name}: the driver of {placement.instance_id} did not start within {timeout_s:.0f} s"
                )
            wait_s = min(_MEET_S, left_s)
            request = pb.MeetRequest(instance_id=placement.instance_id, start_id=placement.start_id, timeout_s=wait_s)
            try:
                reply = await stub.Meet(request, timeout=wait_s + 1.0, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    continue
                raise UnavailableError(
                    f"{placement.name}: registry {registry_address} cannot say where the driver is: {error.details()}"
                ) from error
            return str(reply.driver_address)
