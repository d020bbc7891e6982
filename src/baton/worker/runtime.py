"""The life of one worker process: announce, load, serve, drain, end.

    starting --engine loaded, port open--> ready --stop asked--> draining --> (process ends)
        any  --engine thread failed------> dead, the process ends with an error

Ownership: the runtime owns the process's identity (instance id, incarnation), its gRPC server, its announcements and
its status. It knows nothing of what a role does; the role adds its services to the server before it opens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import grpc

from baton.config import ClusterConfig, PoolConfig
from baton.engine.engine import Engine, EngineLoad
from baton.errors import UnavailableError
from baton.metrics import Metrics, serve_metrics
from baton.proto.announce import Announcer
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import layout_to_proto
from baton.worker.figures import Figures, load_to_proto
from baton.worker.load import build_engine

__all__ = ["MAX_MESSAGE_BYTES", "PROTOCOL_VERSION", "WorkerRuntime"]

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 64 << 20
"""Longest message between parts of the cluster; a prompt of a million tokens takes a few MiB."""
_DRAIN_GRACE_S = 5.0
_log = logging.getLogger(__name__)


class WorkerRuntime(rpc.WorkerServicer):
    """Identity, status and server of one worker.

    Args:
        role: "prefill" or "decode".
        stop: set from outside to end the process; set by the runtime on Shutdown and on failure.
    """

    def __init__(
        self, config: ClusterConfig, *, role: str, instance_id: str, registry_address: str, stop: asyncio.Event
    ) -> None:
        self.config = config
        self.role = role
        self.instance_id = instance_id
        self.incarnation = os.urandom(16)
        self.stop = stop
        self.metrics = Metrics(role)
        self.figures = Figures(self.metrics)
        self.failure: BaseException | None = None
        self.engine: Engine | None = None
        self._loop = asyncio.get_running_loop()
        self._status = pb.WorkerStatus(
            instance_id=instance_id,
            role=role,
            state="starting",
            incarnation=self.incarnation,
            ranks=[pb.RankStatus(rank=0, pid=os.getpid())],
        )
        self._announcer = Announcer(registry_address, self.status)

    @property
    def pool_config(self) -> PoolConfig:
        """This role's section of the configuration."""
        return self.config.prefill if self.role == "prefill" else self.config.decode

    def status(self) -> pb.WorkerStatus:
        """The present status, as announced."""
        return self._status

    def set_load(self, load: EngineLoad) -> None:
        """Notes the engine's load for the next announcement. Call it on the event loop."""
        self._status.load.CopyFrom(load_to_proto(load))

    def fail(self, error: BaseException) -> None:
        """Ends the process because of `error`; may be called from any thread."""

        def on_loop() -> None:
            self.failure = self.failure or error
            self._status.state, self._status.detail = "dead", str(error)
            self._announcer.nudge()
            self.stop.set()

        self._loop.call_soon_threadsafe(on_loop)

    async def load_engine(self) -> Engine:
        """Builds the engine on a thread of its own while the status tells how far it is."""

        def progress(detail: str, fraction: float) -> None:
            self._loop.call_soon_threadsafe(self._set_progress, detail, fraction)

        with ThreadPoolExecutor(1, thread_name_prefix="baton-load") as executor:
            self.engine = await self._loop.run_in_executor(
                executor, build_engine, self.config, self.pool_config, progress
            )
        runner = self.engine.runner
        self._status.layout.CopyFrom(layout_to_proto(runner.layout))
        self._status.model_fingerprint = runner.fingerprint
        self._status.max_model_len = runner.max_model_len
        self.set_load(self.engine.load())
        return self.engine

    @asynccontextmanager
    async def announced(self) -> AsyncIterator[None]:
        """Announces this process for the length of the block, and its end after it."""
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

    async def serve(
        self, add_services: Callable[[grpc.aio.Server], None], *, drained: Callable[[], Awaitable[None]]
    ) -> None:
        """Opens the port, tells the registry, and returns after `stop` once `drained()` has or the grace is over.

        Raises:
            UnavailableError: the port is taken.
            BaseException: whatever made the engine fail.
        """
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                # Routers ping idle streams every 10 s to notice half-open connections.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        add_services(server)
        rpc.add_WorkerServicer_to_server(self, server)
        host = self.pool_config.host
        port = self.pool_config.port_of(int(self.instance_id.rpartition("-")[2]))
        try:
            bound = server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise UnavailableError(f"{self.instance_id} cannot listen on {host}:{port}: {error}") from error
        await server.start()
        address = f"{host}:{bound}"
        if self.config.metrics.enabled:
            self._status.metrics_url = serve_metrics(self.metrics, self.config.metrics.host)
        self._status.address, self._status.ranks[0].address = address, address
        self._status.state, self._status.detail, self._status.progress = "ready", "", 1.0
        self._announcer.nudge()
        _log.info("%s is ready on %s", self.instance_id, address)
        try:
            await self.stop.wait()
        finally:
            if self.failure is None:
                self._status.state = "draining"
                self._announcer.nudge()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(drained(), _DRAIN_GRACE_S)
            await server.stop(grace=0.5)
        if self.failure is not None:
            raise self.failure

    def _set_progress(self, detail: str, fraction: float) -> None:
        self._status.detail, self._status.progress = detail, fraction
        self._announcer.nudge()

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[pb.GetStatusRequest, pb.WorkerStatus]
    ) -> pb.WorkerStatus:
        """This worker's status with the load of this moment."""
        return self._status

    async def Shutdown(
        self, request: pb.ShutdownRequest, context: grpc.aio.ServicerContext[pb.ShutdownRequest, pb.ShutdownReply]
    ) -> pb.ShutdownReply:
        """Drains and ends this process."""
        self.stop.set()
        return pb.ShutdownReply()
