"""`baton top`, `trace` and `explain` of a real cluster, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from cluster_process import Cluster

TIMEOUT_S = 60
KEY = "key-of-this-test"

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two routers, one prefill and one decode worker of the model that ships, behind a key."""
    folder = tmp_path_factory.mktemp("inspected")
    # No worker here is to be taken for lost for having stood still.
    settings = {"router.replicas": 2, "router.api_key": KEY, "router.silence_s": 10, "kv.memory": "32MiB"}
    with Cluster(folder, **settings) as started:
        yield started


@pytest.fixture(scope="module")
def request_id(cluster: Cluster) -> str:
    """Of a request that has been answered."""
    body = {"model": "tiny", "prompt": [20] * 300, "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "inspected"}
    response = httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    return response.headers["x-request-id"]


def baton(cluster: Cluster, *arguments: str, fails: bool = False) -> str:
    command = [sys.executable, "-m", "baton.cluster.cli", *arguments, "--name", cluster.name]
    environment = {**cluster.environment, "COLUMNS": "110"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def test_top(cluster: Cluster, request_id: str) -> None:
    text = baton(cluster, "top", "--once", "--interval", "2")
    assert [line.split()[0] for line in text.splitlines()] == [
        "instance", "router-0", "router-1", "prefill-0", "decode-0", "all"
    ]  # fmt: skip
    assert "no answer" not in text
    told = json.loads(baton(cluster, "top", "--once", "--json", "--interval", "2"))
    rows = {row["instance"]: row for row in told["rows"]}
    assert all(row["generated_tokens_s"] is not None for row in rows.values())
    assert all(rows[name]["kv_share"] is not None for name in ("prefill-0", "decode-0"))


def test_explain(cluster: Cluster, request_id: str) -> None:
    text = baton(cluster, "explain", request_id)
    assert f"{request_id}-" in text
    assert "decode: decode-0 writes the answer" in text
    assert "handover (" in text
    (told,) = json.loads(baton(cluster, "explain", request_id, "--json"))
    (decision,) = told["decisions"]
    assert decision["decision"]["decode"]["chosen"] == "decode-0"
    assert decision["unique_id"] in baton(cluster, "explain", decision["unique_id"])


def test_trace(cluster: Cluster, request_id: str) -> None:
    text = baton(cluster, "trace", request_id)
    assert text.startswith(f"request {request_id} on router-")
    assert "-> decode-0, 300 prompt tokens" in text or "decode-0 alone, 300 prompt tokens" in text
    assert "40 written" in text
    assert "█" in text
    assert max(map(len, text.splitlines()[3:])) <= 110
    (told,) = json.loads(baton(cluster, "trace", request_id, "--json"))
    (choice,) = told["choices"]
    end_s = max(span["start_s"] + span["duration_s"] for span in choice["spans"])
    assert end_s <= choice["duration_s"] + 0.001


def test_who_is_unknown_is_told(cluster: Cluster, request_id: str) -> None:
    for command in ("explain", "trace"):
        said = baton(cluster, command, "nobody", fails=True)
        assert "no router knows request 'nobody'" in said
        assert "router-0 at http://" in said
        assert "router-1 at http://" in said
    assert "the API key is wrong" in baton(cluster, "explain", request_id, "--api-key", "another-key", fails=True)
