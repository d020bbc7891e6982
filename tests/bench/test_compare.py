"""bench/compare.py end to end, against servers and an outside client that are fakes."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_openai_server import FakeOpenAIServer

import compare

HERE = Path(__file__).parent
TINY = HERE.parents[1] / "src" / "baton" / "assets" / "tiny"
FAKE = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'fake_openai_server.py'))} {{port}}"

Serve = Callable[..., FakeOpenAIServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts fakes in threads of this process."""
    started: list[FakeOpenAIServer] = []

    def start(**options: Any) -> FakeOpenAIServer:
        server = FakeOpenAIServer(**options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def fake_vllm(tmp_path: Path) -> str:
    path = tmp_path / "vllm"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(HERE / "fake_vllm.py"))} "$@"\n')
    path.chmod(0o755)
    return str(path)


def _run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = compare.main(["--quick", "--out", str(folder / "found"), *arguments])
    return status, json.loads((folder / "found.json").read_text())


def test_all_loads_against_a_url_and_a_command(
    tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    status, found = _run(
        tmp_path, "--client", "own", "--rounds", "2", "--baton", f"ours={server.url}/v1", "--peer", f"theirs={FAKE}"
    )
    assert status == 0
    assert found["failures"] == []
    assert found["client"] == "our own"
    assert {load: set(rows) for load, rows in found["medians"].items()} == {
        load: {"ours", "theirs"} for load in ("c1", "c8", "c32", "mix")
    }
    assert all(len(rows) == 2 for load in found["rounds"].values() for rows in load.values())
    assert found["rounds"]["c32"]["ours"][0]["requests"] == 32
    assert len(found["start_s"]["theirs"]) == 2
    assert "ours" not in found["start_s"]
    table = capsys.readouterr().out
    for text in ("| c32", "| mix", "of best peer", "Client: our own", "Start until the first answer"):
        assert text in table
    assert (tmp_path / "found.png").exists() == _has_matplotlib()


def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def test_every_system_gets_the_same_prompts_and_no_prompt_twice(tmp_path: Path, serve: Serve) -> None:
    first, second = serve(), serve()
    _run(tmp_path, "--client", "own", "--loads", "c8", "mix", "--peer", f"a={first.url}", "--peer", f"b={second.url}")
    long = [tuple(prompt) for prompt in first.prompts if len(prompt) >= 32]
    assert len(long) == len(set(long)) == 8 + 8 + 6
    assert set(long) == {tuple(prompt) for prompt in second.prompts if len(prompt) >= 32}


def test_text_goes_to_a_server_that_takes_no_token_ids(tmp_path: Path, serve: Serve) -> None:
    server = serve(text_only=True)
    arguments = ["--client", "own", "--loads", "c1", "--peer", f"a={server.url}"]
    status, found = _run(tmp_path, *arguments)
    assert status == 1
    assert "--model is needed" in found["failures"][0]
    status, found = _run(tmp_path, *arguments, "--model", str(TINY))
    assert (status, found["failures"]) == (0, [])
    assert all(isinstance(prompt, str) for prompt in server.prompts)


def test_a_system_that_fails_is_named_and_the_next_one_measured(tmp_path: Path, serve: Serve) -> None:
    server = serve(short=True)
    broken = shlex.join([sys.executable, "-c", "import sys; sys.exit('no weights at {port}')"])
    status, found = _run(
        tmp_path, "--client", "own", "--loads", "c1", "--log-dir", str(tmp_path / "logs"),
        *("--peer", f"broken={broken}", "--peer", f"short={server.url}", "--peer", f"fine={FAKE}"),
    )  # fmt: skip
    assert status == 1
    assert list(found["medians"]["c1"]) == ["fine"]
    assert any("broken ended with 1" in text for text in found["failures"])
    assert any("instead of" in text for text in found["failures"])
    assert "no weights" in (tmp_path / "logs" / "broken-1.log").read_text()


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    child = tmp_path / "child"
    status, _ = _run(tmp_path, "--client", "own", "--loads", "c1", "--peer", f"a={FAKE} --child {child}")
    assert status == 0
    path = Path("/proc") / child.read_text() / "stat"
    # Where nobody collects orphans it may stay as a zombie.
    assert not path.exists() or path.read_text().split(")")[1].split()[0] == "Z"


def test_outside_client(tmp_path: Path, serve: Serve, fake_vllm: str, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve()
    status, found = _run(tmp_path, "--vllm", fake_vllm, "--model", str(TINY), "--loads", "mix", "--baton", server.url)
    assert (status, found["failures"]) == (0, [])
    assert found["client"] == "vllm bench serve 9.9.9"
    assert found["medians"]["mix"]["baton"]["output_tokens_per_s"] == pytest.approx(6 * 12 / 2.0)
    assert found["medians"]["mix"]["baton"]["tpot_median_ms"] == pytest.approx(10.0)
    assert "Client: vllm bench serve 9.9.9" in capsys.readouterr().out


def test_held_back_tokens_are_told(tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(tokens_per_chunk=2, count_with_last=True)
    status, found = _run(tmp_path, "--client", "own", "--loads", "c1", "--peer", f"a={server.url}")
    assert status == 0
    assert found["medians"]["c1"]["a"]["chunks_per_token"] == pytest.approx(0.5)
    assert "a sent only 0.50 chunks per token" in capsys.readouterr().out


def test_results_are_shown_again(tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve()
    _run(tmp_path, "--client", "own", "--loads", "c1", "--peer", f"a={server.url}")
    first = capsys.readouterr().out
    assert compare.main(["--redraw", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "nothing to measure"),
        (["--peer", "http://127.0.0.1:1"], "NAME=URL"),
        (["--peer", "a=serve --port 80"], "{port}"),
        (["--peer", "a=http://x", "--baton", "a=http://y"], "names must differ"),
        (["--client", "vllm", "--vllm", "/nowhere/vllm", "--baton", "http://x"], "no such executable"),
        (["--vllm", sys.executable, "--baton", "http://x"], "needs --model"),
    ],
)
def test_wrong_options(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert text in capsys.readouterr().err


def test_baton_is_started_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "PATH", "")
    options = compare.parse_options(["--model", str(TINY), "--baton", "one=--set decode.replicas=2", "--baton", ""])
    one, plain = options.systems
    assert (one.name, plain.name) == ("one", "baton")
    assert one.is_baton
    assert one.command[:4] == (sys.executable, "-m", "baton.cluster.cli", "up")
    assert one.command[-2:] == ("--set", "decode.replicas=2")
    assert "router.http=127.0.0.1:{port}" in plain.command
