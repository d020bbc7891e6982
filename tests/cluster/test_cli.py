"""The command line: what it prints, what it refuses, and how it speaks to a running cluster."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_local_launcher import config_of, ready, running, until
from typer.testing import CliRunner

from baton.cluster.cli import app, main
from baton.cluster.client import get_cluster
from baton.cluster.commands.status import cluster_dict, table_text
from baton.cluster.run_state import RunState, hold_run, is_running, read_run_state, run_root, write_run_state
from baton.cluster.summary import faults_text
from baton.config import ClusterConfig
from baton.errors import ConfigError, UnavailableError


@pytest.fixture(autouse=True)
def _own_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def test_config_show_is_a_complete_configuration() -> None:
    result = invoke("config", "show", "--set", "prefill.replicas=2")
    assert result.exit_code == 0
    assert ClusterConfig.model_validate(yaml.safe_load(result.stdout)).prefill.replicas == 2


def test_config_schema_is_json() -> None:
    assert "router" in json.loads(invoke("config", "schema").stdout)["properties"]


def test_an_error_on_purpose_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["baton", "up", "--set", "prefill.replica=2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "baton: configuration: unknown key prefill.replica in prefill; did you mean prefill.replicas?\n"
    )


@pytest.mark.parametrize(
    "command",
    [["status"], ["down"], ["chat", "-m", "hi"], ["complete", "x"], ["top"], ["trace", "x"], ["explain", "x"]],
)
def test_without_a_cluster_every_command_says_how_to_start_one(command: list[str]) -> None:
    result = invoke(*command)
    assert isinstance(result.exception, UnavailableError)
    assert "baton up" in str(result.exception)


def test_up_refuses_a_port_that_is_taken_before_it_starts_anything(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = invoke("up", "--launcher", "local", "--model", str(tmp_path), "--set", f"router.http={address}")
    assert isinstance(result.exception, ConfigError)
    assert address in str(result.exception)
    assert "stopping" not in result.stdout


def test_up_refuses_a_model_that_is_not_there() -> None:
    result = invoke("up", "--launcher", "local", "--model", "./nowhere")
    assert isinstance(result.exception, ConfigError)
    assert "./nowhere" in str(result.exception)


def test_up_adds_the_faults_of_the_environment_and_refuses_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ClusterConfig] = []

    async def run_foreground(config: ClusterConfig, *, detached: bool) -> None:
        assert not detached
        started.append(config)

    monkeypatch.setattr("baton.cluster.foreground.run_foreground", run_foreground)
    monkeypatch.setenv("BATON_FAULTS", "decode-0 emit nth=7 kill;")
    assert invoke("up", "--set", "faults.rules=[any load delay for=1]").exit_code == 0
    assert started[0].faults.rules == ("any load delay for=1", "decode-0 emit nth=7 kill")
    assert "FAULTS ARE ON  decode-0 emit nth=7 kill\n" in faults_text(started[0])
    assert faults_text(ClusterConfig()) == ""
    monkeypatch.setenv("BATON_FAULTS", "decode-1 emit nth=7 kill")
    result = invoke("up")
    assert isinstance(result.exception, ConfigError)
    assert "this cluster has no component 'decode-1'" in str(result.exception)


def test_the_run_state_is_private_and_goes_with_its_process(tmp_path: Path) -> None:
    state = RunState(name="one", pid=1, launcher="local", registry_address="x:1", log_dir="", api_key="secret-key")
    assert "secret-key" not in repr(state)
    with hold_run("one"):
        write_run_state(state)
        assert (run_root() / "one.json").stat().st_mode & 0o777 == 0o600
        assert read_run_state("one") == state
        assert is_running("one")
        with pytest.raises(ConfigError, match="running already"), hold_run("one"):
            pass
        with pytest.raises(UnavailableError, match="running: one"):
            read_run_state("two")
    assert not is_running("one")
    # A process that was killed leaves its file, but not its lock.
    write_run_state(state)
    with pytest.raises(UnavailableError, match="no cluster named 'one'"):
        read_run_state("one")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decode.tensor_parallel": 3}, ["decode.tensor_parallel = 3", "8 query heads", "what works: 1, 2, 4"]),
        ({"prefill.pipeline_parallel": 7}, ["prefill.pipeline_parallel = 7", "6 layers", "what works: 1 to 6"]),
        (
            {"decode.replicas": 1000, "prefill.replicas": 1000, "model.dtype": "float32"},
            ["replicas", "memory", "works"],
        ),
    ],
)
def test_up_refuses_what_the_model_or_the_memory_cannot_do_before_it_starts_anything(
    settings: dict[str, object], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.cluster.model_fit.available_host_bytes", lambda: 1 << 30)
    free = {"router.http": "127.0.0.1:0", "router.grpc": "127.0.0.1:0", "device": "cpu", **settings}
    pairs = [part for key, value in free.items() for part in ("--set", f"{key}={value}")]
    result = invoke("up", "--launcher", "local", *pairs)
    assert isinstance(result.exception, ConfigError)
    for word in words:
        assert word in str(result.exception)
    assert "stopping" not in result.stdout


async def test_status_shows_layouts_and_ranks(tmp_path: Path) -> None:
    config = config_of(**{"decode.tensor_parallel": 2, "decode.pipeline_parallel": 2})
    async with running(config, tmp_path, "good") as service:
        await until(lambda: len(ready(service)) == 3, "three instances")
        view = await asyncio.to_thread(get_cluster, service.registry.address)
    told = cluster_dict(view)
    ranks = told["instances"][0]["ranks"]
    assert [(rank["rank"], rank["host"]) for rank in ranks] == [(rank, "127.0.0.1") for rank in range(4)]
    table = table_text(told)
    assert "TP2 x PP2, 4 ranks" in table
    assert "1 rank" in table
    assert "  rank 3" not in table
    (line,) = [line for line in table_text(told, verbose=True).splitlines() if line.startswith("  rank 3")]
    assert str(ranks[3]["pid"]) in line


async def test_status_and_down_speak_to_the_cluster(tmp_path: Path) -> None:
    async with running(config_of(), tmp_path, "good") as service:
        await until(lambda: len(ready(service)) == 3, "three instances")
        with hold_run("baton"):
            write_run_state(
                RunState(
                    name="baton",
                    pid=os.getpid(),
                    launcher="local",
                    registry_address=service.registry.address,
                    log_dir=str(tmp_path),
                )
            )
            told = json.loads((await asyncio.to_thread(invoke, "status", "--json")).stdout)
            table = (await asyncio.to_thread(invoke, "status")).stdout
            top = (await asyncio.to_thread(invoke, "top", "--once", "-i", "0.1")).stdout
            unasked = await asyncio.to_thread(invoke, "explain", "x")
            down = asyncio.create_task(asyncio.to_thread(invoke, "down"))
            await until(service.registry.stop_requested.is_set, "StopCluster")
        assert (await down).exit_code == 0
    assert told["launcher"] == "local"
    decode, prefill, router = told["instances"]
    assert (decode["id"], prefill["role"], router["state"]) == ("decode-0", "prefill", "ready")
    assert decode["kv_blocks"] == {"total": 70, "free": 70, "cached": 0, "owned": 0}
    assert router["kv_blocks"] is None
    assert len(decode["incarnation"]) == 32
    assert decode["ranks"][0]["pid"] > 0
    assert str(decode["ranks"][0]["pid"]) in table
    assert "70 = 70 + 0 + 0" in table
    # These serve no metrics and no /admin/: what they announce is all there is.
    assert [line.split()[0] for line in top.splitlines()] == ["instance", "router-0", "prefill-0", "decode-0", "all"]
    assert "3 of 3 ready" in top
    assert "no answer" not in top
    assert "no router answers on its admin port" in str(unasked.exception)


class FakeServer(BaseHTTPRequestHandler):
    """Answers like an OpenAI server that streams; keeps what it was asked."""

    asked: list[dict[str, Any]]
    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        self.send_response(self.status)
        self.send_header("X-Request-Id", f"asked-{len(self.asked)}")
        self.end_headers()
        if self.status != 200:
            self.wfile.write(json.dumps({"error": {"message": "too long by 3 tokens"}}).encode())
            return
        field = {"text": "Hi"} if self.path == "/v1/completions" else {"delta": {"content": "Hi"}}
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
        extension = {"prefill_instance": "prefill-0", "decode_instance": "decode-1"}
        for chunk in ({"choices": [field]}, {"choices": [], "usage": usage, "baton": extension}):
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Be quiet."""


@pytest.fixture(name="server")
def _server() -> Iterator[tuple[str, type[FakeServer]]]:
    handler = type("Handler", (FakeServer,), {"asked": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
        server.shutdown()
        thread.join(10)


def test_chat_shows_text_and_figures(server: tuple[str, type[FakeServer]]) -> None:
    url, handler = server
    result = invoke("chat", "-m", "hello", "--url", url, "--model", "tiny", "--api-key", "key-12345", "--seed", "7")
    assert result.exit_code == 0, result.exception
    assert result.stdout == "Hi\n"
    for part in ("first token", "5 prompt tokens (4 cached)", "1 written", "prefill-0 → decode-1"):
        assert part in result.stderr
    assert "asked-1" not in result.stderr
    asked = handler.asked[0]
    assert asked["path"] == "/v1/chat/completions"
    assert asked["messages"] == [{"role": "user", "content": "hello"}]
    assert (asked["key"], asked["seed"], asked["stream"]) == ("Bearer key-12345", 7, True)


def test_chat_remembers_until_reset(server: tuple[str, type[FakeServer]]) -> None:
    url, handler = server
    lines = "one\ntwo\n/reset\nthree\n/exit\n"
    result = CliRunner().invoke(app, ["chat", "--system", "be brief", "--url", url, "--model", "tiny"], input=lines)
    assert result.exit_code == 0, result.exception
    said = [[message["content"] for message in asked["messages"]] for asked in handler.asked]
    assert said == [["be brief", "one"], ["be brief", "one", "Hi", "two"], ["be brief", "three"]]


def test_complete_sends_the_prompt_as_it_is(server: tuple[str, type[FakeServer]]) -> None:
    url, handler = server
    assert invoke("complete", "def f(", "--url", url, "--model", "tiny").stdout == "Hi\n"
    assert (handler.asked[0]["path"], handler.asked[0]["prompt"]) == ("/v1/completions", "def f(")


@pytest.mark.parametrize("command", [["chat", "-m", "x"], ["complete", "x"]])
def test_verbose_tells_what_a_request_can_be_explained_by(
    command: list[str], server: tuple[str, type[FakeServer]]
) -> None:
    url, _ = server
    assert "request asked-1]" in invoke(*command, "--verbose", "--url", url, "--model", "tiny").stderr


def test_a_refusal_is_told_in_the_servers_words(server: tuple[str, type[FakeServer]]) -> None:
    url, handler = server
    handler.status = 400
    result = invoke("complete", "x", "--url", url, "--model", "tiny")
    assert "400: too long by 3 tokens" in str(result.exception)


def test_doctor_names_what_is_wrong_and_the_fix(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = {"router.http": address, "model.path": str(tmp_path)}
        result = invoke("doctor", *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")))
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    failed = {line.split()[1] for line in lines if line.startswith("FAIL")}
    assert {"ports", "model", "tokenizer"} <= failed
    assert sum("fix:" in line for line in lines) >= len(failed)
    assert any(address in line for line in lines)


def test_doctor_asks_the_shared_state(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://:secret@127.0.0.1:{silent.getsockname()[1]}/0"
        result = invoke("doctor", "--set", f"state={url}")
    line = next(line for line in result.stdout.splitlines() if line.split()[1] == "state")
    assert line.startswith("warn")
    assert "does not answer" in line
    assert "secret" not in result.stdout
