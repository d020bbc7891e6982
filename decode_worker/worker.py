"""The decode worker's event-loop half: commands in, token streams out, reservations between. See `service.py`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
from torch import Tensor

from baton import faults
from baton.decode_worker.reservations import Reservations
from baton.decode_worker.session import Live, Session
from baton.engine.engine import Engine, EngineLoad, Said, StepResult, spell_out
from baton.engine.loop import EngineLoop
from baton.engine.request import FinishReason, RequestOutput
from baton.engine.sequence import Key
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import PageRange
from baton.kv_transfer.wire import FirstToken
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import logprobs_from_proto, output_to_proto, request_from_proto
from baton.worker.figures import load_to_proto
from baton.worker.peer import rank_transports
from baton.worker.runtime import PROTOCOL_VERSION, WorkerRuntime

__all__ = ["DecodeWorker"]

_log = logging.getLogger(__name__)
_LOAD_EVERY_S = 0.05
_BEATS_PER_SILENCE = 5
_CLOSE_TIMEOUT_S = 5.0


class DecodeWorker(rpc.DecodeServicer):
    """Serves `Decode.Stream` on top of an engine loop and a handover receiver."""

    def __init__(self, runtime: WorkerRuntime, engine: Engine, peer: LocalPeer) -> None:
        self._runtime = runtime
        self._engine = engine
        self._event_loop = asyncio.get_running_loop()
        self._live: dict[Key, Live] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._sessions: set[Session] = set()
        self._load_sent_s = 0.0
        self._beats: asyncio.Task[None] | None = None
        self._given_up = ""
        self._engine_loop: EngineLoop | None = None
        self._transports = rank_transports(runtime.config, runtime.placement, engine.pages.device)
        self.reservations = Reservations(
            peer,
            tell_followers=runtime.followers.send,
            on_landed=self._on_landed,
            on_failed=self._on_failed,
            on_settled=self._on_settled,
            transports=self._transports,
            write_pages=self._write_pages,
            lease_s=runtime.config.transfer.lease_s,
            checksum=None,
        )
        runtime.followers.on_part = self.reservations.on_part

    async def drained(self) -> None:
        """Returns when no request is left."""
        await self._idle.wait()

    def start(self, engine_loop: EngineLoop) -> None:
        """Starts the engine thread and the receiver's clock."""
        self._engine_loop = engine_loop
        engine_loop.start()
        self.reservations.receiver.start()
        self._beats = asyncio.create_task(self._beat(), name="beats")

    def give_up(self, reason: str) -> None:
        """Hands every request back to its router, which goes on with it elsewhere; those that come from now on too."""
        self._given_up = reason
        for live in list(self._live.values()):
            self._cancel(live, reason)

    async def close(self) -> None:
        """Ends every request and every link; blocks settle first."""
        if self._beats is not None:
            self._beats.cancel()
        for live in list(self._live.values()):
            self._cancel(live, "the worker is stopping")
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await self.reservations.receiver.close()
        for transport in self._transports:
            transport.close()

    # ------------------------------------------------------------ engine thread

    def on_step(self, result: StepResult, step_s: float) -> None:
        """Takes a step's result over to the event loop."""
        load = self._runtime.figures.observe(self._engine, result, step_s)
        reserved = [
            (seq.key, list(seq.block_ids), seq.num_computed, len(seq.token_ids)) for seq in result.plan.reserved
        ]
        self._event_loop.call_soon_threadsafe(self._after_step, result.said, reserved, load)

    # ------------------------------------------------------------ the receiver's fetching threads

    def _write_pages(self, block_ids: tuple[int, ...], pages: PageRange, payload: Tensor) -> int:
        return self._engine.pages.scatter(block_ids, pages.layers, pages.tokens, payload, heads=pages.heads)

    # ------------------------------------------------------------ event loop: the router's stream

    async def Stream(
        self,
        request_iterator: AsyncIterator[pb.DecodeCommand],
        context: grpc.aio.ServicerContext[pb.DecodeCommand, pb.DecodeEvent],
    ) -> AsyncIterator[pb.DecodeEvent]:
        """One router's stream; its end, for whatever reason, ends the requests that came on it."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("command") != "hello":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the first command must be hello")
            return
        if first.hello.protocol_version != PROTOCOL_VERSION:
            text = f"router speaks protocol {first.hello.protocol_version}, this worker {PROTOCOL_VERSION}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
            return
        session = Session(first.hello.router_id)
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(session, request_iterator), name=f"read {session.router_id}")
        welcome = pb.Welcome(instance_id=self._runtime.instance_id, incarnation=self._runtime.incarnation)
        session.outbox.put_nowait(pb.DecodeEvent(welcome=welcome, load=self._runtime.status().load))
        reader.add_done_callback(lambda _: session.outbox.put_nowait(None))
        try:
            while (event := await session.outbox.get()) is not None:
                yield event
        finally:
            reader.cancel()
            self._sessions.discard(session)
            for key in list(session.keys):
                self._cancel(self._live[key], f"the stream of router {session.router_id} ended")
        with contextlib.suppress(asyncio.CancelledError):
            await reader

    async def _beat(self) -> None:
        """Says on every stream that this process lives."""
        beat = pb.DecodeEvent(beat=pb.Beat(incarnation=self._runtime.incarnation))
        while True:
            await asyncio.sleep(self._runtime.config.router.silence_s / _BEATS_PER_SILENCE)
            for session in self._sessions:
                # Where something waits to be read a beat says no more; who reads nothing gets no heap of them.
                if session.outbox.empty():
                    session.outbox.put_nowait(beat)

    async def _read(self, session: Session, commands: AsyncIterator[pb.DecodeCommand]) -> None:
        async for command in commands:
            kind = command.WhichOneof("command")
            if kind == "submit":
                self._submit(session, command.submit)
            elif kind == "cancel":
                live = self._live.get((command.cancel.request_id, command.cancel.attempt))
                if live is not None:
                    self._cancel(live, "cancelled by the router")
            elif kind == "prefill_failed":
                failed = command.prefill_failed
                live = self._live.get((failed.request_id, failed.attempt))
                if live is not None:
                    self._fall_back(live, failed.reason)
            else:
                _log.warning("router %s sent an unknown command %r; ignored", session.router_id, kind)

    def _submit(self, session: Session, submit: pb.Submit) -> None:
        request = request_from_proto(submit.request)
        key = (request.request_id, request.attempt)
        if faults.active is not None:
            faults.strike("submit", tokens=request.prompt_token_ids)
        remote = submit.remote_prefill
        if self._given_up:
            self._send(session, RequestOutput(
                request_id=key[0], attempt=key[1], error=self._given_up, finish_reason=FinishReason.ABORT
            ))  # fmt: skip
            return
        if key in self._live:
            error = f"request {key[0]} attempt {key[1]} is already running here"
            self._send(session, RequestOutput(
                request_id=key[0], attempt=key[1], error=error, finish_reason=FinishReason.ERROR
            ))  # fmt: skip
            return
        timeout_s = submit.handover_timeout_s or self._runtime.config.transfer.handover_timeout_s
        live = Live(key, session, remote, timeout_s, submit.number)
        self._live[key] = live
        self._idle.clear()
        session.keys.add(key)

        def add(engine: Engine) -> None:
            error = engine.add(request, remote_prefill=remote)
            if error:
                output = RequestOutput(request_id=key[0], attempt=key[1], error=error, finish_reason=FinishReason.ERROR)
                self._event_loop.call_soon_threadsafe(self._after_step, [output], [], engine.load())

        self._command(add)

    # ------------------------------------------------------------ event loop: what the engine said

    def _after_step(
        self,
        said: Sequence[Said],
        reserved: list[tuple[Key, list[int], int, int]],
        load: EngineLoad,
    ) -> None:
        now_s = self._event_loop.time()
        tell_load = now_s - self._load_sent_s >= _LOAD_EVERY_S or load.running == 0
        if tell_load:
            self._load_sent_s = now_s
            self._runtime.set_load(load)
        for key, block_ids, cached_tokens, num_tokens in reserved:
            self._open(key, block_ids, cached_tokens, num_tokens)
        steps: dict[Session, _Told] = {}
        told: _Told | None = None
        for what in said:
            if isinstance(what, tuple):
                key, token_id = what
            else:
                key, token_id = (what.request_id, what.attempt), None
            live = self._live.get(key)
            if live is None or live.cancelled:
                continue
            if told is None or told.session is not live.session:
                told = steps.get(live.session)
                if told is None:
                    told = steps[live.session] = _Told(live.session)
            if token_id is None or not live.number or live.prefill_instance:
                self._tell(live, spell_out(what), told)
            else:
                told.numbers.append(live.number)
                told.token_ids.append(token_id)
        for session, told in steps.items():
            if faults.active is not None:
                faults.strike("emit", count=told.num_tokens)
            step = pb.StepOutputs(outputs=told.outputs, numbers=told.numbers, token_ids=told.token_ids)
            session.outbox.put_nowait(pb.DecodeEvent(step=step, load=load_to_proto(load) if tell_load else None))

    def _tell(self, live: Live, output: RequestOutput, told: _Told) -> None:
        if live.number and output.is_plain and not live.prefill_instance:
            told.numbers.append(live.number)
            told.token_ids += output.token_ids
            return
        told.outputs.append(output_to_proto(output, live.prefill_instance))
        live.prefill_instance = ""
        if output.finish_reason is not None:
            self._end(live)

    def _send(self, session: Session, output: RequestOutput) -> None:
        event = pb.DecodeEvent(step=pb.StepOutputs(outputs=[output_to_proto(output)]))
        event.load.CopyFrom(self._runtime.status().load)
        session.outbox.put_nowait(event)

    def _end(self, live: Live) -> None:
        live.stop_timer()
        self._live.pop(live.key, None)
        live.session.keys.discard(live.key)
        if not self._live:
            self._idle.set()

    # ------------------------------------------------------------ event loop: reservations

    def _open(self, key: Key, block_ids: list[int], cached_tokens: int, num_tokens: int) -> None:
        live = self._live.get(key)
        if live is None or live.cancelled:
            return  # its release is already on the way to the engine
        if live.fallback:
            self._command(lambda engine: engine.prefill_here(key))
            return
        live.reserved = True
        self.reservations.open_reservation(
            HandoverKey(*key), block_ids, cached_tokens=cached_tokens, num_tokens=num_tokens
        )
        live.timer = self._event_loop.call_later(
            live.handover_timeout_s,
            self._fall_back,
            live,
            f"no pages came within {live.handover_timeout_s:.1f} s",
        )

    def _fall_back(self, live: Live, reason: str) -> None:
        """No prefill worker will (fully) ship this prompt: compute it here once nothing writes its blocks."""
        if live.landed or live.fallback or live.cancelled or not live.remote:
            return
        live.fallback = reason
        live.stop_timer()
        _log.info("request %s: prefilling here: %s", live.key[0], reason)
        if live.reserved:
            self.reservations.cancel(HandoverKey(*live.key), reason)
        else:
            # Not reserved yet: the engine may reserve at this moment; `_open` will see `fallback` then.
            self.reservations.cancel(HandoverKey(*live.key), reason)
            self._command(lambda engine: engine.prefill_here(live.key) if _is_waiting(engine, live.key) else None)

    def _cancel(self, live: Live, reason: str) -> None:
        if live.cancelled:
            return
        live.cancelled = reason
        live.stop_timer()
        was_reserved = live.reserved
        if live.remote and not live.landed:
            # Also without a reservation: a ticket request that waits, or comes, is refused.
            self.reservations.cancel(HandoverKey(*live.key), reason)
        if not was_reserved:
            self._release(live)

    def _release(self, live: Live) -> None:
        """Nothing touches the blocks any more: free them, and tell the router once they are free."""

        def release(engine: Engine) -> None:
            engine.release(live.key)
            load = self._runtime.figures.publish(engine.load())
            self._event_loop.call_soon_threadsafe(self._released, live, load)

        self._command(release)

    def _released(self, live: Live, load: EngineLoad) -> None:
        self._runtime.set_load(load)
        if live.key in self._live:
            self._end(live)
            self._send(live.session, RequestOutput(
                request_id=live.key[0], attempt=live.key[1], finish_reason=FinishReason.ABORT, error=live.cancelled
            ))  # fmt: skip

    # ------------------------------------------------------------ event loop: what the ranks' receivers said

    def _on_landed(self, handover: HandoverKey, first: FirstToken) -> None:
        key = (handover.request_id, handover.attempt)
        live = self._live.get(key)
        if live is None or live.cancelled:
            return
        live.landed = True
        live.reserved = False
        live.prefill_instance = first.prefill_instance
        live.stop_timer()

        def attach(engine: Engine) -> None:
            logprobs = None if first.logprobs is None else logprobs_from_proto(first.logprobs)
            output = engine.attach(key, first.token_id, logprobs, first.cached_tokens)
            if output is not None:
                self._event_loop.call_soon_threadsafe(self._after_step, [output], [], engine.load())

        self._command(attach)

    def _on_failed(self, handover: HandoverKey, reason: str) -> None:
        live = self._live.get((handover.request_id, handover.attempt))
        if live is not None and not live.fallback and not live.cancelled:
            live.fallback = reason
            live.stop_timer()
            _log.warning("request %s: handover failed, prefilling here: %s", live.key[0], reason)

    def _on_settled(self, handover: HandoverKey) -> None:
        key = (handover.request_id, handover.attempt)
        live = self._live.get(key)
        if live is None:
            return
        outcome = "attached" if live.landed else "cancelled" if live.cancelled else "failed"
        self._runtime.metrics.handovers.labels(outcome=outcome).inc()
        live.reserved = False
        if live.cancelled:
            self._release(live)
        elif not live.landed:
            self._command(lambda engine: engine.prefill_here(key))

    def _command(self, command: Callable[[Engine], object]) -> None:
        assert self._engine_loop is not None
        self._engine_loop.submit(command)


class _Told:
    """What a step says on one stream: see `StepOutputs`."""

    __slots__ = ("numbers", "outputs", "session", "token_ids")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.outputs: list[pb.RequestOutput] = []
        self.numbers: list[int] = []
        self.token_ids: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Output tokens that it says."""
        return len(self.token_ids) + sum(len(output.token_ids) for output in self.outputs)


def _is_waiting(engine: Engine, key: Key) -> bool:
    seq = engine.scheduler.get(key)
    return seq is not None and not seq.block_ids
