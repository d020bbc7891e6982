"""Two routers behind the same two ports: who gets new connections, and what becomes of running ones when one leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tests.router.fake_worker import FakeDecode, FakeRegistry, expected
from tests.router.harness import MAX_MODEL_LEN, VOCAB_SIZE
from tests.router.tiny_tokenizer import write_tokenizer

from baton.cluster.router_ports import held_router_ports
from baton.config import ClusterConfig
from baton.errors import ConfigError
from baton.placement import Placement
from baton.proto.baton.v1 import inference_pb2, inference_pb2_grpc
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.service import serve


class _Pair:
    """Routers with numbers of their own, one registry and one decode worker; ports found as `baton up` finds them."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.registry, self.decode = FakeRegistry(), FakeDecode()
        self._running: dict[int, tuple[asyncio.Event, asyncio.Task[None]]] = {}

    @property
    def url(self) -> str:
        return f"http://{self.config.router.http}"

    def start(self, number: int) -> None:
        stop = asyncio.Event()
        placement = Placement(instance_id=f"router-{number}")
        serving = serve(self.config, placement=placement, registry_address=self.registry.address, stop=stop)
        self._running[number] = stop, asyncio.create_task(serving)

    async def until_ready(self, number: int) -> pb.WorkerStatus:
        return await self.registry.until_announced(
            lambda status: status.instance_id == f"router-{number}" and status.state == "ready"
        )

    async def end(self, number: int) -> None:
        stop, task = self._running.pop(number)
        stop.set()
        await asyncio.wait_for(task, 20)

    async def end_all(self) -> None:
        for number in list(self._running):
            await self.end(number)


@contextlib.asynccontextmanager
async def _pair(tmp_path: Path, replicas: int = 2) -> AsyncIterator[_Pair]:
    folder = write_tokenizer(tmp_path / "model")
    card = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": VOCAB_SIZE, "dtype": "float32", "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(card))
    router = {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0", "replicas": replicas}
    config = ClusterConfig.model_validate({"model": {"path": str(folder), "served_name": "tiny"}, "router": router})
    with held_router_ports(config) as held:
        pair = _Pair(held)
        await pair.registry.start()
        await pair.decode.start()
        try:
            yield pair
        finally:
            await pair.end_all()
            await pair.decode.stop()
            await pair.registry.stop()


async def _complete(url: str, **options: Any) -> list[int]:
    """One completion on a connection of its own."""
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 6, "return_token_ids": True, **options}
    async with httpx.AsyncClient(timeout=20) as client:
        response = await client.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids


async def test_a_router_that_shares_listens_once_it_can_serve(tmp_path: Path) -> None:
    async with _pair(tmp_path) as pair:
        pair.start(0)
        await pair.registry.until_announced(lambda status: status.instance_id == "router-0")
        with pytest.raises(httpx.ConnectError):
            await _complete(pair.url)
        await pair.end(0)
        pair.registry.announced.clear()
        pair.start(0)
        await pair.registry.publish(pair.decode)
        first = await pair.until_ready(0)
        assert await _complete(pair.url) == expected([1, 2, 3], 6)
        pair.start(1)
        second = await pair.until_ready(1)
        assert first.http_url == second.http_url == pair.url
        assert first.grpc_address == second.grpc_address == pair.config.router.grpc
        assert len({first.metrics_url, second.metrics_url, f"{pair.url}/metrics"}) == 3
        async with httpx.AsyncClient() as client:
            assert "baton_requests_total" in (await client.get(first.metrics_url)).text
        routers = {hello.rpartition("-")[0] for hello in pair.decode.hellos}
        assert routers == {"router-0", "router-1"}


async def test_one_that_leaves_sends_nobody_away(tmp_path: Path) -> None:
    async with _pair(tmp_path) as pair:
        await pair.registry.publish(pair.decode)
        for number in (0, 1):
            pair.start(number)
            await pair.until_ready(number)
        pair.decode.gate.clear()
        held = [asyncio.create_task(_complete(pair.url, max_tokens=8)) for _ in range(12)]
        channels = [
            grpc.aio.insecure_channel(pair.config.router.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(6)
        ]
        request = inference_pb2.GenerateRequest(model="tiny", token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]))
        request.options.max_tokens = 8

        async def generate(channel: grpc.aio.Channel) -> list[int]:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=20)
            return [token_id async for message in call for token_id in message.token_ids]

        held += [asyncio.create_task(generate(channel)) for channel in channels]
        async with asyncio.timeout(20):
            while len(pair.decode.submits) < len(held):
                await asyncio.sleep(0.02)
        ending = asyncio.create_task(pair.end(0))
        await asyncio.sleep(0.5)
        assert not ending.done()
        # New connections come to the other one, and none is refused.
        pair.decode.gate.set()
        assert await asyncio.gather(*(_complete(pair.url) for _ in range(20))) == [expected([1, 2, 3], 6)] * 20
        assert await asyncio.gather(*held) == [expected([1, 2, 3], 8)] * len(held)
        await ending
        assert await generate(channels[0]) == expected([1, 2, 3], 8)
        for channel in channels:
            await channel.close()


async def test_a_router_alone_takes_the_port_that_is_held_for_it(tmp_path: Path) -> None:
    async with _pair(tmp_path, replicas=1) as pair:
        await pair.registry.publish(pair.decode)
        pair.start(0)
        await pair.until_ready(0)
        assert await _complete(pair.url) == expected([1, 2, 3], 6)
        pair.start(1)
        _, task = pair._running.pop(1)
        with pytest.raises(ConfigError, match=r"router\.http: cannot listen"):
            await task
        await pair.end(0)
        pair.start(0)
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(httpx.ConnectError, AssertionError):
                    assert await _complete(pair.url) == expected([1, 2, 3], 6)
                    return


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = ClusterConfig.model_validate({"router": {"grpc": address}})
        with pytest.raises(ConfigError, match=rf"router\.grpc: cannot bind {address}"), held_router_ports(config):
            pass
