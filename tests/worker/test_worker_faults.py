"""Faults at a worker's own points: a step that hangs, a token that kills, rules that come at run time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from harness import TIMEOUT_S, expected, request, workers

from baton import faults
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.channels import open_channel
from baton.proto.codec import request_to_proto
from baton.worker.runtime import PROTOCOL_VERSION
from baton.worker.watchdog import EXIT_STUCK

LONG = list(range(1, 301))


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    faults.install([], instance_id="", role="")


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that this process has sent to itself, in place of sending them."""
    sent: list[int] = []

    def kill(pid: int, number: int) -> None:
        assert pid == os.getpid()
        sent.append(number)

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    return sent


async def test_a_step_that_hangs_is_found_by_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end(code: int) -> None:
        assert code == EXIT_STUCK
        loop.call_soon(ended.set)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    async with workers(monkeypatch, {"step_timeout_s": 0.2}) as both:
        router = await both.router()
        faults.install(["decode-0 step nth=3 hang for=1"], instance_id="decode-0", role="decode")
        await router.submit(request("stuck", [1, 2, 3]))
        await asyncio.wait_for(ended.wait(), TIMEOUT_S)
        # This process goes on, and so does the step, in time.
        assert await router.collect("stuck") == [expected([1, 2, 3], 6)]
        await router.close()


async def test_a_prompt_with_a_certain_token_kills_whoever_gets_it(
    kills: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()
        faults.install(["any submit token=300 kill"], instance_id="decode-0", role="decode")
        await router.submit(request("harmless", LONG[:-1]), remote=True)
        await router.start_prefill(request("harmless", LONG[:-1]))
        await router.collect("harmless")
        assert kills == []
        await router.submit(request("local", LONG))
        await router.collect("local")
        assert kills == [signal.SIGKILL]
        # In place of dying, the process goes on; both halves of a handover are in it.
        await router.submit(request("remote", LONG), remote=True)
        await router.start_prefill(request("remote", LONG))
        await router.collect("remote")
        assert kills == [signal.SIGKILL] * 3
        await router.wait_until_settled()
        await router.close()


@pytest.mark.parametrize(("nth", "deaths"), [(1, 1), (12, 1), (13, 0)])
async def test_each_output_token_is_an_event(
    nth: int, deaths: int, kills: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()
        faults.install([f"decode-0 emit nth={nth} kill"], instance_id="decode-0", role="decode")
        for name in ("a", "b"):
            await router.submit(request(name, [1, 2, 3], max_tokens=6))
        await router.collect("a", "b")
        assert len(kills) == deaths
        await router.close()


async def test_each_group_of_layers_is_an_event(kills: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"transfer.one_message_below_tokens": 0}
    async with workers(monkeypatch, settings, layers_per_group=1) as both:
        router = await both.router()
        faults.install(["prefill layers every=1 kill"], instance_id="prefill-0", role="prefill")
        await router.submit(request("a", LONG[:20]), remote=True)
        await router.start_prefill(request("a", LONG[:20]))
        assert await router.collect("a") == [expected(LONG[:20], 6)]
        assert len(kills) == 4  # the fake model's layers
        await router.close()


async def test_rules_come_at_run_time_only_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()
        async with grpc.aio.insecure_channel(router.decode.address) as channel:
            stub = rpc.WorkerStub(channel)

            async def set_faults(*rules: str) -> Any:
                return await stub.SetFaults(pb.SetFaultsRequest(rules=rules), timeout=TIMEOUT_S)

            with pytest.raises(grpc.aio.AioRpcError, match=r"FAILED_PRECONDITION") as caught:
                await set_faults("decode step kill")
            assert "faults.allow_at_runtime: true" in (caught.value.details() or "")
            assert faults.active is None

            faults.install([], instance_id="decode-0", role="decode", allow_at_runtime=True)
            assert not (await set_faults("decode step nth=2 delay for=0.01", "decode emit nth=3 delay for=0.01")).fired
            with pytest.raises(grpc.aio.AioRpcError, match="'stp' is no point"):
                await set_faults("decode stp kill")
            await router.submit(request("a", [1, 2, 3]))
            await router.collect("a")
            fired = (await set_faults()).fired
            assert [(one.rule, one.count) for one in fired] == [
                ("decode step nth=2 delay for=0.01", 1),
                ("decode emit nth=3 delay for=0.01", 1),
            ]
            assert not (await set_faults()).fired
        await router.close()


async def test_a_damaged_command_harms_its_stream_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another command, or one that cannot be read, which ends the stream; others and the blocks are well."""
    faults.install([], instance_id="router-0", role="router", allow_at_runtime=True)
    async with workers(monkeypatch) as both:
        router = await both.router()
        hello = pb.Hello(router_id="damaged", protocol_version=PROTOCOL_VERSION)
        rules = [f"router rpc.send nth=1 flip seed={seed}" for seed in range(48)] + ["router rpc.send nth=1 truncate"]
        for number, rule in enumerate(rules):
            async with open_channel(router.decode.address) as channel:
                call: Any = rpc.DecodeStub(channel).Stream()
                await call.write(pb.DecodeCommand(hello=hello))
                await asyncio.wait_for(call.read(), TIMEOUT_S)
                faults.replace([rule])
                submit = pb.Submit(request=request_to_proto(request(f"damaged-{number}", LONG[:20])))
                with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
                    await call.write(pb.DecodeCommand(submit=submit))
                    await asyncio.wait_for(_until_ended(call), 1.0)
                faults.replace([])
        await router.submit(request("after", LONG[:20]))
        assert await router.collect("after") == [expected(LONG[:20], 6)]
        await router.wait_until_settled()
        await router.close()


async def _until_ended(call: Any) -> None:
    while (event := await call.read()) is not grpc.aio.EOF:
        if any(output.finish_reason for output in event.step.outputs):
            return
