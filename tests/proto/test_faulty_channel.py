"""What happens to messages on a faulty channel: each action, each direction, unary calls and streams, real gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton import faults
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.channels import open_channel

TIMEOUT_S = 10.0
HELD_S = 0.15


class Echo(rpc.DecodeServicer):
    """Answers each cancel with a step that names its request; remembers what came."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.ended = asyncio.Event()

    async def Stream(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.DecodeEvent]:
        try:
            async for command in request_iterator:
                name = command.cancel.request_id
                self.came.append(name)
                yield pb.DecodeEvent(step=pb.StepOutputs(outputs=[pb.RequestOutput(request_id=name)]))
        finally:
            self.ended.set()


class Worker(rpc.WorkerServicer):
    """Counts what it was asked."""

    asked = 0

    async def GetStatus(self, request: Any, context: Any) -> pb.WorkerStatus:
        self.asked += 1
        return pb.WorkerStatus(instance_id="decode-0")


class Registry(rpc.RegistryServicer):
    """Sends three lists."""

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.InstanceList]:
        for version in (1, 2, 3):
            yield pb.InstanceList(version=version, cluster_name=request.watcher_id)


class Peer:
    """A server, and a channel to it that may have faults."""

    def __init__(self, channel: grpc.aio.Channel, echo: Echo, worker: Worker) -> None:
        self.channel, self.echo, self.worker = channel, echo, worker

    async def status(self, timeout_s: float | None = TIMEOUT_S) -> pb.WorkerStatus:
        reply: pb.WorkerStatus = await rpc.WorkerStub(self.channel).GetStatus(pb.GetStatusRequest(), timeout=timeout_s)
        return reply

    async def watch(self) -> list[int]:
        call = rpc.RegistryStub(self.channel).Watch(pb.WatchRequest(watcher_id="me"))
        return [instances.version async for instances in call]

    def stream(self, requests: Any = None) -> Any:
        return rpc.DecodeStub(self.channel).Stream(requests)

    async def echoes(self, names: list[str], *, expected: int) -> list[str]:
        """Sends `names` by write, and reads as many answers as are expected."""
        call = self.stream()
        for name in names:
            await call.write(command(name))
        answers = [await call.read() for _ in range(expected)]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        return [name_of(answer) for answer in answers]


Connect = Callable[..., Any]


def command(name: str) -> pb.DecodeCommand:
    return pb.DecodeCommand(cancel=pb.Cancel(request_id=name))


def name_of(event: pb.DecodeEvent) -> str:
    return event.step.outputs[0].request_id


@asynccontextmanager
async def peer(*rules: str, runtime: bool = True, options: Sequence[tuple[str, int]] = ()) -> AsyncIterator[Peer]:
    """Rules hold from before the channel is opened."""
    faults.install(rules, instance_id="router-0", role="router", allow_at_runtime=runtime)
    server, echo, worker = grpc.aio.server(), Echo(), Worker()
    rpc.add_DecodeServicer_to_server(echo, server)
    rpc.add_WorkerServicer_to_server(worker, server)
    rpc.add_RegistryServicer_to_server(Registry(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    faults.learn_peer(address, "decode-0")
    try:
        async with asyncio.timeout(3 * TIMEOUT_S), open_channel(address, options) as channel:
            yield Peer(channel, echo, worker)
    finally:
        await server.stop(None)
        faults.install([], instance_id="", role="")


async def names(count: int) -> AsyncIterator[pb.DecodeCommand]:
    for index in range(count):
        yield command(f"r{index}")


async def test_without_rules_everything_passes() -> None:
    async with peer() as there:
        assert (await there.status()).instance_id == "decode-0"
        assert await there.watch() == [1, 2, 3]
        assert await there.echoes(["a", "b"], expected=2) == ["a", "b"]
        assert [name_of(event) async for event in there.stream(names(3))] == ["r0", "r1", "r2"]
        assert [name_of(event) async for event in there.stream([command("x")])] == ["x"]
        assert there.channel.get_state() is grpc.ChannelConnectivity.READY


async def test_where_no_faults_can_be_the_channel_is_grpcs_own() -> None:
    async with peer(runtime=False) as there:
        assert type(there.channel) is type(grpc.aio.insecure_channel("127.0.0.1:1"))
        assert await there.watch() == [1, 2, 3]


async def test_rules_that_come_later_hold_on_a_channel_that_is_open() -> None:
    async with peer() as there:
        assert await there.echoes(["a"], expected=1) == ["a"]
        faults.replace(["router rpc.send method=Decode.Stream nth=1 drop"])
        assert await there.echoes(["b", "c"], expected=1) == ["c"]
        assert [count for _, count in faults.replace([])] == [1]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("rpc.send nth=2 drop", ["a", "c"]),
        ("rpc.receive nth=2 drop", ["a", "c"]),
        ("rpc.send nth=2 duplicate", ["a", "b", "b", "c"]),
        ("rpc.receive nth=2 duplicate", ["a", "b", "b", "c"]),
        ("rpc.send nth=2 delay for=0.15", ["a", "b", "c"]),
        ("rpc.receive nth=2 hang for=0.15", ["a", "b", "c"]),
        ("rpc.send method=Decode.* peer=decode-0 nth=1 drop", ["b", "c"]),
        ("rpc.send peer=decode nth=1 drop", ["b", "c"]),
        ("rpc.send peer=decode-1 drop", ["a", "b", "c"]),
        ("rpc.send method=Prefill.Prefill drop", ["a", "b", "c"]),
    ],
)
async def test_messages_of_a_stream(rule: str, expected: list[str]) -> None:
    async with peer(f"router {rule}") as there:
        began_s = time.monotonic()
        assert await there.echoes(["a", "b", "c"], expected=len(expected)) == expected
        if "0.15" in rule:
            assert time.monotonic() - began_s >= HELD_S


async def test_slow_takes_its_time_by_size() -> None:
    # A command of 206 bytes or so at 1000 a second.
    async with peer("router rpc.send slow rate=1000") as there:
        began_s = time.monotonic()
        await there.echoes(["x" * 200], expected=1)
        assert time.monotonic() - began_s >= 0.2


@pytest.mark.parametrize("direction", ["send", "receive"])
async def test_fail_breaks_a_stream_for_both_sides(direction: str) -> None:
    async with peer(f"router rpc.{direction} nth=2 fail") as there:
        call = there.stream(names(5))
        with pytest.raises(grpc.aio.AioRpcError, match=f"fault router rpc.{direction} nth=2 fail") as caught:
            _ = [event async for event in call]
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert call.done()
        assert not call.cancelled()
        await asyncio.wait_for(there.echo.ended.wait(), TIMEOUT_S)
        assert await there.echoes(["again"], expected=1) == ["again"]


async def test_a_writer_learns_that_the_call_is_broken() -> None:
    async with peer("router rpc.send nth=2 fail") as there:
        call = there.stream()
        await call.write(command("a"))
        reading = asyncio.create_task(_read_all(call))
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await call.write(command("b"))
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await reading
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await call.write(command("c"))


async def _read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_refuse_counts_calls() -> None:
    async with peer("router rpc.send nth=2 refuse", "router rpc.send method=Worker.* nth=1 refuse") as there:
        assert await there.echoes(["a", "b", "c"], expected=3) == ["a", "b", "c"]
        call = there.stream(names(1))
        with pytest.raises(grpc.aio.AioRpcError, match="refuse"):
            await call.read()
        assert await there.echoes(["a"], expected=1) == ["a"]
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await there.status()
        assert (await there.status()).instance_id == "decode-0"
        assert there.worker.asked == 1


async def test_a_black_hole_keeps_the_call_open_in_the_other_direction() -> None:
    async with peer("router rpc.send after=1 blackhole") as there:
        call = there.stream()
        for name in ("a", "b", "c"):
            await call.write(command(name))
        assert name_of(await call.read()) == "a"
        reading = asyncio.create_task(call.read())
        await asyncio.sleep(HELD_S)
        assert not reading.done()
        assert there.echo.came == ["a"]
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.wait_for(there.echo.ended.wait(), TIMEOUT_S)


@pytest.mark.parametrize("rule", ["rpc.send nth=2 blackhole", "rpc.receive nth=2 blackhole"])
async def test_keepalive_notices_a_black_hole_where_the_channel_has_it(rule: str) -> None:
    options = [("grpc.keepalive_time_ms", 100), ("grpc.keepalive_timeout_ms", 50)]
    async with peer(f"router {rule}", options=options) as there:
        began_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError, match="keepalive") as caught:
            _ = [event async for event in there.stream(names(5))]
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began_s >= HELD_S
        faults.replace([f"router {rule.replace('nth=2', 'nth=1')}"])
        with pytest.raises(grpc.aio.AioRpcError, match="keepalive"):
            await there.status()


@pytest.mark.parametrize("rule", ["rpc.receive nth=1 hang", "rpc.receive blackhole", "rpc.send nth=1 hang"])
@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_whatever_is_held_up_ends_with_the_call(rule: str, how: str) -> None:
    async with peer(f"router {rule}") as there:
        call = there.stream(names(2))
        reading = asyncio.create_task(_read_all(call))
        await asyncio.sleep(HELD_S)
        assert not reading.done()
        if how == "cancel":
            call.cancel()
        else:
            await there.channel.close(None)
        done, _ = await asyncio.wait([reading], timeout=TIMEOUT_S)
        assert done
        assert reading.cancelled()
        assert call.cancelled()


async def test_a_reader_that_is_cancelled_is_not_told_of_a_failure() -> None:
    async with peer("router rpc.receive hang") as there:
        reading = asyncio.create_task(_read_all(there.stream(names(1))))
        await asyncio.sleep(HELD_S)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


@pytest.mark.parametrize(
    "rule",
    [
        "rpc.send nth=1 drop",
        "rpc.receive nth=1 drop",
        "rpc.send nth=1 hang",
        "rpc.receive nth=1 blackhole",
        "rpc.send nth=1 slow rate=1",
    ],
)
async def test_a_unary_call_that_is_held_up_or_lost_ends_at_its_deadline(rule: str) -> None:
    async with peer(f"router {rule}") as there:
        request = pb.MeetRequest(instance_id="x" * 50)
        stub = rpc.WorkerStub(there.channel)
        with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
            await stub.GetStatus(request if "slow" in rule else pb.GetStatusRequest(), timeout=HELD_S)
        assert there.worker.asked == ("receive" in rule)
        assert (await there.status()).instance_id == "decode-0"


async def test_unary_calls_come_late_twice_or_fail() -> None:
    async with peer("router rpc.send method=Worker.* nth=1 duplicate", "router rpc.receive nth=2 fail") as there:
        assert (await there.status()).instance_id == "decode-0"
        while there.worker.asked < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await there.status()
        faults.replace(["router rpc.receive nth=1 delay for=0.15"])
        began_s = time.monotonic()
        await there.status()
        assert time.monotonic() - began_s >= HELD_S


@pytest.mark.parametrize("how", ["cancel", "close", "cancel the waiter"])
async def test_a_unary_call_that_hangs_can_be_cancelled(how: str) -> None:
    async with peer("router rpc.receive hang") as there:
        call = rpc.WorkerStub(there.channel).GetStatus(pb.GetStatusRequest())

        async def wait() -> None:
            await call

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(HELD_S)
        if how == "cancel":
            call.cancel()
        elif how == "close":
            await there.channel.close(None)
        else:
            waiting.cancel()
        done, _ = await asyncio.wait([waiting], timeout=TIMEOUT_S)
        assert done
        assert waiting.cancelled()


async def test_a_watch_loses_and_repeats_lists() -> None:
    async with peer("router rpc.receive nth=2 drop", "router rpc.receive nth=3 duplicate") as there:
        assert await there.watch() == [1, 3, 3]
    async with peer("router rpc.receive method=Registry.Watch nth=2 fail") as there:
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await there.watch()
    async with peer("router rpc.send method=Registry.Watch nth=1 drop") as there:
        watching = asyncio.create_task(there.watch())
        await asyncio.sleep(HELD_S)
        assert not watching.done()
        watching.cancel()


@pytest.mark.parametrize("seed", range(8))
async def test_damage_is_another_field_or_the_end_of_the_call(seed: int) -> None:
    """A flipped bit arrives as another text, or as nothing that can be read: never as what was sent."""
    async with peer(f"router rpc.receive nth=1 flip seed={seed}") as there:
        sent = pb.DecodeEvent(step=pb.StepOutputs(outputs=[pb.RequestOutput(request_id="a" * 20)]))
        call = there.stream(iter([command("a" * 20)]))
        came, error = (await asyncio.gather(call.read(), return_exceptions=True))[0], None
        if isinstance(came, grpc.aio.AioRpcError):
            came, error = None, came
        assert came != sent
        assert error is None or (error.code(), "cannot be read" in error.details()) == (grpc.StatusCode.INTERNAL, True)


async def test_a_message_cut_in_half_ends_the_call_at_the_other_side() -> None:
    async with peer("router rpc.send nth=1 truncate") as there:
        call = there.stream(names(1))
        with pytest.raises(grpc.aio.AioRpcError):
            await _read_all(call)
        assert there.echo.came == []


async def test_what_is_open_when_the_fault_comes_off_goes_on() -> None:
    async with peer("router rpc.receive nth=2 hang for=0.15") as there:
        call = there.stream()
        await call.write(command("a"))
        await call.write(command("b"))
        assert name_of(await call.read()) == "a"
        faults.replace([])
        assert name_of(await call.read()) == "b"
        call.cancel()
