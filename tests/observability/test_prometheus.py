"""Metrics: accepted by the real `promtool`, scraped by a real Prometheus, and found by gateways."""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.observability.whole_cluster import WholeCluster, whole_cluster

from baton.metrics_server import serve_pages
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.cluster_facts import cluster_facts
from baton.router.instances import Instance

TIMEOUT_S = 30.0
# As the model server protocol of the Gateway API Inference Extension and charts made for vLLM name them.
GATEWAY_GAUGES = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
}
VLLM_OTHERS = {
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
}


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def _samples(page: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def _pages(cluster: WholeCluster, path: str) -> dict[str, str]:
    """Of each instance."""
    pages = {}
    for name, url in cluster.metrics_urls.items():
        response = await cluster.http.get(url.removesuffix("/metrics") + path)
        assert response.status_code == 200, (name, response.text)
        pages[name] = response.text
    return pages


async def test_promtool_has_nothing_to_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    promtool = _tool("promtool")
    async with whole_cluster(monkeypatch, tmp_path) as cluster:
        await cluster.complete()
        pages = await _pages(cluster, "/metrics")
    for name, page in pages.items():
        check = await asyncio.create_subprocess_exec(
            promtool,
            "check",
            "metrics",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(check.communicate(page.encode()), TIMEOUT_S)
        assert (check.returncode, said) == (0, b""), (name, said.decode())


async def test_every_histogram_says_the_role(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with whole_cluster(monkeypatch, tmp_path) as cluster:
        await cluster.complete()
        pages = await _pages(cluster, "/metrics")
    for name, page in pages.items():
        for family in text_string_to_metric_families(page):
            assert family.name.startswith("baton_")
            for sample in family.samples:
                assert sample.labels["role"] == name.partition("-")[0]


async def test_a_real_prometheus_scrapes_all_three(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prometheus = _tool("prometheus")
    async with whole_cluster(monkeypatch, tmp_path) as cluster:
        await cluster.complete()
        targets = [url.removeprefix("http://").removesuffix("/metrics") for url in cluster.metrics_urls.values()]
        jobs = [("baton", "/metrics"), ("vllm", "/metrics/vllm")]
        config = "global: {scrape_interval: 1s, scrape_timeout: 1s}\nscrape_configs:\n" + "".join(
            f"  - {{job_name: {job}, metrics_path: {path}, static_configs: [{{targets: {targets}}}]}}\n"
            for job, path in jobs
        )
        (tmp_path / "prometheus.yml").write_text(config)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        server = await asyncio.create_subprocess_exec(
            prometheus,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=(tmp_path / "prometheus.log").open("wb"),
        )
        try:
            async with httpx.AsyncClient(base_url=f"http://{address}") as http, asyncio.timeout(TIMEOUT_S):
                up = await _until(http, server, "up == 1", count=6)
                assert {(series["metric"]["job"], series["metric"]["instance"]) for series in up} == {
                    (job, target) for job, _ in jobs for target in targets
                }
                steps = await _until(http, server, "baton_step_seconds_count > 0", count=2)
                assert {series["metric"]["role"] for series in steps} == {"prefill", "decode"}
                (ttft,) = await _until(http, server, "vllm:time_to_first_token_seconds_count", count=1)
                assert ttft["value"][1] == "1"
        finally:
            if server.returncode is None:
                server.terminate()
            await asyncio.wait_for(server.wait(), TIMEOUT_S)


async def _until(
    http: httpx.AsyncClient, server: asyncio.subprocess.Process, query: str, *, count: int
) -> list[dict[str, Any]]:
    """The series of a query once there are so many."""
    while True:
        assert server.returncode is None, "Prometheus has ended"
        try:
            found = (await http.get("/api/v1/query", params={"query": query})).json()
            if found["status"] == "success" and len(found["data"]["result"]) == count:
                return list(found["data"]["result"])
        except (httpx.TransportError, ValueError):
            pass  # it is starting
        await asyncio.sleep(0.1)


async def test_gateways_find_their_gauges_on_every_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with whole_cluster(monkeypatch, tmp_path) as cluster:
        await cluster.complete()
        pages = await _pages(cluster, "/metrics/vllm")
        assert (await cluster.http.get("/metrics", params={"format": "vllm"})).text.startswith("# HELP vllm:")
        for name, page in pages.items():
            samples = _samples(page)
            assert set(samples) >= GATEWAY_GAUGES, name
            for entries in samples.values():
                for labels, _ in entries:
                    assert (labels["model_name"], labels["engine"]) == ("tiny", "0")
            ((about, _),) = samples["vllm:cache_config_info"]
            assert (about["block_size"], about["num_gpu_blocks"]) == ("16", "256")
        router = _samples(pages["router-0"])
        assert set(router) >= VLLM_OTHERS
        assert router["vllm:generation_tokens_total"] == [({"model_name": "tiny", "engine": "0"}, 24.0)]
        assert router["vllm:e2e_request_latency_seconds_count"][0][1] == 1
        assert "vllm:time_to_first_token_seconds_count" not in _samples(pages["decode-0"])


async def test_aliases_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with whole_cluster(monkeypatch, tmp_path, metrics={"vllm_aliases": False}) as cluster:
        for url in cluster.metrics_urls.values():
            assert (await cluster.http.get(url)).status_code == 200
            assert (await cluster.http.get(f"{url}/vllm")).status_code == 404


def test_the_cluster_counts_as_one_engine() -> None:
    def instance(role: str, **load: int) -> Instance:
        return Instance(status=pb.WorkerStatus(role=role, layout=pb.KvLayout(block_size=8)), load=pb.WorkerLoad(**load))

    facts = cluster_facts(
        [
            instance("prefill", running_requests=1, waiting_requests=2, kv_blocks_total=50, kv_blocks_owned=50),
            instance("decode", running_requests=3, kv_blocks_total=100, kv_blocks_owned=30),
            instance("decode", running_requests=4, waiting_requests=1, kv_blocks_total=100, kv_blocks_owned=20),
        ],
        queued=5,
    )
    assert (facts.running, facts.waiting) == (8, 8)
    assert (facts.block_size, facts.num_blocks, facts.kv_usage_ratio) == (8, 200, 0.25)
    assert cluster_facts([], queued=0).kv_usage_ratio == 0


def test_pages_of_a_worker_are_those_that_it_has() -> None:
    url = serve_pages({"metrics": lambda: b"a 1\n"})
    with httpx.Client() as http:
        assert http.get(url).text == "a 1\n"
        assert http.get(url).headers["content-type"].startswith("text/plain; version=0.0.4")
        for path in ("/vllm", "?format=vllm", "x"):
            assert http.get(url + path).status_code == 404
