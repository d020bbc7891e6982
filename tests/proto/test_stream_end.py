"""Ended calls let go of their connections by themselves: Python's cycle collector is off in here.

What is looked at is the number of this process's descriptors. Each call has a channel, and so a connection, of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import grpc
import pytest
from tests.descriptors import descriptors

from baton import faults
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.channels import open_channel
from baton.proto.stream_end import Requests, end_stream

CALLS = 12
FEW = 4
TIMEOUT_S = 10.0
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


class Worker(rpc.DecodeServicer, rpc.WorkerServicer, rpc.RegistryServicer):
    """Answers the first command of a stream, then does as the command says."""

    async def Stream(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.DecodeEvent]:
        async for command in request_iterator:
            yield pb.DecodeEvent(seq=1)
            if command.cancel.request_id == "end":
                return
            if command.cancel.request_id == "fail":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "as asked for")

    async def GetStatus(self, request: Any, context: Any) -> pb.WorkerStatus:
        return pb.WorkerStatus(instance_id="decode-0")

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.InstanceList]:
        yield pb.InstanceList(version=1)
        await asyncio.Event().wait()


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    worker = Worker()
    for add in (rpc.add_DecodeServicer_to_server, rpc.add_WorkerServicer_to_server, rpc.add_RegistryServicer_to_server):
        add(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture(params=["plain", "faulty"])
def faulty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(faults, "is_possible", request.param == "faulty")
    yield request.param == "faulty"
    faults.replace(())


async def stream(channel: grpc.aio.Channel, name: str) -> None:
    """One stream that ends as `name` says."""
    requests: Requests[pb.DecodeCommand] = Requests()
    call: Any = rpc.DecodeStub(channel).Stream(requests)
    answers = aiter(call)
    try:
        requests.put(pb.DecodeCommand(cancel=pb.Cancel(request_id=name)))
        async with asyncio.timeout(TIMEOUT_S):
            await anext(answers)
            if name == "await":
                waiting = asyncio.ensure_future(anext(answers))
                await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            elif name != "leave":
                requests.put(pb.DecodeCommand())
                await anext(answers, None)
    finally:
        await end_stream(call, answers, requests)


async def watch(channel: grpc.aio.Channel, name: str) -> None:
    """One answer of a stream that goes on."""
    call: Any = rpc.RegistryStub(channel).Watch(pb.WatchRequest(watcher_id=name))
    answers = aiter(call)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await anext(answers)
    finally:
        await end_stream(call, answers)


async def ask(channel: grpc.aio.Channel, name: str) -> None:
    """A call of one message each way."""
    await rpc.WorkerStub(channel).GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)


async def lets_go(address: str, one: Callable[[grpc.aio.Channel, str], Coroutine[Any, Any, None]], name: str) -> None:
    """Fails where the connections of calls stay."""

    async def run() -> None:
        async with open_channel(address, OWN_CONNECTION) as channel:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await one(channel, name)

    await run()
    before = descriptors()
    for _ in range(CALLS):
        await run()
    async with asyncio.timeout(TIMEOUT_S):
        while descriptors() > before + FEW:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("name", ["leave", "await", "end", "fail"])
async def test_a_stream_that_has_ended(no_collector: None, address: str, faulty: bool, name: str) -> None:
    await lets_go(address, stream, name)


@pytest.mark.parametrize("one", [watch, ask])
async def test_calls_of_one_request(no_collector: None, address: str, faulty: bool, one: Any) -> None:
    await lets_go(address, one, "")


@pytest.mark.parametrize("rule", ["any rpc.send fail", "any rpc.receive fail", "any rpc.receive after=1 fail"])
@pytest.mark.parametrize("one", [stream, watch, ask])
async def test_calls_that_a_fault_breaks(
    no_collector: None, address: str, monkeypatch: pytest.MonkeyPatch, rule: str, one: Any
) -> None:
    monkeypatch.setattr(faults, "is_possible", True)
    faults.replace((rule,))
    try:
        await lets_go(address, one, "goes on")
    finally:
        faults.replace(())
