"""What `bench/kernels.py` measures: each kernel by its name in `kernels/ops.py`, shapes of Llama-3-8B, a row per case.

A `Case` knows the bytes that its call must move and the operations it must do, each input read once and each output
written once; `make` allocates its inputs, random, and returns the call. `CHECKS` hold each kernel against its reference
in higher precision on small odd shapes of this very device: no speed is shown of a kernel that fails there.

Where a kernel has a form that only launches (`..._into`), that one is timed: the other waits for the device.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from baton.kernels import ops
from gpu_checks import CHECKS

__all__ = ["CHECKS", "FULL", "SMALL", "Case", "Shapes", "cases"]

Bound = Literal["memory", "compute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Sizes of the model and of the cases.

    Attributes:
        pool_bytes: most memory for the keys and values of one attention case; larger ones are left out.
    """

    hidden: int
    inner: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    block_size: int
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    page_tokens: tuple[int, ...]
    logit_rows: tuple[int, ...]
    pool_bytes: int


FULL = Shapes(
    hidden=4096,
    inner=14336,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    layers=32,
    block_size=16,
    rows=(1, 64, 256, 1024, 8192),
    batches=(1, 8, 32, 64, 256),
    contexts=(128, 1024, 4096, 16384, 131072),
    prompts=(512, 2048, 8192, 32768),
    page_tokens=(256, 4096),
    logit_rows=(1, 64, 256),
    pool_bytes=36 << 30,
)
SMALL = Shapes(
    hidden=64,
    inner=96,
    q_heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=300,
    layers=2,
    block_size=8,
    rows=(1, 5),
    batches=(1, 3),
    contexts=(20, 70),
    prompts=(33,),
    page_tokens=(20,),
    logit_rows=(3,),
    pool_bytes=1 << 20,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table.

    Attributes:
        op: the kernel's name in `ops`, or "linear" for torch's matrix product, which Baton uses as it is.
        num_bytes, flops: what the call must move and compute at least.
        bound: which of them is measured against the roof.
    """

    op: str
    config: str
    num_bytes: int
    flops: int
    bound: Bound
    make: Callable[[], Callable[[], object]]


def cases(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every case, the important ones first."""
    yield from _decode_attention(shapes, dtype, device)
    yield from _prefill_attention(shapes, dtype, device)
    yield from _rows(shapes, dtype, device)
    yield from _pages(shapes, dtype, device)
    yield from _logits(shapes, device)
    yield from _linear(shapes, dtype, device)


def attention_call(
    shapes: Shapes, dtype: torch.dtype, device: torch.device, queries: list[int], contexts: list[int]
) -> Callable[[], Tensor]:
    """`ops.paged_attention` of sequences with `queries` new tokens each, over blocks scattered in a pool."""
    widths = [-(-context // shapes.block_size) for context in contexts]
    num_blocks = sum(widths)
    pool = (num_blocks, 2, shapes.kv_heads, shapes.block_size, shapes.head_dim)
    kv = torch.empty(pool, dtype=dtype, device=device).normal_()
    order = torch.randperm(num_blocks, device=device).int()
    tables = torch.zeros((len(contexts), max(widths)), dtype=torch.int32, device=device)
    at = 0
    for index, width in enumerate(widths):
        tables[index, :width] = order[at : at + width]
        at += width
    starts = torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32, device=device)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    q = torch.randn((sum(queries), shapes.q_heads, shapes.head_dim), dtype=dtype, device=device)
    out = torch.empty_like(q)
    known = min(queries), max(queries)  # as an engine knows its batch
    scale = shapes.head_dim**-0.5
    return lambda: ops.paged_attention(q, kv, tables, starts, lengths, scale=scale, out=out, query_rows=known)


def _decode_attention(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    row_bytes = shapes.head_dim * dtype.itemsize
    uniform = [
        (f"decode batch {batch} context {context}", [1] * batch, [context] * batch)
        for context in shapes.contexts
        for batch in shapes.batches
    ]
    batch, context = shapes.batches[len(shapes.batches) // 2], shapes.contexts[len(shapes.contexts) // 2]
    most, longest = max(shapes.batches), max(shapes.contexts)
    rest = random.Random(0).choices(range(1, context + 1), k=batch - 1)
    mixed = random.Random(1).choices(range(1, context), k=most)
    others = [
        (f"verify 4 tokens, batch {batch} context {context}", [4] * batch, [context] * batch),
        (f"decode batch {batch}, one of {longest}, others to {context}", [1] * batch, [longest, *rest]),
        (f"decode batch {most}, contexts to {context}", [1] * most, mixed),
    ]
    for config, queries, contexts in (*uniform, *others):
        kv_bytes = 2 * sum(contexts) * shapes.kv_heads * row_bytes
        if kv_bytes > shapes.pool_bytes:
            continue
        yield Case(
            op="paged_attention",
            config=config,
            num_bytes=kv_bytes + 2 * sum(queries) * shapes.q_heads * row_bytes,
            flops=_attention_flops(shapes, queries, contexts),
            bound="memory",
            make=lambda queries=queries, contexts=contexts: attention_call(shapes, dtype, device, queries, contexts),
        )


def _prefill_attention(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    row_bytes = shapes.head_dim * dtype.itemsize
    whole = [(f"prefill {count}", [count], [count]) for count in shapes.prompts]
    half = max(shapes.prompts) // 2
    chunk = min(2048, half)
    chunked = [(f"prefill {chunk} after {half}", [chunk], [half + chunk])]
    many = [(f"prefill 8 x {shapes.prompts[0]}", [shapes.prompts[0]] * 8, [shapes.prompts[0]] * 8)]
    for config, queries, contexts in (*whole, *chunked, *many):
        yield Case(
            op="paged_attention",
            config=config,
            num_bytes=2 * (sum(contexts) * shapes.kv_heads + sum(queries) * shapes.q_heads) * row_bytes,
            flops=_attention_flops(shapes, queries, contexts),
            bound="compute",
            make=lambda queries=queries, contexts=contexts: attention_call(shapes, dtype, device, queries, contexts),
        )


def _attention_flops(shapes: Shapes, queries: list[int], contexts: list[int]) -> int:
    """Two products of 2 * D operations for each pair of a query and a key that it sees."""
    pairs = sum(n * context - n * (n - 1) // 2 for n, context in zip(queries, contexts, strict=True))
    return 4 * shapes.head_dim * shapes.q_heads * pairs


def _rows(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    size = dtype.itemsize
    for rows in shapes.rows:

        def norm(rows: int = rows, with_residual: bool = False) -> Callable[[], object]:
            x = torch.randn((rows, shapes.hidden), dtype=dtype, device=device)
            weight = torch.randn(shapes.hidden, dtype=dtype, device=device)
            residual = torch.zeros_like(x) if with_residual else None
            out = torch.empty_like(x)
            return lambda: ops.rms_norm(x, weight, 1e-5, residual=residual, out=out)

        def activation(rows: int = rows) -> Callable[[], object]:
            x = torch.randn((rows, 2 * shapes.inner), dtype=dtype, device=device)
            out = torch.empty((rows, shapes.inner), dtype=dtype, device=device)
            return lambda: ops.silu_mul(x, out)

        elements = rows * shapes.hidden
        yield Case(
            op="rms_norm", config=f"{rows} rows", num_bytes=2 * elements * size, flops=0, bound="memory", make=norm
        )
        yield Case(
            op="rms_norm",
            config=f"{rows} rows, residual",
            num_bytes=4 * elements * size,
            flops=0,
            bound="memory",
            make=lambda rows=rows, norm=norm: norm(rows, True),
        )
        yield Case(
            op="silu_mul",
            config=f"{rows} rows",
            num_bytes=3 * rows * shapes.inner * size,
            flops=0,
            bound="memory",
            make=activation,
        )
        # q is read and written, k and v are read and land in the pages.
        heads = 2 * shapes.q_heads + 4 * shapes.kv_heads
        yield Case(
            op="rope_and_cache",
            config=f"{rows} rows",
            num_bytes=rows * heads * shapes.head_dim * size,
            flops=0,
            bound="memory",
            make=lambda rows=rows: _rope_call(shapes, dtype, device, rows, has_norm=False),
        )
        yield Case(
            op="qk_norm_rope_and_cache",
            config=f"{rows} rows",
            num_bytes=rows * heads * shapes.head_dim * size,
            flops=0,
            bound="memory",
            make=lambda rows=rows: _rope_call(shapes, dtype, device, rows, has_norm=True),
        )


def _rope_call(
    shapes: Shapes, dtype: torch.dtype, device: torch.device, rows: int, *, has_norm: bool
) -> Callable[[], object]:
    num_q, num_kv, head_dim = shapes.q_heads, shapes.kv_heads, shapes.head_dim
    fused = torch.randn((rows, num_q + 2 * num_kv, head_dim), dtype=dtype, device=device)
    q, k, v = fused[:, :num_q], fused[:, num_q:-num_kv], fused[:, -num_kv:]
    cos, sin = (torch.randn((4096, head_dim // 2), device=device) for _ in range(2))
    positions = torch.randint(4096, (rows,), dtype=torch.int32, device=device)
    num_blocks = 2 * -(-rows // shapes.block_size)
    kv = torch.empty((num_blocks, 2, num_kv, shapes.block_size, head_dim), dtype=dtype, device=device)
    slots = torch.randperm(num_blocks * shapes.block_size, device=device)[:rows]
    if has_norm:
        weight = torch.ones(head_dim, dtype=dtype, device=device)
        norms = (weight, weight, 1e-5)
        return lambda: ops.qk_norm_rope_and_cache(q, k, v, *norms, cos, sin, positions, kv, slots)
    return lambda: ops.rope_and_cache(q, k, v, cos, sin, positions, kv, slots)


def _pages(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    token_bytes = 2 * shapes.layers * shapes.kv_heads * shapes.head_dim * dtype.itemsize

    def pool(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Twice as many blocks as needed, the ids of some, and a payload of `tokens` over all layers."""
        num_blocks = -(-tokens // shapes.block_size)
        size = (2 * num_blocks, shapes.layers, 2, shapes.kv_heads, shapes.block_size, shapes.head_dim)
        kv = torch.empty(size, dtype=dtype, device=device).normal_()
        flat = (shapes.layers, 2, shapes.kv_heads, tokens, shapes.head_dim)
        data = torch.empty(flat, dtype=dtype, device=device).normal_()
        return kv, torch.randperm(2 * num_blocks)[:num_blocks].to(device), data

    def gather(tokens: int, summed: bool) -> Callable[[], object]:
        kv, blocks, data = pool(tokens)
        call = _launching("gather_pages_summed", device) if summed else ops.gather_pages
        return lambda: call(kv, 0, shapes.layers, blocks, shapes.block_size, 0, tokens, data)

    def scatter(tokens: int, summed: bool) -> Callable[[], object]:
        kv, blocks, data = pool(tokens)
        call = _launching("scatter_pages_summed", device) if summed else ops.scatter_pages
        return lambda: call(kv, 0, shapes.layers, blocks, shapes.block_size, 0, tokens, data)

    def copy(tokens: int) -> Callable[[], object]:
        kv, _, _ = pool(tokens)
        pairs = torch.randperm(kv.shape[0])[: kv.shape[0] // 2 * 2].view(-1, 2)
        pairs = pairs.contiguous().to(device)
        return lambda: ops.block_copy(kv, pairs)

    def checksum(tokens: int) -> Callable[[], object]:
        data = pool(tokens)[2]
        call = _launching("checksum", device)
        return lambda: call(data)

    for tokens in shapes.page_tokens:
        moves: list[tuple[str, int, Callable[[], Callable[[], object]]]] = [
            ("gather_pages", 2, lambda t=tokens: gather(t, False)),
            ("scatter_pages", 2, lambda t=tokens: scatter(t, False)),
            # The sum is of bytes that the copy has at hand.
            ("gather_pages_summed", 2, lambda t=tokens: gather(t, True)),
            ("scatter_pages_summed", 2, lambda t=tokens: scatter(t, True)),
            ("block_copy", 2, lambda t=tokens: copy(t)),
            ("checksum", 1, lambda t=tokens: checksum(t)),
        ]
        for op, times, make in moves:
            yield Case(
                op=op,
                config=f"{tokens} tokens of {shapes.layers} layers",
                num_bytes=times * tokens * token_bytes,
                flops=0,
                bound="memory",
                make=make,
            )


def _launching(op: str, device: torch.device) -> Callable[..., object]:
    """The form of a summing kernel that waits for nothing."""
    into: Callable[..., object] = getattr(ops, f"{op}_into")
    total = torch.empty(1, dtype=torch.int64, device=device)
    return lambda *arguments: into(*arguments, total)


def _logits(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    samplings = {
        "greedy": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
        "temperature": {"temperature": 0.8, "top_k": 0, "top_p": 1.0},
        "top_k 50 top_p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    }
    for rows in shapes.logit_rows:

        def draw(kind: str, rows: int = rows) -> Callable[[], object]:
            logits = torch.randn((rows, shapes.vocab), device=device)
            packed = b"".join(ops.pack_sampling(seed=row, min_p=0.0, **samplings[kind]) for row in range(rows))
            ids, positions = np.arange(rows), np.full(rows, 100)
            words = torch.from_numpy(np.frombuffer(packed, dtype=np.int64).reshape(rows, -1).copy()).to(device)
            on_device = [torch.from_numpy(array).to(device) for array in (ids, positions)]
            out, workspace = torch.empty_like(on_device[0]), ops.draw_workspace(rows, device)
            return lambda: ops.draw_tokens_into(logits, on_device[0], words, on_device[1], out, workspace)

        def lse(rows: int = rows) -> Callable[[], object]:
            logits = torch.randn((rows, shapes.vocab), device=device)
            return lambda: ops.logits_lse(logits)

        num_bytes = rows * shapes.vocab * 4
        yield Case(op="logits_lse", config=f"{rows} rows", num_bytes=num_bytes, flops=0, bound="memory", make=lse)
        for kind in samplings:
            yield Case(
                op="draw_tokens",
                config=f"{rows} rows, {kind}",
                num_bytes=num_bytes,
                flops=0,
                bound="memory",
                make=lambda kind=kind, draw=draw: draw(kind),
            )


def _linear(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The library's product: what is left to gain around it."""
    layers = {"gate_up": (2 * shapes.inner, shapes.hidden), "down": (shapes.hidden, shapes.inner)}
    for name, (n, k) in layers.items():
        for rows in shapes.rows:

            def multiply(rows: int = rows, n: int = n, k: int = k) -> Callable[[], object]:
                x = torch.randn((rows, k), dtype=dtype, device=device)
                weight = torch.randn((n, k), dtype=dtype, device=device)
                return lambda: torch.nn.functional.linear(x, weight)

            yield Case(
                op="linear",
                config=f"{name}, {rows} rows",
                num_bytes=(n * k + rows * (n + k)) * dtype.itemsize,
                flops=2 * rows * n * k,
                bound="memory" if rows <= 256 else "compute",
                make=multiply,
            )
