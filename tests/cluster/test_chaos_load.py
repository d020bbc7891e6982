"""Clients of the load against a server that breaks off, refuses, errs and lies; and what /proc tells."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from baton.cluster.chaos.load import Load
from baton.cluster.chaos.processes import descriptors, is_local, listener_pid, resident_bytes, send_signal
from baton.cluster.chaos.prompts import NUM_PROMPTS, body_of, salted
from baton.errors import UnavailableError

TOKENS = 4


class Server:
    """Answers completions over plain HTTP; `behave` says how: "good", or what goes wrong with the next answers."""

    def __init__(self) -> None:
        self.behaviour: list[str] = []
        self.keys: list[str] = []
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            body = json.loads(await reader.readexactly(int(fields["content-length"])))
            self.keys.append(fields.get("idempotency-key", ""))
            how = self.behaviour.pop(0) if self.behaviour else "good"
            if how == "refuse":
                text = b'{"error": {"message": "full"}}'
                writer.write(b"HTTP/1.1 503 x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
                return
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
            for place in range(TOKENS):
                token = len(body["prompt"]) + place + (how == "lie")
                self.write(writer, {"choices": [{"token_ids": [token]}]})
                if how == "break" and place == 1:
                    return
                if how == "err" and place == 1:
                    self.write(writer, {"error": {"message": "no good"}})
                    return
            usage = {"completion_tokens": TOKENS + (how == "miscount")}
            self.write(writer, {"choices": [], "usage": usage})
            writer.write(b"data: [DONE]\n\n")
        finally:
            writer.close()

    def write(self, writer: asyncio.StreamWriter, chunk: object) -> None:
        writer.write(f"data: {json.dumps(chunk)}\n\n".encode())


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Server, Load]]:
    server = Server()
    async with await asyncio.start_server(server.answer, "127.0.0.1", 0) as listening:
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with Load(lambda: [server.url], model="m", max_tokens=TOKENS) as load:
            await load.expect()
            server.keys.clear()
            load.begin()
            yield server, load


async def test_a_broken_connection_and_a_refusal_are_tried_again_with_the_same_key() -> None:
    async with serving() as (server, load):
        server.behaviour = ["break", "refuse", "break"]
        outcome = await load.ask(3)
        assert (outcome.error, outcome.is_wrong, outcome.tokens) == ("", False, TOKENS)
        assert (outcome.reconnects, outcome.refusals) == (2, 1)
        assert len(server.keys) == 4
        assert len(set(server.keys)) == 1
        await load.ask(3)
        assert server.keys[-1] not in server.keys[:-1]


@pytest.mark.parametrize(
    ("how", "is_wrong", "error"), [("lie", True, ""), ("miscount", True, ""), ("err", False, "no good")]
)
async def test_what_is_wrong_is_seen(how: str, is_wrong: bool, error: str) -> None:
    async with serving() as (server, load):
        server.behaviour = [how]
        outcome = await load.ask(5)
        assert outcome.is_wrong is is_wrong
        assert error in outcome.error
        assert bool(outcome.error) is bool(error)
        assert (await load.ask(5)).is_wrong is False
        assert len(load.outcomes) == 2


async def test_without_faults_a_failure_is_told_at_once() -> None:
    async with Load(lambda: ["http://127.0.0.1:9"], model="m") as load:
        with pytest.raises(UnavailableError, match="before any fault"):
            await load.expect()


async def test_clients_stop_when_they_are_told_or_have_done_their_part() -> None:
    async with serving() as (_, load):
        stop = asyncio.Event()
        await load.client(2, stop, requests=5)
        assert len(load.outcomes) == 5
        running = asyncio.create_task(load.client(0, stop))
        arriving = asyncio.create_task(load.arrivals(500.0, stop, seed=1, at_once=2))
        while len(load.outcomes) < 40:
            await asyncio.sleep(0.01)
        stop.set()
        await asyncio.wait_for(asyncio.gather(running, arriving), 30)
        assert load.running == 0
        assert not any(outcome.error or outcome.is_wrong for outcome in load.outcomes)


def test_prompts_differ_and_salts_do_not_change_them() -> None:
    bodies = [body_of(number, model="m", max_tokens=8) for number in range(NUM_PROMPTS)]
    assert len({body["prompt"] for body in bodies}) == NUM_PROMPTS
    assert {body["temperature"] for body in bodies} == {0, 0.9}
    changed = salted(bodies[0], "x")
    assert {key for key in changed if changed[key] != bodies[0].get(key)} == {"cache_salt"}


def test_addresses_of_this_host() -> None:
    assert is_local("127.0.0.1")
    assert is_local("localhost")
    assert not is_local("192.0.2.7")
    assert not is_local("no-such-host.invalid")


def test_what_proc_tells_of_a_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert listener_pid(f"127.0.0.1:{server.getsockname()[1]}") == os.getpid()
    assert resident_bytes(os.getpid()) > 1 << 20
    assert descriptors(os.getpid()) > 2
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert send_signal(child.pid, signal.SIGKILL)
    child.wait(10)
    assert not send_signal(child.pid, signal.SIGKILL)
    assert (resident_bytes(child.pid), descriptors(child.pid)) == (0, 0)
