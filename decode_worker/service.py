"""A decode worker: takes requests from routers, pages from prefill workers, and streams tokens back.

    router --Decode.Stream--> [event loop: DecodeWorker] --commands--> [engine thread]
                                    ^      |                               |
    prefill worker --Handover.Ship--+      +<------ step results ----------+

Life of a request here (all of it decided on the event loop, all engine state on the engine thread):

    Submit, local   -> engine.add ------------------------------------------------> tokens ... end
    Submit, remote  -> engine.add(remote) -> RESERVED -> receiver.open_reservation
                          landed  -> engine.attach (first token) -----------------> tokens ... end
                          failed  -> (settled) -> engine.prefill_here ------------> tokens ... end
                          another prefill worker tries -> (settled) -> receiver.open_reservation, over the same blocks
    Cancel / stream broken -> receiver.cancel -> (settled) -> engine.release -----> "abort"

What becomes of the pages is decided in `remote_prefill.py`. Blocks of a reservation go back only after the receivers of
all ranks have settled it: no thread writes into them any more. Of an instance of several ranks this is the driver; the
others compute its steps and receive their own layers and heads of the pages (`part.py`), and tell how that ends
(`reservations.py`).
"""

from __future__ import annotations

import asyncio
import sys

import grpc

from baton import faults
from baton.clock import MonotonicClock
from baton.config import ClusterConfig
from baton.decode_worker.part import DecodePart
from baton.decode_worker.worker import DecodeWorker
from baton.engine.loop import EngineLoop
from baton.placement import Placement
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.worker.follower import follow
from baton.worker.peer import local_peer
from baton.worker.runtime import WorkerRuntime
from baton.worker.watchdog import watch_steps

__all__ = ["serve"]

_SWITCH_INTERVAL_S = 0.0005


async def serve(config: ClusterConfig, *, placement: Placement, registry_address: str, stop: asyncio.Event) -> None:
    """Runs one rank of a decode worker until `stop` is set, or its driver lets it end.

    Raises:
        BatonError: it could not start, or its instance failed.
    """
    if placement.rank != config.decode.driver_rank:
        await follow(
            config,
            config.decode,
            placement=placement,
            registry_address=registry_address,
            stop=stop,
            make_part=DecodePart,
        )
        return
    runtime = WorkerRuntime(config, role="decode", placement=placement, registry_address=registry_address, stop=stop)
    async with runtime.announced():
        try:
            await _drive(runtime)
        finally:
            await runtime.end_ranks()


async def _drive(runtime: WorkerRuntime) -> None:
    engine = await runtime.load_engine()
    worker = DecodeWorker(runtime, engine, local_peer(runtime.placement, runtime.incarnation, engine.runner))
    loop = EngineLoop(
        engine, clock=MonotonicClock(), on_step=worker.on_step, on_fatal=runtime.fail, on_begin=faults.step_begins
    )
    # Where the event loop computes while a kernel ends, the engine's thread gets the interpreter back soon.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    worker.start(loop)
    watchdog = asyncio.create_task(
        watch_steps(loop, instance_id=runtime.instance_id, floor_s=runtime.config.step_timeout_s), name="watchdog"
    )

    def add_services(server: grpc.aio.Server) -> None:
        rpc.add_DecodeServicer_to_server(worker, server)
        rpc.add_HandoverServicer_to_server(worker.reservations.receiver, server)

    try:
        await runtime.serve(add_services, drained=worker.drained, give_up=worker.give_up)
    finally:
        watchdog.cancel()
        await worker.close()
        await runtime.stop_engine(loop)
