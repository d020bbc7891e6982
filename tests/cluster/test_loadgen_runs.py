"""Loads against servers: open and closed loops, lateness, refusals, failures, conversations, and the command itself."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from scripted_server import Reply, ScriptedServer
from typer.testing import CliRunner

from baton.cluster.cli import app
from baton.cluster.loadgen.answer import Answer
from baton.cluster.loadgen.bench_run import Where
from baton.cluster.loadgen.plan import Plan
from baton.cluster.loadgen.prompts import TokenSource
from baton.cluster.loadgen.records import Record
from baton.cluster.loadgen.result import Result
from baton.cluster.loadgen.runner import Limits, Run, Runner
from baton.cluster.loadgen.target import Prompt, ServerInfo
from baton.errors import BatonError, ConfigError, UnavailableError
from baton.proto.baton.v1 import inference_pb2 as pb
from baton.proto.baton.v1 import inference_pb2_grpc as rpc

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from fake_openai_server import FakeOpenAIServer

LIMITS = Limits(duration_s=20.0, drain_s=20.0, timeout_s=20.0, max_in_flight=1000)


class CodeTarget:
    """A target that is a function: what it does is what the server does."""

    info = ServerInfo(kind="code", url="code", model="code")

    def __init__(self, serve: Callable[[int, Answer], Awaitable[None]]) -> None:
        self._serve = serve
        self.sent = 0
        self.at_once = 0
        self.most_at_once = 0

    def prepare(self, prompt: Prompt, output_tokens: int, load_class: Any) -> Any:
        return None

    async def send(self, prepared: Any, answer: Answer) -> None:
        number, self.sent = self.sent, self.sent + 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self._serve(number, answer)
        finally:
            self.at_once -= 1

    async def close(self) -> None:
        pass


def answered(answer: Answer) -> None:
    answer.take_tokens([1], "a", time.monotonic())
    answer.finish_reason, answer.http_status = "length", 200


def run_code(plan: Plan, serve: Callable[[int, Answer], Awaitable[None]], limits: Limits = LIMITS) -> tuple[Run, Any]:
    target = CodeTarget(serve)
    (point,) = plan.points()
    jobs = plan.workload(point, trace=None, max_model_len=None).jobs("1")
    runner = Runner(
        target,
        jobs,
        TokenSource(seed="1", vocabulary=4000),
        limits,
        concurrency=point.concurrency,
        as_text=False,
    )
    return asyncio.run(runner.run()), target


def outcomes(records: list[Record]) -> list[str]:
    return [str(record.outcome) for record in records]


# Loops


def test_an_open_loop_waits_for_no_answer() -> None:
    everyone = 40
    come = 0
    all_there = asyncio.Event()

    async def serve(number: int, answer: Answer) -> None:
        nonlocal come
        come += 1
        if come == everyone:
            all_there.set()
        # None is answered before the last one is there: a client that waits would stand still here.
        await all_there.wait()
        answered(answer)

    run, target = run_code(Plan(rate_per_s=400.0, requests=everyone, output="1"), serve)
    assert outcomes(run.records) == ["ok"] * everyone
    assert target.most_at_once == everyone


def test_time_that_a_stalled_client_lost_is_not_hidden() -> None:
    def stand_still() -> None:
        time.sleep(0.4)

    async def serve(number: int, answer: Answer) -> None:
        if number == 0:
            # The whole generator, as under a garbage collection or on a busy machine.
            stand_still()
        answered(answer)

    run, _ = run_code(Plan(rate_per_s=50.0, arrivals="constant", requests=15, output="1"), serve)
    late = [record for record in run.records if record.lag_s > 0.05]
    assert len(late) >= 5
    for record in late:
        assert record.ttft_s is not None
        assert record.ttft_s >= record.lag_s
    assert max(record.lag_s for record in run.records) >= 0.3


def test_a_closed_loop_keeps_its_number_at_once() -> None:
    async def serve(number: int, answer: Answer) -> None:
        await asyncio.sleep(0.002)
        answered(answer)

    run, target = run_code(Plan(concurrency=5, requests=31, output="1"), serve)
    assert outcomes(run.records) == ["ok"] * 31
    assert target.most_at_once == 5
    assert [record.index for record in run.records] == list(range(31))


def test_a_run_ends_in_its_time_and_says_what_was_left() -> None:
    async def serve(number: int, answer: Answer) -> None:
        if number > 3:
            await asyncio.Event().wait()
        answered(answer)

    limits = Limits(duration_s=0.1, drain_s=1.0, timeout_s=60.0, max_in_flight=3)
    run, _ = run_code(Plan(rate_per_s=100.0, arrivals="constant", requests=10_000, output="1"), serve, limits)
    # Those that came due within a tenth of a second: what could not be answered is in the books.
    found = outcomes(run.records)
    assert found == ["ok"] * 4 + ["unfinished"] * 3 + ["not sent"] * (len(found) - 7)
    assert len(found) in (9, 10)


def test_a_request_that_takes_too_long_has_failed() -> None:
    async def serve(number: int, answer: Answer) -> None:
        await asyncio.Event().wait()

    limits = Limits(duration_s=20.0, drain_s=20.0, timeout_s=0.05, max_in_flight=8)
    run, _ = run_code(Plan(concurrency=2, requests=4), serve, limits)
    assert outcomes(run.records) == ["failed"] * 4
    assert run.records[0].detail == "no end within 0.05 s"


def test_a_bug_of_ours_is_raised() -> None:
    async def serve(number: int, answer: Answer) -> None:
        raise ZeroDivisionError

    for plan in (Plan(concurrency=2, requests=4), Plan(rate_per_s=100.0, requests=4)):
        with pytest.raises(ZeroDivisionError):
            run_code(plan, serve)


# Over HTTP


def bench(url: str, folder: Path, *options: str) -> tuple[Any, Result, list[dict[str, Any]]]:
    """`baton bench URL ...`: what it printed, its JSON and its records."""
    files = ["--json", str(folder / "r.json"), "--records", str(folder / "r.jsonl")]
    done = CliRunner().invoke(app, ["bench", url, *options, *files])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    records = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    return done, Result.from_json((folder / "r.json").read_text(), "r.json"), records


def test_every_request_is_as_asked(tmp_path: Path) -> None:
    with ScriptedServer(lambda body, number: Reply(cached_tokens=5)) as server:
        classes = ["--class", "gold:1:priority=7,tenant=a,ttft_ms=9000", "--class", "rest:1:cache_salt=s"]
        shape = ["-c", "3", "--requests", "24", "--input", "20", "--output", "3-6", "--slo", "tpot_ms=5000"]
        done, result, records = bench(server.url, tmp_path, *shape, *classes, "--send-slo", "--warm-up", "1")
    assert done.exit_code == 0, done.output
    assert len(server.bodies) == 25
    for body in server.bodies:
        assert len(body["prompt"]) == 20
        assert 3 <= body["max_tokens"] <= 6
        assert body["stream"] is True
        assert body["ignore_eos"] is True
        assert body["model"] == "scripted"
        is_gold = body.get("priority") == 7
        assert body.get("user") == ("a" if is_gold else None)
        assert body.get("cache_salt") == (None if is_gold else "s")
        assert body["slo"] == ({"ttft_ms": 9000, "tpot_ms": 5000} if is_gold else {"tpot_ms": 5000})
    (point,) = result.points
    assert (point.summary.ok, point.summary.attainment) == (24, 1.0)
    assert point.summary.cached_tokens == 24 * 5
    assert point.summary.input_tokens == 24 * 20
    assert sum(each.requests for each in point.classes.values()) == 24
    assert [record["output_tokens"] for record in records] == [record["asked_tokens"] for record in records]
    assert "gold" in done.output
    assert "TTFT" in done.output
    assert server.connections <= 6


def test_the_key_is_sent_and_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["baton", "bench", "--api-key=secret-key", "--api-key", "secret-key"])
    with ScriptedServer() as server:
        bench(server.url, tmp_path, "-c", "1", "--requests", "1", "--api-key", "secret-key")
    assert {head["authorization"] for head in server.heads} == {"Bearer secret-key"}
    assert "secret-key" not in (tmp_path / "r.json").read_text()
    assert '"--api-key=..."' in (tmp_path / "r.json").read_text()


def test_prompts_depend_on_the_seed_alone(tmp_path: Path) -> None:
    prompts = []
    for seed in ("1", "1", "2"):
        with ScriptedServer() as server:
            options = ("-c", "1", "--requests", "4", "--output", "2", "--warm-up", "0", "--seed", seed)
            bench(server.url, tmp_path, *options)
        prompts.append([body["prompt"] for body in server.bodies])
    assert prompts[0] == prompts[1]
    assert prompts[0] != prompts[2]


@pytest.mark.parametrize("retries", [0, 2])
def test_refusals_are_counted_and_waited_out_when_asked(retries: int, tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        if number == 1:
            return Reply(status=429, headers={"Retry-After": "0.05"}, body=b'{"error": {"message": "full"}}')
        return Reply()

    with ScriptedServer(script) as server:
        options = ("-c", "1", "--requests", "3", "--output", "2", "--warm-up", "1", "--retries", str(retries))
        _, result, records = bench(server.url, tmp_path, *options)
    summary = result.points[0].summary
    assert summary.rejections == 1
    if retries:
        assert (summary.ok, summary.rejected) == (3, 0)
        assert records[0]["chunk_at_s"][0] - records[0]["scheduled_s"] >= 0.05
    else:
        assert (summary.ok, summary.rejected, summary.rejection_rate) == (2, 1, 1 / 3)
        assert result.points[0].errors == {"full": 1}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(status=500, body=b'{"error": {"message": "lost a worker"}}'), "lost a worker"),
        (Reply(status=503, body=b"<html>"), "<html>"),
        (Reply(break_after=1), "ConnectionError: the server closed the connection"),
        (Reply(error_after=1), "the engine died"),
        (Reply(finishes=False), "without a finish_reason"),
        (Reply(tokens=0), "ended after 0 tokens"),
        (Reply(never=True), "no end within 2 s"),
    ],
)
def test_failures_are_told_and_the_load_goes_on(reply: Reply, said: str, tmp_path: Path) -> None:
    with ScriptedServer(lambda body, number: reply if number == 1 else Reply()) as server:
        options = (
            "-c",
            "1",
            "--requests",
            "4",
            "--output",
            "3",
            "--warm-up",
            "1",
            "--timeout",
            "2" if reply.never else "60",
        )
        done, result, records = bench(server.url, tmp_path, *options)
    assert [record["outcome"] for record in records] == ["failed", "ok", "ok", "ok"]
    assert said in records[0]["detail"]
    assert result.points[0].summary.abort_rate == 0.25
    assert said in done.output


@pytest.mark.parametrize("reply", [Reply(closes=True), Reply(close_delimited=True)])
def test_connections_that_end_with_the_answer(reply: Reply, tmp_path: Path) -> None:
    with ScriptedServer(lambda body, number: reply) as server:
        _, result, _ = bench(server.url, tmp_path, "-c", "2", "--requests", "12", "--output", "2")
    assert result.points[0].summary.ok == 12


def test_conversations_hold_all_that_was_said(tmp_path: Path) -> None:
    with ScriptedServer() as server:
        options = ("-c", "2", "--requests", "9", "--input", "6", "--output", "3", "--warm-up", "0")
        _, _, records = bench(server.url, tmp_path, *options, "--sessions", "turns=3,system_prompts=1,system_tokens=10")
    assert sorted(len(body["prompt"]) for body in server.bodies) == [16] * 3 + [25] * 3 + [34] * 3
    assert [record["turn"] for record in records] == [0, 1, 2] * 3
    by_prompt = {tuple(body["prompt"]) for body in server.bodies}
    for prompt in by_prompt:
        assert prompt[:10] == next(iter(by_prompt))[:10]
        if len(prompt) > 16:
            # The answer of the turn before, as the server's ids.
            assert prompt[-9:-6] == (200, 201, 202)
            assert prompt[:-9] in by_prompt


def test_chats_are_text_in_turns(tmp_path: Path) -> None:
    with ScriptedServer() as server:
        options = ("-c", "1", "--requests", "2", "--input", "5", "--output", "2", "--warm-up", "0", "--chat")
        bench(server.url, tmp_path, *options, "--sessions", "turns=2,system_tokens=4")
    assert set(server.paths) == {"/v1/chat/completions"}
    first, second = (body["messages"] for body in server.bodies)
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[0] == first[0]
    assert second[1]["content"] == " w0 w1"
    assert len(first[0]["content"].split()) == 9


def test_a_trace_is_replayed_with_its_prefixes(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1024, "output_length": 40, "hash_ids": [1, 2]},
        {"timestamp": 100, "input_length": 1000, "output_length": 40, "hash_ids": [1, 3]},
        {"timestamp": 200, "input_length": 60_000, "output_length": 40, "hash_ids": list(range(50, 168))},
    ]
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ScriptedServer() as server:
        options = ("--trace", str(trace), "--length-scale", "0.125", "--time-scale", "0.5", "--warm-up", "0")
        done, _, records = bench(server.url, tmp_path, *options)
    first, second, third = (body["prompt"] for body in server.bodies)
    assert (len(first), len(second)) == (128, 64 + 61)
    assert first[:64] == second[:64]
    assert first[64:] != second[64:]
    # The model's window is 4096.
    assert len(third) == 4096 - 5
    assert [body["max_tokens"] for body in server.bodies] == [5, 5, 5]
    assert [record["was_cut"] for record in records] == [False, False, True]
    assert records[2]["scheduled_s"] == pytest.approx(0.1, abs=0.002)
    assert "1 prompts were cut" in done.output


def test_a_sweep_and_its_picture(tmp_path: Path) -> None:
    sweep = ("--sweep", "rate=40,80", "--requests", "8", "--output", "2", "--slo", "ttft_ms=5000")
    picture = tmp_path / "r.png"
    with ScriptedServer() as server:
        if importlib.util.find_spec("matplotlib") is None:
            with pytest.raises(ConfigError, match="needs matplotlib"):
                bench(server.url, tmp_path, *sweep, "--plot", str(picture))
            assert not server.bodies
            done, result, _ = bench(server.url, tmp_path, *sweep)
        else:
            done, result, _ = bench(server.url, tmp_path, *sweep, "--plot", str(picture))
            assert picture.read_bytes().startswith(b"\x89PNG")
    assert done.exit_code == 0, done.output
    assert [point.rate_per_s for point in result.points] == [40, 80]
    assert result.parameters["seed"] == 1
    assert {"begun", "command", "server", "versions", "machine"} <= result.about.keys()
    assert "in SLO" in done.output


def test_results_are_compared(tmp_path: Path) -> None:
    for name, wait_s in (("a", 0.0), ("b", 0.05)):
        folder = tmp_path / name
        folder.mkdir()
        with ScriptedServer(lambda body, number, wait_s=wait_s: Reply(wait_s=wait_s)) as server:
            bench(server.url, folder, "-c", "1", "--requests", "3", "--output", "2", "--seed", "1" if wait_s else "2")
    paths = [str(tmp_path / name / "r.json") for name in ("a", "b")]
    done = CliRunner().invoke(app, ["bench", "--compare", *paths])
    assert done.exit_code == 0, done.output
    assert "TTFT p50 ms" in done.output
    assert "! seed differs: 2 and 1" in done.output


def test_a_server_of_text_is_named_and_served(tmp_path: Path) -> None:
    server = FakeOpenAIServer(text_only=True)
    with futures.ThreadPoolExecutor(1) as threads:
        serving = threads.submit(server.serve_forever, 0.01)
        try:
            with pytest.raises(BatonError, match=r"prompt must be text.*--text"):
                bench(server.url, tmp_path, "-c", "2", "--requests", "6")
            _, result, _ = bench(server.url, tmp_path, "-c", "2", "--requests", "6", "--input", "30", "--text")
        finally:
            server.shutdown()
            server.server_close()
            serving.result(10)
    summary = result.points[0].summary
    assert (summary.ok, summary.input_tokens, summary.output_tokens) == (6, 6 * 30, 6 * 64)


def test_servers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        bench("http://127.0.0.1:9", tmp_path)
    for url in ("localhost:8000", "ftp://x", "http://"):
        with pytest.raises(ConfigError, match=r"http://"):
            Where(url=url).resolve()
    with ScriptedServer(lambda body, number: Reply(status=401, body=b'{"error": {"message": "no key"}}')) as server:
        with pytest.raises(BatonError, match="no key"):
            bench(server.url, tmp_path)
        with pytest.raises(BatonError, match="serves scripted, not other"):
            bench(server.url, tmp_path, "--model", "other")
        with pytest.raises(ConfigError, match="there is no folder"):
            bench(server.url, tmp_path / "missing")
        with pytest.raises(ConfigError, match="No such file"):
            bench(server.url, tmp_path, "--trace", str(tmp_path / "none.jsonl"))


def test_a_load_that_nobody_answered_ends_with_status_1(tmp_path: Path) -> None:
    with ScriptedServer(lambda body, number: Reply(status=500)) as server:
        done, result, _ = bench(server.url, tmp_path, "-c", "1", "--requests", "2", "--warm-up", "0")
    assert done.exit_code == 1
    assert result.points[0].summary.failed == 2


def test_an_interrupt_ends_early_and_reports(tmp_path: Path) -> None:
    with ScriptedServer(lambda body, number: Reply(wait_s=0.01)) as server:
        command = [sys.executable, "-m", "baton.cluster.cli", "bench", server.url, "--sweep", "rate=50,60"]
        command += ["--requests", "100000", "--output", "1", "--json", str(tmp_path / "r.json")]
        process = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, text=True)
        deadline_s = time.monotonic() + 60
        while len(server.bodies) < 30 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    result = Result.from_json((tmp_path / "r.json").read_text(), "r.json")
    assert [point.label for point in result.points] == ["50/s"]
    assert result.points[0].summary.ok >= 20
    assert "ended early" in output


# Over gRPC


class _Inference(rpc.InferenceServicer):
    """Answers with as many tokens as asked, refuses the second request."""

    def __init__(self) -> None:
        self.asked: list[pb.GenerateRequest] = []

    def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(id="fake", max_model_len=100, vocab_size=300)

    def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(version="0")

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        self.asked.append(request)
        if len(self.asked) == 2:
            context.set_trailing_metadata((("retry-after-s", "3"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        for number in range(request.options.max_tokens):
            last = number == request.options.max_tokens - 1
            usage = pb.Usage(prompt_tokens=len(request.token_ids.ids), completion_tokens=number + 1, cached_tokens=4)
            yield pb.GenerateResponse(
                token_ids=[number + 1], finish_reason="length" if last else "", usage=usage if last else None
            )


def test_the_same_load_over_grpc(tmp_path: Path) -> None:
    servicer = _Inference()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        options = ("-c", "1", "--requests", "4", "--input", "12", "--output", "3", "--class", "a:1:priority=2")
        _, result, records = bench(f"grpc://127.0.0.1:{port}", tmp_path, *options, "--warm-up", "1")
        with pytest.raises(ConfigError, match="need HTTP"):
            bench(f"grpc://127.0.0.1:{port}", tmp_path, "--send-slo")
    finally:
        server.stop(0).wait(10)
    assert [record["outcome"] for record in records] == ["rejected", "ok", "ok", "ok"]
    assert "full" in records[0]["detail"]
    summary = result.points[0].summary
    assert (summary.input_tokens, summary.cached_tokens, summary.output_tokens) == (36, 12, 9)
    assert {len(asked.token_ids.ids) for asked in servicer.asked} == {12}
    assert all(max(asked.token_ids.ids) < 300 for asked in servicer.asked)
    assert {asked.options.priority for asked in servicer.asked} == {2}
    assert result.about["server"]["model"] == "fake"
