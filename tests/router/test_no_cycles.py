"""What a request leaves behind goes with its last user, without Python's collector: that would stop all streams."""

from __future__ import annotations

import contextlib
import gc
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.router.harness import Harness, running_router

from baton import faults
from baton.proto.baton.v1 import inference_pb2 as pb

_PROMPT = list(range(20, 60))
_BODIES: dict[str, dict[str, Any]] = {
    "streamed": {"stream": True},
    "whole": {},
    "with stops and log-probabilities": {"stream": True, "stop": ["zzz"], "logprobs": 2},
    "two choices": {"stream": True, "n": 2},
    "streamed, with a key": {"stream": True, "key": "k"},
    "whole, with a key": {"key": "k"},
    "in a session": {"stream": True, "session_id": "s"},
}


@contextlib.contextmanager
def _kept_garbage() -> Iterator[Counter[str]]:
    """Types of ours that only the collector could take away; filled at the end."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(type(each).__qualname__ for each in gc.garbage if type(each).__module__.startswith("baton."))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def _ask(router: Harness, body: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": _PROMPT, "max_tokens": 6, "temperature": 0, **body}
    headers = {"Idempotency-Key": body.pop("key") + secrets.token_hex(4)} if "key" in body else {}
    answer = await router.post("/v1/completions", body, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("name", _BODIES)
async def test_a_request_leaves_no_cycles(tmp_path: Path, name: str) -> None:
    async with running_router(tmp_path) as router:
        await _ask(router, _BODIES[name])
        with _kept_garbage() as found:
            for _ in range(3):
                await _ask(router, _BODIES[name])
        assert not found


async def test_a_handover_through_channels_that_may_have_faults_leaves_no_cycles(tmp_path: Path) -> None:
    faults.install([], instance_id="router-0", role="router", allow_at_runtime=True)
    try:
        async with running_router(tmp_path, routing={"disaggregate": "always"}) as router:
            await _ask(router, {"stream": True})
            with _kept_garbage() as found:
                for _ in range(3):
                    await _ask(router, {"stream": True})
            assert len(router.prefill.requests) == 4
    finally:
        faults.install([], instance_id="", role="")
    assert not found


async def test_a_call_over_grpc_leaves_no_cycles(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        request = pb.GenerateRequest(text="Hello", options=pb.GenerationOptions(max_tokens=6), stream=True)
        with _kept_garbage() as found:
            for _ in range(3):
                assert [each async for each in router.grpc.Generate(request)]
        assert not found


async def test_a_lost_worker_leaves_no_cycles(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        await _ask(router, {"stream": True})
        with _kept_garbage() as found:
            for _ in range(2):
                router.decode.break_after = 3
                await _ask(router, {"stream": True})
        assert len(router.decode.submits) == 5, "two of them went on elsewhere"
        assert not found
