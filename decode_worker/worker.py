"""The decode worker's event-loop half: commands in, token streams out, reservations between. See `service.py`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence

import grpc
from torch import Tensor

from baton import faults
from baton.clock import MonotonicClock
from baton.decode_worker.phases import Moments, StepTimes
from baton.decode_worker.remote_prefill import (
    Action,
    AwaitWord,
    Cancel,
    Open,
    Phase,
    PrefillHere,
    Release,
    RemotePrefill,
)
from baton.decode_worker.reservations import Reservations
from baton.decode_worker.session import Live, Session
from baton.decode_worker.spans import record_decode
from baton.engine.engine import Engine, EngineLoad, Said, StepResult, spell_out
from baton.engine.loop import EngineLoop
from baton.engine.request import FinishReason, RequestOutput
from baton.engine.sequence import Key
from baton.kv_transfer.handover import Fail, HandoverKey
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import PageRange
from baton.kv_transfer.wire import FirstToken
from baton.log import about
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import logprobs_from_proto, output_to_proto, request_from_proto
from baton.proto.stream_order import SequenceGapError, StreamOrder
from baton.worker.figures import load_to_proto
from baton.worker.peer import rank_transports
from baton.worker.runtime import BEATS_PER_SILENCE, PROTOCOL_VERSION, WorkerRuntime

__all__ = ["DecodeWorker"]

_log = logging.getLogger(__name__)
_LOAD_EVERY_S = 0.05
_CLOSE_TIMEOUT_S = 5.0
# Within it a router that lives says who comes after a prefill worker that is gone: it noticed at the same moment.
_WORD_TIMEOUT_S = 0.5


class DecodeWorker(rpc.DecodeServicer):
    """Serves `Decode.Stream` on top of an engine loop and a handover receiver."""

    def __init__(self, runtime: WorkerRuntime, engine: Engine, peer: LocalPeer) -> None:
        self._runtime = runtime
        self._engine = engine
        self._event_loop = asyncio.get_running_loop()
        self._clock = MonotonicClock()
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
            on_refused=lambda cause: runtime.metrics.kv_refused.labels(reason=cause).inc(),
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
        self._runtime.news.watch(engine_loop)
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
        times = StepTimes(result.began_s, result.began_s + step_s, [seq.key for seq in result.plan.admitted])
        self._event_loop.call_soon_threadsafe(self._after_step, result.said, reserved, load, times)

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
        first, order = await anext(aiter(request_iterator), None), StreamOrder()
        if first is None or first.WhichOneof("command") != "hello":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the first command must be hello")
            return
        if first.hello.protocol_version != PROTOCOL_VERSION:
            text = f"router speaks protocol {first.hello.protocol_version}, this worker {PROTOCOL_VERSION}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
            return
        session = Session(first.hello.router_id)
        session.order.accept(first.seq)
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(session, request_iterator), name=f"read {session.router_id}")
        welcome = pb.Welcome(instance_id=self._runtime.instance_id, incarnation=self._runtime.incarnation)
        session.outbox.put_nowait(pb.DecodeEvent(welcome=welcome, load=self._runtime.status().load))
        session.listen(self._runtime.news)
        reader.add_done_callback(lambda _: session.outbox.put_nowait(None))
        try:
            while (event := await session.next()) is not None:
                event.seq = order.next()
                yield event
        finally:
            reader.cancel()
            session.close()
            self._sessions.discard(session)
            for key in list(session.keys):
                self._cancel(self._live[key], f"the stream of router {session.router_id} ended")
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await reader
            except SequenceGapError as error:
                await context.abort(grpc.StatusCode.DATA_LOSS, f"of router {session.router_id}'s commands {error}")

    async def _beat(self) -> None:
        """Says on every stream that this process lives, and how busy it is."""
        beat = pb.Beat(incarnation=self._runtime.incarnation)
        while True:
            await asyncio.sleep(self._runtime.config.router.silence_s / BEATS_PER_SILENCE)
            for session in self._sessions:
                # Where something waits to be read a beat says no more; who reads nothing gets no heap of them.
                if session.outbox.empty():
                    session.outbox.put_nowait(pb.DecodeEvent(beat=beat, load=self._runtime.status().load))

    def _tell_load(self, besides: Collection[Session]) -> None:
        """To the other routers: what ends for one of them is room for all."""
        for session in self._sessions:
            if session not in besides and session.outbox.empty():
                session.outbox.put_nowait(pb.DecodeEvent(load=self._runtime.status().load))

    async def _read(self, session: Session, commands: AsyncIterator[pb.DecodeCommand]) -> None:
        async for command in commands:
            if not session.order.accept(command.seq):
                continue
            kind = command.WhichOneof("command")
            if kind == "submit":
                self._submit(session, command.submit)
            elif kind == "cancel":
                live = self._live.get((command.cancel.request_id, command.cancel.attempt))
                if live is not None:
                    self._cancel(live, "cancelled by the router")
            elif kind == "send_snapshot":
                _log.info("router %s asks for a snapshot of all blocks", session.router_id)
                session.send_snapshot()
            elif kind == "prefill_failed":
                failed = command.prefill_failed
                live = self._live.get((failed.request_id, failed.attempt))
                if live is not None and live.remote is not None:
                    self._perform(live, live.remote.prefill_failed(failed.reason, failed.next_handover))
                elif failed.next_handover:
                    # It has ended: whoever is on the way to it is not to wait for a ticket.
                    next_key = HandoverKey(failed.request_id, failed.attempt, failed.next_handover)
                    self.reservations.cancel(next_key, "the request has ended")
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
        moments = Moments(self._clock.now_s())
        live = Live(key, session, RemotePrefill() if remote else None, timeout_s, moments, submit.number)
        live.traceparent = request.traceparent
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
        times: StepTimes | None = None,
    ) -> None:
        self._runtime.news.touch()
        now_s = self._event_loop.time()
        tell_load = now_s - self._load_sent_s >= _LOAD_EVERY_S or load.running == 0
        if tell_load:
            self._load_sent_s = now_s
            self._runtime.set_load(load)
        for key, block_ids, cached_tokens, num_tokens in reserved:
            self._open(key, block_ids, cached_tokens, num_tokens)
        if times is not None:
            for key in times.taken_up:
                if key in self._live:
                    self._live[key].moments.taken_up_s = times.began_s
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
            if token_id is None or not live.number or live.untold:
                self._tell(live, spell_out(what), told, times)
            else:
                told.numbers.append(live.number)
                told.token_ids.append(token_id)
        for session, told in steps.items():
            if faults.active is not None:
                faults.strike("emit", count=told.num_tokens)
            step = pb.StepOutputs(outputs=told.outputs, numbers=told.numbers, token_ids=told.token_ids)
            session.outbox.put_nowait(pb.DecodeEvent(step=step, load=load_to_proto(load) if tell_load else None))
        if tell_load:
            self._tell_load(besides=steps)

    def _tell(self, live: Live, output: RequestOutput, told: _Told, times: StepTimes | None) -> None:
        if live.untold and output.token_ids:
            self._add_phases(live, output, times)
        if live.number and output.is_plain:
            told.numbers.append(live.number)
            told.token_ids += output.token_ids
            return
        told.outputs.append(output_to_proto(output, live.prefill_instance))
        live.prefill_instance = ""
        if output.finish_reason is not None:
            self._end(live)

    def _add_phases(self, live: Live, output: RequestOutput, times: StepTimes | None) -> None:
        moments, now_s = live.moments, self._clock.now_s()
        ended_s = now_s if times is None else times.ended_s
        live.untold -= 1
        if live.untold:
            if moments.landed_s is None:
                moments.sampled_s = ended_s
            output.phases = moments.first_told(now_s)
        else:
            output.phases = moments.second_sampled(ended_s)

    def _send(self, session: Session, output: RequestOutput) -> None:
        event = pb.DecodeEvent(step=pb.StepOutputs(outputs=[output_to_proto(output)]))
        event.load.CopyFrom(self._runtime.status().load)
        session.outbox.put_nowait(event)

    def _end(self, live: Live) -> None:
        live.stop_timer()
        self._live.pop(live.key, None)
        live.session.keys.discard(live.key)
        if live.traceparent:
            record_decode(self._runtime.tracing, live, self._clock.now_s())
        if not self._live:
            self._idle.set()

    # ------------------------------------------------------------ event loop: reservations

    def _open(self, key: Key, block_ids: list[int], cached_tokens: int, num_tokens: int) -> None:
        live = self._live.get(key)
        if live is None or live.remote is None:
            return  # its release is already on the way to the engine
        live.blocks = block_ids, cached_tokens, num_tokens
        live.moments.reserved_s = self._clock.now_s()
        self._perform(live, live.remote.reserved())
        if live.remote.is_expected:
            reason = f"no pages came within {live.handover_timeout_s:.1f} s"
            live.timer = self._event_loop.call_later(live.handover_timeout_s, self._out_of_time, live, reason)

    def _out_of_time(self, live: Live, reason: str) -> None:
        assert live.remote is not None
        self._perform(live, live.remote.out_of_time(reason))

    def _no_word(self, live: Live, handover: int) -> None:
        assert live.remote is not None
        if self._live.get(live.key) is live:
            self._perform(live, live.remote.no_word(handover))

    def _perform(self, live: Live, actions: tuple[Action, ...]) -> None:
        """Carries out what was decided about the pages of a request."""
        remote = live.remote
        assert remote is not None
        if not remote.is_expected:
            live.stop_timer()
        for action in actions:
            match action:
                case Open(handover):
                    assert live.blocks is not None
                    block_ids, cached_tokens, num_tokens = live.blocks
                    handover_key = HandoverKey(*live.key, handover)
                    self.reservations.open_reservation(
                        handover_key, block_ids, cached_tokens=cached_tokens, num_tokens=num_tokens
                    )
                case Cancel(handover, reason):
                    _log.info(
                        "handover %d of %s is given up: %s", handover, live.key[0], reason, extra=about(*live.key)
                    )
                    self.reservations.cancel(HandoverKey(*live.key, handover), reason)
                case AwaitWord(handover):
                    self._event_loop.call_later(_WORD_TIMEOUT_S, self._no_word, live, handover)
                case PrefillHere(if_waiting):
                    _log.info("prefilling %s here: %s", live.key[0], remote.reason, extra=about(*live.key))
                    live.moments.taken_up_s = self._clock.now_s()  # unless it has no blocks yet
                    self._prefill_here(live.key, if_waiting)
                case Release():
                    self._release(live)

    def _prefill_here(self, key: Key, if_waiting: bool) -> None:
        # Where the engine reserves at this moment, `_open` will see to it.
        self._command(lambda engine: engine.prefill_here(key) if not if_waiting or _is_waiting(engine, key) else None)

    def _cancel(self, live: Live, reason: str) -> None:
        if live.cancelled:
            return
        live.cancelled = reason
        live.stop_timer()
        if live.remote is None:
            self._release(live)
        else:
            self._perform(live, live.remote.cancelled(reason))

    def _release(self, live: Live) -> None:
        """Nothing touches the blocks any more: free them, and tell the router once they are free."""

        def release(engine: Engine) -> None:
            engine.release(live.key)
            load = self._runtime.figures.publish(engine.load())
            self._event_loop.call_soon_threadsafe(self._released, live, load)

        self._command(release)

    def _released(self, live: Live, load: EngineLoad) -> None:
        self._runtime.set_load(load)
        self._runtime.news.touch()
        if live.key in self._live:
            self._end(live)
            self._send(live.session, RequestOutput(
                request_id=live.key[0], attempt=live.key[1], finish_reason=FinishReason.ABORT, error=live.cancelled
            ))  # fmt: skip
        self._tell_load(besides=(live.session,))

    # ------------------------------------------------------------ event loop: what the ranks' receivers said

    def _on_landed(self, handover: HandoverKey, first: FirstToken) -> None:
        key = handover.dispatch
        live = self._live.get(key)
        if live is None or live.remote is None:
            return
        live.remote.landed(handover.handover)
        if live.remote.phase is not Phase.LANDED:
            return
        live.prefill_instance = first.prefill_instance
        live.moments.landed(
            self._clock.now_s(), sampled_s=first.sampled_s, prefill_s=first.prefill_s, queue_s=first.queue_s
        )
        live.stop_timer()

        def attach(engine: Engine) -> None:
            logprobs = None if first.logprobs is None else logprobs_from_proto(first.logprobs)
            output = engine.attach(key, first.token_id, logprobs, first.cached_tokens)
            if output is not None:
                self._event_loop.call_soon_threadsafe(self._after_step, [output], [], engine.load())

        self._command(attach)

    def _on_failed(self, handover: HandoverKey, failure: Fail) -> None:
        live = self._live.get(handover.dispatch)
        if live is not None and live.remote is not None:
            self._perform(live, live.remote.failed(handover.handover, failure))

    def _on_settled(self, handover: HandoverKey) -> None:
        live = self._live.get(handover.dispatch)
        if live is None or live.remote is None:
            return
        phase = live.remote.phase
        outcome = "attached" if phase is Phase.LANDED else "cancelled" if phase is Phase.CANCELLED else "failed"
        self._runtime.metrics.handovers.labels(outcome=outcome).inc()
        self._perform(live, live.remote.settled(handover.handover))

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
