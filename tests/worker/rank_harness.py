"""Instances of several ranks with a real model, all ranks in this process, and a client that plays the router.

Threads stand in for processes: each rank has its own stream to its driver, its own collectives and its own pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from harness import TIMEOUT_S, Registry, Router

from baton.config import ClusterConfig, load_config
from baton.decode_worker import service as decode_service
from baton.placement import Placement
from baton.prefill_worker import service as prefill_service
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc

START_S = 60.0


class MeetingRegistry(Registry):
    """Also lets ranks find their driver."""

    def __init__(self) -> None:
        super().__init__()
        self._drivers: dict[tuple[str, str], asyncio.Future[str]] = {}

    async def Meet(self, request: pb.MeetRequest, context: Any) -> pb.MeetReply:
        key = (request.instance_id, request.start_id)
        future = self._drivers.setdefault(key, asyncio.get_running_loop().create_future())
        if request.driver_address and not future.done():
            future.set_result(request.driver_address)
        return pb.MeetReply(driver_address=await asyncio.shield(future))

    async def until_dead(self, name: str) -> None:
        """Returns when an instance has been announced as dead."""
        while self.statuses[name].state != "dead":
            await asyncio.sleep(0.01)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.InstanceList]:
        while True:
            yield pb.InstanceList(instances=list(self.statuses.values()))
            await asyncio.sleep(0.1)


@dataclass
class Ranks:
    """Every rank's task, by (instance, rank)."""

    config: ClusterConfig
    registry: MeetingRegistry
    address: str
    tasks: dict[tuple[str, int], asyncio.Task[None]] = field(default_factory=dict)
    stops: dict[tuple[str, int], asyncio.Event] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)

    def kill(self, role: str, rank: int) -> None:
        """Ends a rank without a word, as far as that goes within one process."""
        self.lost.add(f"{role}-0")
        self.tasks[f"{role}-0", rank].cancel()

    def start(self, role: str) -> None:
        """Starts all ranks of instance 0 of `role`."""
        pool = self.config.pool(role)
        num_ranks = pool.tensor_parallel * pool.pipeline_parallel
        service = prefill_service if role == "prefill" else decode_service
        for rank in range(num_ranks):
            key = (f"{role}-0", rank)
            self.stops[key] = asyncio.Event()
            placement = Placement(instance_id=key[0], start_id="start", rank=rank, num_ranks=num_ranks)
            self.tasks[key] = asyncio.create_task(
                service.serve(self.config, placement=placement, registry_address=self.address, stop=self.stops[key])
            )

    async def wait_ready(self, *names: str) -> None:
        """Waits until these instances are; fails with what a rank raised."""
        async with asyncio.timeout(START_S):
            while not all(
                name in self.registry.statuses and self.registry.statuses[name].state == "ready" for name in names
            ):
                ended = [task for task in self.tasks.values() if task.done()]
                assert not ended, [task.exception() for task in ended]
                await asyncio.sleep(0.02)

    async def router(self) -> RankRouter:
        """A new router with its stream open, which knows of all ranks."""
        router = RankRouter(self.registry.statuses["decode-0"], self.registry.statuses["prefill-0"])
        await router.hello()
        return router


class RankRouter(Router):
    """Tells the prefill worker of every decode rank."""

    def start_prefill(self, request: Any, **changes: Any) -> Any:
        status = self.decode
        ranks = [pb.RankAddress(address=rank.address, incarnation=rank.incarnation) for rank in status.ranks]
        return super().start_prefill(request, **{"decode_ranks": ranks, "decode_layout": status.layout, **changes})


@asynccontextmanager
async def ranks(model: Path, settings: dict[str, Any], *, in_turn: bool = False) -> AsyncIterator[Ranks]:
    """Starts both instances, decode first if `in_turn`, and waits until they serve; stops them in the end."""
    config = load_config(
        None,
        {
            "model.path": str(model),
            "model.max_model_len": 256,
            "kv.num_blocks": 96,
            "cpu.threads": 1,
            "metrics.enabled": False,
            **settings,
        },
    )
    registry, server = MeetingRegistry(), grpc.aio.server()
    rpc.add_RegistryServicer_to_server(registry, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    started = Ranks(config, registry, address)
    try:
        for role in ("decode", "prefill"):
            started.start(role)
            if in_turn:
                await started.wait_ready(f"{role}-0")
        await started.wait_ready("decode-0", "prefill-0")
        yield started
    finally:
        for stop in started.stops.values():
            stop.set()
        ended = await asyncio.wait_for(asyncio.gather(*started.tasks.values(), return_exceptions=True), 2 * TIMEOUT_S)
        await server.stop(None)
    for key, error in zip(started.tasks, ended, strict=True):
        assert error is None or key[0] in started.lost, (key, error)
