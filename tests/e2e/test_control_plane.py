"""The controller is killed, and Ray's head, under load: no request notices, and both come back to their work."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_process import Cluster

from baton.cluster.launchers.ray_reaper import marked

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

DEADLINE_S = 60.0
# Ray places an actor late now and then where its head has just been away.
RESTART_S = 150.0
NUM_CLIENTS = 3
PROMPTS = [[11 + k, 20, 30, 40 + k] for k in range(4)]


def processes_of(root: int) -> dict[int, str]:
    """Command lines of `root`'s descendants, by process id."""
    parents, lines = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: lines[pid] for pid in found - {root} if pid in lines}


class Load:
    """Clients that stream one completion after another; every one must give what it gave the first time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = False
        self._tokens: dict[int, list[int]] = {}
        self.done = 0

    async def expect(self) -> None:
        """What each prompt gives while nothing is disturbed."""
        async with httpx.AsyncClient(timeout=DEADLINE_S, trust_env=False) as client:
            for index in range(len(PROMPTS)):
                self._tokens[index] = await self._stream(client, index)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around what disturbs; raises what a client met."""
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(self._client(index)) for index in range(NUM_CLIENTS)]
            try:
                yield
            finally:
                self._stop = True
        assert all(client.done() for client in clients)

    async def more(self, count: int) -> None:
        """Return when `count` more requests were served."""
        wanted = self.done + count
        await until(lambda: self.done >= wanted, f"{count} more requests to be served")

    async def _client(self, index: int) -> None:
        async with httpx.AsyncClient(timeout=DEADLINE_S, trust_env=False) as client:
            while not self._stop:
                index = (index + 1) % len(PROMPTS)
                assert await self._stream(client, index) == self._tokens[index]
                self.done += 1

    async def _stream(self, client: httpx.AsyncClient, index: int) -> list[int]:
        body: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[index], "max_tokens": 120, "temperature": 0}
        body |= {"stream": True, "return_token_ids": True, "ignore_eos": True}
        ids: list[int] = []
        async with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    message = json.loads(line.removeprefix("data: "))
                    assert "error" not in message, message
                    ids += [token for choice in message["choices"] for token in choice.get("token_ids") or []]
        return ids


async def until(condition: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s, f"waited {DEADLINE_S:.0f} s for {what}"
        await asyncio.sleep(0.1)


class Plane:
    """A cluster, and what controls it."""

    def __init__(self, cluster: Cluster) -> None:
        assert cluster.process is not None
        self.cluster = cluster
        self._root = cluster.process.pid

    def pid(self, part: str) -> int:
        """Of the one process of the cluster with `part` in its command line; 0 where there is none."""
        pids = [pid for pid, line in processes_of(self._root).items() if part in line]
        assert len(pids) <= 1, pids
        return pids[0] if pids else 0

    @property
    def controller(self) -> int:
        """Process id of the controller."""
        return self.pid("ray::ControllerActor")

    @property
    def head(self) -> int:
        """Process id of Ray's head."""
        return self.pid("/gcs_server ")

    async def kill(self, pid: int, again: Callable[[], int]) -> None:
        """Kill a process; return when another one is there in its place."""
        assert pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: again() not in (0, pid), f"another process in the place of {pid}")

    async def kill_instance(self, instance_id: str) -> None:
        """Kill an instance; return when another incarnation of it is ready."""
        before = (await self.instances())[instance_id]
        os.kill(before["ranks"][0]["pid"], signal.SIGKILL)
        until_s = time.monotonic() + RESTART_S
        while True:
            now: dict[str, Any] = {}
            with suppress(AssertionError):  # nobody answers for a moment
                now = (await asyncio.to_thread(self.cluster.status)).get(instance_id, {})
            if now.get("state") == "ready" and now["ranks"][0]["pid"] != before["ranks"][0]["pid"]:
                return
            assert time.monotonic() < until_s, now
            await asyncio.sleep(0.2)

    async def instances(self) -> dict[str, dict[str, Any]]:
        """`baton status`, once the registry answers and knows all."""
        until_s = time.monotonic() + DEADLINE_S
        while True:
            with suppress(AssertionError):
                status = await asyncio.to_thread(self.cluster.status)
                if len(status) == 4 and all(each["ranks"] for each in status.values()):
                    return status
            assert time.monotonic() < until_s
            await asyncio.sleep(0.2)


async def test_controller_and_head_die_under_load_and_return(tmp_path: Path) -> None:
    mark = f"BATON_TEST={tmp_path.name}-{os.getpid()}"
    key, _, value = mark.partition("=")
    environment = {**os.environ, key: value}
    settings: dict[str, Any] = {"kv.memory": "32MiB", "decode.replicas": 2, "stop_grace_s": 5}
    with Cluster(tmp_path, launcher="ray", environment=environment, **settings) as cluster:
        plane, load = Plane(cluster), Load(cluster.url)
        matched = re.search(r"--session-dir=(/\S+)/session_", processes_of(plane._root)[plane.head])
        assert matched is not None
        folder = Path(matched[1])
        pids = {name: each["ranks"][0]["pid"] for name, each in (await plane.instances()).items()}
        await load.expect()
        async with load.running():
            await load.more(NUM_CLIENTS)
            await plane.kill(plane.controller, lambda: plane.controller)
            # Taken over as they were: nobody was started a second time.
            assert {name: each["ranks"][0]["pid"] for name, each in (await plane.instances()).items()} == pids
            await load.more(NUM_CLIENTS)
            await plane.kill_instance("decode-1")
            await plane.kill(plane.head, lambda: plane.head)
            await load.more(NUM_CLIENTS)
            await plane.kill_instance("decode-0")
            await plane.kill(plane.controller, lambda: plane.controller)
            await plane.instances()
            await load.more(NUM_CLIENTS)
        cluster.wait_until_settled()
        assert cluster.process is not None
        assert cluster.process.poll() is None
        log = (tmp_path / "up.log").read_text()
        for told in ("the controller died", "the controller is back", "Ray's head process died"):
            assert told in log
        assert "SIGSEGV received" not in log
        # The end must be as clean while the head is away.
        head = plane.head
        assert head
        os.kill(head, signal.SIGKILL)
    await until(lambda: not marked(mark), "all processes to end")
    await until(lambda: not folder.exists(), "Ray's folder to be removed")
