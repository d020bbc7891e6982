"""A cluster of a benchmark's own: `baton up` in a process of its own, its registry, and its end whatever happens.

with Cluster(folder, ["--launcher", "local", "--set", "name=x"]) as cluster:
    cluster.wait_ready()
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from baton.cluster.run_state import RunState
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc

__all__ = ["Cluster", "settings", "wait"]

WAIT_S = 90.0
STOP_S = 60.0
POLL_S = 0.01


class Cluster:
    """`baton up` with `options`, its files below `folder`, and a look at its registry; begun when this returns."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self._folder = folder
        self._environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        self._log = (folder / "up.log").open("wb")
        command = [sys.executable, "-m", "baton.cluster.cli", "up", *options]
        # No session of its own: a client on the same cores, in another one, would be measured waiting for them.
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, env=self._environment, process_group=0
        )
        try:
            self._path = next(iter(wait(lambda: list(folder.rglob("*.json")), "the cluster's state", self._is_alive)))
            address = wait(lambda: self._state().get("registry_address"), "the registry's address", self._is_alive)
        except BaseException:
            self.stop()
            raise
        self._stub = rpc.RegistryStub(grpc.insecure_channel(address))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def run_state(self) -> RunState:
        """What it tells other commands; `baton.cluster` reads it below XDG_RUNTIME_DIR, see `use_its_runs`."""
        return RunState(**self._state())

    def use_its_runs(self) -> None:
        """Have this process find the cluster as commands do."""
        os.environ["XDG_RUNTIME_DIR"] = str(self._folder)

    def instances(self) -> dict[str, Any]:
        """Statuses by instance."""
        listed = self._stub.GetCluster(pb.GetClusterRequest(), timeout=5.0)
        return {status.instance_id: status for status in listed.instances}

    def wait_ready(self, not_incarnation: bytes = b"") -> dict[str, Any]:
        """Statuses once every instance is ready, the decode one in another incarnation."""

        def ready() -> dict[str, Any] | None:
            found = self.instances()
            whole = len(found) >= 2 and all(status.state == "ready" for status in found.values())
            is_up = whole and self._state().get("ready")
            return found if is_up and found["decode-0"].incarnation != not_incarnation else None

        return wait(ready, "all instances to be ready", self._is_alive)

    def log(self) -> str:
        """The end of what it and its instances wrote."""
        files = [self._folder / "up.log", *sorted(self._folder.rglob("*-rank*.log")), *self._folder.rglob("decode-*")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    def stop(self) -> None:
        """Ctrl-C; when that does not end it, SIGKILL to all that it has started."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_S)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            raise
        finally:
            self._log.close()

    def _state(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path.read_text() or "{}"))
        except (FileNotFoundError, ValueError):
            return {}

    def _is_alive(self) -> None:
        if self.process.poll() is not None:
            raise SystemExit(f"baton up ended:\n{(self._folder / 'up.log').read_text(errors='replace')[-3000:]}")


def settings(*pairs: str) -> list[str]:
    """Options of `baton up` for "key=value" pairs."""
    return [word for pair in pairs for word in ("--set", pair)]


def wait(condition: Callable[[], Any], what: str, check: Callable[[], None] = lambda: None) -> Any:
    """The condition's first true value, or an error that says what was waited for; `check` may raise another one."""
    end_s = time.monotonic() + WAIT_S
    while not (found := condition()):
        check()
        if time.monotonic() > end_s:
            raise SystemExit(f"waited {WAIT_S:.0f} s for {what}")
        time.sleep(POLL_S)
    return found
