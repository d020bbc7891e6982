"""Real workers with fake engines: a second prefill worker's try writes into the blocks of the first one's."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from harness import TIMEOUT_S, Router, expected, request, workers

from baton.decode_worker import worker as decode_worker
from baton.engine.fake import LatencyModel
from baton.proto.baton.v1 import worker_pb2 as pb

LONG = list(range(1, 301))
SLOW = {"latency": LatencyModel(base_s=0.05), "max_batch_tokens": 16}


async def say_failed(router: Router, name: str, next_handover: int) -> None:
    failed = pb.PrefillFailed(request_id=name, reason="the test says so", next_handover=next_handover)
    await router.call.write(pb.DecodeCommand(prefill_failed=failed))


async def until_reserved(router: Router) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not (await router.loads())[0].kv_blocks_owned:
            await asyncio.sleep(0.01)


async def until_prefilling(router: Router) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not (await router.loads())[1].running_requests:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("comes", ["before the word", "after the word"])
async def test_the_next_try_lands_in_the_same_blocks(comes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_worker, "_WORD_TIMEOUT_S", TIMEOUT_S)
    async with workers(monkeypatch, {"transfer.one_message_below_tokens": 0}, prefill_fake=SLOW) as both:
        router = await both.router()
        await router.submit(request("a", LONG), remote=True)
        first = router.start_prefill(request("a", LONG))
        await until_prefilling(router)
        await until_reserved(router)
        owned = (await router.loads())[0].kv_blocks_owned
        first.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            while (await router.loads())[1].kv_blocks_owned:
                await asyncio.sleep(0.01)
        if comes == "before the word":
            second = asyncio.ensure_future(router.start_prefill(request("a", LONG), handover=1))
            await until_prefilling(router)
            await say_failed(router, "a", 1)
        else:
            await say_failed(router, "a", 1)
            second = asyncio.ensure_future(router.start_prefill(request("a", LONG), handover=1))
        assert await router.collect("a") == [expected(LONG, 6)]
        reply = await second
        assert reply.shipped_tokens == len(LONG)
        assert router.prefill_instances["a"] == "prefill-0", "the second try's pages were used"
        assert owned == 19
        await router.wait_until_settled()
        await router.close()


async def test_an_older_try_that_comes_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()
        await router.submit(request("a", LONG), remote=True)
        await until_reserved(router)
        await say_failed(router, "a", 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.start_prefill(request("a", LONG), handover=1)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "a#0.2 has taken its place" in (caught.value.details() or "")
        await router.start_prefill(request("a", LONG), handover=2)
        assert await router.collect("a") == [expected(LONG, 6)]
        assert router.prefill_instances["a"] == "prefill-0"
        await router.wait_until_settled()
        await router.close()


@pytest.mark.parametrize("ends", ["cancel", "nobody", "too late"])
async def test_a_next_try_that_is_not_wanted_any_more_is_refused(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ticket request may be waiting: it is told at once, not after a lease."""
    async with workers(monkeypatch, prefill_fake=SLOW) as both:
        router = await both.router()
        handover_timeout_s = 1.0 if ends == "too late" else 10.0
        await router.submit(request("a", LONG, 3), remote=True, handover_timeout_s=handover_timeout_s)
        await until_reserved(router)
        waiting = asyncio.ensure_future(router.start_prefill(request("a", LONG, 3), handover=2))
        await until_prefilling(router)
        await say_failed(router, "a", 1)
        if ends == "cancel":
            await router.cancel("a")
        elif ends == "nobody":
            await say_failed(router, "a", 0)
        if ends != "cancel":
            assert await router.collect("a") == [expected(LONG, 3)]
            assert router.prefill_instances.get("a", "") in ("", "decode-0")
        waiting.cancel()
        await router.collect("a")
        await router.wait_until_settled()
        await router.close()


async def test_a_router_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, {"transfer.one_message_below_tokens": 0}, prefill_fake=SLOW) as both:
        router = await both.router()
        pages, landed = both.engines["decode"].pages, threading.Event()
        scatter = pages.scatter

        def land(*args: Any, **kwargs: Any) -> int | None:
            landed.set()
            return scatter(*args, **kwargs)

        monkeypatch.setattr(pages, "scatter", land)
        await router.submit(request("a", LONG), remote=True, handover_timeout_s=30.0)
        call = router.start_prefill(request("a", LONG))
        async with asyncio.timeout(TIMEOUT_S):
            while not landed.is_set():
                await asyncio.sleep(0.01)
        call.cancel()
        assert await router.collect("a") == [expected(LONG, 6)]
        await router.wait_until_settled()
        await router.close()
