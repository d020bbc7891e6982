"""A router that knows the cluster from its registry and from Redis, with either of them away or telling nonsense."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.redis_process import RedisProcess
from tests.router.fake_worker import FakeDecode, expected
from tests.router.harness import Harness, running_router

from baton.proto.baton.v1 import inference_pb2 as inference
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.state.announce import StateAnnouncer
from baton.state.instances import GROUP, LEASE_S, decode_instance, encode_instance, key_of
from baton.state.redis import RedisState

_PROMPT = [5, 6, 7]


@pytest_asyncio.fixture(name="redis")
async def _redis(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    with RedisProcess(tmp_path / "redis") as server:
        yield server


@pytest_asyncio.fixture(name="state")
async def _state(redis: RedisProcess) -> AsyncIterator[RedisState]:
    state = RedisState(redis.url, cluster="baton", timeout_s=10.0)
    yield state
    await state.close()


async def _names(router: Harness) -> set[str]:
    info = await router.grpc.GetServerInfo(inference.GetServerInfoRequest())
    return {instance.id for instance in info.instances}


async def _until_names(router: Harness, names: set[str]) -> None:
    async with asyncio.timeout(20):
        while await _names(router) != names:
            await asyncio.sleep(0.02)


async def _check_served(router: Harness, worker: str) -> None:
    body = {"model": "tiny", "prompt": _PROMPT, "max_tokens": 5, "return_token_ids": True}
    response = await router.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["token_ids"] == expected(_PROMPT, 5)
    assert response.headers["X-Baton-Decode-Instance"] == worker


class _Announced:
    """A fake decode worker that only Redis knows."""

    def __init__(self, state: RedisState, name: str) -> None:
        self.worker = FakeDecode(name)
        self.announcer = StateAnnouncer(state, self.worker.status)
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.worker.start()
        self._task = asyncio.create_task(self.announcer.run(self._stop))

    async def end(self) -> None:
        self._stop.set()
        self.announcer.nudge()
        assert self._task is not None
        await asyncio.wait_for(self._task, 10)
        await self.worker.stop()


async def test_without_the_registry_redis_serves(tmp_path: Path, redis: RedisProcess, state: RedisState) -> None:
    one, other = _Announced(state, "decode-8"), _Announced(state, "decode-9")
    async with running_router(tmp_path, with_workers=False, state=redis.url) as router:
        await router.registry.stop()
        await one.start()
        await router.until_connected("decode-8")
        await _check_served(router, "decode-8")
        await other.start()
        await router.until_connected("decode-8", "decode-9")
        await one.end()
        # It said that it is gone: nobody waits for its lease.
        await _until_names(router, {"decode-9"})
        await _check_served(router, "decode-9")
        # Without a word, its stream broken: until its lease and what is granted beyond it are over.
        assert other._task is not None
        other._task.cancel()
        await other.worker.stop()
        await _until_names(router, set())


async def test_without_redis_the_registry_serves(tmp_path: Path, redis: RedisProcess) -> None:
    async with running_router(tmp_path, state=redis.url) as router:
        redis.stop()
        newcomer = FakeDecode("decode-5")
        await newcomer.start()
        await router.registry.publish(newcomer, router.prefill)
        await router.until_connected("decode-5")
        await router.decode.stop()
        await router.registry.stop()
        redis.kill()
        await asyncio.sleep(LEASE_S + 1.0)
        # With both away, the last view.
        assert {"decode-5", router.prefill.instance_id} <= await _names(router)
        await _check_served(router, "decode-5")
        await newcomer.stop()


async def test_a_router_announces_itself_until_it_ends(tmp_path: Path, redis: RedisProcess, state: RedisState) -> None:
    async with running_router(tmp_path, state=redis.url) as router:
        key = key_of("router-0")
        async with asyncio.timeout(10):
            while True:
                status = decode_instance(key, await state.get(key) or b"")
                if isinstance(status, pb.WorkerStatus) and status.state == "ready":
                    break
                await asyncio.sleep(0.02)
        assert status.http_url == router.http_url
        redis.ask("FLUSHALL")
        async with asyncio.timeout(20):
            while await state.get(key) is None:
                await asyncio.sleep(0.02)
    last = decode_instance(key, await state.get(key) or b"")
    assert isinstance(last, pb.WorkerStatus)
    assert last.state == "dead"
    assert last.incarnation == status.incarnation


def _strange_values() -> dict[str, bytes]:
    fine = FakeDecode("decode-0").status()
    fine.address = "127.0.0.1:1"

    def with_(**fields: object) -> bytes:
        status = pb.WorkerStatus()
        status.CopyFrom(fine)
        for name, value in fields.items():
            setattr(status, name, value)
        return encode_instance(status)

    return {
        "garbage": os.urandom(200),
        "empty": b"",
        "giant": encode_instance(fine) + bytes(1 << 20),
        "future": encode_instance(fine).replace(b"instance 1", b"instance 2", 1),
        "truncated": encode_instance(fine)[:-3],
        "another": encode_instance(fine),
        "path": with_(instance_id="path", address="../../etc/passwd"),
        "role": with_(instance_id="role", role="boss"),
        "state": with_(instance_id="state", state="immortal"),
        "nobody": with_(instance_id="nobody", incarnation=b""),
        "\U0001f600 \n": b"{}",
    }


@pytest.mark.parametrize("name", _strange_values())
def test_what_is_no_instance_is_told_from_one(name: str) -> None:
    why = decode_instance(GROUP + name, _strange_values()[name])
    assert isinstance(why, str)
    assert why
    assert len(why) < 300


async def test_strange_entries_are_ignored_with_one_warning_each(
    tmp_path: Path, redis: RedisProcess, state: RedisState, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_router(tmp_path, state=redis.url) as router:
        before = await _names(router)
        strange = _strange_values()
        with caplog.at_level(logging.WARNING):
            for name, value in strange.items():
                await state.put(GROUP + name, value, ttl_s=60)
            newcomer = _Announced(state, "decode-7")
            await newcomer.start()
            await router.until_connected("decode-7")
            await asyncio.sleep(2.5)  # it is read every second
            await _until_names(router, {*before, "decode-7"})
        warnings = [record.getMessage() for record in caplog.records if "in the shared state is ignored" in record.msg]
        assert len(warnings) == len(strange)
        assert any("version 2" in text for text in warnings)
        await newcomer.end()
