"""A request that kills every worker it comes to is refused after two deaths; the streams beside it go on unharmed."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_process import Cluster, complete

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

_POISON_ID = 777
_PROMPTS = [[300 + index] * 40 for index in range(4)]
_OPTIONS: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "temperature": 0.8, "seed": 3}


def _incarnations(cluster: Cluster) -> dict[str, str]:
    return {name: worker["incarnation"] for name, worker in cluster.status().items()}


async def _poisoned(cluster: Cluster) -> tuple[httpx.Response, list[list[int]]]:
    """What the poison is told, and what its neighbours got."""
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        neighbours = [asyncio.create_task(complete(client, cluster.url, prompt, **_OPTIONS)) for prompt in _PROMPTS]
        while True:
            text = (await client.get(f"{cluster.url}/metrics")).text
            if 'baton_time_to_first_token_seconds_count{role="router"} 4.0' in text:
                break
            await asyncio.sleep(0.02)
        body = {"model": "m", "prompt": [20, _POISON_ID, 20], "max_tokens": 4}
        answer = await client.post(f"{cluster.url}/v1/completions", json=body)
        return answer, [ids for ids, _ in await asyncio.gather(*neighbours)]


async def _undisturbed(cluster: Cluster) -> list[list[int]]:
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        return [(await complete(client, cluster.url, prompt, **_OPTIONS))[0] for prompt in _PROMPTS]


def test_a_poisonous_request_is_quarantined(tmp_path: Path) -> None:
    rules = "; ".join(f"{role} submit token={_POISON_ID} kill" for role in ("prefill", "decode"))
    environment = {**os.environ, "BATON_FAULTS": rules}
    # Handed over, it kills both of its workers at once, and no third one.
    routing = {"routing.disaggregate": "always"}
    settings = {"kv.memory": "32MiB", "decode.replicas": 3, "model.served_name": "m", **routing}
    with Cluster(tmp_path, environment=environment, **settings) as cluster:
        before = _incarnations(cluster)
        refused, disturbed = asyncio.run(_poisoned(cluster))
        assert refused.status_code == 500, refused.text
        assert refused.json()["error"]["code"] == "request_quarantined"
        assert refused.headers["X-Should-Retry"] == "false"
        until_s = time.monotonic() + 60
        while True:
            after = _incarnations(cluster)
            changed = [name for name in before if after.get(name, before[name]) != before[name]]
            if set(after) == set(before) and len(changed) >= 2:
                break
            assert time.monotonic() < until_s, cluster.log()
            time.sleep(0.2)
        assert len(changed) == 2, cluster.log()
        assert after["router-0"] == before["router-0"]
        assert disturbed == asyncio.run(_undisturbed(cluster))
        cluster.wait_until_settled()
        later = _incarnations(cluster)
        assert [name for name in before if later.get(name, before[name]) != before[name]] == changed, (
            "nor a third, later"
        )
