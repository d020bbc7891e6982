"""A decode worker is killed while it writes: the stream goes on, with the tokens of a run that nobody disturbed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cluster_process import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

_PROMPT = "def mean(values):\n    total = 0\n" * 8
_REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    "penalties": {"temperature": 0.7, "seed": 11, "presence_penalty": 0.4, "repetition_penalty": 1.1, "logprobs": 2},
}


_GONE_ON_TOKENS = 100


@pytest.fixture(scope="module", name="cluster")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"kv.memory": "32MiB", "decode.replicas": 2, "stop_grace_s": 5}
    with Cluster(tmp_path_factory.mktemp("resume"), **settings) as cluster:
        yield cluster


class _Client:
    """Streams one completion; `killed` is whom it killed, and `stall_s` the longest wait for a token.

    Who is only stopped goes on when the stream has gone on elsewhere for a while.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._workers: dict[str, Any] = {}
        self.killed = ""
        self.signal = signal.SIGKILL
        self.stopped_pid = 0
        self.stall_s = 0.0

    async def stream(self, body: dict[str, Any], kill_after: int | None = None) -> tuple[list[int], list[Any], Any]:
        """(token ids, log-probabilities, usage); kills the worker that serves it after so many tokens."""
        if kill_after is not None:
            self._workers = {name: each for name, each in self._cluster.status().items() if each["role"] == "decode"}
        ids: list[int] = []
        resume_at = 0
        logprobs: list[Any] = []
        usage: Any = None
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            request = {"model": "tiny", "stream": True, "return_token_ids": True, **body}
            request["stream_options"] = {"include_usage": True}
            async with client.stream("POST", f"{self._cluster.url}/v1/completions", json=request) as response:
                assert response.status_code == 200
                then_s = time.monotonic()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    usage = chunk.get("usage") or usage
                    for choice in chunk["choices"]:
                        ids += choice["token_ids"]
                        logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
                    self.stall_s, then_s = max(self.stall_s, time.monotonic() - then_s), time.monotonic()
                    if kill_after is not None and not self.killed and len(ids) >= kill_after:
                        await self._kill(client)
                        resume_at = len(ids) + _GONE_ON_TOKENS
                    if self.stopped_pid and len(ids) >= resume_at:
                        # Long before the controller takes it for stuck, however slow this machine is.
                        os.kill(self.stopped_pid, signal.SIGCONT)
                        self.stopped_pid = 0
        return ids, logprobs, usage

    async def _kill(self, client: httpx.AsyncClient) -> None:
        for name, worker in self._workers.items():
            if await _is_running(client, worker["metrics_url"]):
                self.killed, pid = name, worker["ranks"][0]["pid"]
                os.kill(pid, self.signal)
                self.stopped_pid = pid if self.signal == signal.SIGSTOP else 0
                return


async def _is_running(client: httpx.AsyncClient, metrics_url: str) -> bool:
    text = (await client.get(metrics_url)).text
    found = re.search(r"^baton_requests_running\S* (\S+)$", text, re.MULTILINE)
    return found is not None and float(found[1]) > 0


def _run(cluster: Cluster, *arguments: str) -> str:
    command = [sys.executable, "-m", "baton.cluster.cli", *arguments, "--name", cluster.name]
    done = subprocess.run(
        command,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _wait_until_whole(cluster: Cluster) -> None:
    until_s = time.monotonic() + 60
    while any(worker["state"] != "ready" for worker in cluster.status().values()) or len(cluster.status()) < 4:
        assert time.monotonic() < until_s, cluster.log()
        time.sleep(0.2)


@pytest.mark.parametrize("kind", _REQUESTS)
@pytest.mark.parametrize("kill_after", [1, 13])
def test_a_killed_decode_worker_is_not_felt(cluster: Cluster, kind: str, kill_after: int) -> None:
    body = {"prompt": f"# {kind} {kill_after}\n{_PROMPT}", "max_tokens": 700, "ignore_eos": True, **_REQUESTS[kind]}
    _wait_until_whole(cluster)
    client = _Client(cluster)
    disturbed = asyncio.run(client.stream(body, kill_after))
    assert client.killed
    _wait_until_whole(cluster)
    untouched = asyncio.run(_Client(cluster).stream(body))
    assert disturbed[0] == untouched[0]
    assert disturbed[1] == untouched[1]
    assert disturbed[2]["completion_tokens"] == untouched[2]["completion_tokens"] == 700
    cluster.wait_until_settled()


def test_a_decode_worker_that_is_stopped_is_not_felt_and_gives_its_blocks_back(cluster: Cluster) -> None:
    body = {"prompt": f"# stopped\n{_PROMPT}", "max_tokens": 700, "ignore_eos": True, **_REQUESTS["sampled"]}
    _wait_until_whole(cluster)
    client = _Client(cluster)
    client.signal = signal.SIGSTOP
    before = cluster.status()
    disturbed = asyncio.run(client.stream(body, 13))
    assert client.killed
    assert not client.stopped_pid
    _wait_until_whole(cluster)
    assert cluster.status()[client.killed]["incarnation"] == before[client.killed]["incarnation"]
    cluster.wait_until_settled()
    untouched = asyncio.run(_Client(cluster).stream(body))
    assert disturbed[:2] == untouched[:2]


def test_every_worker_is_replaced_under_load(cluster: Cluster) -> None:
    _wait_until_whole(cluster)
    before = cluster.status()
    bodies = [
        {"prompt": f"# load {i}\n{_PROMPT}", "max_tokens": 150, "ignore_eos": True, **list(_REQUESTS.values())[i % 3]}
        for i in range(4)
    ]
    untouched = [asyncio.run(_Client(cluster).stream(body)) for body in bodies]
    seen: list[tuple[int, Any]] = []

    async def load(index: int, over: asyncio.Event) -> None:
        while not over.is_set():
            answer = await _Client(cluster).stream(bodies[index])
            seen.append((index, answer))

    async def restart() -> str:
        over = asyncio.Event()
        streams = [asyncio.create_task(load(index, over)) for index in range(len(bodies))]
        try:
            return await asyncio.to_thread(_run, cluster, "restart", "--rolling")
        finally:
            over.set()
            await asyncio.gather(*streams)

    said = asyncio.run(restart())
    assert said.count("is ready again") == 3
    assert len(seen) >= 8
    for index, answer in seen:
        assert answer[:2] == untouched[index][:2]
    after = cluster.status()
    for name in ("prefill-0", "decode-0", "decode-1"):
        assert after[name]["incarnation"] != before[name]["incarnation"]
    assert after["router-0"]["incarnation"] == before["router-0"]["incarnation"]
    cluster.wait_until_settled()


def test_a_drained_worker_stays_away_until_it_is_brought_back(cluster: Cluster) -> None:
    _wait_until_whole(cluster)
    _run(cluster, "drain", "decode-0")
    time.sleep(1.5)
    assert "decode-0" not in cluster.status()
    body = {"prompt": _PROMPT, "max_tokens": 20, "temperature": 0}
    assert len(asyncio.run(_Client(cluster).stream(body))[0]) == 20
    _run(cluster, "restart", "decode-0")
    # One that does not answer within two seconds is told as such; listed as ready it is in any case.
    assert cluster.status()["decode-0"]["state"] in ("ready", "unreachable")
    _wait_until_whole(cluster)


def test_a_prefill_worker_that_is_stopped_costs_time_only(cluster: Cluster) -> None:
    _wait_until_whole(cluster)
    pid = cluster.status()["prefill-0"]["ranks"][0]["pid"]
    body = {"prompt": f"# prefill stopped\n{_PROMPT * 3}", "max_tokens": 24, **_REQUESTS["sampled"]}
    os.kill(pid, signal.SIGSTOP)
    try:
        disturbed = asyncio.run(_Client(cluster).stream(body))
    finally:
        os.kill(pid, signal.SIGCONT)
    _wait_until_whole(cluster)
    assert asyncio.run(_Client(cluster).stream(body))[:2] == disturbed[:2]
    cluster.wait_until_settled()
