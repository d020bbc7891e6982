"""The stream to a decode worker ends when it is told to, whatever state it is in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.router.instances import Instance
from baton.router.links import DecodeLink

_INCARNATION = b"i" * 16


class _FallsSilent(rpc.DecodeServicer):
    """Welcomes the first stream and says no more; says nothing at all on the later ones."""

    def __init__(self) -> None:
        self.num_streams = 0
        self.second = asyncio.Event()

    async def Stream(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.DecodeEvent]:
        """See the class."""
        self.num_streams += 1
        if self.num_streams == 1:
            yield pb.DecodeEvent(welcome=pb.Welcome(instance_id="decode-0", incarnation=_INCARNATION))
        else:
            self.second.set()
        async for _ in request_iterator:
            pass


async def test_a_link_that_fell_silent_and_connects_again_can_be_closed() -> None:
    server = grpc.aio.server()
    worker = _FallsSilent()
    rpc.add_DecodeServicer_to_server(worker, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    status = pb.WorkerStatus(instance_id="decode-0", role="decode", incarnation=_INCARNATION, address=address)
    link = DecodeLink(Instance(status=status), router_id="r", silence_s=0.2, on_change=lambda: None)
    try:
        link.start()
        async with asyncio.timeout(10):
            await worker.second.wait()
        async with asyncio.timeout(20):
            await link.close()
    finally:
        await server.stop(0)
