"""Admission through the real doors: who waits, who is woken, who is refused, and whose request it is."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tests.router.fake_worker import expected
from tests.router.harness import Harness, running_router

from baton.proto.baton.v1 import inference_pb2 as pb
from baton.router.client import GenerationClient

_SHORT = {"prompt": [20, 21], "max_tokens": 4}
_ONE_SLOT: dict[str, Any] = {"decode": {"max_batch_size": 1, "max_batch_tokens": 64}}


async def _fill(router: Harness) -> asyncio.Task[httpx.Response]:
    """A request that holds the only slot until `router.decode.gate` opens."""
    router.decode.gate.clear()
    first = asyncio.create_task(router.post("/v1/completions", {**_SHORT, "request_id": "first"}))
    await router.decode.until(lambda: len(router.decode.submits) == 1)
    return first


async def _metric(router: Harness, name: str) -> float:
    text = (await router.http.get(f"{router.http_url}/metrics")).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def _until_queued(router: Harness, num: int) -> None:
    async with asyncio.timeout(10):
        while await _metric(router, "baton_admission_queue_requests") != num:
            await asyncio.sleep(0.005)


async def test_waits_for_a_slot_and_is_woken_by_its_end(tmp_path: Path) -> None:
    async with running_router(tmp_path, **_ONE_SLOT) as router:
        first = await _fill(router)
        second = asyncio.create_task(router.post("/v1/completions", {**_SHORT, "prompt": [30, 31]}))
        await _until_queued(router, 1)
        assert await _metric(router, "baton_admission_queue_tokens") == 6
        assert len(router.decode.submits) == 1
        router.decode.gate.set()
        assert (await first).status_code == 200
        assert (await second).json()["choices"][0]["text"] == router.text(expected([30, 31], 4))
        await _until_queued(router, 0)
        assert await _metric(router, "baton_queue_time_seconds_count") == 2


async def test_urgent_ones_pass_patient_ones(tmp_path: Path) -> None:
    async with running_router(tmp_path, **_ONE_SLOT) as router:
        first = await _fill(router)
        waiting = []
        for number, name in enumerate(("batch", "batch", "interactive")):
            body = {**_SHORT, "prompt": [40 + number], "priority_class": name}
            waiting.append(asyncio.create_task(router.post("/v1/completions", body)))
            await _until_queued(router, number + 1)
        router.decode.gate.set()
        await asyncio.gather(first, *waiting)
        prompts = [submit.request.prompt_token_ids[0] for submit in router.decode.submits]
        assert prompts == [20, 42, 40, 41]
        assert [submit.request.priority for submit in router.decode.submits] == [0, 0, 10, 10]


async def test_who_leaves_or_is_aborted_waits_no_more(tmp_path: Path) -> None:
    async with running_router(tmp_path, **_ONE_SLOT) as router:
        first = await _fill(router)
        leaves = asyncio.create_task(router.post("/v1/completions", {**_SHORT, "stream": True}))
        aborted = asyncio.create_task(router.post("/v1/completions", {**_SHORT, "request_id": "second"}))
        await _until_queued(router, 2)
        leaves.cancel()
        await _until_queued(router, 1)
        await router.grpc.Abort(pb.AbortRequest(request_id="second"))
        assert (await aborted).status_code == 499
        await _until_queued(router, 0)
        router.decode.gate.set()
        assert (await first).status_code == 200
        assert len(router.decode.submits) == 1


async def test_what_waits_when_the_router_drains_goes_on(tmp_path: Path) -> None:
    async with running_router(tmp_path, **_ONE_SLOT) as router:
        first = await _fill(router)
        second = asyncio.create_task(router.post("/v1/completions", _SHORT))
        await _until_queued(router, 1)
        router.stop.set()
        async with asyncio.timeout(10):
            while (await router.http.get(f"{router.http_url}/readyz")).status_code == 200:
                await asyncio.sleep(0.005)
        router.decode.gate.set()
        assert [(await each).status_code for each in (first, second)] == [200, 200]


async def test_what_cannot_be_in_time_is_refused(tmp_path: Path) -> None:
    async with running_router(tmp_path, **_ONE_SLOT) as router:
        first = await _fill(router)
        late = await router.post("/v1/completions", {**_SHORT, "slo": {"ttft_ms": 50}})
        assert late.status_code == 429
        assert late.json()["error"]["code"] == "overloaded"
        assert "slo.ttft_ms cannot be met" in late.json()["error"]["message"]
        assert 1 <= int(late.headers["retry-after"]) <= 60
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[20]), options=pb.GenerationOptions(max_tokens=2))
        request.options.slo.ttft_ms = 50
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in router.grpc.Generate(request):
                pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata())["retry-after-s"]) >= 1
        by_deadline = await router.post("/v1/completions", _SHORT, headers={"X-Request-Timeout": "0.05"})
        assert by_deadline.status_code == 429
        assert await _metric(router, "baton_admission_refusals_total") == 3
        router.decode.gate.set()
        assert (await first).status_code == 200


async def test_while_others_wait_a_refusal_is_told_before_anything_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it was begun")

    admission = {"classes": {"only": {"max_queued_requests": 1}}, "default_class": "only"}
    async with running_router(tmp_path, **_ONE_SLOT, admission=admission) as router:
        first = await _fill(router)
        second = asyncio.create_task(router.post("/v1/completions", _SHORT))
        await _until_queued(router, 1)
        with monkeypatch.context() as patched:
            patched.setattr(GenerationClient, "generate", fail)
            third = await router.post("/v1/completions", {**_SHORT, "request_id": "third"})
        assert third.status_code == 429
        assert "1 requests of class only wait already" in third.json()["error"]["message"]
        assert await _metric(router, "baton_admission_refusals_total") == 1
        told = (await router.http.get(f"{router.admin_url}/admin/trace/third")).json()
        assert [(each["outcome"], "wait already" in each["error"]) for each in told["choices"]] == [("error", True)]
        router.decode.gate.set()
        assert [(await each).status_code for each in (first, second)] == [200, 200]
        assert (await router.post("/v1/completions", _SHORT)).status_code == 200


async def test_a_class_may_ask_for_all_its_requests(tmp_path: Path) -> None:
    classes = {"fast": {"slo": {"ttft_ms": 40}}}
    async with running_router(tmp_path, **_ONE_SLOT, admission={"classes": classes, "default_class": "fast"}) as router:
        first = await _fill(router)
        assert (await router.post("/v1/completions", _SHORT)).status_code == 429
        router.decode.gate.set()
        assert (await first).status_code == 200
        wrong = await router.post("/v1/completions", {**_SHORT, "priority_class": "batch"})
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "priority_class"
        assert "one of fast, got 'batch'" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    ("slo", "param"),
    [
        ({"ttft_ms": 0}, "slo.ttft_ms"),
        ({"ttft_ms": "1"}, "slo.ttft_ms"),
        ({"tpot_ms": 1e300}, "slo.tpot_ms"),
        ({"tftt_ms": 5}, "slo.tftt_ms"),
        (5, "slo"),
    ],
)
async def test_wrong_slos_are_named(router: Harness, slo: Any, param: str) -> None:
    response = await router.post("/v1/completions", {**_SHORT, "slo": slo})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_tenant_is_who_its_key_says(tmp_path: Path) -> None:
    tenants = {
        "acme": {"api_keys": ["acme-key-1", "acme-key-2"], "tokens_per_s": 1, "burst_tokens": 100},
        "open": {"tokens_per_s": 1, "burst_tokens": 100},
    }
    async with running_router(tmp_path, router={"api_key": "the-common-key"}, admission={"tenants": tenants}) as router:

        async def post(key: str, tenant: str | None = None, **fields: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}", **({"X-Baton-Tenant": tenant} if tenant is not None else {})}
            return await router.post("/v1/completions", {**_SHORT, **fields}, headers=headers)

        assert (await post("wrong-key-0")).status_code == 401
        claims = await post("acme-key-1", "open")
        assert claims.status_code == 400
        assert claims.json()["error"]["param"] == "X-Baton-Tenant"
        assert (await post("the-common-key", "acme")).status_code == 401
        assert (await post("the-common-key", "no/name")).status_code == 400
        assert (await post("the-common-key", "x" * 65)).status_code == 400
        # Sixty tokens of a hundred are used; the other key is the same account, other tenants have one of their own.
        assert (await post("acme-key-1", max_tokens=58)).status_code == 200
        refused = await post("acme-key-2", "acme", max_tokens=58)
        assert refused.status_code == 429
        assert "tenant acme has used its 1 tokens per second" in refused.json()["error"]["message"]
        assert 10 <= int(refused.headers["retry-after"]) <= 20
        assert (await post("the-common-key", "open", max_tokens=58)).status_code == 200
        assert (await post("the-common-key", "open", max_tokens=58)).status_code == 429
        assert [(await post("the-common-key")).status_code for _ in range(3)] == [200] * 3
        # What was not written is given back.
        router.decode.eos_after = 1
        assert [(await post("the-common-key", "someone")).status_code for _ in range(3)] == [200] * 3


async def test_what_was_not_written_is_given_back(tmp_path: Path) -> None:
    tenant = {"tokens_per_s": 1, "burst_tokens": 100}
    async with running_router(tmp_path, admission={"default_tenant": tenant}) as router:
        router.decode.eos_after = 2
        headers = {"X-Baton-Tenant": "someone"}
        for _ in range(4):
            response = await router.post("/v1/completions", {**_SHORT, "max_tokens": 80}, headers=headers)
            assert response.status_code == 200
        other = await router.post("/v1/completions", {**_SHORT, "max_tokens": 95}, headers=headers)
        assert other.status_code == 429


async def test_the_tenant_over_grpc(tmp_path: Path) -> None:
    async with running_router(tmp_path, admission={"tenants": {"t": {"tokens_per_s": 1, "burst_tokens": 1}}}) as router:

        async def code(option: str, told: str) -> grpc.StatusCode:
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[20]), options=pb.GenerationOptions(max_tokens=40))
            request.options.tenant = option
            metadata = (("x-baton-tenant", told),) if told else None
            call = router.grpc.Generate(request, metadata=metadata)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
            return await call.code()  # type: ignore[no-any-return]

        assert await code("t", "") is grpc.StatusCode.OK
        assert await code("", "t") is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await code("t", "t") is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await code("t", "u") is grpc.StatusCode.INVALID_ARGUMENT
        assert await code("u", "") is grpc.StatusCode.OK


async def test_metrics_name_so_many_tenants(tmp_path: Path) -> None:
    async with running_router(tmp_path, admission={"max_tenants": 2}) as router:
        for name in ("a", "b", "c", "a", "d"):
            response = await router.post("/v1/completions", _SHORT, headers={"X-Baton-Tenant": name})
            assert response.status_code == 200
        tokens = {
            name: await _metric(router, f'baton_tenant_tokens_total{{role="router",tenant="{name}"}}')
            for name in "abcd"
        }
        assert tokens == {"a": 12, "b": 6, "c": 0, "d": 0}
        assert await _metric(router, 'baton_tenant_tokens_total{role="router",tenant="other"}') == 12


async def test_many_answers_wait_as_one(tmp_path: Path) -> None:
    async with running_router(tmp_path, **_ONE_SLOT) as router:
        first = await _fill(router)
        many = asyncio.create_task(router.post("/v1/completions", {**_SHORT, "n": 3, "seed": 1}))
        await _until_queued(router, 1)
        router.decode.gate.set()
        assert (await first).status_code == 200
        assert len((await many).json()["choices"]) == 3


async def _until_told(router: Harness, *, running: int) -> None:
    """The router has heard what the decode worker said of its load."""
    async with asyncio.timeout(10):
        while True:
            info = await router.grpc.GetServerInfo(pb.GetServerInfoRequest())
            if any(each.role == "decode" and each.running_requests == running for each in info.instances):
                return


async def test_load_reports_wake_who_waits(tmp_path: Path) -> None:
    async with running_router(tmp_path, **_ONE_SLOT) as router:
        # Another router has filled it.
        router.decode.load.running_requests = 1
        router.decode.load.kv_blocks_total = router.decode.load.kv_blocks_free = 1000
        router.decode.tell_load()
        await _until_told(router, running=1)
        waits = asyncio.create_task(router.post("/v1/completions", _SHORT))
        await _until_queued(router, 1)
        router.decode.load.running_requests = 0
        router.decode.tell_load()
        assert (await waits).status_code == 200
