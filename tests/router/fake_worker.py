"""Decode and prefill workers that speak the real protocol, and know their tokens beforehand; and a registry.

The answer of a fake decode worker to a prompt is `expected(prompt)`: ids that depend on the prompt's sum alone. Tests
script it through its attributes and read what it was told from `commands` and `cancelled`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from baton.engine.request import EngineRequest, FinishReason, RequestOutput, TokenLogprobs
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import output_to_proto, request_from_proto
from baton.proto.stream_order import StreamOrder

__all__ = ["FakeDecode", "FakePrefill", "FakeRegistry", "expected"]


def expected(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The ids that a fake worker writes after `prompt`: one printable ASCII character each in the tests' tokenizer."""
    return [10 + (sum(prompt) + 7 * position) % 80 for position in range(num_tokens)]


class _FakeWorker:
    role = ""

    def __init__(self, name: str) -> None:
        self.instance_id = name
        self.incarnation = os.urandom(16)
        self.address = ""
        self.state = "ready"
        self.load = pb.WorkerLoad(kv_blocks_total=1000, kv_blocks_free=1000)
        self._server: grpc.aio.Server | None = None

    def _add_to(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def start(self, port: int = 0) -> None:
        """Listen on a free port of the loopback."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._add_to(self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()

    async def stop(self) -> None:
        """Die at once."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def status(self) -> pb.WorkerStatus:
        """As a real worker would announce itself."""
        return pb.WorkerStatus(
            instance_id=self.instance_id,
            role=self.role,
            state=self.state,
            incarnation=self.incarnation,
            address=self.address,
            load=self.load,
            layout=pb.KvLayout(block_size=16),
        )


class FakeDecode(_FakeWorker, rpc.DecodeServicer):
    """Answers every Submit.

    Attributes:
        script: prompt -> ids to write; default `expected`.
        eos_after: end with FinishReason.STOP after this many tokens.
        tokens_per_step: ids told in one message.
        tells_numbers: tell plain tokens by number, as real workers do; `num_plain` counts them,
            `plain_pause_s` goes by after each.
        gate: tokens flow only while it is set.
        pause_after: close `gate` when this many tokens of a request are told.
        dies_of: break the stream when a prompt of so many tokens comes.
        beats: say now and then that this worker lives.
        loses, repeats: numbers of events that never leave this worker, or leave it twice (once each).
        fail_with: when set, every request ends with this error.
        fails_choice: the choice of this index ends with an error.
        break_after: break the stream after this many tokens of a request (once).
        wait_for_prefill: hold remotely prefilled requests until `prefilled` or PrefillFailed names them; one that
            names who comes next does not.
        held, block_seq: the block keys that it tells of, and the last batch's number; see `tell_blocks`.
        submits, cancelled, prefill_failures, next_handovers, active, snapshots: what was seen.
    """

    role = "decode"

    def __init__(self, name: str = "decode-0") -> None:
        super().__init__(name)
        self.script: Callable[[EngineRequest], list[int]] = lambda request: expected(
            request.prompt_token_ids, request.sampling.max_tokens
        )
        self.eos_after: int | None = None
        self.eos_id: int | None = None
        self.tokens_per_step = 1
        self.tells_numbers = True
        self.num_plain = 0
        self.plain_pause_s = 0.0
        self.gate = asyncio.Event()
        self.gate.set()
        self.pause_after: int | None = None
        self.fail_with = ""
        self.fails_choice: int | None = None
        self.break_after: int | None = None
        self.wait_for_prefill = False
        self.beats = True
        self.dies_of: int | None = None
        self.loses: set[int] = set()
        self.repeats: set[int] = set()
        self.hellos: list[str] = []
        self.submits: list[pb.Submit] = []
        self.cancelled: list[str] = []
        self.prefill_failures: list[str] = []
        self.next_handovers: list[int] = []
        self.active: dict[tuple[str, int], asyncio.Task[None]] = {}
        self.prefilled: dict[str, asyncio.Event] = {}
        self.held: set[int] = set()
        self.block_seq = 0
        self.snapshots = 0
        self.changed = asyncio.Condition()
        self._streams: set[asyncio.Queue[pb.DecodeEvent | None]] = set()

    def tell_load(self) -> None:
        """Send `load` on every stream."""
        for events in self._streams:
            events.put_nowait(pb.DecodeEvent(beat=pb.Beat(incarnation=self.incarnation), load=self.load))

    def break_streams(self) -> None:
        """End every stream."""
        for events in self._streams:
            events.put_nowait(None)

    def tell_blocks(self, *stored: int, removed: Sequence[int] = (), is_lost: bool = False) -> None:
        """Blocks came and went; nobody hears of it where the batch is lost."""
        self.held = (self.held - set(removed)) | set(stored)
        self.block_seq += 1
        batch = pb.BlockEvents(seq=self.block_seq, stored=stored, removed=removed)
        for events in self._streams:
            if not is_lost:
                events.put_nowait(pb.DecodeEvent(blocks=[batch]))

    def tell_steps(self, *samples: pb.StepSample) -> None:
        """What steps did and took."""
        for events in self._streams:
            events.put_nowait(pb.DecodeEvent(steps=samples))

    def _snapshot(self) -> pb.DecodeEvent:
        self.snapshots += 1
        return pb.DecodeEvent(blocks=[pb.BlockEvents(seq=self.block_seq, snapshot=True, stored=sorted(self.held))])

    def _add_to(self, server: grpc.aio.Server) -> None:
        rpc.add_DecodeServicer_to_server(self, server)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, checked whenever something happened here."""
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(condition)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def Stream(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.DecodeEvent]:
        """One router's stream."""
        events: asyncio.Queue[pb.DecodeEvent | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator, events))
        beats = asyncio.create_task(self._beat(events))
        self._streams.add(events)
        try:
            order = StreamOrder()
            while (event := await events.get()) is not None:
                event.seq = order.next()
                if event.seq in self.loses:
                    self.loses.discard(event.seq)
                    continue
                yield event
                if event.seq in self.repeats:
                    self.repeats.discard(event.seq)
                    yield event
        finally:
            reader.cancel()
            beats.cancel()
            self._streams.discard(events)
            for task in self.active.values():
                if task.get_name() == str(id(events)):
                    task.cancel()

    async def _beat(self, events: asyncio.Queue[pb.DecodeEvent | None]) -> None:
        while True:
            await asyncio.sleep(0.1)
            if self.beats:
                events.put_nowait(pb.DecodeEvent(beat=pb.Beat(incarnation=self.incarnation)))

    async def _read(self, commands: Any, events: asyncio.Queue[pb.DecodeEvent | None]) -> None:
        order = StreamOrder()
        async for command in commands:
            assert command.seq, "routers number their commands"
            assert order.accept(command.seq)
            kind = command.WhichOneof("command")
            if kind == "hello":
                self.hellos.append(command.hello.router_id)
                welcome = pb.Welcome(instance_id=self.instance_id, incarnation=self.incarnation)
                events.put_nowait(pb.DecodeEvent(welcome=welcome, load=self.load))
                events.put_nowait(self._snapshot())
            elif kind == "send_snapshot":
                events.put_nowait(self._snapshot())
            elif kind == "submit":
                self.submits.append(command.submit)
                request = command.submit.request
                key = (request.request_id, request.attempt)
                self.prefilled.setdefault(request.request_id, asyncio.Event())
                self.active[key] = asyncio.create_task(self._serve(command.submit, events), name=str(id(events)))
            elif kind == "cancel":
                key = (command.cancel.request_id, command.cancel.attempt)
                self.cancelled.append(key[0])
                task = self.active.pop(key, None)
                if task is not None:
                    task.cancel()
                    self._say(events, RequestOutput(request_id=key[0], finish_reason=FinishReason.ABORT))
            else:
                failed = command.prefill_failed
                self.prefill_failures.append(failed.reason)
                self.next_handovers.append(failed.next_handover)
                if not failed.next_handover:
                    self.prefilled[failed.request_id].set()
            await self._tell()

    async def _serve(self, submit: pb.Submit, events: asyncio.Queue[pb.DecodeEvent | None]) -> None:
        request = request_from_proto(submit.request)
        key = (request.request_id, request.attempt)
        if submit.remote_prefill and self.wait_for_prefill:
            await self.prefilled[request.request_id].wait()
        if self.dies_of == len(request.prompt_token_ids):
            events.put_nowait(None)
            return
        is_failing_choice = self.fails_choice is not None and key[0].endswith(f"-{self.fails_choice}")
        if self.fail_with or is_failing_choice:
            error = self.fail_with or f"choice {self.fails_choice} failed"
            self._say(events, self._output(request, [], FinishReason.ERROR, error=error))
            self.active.pop(key, None)
            return
        ids = self.script(request)[: request.sampling.max_tokens]
        reason = FinishReason.LENGTH
        if self.eos_after is not None and self.eos_after < len(ids):
            ids = ids[: self.eos_after]
            reason = FinishReason.STOP
            if self.eos_id is not None:
                ids = [*ids[:-1], self.eos_id]
        begin = len(request.resumed_token_ids)
        for start in range(begin, len(ids), self.tokens_per_step):
            if start == self.pause_after:
                self.gate.clear()
            await self.gate.wait()
            if self.break_after is not None and start >= self.break_after:
                self.break_after = None
                events.put_nowait(None)
                return
            step = ids[start : start + self.tokens_per_step]
            last = start + len(step) >= len(ids)
            is_plain = start > begin and not last and len(step) == 1 and request.sampling.logprobs is None
            if self.tells_numbers and is_plain:
                plain = pb.StepOutputs(numbers=[submit.number], token_ids=step)
                events.put_nowait(pb.DecodeEvent(step=plain))
                self.num_plain += 1
                await asyncio.sleep(self.plain_pause_s)
                continue
            self._say(events, self._output(request, step, reason if last else None, start=start - begin))
            await asyncio.sleep(0)
        self.active.pop(key, None)
        await self._tell()

    def _output(
        self,
        request: EngineRequest,
        ids: list[int],
        reason: FinishReason | None,
        *,
        start: int = 0,
        error: str = "",
    ) -> RequestOutput:
        sampling = request.sampling
        output = RequestOutput(request_id=request.request_id, attempt=request.attempt, token_ids=ids, error=error)
        output.finish_reason = reason
        if start == 0:
            output.cached_tokens = min(16, len(request.prompt_token_ids) - 1)
            if sampling.prompt_logprobs is not None:
                rest = [_logprob(token, sampling.prompt_logprobs) for token in request.prompt_token_ids[1:]]
                output.prompt_logprobs = [None, *rest]
        if sampling.logprobs is not None:
            output.logprobs = [_logprob(token, sampling.logprobs) for token in ids]
        if reason is FinishReason.STOP and self.eos_id is not None:
            output.stop_token_id = self.eos_id
        return output

    def _say(self, events: asyncio.Queue[pb.DecodeEvent | None], output: RequestOutput) -> None:
        message = pb.StepOutputs(outputs=[output_to_proto(output)])
        events.put_nowait(pb.DecodeEvent(step=message, load=self.load))


def _logprob(token_id: int, num_top: int) -> TokenLogprobs:
    top = tuple((10 + (token_id + offset) % 200, -0.5 - offset) for offset in range(num_top))
    return TokenLogprobs(token_id, -0.25, 1, top)


class FakePrefill(_FakeWorker, rpc.PrefillServicer, rpc.WorkerServicer):
    """Tells its load to followers, and answers every Prefill when `gate` is open.

    `fail_with` refuses with `code`; `on_done` is told of the others.
    """

    role = "prefill"

    def __init__(self, name: str = "prefill-0") -> None:
        super().__init__(name)
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail_with = ""
        self.code = grpc.StatusCode.INTERNAL
        self.on_done: Callable[[pb.PrefillRequest], None] = lambda request: None
        self.requests: list[pb.PrefillRequest] = []
        self.cancelled = 0
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    def _add_to(self, server: grpc.aio.Server) -> None:
        rpc.add_PrefillServicer_to_server(self, server)
        rpc.add_WorkerServicer_to_server(self, server)

    async def Follow(self, request: pb.FollowRequest, context: Any) -> AsyncIterator[pb.WorkerNews]:
        """No blocks, and the load from time to time."""
        empty = pb.BlockEvents(snapshot=True)
        yield pb.WorkerNews(incarnation=self.incarnation, load=self.load, blocks=[empty])
        while True:
            await asyncio.sleep(0.05)
            yield pb.WorkerNews(load=self.load)

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> pb.PrefillReply:
        """One prompt."""
        self.requests.append(request)
        self.started.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            self.ended.set()
            raise
        if self.fail_with:
            await context.abort(self.code, self.fail_with)
        self.on_done(request)
        self.ended.set()
        shipped_tokens = len(request.request.prompt_token_ids)
        return pb.PrefillReply(shipped_tokens=shipped_tokens, exposed_transfer_s=0.005, load=self.load)


class FakeRegistry(rpc.RegistryServicer):
    """Lists `workers` to watchers, and takes announcements."""

    def __init__(self) -> None:
        self.workers: list[_FakeWorker] = []
        self.announced: list[pb.WorkerStatus] = []
        self.address = ""
        self._version = 0
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        """Listen on a free port of the loopback."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        rpc.add_RegistryServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()

    async def stop(self) -> None:
        """Die at once."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def publish(self, *workers: _FakeWorker) -> None:
        """Send this list to every watcher."""
        async with self._changed:
            self.workers = list(workers)
            self._version += 1
            self._changed.notify_all()

    async def until_announced(self, condition: Callable[[pb.WorkerStatus], bool]) -> pb.WorkerStatus:
        """The first announcement for which `condition` holds."""
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(lambda: any(map(condition, self.announced)))
        return next(filter(condition, self.announced))

    async def Announce(self, request: pb.WorkerStatus, context: Any) -> pb.AnnounceReply:
        """Heartbeat."""
        async with self._changed:
            copy = pb.WorkerStatus()
            copy.CopyFrom(request)
            self.announced.append(copy)
            self._changed.notify_all()
        return pb.AnnounceReply(lease_s=3)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.InstanceList]:
        """The list, then each change."""
        seen = -1
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda last=seen: self._version != last)  # type: ignore[misc]
                seen = self._version
                instances = pb.InstanceList(version=seen, instances=[worker.status() for worker in self.workers])
            yield instances
