"""The prefill worker's event-loop half: one call per prompt, pages offered as layers are computed. See `service.py`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from baton import faults
from baton.clock import MonotonicClock
from baton.engine.engine import Engine, EngineLoad, StepResult
from baton.engine.loop import EngineLoop
from baton.engine.request import EngineRequest, FinishReason, RequestOutput
from baton.engine.scheduler import StepPlan
from baton.engine.sequence import Key
from baton.errors import BatonError, DeadlineError, InvalidRequestError, UnavailableError
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.shipment import DecodeTarget, ShipResult
from baton.kv_transfer.wire import FirstToken
from baton.log import mark_task
from baton.prefill_worker.link_warmer import LinkWarmer
from baton.prefill_worker.rank_shipments import ShippedRows
from baton.prefill_worker.shipments import InstanceShipment, Shipments
from baton.prefill_worker.spans import record_prefill
from baton.prefill_worker.targets import decode_target
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import logprobs_to_proto, request_from_proto
from baton.worker.peer import rank_transports
from baton.worker.runtime import WorkerRuntime

__all__ = ["PrefillWorker"]

_log = logging.getLogger(__name__)
_DEFAULT_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True, eq=False)
class _Live:
    """One prompt in this worker.

    Attributes:
        shipment: where its pages go.
        first: resolves with the first token's output.
        called_s, taken_up_s, sampled_s: arrival, begin of the step that took it up, and first token; monotonic.
    """

    shipment: InstanceShipment
    first: asyncio.Future[RequestOutput]
    called_s: float
    taken_up_s: float = 0.0
    sampled_s: float = 0.0

    @property
    def queue_s(self) -> float:
        """Until the prompt was taken up."""
        return max(self.taken_up_s - self.called_s, 0.0)

    @property
    def prefill_s(self) -> float:
        """Until the first token."""
        return max(self.sampled_s - self.called_s, 0.0)


class PrefillWorker(rpc.PrefillServicer):
    """Serves `Prefill.Prefill` on top of an engine loop and a handover sender."""

    def __init__(self, runtime: WorkerRuntime, engine: Engine, peer: LocalPeer) -> None:
        self._runtime = runtime
        self._engine = engine
        self._event_loop = asyncio.get_running_loop()
        self._clock = MonotonicClock()
        self._live: dict[Key, _Live] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._engine_loop: EngineLoop | None = None
        self._transports = rank_transports(runtime.config, runtime.placement, engine.pages.device)
        self.sender = HandoverSender(
            peer,
            transports=self._transports,
            lease_s=runtime.config.transfer.lease_s,
            checksum=None,
        )
        self.shipments = Shipments(peer, self.sender, engine.pages, tell_followers=runtime.followers.send)
        self.links = LinkWarmer(
            peer,
            self.sender,
            registry_address=runtime.registry_address,
            tell_followers=runtime.followers.send,
        )
        runtime.followers.on_part = self.shipments.on_part
        runtime.followers.on_links_warm = self.links.links_warm

    async def drained(self) -> None:
        """Returns when every prompt has settled."""
        await self._idle.wait()

    def start(self, engine_loop: EngineLoop) -> None:
        """Starts the engine thread."""
        self._engine_loop = engine_loop
        self._runtime.news.watch(engine_loop)
        engine_loop.start()
        self.sender.start()
        self.links.start()

    def give_up(self, reason: str) -> None:
        """Hands every prompt back: another worker computes it."""
        for live in self._live.values():
            self.shipments.abort(live.shipment, reason)

    async def close(self) -> None:
        """Ends every shipment and link."""
        await self.links.close()
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await self.sender.close()
        for transport in self._transports:
            transport.close()

    # ------------------------------------------------------------ engine thread

    def on_layers(self, plan: StepPlan, begin: int, end: int) -> None:
        """Offers the pages of layers [begin, end) that this step has computed."""
        rows = [
            ShippedRows(row.seq.tag, list(row.seq.block_ids), row.start, row.count) for row in plan.rows if row.seq.tag
        ]
        self.shipments.own.on_rows(rows, begin, end)

    def on_step(self, result: StepResult, step_s: float) -> None:
        """Takes a step's result over to the event loop."""
        load = self._runtime.figures.observe(self._engine, result, step_s)
        taken_up = [seq.key for seq in result.plan.admitted]
        self._event_loop.call_soon_threadsafe(
            self._after_step, result.outputs, load, taken_up, result.began_s, result.began_s + step_s
        )

    # ------------------------------------------------------------ event loop

    def _after_step(
        self,
        outputs: Sequence[RequestOutput],
        load: EngineLoad,
        taken_up: Sequence[Key] = (),
        began_s: float = 0.0,
        ended_s: float = 0.0,
    ) -> None:
        self._set_load(load)
        for key in taken_up:
            if key in self._live:
                self._live[key].taken_up_s = began_s
        for output in outputs:
            live = self._live.get((output.request_id, output.attempt))
            if live is not None and not live.first.done():
                live.sampled_s = ended_s
                live.first.set_result(output)

    def _set_load(self, load: EngineLoad) -> None:
        self._runtime.set_load(load)
        self._runtime.news.touch()

    async def Prefill(
        self,
        request: pb.PrefillRequest,
        context: grpc.aio.ServicerContext[pb.PrefillRequest, pb.PrefillReply],
    ) -> pb.PrefillReply:
        """Computes one prompt and ships its pages; returns when they are settled at the decode worker."""
        timeout_s = request.timeout_s or _DEFAULT_TIMEOUT_S
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            timeout_s = min(timeout_s, remaining_s)
        try:
            return await self._prefill(request, timeout_s)
        except BatonError as error:
            _log.warning("prefill of %s failed: %s", request.request.request_id, error)
            await context.abort(grpc.StatusCode[error.grpc_status], str(error))
            raise AssertionError("abort raises") from error

    async def _prefill(self, message: pb.PrefillRequest, timeout_s: float) -> pb.PrefillReply:
        request = request_from_proto(message.request)
        key = (request.request_id, request.attempt)
        if key in self._live:
            raise InvalidRequestError(f"request {key[0]} attempt {key[1]} is already being prefilled here")
        if self._runtime.stop.is_set():
            raise UnavailableError(f"{self._runtime.instance_id} is draining")
        if faults.active is not None:
            faults.strike("submit", tokens=request.prompt_token_ids)
        mark_task(key[0], attempt=key[1])
        num_tokens = request.num_tokens
        shipment = self.shipments.begin(
            HandoverKey(*key, message.handover),
            _target(message),
            timeout_s=timeout_s,
            num_tokens=num_tokens,
            in_one_message=num_tokens < self._runtime.config.transfer.one_message_below_tokens,
        )
        live = _Live(shipment, self._event_loop.create_future(), self._clock.now_s())
        self._live[key] = live
        self._idle.clear()
        outcome = "given up"
        try:
            async with asyncio.timeout(timeout_s):
                result = await self._run(request, live)
            outcome = ""
            return self._reply(live, result)
        except BatonError as error:
            outcome = str(error)
            raise
        except TimeoutError as error:
            raise DeadlineError(
                f"prefill of {key[0]} for {message.decode_address} did not settle within {timeout_s:.1f} s"
            ) from error
        finally:
            if request.traceparent:
                times = (live.called_s, live.taken_up_s, live.sampled_s, self._clock.now_s())
                record_prefill(self._runtime.tracing, request, times, error=outcome)
            # Also on cancellation: shielded, so that the blocks settle even though the caller has gone.
            await asyncio.shield(asyncio.ensure_future(self._settle(key, live)))

    async def _run(self, request: EngineRequest, live: _Live) -> ShipResult:
        def add(engine: Engine) -> None:
            error = engine.add(request, prefill_only=True, tag=live.shipment.tag)
            if error:
                output = RequestOutput(request_id=request.request_id, attempt=request.attempt, error=error)
                output.finish_reason = FinishReason.ERROR
                self._event_loop.call_soon_threadsafe(self._after_step, [output], engine.load())

        self._command(add)
        # A shipment that fails early (refused, decode worker gone) ends the computation too.
        settled = asyncio.shield(live.shipment.settled)
        try:
            waits: set[asyncio.Future[Any]] = {live.first, settled}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not live.first.done():
                return await settled
            output = live.first.result()
            if output.finish_reason is FinishReason.ERROR:
                self.shipments.abort(live.shipment, output.error)
                raise InvalidRequestError(output.error)
            self.shipments.complete(
                live.shipment,
                FirstToken(
                    token_id=output.token_ids[0],
                    logprobs=logprobs_to_proto(output.logprobs[0]) if output.logprobs else None,
                    cached_tokens=output.cached_tokens,
                    prefill_s=live.prefill_s,
                    queue_s=live.queue_s,
                    sampled_s=live.sampled_s,
                ),
            )
            return await settled
        finally:
            settled.cancel()

    async def _settle(self, key: Key, live: _Live) -> None:
        """Stops the work, waits until nobody reads the pages, frees the blocks."""
        self._command(lambda engine: engine.hold(key))
        self.shipments.abort(live.shipment, "the prefill ended")
        with contextlib.suppress(BatonError):
            await asyncio.shield(live.shipment.settled)
        self._live.pop(key, None)
        if not self._live:
            self._idle.set()

        def release(engine: Engine) -> None:
            engine.release(key)
            load = self._runtime.figures.publish(engine.load())
            self._event_loop.call_soon_threadsafe(self._set_load, load)

        self._command(release)

    def _reply(self, live: _Live, result: ShipResult) -> pb.PrefillReply:
        metrics = self._runtime.metrics
        metrics.handover_s.observe(result.exposed_s)
        metrics.handover_bytes.inc(result.num_bytes)
        metrics.handovers.labels(outcome="attached").inc()
        return pb.PrefillReply(
            shipped_bytes=result.num_bytes,
            shipped_tokens=result.num_tokens,
            prefill_s=live.prefill_s,
            queue_s=live.queue_s,
            exposed_transfer_s=result.exposed_s,
            load=self._runtime.status().load,
        )

    def _command(self, command: Callable[[Engine], object]) -> None:
        assert self._engine_loop is not None
        self._engine_loop.submit(command)


def _target(message: pb.PrefillRequest) -> DecodeTarget:
    """Where the request says that its pages go."""
    only = pb.RankAddress(address=message.decode_address, incarnation=message.decode_incarnation)
    return decode_target(message.decode_ranks or [only], message.decode_layout)
