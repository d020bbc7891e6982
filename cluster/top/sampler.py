"""Reads a whole cluster at one moment: the registry's list, and all pages at once, each within a deadline."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import grpc
import httpx

from baton.cluster.admin_client import admin_client, ask_router
from baton.cluster.top.sample import Page, Reading, Sample, read_page
from baton.errors import UnavailableError
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc

__all__ = ["Sampler"]

_REGISTRY_DEADLINE_S = 5.0


class Sampler:
    """Context manager.

    Args:
        registry_address: of the cluster.
        api_key: for the routers' `/admin/`.
        deadline_s: of each page.

    Attributes:
        note: what is wrong with the last sample; empty: nothing.
    """

    def __init__(self, registry_address: str, api_key: str | None, *, deadline_s: float) -> None:
        self._registry_address = registry_address
        self._stack = AsyncExitStack()
        self._pages = httpx.AsyncClient(timeout=deadline_s, trust_env=False)
        self._admin = admin_client(api_key, deadline_s)
        self._listed: worker_pb2.InstanceList | None = None
        self.note = ""

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._registry_address)
        self._stack.push_async_callback(self._channel.close)
        await self._stack.enter_async_context(self._pages)
        await self._stack.enter_async_context(self._admin)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def take(self) -> Sample:
        """One sample; while the registry is away, of those that it last listed.

        Raises:
            UnavailableError: the registry has not answered yet, and does not.
        """
        listed = await self._list()
        health, slowness = await self._health(listed)
        readings = await asyncio.gather(*(self._read(status, health, slowness) for status in listed.instances))
        return Sample(at_s=time.monotonic(), readings=tuple(readings))

    async def _list(self) -> worker_pb2.InstanceList:
        stub = worker_pb2_grpc.RegistryStub(self._channel)
        try:
            self._listed = await stub.GetCluster(worker_pb2.GetClusterRequest(), timeout=_REGISTRY_DEADLINE_S)
            self.note = ""
        except grpc.aio.AioRpcError as error:
            self.note = f"the controller at {self._registry_address} does not answer ({error.code().name})"
            if self._listed is None:
                raise UnavailableError(self.note) from error
        assert self._listed is not None
        return self._listed

    async def _health(self, listed: worker_pb2.InstanceList) -> tuple[dict[str, str], dict[str, float]]:
        """Of each worker: whether a router has set it aside, and how slow it is, as routers see it."""
        routers = [status for status in listed.instances if status.role == "router" and status.admin_url]
        asking = [ask_router(self._admin, status.instance_id, status.admin_url, "instances") for status in routers]
        health: dict[str, str] = {}
        slowness: dict[str, float] = {}
        for asked in await asyncio.gather(*asking):
            for told in asked.answer.get("instances", ()):
                if told["health"] != "healthy" or told["id"] not in health:
                    health[told["id"]] = told["health"]
                slowness[told["id"]] = max(slowness.get(told["id"], 0.0), told["slowness"])
        return health, slowness

    async def _read(
        self, status: worker_pb2.WorkerStatus, health: dict[str, str], slowness: dict[str, float]
    ) -> Reading:
        page = await self._page(status.metrics_url) if status.metrics_url else None
        load = status.load
        return Reading(
            instance_id=status.instance_id,
            role=status.role,
            state=status.state,
            detail=status.detail,
            incarnation=status.incarnation.hex(),
            page=page,
            answered=page is not None or not status.metrics_url,
            slowness=slowness.get(status.instance_id) or load.slowness,
            health=health.get(status.instance_id, "healthy"),
            running=load.running_requests,
            waiting=load.waiting_requests,
            kv_blocks={"free": load.kv_blocks_free, "cached": load.kv_blocks_cached, "owned": load.kv_blocks_owned},
        )

    async def _page(self, url: str) -> Page | None:
        try:
            response = await self._pages.get(url)
            return read_page(response.text) if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None
