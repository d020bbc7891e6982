"""`baton up` as a user types it, with both launchers: ready, answering, and nothing left behind however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from baton.cluster.launchers.ray_reaper import marked

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

DEADLINE_S = 120.0
BATON = [sys.executable, "-P", "-m", "baton.cluster.cli"]
FREE_PORTS = ["--set", "router.http=127.0.0.1:0", "--set", "router.grpc=127.0.0.1:0", "--set", "kv.memory=32MiB"]


# Where the machine stands still, the registry or Ray's shutdown have something to say.
_LOGGED = re.compile(r"^\d\d:\d\d:\d\d\.\d{3} (?:WARNING|ERROR) .*\n", re.MULTILINE)


class Cluster:
    """A `baton up` of this test's own, whose processes all carry `mark` in their environment."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = f"BATON_TEST={uuid.uuid4().hex}"
        key, _, value = self.mark.partition("=")
        self._environment = {**os.environ, key: value, "XDG_RUNTIME_DIR": str(folder)}
        self._output = folder / "up.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*BATON, "up", *FREE_PORTS, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment,
            )

    @property
    def output(self) -> str:
        """What it printed so far, without what it logged."""
        return _LOGGED.sub("", self._output.read_text())

    def run(self, *arguments: str) -> str:
        """Standard output of another `baton` command."""
        done = subprocess.run(
            [*BATON, *arguments],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env=self._environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_ready(self) -> None:
        """Return once the ready text is printed."""
        until_s = time.monotonic() + DEADLINE_S
        while "Ctrl-C stops everything." not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < until_s, self.output
            time.sleep(0.1)

    def assert_nothing_left(self) -> None:
        """Every process of it ends soon after `baton up` has."""
        until_s = time.monotonic() + DEADLINE_S
        while marked(self.mark):
            assert time.monotonic() < until_s, [Path(f"/proc/{pid}/cmdline").read_text() for pid in marked(self.mark)]
            time.sleep(0.1)


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Cluster]:
    cluster = Cluster(folder, *arguments)
    try:
        yield cluster
        cluster.assert_nothing_left()
    finally:
        for pid in marked(cluster.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.process.wait(DEADLINE_S)


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_up_serves_and_ctrl_c_leaves_nothing(tmp_path: Path, launcher: str) -> None:
    with started(tmp_path, "--launcher", launcher) as cluster:
        cluster.wait_ready()
        for part in ("OpenAI API", "gRPC", "metrics", "requests at once at the full", "chat", "curl", "status"):
            assert part in cluster.output
        status: dict[str, Any] = json.loads(cluster.run("status", "--json"))
        assert status["launcher"] == launcher
        instances = {instance["id"]: instance for instance in status["instances"]}
        assert set(instances) == {"decode-0", "prefill-0", "router-0"}
        assert {instance["state"] for instance in instances.values()} == {"ready"}
        pids = {rank["pid"] for instance in instances.values() for rank in instance["ranks"]}
        assert len(pids) == 3
        assert pids <= set(marked(cluster.mark))
        assert cluster.run("complete", "def main(", "--max-tokens", "8")
        for name in ("decode-0", "prefill-0"):
            blocks = instances[name]["kv_blocks"]
            assert blocks["total"] == blocks["free"] + blocks["cached"] + blocks["owned"] > 0
        # A terminal's Ctrl-C goes to the whole process group, Ray's daemons included.
        os.killpg(cluster.process.pid, signal.SIGINT)
        assert cluster.process.wait(DEADLINE_S) == 0, cluster.output
        cluster.assert_nothing_left()
        assert cluster.output.endswith("stopping\nstopped\n")


def test_down_stops_a_detached_cluster(tmp_path: Path) -> None:
    with started(tmp_path, "--launcher", "local", "--detach") as cluster:
        assert cluster.process.wait(DEADLINE_S) == 0, cluster.output
        assert "OpenAI API" in cluster.output
        assert cluster.output.endswith("down stops everything.\n\n")
        assert marked(cluster.mark)
        assert "stopped" in cluster.run("down")
        cluster.assert_nothing_left()


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_nothing_outlives_a_killed_up(tmp_path: Path, launcher: str) -> None:
    with started(tmp_path, "--launcher", launcher) as cluster:
        cluster.wait_ready()
        cluster.process.kill()
        cluster.process.wait(DEADLINE_S)
        cluster.assert_nothing_left()


def test_a_damaged_checkpoint_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{")
    with started(tmp_path, "--launcher", "local", "--model", str(model)) as cluster:
        assert cluster.process.wait(DEADLINE_S) == 1
        assert "config.json" in cluster.output
        assert "baton doctor" in cluster.output
        assert "Traceback" not in cluster.output.split("baton: ")[-1].splitlines()[0]
