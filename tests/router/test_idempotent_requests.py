"""Requests that carry an idempotency key, over HTTP and gRPC, from a client's side."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from tests.router.fake_worker import expected
from tests.router.harness import Harness

from baton.errors import UnavailableError
from baton.proto.baton.v1 import inference_pb2 as pb
from baton.router.idempotency import Running
from baton.state.memory import MemoryState

BODY = {"prompt": [20] * 30, "max_tokens": 12}


@pytest_asyncio.fixture(name="state")
async def _state(monkeypatch: pytest.MonkeyPatch) -> list[MemoryState]:
    """The state of the router of this test, once it has one."""
    made: list[MemoryState] = []
    begin = MemoryState.__init__

    def init(self: MemoryState, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(MemoryState, "__init__", init)
    return made


async def _post(router: Harness, body: Any = BODY, key: str = "k", **headers: str) -> httpx.Response:
    return await router.post("/v1/completions", body, headers={"Idempotency-Key": key, **headers})


async def _metrics(router: Harness) -> dict[str, float]:
    text = (await router.http.get(router.http_url + "/metrics")).text
    pairs = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in pairs}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("extras", [{}, {"n": 2, "logprobs": 1, "stream_options": {"include_usage": True}}])
async def test_an_answer_is_sent_again_and_not_computed_again(
    router: Harness, streamed: bool, extras: dict[str, Any]
) -> None:
    body = {**BODY, "stream": streamed, **(extras if streamed else {"n": extras.get("n", 1)})}
    first = await _post(router, body)
    assert "Idempotency-Replayed" not in first.headers
    before, submits = await _metrics(router), len(router.decode.submits)
    again = await _post(router, body)
    assert again.status_code == 200
    assert again.content == first.content
    assert again.headers["Content-Type"] == first.headers["Content-Type"]
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["X-Request-Id"] != first.headers["X-Request-Id"]
    assert len(router.decode.submits) == submits
    after = await _metrics(router)
    for name in ("generation_tokens_total", "prompt_tokens_total"):
        assert after[f'baton_{name}{{role="router"}}'] == before[f'baton_{name}{{role="router"}}']
    assert after['baton_idempotent_requests_total{outcome="replayed",role="router"}'] == 1
    other = await _post(router, body, key="l")
    assert "Idempotency-Replayed" not in other.headers


async def test_plain_tokens_that_took_the_short_way_are_sent_again(router: Harness) -> None:
    router.decode.plain_pause_s = 0.002
    body = {**BODY, "max_tokens": 100, "stream": True, "return_token_ids": True}
    first, again = await _post(router, body), await _post(router, body)
    assert first.text.count("data: ") == 101
    assert again.content == first.content


async def test_while_it_is_in_work_a_repeat_is_told_to_wait(router: Harness) -> None:
    router.decode.gate.clear()
    first = asyncio.create_task(_post(router))
    await router.decode.until(lambda: len(router.decode.submits) == 1)
    busy = await _post(router)
    assert busy.status_code == 409
    assert busy.headers["Retry-After"] == "1"
    assert busy.json()["error"]["code"] == "idempotency_key_in_use"
    router.decode.gate.set()
    wanted = (await first).content
    assert (await _post(router)).content == wanted


async def test_a_key_stands_for_one_body_and_one_endpoint(router: Harness) -> None:
    await _post(router)
    refused = await _post(router, {**BODY, "max_tokens": 13})
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "idempotency_key_reused"
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answer = await router.post("/v1/chat/completions", chat, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 200


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
async def test_bad_keys(router: Harness, key: str) -> None:
    refused = await _post(router, key=key)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert (await router.post("/v1/completions", BODY, headers=twice)).status_code == 400
    assert router.decode.submits == []


@pytest.mark.parametrize("streamed", [False, True])
async def test_when_the_client_left_it_runs_again_with_the_same_seed(router: Harness, streamed: bool) -> None:
    router.decode.gate.clear()
    body = {**BODY, "n": 2, "stream": streamed}
    leaving = asyncio.create_task(_post(router, body))
    await router.decode.until(lambda: len(router.decode.submits) == 2)
    leaving.cancel()
    await router.decode.until(lambda: len(router.decode.cancelled) == 2)
    router.decode.gate.set()
    async with asyncio.timeout(10):
        while (answer := await _post(router, body)).status_code == 409:
            await asyncio.sleep(0.02)
    assert answer.status_code == 200
    assert "Idempotency-Replayed" not in answer.headers
    seeds = [submit.request.sampling.seed for submit in router.decode.submits]
    assert sorted(seeds[:2]) == sorted(seeds[2:])
    assert seeds[0] != seeds[1]
    await _post(router, body, key="other")
    assert router.decode.submits[-1].request.sampling.seed not in seeds


async def test_the_claim_of_a_router_that_died_ends_soon(state: list[MemoryState], router: Harness) -> None:
    await _post(router)
    (record_key,) = await state[0].scan("idempotency/")
    digest = state[0]._values[record_key][0][1:33]
    running = Running(b"x" * 16, digest).encode()
    await state[0].put(record_key, running, ttl_s=60)
    assert (await _post(router)).status_code == 409
    await state[0].put(record_key, running, ttl_s=0.1)
    await asyncio.sleep(0.2)
    assert (await _post(router)).status_code == 200
    assert len(router.decode.submits) == 2


async def test_without_state_requests_are_served_as_if_without_a_key(
    router: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any, **__: Any) -> None:
        raise UnavailableError("redis at nowhere does not answer")

    monkeypatch.setattr(MemoryState, "put_new", away)
    for _ in range(2):
        answer = await _post(router)
        assert answer.status_code == 200
        assert answer.headers["Idempotency-Status"] == "unavailable"
    assert len(router.decode.submits) == 2
    assert router.decode.submits[0].request.sampling.seed == router.decode.submits[1].request.sampling.seed
    metrics = await _metrics(router)
    assert metrics['baton_idempotent_requests_total{outcome="unavailable",role="router"}'] == 2


async def test_state_that_goes_away_meanwhile_costs_the_replay_only(
    router: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any, **__: Any) -> None:
        raise UnavailableError("redis at nowhere does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryState, "replace", away)
        answer = await _post(router)
    assert answer.json()["choices"][0]["text"] == router.text(expected([20] * 30, 12))
    assert answer.headers["Idempotency-Status"] == "unavailable"


async def test_a_long_answer_is_not_kept_and_computed_again(router: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.router.limits.MAX_KEPT_ANSWER_BYTES", 100)
    answer = await _post(router)
    assert answer.headers["Idempotency-Status"] == "not-kept"
    again = await _post(router)
    assert again.json()["choices"] == answer.json()["choices"]
    assert len(router.decode.submits) == 2


async def test_failures_are_not_kept(router: Harness) -> None:
    router.decode.fail_with = "out of paper"
    assert (await _post(router)).status_code == 500
    assert "out of paper" in (await _post(router, {**BODY, "stream": True}, key="s")).text
    router.decode.fail_with = ""
    assert (await _post(router)).status_code == 200
    streamed = await _post(router, {**BODY, "stream": True}, key="s")
    assert "out of paper" not in streamed.text
    assert (await _post(router, {**BODY, "max_tokens": -1}, key="b")).status_code == 400


async def test_grpc(router: Harness) -> None:
    metadata = (("idempotency-key", "k"),)

    async def ask(max_tokens: int = 8, *, stream: bool = True) -> tuple[list[pb.GenerateResponse], dict[str, str]]:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[20] * 30), options=pb.GenerationOptions(max_tokens=max_tokens, n=2)
        )
        request.stream = stream
        call = router.grpc.Generate(request, metadata=metadata)
        messages = [message async for message in call]
        return messages, {str(name): str(value) for name, value in await call.initial_metadata()}

    first, said = await ask()
    assert "idempotency-replayed" not in said
    again, said = await ask()
    assert said["idempotency-replayed"] == "true"
    assert again == first
    assert len(router.decode.submits) == 2
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(9)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    metadata = (("idempotency-key", "whole"),)
    router.decode.gate.clear()
    running = asyncio.create_task(ask(stream=False))
    await router.decode.until(lambda: len(router.decode.submits) == 4)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(stream=False)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert dict(caught.value.trailing_metadata() or ())["retry-after-s"] == "1"
    router.decode.gate.set()
    whole, _ = await running
    assert len(whole) == 2
    assert (await ask(stream=False))[0] == whole
