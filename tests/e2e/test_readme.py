"""The README's commands and examples, unchanged, against the cluster that one command starts."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_process import Cluster

README = Path(__file__).parent.parent.parent / "README.md"
TIMEOUT_S = 120

pytestmark = pytest.mark.cluster


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def is_free(port: int) -> bool:
    """Whether nothing listens on a loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`baton up` as `make serve` runs it: the launcher and the ports of the defaults."""
    if not (is_free(8000) and is_free(50051)):
        pytest.skip("ports 8000 and 50051 are the README's, and something listens on them")
    ports = {"router__http": "127.0.0.1:8000", "router__grpc": "127.0.0.1:50051"}
    with Cluster(tmp_path_factory.mktemp("readme"), launcher="auto", **ports) as started:
        yield started


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_examples_run_unchanged(index: int, cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[index]], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.rstrip().rsplit("\n", 1)[-1]
    assert len(done.stdout) > 20
    assert re.search(r"\d+ tokens, \d+ cached|read the prompt, decode-0 wrote the answer", last), done.stdout


def test_curl_example_runs_unchanged(cluster: Cluster) -> None:
    command = next(block for block in blocks("sh") if "curl" in block)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert '"finish_reason"' in done.stdout


def test_the_words_around_them_are_true(cluster: Cluster) -> None:
    status = cluster.status()
    assert set(status) == {"router-0", "prefill-0", "decode-0"}
    assert len({rank["pid"] for instance in status.values() for rank in instance["ranks"]}) == 3
    configured = blocks("yaml")[0].replace("/models/Llama-3.2-1B-Instruct", "tiny")
    path = Path(cluster.state["log_dir"]).parent / "cluster.yaml"
    path.write_text(configured)
    shown = subprocess.run(
        [sys.executable, "-m", "baton.cluster.cli", "config", "show", "-c", str(path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
