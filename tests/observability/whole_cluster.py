"""A router, a prefill and a decode worker with fake engines, all real services in this process, over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tests.router.harness import MAX_MODEL_LEN, VOCAB_SIZE
from tests.router.tiny_tokenizer import write_tokenizer

from baton.config import ClusterConfig
from baton.decode_worker import service as decode_service
from baton.engine.engine import Engine
from baton.engine.fake import FakeEngine, LatencyModel
from baton.placement import Placement
from baton.prefill_worker import service as prefill_service
from baton.proto.baton.v1 import inference_pb2 as inference_pb
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.router import service as router_service
from baton.worker import runtime as worker_runtime

__all__ = ["LONG_PROMPT", "WholeCluster", "whole_cluster"]

TIMEOUT_S = 20.0
LONG_PROMPT = [5 + position % 300 for position in range(200)]
"""Long enough to be handed over."""


class _Registry(rpc.RegistryServicer):
    """Lists whoever announces itself."""

    def __init__(self) -> None:
        self.statuses: dict[str, pb.WorkerStatus] = {}
        self._changed = asyncio.Condition()

    async def Announce(self, request: pb.WorkerStatus, context: Any) -> pb.AnnounceReply:
        async with self._changed:
            self.statuses[request.instance_id] = pb.WorkerStatus.FromString(request.SerializeToString())
            self._changed.notify_all()
        return pb.AnnounceReply(lease_s=3.0)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.InstanceList]:
        while True:
            yield pb.InstanceList(instances=self.statuses.values())
            async with self._changed:
                await self._changed.wait()

    async def until_ready(self, *names: str) -> None:
        """Waits until all of these say so."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: all(name in self.statuses and self.statuses[name].state == "ready" for name in names)
            )


class WholeCluster:
    """Where everybody is; `http` is a client of the router's."""

    def __init__(self, statuses: dict[str, pb.WorkerStatus], http: httpx.AsyncClient) -> None:
        self.statuses = statuses
        self.http = http

    @property
    def metrics_urls(self) -> dict[str, str]:
        """Metrics page of each instance."""
        return {name: status.metrics_url for name, status in self.statuses.items()}

    async def complete(self, **body: Any) -> httpx.Response:
        """A completion of `LONG_PROMPT`; `headers` go with it."""
        headers = body.pop("headers", None)
        fields = {"model": "tiny", "prompt": LONG_PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        response = await self.http.post("/v1/completions", json={**fields, **body}, headers=headers)
        assert response.status_code == 200, response.text
        return response

    async def generate(
        self, metadata: tuple[tuple[str, str], ...] = (), **options: Any
    ) -> list[inference_pb.GenerateResponse]:
        """The same over gRPC."""
        from baton.proto.baton.v1 import inference_pb2_grpc as inference_rpc

        request = inference_pb.GenerateRequest(
            token_ids=inference_pb.TokenIds(ids=LONG_PROMPT),
            options=inference_pb.GenerationOptions(max_tokens=24, temperature=0, ignore_eos=True, **options),
            stream=True,
        )
        async with grpc.aio.insecure_channel(self.statuses["router-0"].grpc_address) as channel:
            call = inference_rpc.InferenceStub(channel).Generate(request, metadata=metadata, timeout=TIMEOUT_S)
            return [message async for message in call]


@contextlib.asynccontextmanager
async def whole_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, step_s: float = 0.002, **sections: Any
) -> AsyncIterator[WholeCluster]:
    """Runs all three; `sections` of the configuration are set. A step of the engines takes `step_s`."""
    folder = write_tokenizer(tmp_path / "model")
    card = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": VOCAB_SIZE, "dtype": "float32", "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(card))
    config = ClusterConfig.model_validate(
        {
            "model": {"path": str(folder), "served_name": "tiny"},
            "router": {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"},
            # Each prompt is to go through both workers, whatever the fake engines cost.
            "routing": {"disaggregate": "always"},
            "stop_grace_s": 5.0,
            **sections,
        }
    )

    def build(config: ClusterConfig, pool: Any, progress: Any) -> Engine:
        return FakeEngine(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, latency=LatencyModel(base_s=step_s))

    monkeypatch.setattr(worker_runtime, "build_engine", build)
    registry, server = _Registry(), grpc.aio.server()
    rpc.add_RegistryServicer_to_server(registry, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    stop = asyncio.Event()
    services = {"decode-0": decode_service, "prefill-0": prefill_service, "router-0": router_service}
    tasks = [
        asyncio.create_task(
            service.serve(config, placement=Placement(instance_id=name), registry_address=address, stop=stop)
        )
        for name, service in services.items()
    ]
    try:
        async with asyncio.timeout(TIMEOUT_S):
            ready = asyncio.create_task(registry.until_ready(*services))
            await asyncio.wait({ready, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                assert not task.done(), task.exception()
        url = registry.statuses["router-0"].http_url
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as http:
            yield WholeCluster(registry.statuses, http)
    finally:
        stop.set()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 2 * TIMEOUT_S)
        await server.stop(None)
