"""A prefill and a decode worker with nothing behind them, in one process: real gRPC, the real protocol, no engine.

A prompt is read at once; an answer's first token leaves as soon as both halves of the request are there, the others
one at each step of `step_s`, those of all requests in one message, as from an engine. So what a client waits for is
the router, and what these workers took is known: each line read from stdin is answered by one line on stdout, a JSON
object of seconds by request id since the last one, from the arrival of a request's later half to its first token.

Usage: python instant_workers.py REGISTRY STEP_S
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import uvloop

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.stream_order import StreamOrder
from baton.state.announce import Announcements

_TOKEN_ID = 300  # a plain piece of text in the vocabulary that ships
_LOAD = pb.WorkerLoad(kv_blocks_total=1_000_000, kv_blocks_free=1_000_000)


@dataclass(slots=True)
class _Answer:
    """A request that runs."""

    number: int
    remaining: int
    attempt: int
    events: asyncio.Queue[pb.DecodeEvent]


class InstantPair(rpc.DecodeServicer, rpc.PrefillServicer):
    """Both workers; the second half of a request to arrive sets it going."""

    def __init__(self, step_s: float) -> None:
        self.own_s: dict[str, float] = {}
        self.incarnation = os.urandom(16)
        self._step_s = step_s
        self._halves: dict[str, _Answer | None] = {}
        self._running: dict[str, _Answer] = {}

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> pb.PrefillReply:
        """One prompt."""
        self._half_came(request.request.request_id, None)
        return pb.PrefillReply(shipped_tokens=len(request.request.prompt_token_ids), load=_LOAD)

    async def Stream(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.DecodeEvent]:
        """One router's stream."""
        events: asyncio.Queue[pb.DecodeEvent] = asyncio.Queue()
        reading = asyncio.create_task(self._read(request_iterator, events))
        order = StreamOrder()
        try:
            while True:
                event = await events.get()
                event.seq = order.next()
                yield event
        finally:
            reading.cancel()

    async def step_forever(self) -> None:
        """Gives every running answer a token per step."""
        while True:
            await asyncio.sleep(self._step_s)
            steps: dict[int, pb.DecodeEvent] = {}
            for request_id, answer in list(self._running.items()):
                event = steps.get(id(answer.events))
                if event is None:
                    event = steps[id(answer.events)] = pb.DecodeEvent(load=_LOAD)
                    answer.events.put_nowait(event)
                answer.remaining -= 1
                if answer.remaining:
                    event.step.numbers.append(answer.number)
                    event.step.token_ids.append(_TOKEN_ID)
                else:
                    del self._running[request_id]
                    event.step.outputs.append(_output(request_id, answer, "length"))

    async def _read(self, commands: Any, events: asyncio.Queue[pb.DecodeEvent]) -> None:
        async for command in commands:
            kind = command.WhichOneof("command")
            if kind == "hello":
                welcome = pb.Welcome(instance_id="decode-0", incarnation=self.incarnation)
                events.put_nowait(pb.DecodeEvent(welcome=welcome, load=_LOAD))
            elif kind == "submit":
                submit, request = command.submit, command.submit.request
                answer = _Answer(submit.number, request.sampling.max_tokens, request.attempt, events)
                if not submit.remote_prefill:
                    self._halves[request.request_id] = None
                self._half_came(request.request_id, answer)
            elif kind == "cancel":
                self._running.pop(command.cancel.request_id, None)

    def _half_came(self, request_id: str, half: _Answer | None) -> None:
        begin_s = time.perf_counter()
        if request_id not in self._halves:
            self._halves[request_id] = half
            return
        answer = self._halves.pop(request_id) or half
        assert answer is not None
        answer.remaining -= 1
        output = _output(request_id, answer, "" if answer.remaining else "length")
        if answer.remaining:
            self._running[request_id] = answer
        answer.events.put_nowait(pb.DecodeEvent(step=pb.StepOutputs(outputs=[output]), load=_LOAD))
        self.own_s[request_id] = time.perf_counter() - begin_s


def _output(request_id: str, answer: _Answer, finish_reason: str) -> pb.RequestOutput:
    return pb.RequestOutput(
        request_id=request_id,
        attempt=answer.attempt,
        token_ids=[_TOKEN_ID],
        finish_reason=finish_reason,
        prefill_instance="prefill-0",
    )


async def _serve(registry: str, step_s: float) -> None:
    pair = InstantPair(step_s)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    rpc.add_DecodeServicer_to_server(pair, server)
    rpc.add_PrefillServicer_to_server(pair, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    ended = asyncio.Event()
    background = [asyncio.create_task(pair.step_forever())]
    for role in ("decode", "prefill"):
        status = pb.WorkerStatus(
            instance_id=f"{role}-0",
            role=role,
            state="ready",
            incarnation=pair.incarnation,
            address=address,
            load=_LOAD,
            layout=pb.KvLayout(block_size=16),
        )
        background.append(asyncio.create_task(Announcements(registry, lambda kept=status: kept, None).run(ended)))
    loop = asyncio.get_running_loop()
    try:
        while await loop.run_in_executor(None, sys.stdin.readline):
            own_s, pair.own_s = pair.own_s, {}
            print(json.dumps(own_s), flush=True)
    finally:
        for task in background:
            task.cancel()
        await server.stop(0)


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], float(sys.argv[2])))
