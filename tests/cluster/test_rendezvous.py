"""How ranks of one start find their driver: the table alone, and through the registry's Meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.registry import RegistryServer
from baton.cluster.rendezvous import Rendezvous
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc


def test_a_start_meets_at_its_drivers_address_and_a_new_start_ends_it() -> None:
    table = Rendezvous()
    assert table.enter("decode-0", "a") == ""
    assert table.address("decode-0", "a") == ""
    table.tell("decode-0", "a", "127.0.0.1:1")
    assert table.address("decode-0", "a") == "127.0.0.1:1"
    assert table.enter("decode-0", "b") == ""
    assert (table.address("decode-0", "a"), table.address("decode-0", "b")) == (None, "")
    assert "start a of decode-0 is over" in table.enter("decode-0", "a")
    table.forget("decode-0")
    assert "over" in table.enter("decode-0", "b")


def test_the_number_of_instances_is_limited() -> None:
    table = Rendezvous()
    refused = [table.enter(f"decode-{index}", "a") for index in range(5000)]
    assert refused.index("4096 instances are known already; decode-4096 is one too many") == 4096
    table.forget("decode-7")
    assert table.enter("decode-4999", "a") == ""


@given(st.lists(st.tuples(st.sampled_from("xy"), st.sampled_from("abcd"), st.booleans()), max_size=40))
def test_no_rank_ever_gets_the_address_of_another_start(calls: list[tuple[str, str, bool]]) -> None:
    table = Rendezvous()
    for instance_id, start_id, tells in calls:
        if table.enter(instance_id, start_id):
            assert table.address(instance_id, start_id) is None
            continue
        if tells:
            table.tell(instance_id, start_id, f"{instance_id}{start_id}:1")
        assert table.address(instance_id, start_id) in ("", f"{instance_id}{start_id}:1")


@asynccontextmanager
async def registry() -> AsyncIterator[tuple[RegistryServer, rpc.RegistryStub]]:
    server = RegistryServer("one", "local")
    address = await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield server, rpc.RegistryStub(channel)
    finally:
        await server.close()


def request(start_id: str = "a", *, driver_address: str = "", timeout_s: float = 60.0) -> pb.MeetRequest:
    return pb.MeetRequest(instance_id="decode-0", start_id=start_id, driver_address=driver_address, timeout_s=timeout_s)


async def code_of(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), str(caught.value.details())


async def test_ranks_wait_for_their_driver_whoever_comes_first() -> None:
    async with registry() as (_, stub):
        early = [asyncio.ensure_future(stub.Meet(request())) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert not any(call.done() for call in early)
        told = await stub.Meet(request(driver_address="10.0.0.1:7000", timeout_s=0))
        late = await stub.Meet(request(timeout_s=0))
        assert {reply.driver_address for reply in [told, late, *await asyncio.gather(*early)]} == {"10.0.0.1:7000"}


async def test_a_wait_ends_at_its_deadline_and_names_the_instance() -> None:
    async with registry() as (_, stub):
        code, text = await code_of(stub.Meet(request(timeout_s=0.1)))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "driver of decode-0 (start a)" in text


async def test_a_new_start_ends_the_waits_of_the_old_one() -> None:
    async with registry() as (_, stub):
        old = asyncio.ensure_future(stub.Meet(request("a")))
        await asyncio.sleep(0.1)
        await stub.Meet(request("b", driver_address="10.0.0.1:7000"))
        code, text = await code_of(old)
        assert (code, "start a of decode-0 is over" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        code, _ = await code_of(stub.Meet(request("a", driver_address="10.0.0.1:7001")))
        assert code == grpc.StatusCode.FAILED_PRECONDITION


async def test_the_end_of_the_registry_ends_every_wait() -> None:
    async with registry() as (server, stub):
        waiting = asyncio.ensure_future(stub.Meet(request()))
        await asyncio.sleep(0.1)
        await server.close()
        code, _ = await code_of(waiting)
        assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (pb.MeetRequest(start_id="a"), "instance_id"),
        (pb.MeetRequest(instance_id="x" * 300, start_id="a"), "instance_id"),
        (pb.MeetRequest(instance_id="decode-0"), "start_id"),
        (request(driver_address="nowhere"), "driver_address"),
        (request(driver_address="x" * 1000 + ":1"), "driver_address"),
        (request(timeout_s=-1), "timeout_s"),
        (request(timeout_s=float("nan")), "timeout_s"),
    ],
)
async def test_a_wrong_request_is_refused(wrong: pb.MeetRequest, word: str) -> None:
    async with registry() as (_, stub):
        code, text = await code_of(stub.Meet(wrong))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert word in text
