"""How every process of the cluster keeps itself in the registry: announce, repeat as heartbeat, survive its absence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.channels import open_channel

__all__ = ["Announcer"]

_log = logging.getLogger(__name__)
_RETRY_S = 1.0
_OPTIONS = (
    # A registry that returns is found within a second, however long it was away; gRPC's own pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class Announcer:
    """Sends `make_status()` to the registry, again within a third of the lease it answers with, and at `nudge()`.

    A registry that does not answer is tried again for ever: work goes on without it (its last view serves).

    Args:
        registry_address: host:port.
        make_status: this process's present status; called on the event loop.
        timeout_s: per call.
    """

    def __init__(
        self, registry_address: str, make_status: Callable[[], pb.WorkerStatus], *, timeout_s: float = 5.0
    ) -> None:
        self._address = registry_address
        self._make_status = make_status
        self._timeout_s = timeout_s
        self._nudged = asyncio.Event()

    def nudge(self) -> None:
        """Announces at once (a state has changed). Call it on the event loop."""
        self._nudged.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Announces until `stop` is set; cancel it otherwise."""
        away = False
        async with open_channel(self._address, _OPTIONS) as channel:
            stub = rpc.RegistryStub(channel)
            while not stop.is_set():
                wait_s = _RETRY_S
                self._nudged.clear()
                try:
                    reply = await stub.Announce(self._make_status(), timeout=self._timeout_s)
                    wait_s = max(0.05, reply.lease_s / 3)
                    if away:
                        _log.info("registry %s answers again", self._address)
                    away = False
                except grpc.aio.AioRpcError as error:
                    if not away:
                        _log.warning("registry %s does not answer (%s); trying on", self._address, error.code().name)
                    away = True
                try:
                    await asyncio.wait_for(self._nudged.wait(), wait_s)
                except TimeoutError:
                    continue
