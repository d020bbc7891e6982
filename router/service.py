"""A router process: everything wired together, announced, and drained on stop.

starting --first decode worker connected--> ready --stop--> draining --nothing runs, or grace over--> gone

One of several routers (`router.replicas`) listens on the shared ports from ready on, and no longer once it drains; it
knows nothing of the others, beyond what `state` holds for all of them. `/admin/`, on a port of its own, is there all
the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import time
from collections.abc import AsyncIterator

import grpc

from baton.collector import leave_out_what_stays
from baton.config import ClusterConfig, resolve_model_path
from baton.engine.tokenizer import Tokenizer
from baton.metrics import Metrics
from baton.metrics_server import serve_pages
from baton.placement import Placement
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.set_faults import set_faults
from baton.router.admin import build_admin
from baton.router.admin_port import AdminPort
from baton.router.admin_sources import admin_sources
from baton.router.admission.capacity import Capacity
from baton.router.admission.gate import Gate
from baton.router.channels import server_options
from baton.router.client import GenerationClient
from baton.router.costs.model import CostModel
from baton.router.decisions import Decisions
from baton.router.dispatch import Dispatcher
from baton.router.doors import Doors
from baton.router.ejection import EjectionConfig
from baton.router.frontend import Frontend
from baton.router.instances import InstanceTable
from baton.router.membership import follow_cluster
from baton.router.model_card import read_model_card
from baton.router.routing.policies import make_policy
from baton.router.salt import salt_of
from baton.router.sessions import Sessions
from baton.router.timelines import Timelines
from baton.router.validation import GenerationSpec
from baton.state.announce import Announcements
from baton.state.base import SharedState
from baton.state.open import is_shared, open_state
from baton.tracing import Tracing, open_tracing

__all__ = ["serve"]

_log = logging.getLogger(__name__)
_SURELY_SOON_S = 0.05
"""Who is predicted to begin within this is looked up in no worker's cache to see whether it would be sooner."""
_LOOKAHEAD_STEPS = 3
"""Of prompt that wait for a worker: so that it is never idle, and that no more is decided before it need be."""
_COLLECT_AFTER_OBJECTS = 20_000
_FLUSH_SPANS_S = 1.0


async def serve(config: ClusterConfig, *, placement: Placement, registry_address: str, stop: asyncio.Event) -> None:
    """Serve HTTP and gRPC until `stop` is set, then finish what runs within `config.stop_grace_s`.

    Raises:
        ConfigError: an address cannot be listened on, or a number does not suit the model.
        CheckpointError: the model folder lacks something the router needs.
    """
    instance_id, incarnation = placement.instance_id, os.urandom(16)
    is_one_of_many = config.router.replicas > 1
    async with contextlib.AsyncExitStack() as stack:
        state = open_state(config.state, cluster=config.name)
        stack.push_async_callback(state.close)
        # Workers hold a stream for each router that they know by this; a restarted one is another.
        router_id = f"{instance_id}-{incarnation.hex()[:8]}"
        tracing = open_tracing(config.tracing, role="router", instance_id=instance_id)
        if tracing.is_on:
            stack.push_async_callback(asyncio.to_thread, tracing.close, _FLUSH_SPANS_S)
        frontend = await asyncio.to_thread(_build_frontend, config, router_id, state, tracing)
        stack.push_async_callback(frontend.dispatcher.close)
        stack.push_async_callback(frontend.client.close)
        status = pb.WorkerStatus(
            instance_id=instance_id,
            role="router",
            state="starting",
            incarnation=incarnation,
            detail="waiting for a decode worker",
            max_model_len=frontend.card.max_model_len,
        )

        def now_status() -> pb.WorkerStatus:
            status.load.running_requests = frontend.client.num_running
            return status

        admin = AdminPort(
            build_admin(admin_sources(config, frontend, instance_id)), config.router.admin_of(placement.index)
        )
        admin.open()
        stack.push_async_callback(admin.close)
        status.admin_url = admin.url
        ended = asyncio.Event()
        shared = state if is_shared(config.state) else None
        announcements = Announcements(registry_address, now_status, shared)
        status.address = await stack.enter_async_context(_worker_server(now_status, stop))
        status.ranks.add(rank=0, pid=os.getpid(), address=status.address, host=placement.host)
        doors = Doors(
            frontend,
            http=config.router.http,
            grpc=config.router.grpc,
            is_shared=is_one_of_many,
            grace_s=config.stop_grace_s,
        )
        stack.push_async_callback(doors.close)
        if not is_one_of_many:
            await _open(doors, status, config, frontend)
        background = [
            asyncio.create_task(announcements.run(ended), name="announce"),
            asyncio.create_task(_follow(registry_address, instance_id, shared, frontend, ended), name="watch"),
        ]
        stack.push_async_callback(_end, background, ended, announcements)
        leave_out_what_stays()
        # What requests leave behind is seldom a cycle, and each look at it goes through all prompts in work.
        gc.set_threshold(_COLLECT_AFTER_OBJECTS, 5, 5)
        if is_one_of_many and await _until_ready(frontend, stop):
            await _open(doors, status, config, frontend)
        background.append(
            asyncio.create_task(_publish_readiness(frontend, doors, status, announcements), name="readiness")
        )
        await stop.wait()
        frontend.draining = True
        doors.turn_away()
        status.state, status.detail = "draining", ""
        announcements.nudge()
        frontend.dispatcher.changed.set()
        await _drain(frontend, config.stop_grace_s)


async def _open(doors: Doors, status: pb.WorkerStatus, config: ClusterConfig, frontend: Frontend) -> None:
    await doors.open()
    status.http_url, status.grpc_address = doors.http_url, doors.grpc_address
    status.metrics_url = f"{doors.http_url}/metrics"
    if config.router.replicas > 1 and config.metrics.enabled:
        # Behind a shared port each scrape would meet another router.
        status.metrics_url = serve_pages(frontend.metrics_pages(), config.metrics.host)
    _log.info("%s listens on %s and %s (gRPC)", status.instance_id, status.http_url, status.grpc_address)


async def _until_ready(frontend: Frontend, stop: asyncio.Event) -> bool:
    """Whether a decode worker is connected; false once the router is told to stop."""
    changed = frontend.dispatcher.changed
    stopping = asyncio.create_task(stop.wait())
    try:
        while not frontend.ready and not stop.is_set():
            change = asyncio.create_task(changed.wait())
            await asyncio.wait({change, stopping}, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
            changed.clear()
    finally:
        stopping.cancel()
    changed.set()
    return not stop.is_set()


def _build_frontend(config: ClusterConfig, router_id: str, state: SharedState, tracing: Tracing) -> Frontend:
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
        router_id=router_id,
        policy=make_policy(config.routing),
        costs=CostModel(
            max_local_prefill_tokens=config.max_local_prefill_tokens,
            decode_batch_tokens=config.decode.max_batch_tokens,
            prefill_batch_tokens=config.prefill.max_batch_tokens,
        ),
        handover_timeout_s=config.transfer.handover_timeout_s,
        silence_s=config.router.silence_s,
        ejection=EjectionConfig(threshold=config.router.eject_slowness, abandon=config.router.abandon_slowness),
        shared=state if is_shared(config.state) else None,
        decisions=Decisions(config.router.kept_requests),
    )
    gate = Gate(
        config.admission,
        max_requests=config.router.max_queued_requests,
        max_tokens=config.router.max_queued_tokens,
        capacity=Capacity(
            default_slots=config.decode.max_batch_size,
            prefill_lookahead_tokens=_LOOKAHEAD_STEPS * config.prefill.max_batch_tokens,
            decode_lookahead_tokens=max(
                _LOOKAHEAD_STEPS * config.max_local_prefill_tokens,
                config.decode.max_batch_tokens if config.is_colocated else 0,
            ),
        ),
        views=table.views,
        metrics=metrics,
        predict_ttft_s=lambda spec: _predict_ttft_s(dispatcher, spec),
        state=state if is_shared(config.state) else None,
        num_routers=config.router.replicas,
    )
    dispatcher.on_room = gate.nudge
    client = GenerationClient(
        dispatcher,
        tokenizer,
        gate,
        metrics,
        request_timeout_s=config.router.request_timeout_s,
        model=config.served_model_name,
        tracing=tracing,
        sessions=Sessions(state if is_shared(config.state) else None),
        timelines=Timelines(config.router.kept_requests),
    )
    return Frontend(
        card=card,
        tokenizer=tokenizer,
        client=client,
        dispatcher=dispatcher,
        table=table,
        metrics=metrics,
        api_key=config.router.api_key,
        tenant_keys={key: name for name, each in config.admission.tenants.items() for key in each.api_keys},
        idempotency_ttl_s=config.router.idempotency_ttl_s,
        logs_requests=config.log.requests,
        vllm_aliases=config.metrics.vllm_aliases,
        state=state,
    )


def _predict_ttft_s(dispatcher: Dispatcher, spec: GenerationSpec) -> float | None:
    """From a dispatch now to the first token of the choice with the longest prompt."""
    longest = max((choice.prompt_token_ids for choice in spec.choices), key=len)
    asked_s = spec.slo.ttft_s if spec.slo is not None else None
    limit_s = _SURELY_SOON_S if asked_s is None else min(asked_s, _SURELY_SOON_S)
    return dispatcher.predict_ttft_s(longest, salt_of(spec.tenant, spec.cache_salt), limit_s=limit_s)


async def _follow(
    registry_address: str, watcher_id: str, shared: SharedState | None, frontend: Frontend, ended: asyncio.Event
) -> None:
    def on_view(statuses: list[pb.WorkerStatus]) -> None:
        frontend.table.apply(statuses)
        frontend.client.set_num_routers(sum(status.role == "router" for status in statuses))
        frontend.dispatcher.reconcile()

    await follow_cluster(registry_address, watcher_id, shared, on_view, ended)


async def _publish_readiness(
    frontend: Frontend, doors: Doors, status: pb.WorkerStatus, announcements: Announcements
) -> None:
    changed = frontend.dispatcher.changed
    while True:
        await changed.wait()
        changed.clear()
        await doors.inference.update_health()
        # Once ready it stays so for the registry: losing workers is their state, not this process's.
        if status.state == "starting" and frontend.ready and doors.are_open:
            status.state, status.detail, status.progress = "ready", "", 1.0
            announcements.nudge()


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
    server = grpc.aio.server(options=server_options())
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


async def _end(background: list[asyncio.Task[None]], ended: asyncio.Event, announcements: Announcements) -> None:
    ended.set()
    announcements.nudge()
    _, late = await asyncio.wait(background[:1], timeout=1.0)
    for task in (*late, *background[1:]):
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
