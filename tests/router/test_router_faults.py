"""Faults in a router: its own points, and messages of its token streams that arrive damaged."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.router.fake_worker import expected
from tests.router.harness import Harness, running_router

from baton import faults
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc

BODY = {"prompt": [20, 21, 22], "max_tokens": 4}
WANTED = expected([20, 21, 22], 4)
TIMEOUT_S = 15.0


@pytest.fixture(autouse=True)
def faults_may_come() -> Iterator[None]:
    faults.install([], instance_id="router-0", role="router", allow_at_runtime=True)
    yield
    faults.install([], instance_id="", role="")


async def _right_answer(router: Harness) -> None:
    """Answers come as they should, as soon as there is a stream again."""
    end_s = time.monotonic() + TIMEOUT_S
    while (response := await router.post("/v1/completions", BODY)).status_code != 200:
        assert time.monotonic() < end_s, response.text
        await asyncio.sleep(0.02)
    assert response.json()["choices"][0]["text"] == router.text(WANTED)


async def test_requests_and_tokens_of_a_router_are_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills: list[int] = []
    async with running_router(tmp_path) as router:
        monkeypatch.setattr(os, "kill", lambda pid, number: kills.append(number))
        monkeypatch.setattr(logging, "shutdown", lambda: None)
        faults.replace(["router submit nth=2 kill", "router-0 emit nth=6 kill", "router submit token=99 kill"])
        await _right_answer(router)
        assert kills == []
        await _right_answer(router)
        assert kills == [signal.SIGKILL] * 2
        await router.post("/v1/completions", {**BODY, "prompt": [20, 99]})
        assert kills == [signal.SIGKILL] * 3


async def test_a_router_takes_rules_at_run_time(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        status = await router.registry.until_announced(lambda status: status.role == "router" and bool(status.address))
        async with grpc.aio.insecure_channel(status.address) as channel:
            stub = rpc.WorkerStub(channel)
            rules = ["router rpc.send peer=decode-0 method=Decode.Stream nth=1 fail"]
            await stub.SetFaults(pb.SetFaultsRequest(rules=rules), timeout=TIMEOUT_S)
            # The stream to the only decode worker breaks as the request goes out; it goes out on the next one.
            await _right_answer(router)
            fired = (await stub.SetFaults(pb.SetFaultsRequest(), timeout=TIMEOUT_S)).fired
            assert [(one.rule, one.count) for one in fired] == [(rules[0], 1)]


@pytest.mark.parametrize("action", ["flip", "truncate", "drop", "duplicate"])
async def test_a_damaged_stream_comes_up_again(action: str, tmp_path: Path) -> None:
    """Whatever a message becomes, the request ends, and the next ones get their answers."""
    async with running_router(tmp_path, router={"request_timeout_s": 1.5}) as router:
        for seed in range(12 if action == "flip" else 2):
            words = f"router rpc.receive method=Decode.Stream nth={1 + seed % 3} {action}"
            faults.replace([f"{words} seed={seed}" if action == "flip" else words])
            response = await router.post("/v1/completions", BODY)
            assert response.status_code in (200, 400, 429, 500, 503, 504), response.text
            faults.replace([])
            await _right_answer(router)
