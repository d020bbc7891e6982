"""The life of one worker instance, in its driver's process: announce, load, serve, drain, end.

    starting --every rank loaded, ports open--> ready --stop asked--> draining --> (the process ends)
        any  --the engine failed, a rank was lost--> dead, the process ends with an error

Ownership: the runtime owns the instance's identity (instance id, incarnation), its driver's gRPC server, its
announcements, its status and its `news` (what routers are told besides tokens), and the engine; where there are other
ranks, also what connects them: `followers` (their life, see `followers.py`) and `parallel` (their steps). It knows
nothing of what a role does; the role adds its services to the server before it opens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc

from baton import faults
from baton.collector import leave_out_what_stays
from baton.config import ClusterConfig
from baton.engine.engine import Engine, EngineLoad
from baton.engine.loop import EngineLoop
from baton.engine.parallel_runner import ParallelRunner
from baton.errors import BatonError, DeadlineError, UnavailableError
from baton.kv_transfer.transports.select import host_id
from baton.metrics import Metrics
from baton.metrics_server import serve_pages
from baton.placement import Placement
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import layout_to_proto
from baton.proto.set_faults import set_faults
from baton.state.announce import Announcements
from baton.state.open import is_shared, open_state
from baton.tracing import open_tracing
from baton.vllm_metrics import facts_of, render_vllm
from baton.worker.figures import Figures, load_to_proto
from baton.worker.followers import Followers
from baton.worker.load import build_engine, build_parallel_engine, connect_shard
from baton.worker.news import News
from baton.worker.server import listen, make_server
from baton.worker.threads import run_in_daemon

__all__ = ["BEATS_PER_SILENCE", "PROTOCOL_VERSION", "WorkerRuntime"]

_T = TypeVar("_T")
PROTOCOL_VERSION = 2
_GIVE_UP_TIMEOUT_S = 2.0
_STOP_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 3.0
_FLUSH_SPANS_S = 1.0
BEATS_PER_SILENCE = 5
"""How often, within the time after which it is given up, a worker says that it lives."""
_log = logging.getLogger(__name__)


class WorkerRuntime(rpc.WorkerServicer):
    """Identity, status and server of one instance.

    Args:
        role: "prefill" or "decode".
        placement: of the driver.
        stop: set from outside to end the process; set by the runtime on Shutdown and on failure.
    """

    def __init__(
        self, config: ClusterConfig, *, role: str, placement: Placement, registry_address: str, stop: asyncio.Event
    ) -> None:
        self.config = config
        self.role = role
        self.placement = placement
        self.instance_id = placement.instance_id
        self.incarnation = os.urandom(16)
        self.stop = stop
        self.pool_config = config.pool(role)
        self.tracing = open_tracing(config.tracing, role=role, instance_id=self.instance_id)
        self.metrics = Metrics(role)
        self.figures = Figures(self.metrics)
        self.failure: BaseException | None = None
        self.engine: Engine | None = None
        self.parallel: ParallelRunner | None = None
        self.followers = Followers(
            placement,
            on_progress=self._set_progress,
            on_figures=self.figures.rank_figures,
            on_stopping=stop.set,
            on_lost=self.fail,
        )
        self.registry_address = registry_address
        self._loop = asyncio.get_running_loop()
        self._progress: dict[int, float] = dict.fromkeys(range(placement.num_ranks), 0.0)
        self._failed = asyncio.Event()
        self._status = pb.WorkerStatus(
            instance_id=self.instance_id,
            role=role,
            state="starting",
            incarnation=self.incarnation,
            host_id=host_id(),
        )
        self.news = self.figures.news = News(lambda: self._status.load)
        self._state = open_state(config.state, cluster=config.name) if is_shared(config.state) else None
        self._announcer = Announcements(registry_address, self.status, self._state)

    def status(self) -> pb.WorkerStatus:
        """The present status, as announced."""
        return self._status

    def set_load(self, load: EngineLoad) -> None:
        """Notes the engine's load for the next announcement. Call it on the event loop."""
        self._status.load.CopyFrom(load_to_proto(load))

    def fail(self, error: BaseException) -> None:
        """Ends the instance because of `error`; may be called from any thread."""

        def on_loop() -> None:
            if self.failure is None:
                self.failure = error
                _log.error("%s: %s", self.instance_id, error)
            self._status.state, self._status.detail = "dead", str(self.failure)
            self._announcer.nudge()
            self._failed.set()
            self.stop.set()
            parallel = self.parallel
            if parallel is not None:
                # Steps that wait for a lost rank must not wait out their deadline.
                cause = error if isinstance(error, BatonError) else UnavailableError(str(error))
                run_in_daemon("baton-abandon", lambda: parallel.abandon(cause))

        self._loop.call_soon_threadsafe(on_loop)

    # ------------------------------------------------------------ start

    async def load_engine(self) -> Engine:
        """Builds the engine, on all ranks, while the status tells how far it is.

        Raises:
            BatonError: why a rank could not.
        """
        if self.placement.num_ranks == 1:
            engine = await self._until_failure(run_in_daemon("baton-load", self._load_alone))
        else:
            await self.followers.open(self.registry_address)
            work = run_in_daemon("baton-load", self._load_parallel)
            engine, parallel = await self._until_failure(work)
            self.parallel = parallel
            self.figures.driver = (self.placement.rank, parallel.figures)
            ready = asyncio.ensure_future(self.followers.wait_ready(self.config.startup_timeout_s))
            await self._until_failure(ready)
        self.engine, runner = engine, engine.runner
        self._status.layout.CopyFrom(layout_to_proto(runner.layout))
        self._status.lends_cores = runner.kv.device.type == "cpu"
        self._status.model_fingerprint = runner.fingerprint
        self._status.max_model_len = runner.max_model_len
        self.metrics.set_kv_cache(block_size=runner.layout.block_size, num_blocks=runner.num_blocks)
        self.set_load(engine.load())
        return engine

    def _load_alone(self) -> Engine:
        """On a thread of its own."""
        faults.strike("load")
        return build_engine(self.config, self.pool_config, self._tell_progress)

    def _load_parallel(self) -> tuple[Engine, ParallelRunner]:
        """On a thread of its own."""
        faults.strike("load")
        self._tell_progress("waiting for the other ranks", 0.0)
        shard = connect_shard(
            self.config,
            self.pool_config,
            rank=self.placement.rank,
            host=self.placement.host,
            store_address=self.followers.store_address,
            group_name=self.followers.group_name,
        )
        return build_parallel_engine(self.config, self.pool_config, self._tell_progress, shard, self._on_broken)

    def _on_broken(self, error: BaseException) -> None:
        """The collectives failed; the stream of the rank that was lost tells more, if it breaks too."""
        self._loop.call_soon_threadsafe(self._loop.call_later, 0.3, self.fail, error)

    async def _until_failure(self, work: asyncio.Future[_T]) -> _T:
        """The result of `work`, or the instance's failure, whatever comes first."""
        failed = asyncio.ensure_future(self._failed.wait())
        try:
            waits: set[asyncio.Future[Any]] = {work, failed}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                assert self.failure is not None
                raise self.failure
            return work.result()
        finally:
            failed.cancel()

    def _tell_progress(self, detail: str, fraction: float) -> None:
        self._loop.call_soon_threadsafe(self._set_progress, self.placement.rank, detail, fraction)

    def _set_progress(self, rank: int, detail: str, fraction: float) -> None:
        """An instance is as far as its slowest rank."""
        self._progress[rank] = fraction
        if self._status.state != "starting" or fraction > min(self._progress.values()):
            return
        self._status.detail = detail if self.placement.num_ranks == 1 else f"rank {rank}: {detail}"
        self._status.progress = fraction
        self._announcer.nudge()

    # ------------------------------------------------------------ serve

    @asynccontextmanager
    async def announced(self) -> AsyncIterator[None]:
        """Announces this instance for the length of the block, and its end after it."""
        ended = asyncio.Event()
        task = asyncio.create_task(self._announcer.run(ended), name="announce")
        try:
            yield
        except BaseException as error:
            self._status.state, self._status.detail = "dead", str(error)
            raise
        finally:
            ended.set()
            self._announcer.nudge()
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(task, 1.0)
            if self._state is not None:
                await self._state.close()
            if self.tracing.is_on:
                await asyncio.to_thread(self.tracing.close, _FLUSH_SPANS_S)

    async def serve(
        self,
        add_services: Callable[[grpc.aio.Server], None],
        *,
        drained: Callable[[], Awaitable[None]],
        give_up: Callable[[str], None],
    ) -> None:
        """Opens the port, tells the registry, and returns after `stop` once it is drained.

        What runs has half of `stop_grace_s` to end by itself; then `give_up` is called with the reason, and what is
        given up goes on elsewhere.

        Raises:
            UnavailableError: the port is taken.
            BaseException: whatever made the instance fail.
        """
        server = make_server()
        add_services(server)
        rpc.add_WorkerServicer_to_server(self, server)
        port = self.pool_config.port_of(self.placement.index, self.placement.rank)
        address = await listen(server, self.placement.host, port, self.instance_id)
        if self.config.metrics.enabled:
            self._status.metrics_url = serve_pages(self._pages(), self.config.metrics.host)
        self._status.address = address
        own = pb.RankStatus(
            rank=self.placement.rank,
            pid=os.getpid(),
            address=address,
            incarnation=self.incarnation,
            host=self.placement.host,
        )
        self._status.ranks.extend(sorted([*self.followers.statuses(), own], key=lambda status: status.rank))
        leave_out_what_stays()
        if self.failure is None:
            self._status.state, self._status.detail, self._status.progress = "ready", "", 1.0
            self._announcer.nudge()
            _log.info("%s is ready on %s", self.instance_id, address)
        try:
            await self.stop.wait()
        finally:
            if self.failure is None:
                self._status.state = "draining"
                self._announcer.nudge()
                await self._drain(drained, give_up)
            self.news.close()
            await server.stop(grace=0.5 if self.failure is None else 0.0)
        if self.failure is not None:
            raise self.failure

    def _pages(self) -> dict[str, Callable[[], bytes]]:
        metrics, model = self.metrics, self.config.served_model_name
        pages: dict[str, Callable[[], bytes]] = {"metrics": metrics.render}
        if self.config.metrics.vllm_aliases:
            pages["vllm"] = lambda: render_vllm(metrics, facts_of(metrics), model=model)
        return pages

    async def _drain(self, drained: Callable[[], Awaitable[None]], give_up: Callable[[str], None]) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(drained(), self.config.stop_grace_s / 2)
            return
        give_up(f"{self.instance_id} is being stopped")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(drained(), _GIVE_UP_TIMEOUT_S)
            return
        _log.warning("%s ends with requests that did not settle within %.0f s", self.instance_id, _GIVE_UP_TIMEOUT_S)

    async def stop_engine(self, loop: EngineLoop) -> None:
        """Ends the engine's thread; one that hangs in a failed instance is left to the end of the process."""
        try:
            await asyncio.to_thread(loop.stop, _STOP_TIMEOUT_S if self.failure is None else _END_TIMEOUT_S)
        except DeadlineError:
            if self.failure is None:
                raise

    async def end_ranks(self) -> None:
        """Lets the other ranks end, or breaks off with them where the instance has failed; nothing steps any more."""
        self.followers.expect_end()
        if self.parallel is not None:
            stopping = run_in_daemon("baton-stop", self.parallel.stop)
            # A rank on a host that has vanished answers to nothing: its connections are left to the process's end.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping, _END_TIMEOUT_S)
        if self.placement.num_ranks > 1:
            await self.followers.close(0.0 if self.failure is not None else _END_TIMEOUT_S)

    # ------------------------------------------------------------ what anyone may ask

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[pb.GetStatusRequest, pb.WorkerStatus]
    ) -> pb.WorkerStatus:
        """This instance's status with the load of this moment."""
        return self._status

    async def Follow(
        self, request: pb.FollowRequest, context: grpc.aio.ServicerContext[pb.FollowRequest, pb.WorkerNews]
    ) -> AsyncIterator[pb.WorkerNews]:
        """Everything that routers want to know of this worker, as it changes; for those that hold no token stream."""
        _log.info("router %s follows", request.router_id)
        beat_s = self.config.router.silence_s / BEATS_PER_SILENCE
        async for news in self.news.follow(self.incarnation, beat_s=beat_s):
            yield news

    async def Shutdown(
        self, request: pb.ShutdownRequest, context: grpc.aio.ServicerContext[pb.ShutdownRequest, pb.ShutdownReply]
    ) -> pb.ShutdownReply:
        """Drains and ends this instance."""
        self.stop.set()
        return pb.ShutdownReply()

    async def SetFaults(
        self, request: pb.SetFaultsRequest, context: grpc.aio.ServicerContext[pb.SetFaultsRequest, pb.SetFaultsReply]
    ) -> pb.SetFaultsReply:
        """Replaces this process's faults."""
        return await set_faults(request, context)
