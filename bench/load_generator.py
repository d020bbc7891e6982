"""How much load one process of `baton bench` can offer: answered requests a second, lateness, and its own CPU.

    python bench/load_generator.py [--rates 200 500 1000 2000] [--seconds 5] [--input-tokens 256] [--output-tokens 16]

The server is a process of its own that answers every request at once with ready-made bytes, one chunk for each token,
so that the generator is what is measured. It needs a core to itself, and so does the generator.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import re
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from baton.cluster.event_loop import run_event_loop
from baton.cluster.loadgen.bench import Bench
from baton.cluster.loadgen.http_target import HttpTarget, find_server
from baton.cluster.loadgen.machine import describe_machine
from baton.cluster.loadgen.plan import Plan
from baton.cluster.loadgen.result import PointResult
from baton.cluster.loadgen.target import Sampling

_HEAD = b'"id":"cmpl-0123456789abcdef","created":1700000000,"model":"ready-made","object":"text_completion"'
_TOKEN = (
    b'data: {%b,"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null,"token_ids":[123]}]}\n\n'
    % _HEAD
)
_LAST = b'data: {%b,"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"length"}]}\n\n' % _HEAD
_USAGE = b'data: {%b,"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}\n\ndata: [DONE]\n\n'
_MODELS = b'{"data":[{"id":"ready-made"}]}'
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_MAX_TOKENS = re.compile(rb'"max_tokens":(\d+)')


class _ReadyMade(asyncio.Protocol):
    """Answers whole requests, one after another, a write for each token."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not end or len(body) < (int(length[1]) if length else 0):
            return
        self._received = b""
        asked = _MAX_TOKENS.search(body)
        if asked is None:
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(_MODELS), _MODELS))
            return
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(int(asked[1])):
            self._write(_TOKEN)
        self._write(_LAST)
        self._write(_USAGE % (_HEAD, body.count(b",") + 1, int(asked[1])))
        self._transport.write(b"0\r\n\r\n")

    def _write(self, event: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))


def serve(ready: Connection) -> None:
    """A process of its own."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(_ReadyMade, "127.0.0.1", 0, backlog=4096)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(run())


def measure(url: str, plan: Plan) -> list[PointResult]:
    """Every rate of the plan in turn."""

    async def run() -> list[PointResult]:
        target = HttpTarget(
            find_server(url, api_key=None, model=None), Sampling(), api_key=None, is_chat=False, wants_ids=False
        )
        bench = Bench(plan, target, trace=None, on_progress=lambda *_: None, on_point=lambda *_: None)
        return await bench.run()

    return run_event_loop(run())


def main() -> None:
    """Parses the command line, starts the server, prints a line for each rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[200, 500, 1000, 2000])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--input-tokens", default="256")
    parser.add_argument("--output-tokens", default="16")
    options = parser.parse_args()
    plan = Plan(
        sweep="rate=" + ",".join(f"{rate:g}" for rate in options.rates),
        requests=round(max(options.rates) * options.seconds * 2),
        duration_s=options.seconds,
        input=options.input_tokens,
        output=options.output_tokens,
    )
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    try:
        points = measure(f"http://127.0.0.1:{ours.recv()}", plan)
    finally:
        server.terminate()
        server.join(10)
    machine = describe_machine()
    print(f"{plan.input} tokens in, {plan.output} out; {machine['processor']}, {machine['cores']} cores")
    for point in points:
        summary, lag = point.summary, point.lag_ms
        assert lag is not None
        assert summary.ttft_ms is not None
        print(
            f"{point.label:>8}: {summary.requests_per_s:7.1f} answered/s, {summary.output_tokens_per_s:9,.0f} tokens/s,"
            f"  late p50 {lag.p50:6.2f} p99 {lag.p99:7.2f} ms,  TTFT p50 {summary.ttft_ms.p50:6.2f}"
            f" p99 {summary.ttft_ms.p99:7.2f} ms,  {point.cpu_share:4.0%} of a core,"
            f"  {summary.requests - summary.ok} not answered"
        )


if __name__ == "__main__":
    main()
