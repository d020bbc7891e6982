"""Measures handovers of KV pages between two processes on this host, with the real protocol and real transports.

Usage: python bench/handover.py [--bytes 65536 8388608 ...] [--transports shm gloo] [--rounds 10]
                                [--link-gbit-s 10] [--tokens 16 255 1024] [--prefill-tokens-per-s 2000] [--no-pin]
       python bench/handover.py --device cuda --transports cuda_ipc [--json OUT]

One process is the prefill worker, the other the decode worker; pages have the layout of the benchmark model (16 layers,
4 KV heads of 64, bfloat16: 16 KiB per token) and are gathered, summed, shipped, verified and scattered as in a worker.

Each process keeps to one core of its own, unless `--no-pin` is given. The staging arenas, of `raw` too, have the size
that workers give them by default (`transfer.arena`), or that of the environment's BATON_BENCH_ARENA_BYTES.

First table, per transport and size, the best of the rounds:
    raw        the transport alone: one copy into its memory, to the other process, one copy out, in its longest pieces
    handover   from the offer of all pages until the decode worker has attached them and said so
    of raw     the second over the first

Second and third table: what the handover adds to the time to first token, over a link of `--link-gbit-s` (gloo with its
rate limit) and over shared memory: the time from the last layer until the pages are attached, and the processor time
that shipping takes away from the prefill before. The prefill is a matrix product, again and again, for as much of its
core's time as `--prefill-tokens-per-s` says. Rounds of both ways alternate; the best of each counts:
    one message    all layers are offered at the end
    layer-wise     four groups of layers are offered as they are computed
    difference     how much longer one message takes
    added          the way that a worker takes (one message below `transfer.one_message_below_tokens`, and layer-wise
                   from there on) as a part of the prefill

The defaults take about a minute on two idle cores, and 1 GiB of memory.

With `--device cuda` the pools of both processes lie on the GPU (the same one, where there is but one), in the layout of
Llama-3-8B (128 KiB per token), with larger arenas and sizes, and only the first table is made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch
from rich.console import Console
from rich.table import Table

from baton.engine.kv_layout import KvLayout
from baton.kernels import ops
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import PageRange, layer_groups
from baton.kv_transfer.receiver import HandoverReceiver
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.shipment import DecodeTarget, RankAddress, Shipment
from baton.kv_transfer.transports.base import SendLink, Staged, Transport
from baton.kv_transfer.transports.select import host_id, make_transports
from baton.kv_transfer.wire import FirstToken
from baton.proto.baton.v1 import worker_pb2_grpc

CPU_LAYOUT = KvLayout(num_layers=16, num_kv_heads=4, head_dim=64, block_size=16, dtype="bfloat16")
GPU_LAYOUT = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
LAYOUT = CPU_LAYOUT
DEVICE = "cpu"
WAIT_S = 60.0
SETUP_S = 20.0
# As `TransferConfig` says, whose module may be missing what it needs where there is a GPU and little else.
THRESHOLD_TOKENS = 256
ARENA_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class Pool:
    """KV blocks for one prompt of at most `max_tokens`; a prompt takes the first ones in an order that jumps."""

    def __init__(self, max_tokens: int) -> None:
        num_blocks = LAYOUT.num_blocks_for(max_tokens)
        shape = (num_blocks, LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, LAYOUT.block_size, LAYOUT.head_dim)
        self.kv = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
        self.block_ids = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))

    def gather(self, pages: PageRange, out: torch.Tensor) -> int:
        """As `Gather`."""
        return ops.gather_pages_summed(
            self.kv, *pages.layers, self.block_ids, 16, *pages.tokens, self._view(pages, out)
        )

    def write(self, _: tuple[int, ...], pages: PageRange, payload: torch.Tensor) -> int:
        """As `WritePages`."""
        return ops.scatter_pages_summed(
            self.kv, *pages.layers, self.block_ids, 16, *pages.tokens, self._view(pages, payload)
        )

    def _view(self, pages: PageRange, flat: torch.Tensor) -> torch.Tensor:
        num_layers, num_tokens = pages.layer_end - pages.layer_begin, pages.token_end - pages.token_begin
        return flat.view(torch.bfloat16).view(num_layers, 2, LAYOUT.num_kv_heads, num_tokens, LAYOUT.head_dim)


def make_peer(name: str) -> LocalPeer:
    """One side of the benchmark."""
    return LocalPeer(
        instance_id=name, incarnation=os.urandom(16), model_fingerprint="bench", layout=LAYOUT, host_id=host_id()
    )


def make_transport(name: str, link_gbit_s: float | None) -> Transport:
    """The transport called `name`."""
    arena_bytes = int(os.environ.get("BATON_BENCH_ARENA_BYTES", ARENA_BYTES[DEVICE]))
    return make_transports(name, arena_bytes=arena_bytes, rate_limit_gbit_s=link_gbit_s, device=DEVICE)[0]


def use_device(device: str) -> None:
    """Pools of this process lie there; "cuda" also takes the layout of a model for GPUs."""
    global DEVICE, LAYOUT
    DEVICE, LAYOUT = device, GPU_LAYOUT if device == "cuda" else CPU_LAYOUT


# ------------------------------------------------------------ the decode worker's process


def receive_raw(pipe: Connection, name: str, max_bytes: int) -> None:
    """Fetches payloads and copies them out until the pipe says `None`."""
    transport = make_transport(name, None)
    setup = transport.open_receive(pipe.recv(), peer="sender")
    pipe.send(setup.options)
    link = setup.finish(SETUP_S)
    destination = torch.empty(max_bytes, dtype=torch.uint8, device=DEVICE).zero_()
    while (message := pipe.recv()) is not None:
        locator, begin, end = message
        payload = link.fetch(locator, end - begin, WAIT_S)
        with link.reading():
            destination[begin:end] = payload
        link.done(payload)
        pipe.send(begin)
    link.close()
    transport.close()


async def serve_handovers(pipe: Connection, name: str, link_gbit_s: float | None, max_tokens: int) -> None:
    """Reserves a prompt for every number of tokens that the pipe says, until it says `None`."""
    pool, peer = Pool(max_tokens), make_peer("decode")
    transport = make_transport(name, link_gbit_s)
    receiver = HandoverReceiver(
        peer,
        transports=[transport],
        write_pages=pool.write,
        on_landed=lambda key, token: None,
        on_failed=lambda key, failure: print(f"{key} failed: {failure.reason}"),
        on_settled=lambda key: None,
        fetch_timeout_s=WAIT_S,
        checksum=None,
    )
    server = grpc.aio.server()
    worker_pb2_grpc.add_HandoverServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    receiver.start()
    pipe.send((f"127.0.0.1:{port}", peer.incarnation))
    number = 0
    while (num_tokens := await asyncio.to_thread(pipe.recv)) is not None:
        key = HandoverKey(f"request-{number}", 0)
        receiver.open_reservation(key, tuple(pool.block_ids.tolist()), cached_tokens=0, num_tokens=num_tokens)
        pipe.send(number)
        number += 1
    await receiver.close()
    await server.stop(None)
    transport.close()


def decode_process(pipe: Connection, cores: set[int], device: str, task: str, *arguments: Any) -> None:
    """Entry of the other process."""
    use_device(device)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, cores)
    if task == "raw":
        receive_raw(pipe, *arguments)
    else:
        asyncio.run(serve_handovers(pipe, *arguments))


decode_cores = os.sched_getaffinity(0)


def pin() -> None:
    """Keep this process to one core, and those that it starts to the others; no change where there is but one."""
    global decode_cores
    first, *others = sorted(os.sched_getaffinity(0))
    if others:
        os.sched_setaffinity(0, {first})
        decode_cores = set(others[:1])


class Other:
    """The other process, and a pipe to it."""

    def __init__(self, task: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, decode_cores, DEVICE, task, *arguments)
        self._process = context.Process(target=decode_process, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> Any:
        """The next message; an error when none comes."""
        if not self.pipe.poll(WAIT_S):
            raise TimeoutError(f"the decode process said nothing for {WAIT_S:g} s")
        return self.pipe.recv()

    def end(self) -> None:
        """Let it finish."""
        self.pipe.send(None)
        self._process.join(WAIT_S)


# ------------------------------------------------------------ the prefill worker's process


def raw_seconds(name: str, sizes: Sequence[int], rounds: int) -> list[float]:
    """Best times of moving so many bytes from this process's memory to the other's by the transport alone."""
    other = Other("raw", name, max(sizes))
    transport = make_transport(name, None)
    setup = transport.open_send(peer="receiver")
    other.pipe.send(setup.options)
    link = setup.finish(other.receive(), SETUP_S)
    source = torch.ones(max(sizes), dtype=torch.uint8, device=DEVICE)
    _raw_round(link, source, other)  # makes buffers
    best_s = [min(_raw_round(link, source[:num_bytes], other) for _ in range(rounds)) for num_bytes in sizes]
    other.end()
    link.close()
    transport.close()
    return best_s


def _raw_round(link: SendLink, source: torch.Tensor, other: Other) -> float:
    staged_at: dict[int, Staged] = {}
    pieces = range(0, source.numel(), link.max_payload_bytes)

    def release() -> None:
        for _ in pieces:
            link.release(staged_at.pop(other.receive()))

    begin_s = time.perf_counter()
    thread = threading.Thread(target=release)
    thread.start()
    for begin in pieces:
        end = min(begin + link.max_payload_bytes, source.numel())
        staged = link.stage(end - begin, WAIT_S)
        with link.filling():
            staged.payload.copy_(source[begin:end])
        staged_at[begin] = staged
        other.pipe.send((link.post(staged), begin, end))
    thread.join()
    return time.perf_counter() - begin_s


class Prefill:
    """A sender with a pool, and the decode process that it ships to."""

    def __init__(self, other: Other, transport: Transport, max_tokens: int) -> None:
        self._other = other
        address, incarnation = other.receive()
        self._target = DecodeTarget((RankAddress(address, incarnation),))
        self._pool = Pool(max_tokens)
        self.sender = HandoverSender(make_peer("prefill"), transports=[transport], checksum=None)

    async def ship(self, num_tokens: int, compute: Callable[[Shipment], float] | None = None) -> tuple[float, float]:
        """One handover; returns the seconds from the ticket to the end, and what it adds to the prefill's."""
        self._other.pipe.send(num_tokens)
        number = self._other.receive()
        shipment = self.sender.begin(HandoverKey(f"request-{number}", 0), self._target, WAIT_S)
        # No event tells of tickets: an engine computes meanwhile.
        while not shipment.has_tickets:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        begin_s = time.perf_counter()
        taken_s = 0.0
        if compute is None:
            self.offer(shipment, (0, LAYOUT.num_layers), num_tokens)
            shipment.complete(FirstToken(token_id=1))
        else:
            taken_s = await asyncio.to_thread(compute, shipment)
        result = await shipment.settled()
        return time.perf_counter() - begin_s, taken_s + result.exposed_s

    def offer(self, shipment: Shipment, layers: tuple[int, int], num_tokens: int) -> None:
        """All tokens of some layers."""
        shipment.offer(*layers, 0, num_tokens, self._pool.gather)


@asynccontextmanager
async def prefill_worker(name: str, link_gbit_s: float | None, max_tokens: int) -> AsyncIterator[Prefill]:
    """Both workers and the link between them."""
    other = Other("handover", name, link_gbit_s, max_tokens)
    transport = make_transport(name, None)
    prefill = Prefill(other, transport, max_tokens)
    prefill.sender.start()
    try:
        await prefill.ship(max_tokens)
        yield prefill
    finally:
        await prefill.sender.close()
        other.end()
        transport.close()


async def handover_seconds(name: str, tokens: Sequence[int], rounds: int) -> list[float]:
    """Best time of a whole handover for each number of tokens."""
    async with prefill_worker(name, None, max(tokens)) as prefill:
        return [min([(await prefill.ship(count))[0] for _ in range(rounds)]) for count in tokens]


def compute(prefill: Prefill, num_tokens: int, tokens_per_s: float, num_groups: int, shipment: Shipment) -> float:
    """What an engine thread does, with any arithmetic in place of the model's.

    Returns the processor time that other threads of this process, on the same core, took meanwhile.
    """
    torch.set_num_threads(1)  # holds for the calling thread only
    weight = torch.ones(128, 128)
    groups = layer_groups(LAYOUT.num_layers, num_tokens, single_message_tokens=0, num_groups=num_groups)
    begin_s = time.process_time() - time.thread_time()
    end_s = time.thread_time()
    for begin, end in groups:
        end_s += num_tokens / tokens_per_s * (end - begin) / LAYOUT.num_layers
        while time.thread_time() < end_s:
            torch.mm(weight, weight)
        prefill.offer(shipment, (begin, end), num_tokens)
    taken_s = time.process_time() - time.thread_time() - begin_s
    shipment.complete(FirstToken(token_id=1))
    return taken_s


async def exposed_seconds(
    name: str, link_gbit_s: float | None, tokens: Sequence[int], tokens_per_s: float, rounds: int
) -> list[tuple[float, float]]:
    """Best added time for each number of tokens: in one message, layer by layer."""
    async with prefill_worker(name, link_gbit_s, max(tokens)) as prefill:

        async def one(count: int, num_groups: int) -> float:
            work = partial(compute, prefill, count, tokens_per_s, num_groups)
            return (await prefill.ship(count, work))[1]

        async def best(count: int) -> tuple[float, float]:
            times = [(await one(count, 1), await one(count, 4)) for _ in range(rounds)]
            return min(single_s for single_s, _ in times), min(layers_s for _, layers_s in times)

        return [await best(count) for count in tokens]


# ------------------------------------------------------------ tables


def size_text(num_bytes: int) -> str:
    """With a binary unit."""
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Best times of one size over one transport: the transport alone, and a whole handover."""

    transport: str
    num_bytes: int
    raw_s: float
    handover_s: float


def bandwidths(names: Sequence[str], sizes: Sequence[int], rounds: int) -> list[Bandwidth]:
    """What the first table shows."""
    tokens = [max(1, size // LAYOUT.token_bytes) for size in sizes]
    found = []
    for name in names:
        whole = asyncio.run(handover_seconds(name, tokens, rounds))
        raw = raw_seconds(name, [count * LAYOUT.token_bytes for count in tokens], rounds)
        for count, handover_s, raw_s in zip(tokens, whole, raw, strict=True):
            found.append(Bandwidth(name, count * LAYOUT.token_bytes, raw_s, handover_s))
    return found


def bandwidth_table(found: Sequence[Bandwidth]) -> Table:
    """The first table."""
    table = Table("transport", "size", title="end to end against the transport alone, GB/s")
    for heading in ("raw", "handover", "of raw"):
        table.add_column(heading, justify="right")
    for one in found:
        raw, handover = (f"{one.num_bytes / seconds / 1e9:.2f}" for seconds in (one.raw_s, one.handover_s))
        table.add_row(one.transport, size_text(one.num_bytes), raw, handover, f"{one.raw_s / one.handover_s:.0%}")
    return table


def exposure_table(link_gbit_s: float | None, tokens: Sequence[int], tokens_per_s: float, rounds: int) -> Table:
    """The second table, or the third without a rate."""
    name, link = ("gloo", f"{link_gbit_s:g} Gbit/s") if link_gbit_s else ("shm", "shared memory")
    title = (
        f"added to the time to first token over {link} at {tokens_per_s:g} tokens/s, ms\n"
        f"(a worker takes one message below {THRESHOLD_TOKENS} tokens)"
    )
    table = Table("tokens", "size", title=title)
    for heading in ("prefill", "one message", "layer-wise", "difference", "added"):
        table.add_column(heading, justify="right")
    times = asyncio.run(exposed_seconds(name, link_gbit_s, tokens, tokens_per_s, rounds))
    for count, (single_s, layers_s) in zip(tokens, times, strict=True):
        prefill_s = count / tokens_per_s
        figures = [f"{seconds * 1e3:.2f}" for seconds in (prefill_s, single_s, layers_s)]
        added_s = single_s if count < THRESHOLD_TOKENS else layers_s
        row = (*figures, f"{(single_s - layers_s) * 1e3:+.2f}", f"{added_s / prefill_s:.1%}")
        table.add_row(str(count), size_text(count * LAYOUT.token_bytes), *row)
    return table


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "cpu": [64 << 10, 1 << 20, 8 << 20, 32 << 20, 128 << 20],
        "cuda": [2 << 20, 32 << 20, 128 << 20, 512 << 20, 4 << 30],
    }
    parser.add_argument("--bytes", type=int, nargs="+", metavar="N")
    parser.add_argument("--device", default="cpu", choices=list(sizes))
    transports = ["shm", "gloo", "cuda_ipc", "nccl"]
    parser.add_argument("--transports", nargs="+", default=["shm", "gloo"], choices=transports)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--link-gbit-s", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 255, 512, 1024], metavar="N")
    parser.add_argument("--prefill-tokens-per-s", type=float, default=2000.0)
    parser.add_argument("--no-pin", action="store_true")
    parser.add_argument("--json", type=Path, help="write the first table here too, and make no other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    use_device(options.device)
    if not options.no_pin and options.device == "cpu":
        pin()
    console = Console()
    found = bandwidths(options.transports, options.bytes or sizes[options.device], options.rounds)
    console.print(bandwidth_table(found))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in found]))
    if options.json is not None or options.device != "cpu":
        return
    for link_gbit_s in (options.link_gbit_s, None):
        rounds = max(1, options.rounds // 2)
        console.print(exposure_table(link_gbit_s, options.tokens, options.prefill_tokens_per_s, rounds))


if __name__ == "__main__":
    main()
