"""A prefill that fails is tried on another worker, and the decode worker told who comes; or computes it itself."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from tests.router.fake_worker import FakePrefill, expected
from tests.router.harness import Harness, running_router

from baton.router import dispatch

LONG = {"prompt": [20] * 200, "max_tokens": 4}
WANTED = expected([20] * 200, 4)


@asynccontextmanager
async def router_of(tmp_path: Path, num_prefills: int) -> AsyncIterator[tuple[Harness, list[FakePrefill]]]:
    """A router with one decode worker that waits for prefills, and so many prefill workers."""
    async with running_router(tmp_path) as router:
        prefills = [FakePrefill(f"prefill-{number}") for number in range(num_prefills)]
        router.decode.wait_for_prefill = True
        for prefill in prefills:
            prefill.on_done = lambda request: router.decode.prefilled[request.request.request_id].set()
            await prefill.start()
        try:
            await router.registry.publish(router.decode, *prefills)
            await router.until_connected("decode-0", *(prefill.instance_id for prefill in prefills))
            yield router, prefills
        finally:
            for prefill in prefills:
                await prefill.stop()


async def ask(router: Harness) -> None:
    response = await asyncio.wait_for(router.post("/v1/completions", LONG), 10)
    assert response.json()["choices"][0]["text"] == router.text(WANTED)


async def outcomes(router: Harness) -> dict[str, float]:
    text = (await router.http.get(router.http_url + "/metrics")).text
    found = re.findall(r'^baton_prefill_retries_total\{outcome="(\w+)",role="router"\} (\S+)$', text, re.MULTILINE)
    return {name: float(count) for name, count in found}


async def test_another_worker_goes_on_where_one_has_failed(tmp_path: Path) -> None:
    async with router_of(tmp_path, 2) as (router, prefills):
        for prefill in prefills:
            prefill.fail_with = "no paper" if prefill is prefills[0] else ""
        await ask(router)
        failed, other = prefills[0].requests, prefills[1].requests
        if failed:
            assert [request.handover for request in (*failed, *other)] == [0, 1]
            assert router.decode.next_handovers == [1]
            assert "no paper" in router.decode.prefill_failures[0]
            assert await outcomes(router) == {"attached": 1.0}
        assert other[0].request == router.decode.submits[0].request
        assert other[0].timeout_s <= 60


async def test_it_is_tried_so_often_and_never_twice_on_one_worker(tmp_path: Path) -> None:
    async with router_of(tmp_path, 4) as (router, prefills):
        for prefill in prefills:
            prefill.fail_with = "no paper"
        await ask(router)
        assert sorted(len(prefill.requests) for prefill in prefills) == [0, 1, 1, 1]
        assert router.decode.next_handovers == [1, 2, 0]
        assert await outcomes(router) == {"failed": 2.0}


async def test_where_there_is_no_other_the_decode_worker_computes(tmp_path: Path) -> None:
    async with router_of(tmp_path, 1) as (router, prefills):
        prefills[0].fail_with = "no paper"
        await ask(router)
        assert router.decode.next_handovers == [0]
        assert await outcomes(router) == {"none": 1.0}


@pytest.mark.parametrize("code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT])
async def test_what_would_fail_elsewhere_too_is_not_tried_again(tmp_path: Path, code: grpc.StatusCode) -> None:
    async with router_of(tmp_path, 2) as (router, prefills):
        for prefill in prefills:
            prefill.fail_with, prefill.code = "the decode worker gave up", code
        await ask(router)
        assert sorted(len(prefill.requests) for prefill in prefills) == [0, 1]
        assert router.decode.next_handovers == [0]
        assert await outcomes(router) == {}


async def test_a_worker_that_dies_in_the_middle(tmp_path: Path) -> None:
    async with router_of(tmp_path, 2) as (router, prefills):
        for prefill in prefills:
            prefill.gate.clear()
        answer = asyncio.create_task(ask(router))
        async with asyncio.timeout(10):
            while not any(prefill.requests for prefill in prefills):
                await asyncio.sleep(0.01)
        dying = next(prefill for prefill in prefills if prefill.requests)
        (other,) = (prefill for prefill in prefills if prefill is not dying)
        other.gate.set()
        await dying.stop()
        await answer
        assert [request.handover for request in other.requests] == [1]
        assert router.decode.next_handovers == [1]


@pytest.mark.parametrize("they_died", [True, False])
async def test_two_deaths_are_enough(tmp_path: Path, they_died: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of which prefill workers die does not go through all of them, nor to the decode worker then."""
    monkeypatch.setattr(dispatch, "_JUDGE_AFTER_S", 3.0)
    async with router_of(tmp_path, 3) as (router, prefills):
        for prefill in prefills:
            prefill.fail_with, prefill.code = "Socket closed", grpc.StatusCode.UNAVAILABLE
        asking = asyncio.create_task(router.post("/v1/completions", LONG))
        async with asyncio.timeout(10):
            while sum(len(prefill.requests) for prefill in prefills) < 2:
                await asyncio.sleep(0.01)
        if they_died:
            await router.registry.publish(router.decode, *(prefill for prefill in prefills if not prefill.requests))
            response = await asking
            assert response.json()["error"]["code"] == "request_quarantined"
            assert sorted(len(prefill.requests) for prefill in prefills) == [0, 1, 1]
        else:
            # Only their connections broke: it is tried again.
            response = await asking
            assert response.json()["choices"][0]["text"] == router.text(WANTED)
            assert [submit.request.attempt for submit in router.decode.submits] == [0, 1]
        assert router.decode.next_handovers == [1]
