"""Linear layers on CPU: ours against oneDNN's, and the share of the machine's read bandwidth.

Usage: taskset -c 0 python bench/kernels_cpu.py [--threads 1] [--rows 1,8,16,32,64,256] [--rounds 5]
       taskset -c 0 python bench/kernels_cpu.py --invariance-cost [...]

For each shape of the 246 M model and each number of rows: the time of one call with weights that are not in the cache
(layers take turns), the rate of reading packed weights, the share of the read bandwidth measured in the same run, the
arithmetic rate, and oneDNN's time over ours. Both kinds take turns in one process; each layer counts with its best
round, so that other load on the machine disturbs little. Takes less than a minute.

`--invariance-cost` holds our bf16 layers against ways to multiply whose rows may change with the batch: oneDNN's packed
layout with the rows as they are, torch's `linear`, and our kernel with K split in two. What P1 costs is our time over
the fastest of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from baton.kernels import ops
from baton.kernels.packed_linear import allocate

SHAPES = {  # N, K
    "qkv": (1536, 1024),
    "o": (1024, 1024),
    "gate_up": (5632, 1024),
    "down": (1024, 2816),
    "head": (32000, 1024),
}
KINDS: tuple[ops.Quantization, ...] = ("none", "int8", "int4")
GROUP = {"none": 128, "int8": 128, "int4": 64}
COLD_BYTES = 96 << 20
"""Bytes of packed weights that take turns: three times the last-level cache."""


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading memory: the best of several passes over 256 MiB in huge pages, by torch or by us."""
    data = allocate(256 << 20)
    data.fill_(1)
    numbers = data.view(torch.float32)
    readers = (numbers.sum, lambda: ops.checksum(data))
    return data.numel() / min(seconds(reader, threads) for reader in readers for _ in range(8))


def seconds(call: Callable[[], object], threads: int) -> float:
    """Of one call; with one thread the processor's time, which leaves out when another process had the core."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    begin = clock()
    call()
    return clock() - begin


def onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """`x @ weight.T` through oneDNN's own layout; a single row is padded to two, as rows would differ otherwise."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def multiply(x: Tensor) -> Tensor:
        rows = x if x.shape[0] > 1 else x.expand(2, -1).contiguous()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
        return y

    return multiply


def split_k(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Two sums over half of K each, rounded to bf16 before they are added: shorter chains, another result."""
    half = weight.shape[1] // 2
    parts = [ops.pack_linear(part.contiguous()) for part in (weight[:, :half], weight[:, half:])]

    def multiply(x: Tensor) -> Tensor:
        return ops.linear(x[:, :half].contiguous(), parts[0]).add_(ops.linear(x[:, half:].contiguous(), parts[1]))

    return multiply


def unpadded_onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """oneDNN's own layout and whatever it chooses for the number of rows."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def multiply(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return y

    return multiply


def torch_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's own layer over the plain weight."""
    return lambda x: torch.nn.functional.linear(x, weight)


def ours(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The kernel that Baton runs."""
    packed = ops.pack_linear(weight)
    return lambda x: ops.linear(x, packed)


WAYS = {"ours": ours, "oneDNN": unpadded_onednn, "torch": torch_linear, "split K": split_k}


def measure_invariance(shape: tuple[int, int], rows: list[int], rounds: int, threads: int, name: str) -> None:
    """Prints a line per number of rows: each way's microseconds, and ours over the best of the others."""
    n, k = shape
    layers = max(1, -(-COLD_BYTES // (n * k * 2)))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ways = {way: [make(weight.clone()) for _ in range(layers)] for way, make in WAYS.items()}
    for num_rows in rows:
        x = torch.randn(num_rows, k).bfloat16()
        best = {way: [float("inf")] * layers for way in ways}
        for _ in range(rounds):
            for way, multiplies in ways.items():
                for layer, multiply in enumerate(multiplies):
                    best[way][layer] = min(best[way][layer], seconds(lambda: multiply(x), threads))  # noqa: B023
        mean_us = {way: sum(times) / layers * 1e6 for way, times in best.items()}
        rival = min((way for way in WAYS if way != "ours"), key=mean_us.__getitem__)
        columns = "".join(f" {way} {time_us:8.0f}" for way, time_us in mean_us.items())
        print(
            f"{name:8} {num_rows:5} {columns}  us; ours / {rival} = {mean_us['ours'] / mean_us[rival]:.2f}", flush=True
        )


def check(weight: Tensor, x: Tensor) -> None:
    """No figures of wrong results."""
    expected = x.float() @ weight.float().T
    for kind, bound in zip(KINDS, (0.01, 0.02, 0.2), strict=True):
        y = ops.linear(x, ops.pack_linear(weight, quantization=kind, group=GROUP[kind])).float()
        error = float((y - expected).norm() / expected.norm())
        if not error < bound:
            raise SystemExit(f"{kind} is wrong by {error:.3g} of the result")


def measure(shape: tuple[int, int], rows: list[int], rounds: int, threads: int, bandwidth: float, name: str) -> None:
    """Prints the lines of one shape."""
    n, k = shape
    layers = max(1, -(-COLD_BYTES // (n * k * 2)))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    check(weight[:512], torch.randn(3, k).bfloat16())
    theirs = [onednn(weight) for _ in range(layers)]
    packs_by_kind = {
        kind: [ops.pack_linear(weight, quantization=kind, group=GROUP[kind]) for _ in range(layers)] for kind in KINDS
    }
    for num_rows in rows:
        x = torch.randn(num_rows, k).bfloat16()
        out = torch.empty(num_rows, n, dtype=torch.bfloat16)
        best = {kind: [float("inf")] * layers for kind in (*KINDS, "oneDNN")}
        for _ in range(rounds):
            for layer, multiply in enumerate(theirs):
                best["oneDNN"][layer] = min(best["oneDNN"][layer], seconds(lambda: multiply(x), threads))  # noqa: B023
            for kind, packs in packs_by_kind.items():
                for layer, packed in enumerate(packs):
                    spent = seconds(lambda: ops.linear(x, packed, out), threads)  # noqa: B023
                    best[kind][layer] = min(best[kind][layer], spent)
        their_s = sum(best["oneDNN"]) / layers
        flops = 2 * n * k * num_rows
        print(f"{name:8} {num_rows:5}  oneDNN {their_s * 1e6:9.0f} us {flops / their_s / 1e9:6.0f} GFLOP/s")
        for kind, packs in packs_by_kind.items():
            own_s = sum(best[kind]) / layers
            scales = packs[0].scales
            num_bytes = packs[0].weight.numel() + (0 if scales is None else 2 * scales.numel())
            print(
                f"{'':14}  {kind:6} {own_s * 1e6:9.0f} us {flops / own_s / 1e9:6.0f} GFLOP/s"
                f" {num_bytes / own_s / 1e9:6.1f} GB/s = {num_bytes / own_s / bandwidth:4.0%} of reading,"
                f" {their_s / own_s:5.2f}x oneDNN",
                flush=True,
            )


@torch.inference_mode()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,8,16,32,64,256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--invariance-cost", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ops.set_num_threads(options.threads)
    bandwidth = read_bandwidth(options.threads)
    print(f"{ops.backend()}, {options.threads} threads, torch {torch.__version__}, reads {bandwidth / 1e9:.1f} GB/s")
    for name in options.shapes.split(","):
        rows = [int(row) for row in options.rows.split(",")]
        if options.invariance_cost:
            measure_invariance(SHAPES[name], rows, options.rounds, options.threads, name)
            continue
        measure(SHAPES[name], rows, options.rounds, options.threads, bandwidth, name)


if __name__ == "__main__":
    main()
