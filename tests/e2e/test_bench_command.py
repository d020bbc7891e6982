"""`baton bench` against a real cluster: over HTTP and gRPC, a trace whose prefixes hit the cache, conversations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_process import Cluster

from baton.cluster.loadgen.result import Result

TIMEOUT_S = 120

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and one decode worker of the model that ships."""
    # Hits are counted: nothing is to be computed twice for a worker that stood still.
    with Cluster(tmp_path_factory.mktemp("bench"), **{"router.silence_s": 10}) as started:
        yield started


def bench(cluster: Cluster, folder: Path, *options: str) -> tuple[Result, list[dict[str, Any]]]:
    """`baton bench` of the running cluster, found by its name."""
    files = ["--json", str(folder / "r.json"), "--records", str(folder / "r.jsonl")]
    command = [sys.executable, "-m", "baton.cluster.cli", "bench", "--name", cluster.name, *options, *files]
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    return Result.from_json((folder / "r.json").read_text(), "r.json"), records


@pytest.mark.parametrize("interface", ["http", "grpc"])
def test_every_token_is_accounted_for(interface: str, cluster: Cluster, tmp_path: Path) -> None:
    options = ["-c", "4", "--requests", "12", "--input", "40-90", "--output", "5-9", "--class", "a:1:priority=1"]
    result, records = bench(cluster, tmp_path, *options, *(["--grpc"] if interface == "grpc" else []))
    (point,) = result.points
    assert result.about["server"]["kind"] == interface
    assert (point.summary.ok, point.summary.short_answers) == (12, 0)
    assert point.summary.output_tokens == sum(record["asked_tokens"] for record in records)
    assert all(40 <= record["prompt_tokens"] <= 90 for record in records)
    assert all(len(record["chunk_at_s"]) <= record["output_tokens"] for record in records)


def test_prefixes_of_a_trace_hit_the_cache(cluster: Cluster, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 1000 * at, "input_length": 4096, "output_length": 64, "hash_ids": [*range(7), 100 + at]}
        for at in range(6)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # One at a time, whatever the trace says, so that each finds what the one before has left.
    options = ["-c", "1", "--trace", str(trace), "--length-scale", "0.125", "--warm-up", "0"]
    _, records = bench(cluster, tmp_path, *options)
    assert [record["prompt_tokens"] for record in records] == [512] * 6
    # Of what comes after the first one, all but the last block of the trace is there already.
    assert [record["cached_tokens"] for record in records] == [0] + [448] * 5


def test_conversations_find_what_was_said_in_the_cache(cluster: Cluster, tmp_path: Path) -> None:
    options = ["-c", "2", "--requests", "6", "--input", "64", "--output", "16"]
    _, records = bench(cluster, tmp_path, *options, "--sessions", "turns=3,system_prompts=1,system_tokens=64")
    assert sorted(record["prompt_tokens"] for record in records) == [128] * 2 + [208] * 2 + [288] * 2
    later = [record for record in records if record["turn"]]
    assert all(record["cached_tokens"] >= 64 for record in later)
