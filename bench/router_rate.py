"""What one router process does: its overhead at a steady rate, requests/s with long prompts, CPU of each request.

Usage: python bench/router_rate.py [overhead] [ids] [text] [pair] [--rate 200] [--seconds 8] [--pin] [--threads]

Real router processes between workers without an engine (`instant_workers.py`) and a lean client (`lean_client.py`).

overhead   Poisson arrivals at --rate, 256 token ids in, 16 tokens out, a step of the worker every 5 ms. Overhead of a
           request: its TTFT at the client without what the worker itself took: the client's part is in it.
ids, text  A closed loop, prompts of 4096 tokens, all different, 4 tokens out. Requests/s, and CPU (user and system) of
           the router process for each: how many of these fit into a second is what it can do with a core of its own.
pair       The loop of `ids` with two routers on one port, against the one.

Router, workers and client share the machine's cores; --pin gives the router the first core, and the last one to the
others. `pair` pins nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import uvloop

from baton.cluster.registry import RegistryServer
from baton.config import ClusterConfig, resolve_model_path
from baton.engine.tokenizer import Tokenizer
from lean_client import Answered, LeanClient
from process_cpu import cpu_s, thread_kind

_LONG_TOKENS = 4096
_SHORT_TOKENS = 256
_VOCABULARY = range(10, 4000)
_STEP_S = 0.005
_WARM_UP_S = 2.0
_WORDS = (
    "the",
    "router",
    "reads",
    "a",
    "long",
    "prompt",
    "and",
    "sends",
    "pages",
    "to",
    "another",
    "worker",
    "already",
)


class Processes:
    """The registry here, workers and routers in processes of their own."""

    def __init__(self, folder: Path, *, num_routers: int, pin: bool) -> None:
        self._pin = pin
        self._routers = [f"router-{index}" for index in range(num_routers)]
        self._registry = RegistryServer("router-rate", "local")
        router: dict[str, object] = {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"}
        if num_routers > 1:
            router |= {"http": f"127.0.0.1:{_free_port()}", "grpc": f"127.0.0.1:{_free_port()}"}
            router["replicas"] = num_routers
        self._config = ClusterConfig.model_validate({"model": {"path": str(folder)}, "router": router})
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    async def __aenter__(self) -> Processes:
        cores = sorted(os.sched_getaffinity(0))
        await self._registry.start()
        workers = [sys.executable, str(Path(__file__).parent / "instant_workers.py"), self._registry.address]
        self._start("workers", [*workers, str(_STEP_S)], cores[-1])
        for name in self._routers:
            placement = ["--role", "router", "--instance-id", name, "--start-id", "s", "--rank", "0"]
            placement += ["--num-ranks", "1", "--host", "127.0.0.1", "--registry", self._registry.address]
            process = self._start(name, [sys.executable, "-m", "baton.cluster.role", *placement], cores[0])
            assert process.stdin is not None
            process.stdin.write(self._config.model_dump_json().encode())
            process.stdin.close()
        async with asyncio.timeout(40):
            while not all(self._is_ready(name) for name in ("decode-0", "prefill-0", *self._routers)):
                assert all(process.poll() is None for process in self._running.values()), "a process has ended"
                await asyncio.sleep(0.05)
        if self._pin:
            os.sched_setaffinity(0, {cores[-1]})
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            process.wait(10)
        await self._registry.close()

    @property
    def url(self) -> str:
        """Where requests go."""
        return self._registry.statuses()[self._routers[0]].http_url

    def router_cpu_s(self) -> dict[str, float]:
        """CPU seconds of all routers so far, by kind of thread."""
        spent: dict[str, float] = {}
        for name in self._routers:
            pid = self._running[name].pid
            for thread, seconds in cpu_s(pid).items():
                kind = thread_kind(pid, thread)
                spent[kind] = spent.get(kind, 0.0) + seconds
        return spent

    async def workers_own_s(self) -> dict[str, float]:
        """What the workers took of each request since the last call, by the client's request id."""
        process = self._running["workers"]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        line = await asyncio.to_thread(process.stdout.readline)
        return {name.rsplit("-", 2)[0]: seconds for name, seconds in json.loads(line).items()}

    def _start(self, name: str, command: list[str], core: int) -> subprocess.Popen[bytes]:
        pinned = ["taskset", "--cpu-list", str(core), *command] if self._pin else command
        process = subprocess.Popen(pinned, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._running[name] = process
        return process

    def _is_ready(self, name: str) -> bool:
        status = self._registry.statuses().get(name)
        return status is not None and status.state == "ready"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _model_folder(folder: Path) -> Path:
    """The tokenizer that ships, with a window for the long prompts."""
    source = Path(resolve_model_path("tiny"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    card = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 2 * _LONG_TOKENS}
    (folder / "config.json").write_text(json.dumps(card))
    return folder


def _id_bodies(num_tokens: int, max_tokens: int) -> Callable[[int], bytes]:
    """Prompts that differ from their first tokens on."""
    draw = random.Random(num_tokens)
    rest = [draw.choice(_VOCABULARY) for _ in range(num_tokens - 2)]
    tail = json.dumps({"p": rest, **_options(max_tokens)}).removeprefix('{"p": [').encode()
    size = len(_VOCABULARY)

    def body(number: int) -> bytes:
        high, low = divmod(number, size)
        return b'{"prompt": [%d, %d, %b' % (_VOCABULARY[low], _VOCABULARY[high % size], tail)

    return body


def _text_bodies(tokenizer: Tokenizer, num_tokens: int, max_tokens: int) -> Callable[[int], bytes]:
    draw = random.Random(num_tokens)
    words: list[str] = []
    while (missing := num_tokens - len(tokenizer.encode(" ".join(words)))) > 8:
        words += (draw.choice(_WORDS) for _ in range(max(missing // 3, 1)))
    tail = json.dumps(" ".join(words))[1:].encode() + b", " + json.dumps(_options(max_tokens))[1:].encode()
    return lambda number: b'{"prompt": "%d %b' % (number, tail)


def _options(max_tokens: int) -> dict[str, object]:
    return {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def _told(
    title: str, answers: list[Answered], before: dict[str, float], after: dict[str, float], *, by_thread: bool
) -> float:
    wall_s = max(answer.end_s for answer in answers) - min(answer.sent_s for answer in answers)
    rate = len(answers) / wall_s
    cpu_ms = (sum(after.values()) - sum(before.values())) / len(answers) * 1e3
    ttft_ms = [(answer.first_s - answer.sent_s) * 1e3 for answer in answers]
    print(
        f"{title:9}{len(answers)} requests, {rate:.0f}/s, TTFT p50 {_percentile(ttft_ms, 0.5):.2f} ms,"
        f" router's CPU {cpu_ms:.2f} ms a request: {1e3 / cpu_ms:.0f}/s on a core of its own"
    )
    if by_thread:
        for kind, seconds in sorted(after.items(), key=lambda item: before.get(item[0], 0.0) - item[1]):
            print(f"    {kind:32}{(seconds - before.get(kind, 0.0)) / len(answers) * 1e3:7.3f} ms")
    sys.stdout.flush()
    return rate


async def _overhead(processes: Processes, options: argparse.Namespace) -> None:
    client = LeanClient(processes.url, _id_bodies(_SHORT_TOKENS, 16), "o")
    gaps = random.Random(7)
    await client.connect(32)
    await client.at_rate(options.rate, [gaps.expovariate(1.0) for _ in range(int(options.rate * _WARM_UP_S))])
    await processes.workers_own_s()
    before = processes.router_cpu_s()
    answers = await client.at_rate(
        options.rate, [gaps.expovariate(1.0) for _ in range(int(options.rate * options.seconds))]
    )
    after = processes.router_cpu_s()
    own_s = await processes.workers_own_s()
    client.close()
    _told("overhead", answers, before, after, by_thread=options.threads)
    overhead_ms = [(answer.first_s - answer.sent_s - own_s[answer.request_id]) * 1e3 for answer in answers]
    shown = ", ".join(f"p{share * 100:g} {_percentile(overhead_ms, share):.2f}" for share in (0.5, 0.9, 0.99))
    print(f"    overhead at {options.rate:.0f}/s: {shown} ms (bars: p50 1, p99 3)", flush=True)


async def _loop(title: str, processes: Processes, bodies: Callable[[int], bytes], options: argparse.Namespace) -> float:
    client = LeanClient(processes.url, bodies, title[0])
    await client.connect(options.concurrency)
    await client.closed_loop(options.concurrency, _WARM_UP_S)
    before = processes.router_cpu_s()
    answers = await client.closed_loop(options.concurrency, options.seconds)
    after = processes.router_cpu_s()
    client.close()
    return _told(title, answers, before, after, by_thread=options.threads)


async def _run(options: argparse.Namespace, parts: list[str]) -> None:
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        folder = _model_folder(Path(name))
        ids = _id_bodies(_LONG_TOKENS, 4)
        text = _text_bodies(Tokenizer.from_dir(folder), _LONG_TOKENS, 4)
        singles = [part for part in parts if part != "pair"]
        if singles:
            async with Processes(folder, num_routers=1, pin=options.pin) as processes:
                if "overhead" in parts:
                    await _overhead(processes, options)
                if "ids" in parts:
                    await _loop("ids", processes, ids, options)
                if "text" in parts:
                    await _loop("text", processes, text, options)
        if "pair" in parts:
            os.sched_setaffinity(0, cores)
            rates = []
            for num_routers in (1, 2):
                async with Processes(folder, num_routers=num_routers, pin=False) as processes:
                    rates.append(await _loop(f"pair {num_routers}", processes, ids, options))
            print(f"    two routers: {rates[1] / rates[0]:.2f} times as many, {len(cores)} cores for all processes")


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="overhead, ids, text, pair; default all")
    parser.add_argument("--rate", type=float, default=200.0, help="requests/s of the first part")
    parser.add_argument("--concurrency", type=int, default=16, help="of the loops")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each part")
    parser.add_argument("--pin", action="store_true", help="the router on one core, all others on another")
    parser.add_argument("--threads", action="store_true", help="CPU of each kind of the router's threads")
    options = parser.parse_args()
    parts = options.parts or ["overhead", "ids", "text", "pair"]
    assert set(parts) <= {"overhead", "ids", "text", "pair"}, f"parts are overhead, ids, text and pair, got {parts}"
    print(f"load average {os.getloadavg()[0]:.1f}", flush=True)
    uvloop.run(_run(options, parts))


if __name__ == "__main__":
    main()
