"""A decode and a prefill worker with fake engines in this process, and a client that plays the router over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton.config import ClusterConfig, load_config
from baton.decode_worker import service as decode_service
from baton.engine.engine import Engine
from baton.engine.fake import FakeEngine, fake_next_token
from baton.engine.request import EngineRequest, RequestOutput, SamplingParams
from baton.placement import Placement
from baton.prefill_worker import service as prefill_service
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import output_from_proto, request_to_proto
from baton.worker import runtime as worker_runtime

TIMEOUT_S = 60.0


class Registry(rpc.RegistryServicer):
    """Remembers the last announcement of each instance."""

    def __init__(self) -> None:
        self.statuses: dict[str, pb.WorkerStatus] = {}

    async def Announce(self, request: pb.WorkerStatus, context: Any) -> pb.AnnounceReply:
        copy = pb.WorkerStatus()
        copy.CopyFrom(request)
        self.statuses[request.instance_id] = copy
        return pb.AnnounceReply(lease_s=0.3)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.InstanceList]:
        """Nobody is there yet: no prefill worker makes links before it is ready."""
        yield pb.InstanceList()
        await asyncio.Event().wait()


def expected(prompt: list[int], count: int) -> list[int]:
    """The fake model's greedy continuation."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(fake_next_token(tokens, 512))
    return tokens[len(prompt) :]


def request(name: str, prompt: list[int], max_tokens: int = 6, **options: Any) -> EngineRequest:
    """A greedy request."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)


class Router:
    """One `Decode.Stream` and a prefill stub."""

    def __init__(self, decode: pb.WorkerStatus, prefill: pb.WorkerStatus) -> None:
        self.decode, self.prefill = decode, prefill
        self._channels = [grpc.aio.insecure_channel(decode.address), grpc.aio.insecure_channel(prefill.address)]
        self.prefill_stub = rpc.PrefillStub(self._channels[1])
        self._workers = [rpc.WorkerStub(channel) for channel in self._channels]
        self.call: Any = rpc.DecodeStub(self._channels[0]).Stream()
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.events: list[int] = []
        self.prefill_instances: dict[str, str] = {}

    async def hello(self, version: int = worker_runtime.PROTOCOL_VERSION) -> Any:
        """Opens the stream; returns the first event."""
        await self.call.write(pb.DecodeCommand(hello=pb.Hello(router_id="test", protocol_version=version)))
        return await asyncio.wait_for(self.call.read(), TIMEOUT_S)

    async def submit(self, request: EngineRequest, *, remote: bool = False, handover_timeout_s: float = 60.0) -> None:
        """Sends one request to the decode worker."""
        submit = pb.Submit(
            request=request_to_proto(request), remote_prefill=remote, handover_timeout_s=handover_timeout_s
        )
        await self.call.write(pb.DecodeCommand(submit=submit))

    async def cancel(self, name: str) -> None:
        """Cancels a request."""
        await self.call.write(pb.DecodeCommand(cancel=pb.Cancel(request_id=name)))

    async def prefill_failed(self, name: str) -> None:
        """Tells the decode worker that no pages will come."""
        failed = pb.PrefillFailed(request_id=name, reason="the test says so")
        await self.call.write(pb.DecodeCommand(prefill_failed=failed))

    def start_prefill(self, request: EngineRequest, **changes: Any) -> Any:
        """The call to the prefill worker."""
        message = pb.PrefillRequest(
            **{
                "request": request_to_proto(request),
                "decode_address": self.decode.address,
                "decode_incarnation": self.decode.incarnation,
                "timeout_s": TIMEOUT_S,
                **changes,
            }
        )
        return self.prefill_stub.Prefill(message, timeout=TIMEOUT_S)

    async def collect(self, *names: str) -> list[list[int]]:
        """Token ids of these requests once all of them have ended."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not all(self.ended(name) for name in names):
            await self.read_step(deadline_s - time.monotonic())
        return [[token for output in self.outputs[name] for token in output.token_ids] for name in names]

    async def read_step(self, timeout_s: float = TIMEOUT_S) -> None:
        """Reads one event."""
        event = await asyncio.wait_for(self.call.read(), timeout_s)
        assert event is not grpc.aio.EOF, "the stream ended"
        self.events.append(event.seq)
        for message in event.step.outputs:
            output = output_from_proto(message)
            self.outputs.setdefault(output.request_id, []).append(output)
            if message.prefill_instance:
                self.prefill_instances[output.request_id] = message.prefill_instance

    def ended(self, name: str) -> bool:
        """Whether the last output of a request has come."""
        outputs = self.outputs.get(name, [])
        return bool(outputs) and outputs[-1].finish_reason is not None

    def last(self, name: str) -> RequestOutput:
        """The last output of a request."""
        return self.outputs[name][-1]

    async def loads(self) -> list[pb.WorkerLoad]:
        """Load of the decode and of the prefill worker."""
        return [(await worker.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)).load for worker in self._workers]

    async def wait_until_settled(self) -> None:
        """Waits until neither worker owns a block or a request; fails with the figures."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            loads = await self.loads()
            if not any(load.kv_blocks_owned or load.running_requests or load.waiting_requests for load in loads):
                for load in loads:
                    assert load.kv_blocks_free + load.kv_blocks_cached == load.kv_blocks_total
                return
            assert time.monotonic() < deadline_s, loads
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Breaks the stream and both channels."""
        self.call.cancel()
        for channel in self._channels:
            await channel.close(None)


class Workers:
    """Both workers, with their engines at hand."""

    def __init__(self, registry: Registry, engines: dict[str, Engine], tasks: dict[str, asyncio.Task[None]]) -> None:
        self.registry = registry
        self.engines = engines
        self.tasks = tasks

    async def router(self) -> Router:
        """A new router with its stream open."""
        statuses = self.registry.statuses
        router = Router(statuses["decode-0"], statuses["prefill-0"])
        event = await router.hello()
        assert event.welcome.instance_id == "decode-0"
        assert event.welcome.incarnation == statuses["decode-0"].incarnation
        return router


@asynccontextmanager
async def workers(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any] | None = None, **fake: Any
) -> AsyncIterator[Workers]:
    """Runs both workers; `fake` goes to every `FakeEngine`, `{role}_fake` to one role's."""
    per_role = {role: fake.pop(f"{role}_fake", {}) for role in ("decode", "prefill")}
    engines: dict[str, Engine] = {}

    def build(config: ClusterConfig, pool: Any, progress: Any) -> Engine:
        role = "prefill" if pool is config.prefill else "decode"
        progress("building", 0.5)
        engines[role] = FakeEngine(**{"max_model_len": 512, **fake, **per_role[role]})
        return engines[role]

    monkeypatch.setattr(worker_runtime, "build_engine", build)
    config = load_config(None, settings or {})
    registry, server = Registry(), grpc.aio.server()
    rpc.add_RegistryServicer_to_server(registry, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    stop = asyncio.Event()
    services = {"decode-0": decode_service, "prefill-0": prefill_service}
    tasks = {
        name: asyncio.create_task(
            service.serve(config, placement=Placement(instance_id=name), registry_address=address, stop=stop)
        )
        for name, service in services.items()
    }
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not all(name in registry.statuses and registry.statuses[name].state == "ready" for name in tasks):
                assert not any(task.done() for task in tasks.values()), [
                    t.exception() for t in tasks.values() if t.done()
                ]
                await asyncio.sleep(0.01)
        yield Workers(registry, engines, tasks)
    finally:
        stop.set()
        ended = await asyncio.wait_for(asyncio.gather(*tasks.values(), return_exceptions=True), 2 * TIMEOUT_S)
        await server.stop(None)
    for engine in engines.values():
        engine.pool.check()
        assert engine.pool.counts().owned == 0
    for name, error in zip(tasks, ended, strict=True):
        assert error is None or registry.statuses[name].state == "dead", (name, error)
