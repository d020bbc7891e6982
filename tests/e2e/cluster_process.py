"""A real cluster in processes of its own, started and stopped through the command line, for end-to-end tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

__all__ = ["Cluster", "complete"]

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
_REAP_S = 10.0


class Cluster:
    """`baton up` as a context manager. Ports are free ones, the run state lives in `folder`.

    Args:
        folder: a temporary folder of this cluster.
        wrap: makes of a command the one that runs it elsewhere, for example in a network namespace.
        environment: of every command; None takes this process's.
        config: a cluster.yaml, under the settings.
        settings: `--set key=value` pairs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        launcher: str = "local",
        wrap: Callable[..., list[str]] = lambda *command: list(command),
        environment: Mapping[str, str] | None = None,
        config: Path | None = None,
        **settings: Any,
    ) -> None:
        self.name = f"test-{uuid.uuid4().hex[:8]}"
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        defaults = {"name": self.name, "router.http": "127.0.0.1:0", "router.grpc": "127.0.0.1:0", "log.level": "info"}
        pairs = {**defaults, **{key.replace("__", "."): value for key, value in settings.items()}}
        self._wrap = wrap
        self._command = [sys.executable, "-m", "baton.cluster.cli", "up", "--launcher", launcher]
        if config is not None:
            self._command += ["-c", str(config)]
        for key, value in pairs.items():
            self._command += ["--set", f"{key}={value}"]
        self.environment = {**(environment or os.environ), "XDG_RUNTIME_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
        self.process: subprocess.Popen[bytes] | None = None
        self.state: dict[str, Any] = {}

    def __enter__(self) -> Cluster:
        self._log = (self._folder / "up.log").open("wb")
        self.process = subprocess.Popen(
            self._wrap(*self._command),
            env=self.environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        path = self._folder / "baton" / f"{self.name}.json"
        while not self.state.get("ready"):
            assert self.process.poll() is None, f"baton up ended:\n{self.log()}"
            assert time.monotonic() < deadline_s, f"not ready within {START_TIMEOUT_S} s:\n{self.log()}"
            time.sleep(0.1)
            if path.exists():
                self.state = json.loads(path.read_text() or "{}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process is not None
        pids = self.pids() if error is None else []
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._log.close()
        if error is None:
            assert self.process.returncode == 0, self.log()
            until_s = time.monotonic() + _REAP_S
            while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
                # What Ray has left without a parent is reaped by the first process, when that comes to it.
                assert time.monotonic() < until_s, f"processes left behind: {left}"
                time.sleep(0.1)

    @property
    def url(self) -> str:
        """HTTP base URL, without /v1."""
        return str(self.state["http_url"]).removesuffix("/v1")

    @property
    def grpc_address(self) -> str:
        """host:port of baton.v1.Inference."""
        return str(self.state["grpc_address"])

    def log(self) -> str:
        """What `baton up` and its instances wrote."""
        files = [self._folder / "up.log", *sorted((self._folder / "baton" / self.name).glob("*"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files)

    def status(self) -> dict[str, dict[str, Any]]:
        """`baton status --json` by instance id."""
        command = [sys.executable, "-m", "baton.cluster.cli", "status", "--json", "--name", self.name]
        done = subprocess.run(self._wrap(*command), env=self.environment, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return {instance["id"]: instance for instance in json.loads(done.stdout)["instances"]}

    def pids(self) -> list[int]:
        """Process ids of every rank."""
        return [rank["pid"] for instance in self.status().values() for rank in instance["ranks"]]

    def wait_until_settled(self, timeout_s: float = 10.0) -> dict[str, dict[str, Any]]:
        """Status once no worker owns a block any more; fails with the figures after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            workers = {k: v for k, v in self.status().items() if v["role"] != "router"}
            if all(worker["kv_blocks"]["owned"] == 0 for worker in workers.values()):
                return workers
            assert time.monotonic() < deadline_s, {k: v["kv_blocks"] for k, v in workers.items()}
            time.sleep(0.2)


async def complete(client: httpx.AsyncClient, url: str, prompt: list[int], **options: Any) -> tuple[list[int], Any]:
    """One completion of token ids; returns its token ids and the whole body."""
    body = {"model": "m", "prompt": prompt, "return_token_ids": True, "temperature": 0, **options}
    response = await client.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["token_ids"], answer
