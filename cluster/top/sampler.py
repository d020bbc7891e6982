"""Reads a whole cluster at one moment: the registry's list, and all pages at once, each within a deadline."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
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


@dataclass(slots=True)
class _Opinion:
    """Of a worker, the worst that any router has."""

    health: str = "healthy"
    is_stale: bool = False
    slowness: float = 0.0


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
        self._stack.push_async_callback(self._channel.close, None)
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
        opinions = await self._opinions(listed)
        reading = (self._read(status, opinions.get(status.instance_id, _Opinion())) for status in listed.instances)
        readings = await asyncio.gather(*reading)
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

    async def _opinions(self, listed: worker_pb2.InstanceList) -> dict[str, _Opinion]:
        """What the routers think of each worker."""
        routers = [status for status in listed.instances if status.role == "router" and status.admin_url]
        asking = [ask_router(self._admin, status.instance_id, status.admin_url, "instances") for status in routers]
        opinions: dict[str, _Opinion] = {}
        for asked in await asyncio.gather(*asking):
            for told in asked.answer.get("instances", ()):
                opinion = opinions.setdefault(told["id"], _Opinion())
                if told["health"] != "healthy":
                    opinion.health = told["health"]
                opinion.is_stale |= told["signal"]["freshness"] == "stale"
                opinion.slowness = max(opinion.slowness, told["slowness"])
        return opinions

    async def _read(self, status: worker_pb2.WorkerStatus, opinion: _Opinion) -> Reading:
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
            slowness=opinion.slowness or load.slowness,
            health=opinion.health,
            is_stale=opinion.is_stale,
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
