"""The life of a rank that is not its instance's driver: join, load, compute what the driver says, end with it.

    join driver --> load its part of the model --> serve (decode: pages) + steps on a thread --> StopRank --> end
      any --the driver is gone, a step fails, another rank is lost--> the process ends with the reason

Ownership: the follower owns its process's server, its stream to the driver and the thread that computes. What its role
does besides steps (receive or ship pages) is a `RankPart`, which it drives.

A SIGTERM only tells the driver, which drains the instance and lets all ranks end together.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc

from baton import faults
from baton.config import ClusterConfig, PoolConfig
from baton.engine.pages import KvPages
from baton.engine.parallel import Shard
from baton.engine.parallel_runner import run_follower
from baton.engine.pipeline_figures import PipelineFigures
from baton.engine.runner import ModelRunner
from baton.engine.step_message import StepBody
from baton.errors import BatonError
from baton.kv_transfer.peer import LocalPeer
from baton.placement import Placement
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.worker.driver_link import DriverLink
from baton.worker.figures import figures_to_proto
from baton.worker.load import build_runner, connect_shard
from baton.worker.peer import local_peer
from baton.worker.server import listen, make_server
from baton.worker.threads import run_in_daemon

__all__ = ["FollowerContext", "RankPart", "follow"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_CLOSE_TIMEOUT_S = 5.0
_FIGURES_PERIOD_S = 1.0


class RankPart(Protocol):
    """What a follower does for its role. All but `on_layers` runs on the event loop."""

    def add_services(self, server: grpc.aio.Server) -> None:
        """Adds what other instances' ranks call."""
        ...

    def start(self) -> None:
        """The server is open."""
        ...

    def on_command(self, command: pb.RankCommand) -> None:
        """The driver says so."""
        ...

    def on_layers(self, body: StepBody, begin: int, end: int) -> None:
        """This rank's layers [begin, end) of a step are written; on the thread that computes."""
        ...

    async def close(self) -> None:
        """Nothing touches the pool any more."""
        ...


@dataclass(frozen=True, slots=True)
class FollowerContext:
    """What a `RankPart` is made of.

    Attributes:
        peer: this rank towards the other half of a handover.
        pages: its part of the pool.
        send: queues an event for the driver; call it on the event loop.
    """

    config: ClusterConfig
    placement: Placement
    peer: LocalPeer
    pages: KvPages
    send: Callable[[pb.RankEvent], None]


async def follow(
    config: ClusterConfig,
    pool: PoolConfig,
    *,
    placement: Placement,
    registry_address: str,
    stop: asyncio.Event,
    make_part: Callable[[FollowerContext], RankPart],
) -> None:
    """Runs a follower until its driver lets it end.

    Args:
        pool: the role's section of the configuration.
        make_part: called once the model is loaded.
        stop: set when this process is asked to end.

    Raises:
        BatonError: it could not start, the driver is gone, or a step failed.
    """
    incarnation = os.urandom(16)
    link = await DriverLink.join(registry_address, placement, incarnation, config.startup_timeout_s)
    follower = _Follower(config, pool, placement, incarnation, link)
    telling = asyncio.create_task(_tell_stop(stop, link), name="tell the driver to stop")
    try:
        await follower.run(make_part)
    except BaseException as error:
        text = error.message if isinstance(error, BatonError) else f"{type(error).__name__}: {error}"
        link.send(pb.RankEvent(failed=pb.RankFailed(reason=text)))
        raise
    finally:
        telling.cancel()
        await link.close()


class _Follower:
    def __init__(
        self, config: ClusterConfig, pool: PoolConfig, placement: Placement, incarnation: bytes, link: DriverLink
    ) -> None:
        self._config = config
        self._pool = pool
        self._placement = placement
        self._incarnation = incarnation
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._part: RankPart | None = None

    async def run(self, make_part: Callable[[FollowerContext], RankPart]) -> None:
        commands = asyncio.create_task(self._take_commands(), name="commands of the driver")
        try:
            shard, runner = await self._until_driver_ends(commands, run_in_daemon("baton-load", self._load))
            await self._serve(make_part, shard, runner, commands)
        finally:
            commands.cancel()

    async def _serve(
        self,
        make_part: Callable[[FollowerContext], RankPart],
        shard: Shard,
        runner: ModelRunner,
        commands: asyncio.Task[None],
    ) -> None:
        pages = KvPages(runner.kv, runner.layout.block_size)
        peer = local_peer(self._placement, self._incarnation, runner)
        part = make_part(FollowerContext(self._config, self._placement, peer, pages, self._link.send))
        server = make_server()
        part.add_services(server)
        port = self._pool.port_of(self._placement.index, self._placement.rank)
        address = await listen(server, self._placement.host, port, self._placement.name)
        part.start()
        self._part = part
        figures = PipelineFigures()
        steps = run_in_daemon(
            "baton-engine", lambda: run_follower(runner, shard, on_layers=part.on_layers, figures=figures)
        )
        reporting = asyncio.create_task(self._report(figures), name="figures for the driver")
        self._link.send(pb.RankEvent(ready=pb.RankReady(address=address)))
        _log.info("%s serves on %s", self._placement.name, address)
        try:
            # The steps end with the driver's last message, its stream a moment later, or both break.
            await self._until_driver_ends(commands, steps)
            await commands
        finally:
            shard.group.close()
            steps.cancel()
            reporting.cancel()
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await part.close()
            await server.stop(grace=0.2)

    async def _until_driver_ends(self, commands: asyncio.Task[None], work: asyncio.Future[_T]) -> _T:
        """The result of `work`; the driver's end first is an error."""
        waits: set[asyncio.Future[Any]] = {commands, work}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if commands.done() and not work.done():
            await commands
        return await work

    async def _take_commands(self) -> None:
        async for command in self._link.commands():
            if self._part is not None:
                self._part.on_command(command)

    async def _report(self, figures: PipelineFigures) -> None:
        told = 0
        while True:
            await asyncio.sleep(_FIGURES_PERIOD_S)
            if figures.steps != told:
                told = figures.steps
                self._link.send(pb.RankEvent(figures=figures_to_proto(figures)))

    def _load(self) -> tuple[Shard, ModelRunner]:
        """On a thread of its own."""
        faults.strike("load")
        welcome = self._link.welcome
        shard = connect_shard(
            self._config,
            self._pool,
            rank=self._placement.rank,
            host=self._placement.host,
            store_address=welcome.store_address,
            group_name=welcome.group_name,
        )
        with shard.reporting():
            return shard, build_runner(self._config, self._pool, self._progress, shard)

    def _progress(self, detail: str, fraction: float) -> None:
        event = pb.RankEvent(progress=pb.RankProgress(detail=detail, progress=fraction))
        self._loop.call_soon_threadsafe(self._link.send, event)


async def _tell_stop(stop: asyncio.Event, link: DriverLink) -> None:
    await stop.wait()
    link.send(pb.RankEvent(stopping=pb.RankStopping()))
