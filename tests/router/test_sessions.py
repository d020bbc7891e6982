"""Where sessions were served: in one router, in several, without the state, and within bounds."""

from __future__ import annotations

import asyncio

import pytest
from tests.router.fake_worker import FakeDecode
from tests.router.harness import Harness

from baton.clock import FakeClock
from baton.errors import UnavailableError
from baton.proto.baton.v1 import inference_pb2 as pb
from baton.router.salt import salt_of
from baton.router.sessions import Sessions
from baton.state.memory import MemoryState

PAIR = {"decode": "decode-1", "prefill": "prefill-0"}


class _Away(MemoryState):
    """A state that is gone, or never answers."""

    def __init__(self, *, hangs: bool) -> None:
        super().__init__()
        self.hangs = hangs

    async def get(self, key: str) -> bytes | None:
        if self.hangs:
            await asyncio.Event().wait()
        raise UnavailableError("the state is away")

    async def put(self, key: str, value: bytes, *, ttl_s: float) -> None:
        await self.get(key)


async def test_a_session_is_remembered_until_its_time_is_over() -> None:
    clock = FakeClock()
    sessions = Sessions(ttl_s=10, clock=clock)
    assert await sessions.find("", "a") == {}
    sessions.remember("", "a", PAIR)
    sessions.remember("", "a", {"decode": "decode-2", "prefill": ""})
    assert await sessions.find("", "a") == {"decode": "decode-2", "prefill": "prefill-0"}
    assert await sessions.find("other tenant", "a") == {}
    clock.advance(11)
    assert await sessions.find("", "a") == {}


async def test_routers_share_sessions() -> None:
    state = MemoryState()
    here, there = Sessions(state), Sessions(state)
    here.remember("t", "a", PAIR)
    async with asyncio.timeout(5):
        while await there.find("t", "a") != PAIR:
            await asyncio.sleep(0)
    assert len(there) == 1
    await here.close()
    await there.close()


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_lost_state_costs_only_what_others_know(hangs: bool) -> None:
    sessions = Sessions(_Away(hangs=hangs))
    async with asyncio.timeout(5):
        assert await sessions.find("", "a") == {}
        sessions.remember("", "a", PAIR)
        assert await sessions.find("", "a") == PAIR
        await sessions.close()


async def test_what_others_wrote_is_checked() -> None:
    state = MemoryState()
    await Sessions(state).close()
    sessions = Sessions(state)
    sessions.remember("", "a", PAIR)
    async with asyncio.timeout(5):
        while not (written := await state.scan("sessions/")):
            await asyncio.sleep(0)
    (key,) = written
    for value in (b"", b"[]", b"{", b'{"decode": 3}', b'{"decode": "%s"}' % (b"x" * 300), b"x" * 100_000):
        await state.put(key, value, ttl_s=10)
        assert await Sessions(state).find("", "a") == {}


async def test_no_more_than_so_many_are_kept() -> None:
    sessions = Sessions(max_sessions=3)
    for number in range(10):
        sessions.remember("", str(number), PAIR)
    assert len(sessions) == 3
    assert await sessions.find("", "9") == PAIR
    assert await sessions.find("", "0") == {}


def test_salts_of_tenants_never_meet() -> None:
    pairs = [("", ""), ("", "a"), ("a", ""), ("a", "b"), ("ab", ""), ("", salt_of("a", "")), ("", salt_of("a", "b"))]
    assert len({salt_of(tenant, salt) for tenant, salt in pairs}) == len(pairs)
    assert (salt_of("", ""), salt_of("", "s")) == ("", "s")


async def test_a_session_stays_with_its_worker_by_header_body_and_grpc(router: Harness) -> None:
    other = FakeDecode("decode-1")
    await other.start()
    try:
        await router.registry.publish(router.decode, other)
        await router.until_connected("decode-0", "decode-1")
        served = []
        # No two prompts begin alike: without a session the workers would take turns.
        for number in range(3):
            body = {"prompt": [20 + number] * 100, "max_tokens": 1}
            header = {} if number else {"X-Session-ID": "one"}
            answer = await router.post(
                "/v1/completions", {**body, "session_id": "one"} if number else body, headers=header
            )
            served.append(answer.headers["X-Baton-Decode-Instance"])
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[30] * 100), options=pb.GenerationOptions(max_tokens=1, session_id="one")
        )
        served += [answer.decode_instance async for answer in router.grpc.Generate(request)]
        assert len(served) == 4
        assert len(set(served)) == 1
        strangers = [
            (await router.post("/v1/completions", {"prompt": [40 + number] * 100, "max_tokens": 1})).headers[
                "X-Baton-Decode-Instance"
            ]
            for number in range(2)
        ]
        assert set(strangers) == {"decode-0", "decode-1"} - set(served)
    finally:
        await other.stop()


@pytest.mark.parametrize("where", ["header", "body"])
async def test_the_name_of_a_session_is_bounded(router: Harness, where: str) -> None:
    body, name = {"prompt": [20], "max_tokens": 1}, "s" * 257
    headers = {"X-Session-ID": name} if where == "header" else {}
    refused = await router.post("/v1/completions", body if headers else {**body, "session_id": name}, headers=headers)
    assert refused.status_code == 400
    assert "256" in refused.json()["error"]["message"]
