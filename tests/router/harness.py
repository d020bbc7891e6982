"""A real router on free loopback ports, between fake workers and real clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
from openai import AsyncOpenAI
from tests.router.fake_worker import FakeDecode, FakePrefill, FakeRegistry
from tests.router.tiny_tokenizer import write_tokenizer

from baton.config import ClusterConfig
from baton.engine.tokenizer import Tokenizer
from baton.placement import Placement
from baton.proto.baton.v1 import inference_pb2 as pb
from baton.proto.baton.v1 import inference_pb2_grpc as rpc
from baton.router.service import serve

__all__ = ["MAX_MODEL_LEN", "VOCAB_SIZE", "Harness", "running_router"]

MAX_MODEL_LEN = 512
VOCAB_SIZE = 420


class Harness:
    """Everything a test touches.

    Attributes:
        http_url, grpc_address, admin_url: of the router.
        tokenizer: the served one.
        stop: ends the router; `serving` is its task.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer.from_dir(folder)
        self.registry = FakeRegistry()
        self.decode = FakeDecode()
        self.prefill = FakePrefill()
        self.http_url = self.grpc_address = self.admin_url = ""
        self.stop = asyncio.Event()
        self.serving: asyncio.Task[None] | None = None
        self.http = httpx.AsyncClient(timeout=20)
        self.openai = AsyncOpenAI(api_key="none", base_url="http://unset", max_retries=0)
        self.channel: grpc.aio.Channel | None = None

    @property
    def grpc(self) -> rpc.InferenceStub:
        """A stub on the router."""
        assert self.channel is not None
        return rpc.InferenceStub(self.channel)

    async def until_connected(self, *instance_ids: str) -> None:
        """Wait until the router can use these workers."""
        async with asyncio.timeout(60):
            while True:
                info = await self.grpc.GetServerInfo(pb.GetServerInfoRequest())
                if set(instance_ids) <= {instance.id for instance in info.instances if instance.state == "ready"}:
                    return

    def text(self, ids: list[int]) -> str:
        """What the router must say for these output ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST JSON to the router."""
        return await self.http.post(self.http_url + path, json=body, **options)

    async def events(self, path: str, body: Any) -> list[str]:
        """The data lines of a stream."""
        async with self.http.stream("POST", self.http_url + path, json=body) as response:
            assert response.status_code == 200, await response.aread()
            raw = (await response.aread()).decode()
        assert raw.endswith("\n\n")
        return [block.removeprefix("data: ") for block in raw[:-2].split("\n\n")]


@contextlib.asynccontextmanager
async def running_router(tmp_path: Path, *, with_workers: bool = True, **sections: Any) -> AsyncIterator[Harness]:
    """A router with `sections` of the configuration set, ready when the block begins."""
    folder = write_tokenizer(tmp_path / "model")
    card = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": VOCAB_SIZE, "dtype": "float32", "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(card))
    harness = Harness(folder)
    router = {
        "http": "127.0.0.1:0",
        "grpc": "127.0.0.1:0",
        # Where the machine stands still, nobody is to be taken for lost in tests that are not about that.
        "silence_s": 5.0,
        **sections.pop("router", {}),
    }
    config = ClusterConfig.model_validate(
        {
            "model": {"path": str(folder), "served_name": "tiny"},
            "router": router,
            "stop_grace_s": 5.0,
            **sections,
        }
    )
    async with contextlib.AsyncExitStack() as stack:
        for server in (harness.registry, harness.decode, harness.prefill):
            await server.start()
            stack.push_async_callback(server.stop)
        if with_workers:
            await harness.registry.publish(harness.decode, harness.prefill)
        harness.serving = asyncio.create_task(
            serve(
                config,
                placement=Placement(instance_id="router-0"),
                registry_address=harness.registry.address,
                stop=harness.stop,
            )
        )
        stack.push_async_callback(_finish, harness)
        wanted = "ready" if with_workers else "starting"
        announced = asyncio.ensure_future(
            harness.registry.until_announced(lambda status: status.state == wanted and bool(status.grpc_address))
        )
        await asyncio.wait({announced, harness.serving}, return_when=asyncio.FIRST_COMPLETED)
        if harness.serving.done():
            announced.cancel()
            harness.serving.result()
        status = await announced
        harness.http_url, harness.grpc_address = status.http_url, status.grpc_address
        harness.admin_url = status.admin_url
        harness.openai = harness.openai.with_options(
            base_url=f"{status.http_url}/v1", api_key=config.router.api_key or "none"
        )
        harness.channel = grpc.aio.insecure_channel(status.grpc_address)
        stack.push_async_callback(harness.channel.close)
        stack.push_async_callback(harness.http.aclose)
        stack.push_async_callback(harness.openai.close)
        yield harness


async def _finish(harness: Harness) -> None:
    harness.stop.set()
    assert harness.serving is not None
    await asyncio.wait_for(asyncio.gather(harness.serving, return_exceptions=True), 10)
