"""What everything but the model costs: a step's Python, CPU of router and worker per streamed token, the router's TTFT.

Usage: python bench/overhead.py [engine] [stream] [--streams 32] [--step-ms 20] [--work read] [--seconds 6]

engine    `Engine.step` over a runner whose forward costs nothing (vocabulary of 32000), in us per step: planning, batch
          building, sampling, the rest, for greedy and sampled requests; `overhead` is the step without the kernels that
          sampling calls (drawing, log-sum-exp). Medians of some hundred steps. With --step-ms and --work read each
          forward reads memory first, as a model reads its weights, which empties the caches: what is measured then
          is the overhead as it is beside a model.
stream    A real router and a real decode worker in processes of their own, the worker's model replaced by that runner,
          which takes `--step-ms` per step, asleep or reading memory, and streaming clients here. CPU time (user and
          system, from the scheduler's own nanosecond counts) of each process per streamed token, by thread with
          --threads, the engine's thread told apart and without its forwards; then requests one after the other to the
          router and straight to the worker: the difference of the medians is the router's TTFT.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import torch

from baton.cluster.registry import RegistryServer
from baton.config import ClusterConfig, resolve_model_path
from baton.engine import engine as engine_module
from baton.engine.batch_buffers import BatchBuffers
from baton.engine.engine import Engine
from baton.engine.kv_layout import KvLayout
from baton.engine.model import ForwardBatch
from baton.engine.request import EngineRequest, SamplingParams
from baton.kernels import ops
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import request_to_proto
from baton.router.links import PROTOCOL_VERSION
from process_cpu import cpu_s, thread_kind

VOCAB_SIZE = 32000
_EOS = 1
_BLOCK_SIZE = 16
_PROMPT_TOKENS = 256
_NUM_WINDOWS = 10
_READ_BYTES = 48 << 20
"""More than the caches hold."""


class NullRunner:
    """Computes nothing: after `step_s` it answers with rows of one fixed table of logits.

    Args:
        reads: spend that time reading memory instead of sleeping, so that caches are as cold as after a model's step.
    """

    def __init__(
        self, *, vocab_size: int, max_batch_size: int, max_model_len: int, step_s: float = 0.0, reads: bool = False
    ) -> None:
        self.layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_size=_BLOCK_SIZE, dtype="float32")
        self.num_blocks = max_batch_size * -(-max_model_len // _BLOCK_SIZE)
        self.kv = torch.zeros((self.num_blocks, 1, 2, 1, _BLOCK_SIZE, 2))
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.fingerprint = "null"
        self.eos_token_ids = (_EOS,)
        self.buffers = BatchBuffers(
            max_batch_tokens=2048,
            max_batch_size=max_batch_size,
            max_model_len=max_model_len,
            block_size=_BLOCK_SIZE,
            device=torch.device("cpu"),
        )
        self.thread_id = 0
        self.gaps_s: dict[int, list[float]] = defaultdict(list)
        self.gaps_cpu_s: dict[int, list[float]] = defaultdict(list)
        self.forward_cpu_s = 0.0
        self._ended_s = self._ended_cpu_s = 0.0
        self._step_s = step_s
        self._memory = torch.ones(_READ_BYTES, dtype=torch.uint8) if reads else None
        generator = np.random.default_rng(0)
        # As peaked as a trained model's: a few likely tokens far above the rest.
        table = generator.gumbel(size=(max_batch_size, vocab_size)).astype(np.float32) * 2
        table[:, _EOS] = -30
        self._logits = torch.from_numpy(table)

    def forward(
        self, batch: ForwardBatch, on_layers: Callable[[int, int], None] | None = None, layers_per_group: int = 4
    ) -> torch.Tensor:
        """Logits that were made beforehand."""
        self.thread_id = threading.get_native_id()
        num_rows = len(batch.logit_rows)
        begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()
        if self._ended_s:
            self.gaps_s[num_rows].append(begin_s - self._ended_s)
            self.gaps_cpu_s[num_rows].append(begin_cpu_s - self._ended_cpu_s)
        if self._memory is not None:
            while time.perf_counter() < begin_s + self._step_s:
                ops.checksum(self._memory)
        elif self._step_s:
            time.sleep(self._step_s)
        if on_layers is not None:
            on_layers(0, 1)
        logits = self._logits[:num_rows]
        if self._memory is not None:
            # A model has just written its logits.
            logits.sum()
        self._ended_s, self._ended_cpu_s = time.perf_counter(), time.thread_time()
        self.forward_cpu_s += self._ended_cpu_s - begin_cpu_s
        return logits


# ---------------------------------------------------------------- engine

_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.2},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


class _Timed:
    """Wraps a callable and adds its time up."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.spent_s = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin_s = time.perf_counter()
        try:
            return self._call(*args, **kwargs)
        finally:
            self.spent_s += time.perf_counter() - begin_s


def time_engine(num_sequences: int, options: dict[str, Any], budget_s: float, forward_s: float) -> dict[str, float]:
    """Medians over decode steps of `num_sequences`, in us, without the forward's time."""
    runner = NullRunner(
        vocab_size=VOCAB_SIZE,
        max_batch_size=num_sequences,
        max_model_len=2048,
        step_s=forward_s,
        reads=forward_s > 0,
    )
    engine = Engine(runner, max_batch_tokens=2048, max_batch_size=num_sequences)
    for index in range(num_sequences):
        prompt = tuple((index * 31 + position * 7) % VOCAB_SIZE for position in range(_PROMPT_TOKENS))
        sampling = SamplingParams(max_tokens=1700, ignore_eos=True, seed=index, **options)
        assert not engine.add(EngineRequest(request_id=f"r{index}", prompt_token_ids=prompt, sampling=sampling))
    while len(engine.scheduler.running) < num_sequences or any(s.num_output == 0 for s in engine.scheduler.running):
        engine.step()
    sample, draw_plain, draw_tokens, logits_lse = (
        engine_module.sample, engine_module.draw_plain, ops.draw_tokens, ops.logits_lse
    )  # fmt: skip
    samplers = _Timed(sample), _Timed(draw_plain)
    parts = {"schedule": _Timed(engine.scheduler.schedule), "build": _Timed(engine._batch)}
    kernels = _Timed(draw_tokens), _Timed(logits_lse)
    forward = runner.forward = _Timed(runner.forward)  # type: ignore[method-assign]
    ops.draw_tokens, ops.logits_lse = kernels  # type: ignore[assignment]
    engine.scheduler.schedule = parts["schedule"]  # type: ignore[method-assign]
    engine._batch = parts["build"]  # type: ignore[method-assign]
    engine_module.sample, engine_module.draw_plain = samplers  # type: ignore[assignment]
    steps: dict[str, list[float]] = defaultdict(list)
    end_s = time.perf_counter() + budget_s
    try:
        while (time.perf_counter() < end_s or len(steps["step"]) < 10) and len(steps["step"]) < 1000:
            for part in (*parts.values(), *samplers, *kernels, forward):
                part.spent_s = 0.0
            begin_s = time.perf_counter()
            engine.step()
            total_s = time.perf_counter() - begin_s - forward.spent_s
            kernels_s = sum(kernel.spent_s for kernel in kernels)
            steps["step"].append(total_s)
            steps["kernels"].append(kernels_s)
            steps["overhead"].append(total_s - kernels_s)
            spent_s = {name: part.spent_s for name, part in parts.items()}
            spent_s["sample"] = sum(sampler.spent_s for sampler in samplers)
            for name, seconds in spent_s.items():
                steps[name].append(seconds)
            steps["rest"].append(total_s - sum(spent_s.values()))
    finally:
        engine_module.sample, engine_module.draw_plain = sample, draw_plain
        ops.draw_tokens, ops.logits_lse = draw_tokens, logits_lse
    return {name: statistics.median(values) * 1e6 for name, values in steps.items()}


_COLUMNS = ("step", "schedule", "build", "sample", "rest", "kernels", "overhead")


def bench_engine(sizes: list[int], budget_s: float, forward_s: float) -> None:
    """Prints a table of us per step."""
    caches = f"after {forward_s * 1e3:.0f} ms of reading memory" if forward_s else "caches warm"
    print(f"engine: us per step, vocabulary {VOCAB_SIZE}, {caches}, load average {os.getloadavg()[0]:.1f}")
    print(f"{'':14}{'rows':>5}" + "".join(f"{name:>10}" for name in _COLUMNS))
    for kind, options in _KINDS.items():
        for size in sizes:
            spent = time_engine(size, options, budget_s, forward_s)
            row = "".join(f"{spent[name]:10.0f}" for name in _COLUMNS)
            print(f"{kind:14}{size:5}{row}", flush=True)


# ---------------------------------------------------------------- stream


def serve_null_decode(step_s: float, reads: bool) -> int:
    """A decode worker's process whose engine has a `NullRunner`; otherwise as launched by `baton up`."""
    from baton.cluster import role
    from baton.worker import runtime

    runners: list[NullRunner] = []

    def build_engine(config: ClusterConfig, pool: Any, progress: Callable[[str, float], None]) -> Engine:
        runner = NullRunner(
            vocab_size=4096, max_batch_size=pool.max_batch_size, max_model_len=2048, step_s=step_s, reads=reads
        )
        runners.append(runner)

        def tell_thread() -> None:
            while not runner.thread_id:
                time.sleep(0.05)
            print(f"engine thread {runner.thread_id}", flush=True)

        threading.Thread(target=tell_thread, daemon=True).start()
        return Engine(runner, max_batch_tokens=2048, max_batch_size=pool.max_batch_size)

    runtime.build_engine = build_engine
    role.prepare = lambda *_: None  # it wants to run before torch is imported
    code = role.main(sys.argv[4:])
    for runner in runners:
        full = max(runner.gaps_s, key=lambda size: len(runner.gaps_s[size]))
        gaps_s = sorted(runner.gaps_s[full])
        middle, worst = (gaps_s[int(len(gaps_s) * share)] * 1e6 for share in (0.5, 0.99))
        cpu_us = statistics.median(runner.gaps_cpu_s[full]) * 1e6
        print(
            f"between two forwards of the full batch: {middle:.0f} us, p99 {worst:.0f} us; {cpu_us:.0f} us of CPU",
            flush=True,
        )
    return code


async def stream_request(url: str, body: dict[str, Any], on_chunk: Callable[[], None]) -> float:
    """One streamed completion over a connection of its own; returns seconds to its first chunk of text."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    begin_s = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    first_s = 0.0
    tail = b""
    while data := await reader.read(1 << 16):
        window = tail + data
        for _ in range(window.count(b'"token_ids"') - tail.count(b'"token_ids"')):
            first_s = first_s or time.perf_counter() - begin_s
            on_chunk()
        tail = data[-10:]
    writer.close()
    return first_s


def _body(index: int, num_tokens: int) -> dict[str, Any]:
    prompt = [(index * 31 + position * 7) % 4000 + 10 for position in range(_PROMPT_TOKENS)]
    return {
        "model": "tiny", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip


class Cluster:
    """The processes and how to reach them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.config = ClusterConfig.model_validate(
            {
                "model": {"path": "tiny"},
                "router": {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"},
                "decode": {"max_batch_size": max(64, options.streams)},
                "metrics": {"enabled": True},
            }
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.registry = RegistryServer("overhead", "local")
        self.engine_thread = 0

    async def start(self, step_ms: float) -> None:
        """Returns when the router is ready."""
        await self.registry.start()
        for name, command in (
            ("decode", [sys.executable, __file__, "--null-decode", str(step_ms / 1e3), self._options.work]),
            ("router", [sys.executable, "-m", "baton.cluster.role"]),
        ):
            placement = ["--role", name, "--instance-id", f"{name}-0", "--start-id", "s", "--rank", "0"]
            placement += ["--num-ranks", "1", "--host", "127.0.0.1", "--registry", self.registry.address]
            self.processes[name] = self._launch([*command, *placement])
        async with asyncio.timeout(40):
            while not all(self._ready(name) for name in ("decode", "router")):
                assert all(process.poll() is None for process in self.processes.values()), "a process has ended"
                await asyncio.sleep(0.05)

    def _launch(self, command: list[str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert process.stdin is not None
        process.stdin.write(self.config.model_dump_json().encode())
        process.stdin.close()
        return process

    def _ready(self, name: str) -> bool:
        status = self.registry.statuses().get(f"{name}-0")
        return status is not None and status.state == "ready"

    @property
    def url(self) -> str:
        """Of the router."""
        return self.registry.statuses()["router-0"].http_url

    def read_engine_thread(self) -> None:
        """Once a step was made."""
        output = self.processes["decode"].stdout
        assert output is not None
        self.engine_thread = int(output.readline().split()[-1])

    def cpu_s(self) -> dict[str, float]:
        """So far, by part, or by kind of thread."""
        decode, router = (cpu_s(self.processes[name].pid) for name in ("decode", "router"))
        spent = {"router": sum(router.values())}
        engine = decode.pop(self.engine_thread, 0.0)
        spent["decode, but its engine"] = sum(decode.values())
        spent["engine thread" + (", forwards too" if self._options.work == "read" else "")] = engine
        if self._options.threads:
            for role, threads in (("router", router), ("decode", decode)):
                for thread, seconds in threads.items():
                    kind = f"  {role}: {thread_kind(self.processes[role].pid, thread)}"
                    spent[kind] = spent.get(kind, 0.0) + seconds
        return spent

    async def stop(self) -> None:
        """Ends them."""
        for process in self.processes.values():
            process.terminate()
        for name, process in self.processes.items():
            process.wait(10)
            if name == "decode" and process.stdout is not None and self.engine_thread:
                print("  " + process.stdout.read().decode().strip())
        await self.registry.close()


async def bench_cpu(options: argparse.Namespace) -> None:
    """Prints CPU us per streamed token."""
    cluster = Cluster(options)
    try:
        await cluster.start(options.step_ms)
        await stream_request(cluster.url, _body(999, 2), lambda: None)
        cluster.read_engine_thread()
        await asyncio.gather(
            *(stream_request(cluster.url, _body(500 + i, 40), lambda: None) for i in range(options.streams))
        )
        seen, all_decode = 0, asyncio.Event()

        def count() -> None:
            nonlocal seen
            seen += 1
            if seen == 4 * options.streams:
                all_decode.set()

        num_tokens = min(1700, int(options.seconds / options.step_ms * 1e3 * 1.5) + 50)
        streams = [
            asyncio.create_task(stream_request(cluster.url, _body(index, num_tokens), count))
            for index in range(options.streams)
        ]
        async with asyncio.timeout(20):
            await all_decode.wait()
        windows: list[dict[str, float]] = []
        begin_s, seen_first = time.perf_counter(), seen
        for _ in range(_NUM_WINDOWS):
            before, seen_before = cluster.cpu_s(), seen
            await asyncio.sleep(options.seconds * 0.9 / _NUM_WINDOWS)
            after = cluster.cpu_s()
            windows.append({name: (after[name] - before.get(name, 0.0)) / (seen - seen_before) * 1e6 for name in after})
        tokens, wall_s = seen - seen_first, time.perf_counter() - begin_s
        assert not any(stream.done() for stream in streams), "the streams ended too early"
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        print(
            f"stream: {options.streams} streams, {tokens / wall_s:.0f} tokens/s,"
            f" {wall_s / tokens * options.streams * 1e3:.1f} ms per step of which {options.step_ms} sleep,"
            f" load average {os.getloadavg()[0]:.1f}"
        )
        for name in windows[0]:
            spent = sorted(window.get(name, 0.0) for window in windows)
            median = statistics.median(spent)
            print(
                f"  {name:30}{median:7.1f} us CPU per token, at best {spent[0]:.1f} ({_NUM_WINDOWS} windows)",
                flush=True,
            )
    finally:
        await cluster.stop()


async def _direct_ttft_s(stub: Any, num_requests: int) -> list[float]:
    """Seconds from Submit to the first token on one stream to the worker."""
    commands: asyncio.Queue[pb.DecodeCommand] = asyncio.Queue()
    commands.put_nowait(pb.DecodeCommand(hello=pb.Hello(router_id="bench", protocol_version=PROTOCOL_VERSION)))

    async def drain() -> Any:
        while True:
            yield await commands.get()

    events = aiter(stub.Stream(drain()))
    await anext(events)
    times = []
    for index in range(num_requests):
        body = _body(5000 + index, 1)
        request = EngineRequest(
            request_id=f"direct-{index}",
            prompt_token_ids=tuple(body["prompt"]),
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
        )
        begin_s = time.perf_counter()
        commands.put_nowait(pb.DecodeCommand(submit=pb.Submit(request=request_to_proto(request))))
        while not (await anext(events)).step.outputs:
            pass
        times.append(time.perf_counter() - begin_s)
        await asyncio.sleep(0.005)
    return times


async def bench_ttft(options: argparse.Namespace) -> None:
    """Prints medians of TTFT with and without the router."""
    cluster = Cluster(options)
    num_requests = 150
    try:
        await cluster.start(0.0)
        routed = []
        for index in range(num_requests):
            routed.append(await stream_request(cluster.url, _body(index, 1), lambda: None))
            await asyncio.sleep(0.005)
        async with grpc.aio.insecure_channel(cluster.registry.statuses()["decode-0"].address) as channel:
            direct = await _direct_ttft_s(rpc.DecodeStub(channel), num_requests)
    finally:
        await cluster.stop()
    routed_s, direct_s = statistics.median(routed[20:]), statistics.median(direct[20:])
    print(
        f"ttft: {routed_s * 1e3:.2f} ms through the router, {direct_s * 1e3:.2f} ms from the worker:"
        f" the router adds {(routed_s - direct_s) * 1e3:.2f} ms (medians of {num_requests - 20})"
    )


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="engine, stream; default both")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=20.0, help="of a forward; in the engine's part with read only")
    parser.add_argument("--work", choices=["sleep", "read"], default="sleep", help="what a forward does meanwhile")
    parser.add_argument("--threads", action="store_true", help="CPU per token of each thread")
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    parts = options.parts or ["engine", "stream"]
    assert set(parts) <= {"engine", "stream"}, f"parts are engine and stream, got {parts}"
    resolve_model_path("tiny")
    if "engine" in parts:
        forward_s = options.step_ms / 1e3 if options.work == "read" else 0.0
        bench_engine(options.rows, 0.4 + 50 * forward_s, forward_s)
    if "stream" in parts:
        asyncio.run(bench_cpu(options))
        asyncio.run(bench_ttft(options))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--null-decode"]:
        sys.exit(serve_null_decode(float(sys.argv[2]), sys.argv[3] == "read"))
    main()
