"""`baton chaos`: what it lists, and what it refuses before anything is broken."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from baton.clock import FakeClock
from baton.cluster.chaos.scenarios import SCENARIOS
from baton.cluster.cli import app
from baton.cluster.registry import RegistryServer
from baton.cluster.run_state import RunState, hold_run, write_run_state
from baton.errors import ConfigError, UnavailableError
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc

FAR = "192.0.2.7"


@pytest.fixture(autouse=True)
def _own_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["chaos", *arguments], catch_exceptions=True)


def test_the_list_describes_every_scenario() -> None:
    lines = invoke("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(SCENARIOS)
    assert all(scenario.description in line for scenario, line in zip(SCENARIOS.values(), lines, strict=True))


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ([], ConfigError, "--list"),
        (["kill-decoder"], ConfigError, "did you mean kill-decode?"),
        (["kill-decode"], UnavailableError, "baton up"),
    ],
)
def test_what_cannot_begin_is_refused(arguments: list[str], kind: type[Exception], words: str) -> None:
    result = invoke(*arguments)
    assert isinstance(result.exception, kind)
    assert words in str(result.exception)


@pytest.fixture(name="address")
async def _address(tmp_path: Path) -> AsyncIterator[str]:
    """Of a registry: one router, a decode worker that takes no faults, a prefill worker far away."""
    registry = RegistryServer("one", "ray", clock=FakeClock())  # leases do not run out
    server = grpc.aio.server()
    rpc.add_WorkerServicer_to_server(rpc.WorkerServicer(), server)
    worker = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        address = await registry.start()
        stack.push_async_callback(registry.close)
        async with grpc.aio.insecure_channel(address) as channel:
            for role, host in (("decode", "127.0.0.1"), ("prefill", FAR), ("router", "127.0.0.1")):
                status = pb.WorkerStatus(
                    instance_id=f"{role}-0",
                    role=role,
                    state="ready",
                    incarnation=os.urandom(16),
                    address=worker if role == "decode" else "",
                    ranks=[pb.RankStatus(pid=1 << 22, host=host)],
                )
                await rpc.RegistryStub(channel).Announce(status)
        with hold_run("one"):
            yield address


def state_of(address: str, *, ready: bool) -> RunState:
    return RunState(name="one", pid=os.getpid(), launcher="ray", registry_address=address, log_dir="", ready=ready)


async def test_what_this_cluster_cannot_take_is_told_before_anything_is_broken(address: str) -> None:
    write_run_state(state_of(address, ready=True))
    for scenario, kind, words in (
        ("kill-router", ConfigError, "this cluster has one router"),
        ("kill-prefill", ConfigError, f"prefill-0 runs on {FAR}; processes can be hit on this host only"),
        ("slow-worker", UnavailableError, "--set faults.allow_at_runtime=true"),
        ("stop-decode --duration 2", ConfigError, "stop-decode needs --duration 4 or more, got 2"),
    ):
        result = await asyncio.to_thread(invoke, *scenario.split(), "--name", "one")
        assert isinstance(result.exception, kind), result.exception
        assert words in str(result.exception)


async def test_a_cluster_that_still_starts_is_left_alone(address: str) -> None:
    write_run_state(state_of(address, ready=False))
    result = await asyncio.to_thread(invoke, "kill-decode", "--name", "one")
    assert isinstance(result.exception, UnavailableError)
    assert "still starting" in str(result.exception)
