"""Plain tokens that take the short way to the client: the same bytes as the long way's, in the same order."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.router.fake_worker import expected
from tests.router.harness import running_router

from baton.metrics import Metrics
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router import direct
from baton.router.instances import Instance
from baton.router.links import DecodeLink
from baton.router.token_queue import TokenQueue

PROMPT = [20, 30, 40]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"return_token_ids": True},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stop": ["zzz"]},
    {"n": 2},
    {"logprobs": 2},
    {"ignore_eos": True, "echo": True},
]


class _Counting(direct.Connection):
    num_writes = 0

    def write(self, data: bytes) -> None:
        _Counting.num_writes += 1
        super().write(data)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> type[_Counting]:
    """Counts chunks that took the short way."""
    monkeypatch.setattr(direct, "Connection", _Counting)
    _Counting.num_writes = 0
    return _Counting


def _normal(events: list[str]) -> list[Any]:
    shown = []
    for event in events:
        content = event if event == "[DONE]" else orjson.loads(event)
        if isinstance(content, dict):
            content.pop("id")
            content.pop("created")
        shown.append(content)
    return sorted(shown, key=str) if any("index" in str(e) and '"index":1' in e for e in events) else shown


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_both_ways_say_the_same(
    tmp_path: Path, writes: type[_Counting], path: str, options: dict[str, Any]
) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "stream": True, **options}
    if path == "/v1/completions":
        body["prompt"] = PROMPT
    else:
        body["messages"] = [{"role": "user", "content": "hello"}]
        body.pop("echo", None)
        if body.pop("logprobs", None):
            body |= {"logprobs": True, "top_logprobs": 2}
    async with running_router(tmp_path) as harness:
        harness.decode.tells_numbers = False
        expected = _normal(await harness.events(path, body))
        assert writes.num_writes == 0
        harness.decode.tells_numbers, harness.decode.plain_pause_s = True, 0.003
        assert _normal(await harness.events(path, body)) == expected
        takes_short_way = not ({"stop", "n", "logprobs"} & set(options)) and "continuous" not in str(options)
        assert (writes.num_writes > 0) == takes_short_way


async def test_whole_answers_count_plain_tokens(tmp_path: Path) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24}
    async with running_router(tmp_path) as harness:
        harness.decode.tells_numbers = False
        expected = (await harness.post("/v1/completions", body)).json()
        harness.decode.tells_numbers = True
        answer = (await harness.post("/v1/completions", body)).json()
        assert harness.decode.num_plain == 22
        assert answer["choices"] == expected["choices"]
        assert answer["usage"] == expected["usage"]


async def test_the_router_counts_them(tmp_path: Path, writes: type[_Counting]) -> None:
    async with running_router(tmp_path) as harness:
        harness.decode.plain_pause_s = 0.003
        await harness.events("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "stream": True})
        text = (await harness.http.get(f"{harness.http_url}/metrics")).text
        assert writes.num_writes > 0
        assert 'baton_generation_tokens_total{role="router"} 24.0' in text
        assert 'baton_inter_token_latency_seconds_count{role="router"} 23.0' in text


async def test_a_lost_worker_after_plain_tokens_is_not_felt(tmp_path: Path, writes: type[_Counting]) -> None:
    async with running_router(tmp_path) as harness:
        harness.decode.break_after = 12
        harness.decode.plain_pause_s = 0.003
        events = await harness.events(
            "/v1/completions",
            {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "stream": True, "return_token_ids": True},
        )
        assert writes.num_writes > 0
        assert events[-1] == "[DONE]"
        choices = [choice for event in events[:-1] for choice in orjson.loads(event)["choices"]]
        ids = [token_id for choice in choices for token_id in choice["token_ids"]]
        assert ids == expected(harness.decode.submits[0].request.prompt_token_ids, 24)
        assert len(harness.decode.submits[1].request.resumed_token_ids) == 12


async def test_http_1_0_takes_the_long_way(tmp_path: Path, writes: type[_Counting]) -> None:
    content = orjson.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "stream": True})
    async with running_router(tmp_path) as harness:
        host, port = harness.http_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % len(content) + content)
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        assert answer.endswith(b"data: [DONE]\n\n")
        assert answer.count(b"data: ") > 20
        assert writes.num_writes == 0


async def test_the_tap_is_offered_only_what_comes_while_the_consumer_waits() -> None:
    queue, taken = TokenQueue(), []

    def tap(token_id: int) -> bool:
        taken.append(token_id)
        return token_id != 13

    queue.tap = tap
    queue.put_token(1)
    assert not taken
    assert await queue.get() == 1
    waiting = asyncio.ensure_future(queue.get())
    await asyncio.sleep(0)
    queue.put_token(2)
    queue.put_token(13)
    queue.put_token(3)
    assert taken == [2, 13]
    assert await waiting == 13
    assert await queue.get() == 3
    waiting = asyncio.ensure_future(queue.get())
    await asyncio.sleep(0)
    waiting.cancel()
    queue.put_token(4)
    assert taken == [2, 13]


async def test_numbers_are_not_used_twice_at_a_time() -> None:
    instance = Instance(pb.WorkerStatus(instance_id="decode-0", role="decode"))
    link = DecodeLink(instance, router_id="r", silence_s=1.0, on_change=lambda: None)
    instance.connected = True
    commands = [pb.DecodeCommand(submit=pb.Submit(request=pb.EngineRequest(request_id=str(i)))) for i in range(4)]
    submits = [command.submit for command in commands]
    queues = [link.submit(command) for command in commands[:3]]
    assert len({submit.number for submit in submits[:3]}) == 3
    assert 0 not in {submit.number for submit in submits[:3]}
    link._last_number = 2**32 - 1
    link.submit(commands[3])
    assert submits[3].number not in {submit.number for submit in submits[:3]}
    event = pb.DecodeEvent(step=pb.StepOutputs(numbers=[submits[1].number, 77], token_ids=[5, 6]))
    link._handle(event)
    assert [queue.empty() for queue in queues] == [True, False, True]
    link.forget(("1", 0))
    link._handle(event)
    assert await queues[1].get() == 5
    assert queues[1].empty()


def test_many_latencies_at_once_are_as_many_alone() -> None:
    many, alone = Metrics("router"), Metrics("router")
    latencies_s = [0.0, 0.001, 0.0011, 0.02, 0.0999, 0.1, 3.0, 1000.0, 0.02]
    many.observe_latencies(latencies_s)
    for latency_s in latencies_s:
        alone.inter_token_latency_s.observe(latency_s)

    def shown(metrics: Metrics) -> list[str]:
        lines = metrics.render().decode().splitlines()
        return [line for line in lines if "inter_token" in line and "created" not in line]

    assert shown(many) == shown(alone)
