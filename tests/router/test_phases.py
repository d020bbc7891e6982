"""In every phase of a request: its deadline gives one error that says what was waited for, and both halves stop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import grpc
import httpx
import pytest
from tests.router.fake_worker import FakeDecode, expected
from tests.router.harness import Harness

from baton.proto.baton.v1 import inference_pb2 as pb

SHORT, LONG = [20] * 30, [20] * 200


async def _queued(router: Harness) -> None:
    router.decode.gate.clear()


async def _prefilling(router: Harness) -> None:
    router.prefill.gate.clear()
    router.decode.wait_for_prefill = True


async def _decoding(router: Harness) -> None:
    router.decode.pause_after = 2


async def _resuming(router: Harness) -> None:
    """Its worker is gone after two tokens, and there is no other one."""
    router.decode.pause_after = 2

    async def kill() -> None:
        while router.decode.gate.is_set():
            await asyncio.sleep(0.01)
        await router.decode.stop()

    router.killing = asyncio.create_task(kill())  # type: ignore[attr-defined]


Phase = Callable[[Harness], Awaitable[None]]
PHASES = [
    pytest.param(_queued, SHORT, "after 0 tokens, while decode-0 had it in its queue or read its prompt", id="queued"),
    pytest.param(_prefilling, LONG, "after 0 tokens, while prefill-0 read its prompt for decode-0", id="prefilling"),
    pytest.param(_decoding, SHORT, "after 2 tokens, while decode-0 wrote its answer", id="decoding"),
    pytest.param(
        _resuming,
        SHORT,
        "after 2 tokens and 1 interruptions, while it was waiting for a decode worker to be ready",
        id="resuming",
    ),
]


async def _check_settled(router: Harness, phase: Phase) -> None:
    """Nothing is left of the request in the router, and both halves were told."""
    if phase is not _resuming:
        await router.decode.until(lambda: len(router.decode.cancelled) == 1 and not router.decode.active)
    if phase is _prefilling:
        await asyncio.wait_for(router.prefill.ended.wait(), 10)
        assert router.prefill.cancelled == 1
    async with asyncio.timeout(10):
        while 'baton_requests_running{role="router"} 0.0' not in await _metrics(router):
            await asyncio.sleep(0.01)
    killing = getattr(router, "killing", None)
    if killing is not None:
        await killing


async def _metrics(router: Harness) -> str:
    return (await router.http.get(router.http_url + "/metrics")).text


@pytest.mark.parametrize(("phase", "prompt", "said"), PHASES)
@pytest.mark.parametrize("streamed", [False, True])
async def test_the_header_s_deadline(
    router: Harness, phase: Phase, prompt: list[int], said: str, streamed: bool
) -> None:
    await phase(router)
    body = {"prompt": prompt, "max_tokens": 9, "stream": streamed}
    response = await router.post("/v1/completions", body, headers={"X-Request-Timeout": "2"})
    if streamed and "after 0" not in said:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        errors = [event["error"] for event in map(json.loads, events[:-1]) if "error" in event]
        assert len(errors) == 1
        error = errors[0]
    else:
        assert response.status_code == 504
        error = response.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert said in error["message"]
    await _check_settled(router, phase)


@pytest.mark.parametrize(("phase", "prompt", "said"), PHASES)
async def test_a_grpc_deadline(
    router: Harness, phase: Phase, prompt: list[int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long before the client's own, which says nothing of the phase, ends the call.
    monkeypatch.setattr("baton.router.grpc._DEADLINE_MARGIN_S", 17.0)
    monkeypatch.setattr("baton.router.grpc._DEADLINE_MARGIN_SHARE", 1.0)
    await phase(router)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), options=pb.GenerationOptions(max_tokens=9), stream=True
    )
    call = router.grpc.Generate(request, timeout=20.0)
    for _ in range(0 if "after 0" in said else 2):
        assert (await call.read()).token_ids
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert said in (caught.value.details() or "")
    await _check_settled(router, phase)


@pytest.mark.parametrize(("phase", "prompt", "said"), PHASES)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_vanishes(
    router: Harness, phase: Phase, prompt: list[int], said: str, streamed: bool
) -> None:
    await phase(router)
    async with httpx.AsyncClient(timeout=20) as client:
        body = {"prompt": prompt, "max_tokens": 9, "stream": streamed}
        leaving = asyncio.create_task(client.post(router.http_url + "/v1/completions", json=body))
        await router.decode.until(lambda: len(router.decode.submits) == 1)
        if phase is _prefilling:
            await asyncio.wait_for(router.prefill.started.wait(), 10)
        if phase is _decoding:
            while router.decode.gate.is_set():
                await asyncio.sleep(0.01)
        if phase is _resuming:
            await router.killing  # type: ignore[attr-defined]
            async with asyncio.timeout(10):
                while 'baton_resumes_total{phase="streaming",role="router"} 1.0' not in await _metrics(router):
                    await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    await _check_settled(router, phase)
    if phase is _resuming:
        # A worker that comes now gets nothing of it.
        other = FakeDecode("decode-1")
        await other.start()
        try:
            await router.registry.publish(other)
            await router.until_connected("decode-1")
            await asyncio.sleep(0.3)
            assert other.submits == []
        finally:
            await other.stop()


@pytest.mark.parametrize(("phase", "prompt", "said"), PHASES)
async def test_an_abort(router: Harness, phase: Phase, prompt: list[int], said: str) -> None:
    await phase(router)
    body = {"prompt": prompt, "max_tokens": 9, "request_id": "mine"}
    running = asyncio.create_task(router.post("/v1/completions", body))
    await router.decode.until(lambda: len(router.decode.submits) == 1)
    if phase is _resuming:
        await router.killing  # type: ignore[attr-defined]
    if phase is _prefilling:
        await asyncio.wait_for(router.prefill.started.wait(), 10)
    await router.grpc.Abort(pb.AbortRequest(request_id="mine"))
    response = await running
    assert response.status_code == 499
    assert "was aborted" in response.json()["error"]["message"]
    await _check_settled(router, phase)


async def test_one_choice_that_fails_ends_the_others(router: Harness) -> None:
    router.decode.gate.clear()
    router.decode.fails_choice = 1
    response = await router.post("/v1/completions", {"prompt": SHORT, "max_tokens": 9, "n": 3})
    assert response.status_code == 500
    assert "decode-0 could not serve the request: choice 1 failed" in response.json()["error"]["message"]
    await router.decode.until(lambda: len(router.decode.cancelled) == 2 and not router.decode.active)
    router.decode.gate.set()
    router.decode.fails_choice = None
    assert (await router.post("/v1/completions", {"prompt": SHORT, "n": 3})).status_code == 200


async def test_a_request_that_waits_for_a_worker_goes_on_when_one_comes(router: Harness) -> None:
    await _resuming(router)
    running = asyncio.create_task(router.post("/v1/completions", {"prompt": SHORT, "max_tokens": 9}))
    await router.decode.until(lambda: len(router.decode.submits) == 1)
    await router.killing  # type: ignore[attr-defined]
    other = FakeDecode("decode-1")
    await other.start()
    try:
        await router.registry.publish(other)
        assert (await running).json()["choices"][0]["text"] == router.text(expected(SHORT, 9))
        assert len(other.submits[0].request.resumed_token_ids) == 2
    finally:
        await other.stop()
