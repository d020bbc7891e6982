"""A router process: everything wired together, announced, and drained on stop.

starting --first decode worker connected--> ready --stop--> draining --nothing runs, or grace over--> gone
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import time
from collections.abc import AsyncIterator

import grpc
import uvicorn

from baton.config import ClusterConfig, resolve_model_path, split_host_port
from baton.engine.tokenizer import Tokenizer
from baton.errors import ConfigError
from baton.metrics import Metrics
from baton.placement import Placement
from baton.proto.announce import Announcer
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.set_faults import set_faults
from baton.proto.watch import watch_registry
from baton.router import limits
from baton.router.admission import Admission
from baton.router.channels import SERVER_OPTIONS
from baton.router.client import GenerationClient
from baton.router.direct import DirectProtocol
from baton.router.dispatch import Dispatcher
from baton.router.ejection import EjectionConfig
from baton.router.frontend import Frontend
from baton.router.grpc import InferenceServer
from baton.router.http import build_app
from baton.router.instances import InstanceTable
from baton.router.model_card import read_model_card
from baton.router.policy import PolicyConfig

__all__ = ["serve"]

_log = logging.getLogger(__name__)
_HTTP_BACKLOG = 2048


async def serve(config: ClusterConfig, *, placement: Placement, registry_address: str, stop: asyncio.Event) -> None:
    """Serve HTTP and gRPC until `stop` is set, then finish what runs within `config.stop_grace_s`.

    Raises:
        ConfigError: an address cannot be listened on, or a number does not suit the model.
        CheckpointError: the model folder lacks something the router needs.
    """
    instance_id = placement.instance_id
    async with contextlib.AsyncExitStack() as stack:
        frontend = await asyncio.to_thread(_build_frontend, config, instance_id)
        stack.push_async_callback(frontend.dispatcher.close)
        status = pb.WorkerStatus(
            instance_id=instance_id,
            role="router",
            state="starting",
            incarnation=os.urandom(16),
            detail="waiting for a decode worker",
            max_model_len=frontend.card.max_model_len,
        )

        def now_status() -> pb.WorkerStatus:
            status.load.running_requests = frontend.client.num_running
            return status

        ended = asyncio.Event()
        announcer = Announcer(registry_address, now_status)
        status.address = await stack.enter_async_context(_worker_server(now_status, stop))
        status.ranks.add(rank=0, pid=os.getpid(), address=status.address, host=placement.host)
        status.http_url = await stack.enter_async_context(_http_server(config.router.http, frontend))
        status.metrics_url = f"{status.http_url}/metrics"
        inference = InferenceServer(frontend)
        status.grpc_address = await _start_grpc(inference, config.router.grpc)
        stack.push_async_callback(inference.stop, 0.0)
        background = [
            asyncio.create_task(announcer.run(ended), name="announce"),
            asyncio.create_task(_follow_registry(registry_address, instance_id, frontend, ended), name="watch"),
            asyncio.create_task(_publish_readiness(frontend, inference, status, announcer), name="readiness"),
        ]
        stack.push_async_callback(_end, background, ended, announcer)
        # What was imported stays: collections that went through it would hold all streams up.
        gc.freeze()
        _log.info("%s listens on %s and %s (gRPC)", instance_id, status.http_url, status.grpc_address)
        await stop.wait()
        frontend.draining = True
        status.state, status.detail = "draining", ""
        announcer.nudge()
        frontend.dispatcher.changed.set()
        await _drain(frontend, config.stop_grace_s)


def _build_frontend(config: ClusterConfig, instance_id: str) -> Frontend:
    folder = resolve_model_path(config.model.path)
    tokenizer = Tokenizer.from_dir(folder)
    card = read_model_card(
        folder,
        tokenizer,
        model_id=config.served_model_name,
        root=config.model.path,
        max_model_len=config.model.max_model_len,
        dtype=config.model.dtype,
        created_s=int(time.time()),
    )
    metrics = Metrics("router")
    table = InstanceTable()
    dispatcher = Dispatcher(
        table,
        metrics,
        router_id=instance_id,
        policy=PolicyConfig(
            local_prefill_threshold_tokens=config.router.local_prefill_threshold_tokens,
            max_local_prefill_tokens=config.max_local_prefill_tokens,
        ),
        handover_timeout_s=config.transfer.handover_timeout_s,
        silence_s=config.router.silence_s,
        ejection=EjectionConfig(threshold=config.router.eject_slowness, abandon=config.router.abandon_slowness),
    )
    admission = Admission(max_requests=config.router.max_queued_requests, max_tokens=config.router.max_queued_tokens)
    client = GenerationClient(
        dispatcher, tokenizer, admission, metrics, request_timeout_s=config.router.request_timeout_s
    )
    return Frontend(
        card=card,
        tokenizer=tokenizer,
        client=client,
        dispatcher=dispatcher,
        table=table,
        metrics=metrics,
        api_key=config.router.api_key,
        idempotency_ttl_s=config.router.idempotency_ttl_s,
    )


async def _follow_registry(address: str, watcher_id: str, frontend: Frontend, ended: asyncio.Event) -> None:
    def on_list(instances: pb.InstanceList) -> None:
        frontend.table.apply(instances.instances)
        frontend.dispatcher.reconcile()

    await watch_registry(address, watcher_id, on_list, ended)


async def _publish_readiness(
    frontend: Frontend, inference: InferenceServer, status: pb.WorkerStatus, announcer: Announcer
) -> None:
    changed = frontend.dispatcher.changed
    while True:
        await changed.wait()
        changed.clear()
        await inference.update_health()
        # Once ready it stays so for the registry: losing workers is their state, not this process's.
        if status.state == "starting" and frontend.ready:
            status.state, status.detail, status.progress = "ready", "", 1.0
            announcer.nudge()


@contextlib.asynccontextmanager
async def _http_server(address: str, frontend: Frontend) -> AsyncIterator[str]:
    listener = _listen(address)
    config = uvicorn.Config(
        build_app(frontend),
        http=DirectProtocol,
        loop="none",
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_HTTP_BACKLOG,
        h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
    )
    server = _EmbeddedServer(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        host, port = listener.getsockname()[:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        listener.close()


class _EmbeddedServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Signals are the process's business, not this server's."""
        yield


def _listen(address: str) -> socket.socket:
    host, port = split_host_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"router.http: cannot listen on {address}: {error.strerror or error}") from error
    listener.listen(_HTTP_BACKLOG)
    listener.setblocking(False)
    return listener


async def _start_grpc(inference: InferenceServer, address: str) -> str:
    host, _ = split_host_port(address)
    try:
        port = await inference.start(address)
    except RuntimeError as error:
        raise ConfigError(f"router.grpc: cannot listen on {address}: is the port taken?") from error
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Worker(rpc.WorkerServicer):
    def __init__(self, status: object, stop: asyncio.Event) -> None:
        self._status = status
        self._stop = stop

    async def GetStatus(self, request: pb.GetStatusRequest, context: object) -> pb.WorkerStatus:
        """This process's status."""
        assert callable(self._status)
        status: pb.WorkerStatus = self._status()
        return status

    async def Shutdown(self, request: pb.ShutdownRequest, context: object) -> pb.ShutdownReply:
        """Drain, then end."""
        self._stop.set()
        return pb.ShutdownReply()

    async def SetFaults(self, request: pb.SetFaultsRequest, context: object) -> pb.SetFaultsReply:
        """Replace this process's faults."""
        return await set_faults(request, context)


@contextlib.asynccontextmanager
async def _worker_server(status: object, stop: asyncio.Event) -> AsyncIterator[str]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    rpc.add_WorkerServicer_to_server(_Worker(status, stop), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0.0)


async def _drain(frontend: Frontend, grace_s: float) -> None:
    try:
        await asyncio.wait_for(frontend.client.idle.wait(), grace_s)
    except TimeoutError:
        _log.warning("%d requests still ran when the grace of %.0f s was over", frontend.client.num_running, grace_s)


async def _end(background: list[asyncio.Task[None]], ended: asyncio.Event, announcer: Announcer) -> None:
    ended.set()
    announcer.nudge()
    _, late = await asyncio.wait(background[:1], timeout=1.0)
    for task in (*late, *background[1:]):
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
