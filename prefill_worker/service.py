"""A prefill worker: reads prompts, samples the first token and ships the KV pages to the decode worker that asked.

    router --Prefill.Prefill--> [event loop: PrefillWorker] --commands--> [engine thread]
                                       |   Shipment <--offer per layer group--+
    decode worker <--Handover.Ship-----+

Life of a request here:

    Prefill call -> sender.begin + engine.add -> chunks; after each layer group the pages are offered
                 -> first token -> shipment.complete -> settled -> engine.release -> reply
    call cancelled, deadline, shipment failed -> engine.hold, shipment.abort -> settled -> engine.release -> error

The engine keeps a request's blocks (HELD) until its shipment has settled: nobody reads them any more.
"""

from __future__ import annotations

import asyncio

import grpc

from baton.clock import MonotonicClock
from baton.config import ClusterConfig
from baton.engine.loop import EngineLoop
from baton.prefill_worker.worker import PrefillWorker
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.worker.peer import local_peer
from baton.worker.runtime import WorkerRuntime

__all__ = ["serve"]

_STOP_TIMEOUT_S = 10.0


async def serve(config: ClusterConfig, *, instance_id: str, registry_address: str, stop: asyncio.Event) -> None:
    """Runs a prefill worker until `stop` is set.

    Raises:
        BatonError: it could not start, or its engine failed.
    """
    runtime = WorkerRuntime(
        config, role="prefill", instance_id=instance_id, registry_address=registry_address, stop=stop
    )
    async with runtime.announced():
        engine = await runtime.load_engine()
        worker = PrefillWorker(runtime, engine, local_peer(runtime, engine))
        loop = EngineLoop(
            engine,
            clock=MonotonicClock(),
            on_step=worker.on_step,
            on_fatal=runtime.fail,
            on_layers=worker.on_layers,
        )
        worker.start(loop)

        def add_services(server: grpc.aio.Server) -> None:
            rpc.add_PrefillServicer_to_server(worker, server)

        try:
            await runtime.serve(add_services, drained=worker.drained)
        finally:
            await worker.close()
            await asyncio.to_thread(loop.stop, _STOP_TIMEOUT_S)
