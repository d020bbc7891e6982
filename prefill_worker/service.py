"""A prefill worker: reads prompts, samples the first token and ships the KV pages to the decode worker that asked.

    router --Prefill.Prefill--> [event loop: PrefillWorker] --commands--> [engine thread]
                                       |   Shipment <--offer per layer group--+
    decode worker <--Handover.Ship-----+

Life of a request here:

    Prefill call -> sender.begin + engine.add -> chunks; after each layer group the pages are offered
                 -> first token -> shipment.complete -> settled -> engine.release -> reply
    call cancelled, deadline, shipment failed -> engine.hold, shipment.abort -> settled -> engine.release -> error

The engine keeps a request's blocks (HELD) until its shipment has settled on every rank: nobody reads them any more. Of
an instance of several ranks this is the driver; the others compute its steps and ship their own layers and heads
(`part.py`), and tell how that ends (`shipments.py`).
"""

from __future__ import annotations

import asyncio

import grpc

from baton import faults
from baton.clock import MonotonicClock
from baton.config import ClusterConfig
from baton.engine.loop import EngineLoop
from baton.placement import Placement
from baton.prefill_worker.part import PrefillPart
from baton.prefill_worker.worker import PrefillWorker
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.worker.follower import follow
from baton.worker.peer import local_peer
from baton.worker.runtime import WorkerRuntime
from baton.worker.watchdog import watch_steps

__all__ = ["serve"]

_LINKS_TIMEOUT_S = 5.0


async def serve(config: ClusterConfig, *, placement: Placement, registry_address: str, stop: asyncio.Event) -> None:
    """Runs one rank of a prefill worker until `stop` is set, or its driver lets it end.

    Raises:
        BatonError: it could not start, or its instance failed.
    """
    if placement.rank != config.prefill.driver_rank:
        await follow(
            config,
            config.prefill,
            placement=placement,
            registry_address=registry_address,
            stop=stop,
            make_part=PrefillPart,
        )
        return
    runtime = WorkerRuntime(config, role="prefill", placement=placement, registry_address=registry_address, stop=stop)
    async with runtime.announced():
        try:
            await _drive(runtime)
        finally:
            await runtime.end_ranks()


async def _drive(runtime: WorkerRuntime) -> None:
    engine = await runtime.load_engine()
    worker = PrefillWorker(runtime, engine, local_peer(runtime.placement, runtime.incarnation, engine.runner))
    loop = EngineLoop(
        engine,
        clock=MonotonicClock(),
        on_step=worker.on_step,
        on_fatal=runtime.fail,
        on_layers=worker.on_layers,
        on_begin=faults.step_begins,
    )
    worker.start(loop)
    watchdog = asyncio.create_task(
        watch_steps(loop, instance_id=runtime.instance_id, floor_s=runtime.config.step_timeout_s), name="watchdog"
    )
    await worker.links.first_done(_LINKS_TIMEOUT_S)

    def add_services(server: grpc.aio.Server) -> None:
        rpc.add_PrefillServicer_to_server(worker, server)

    try:
        await runtime.serve(add_services, drained=worker.drained, give_up=worker.give_up)
    finally:
        watchdog.cancel()
        await worker.close()
        await runtime.stop_engine(loop)
