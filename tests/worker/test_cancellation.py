"""A request ends in each phase, held there: both halves say so, every block comes back, no trace of it is left.

Phases: queued, reserved, prefilling, shipping, landed, decoding, and prefilling again as a resumed attempt. Ends: the
router cancels both halves, the router is gone, the prefill half's deadline passes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from harness import TIMEOUT_S, Router, Workers, expected, request, workers

from baton.decode_worker import service as decode_service
from baton.decode_worker.worker import DecodeWorker
from baton.engine.request import EngineRequest, FinishReason
from baton.prefill_worker import service as prefill_service
from baton.prefill_worker.worker import PrefillWorker
from baton.proto.baton.v1 import worker_pb2 as pb

PROMPT = list(range(1, 101))
REQUEST = request("a", PROMPT, 50)
RESUMED = dataclasses.replace(REQUEST, attempt=1, resumed_token_ids=tuple(expected(PROMPT, 7)))
PHASES = ["queued", "reserved", "prefilling", "shipping", "landed", "decoding", "resuming"]
DECODE_ENGINE_HELD = ("queued", "landed", "decoding")


class Gate:
    """Holds an engine's thread at one place, from when it is armed until it is opened."""

    def __init__(self) -> None:
        self.armed, self.reached, self.opened = threading.Event(), threading.Event(), threading.Event()

    def hold(self) -> None:
        """On the engine's thread."""
        if self.armed.is_set():
            self.reached.set()
            assert self.opened.wait(TIMEOUT_S)

    async def until_reached(self) -> None:
        """On the event loop."""
        assert await asyncio.to_thread(self.reached.wait, TIMEOUT_S)


def _hold_forward(runner: Any, gate: Gate, *, after_layers: bool) -> None:
    forward = runner.forward

    def held(batch: Any, on_layers: Callable[[int, int], None] | None = None, *rest: Any, **options: Any) -> Any:
        def offered(begin: int, end: int) -> None:
            assert on_layers is not None
            on_layers(begin, end)
            gate.hold()

        if after_layers:
            return forward(batch, offered, *rest, **options)
        gate.hold()
        return forward(batch, on_layers, *rest, **options)

    runner.forward = held


class Held:
    """A request in one phase.

    Attributes:
        call: to the prefill worker, where there is one.
    """

    def __init__(self, both: Workers, router: Router, made: list[Any], gate: Gate, phase: str) -> None:
        self.both, self.router, self.made, self.gate, self.phase = both, router, made, gate, phase
        self.request: EngineRequest = RESUMED if phase == "resuming" else REQUEST
        self.call: Any = None

    async def begin(self, *, timeout_s: float = TIMEOUT_S) -> None:
        """Bring the request into its phase."""
        decode, prefill = self.both.engines["decode"], self.both.engines["prefill"]
        if self.phase in ("prefilling", "resuming", "shipping"):
            _hold_forward(prefill.runner, self.gate, after_layers=self.phase == "shipping")
        elif self.phase in ("queued", "decoding"):
            _hold_forward(decode.runner, self.gate, after_layers=False)
        elif self.phase == "landed":
            attach = decode.attach
            decode.attach = lambda *args: (self.gate.hold(), attach(*args))[1]  # type: ignore[method-assign]
        if self.phase == "decoding":
            await self.router.submit(self.request)
            await self.router.read_step()
            self.gate.armed.set()
            await self.gate.until_reached()
            return
        self.gate.armed.set()
        if self.phase == "queued":
            await self.router.submit(request("first", [1, 2, 3], 2))
            await self.gate.until_reached()
        await self.router.submit(self.request, remote=True)
        if self.phase == "reserved":
            while not (await self.router.loads())[0].kv_blocks_owned:
                await asyncio.sleep(0.01)
            return
        self.call = self.router.start_prefill(self.request, timeout_s=timeout_s)
        if self.phase != "queued":
            await self.gate.until_reached()
        if self.phase == "landed":
            # The prefill half is done: what is left is the decode half's own affair.
            await self.call
            self.call = None

    async def cancel(self) -> None:
        """As a router does."""
        cancel = pb.Cancel(request_id=self.request.request_id, attempt=self.request.attempt)
        await self.router.call.write(pb.DecodeCommand(cancel=cancel))
        if self.call is not None:
            self.call.cancel()

    async def until_decode_owns_nothing(self) -> None:
        """While the prefill half is still held."""
        async with asyncio.timeout(TIMEOUT_S):
            while (await self.router.loads())[0].kv_blocks_owned:
                await asyncio.sleep(0.01)

    async def check_nothing_is_left(self, watcher: Router) -> None:
        """Neither blocks nor entries, on either half."""
        await watcher.wait_until_settled()
        async with asyncio.timeout(TIMEOUT_S):
            while any(worker._live for worker in self.made):
                await asyncio.sleep(0.01)
        decode = next(worker for worker in self.made if isinstance(worker, DecodeWorker))
        assert not decode.reservations._open
        assert not any(session.keys for session in decode._sessions)


@asynccontextmanager
async def _held(monkeypatch: pytest.MonkeyPatch, phase: str, **options: Any) -> AsyncIterator[Held]:
    made: list[Any] = []

    class Decode(DecodeWorker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    class Prefill(PrefillWorker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(decode_service, "DecodeWorker", Decode)
    monkeypatch.setattr(prefill_service, "PrefillWorker", Prefill)
    # Layer by layer, so that something has been shipped when the second group is held.
    settings = {"transfer.one_message_below_tokens": 0}
    async with workers(monkeypatch, settings, layers_per_group=1, **options) as both:
        gate = Gate()
        held = Held(both, await both.router(), made, gate, phase)
        try:
            yield held
        finally:
            gate.opened.set()


@pytest.mark.parametrize("phase", PHASES)
async def test_the_router_cancels(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _held(monkeypatch, phase) as held:
        await held.begin()
        await held.cancel()
        if phase not in DECODE_ENGINE_HELD:
            await held.until_decode_owns_nothing()
            await held.router.collect("a")
        held.gate.opened.set()
        await held.router.collect("a")
        assert held.router.last("a").finish_reason is FinishReason.ABORT
        assert held.router.last("a").error == "cancelled by the router"
        assert held.router.last("a").attempt == held.request.attempt
        if held.call is not None:
            with pytest.raises(asyncio.CancelledError):
                await held.call
        await held.check_nothing_is_left(held.router)
        await held.router.close()


@pytest.mark.parametrize("phase", PHASES)
async def test_the_router_is_gone(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _held(monkeypatch, phase) as held:
        await held.begin()
        await held.router.close()
        watcher = await held.both.router()
        if phase not in DECODE_ENGINE_HELD:
            held.router = watcher
            await held.until_decode_owns_nothing()
        held.gate.opened.set()
        await held.check_nothing_is_left(watcher)
        await watcher.close()


@pytest.mark.parametrize("phase", ["queued", "prefilling", "shipping", "resuming"])
async def test_the_prefill_half_s_deadline(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _held(monkeypatch, phase) as held:
        await held.begin(timeout_s=5.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await held.call
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        said = f"prefill of a for {held.router.decode.address} did not settle within 5.0 s"
        assert said in (caught.value.details() or "")
        held.gate.opened.set()
        failed = pb.PrefillFailed(request_id="a", attempt=held.request.attempt, reason=said)
        await held.router.call.write(pb.DecodeCommand(prefill_failed=failed))
        done = len(held.request.resumed_token_ids)
        assert await held.router.collect("a") == [expected(PROMPT, 50)[done:]]
        await held.check_nothing_is_left(held.router)
        await held.router.close()


async def test_what_is_cancelled_twice_or_was_never_there_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _held(monkeypatch, "prefilling") as held:
        await held.router.cancel("nobody")
        await held.begin()
        await held.cancel()
        await held.cancel()
        held.gate.opened.set()
        await held.router.collect("a")
        await held.cancel()
        assert len(held.router.outputs["a"]) == 1
        await held.check_nothing_is_left(held.router)
        await held.router.close()
