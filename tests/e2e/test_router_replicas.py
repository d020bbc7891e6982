"""Two routers on one port, and a Redis that they share: what each of these takes along when it dies, and what not."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_process import Cluster
from tests.redis_process import RedisProcess

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

_PROMPT = "def mean(values):\n    total = 0\n" * 4
_CLIENTS = 4
_BODY = {"model": "tiny", "prompt": _PROMPT, "max_tokens": 48, "ignore_eos": True, "temperature": 0}
_INSTANCES = ("decode-0", "decode-1", "prefill-0", "router-0", "router-1")
# What a client sees of a router that was killed.
_BROKEN = (httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError)


@pytest.fixture(scope="module", name="redis")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


@pytest.fixture(scope="module", name="cluster")
def _cluster(redis: RedisProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings: dict[str, Any] = {"kv.memory": "32MiB", "decode.replicas": 2, "router.replicas": 2, "stop_grace_s": 5}
    # The model is small: without this whole answers would lie in a socket's buffer before a test has looked at one.
    settings["faults.rules"] = "[decode step delay for=0.005]"
    with Cluster(tmp_path_factory.mktemp("replicas"), state=redis.url, **settings) as cluster:
        yield cluster


def _wait_until_whole(cluster: Cluster) -> dict[str, dict[str, Any]]:
    until_s = time.monotonic() + 60
    while True:
        status = cluster.status()
        if set(status) == set(_INSTANCES) and all(each["state"] == "ready" for each in status.values()):
            return status
        assert time.monotonic() < until_s, cluster.log()
        time.sleep(0.2)


def _owner(pids: dict[int, str], server_port: int, client_port: int) -> str:
    """Which router has accepted the connection between these ports."""
    end = f":{server_port:04X} 0100007F:{client_port:04X} "
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines() if end in line]
    for pid, name in pids.items():
        try:
            links = list(Path(f"/proc/{pid}/fd").iterdir())
        except FileNotFoundError:
            continue  # it has just been killed
        for link in links:
            try:
                if any(str(link.readlink()) == f"socket:[{line[9]}]" for line in lines):
                    return name
            except FileNotFoundError:
                continue
    return ""


def _has_process(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


class _KeyInUseError(Exception):
    """The router says that the request with this key is in work."""


async def _stream(
    cluster: Cluster,
    body: dict[str, Any],
    on_begin: Callable[[int, str], object] | None = None,
    headers: dict[str, str] | None = None,
) -> Any:
    """Token ids of one streamed completion on a connection of its own.

    `on_begin` is told the connection's port and the decode worker when the third token has come.
    """
    ids: list[int] = []
    request = {**body, "stream": True, "return_token_ids": True}
    async with (
        httpx.AsyncClient(timeout=60, trust_env=False, verify=False) as client,
        client.stream("POST", f"{cluster.url}/v1/completions", json=request, headers=headers) as response,
    ):
        if response.status_code == 409:
            raise _KeyInUseError(await response.aread())
        assert response.status_code == 200, await response.aread()
        port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                ids += [token_id for choice in chunk["choices"] for token_id in choice["token_ids"]]
                if on_begin is not None and len(ids) >= 3:
                    on_begin(port, response.headers.get("X-Baton-Decode-Instance", ""))
                    on_begin = None
    return ids


async def _stream_once_free(cluster: Cluster, body: dict[str, Any], headers: dict[str, str], killed_pid: int) -> Any:
    """As `_stream`, again and again while the claim of a router that died still holds the key.

    While the kernel takes that router apart its socket still listens, and whoever it gets is cut off once more.
    """
    async with asyncio.timeout(60):
        while True:
            may_listen = _has_process(killed_pid)
            try:
                return await _stream(cluster, body, headers=headers)
            except _KeyInUseError:
                await asyncio.sleep(0.2)
            except _BROKEN:
                if not may_listen:
                    raise


async def _under_load(cluster: Cluster, meanwhile: Callable[[], Awaitable[None]]) -> tuple[list[Any], list[str]]:
    """(answers, failures) of clients that stream one request after another while `meanwhile` runs."""
    answers: list[Any] = []
    failures: list[str] = []
    over = asyncio.Event()

    async def client(number: int) -> None:
        while not over.is_set():
            try:
                answers.append(await _stream(cluster, _BODY))
            except (AssertionError, httpx.HTTPError) as error:
                failures.append(f"client {number}: {error!r}")

    clients = [asyncio.create_task(client(number)) for number in range(_CLIENTS)]
    await meanwhile()
    over.set()
    await asyncio.gather(*clients)
    return answers, failures


def test_a_killed_router_takes_only_its_own_connections_along(cluster: Cluster) -> None:
    status = _wait_until_whole(cluster)
    routers = {name: each for name, each in status.items() if each["role"] == "router"}
    assert "2 routers" in cluster.log()
    assert {each["http_url"] for each in routers.values()} == {cluster.state["http_url"]}
    assert {each["grpc_address"] for each in routers.values()} == {cluster.grpc_address}
    assert len({each["metrics_url"] for each in routers.values()}) == 2
    pids = {each["ranks"][0]["pid"]: name for name, each in routers.items()}
    server_port = int(cluster.url.rpartition(":")[2])
    long = {**_BODY, "max_tokens": 400}
    owners: dict[int, str] = {}
    killed: list[tuple[int, str, int]] = []

    async def client(number: int) -> tuple[Any, bool]:
        def on_begin(port: int, _: str) -> None:
            owners[number] = name = _owner(pids, server_port, port)
            if not killed and (set(owners.values()) == set(pids.values()) or len(owners) == _CLIENTS):
                # The one on which an answer has just begun: there is much of it left to write.
                pid = next(pid for pid in pids if pids[pid] == name)
                killed.append((number, name, pid))
                os.kill(pid, signal.SIGKILL)

        # Half of them with a key, by which all routers know the request.
        headers = {"Idempotency-Key": f"retried-{number}"} if number % 2 else {}
        try:
            return await _stream(cluster, long, on_begin, headers), False
        except _BROKEN:
            # At once, and without a look at who lives.
            return await _stream_once_free(cluster, long, headers, killed[0][2]), True

    async def load() -> list[tuple[Any, bool]]:
        return await asyncio.gather(*(client(number) for number in range(_CLIENTS)))

    answers = asyncio.run(load())
    assert len(answers[0][0]) == 400
    assert all(ids == answers[0][0] for ids, _ in answers)
    ((lost, name, _),) = killed
    broken = {number for number, (_, is_broken) in enumerate(answers) if is_broken}
    assert lost in broken
    # Of whom the owner was looked for after its death ("" then), nothing can be said.
    assert not {number for number in broken if owners.get(number) not in (None, "", name)}
    after = _wait_until_whole(cluster)
    assert after[name]["incarnation"] != status[name]["incarnation"]
    assert after[name]["http_url"] == cluster.state["http_url"]
    cluster.wait_until_settled()

    async def requests_of_both() -> list[float]:
        async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
            texts = [(await client.get(after[name]["metrics_url"])).text for name in routers]
        return [sum(map(float, re.findall(r"^baton_requests_total\S* (\S+)$", text, re.MULTILINE))) for text in texts]

    async def until_both_serve() -> None:
        before = await requests_of_both()
        async with asyncio.timeout(30):
            while True:
                await asyncio.gather(*(_stream(cluster, {**_BODY, "max_tokens": 4}) for _ in range(8)))
                now = await requests_of_both()
                if all(many > few for many, few in zip(now, before, strict=True)):
                    return

    asyncio.run(until_both_serve())


def test_what_redis_does_is_not_felt(cluster: Cluster, redis: RedisProcess) -> None:
    _wait_until_whole(cluster)
    undisturbed = asyncio.run(_stream(cluster, _BODY))
    index = f"baton:{{{cluster.name}}}:index:instances/"

    async def until_all_are_listed() -> None:
        until_s = time.monotonic() + 30
        while any(
            redis.ask("EXISTS", f"baton:{{{cluster.name}}}:instances/{name}") != b":1\r\n" for name in _INSTANCES
        ):
            assert time.monotonic() < until_s, redis.ask("ZRANGE", index, "0", "-1")
            await asyncio.sleep(0.05)

    async def faults() -> None:
        await until_all_are_listed()
        redis.stop()
        await asyncio.sleep(3.0)
        redis.go_on()
        await until_all_are_listed()
        redis.ask("FLUSHALL")
        await until_all_are_listed()
        redis.kill()
        await asyncio.sleep(4.0)  # longer than a lease
        redis.start()
        await until_all_are_listed()

    answers, failures = asyncio.run(_under_load(cluster, faults))
    assert not failures
    assert len(answers) >= _CLIENTS
    assert all(ids == undisturbed for ids in answers)
    cluster.wait_until_settled()


def test_a_decode_worker_dies_while_redis_is_down(cluster: Cluster, redis: RedisProcess) -> None:
    status = _wait_until_whole(cluster)
    body = {**_BODY, "max_tokens": 300, "temperature": 1.0, "seed": 5}
    undisturbed = asyncio.run(_stream(cluster, body))
    killed: list[str] = []

    def kill(_: int, decode_instance: str) -> None:
        killed.append(decode_instance)
        os.kill(status[decode_instance]["ranks"][0]["pid"], signal.SIGKILL)

    redis.kill()
    try:
        assert asyncio.run(_stream(cluster, body, kill)) == undisturbed
    finally:
        redis.start()
    assert killed
    after = _wait_until_whole(cluster)
    assert after[killed[0]]["incarnation"] != status[killed[0]]["incarnation"]
    cluster.wait_until_settled()
