"""Two routers and one Redis, with real workers around a fake engine: the same registry, the same prefix index."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.redis_process import RedisProcess
from tests.router.tiny_tokenizer import write_tokenizer
from tests.worker.harness import Workers, workers

import baton.router.service as router_service
from baton.config import ClusterConfig
from baton.engine.block_journal import block_keys
from baton.placement import Placement
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.block_feed import Freshness
from baton.router.dispatch import Dispatcher
from baton.state.instances import GROUP, decode_instance
from baton.state.open import open_state

_WORKERS = ("decode-0", "prefill-0")
_CONVERGED_S = 1.0


class _RouterProcess:
    """One router, in this process."""

    def __init__(self, config: ClusterConfig, name: str) -> None:
        self.task = asyncio.create_task(
            router_service.serve(
                config, placement=Placement(instance_id=name), registry_address="127.0.0.1:9", stop=asyncio.Event()
            )
        )

    async def kill(self) -> None:
        """Without a word to anybody."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@contextlib.asynccontextmanager
async def _routers(
    monkeypatch: pytest.MonkeyPatch, config: ClusterConfig, names: tuple[str, ...]
) -> AsyncIterator[tuple[dict[str, _RouterProcess], dict[str, Dispatcher]]]:
    made: dict[str, Dispatcher] = {}

    class _Kept(Dispatcher):
        def __init__(self, *arguments: Any, router_id: str, **options: Any) -> None:
            super().__init__(*arguments, router_id=router_id, **options)
            made[router_id.rpartition("-")[0]] = self

    monkeypatch.setattr(router_service, "Dispatcher", _Kept)
    processes = {name: _RouterProcess(config, name) for name in names}
    try:
        yield processes, made
    finally:
        for process in processes.values():
            await process.kill()


async def _registry(url: str) -> dict[str, pb.WorkerStatus]:
    state = open_state(url)
    found = {key: decode_instance(key, value) for key, value in (await state.scan(GROUP)).items()}
    await state.close()
    return {key.removeprefix(GROUP): status for key, status in found.items() if isinstance(status, pb.WorkerStatus)}


async def _until_ready(url: str, names: tuple[str, ...]) -> dict[str, pb.WorkerStatus]:
    async with asyncio.timeout(20):
        while True:
            statuses = await _registry(url)
            if all(name in statuses and statuses[name].state == "ready" for name in names):
                return statuses
            await asyncio.sleep(0.02)


def _agrees(router: Dispatcher, both: Workers) -> bool:
    index = router.news.index
    return all(
        index.freshness(name) is Freshness.SYNCED
        and index.held(name) == set(block_keys(both.engines[name.rpartition("-")[0]].pool.names()))
        for name in _WORKERS
    )


async def _until_agreed(both: Workers, *routers: Dispatcher) -> float:
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    async with asyncio.timeout(20):
        while not all(_agrees(router, both) for router in routers):
            await asyncio.sleep(0.005)
    return loop.time() - begin_s


async def _ask(status: pb.WorkerStatus, start: int) -> None:
    prompt = [(start + i) % 400 + 10 for i in range(150)]
    async with httpx.AsyncClient(timeout=20) as client:
        body = {"prompt": prompt, "max_tokens": 20, "model": "tiny"}
        response = await client.post(f"{status.http_url}/v1/completions", json=body)
        assert response.status_code == 200, response.text


async def test_two_routers_agree_and_one_goes_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tokenizer(tmp_path / "model")
    card = {"max_position_embeddings": 512, "vocab_size": 420, "dtype": "float32", "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(card))
    with RedisProcess(tmp_path / "redis") as redis:
        config = ClusterConfig.model_validate(
            {
                "model": {"path": str(folder), "served_name": "tiny"},
                "router": {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"},
                "state": redis.url,
            }
        )
        names = ("router-0", "router-1")
        async with (
            workers(monkeypatch, {"state": redis.url}, num_blocks=64) as both,
            _routers(monkeypatch, config, names) as (processes, made),
        ):
            statuses = await _until_ready(redis.url, (*names, *_WORKERS))
            for router in made.values():
                incarnations = {i.instance_id: i.status.incarnation for i in router._table.all()}
                assert incarnations == {name: statuses[name].incarnation for name in _WORKERS}
            await _until_agreed(both, *made.values())
            times_s = []
            for number in range(6):  # more than the pools hold: blocks are evicted, too
                await _ask(statuses[names[number % 2]], 31 * number)
                times_s.append(await _until_agreed(both, *made.values()))
            assert all(made[name].news.index.held(worker) for name in names for worker in _WORKERS)
            assert min(times_s) < _CONVERGED_S, times_s
            await processes["router-0"].kill()
            await _ask(statuses["router-1"], 500)
            await _until_agreed(both, made["router-1"])
            redis.kill()
            await _ask(statuses["router-1"], 600)
            await _until_agreed(both, made["router-1"])
