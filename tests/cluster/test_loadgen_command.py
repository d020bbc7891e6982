"""`baton bench` as a command: sweeps, pictures, comparisons, servers of other kinds, gRPC, and its ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from bench_command import bench
from scripted_server import Reply, ScriptedServer
from typer.testing import CliRunner

from baton.cluster.cli import app
from baton.cluster.loadgen.bench_run import Where
from baton.cluster.loadgen.result import Result
from baton.errors import BatonError, ConfigError, UnavailableError
from baton.proto.baton.v1 import inference_pb2 as pb
from baton.proto.baton.v1 import inference_pb2_grpc as rpc

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from fake_openai_server import FakeOpenAIServer


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
        # Three seconds of them: where the client stands still for two, as many come at once and are not answered yet.
        while len(server.bodies) < 150 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    result = Result.from_json((tmp_path / "r.json").read_text(), "r.json")
    assert [point.label for point in result.points] == ["50/s"]
    assert result.points[0].summary.ok >= 20
    assert "ended early" in output


class _Inference(rpc.InferenceServicer):
    """Answers with as many tokens as asked, refuses the second request."""

    def __init__(self) -> None:
        self.asked: list[pb.GenerateRequest] = []
        self.tenants: list[str] = []

    def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(id="fake", max_model_len=100, vocab_size=300)

    def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(version="0")

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        self.asked.append(request)
        self.tenants.append(dict(context.invocation_metadata()).get("x-baton-tenant", ""))
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
        options = ("-c", "1", "--requests", "4", "--input", "12", "--output", "3", "--send-slo")
        mix = ("--class", "a:1:priority=2,priority_class=fast,tenant=t,tpot_ms=70", "--slo", "e2e_ms=9000")
        done, result, records = bench(f"grpc://127.0.0.1:{port}", tmp_path, *options, *mix, "--warm-up", "1")
        with pytest.raises(ConfigError, match="needs HTTP"):
            bench(f"grpc://127.0.0.1:{port}", tmp_path, "--chat")
    finally:
        server.stop(0).wait(10)
    assert [record["outcome"] for record in records] == ["rejected", "ok", "ok", "ok"]
    assert "full" in records[0]["detail"]
    summary = result.points[0].summary
    assert (summary.input_tokens, summary.cached_tokens, summary.output_tokens) == (36, 12, 9)
    assert {len(asked.token_ids.ids) for asked in servicer.asked} == {12}
    assert all(max(asked.token_ids.ids) < 300 for asked in servicer.asked)
    assert set(servicer.tenants) == {"t"}
    for asked in servicer.asked:
        told = asked.options
        assert (told.priority, told.priority_class, told.slo.tpot_ms) == (2, "fast", 70)
        assert not told.slo.HasField("ttft_ms")
    assert result.about["server"]["model"] == "fake"
    assert "--seed 1 offers the same load again" in done.output
