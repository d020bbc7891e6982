"""Loads over HTTP: what is sent, refusals, failures, connections, conversations, traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_command import bench
from scripted_server import Reply, ScriptedServer


def test_every_request_is_as_asked(tmp_path: Path) -> None:
    with ScriptedServer(lambda body, number: Reply(cached_tokens=5)) as server:
        classes = [
            "--class",
            "gold:1:priority=7,priority_class=fast,tenant=a,ttft_ms=9000",
            "--class",
            "rest:1:cache_salt=s",
        ]
        shape = ["-c", "3", "--requests", "24", "--input", "20", "--output", "3-6", "--slo", "tpot_ms=5000"]
        done, result, records = bench(server.url, tmp_path, *shape, *classes, "--send-slo", "--warm-up", "1")
    assert done.exit_code == 0, done.output
    assert len(server.bodies) == 25
    tenants = [head.get("x-baton-tenant") for head in server.heads if "content-length" in head]
    for body, tenant in zip(server.bodies, tenants, strict=True):
        assert len(body["prompt"]) == 20
        assert 3 <= body["max_tokens"] <= 6
        assert body["stream"] is True
        assert body["ignore_eos"] is True
        assert body["model"] == "scripted"
        is_gold = body.get("priority") == 7
        assert body.get("user") == tenant == ("a" if is_gold else None)
        assert body.get("priority_class") == ("fast" if is_gold else None)
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
