"""`baton chaos` against a real cluster: it breaks what it says, sees what happens, and leaves everything whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_process import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]


def test_kill_decode_loses_nothing(tmp_path: Path) -> None:
    settings = {"kv.memory": "32MiB", "decode.replicas": 2, "stop_grace_s": 5}
    with Cluster(tmp_path, **settings) as cluster:
        before = cluster.status()
        command = [sys.executable, "-m", "baton.cluster.cli", "chaos", "kill-decode", "--name", cluster.name]
        command += ["--duration", "8", "--clients", "4", "--json"]
        done = subprocess.run(
            command, env=cluster.environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads(done.stdout)
        assert report["broken"] == []
        assert report["requests"] > 4
        assert report["failed"] == report["wrong"] == report["refused"] == 0
        hit = {strike["instance"] for strike in report["strikes"] if strike["was_done"]}
        assert hit
        after = cluster.status()
        for name in hit:
            assert after[name]["state"] == "ready"
            assert after[name]["incarnation"] != before[name]["incarnation"]
        assert set(report["owned_blocks"]) == {"prefill-0", "decode-0", "decode-1"}
        cluster.wait_until_settled()
