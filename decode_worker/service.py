"""A decode worker: takes requests from routers, pages from prefill workers, and streams tokens back.

    router --Decode.Stream--> [event loop: DecodeWorker] --commands--> [engine thread]
                                    ^      |                               |
    prefill worker --Handover.Ship--+      +<------ step results ----------+

Life of a request here (all of it decided on the event loop, all engine state on the engine thread):

    Submit, local   -> engine.add ------------------------------------------------> tokens ... end
    Submit, remote  -> engine.add(remote) -> RESERVED -> receiver.open_reservation
                          landed  -> engine.attach (first token) -----------------> tokens ... end
                          failed  -> (settled) -> engine.prefill_here ------------> tokens ... end
    Cancel / stream broken -> receiver.cancel -> (settled) -> engine.release -----> "abort"

Blocks of a reservation go back only after the receiver has settled it: no thread writes into them any more.
"""

from __future__ import annotations

import asyncio
import logging

import grpc

from baton.clock import MonotonicClock
from baton.config import ClusterConfig
from baton.decode_worker.worker import DecodeWorker
from baton.engine.loop import EngineLoop
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.worker.peer import local_peer
from baton.worker.runtime import WorkerRuntime

__all__ = ["serve"]

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 10.0


async def serve(config: ClusterConfig, *, instance_id: str, registry_address: str, stop: asyncio.Event) -> None:
    """Runs a decode worker until `stop` is set.

    Raises:
        BatonError: it could not start, or its engine failed.
    """
    runtime = WorkerRuntime(
        config, role="decode", instance_id=instance_id, registry_address=registry_address, stop=stop
    )
    async with runtime.announced():
        engine = await runtime.load_engine()
        worker = DecodeWorker(runtime, engine, local_peer(runtime, engine))
        loop = EngineLoop(engine, clock=MonotonicClock(), on_step=worker.on_step, on_fatal=runtime.fail)
        worker.start(loop)

        def add_services(server: grpc.aio.Server) -> None:
            rpc.add_DecodeServicer_to_server(worker, server)
            rpc.add_HandoverServicer_to_server(worker.receiver, server)

        try:
            await runtime.serve(add_services, drained=worker.drained)
        finally:
            await worker.close()
            await asyncio.to_thread(loop.stop, _STOP_TIMEOUT_S)
