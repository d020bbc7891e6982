"""`/admin/` of a real router: what it tells of requests and workers, to whom, and that it stays bounded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.router.harness import Harness, running_router

from baton.cluster.admin_client import ask_routers
from baton.config import ClusterConfig
from baton.errors import ConfigError
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.embedded_server import listen

LONG = [20] * 200


async def _admin(router: Harness, path: str, **options: Any) -> httpx.Response:
    return await router.http.get(f"{router.admin_url}/admin/{path}", **options)


async def test_a_request_is_explained(router: Harness) -> None:
    answer = await router.post("/v1/completions", {"prompt": LONG, "max_tokens": 3, "n": 2})
    request_id = answer.headers["x-request-id"]
    told = (await _admin(router, f"explain/{request_id}")).json()
    assert (told["router"], told["request_id"], told["left_out"]) == ("router-0", request_id, 0)
    assert [(each["choice"], each["attempt"]) for each in told["decisions"]] == [(0, 0), (1, 0)]
    for each in told["decisions"]:
        decision = each["decision"]
        assert decision["decode"]["chosen"] == "decode-0"
        assert decision["prefill"]["chosen"] in ("prefill-0", None)
        assert decision["handover"]["reason"]
        one = (await _admin(router, f"explain/{each['unique_id']}")).json()["decisions"]
        assert [other["unique_id"] for other in one] == [each["unique_id"]]


async def test_every_attempt_is_explained(router: Harness) -> None:
    router.decode.break_after = 2
    body = {"prompt": [20] * 30, "max_tokens": 5}
    assert (await router.post("/v1/completions", body, headers={"X-Request-Id": "again"})).status_code == 200
    told = (await _admin(router, "explain/again")).json()
    assert [each["attempt"] for each in told["decisions"]] == [0, 1]


async def test_a_request_s_time_is_told(router: Harness) -> None:
    answer = await router.post("/v1/completions", {"prompt": LONG, "max_tokens": 3, "n": 2})
    request_id = answer.headers["x-request-id"]
    told = (await _admin(router, f"trace/{request_id}")).json()
    assert (told["router"], told["request_id"]) == ("router-0", request_id)
    assert [choice["choice"] for choice in told["choices"]] == [0, 1]
    for choice in told["choices"]:
        assert (choice["outcome"], choice["completion_tokens"], choice["decode_instance"]) == ("length", 3, "decode-0")
        assert {"attempt", "stream"} <= {span["name"] for span in choice["spans"]}


@pytest.mark.parametrize("path", ["explain", "trace"])
async def test_unknown_ids_are_told_how_long_records_stay(router: Harness, path: str) -> None:
    response = await _admin(router, f"{path}/nobody")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "request_not_found"
    assert "router-0" in response.json()["error"]["message"]
    assert (await _admin(router, f"{path}/{'x' * 200}")).status_code == 400
    assert (await _admin(router, f"{path}/a%00b")).status_code == 400


async def test_only_so_many_requests_are_kept(tmp_path: Path) -> None:
    async with running_router(tmp_path, router={"kept_requests": 2}) as router:
        await router.until_connected("decode-0")
        for name in ("first", "second", "third"):
            body = {"prompt": LONG, "max_tokens": 1}
            assert (await router.post("/v1/completions", body, headers={"X-Request-Id": name})).status_code == 200
        for path in ("explain", "trace"):
            found = [(await _admin(router, f"{path}/{name}")).status_code for name in ("first", "second", "third")]
            assert found == [404, 200, 200], path


async def test_workers_are_told(router: Harness) -> None:
    await router.post("/v1/completions", {"prompt": LONG, "max_tokens": 3})
    told = (await _admin(router, "instances")).json()
    assert (told["total"], [each["id"] for each in told["instances"]]) == (2, ["decode-0", "prefill-0"])
    decode, prefill = told["instances"]
    assert (decode["role"], decode["state"], decode["health"]) == ("decode", "ready", "healthy")
    assert decode["load"]["kv_blocks_total"] == router.decode.load.kv_blocks_total
    assert set(decode["signal"]) == {"freshness", "reason", "blocks"}
    assert decode["own"] == {"requests": 0, "prefill_tokens": 0, "max_tokens": 0}
    assert decode["prefix"]["looked_up_tokens"] + prefill["prefix"]["looked_up_tokens"] == len(LONG)


async def test_requests_in_work_are_told_and_can_be_ended(router: Harness) -> None:
    router.decode.gate.clear()
    body = {"prompt": [20] * 30, "max_tokens": 9}
    asking = [
        asyncio.ensure_future(router.post("/v1/completions", body, headers={"X-Request-Id": name}))
        for name in ("one", "two", "three")
    ]
    await router.decode.until(lambda: len(router.decode.active) == 3)
    told = (await _admin(router, "requests")).json()
    assert told["total"] == 3
    assert {each["id"] for each in told["requests"]} == {"one", "two", "three"}
    first = told["requests"][0]
    assert first["phase"] == "decode-0 had it in its queue or read its prompt"
    assert (first["prompt_tokens"], first["tokens"], first["max_tokens"], first["decode"]) == (30, 0, 9, "decode-0")
    assert first["deadline_in_s"] > 0
    few = (await _admin(router, "requests?limit=1")).json()
    assert (few["total"], len(few["requests"])) == (3, 1)
    ended = await router.http.post(f"{router.admin_url}/admin/abort/two")
    assert (ended.status_code, ended.json()["aborted"]) == (200, "two")
    assert (await asking[1]).status_code >= 400
    router.decode.gate.set()
    assert [(await asking[place]).status_code for place in (0, 2)] == [200, 200]
    assert (await router.http.post(f"{router.admin_url}/admin/abort/two")).status_code == 404


async def test_a_page_in_a_browser_cannot_end_requests(router: Harness) -> None:
    refused = await router.http.post(f"{router.admin_url}/admin/abort/x", headers={"Origin": "http://evil"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "cross_origin")


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "1e3", "9" * 5000, "²"])
async def test_limits_are_limited(router: Harness, limit: str) -> None:
    response = await _admin(router, "requests", params={"limit": limit})
    assert response.status_code == 400
    assert "1000" in response.json()["error"]["message"]


async def test_settings_are_told(router: Harness) -> None:
    told = (await _admin(router, "routing")).json()
    assert told["policy"] == ClusterConfig().routing.policy
    assert told["weights"] == ClusterConfig().routing.weights.model_dump()
    assert set(told["prefix_index"]["workers"]) == {"decode-0", "prefill-0"}
    assert {"steps", "transfers", "ttft"} <= set((await _admin(router, "costs")).json())


async def test_what_is_not_there(router: Harness) -> None:
    assert "/admin/instances" in (await _admin(router, "")).json()["routes"]["get"]
    assert (await _admin(router, "other")).status_code == 404
    assert (await router.http.get(f"{router.admin_url}/v1/models")).status_code == 404
    assert (await router.http.get(f"{router.admin_url}/admin/abort/x")).status_code == 405
    assert (await router.http.get(f"{router.http_url}/admin/instances")).status_code == 404


async def test_without_the_key_nothing_is_told(tmp_path: Path) -> None:
    async with running_router(tmp_path, router={"api_key": "secret-key"}) as router:
        for path in ("", "instances", "explain/x", "health", "../health"):
            response = await _admin(router, path)
            assert response.status_code == 401, path
        wrong = await _admin(router, "instances", headers={"Authorization": "Bearer other-key"})
        assert wrong.status_code == 401
        assert (await router.http.post(f"{router.admin_url}/admin/abort/x")).status_code == 401
        right = {"Authorization": "Bearer secret-key"}
        assert (await _admin(router, "instances", headers=right)).status_code == 200


async def test_a_router_without_workers_tells(tmp_path: Path) -> None:
    async with running_router(tmp_path, with_workers=False) as router:
        assert (await _admin(router, "instances")).json()["instances"] == []


async def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with listen("127.0.0.1:0", setting="test", backlog=1) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"router\.admin: cannot listen on {address}: "):
            async with running_router(tmp_path, router={"admin": address}):
                pass


def test_each_router_has_a_port_of_its_own() -> None:
    config = ClusterConfig.model_validate({"router": {"admin": "127.0.0.1:9000", "replicas": 3}})
    assert [config.router.admin_of(index) for index in range(3)] == [f"127.0.0.1:{9000 + index}" for index in range(3)]
    assert ClusterConfig().router.admin_of(2) == "127.0.0.1:0"
    v6 = ClusterConfig.model_validate({"router": {"admin": "[::1]:9000"}})
    assert v6.router.admin_of(1) == "[::1]:9001"


async def test_the_command_line_asks_every_router(router: Harness) -> None:
    answer = await router.post("/v1/completions", {"prompt": LONG, "max_tokens": 3})
    routers = [
        pb.WorkerStatus(instance_id="router-0", admin_url=router.admin_url),
        pb.WorkerStatus(instance_id="router-1", admin_url="http://127.0.0.1:1"),
        pb.WorkerStatus(instance_id="router-2"),
    ]
    known, away = await ask_routers(routers, f"explain/{answer.headers['x-request-id']}", None)
    assert (known.status, known.router_id, len(known.answer["decisions"])) == (200, "router-0", 1)
    assert (away.status, away.router_id) == (0, "router-1")
    assert away.problem.startswith("no answer: ")
    unknown = (await ask_routers(routers[:1], "explain/nobody", None))[0]
    assert (unknown.status, unknown.answer) == (404, {})
    assert "'nobody'" in unknown.problem


async def test_tenants_keys_do_not_open_it(tmp_path: Path) -> None:
    tenants = {"tenants": {"a": {"api_keys": ["key-of-tenant-a"]}}}
    theirs = {"Authorization": "Bearer key-of-tenant-a"}
    async with running_router(tmp_path, admission=tenants, router={"api_key": "secret-key"}) as router:
        assert (await router.http.get(f"{router.http_url}/v1/models", headers=theirs)).status_code == 200
        refused = await _admin(router, "requests", headers=theirs)
        assert (refused.status_code, "operator" in refused.text) == (401, True)
        assert (await _admin(router, "requests", headers={"Authorization": "Bearer secret-key"})).status_code == 200
