"""Pairs of workers: handover, its failures, cancellation of both halves, lost streams, an absent registry."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from tests.router.fake_worker import FakeDecode, expected
from tests.router.harness import Harness, running_router

from baton.proto.baton.v1 import inference_pb2
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc

LONG = {"prompt": [20] * 200, "max_tokens": 4}
WANTED = expected([20] * 200, 4)


async def test_long_prompts_go_out_as_a_pair(router: Harness) -> None:
    # The decode worker waits for the prompt to have arrived at the other half, as a real one does.
    router.decode.gate.clear()
    answer = asyncio.create_task(router.post("/v1/completions", LONG))
    await asyncio.wait_for(router.prefill.started.wait(), 10)
    router.decode.gate.set()
    response = await answer
    assert response.json()["choices"][0]["text"] == router.text(WANTED)
    submit, prefill = router.decode.submits[0], router.prefill.requests[0]
    assert submit.remote_prefill
    assert submit.handover_timeout_s == 60
    assert prefill.request == submit.request
    assert prefill.decode_address == router.decode.address
    assert prefill.decode_incarnation == router.decode.incarnation
    assert 0 < prefill.timeout_s <= 60


async def test_short_prompts_are_prefilled_by_the_decode_worker(router: Harness) -> None:
    await router.post("/v1/completions", {"prompt": [21] * 32, "max_tokens": 1})
    assert not router.decode.submits[0].remote_prefill


async def test_repeated_prompts_are_prefilled_by_the_decode_worker(router: Harness) -> None:
    await router.post("/v1/completions", LONG)
    await router.post("/v1/completions", LONG)
    await router.post("/v1/completions", {**LONG, "cache_salt": "other"})
    assert [submit.remote_prefill for submit in router.decode.submits] == [True, False, True]


async def test_a_failed_prefill_is_told_to_the_decode_worker(router: Harness) -> None:
    router.prefill.fail_with = "no paper"
    router.decode.wait_for_prefill = True
    response = await router.post("/v1/completions", LONG)
    assert response.json()["choices"][0]["text"] == router.text(WANTED)
    assert "no paper" in router.decode.prefill_failures[0]


async def test_a_prefill_worker_that_is_gone(router: Harness) -> None:
    await router.prefill.stop()
    router.decode.wait_for_prefill = True
    response = await router.post("/v1/completions", LONG)
    assert response.json()["choices"][0]["text"] == router.text(WANTED)
    assert "UNAVAILABLE" in router.decode.prefill_failures[0]


async def test_a_prefill_worker_that_is_silent_is_not_waited_for(router: Harness) -> None:
    router.prefill.gate.clear()
    router.decode.wait_for_prefill = True
    answer = asyncio.create_task(router.post("/v1/completions", LONG))
    await asyncio.wait_for(router.prefill.started.wait(), 10)
    await router.registry.publish(router.decode)  # its lease has run out
    assert (await answer).json()["choices"][0]["text"] == router.text(WANTED)
    assert router.decode.prefill_failures == ["prefill on prefill-0 failed: it is gone, or silent"]


async def test_both_halves_stop_when_the_client_leaves(router: Harness) -> None:
    router.prefill.gate.clear()
    router.decode.wait_for_prefill = True
    waiting = asyncio.create_task(router.post("/v1/completions", LONG))
    await asyncio.wait_for(router.prefill.started.wait(), 10)
    waiting.cancel()
    await asyncio.wait_for(router.prefill.ended.wait(), 10)
    await router.decode.until(lambda: len(router.decode.cancelled) == 1)
    assert router.prefill.cancelled == 1
    assert router.decode.prefill_failures == []


async def test_a_prefill_that_settles_after_the_answer_is_left_alone(router: Harness) -> None:
    router.prefill.gate.clear()
    assert (await router.post("/v1/completions", LONG)).status_code == 200
    await asyncio.wait_for(router.prefill.started.wait(), 10)
    router.prefill.gate.set()
    await asyncio.wait_for(router.prefill.ended.wait(), 10)
    assert router.prefill.cancelled == 0


async def test_requests_move_to_another_worker_before_their_first_token(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        other = FakeDecode("decode-1")
        await other.start()
        try:
            router.decode.gate.clear()
            other.gate.clear()
            await router.registry.publish(router.decode, other)
            await router.until_connected("decode-0", "decode-1")
            body = {"prompt": "Hello", "max_tokens": 3}
            wanted = router.text(expected(router.tokenizer.encode("Hello"), 3))
            running = [asyncio.create_task(router.post("/v1/completions", body)) for _ in range(4)]
            await router.decode.until(lambda: len(router.decode.submits) == 2)
            await other.until(lambda: len(other.submits) == 2)
            await router.decode.stop()
            await other.until(lambda: len(other.submits) == 4)
            other.gate.set()
            responses = await asyncio.gather(*running)
            assert [response.json()["choices"][0]["text"] for response in responses] == [wanted] * 4
            attempts = sorted(submit.request.attempt for submit in other.submits)
            assert attempts == [0, 0, 1, 1]
        finally:
            await other.stop()


async def test_a_message_that_is_missing_breaks_the_stream_and_the_answer_goes_on(router: Harness) -> None:
    router.decode.loses = {7}
    router.decode.beats = False
    body = {"prompt": [20] * 30, "max_tokens": 12}
    answer = (await router.post("/v1/completions", body)).json()
    assert answer["choices"][0]["text"] == router.text(expected([20] * 30, 12))
    assert answer["usage"]["completion_tokens"] == 12
    assert [len(submit.request.resumed_token_ids) > 0 for submit in router.decode.submits] == [False, True]


async def test_a_message_that_comes_again_is_dropped(router: Harness) -> None:
    router.decode.repeats = set(range(2, 12))
    body = {"prompt": [20] * 30, "max_tokens": 12}
    answer = (await router.post("/v1/completions", body)).json()
    assert answer["choices"][0]["text"] == router.text(expected([20] * 30, 12))
    assert len(router.decode.submits) == 1


async def test_load_spreads_over_decode_workers(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        other = FakeDecode("decode-1")
        await other.start()
        try:
            for worker in (router.decode, other):
                worker.gate.clear()
            await router.registry.publish(router.decode, other)
            await router.until_connected("decode-0", "decode-1")
            prompts = [[20 + number] * 5 for number in range(6)]
            running = [asyncio.create_task(router.post("/v1/completions", {"prompt": prompt})) for prompt in prompts]
            await other.until(lambda: len(other.submits) == 3)
            await router.decode.until(lambda: len(router.decode.submits) == 3)
            for worker in (router.decode, other):
                worker.gate.set()
            assert {response.status_code for response in await asyncio.gather(*running)} == {200}
        finally:
            await other.stop()


async def test_the_last_view_serves_while_the_registry_is_away(router: Harness) -> None:
    port = int(router.registry.address.rpartition(":")[2])
    await router.registry.stop()
    assert (await router.post("/v1/completions", LONG)).status_code == 200
    # It comes back empty: a worker whose stream stands is not dropped for that.
    router.registry.workers = []
    await router.registry.start(port)
    announced = len(router.registry.announced)
    await router.registry.until_announced(lambda _: len(router.registry.announced) > announced)
    assert (await router.post("/v1/completions", {"prompt": "x"})).status_code == 200


async def test_a_restarted_worker_is_a_stranger_until_the_registry_names_it(router: Harness) -> None:
    port = int(router.decode.address.rpartition(":")[2])
    await router.decode.stop()
    fresh = FakeDecode("decode-0")
    await fresh.start(port)
    try:
        await fresh.until(lambda: len(fresh.hellos) == 1)
        assert (await router.post("/v1/completions", {"prompt": "x"})).status_code == 503
        assert fresh.submits == []
        await router.registry.publish(fresh, router.prefill)
        async with asyncio.timeout(10):
            while (await router.post("/v1/completions", {"prompt": "x"})).status_code != 200:
                assert fresh.hellos
        assert len(fresh.submits) == 1
    finally:
        await fresh.stop()


async def test_a_new_request_waits_a_moment_for_a_stream_that_broke(router: Harness) -> None:
    port = int(router.decode.address.rpartition(":")[2])
    await router.decode.stop()
    await asyncio.sleep(0.2)
    waiting = asyncio.create_task(router.post("/v1/completions", {"prompt": [20] * 30, "max_tokens": 3}))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await router.decode.start(port)
    assert (await waiting).status_code == 200


async def test_a_new_request_does_not_wait_for_a_worker_that_is_listed_no_more(router: Harness) -> None:
    await router.decode.stop()
    await router.registry.publish(router.prefill)
    async with asyncio.timeout(10):
        while "decode-0" in str((await router.grpc.GetServerInfo(inference_pb2.GetServerInfoRequest())).instances):
            await asyncio.sleep(0.02)
    response = await router.post("/v1/completions", {"prompt": "x"})
    assert response.status_code == 503
    assert "no decode worker is ready (0 known)" in response.text


async def test_the_internal_worker_service(router: Harness) -> None:
    status = next(status for status in router.registry.announced if status.state == "ready")
    assert status.role == "router"
    assert status.ranks[0].pid > 0
    async with grpc.aio.insecure_channel(status.address) as channel:
        stub = rpc.WorkerStub(channel)
        now = await stub.GetStatus(pb.GetStatusRequest())
        assert (now.instance_id, now.incarnation) == ("router-0", status.incarnation)
        await stub.Shutdown(pb.ShutdownRequest(grace_s=1))
    assert router.serving is not None
    await asyncio.wait_for(router.serving, 10)


async def test_metrics(router: Harness) -> None:
    await router.post("/v1/completions", {"prompt": [20] * 30, "max_tokens": 5})
    text = (await router.http.get(router.http_url + "/metrics")).text
    for line in (
        'baton_prompt_tokens_total{role="router"} 30.0',
        'baton_generation_tokens_total{role="router"} 5.0',
        'baton_prefix_cache_hit_tokens_total{role="router"} 16.0',
        'baton_requests_total{finish_reason="length",role="router"} 1.0',
        'baton_time_to_first_token_seconds_count{role="router"} 1.0',
        'baton_inter_token_latency_seconds_count{role="router"} 4.0',
        'baton_request_duration_seconds_count{role="router"} 1.0',
    ):
        assert line in text, line
