"""A registry that dies and comes back at its address: what it tells meanwhile, and who is known again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from itertools import pairwise

import grpc
import pytest

from baton.cluster.launchers.free_port import choose_port
from baton.cluster.registry import LEASE_S, RegistryServer
from baton.errors import UnavailableError
from baton.proto.announce import Announcer
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc

pytestmark = pytest.mark.timeout(60)

DEADLINE_S = 20.0
HOST = "127.0.0.1"


class SetClock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def now_s(self) -> float:
        """What it was set to."""
        return self.time_s


def status_of(instance_id: str) -> worker_pb2.WorkerStatus:
    return worker_pb2.WorkerStatus(
        instance_id=instance_id, role="decode", state="ready", incarnation=instance_id.encode(), address="127.0.0.1:1"
    )


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.02)
    assert condition(), what


async def test_everybody_is_known_again_and_the_list_is_partial_until_then() -> None:
    port = choose_port(HOST)
    first = RegistryServer("c", "ray")
    address = await first.start(HOST, port)
    stop = asyncio.Event()
    names = [f"decode-{index}" for index in range(3)]
    announcers = [
        asyncio.create_task(Announcer(address, lambda name=name: status_of(name)).run(stop))  # type: ignore[misc]
        for name in names
    ]
    try:
        await until(lambda: len(first.statuses()) == 3, "all to be known")
        await first.close()
        # Long enough for a connection to be tried in vain.
        await asyncio.sleep(1.0)
        second = RegistryServer("c", "ray")
        assert await second.start(HOST, port) == address
        try:
            seen: list[worker_pb2.InstanceList] = []
            async with grpc.aio.insecure_channel(address) as channel:
                watch = worker_pb2_grpc.RegistryStub(channel).Watch(worker_pb2.WatchRequest(watcher_id="test"))
                async with asyncio.timeout(DEADLINE_S):
                    async for instances in watch:
                        seen.append(instances)
                        if not instances.is_partial:
                            break
            assert seen[0].is_partial
            assert all(instances.incarnation == second.incarnation != first.incarnation for instances in seen)
            assert all(one.version < other.version for one, other in pairwise(seen))
            await until(lambda: sorted(second.statuses()) == names, "all to be known again")
        finally:
            await second.close()
    finally:
        for task in announcers:
            task.cancel()


async def test_a_list_is_whole_after_one_lease() -> None:
    clock = SetClock()
    registry = RegistryServer("c", "ray", clock=clock)
    await registry.start(HOST)
    try:
        assert registry.instance_list().is_partial
        # In steps, since a registry that finds itself far behind is partial again.
        for _ in range(4):
            clock.time_s += LEASE_S / 4
            await asyncio.sleep(0.3)
        await until(lambda: not registry.instance_list().is_partial, "the lease to be over")
    finally:
        await registry.close()


async def test_a_registry_that_was_stopped_holds_nobody_for_gone(caplog: pytest.LogCaptureFixture) -> None:
    clock = SetClock()
    registry = RegistryServer("c", "ray", clock=clock)
    address = await registry.start(HOST)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            await worker_pb2_grpc.RegistryStub(channel).Announce(status_of("decode-0"), timeout=DEADLINE_S)
        version = registry.instance_list().version
        clock.time_s += 60.0
        await until(lambda: "was stopped for" in caplog.text, "the registry to notice")
        assert list(registry.statuses()) == ["decode-0"]
        assert registry.instance_list().is_partial
        assert registry.instance_list().version > version
    finally:
        await registry.close()


async def test_an_address_that_is_taken_is_told_and_may_be_tried_again() -> None:
    with socket.socket() as stranger:
        stranger.bind((HOST, 0))
        stranger.listen(1)
        port = stranger.getsockname()[1]
        registry = RegistryServer("c", "ray")
        with pytest.raises(UnavailableError, match=rf"cannot listen on {HOST}:{port}: Address already in use"):
            await registry.start(HOST, port)
    assert await registry.start(HOST, port) == f"{HOST}:{port}"
    await registry.close()


async def test_who_is_expected_and_silent_is_known_and_may_be_held() -> None:
    clock = SetClock()
    notes: list[tuple[set[str], bool]] = []
    registry = RegistryServer(
        "c",
        "ray",
        clock=clock,
        note=lambda: notes.append((set(registry.held), registry.stop_requested.is_set())),
    )
    address = await registry.start(HOST)
    try:
        registry.expect(["decode-0", "decode-1"])
        registry.desired = ["decode-0", "decode-1"]
        clock.time_s += 0.5
        assert registry.silent_for() == {"decode-0": 0.5, "decode-1": 0.5}
        async with grpc.aio.insecure_channel(address) as channel:
            stub = worker_pb2_grpc.RegistryStub(channel)
            await stub.Announce(status_of("decode-0"), timeout=DEADLINE_S)
            assert registry.silent_for() == {"decode-1": 0.5}
            held = await stub.Hold(worker_pb2.HoldRequest(instance_id="decode-1", held=True), timeout=DEADLINE_S)
            assert list(held.held) == ["decode-1"]
            await stub.StopCluster(worker_pb2.StopClusterRequest(), timeout=DEADLINE_S)
        assert notes == [({"decode-1"}, False), ({"decode-1"}, True)]
    finally:
        await registry.close()


def test_a_chosen_port_is_not_one_that_connections_take() -> None:
    for _ in range(20):
        port = choose_port(HOST)
        with socket.socket() as probe:
            probe.bind((HOST, port))
        with socket.create_server((HOST, 0)) as server, socket.create_connection(server.getsockname()) as connection:
            assert connection.getsockname()[1] != port
