"""Triton's paged attention against the reference: on the GPU where there is one, else in Triton's interpreter.

Pages that no row may read hold NaN, and so do table entries, workspaces and outputs before the call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from baton.kernels.reference import attention as reference
from baton.kernels.triton import attention, prefill_attention
from baton.kernels.triton.attention import make_plan, paged_attention
from baton.kernels.triton.decode_attention import decode_attention
from baton.kernels.triton.device import INTERPRETED

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
Chunk = tuple[int, int]
"""Query rows of a sequence, and its keys with them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of one call; query rows [T, Hq, D] are a strided view, the layer is one of three in the pool."""

    q: Tensor
    kv_layer: Tensor
    tables: Tensor
    starts: Tensor
    contexts: Tensor
    window: int | None
    chunks: tuple[Chunk, ...]

    def empty_out(self) -> Tensor:
        return torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=self.q.device)

    def attend(
        self,
        *,
        deterministic: bool = False,
        min_query_rows: int = 1,
        max_query_rows: int | None = None,
    ) -> Tensor:
        out = self.empty_out()
        paged_attention(
            self.q,
            self.kv_layer,
            self.tables,
            self.starts,
            self.contexts,
            self.q.shape[-1] ** -0.5,
            self.window,
            out,
            deterministic=deterministic,
            min_query_rows=min_query_rows,
            max_query_rows=max_query_rows,
        )
        return out

    def reference(self) -> Tensor:
        """By the oracle in fp32 from the same rounded inputs."""
        out = torch.empty(self.q.shape, dtype=torch.float32, device=self.q.device)
        scale = self.q.shape[-1] ** -0.5
        reference.paged_attention(
            self.q, self.kv_layer, self.tables, self.starts, self.contexts, scale, self.window, out
        )
        return out

    def check(self, out: Tensor) -> None:
        tolerance = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(out.float(), self.reference(), atol=tolerance, rtol=tolerance)


@dataclass(frozen=True, kw_only=True)
class Shape:
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    window: int | None = None
    padding: int = 0


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Whole sequences, unpaged, from which batches of any chunks are cut: q [n, Hq, D], kv [2, Hk, n, D] of each."""

    shape: Shape
    device: torch.device
    q: list[Tensor]
    kv: list[Tensor]

    @classmethod
    def random(cls, lengths: list[int], shape: Shape, device: torch.device) -> Sequences:
        def draw(*size: int) -> Tensor:
            return torch.randn(size).to(device=device, dtype=shape.dtype)

        return cls(
            shape=shape,
            device=device,
            q=[draw(n, shape.q_heads, shape.head_dim) for n in lengths],
            kv=[draw(2, shape.kv_heads, n, shape.head_dim) for n in lengths],
        )

    def batch(self, chunks: list[Chunk], picked: list[int] | None = None) -> Batch:
        """The last `rows` of the first `keys` tokens of each picked sequence, for (rows, keys) in `chunks`."""
        shape, device = self.shape, self.device
        block = shape.block_size
        picked = list(range(len(chunks))) if picked is None else picked
        num_blocks = sum(-(-keys // block) for _, keys in chunks) + 1
        pool = torch.full((num_blocks, 3, 2, shape.kv_heads, block, shape.head_dim), float("nan"), dtype=shape.dtype)
        pool = pool.to(device)
        free = torch.randperm(num_blocks).tolist()
        width = max((-(-keys // block) for _, keys in chunks), default=0) + 1
        tables = torch.full((len(chunks), width), -(2**31), dtype=torch.int32)
        for s, (rows, keys) in enumerate(chunks):
            live = 0 if shape.window is None else max(0, keys - rows - shape.window + 1)
            for index in range(live // block, -(-keys // block) if rows else 0):
                tables[s, index] = page = free.pop()
                begin, end = max(live, index * block), min(keys, (index + 1) * block)
                source = self.kv[picked[s]][:, :, begin:end]
                pool[page, 1, :, :, begin - index * block : end - index * block] = source
        total = sum(rows for rows, _ in chunks)
        fused = torch.full((total + shape.padding, shape.q_heads + 3, shape.head_dim), float("nan"), dtype=shape.dtype)
        q = fused.to(device)[:, : shape.q_heads]
        if total:
            q[:total] = torch.cat([self.q[i][k - r : k] for i, (r, k) in zip(picked, chunks, strict=True)])
        starts = torch.tensor([0, *(rows for rows, _ in chunks)]).cumsum(0).int()
        return Batch(
            q=q,
            kv_layer=pool[:, 1],
            tables=tables.to(device),
            starts=starts.to(device),
            contexts=torch.tensor([keys for _, keys in chunks], dtype=torch.int32, device=device),
            window=shape.window,
            chunks=tuple(chunks),
        )


def draw(chunks: list[Chunk], shape: Shape, device: torch.device) -> Batch:
    return Sequences.random([keys for _, keys in chunks], shape, device).batch(chunks)


DECODE = [(1, 1), (1, 123), (1, 63), (1, 700), (1, 16)]
VERIFY = [(3, 130), (8, 8), (1, 7), (5, 71)]
PREFILL = [(63, 63), (21, 100), (9, 75)]
MIXED = [(1, 100), (0, 0), (40, 63), (2, 300), (0, 5)]


@pytest.mark.parametrize("deterministic", [False, True], ids=["shared", "fixed"])
@pytest.mark.parametrize("chunks", [DECODE, VERIFY, PREFILL, MIXED], ids=["decode", "verify", "prefill", "mixed"])
@pytest.mark.parametrize("window", [None, 21], ids=["causal", "window21"])
def test_equals_the_reference(
    triton_device: torch.device, chunks: list[Chunk], window: int | None, deterministic: bool
) -> None:
    batch = draw(chunks, Shape(window=window, padding=2), triton_device)
    batch.check(batch.attend(deterministic=deterministic))


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True], ids=["shared", "fixed"])
def test_head_dims(triton_device: torch.device, head_dim: int, deterministic: bool) -> None:
    batch = draw([(1, 100), (20, 33)], Shape(head_dim=head_dim, padding=1), triton_device)
    batch.check(batch.attend(deterministic=deterministic))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (5, 1), (14, 2), (66, 1)], ids=str)
def test_dtypes_and_head_groups(triton_device: torch.device, heads: tuple[int, int], dtype: torch.dtype) -> None:
    batch = draw([(1, 70), (12, 33)], Shape(q_heads=heads[0], kv_heads=heads[1], dtype=dtype), triton_device)
    batch.check(batch.attend())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(6, 2), (66, 1)], ids=str)
def test_dtypes_with_fixed_splits(triton_device: torch.device, heads: tuple[int, int], dtype: torch.dtype) -> None:
    batch = draw([(1, 70), (12, 33)], Shape(q_heads=heads[0], kv_heads=heads[1], dtype=dtype), triton_device)
    batch.check(batch.attend(deterministic=True))


@pytest.mark.parametrize("block_size", [5, 8, 16, 32, 64])
@pytest.mark.parametrize("window", [None, 33], ids=["causal", "window33"])
def test_block_sizes(triton_device: torch.device, block_size: int, window: int | None) -> None:
    batch = draw([(1, 150), (40, 97)], Shape(block_size=block_size, window=window), triton_device)
    batch.check(batch.attend())


def test_bounds_choose_the_kernel(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for module, name in ((attention, "decode_attention"), (attention, "prefill_attention")):
        genuine = getattr(module, name)

        def spy(*args: object, _name: str = name, _genuine: object = genuine, **kwargs: object) -> None:
            called.append(_name)
            _genuine(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(module, name, spy)
    verify, prefill = draw(VERIFY, Shape(), triton_device), draw(PREFILL, Shape(), triton_device)
    verify.check(verify.attend(max_query_rows=8))
    assert called == ["decode_attention"]
    called.clear()
    prefill.check(prefill.attend(min_query_rows=9))
    assert called == ["prefill_attention"]
    called.clear()
    prefill.check(prefill.attend(deterministic=True))
    assert called == ["decode_attention"]


def test_more_rows_than_the_bound_are_right_all_the_same(triton_device: torch.device) -> None:
    """T <= S promises nothing: one sequence may have the rows that others lack."""
    batch = draw([(0, 0), (4, 90), (0, 0), (0, 0), (1, 3)], Shape(), triton_device)
    batch.check(batch.attend())


def test_a_plan_serves_layers_and_steps(triton_device: torch.device) -> None:
    """Buffers of one plan, filled again for other lengths: what a CUDA graph does."""
    shape = Shape(q_heads=4, kv_heads=1)
    first, second = (
        draw([(1, a), (1, b), (0, 0)], replace(shape, padding=1), triton_device) for a, b in ((500, 3), (17, 260))
    )
    plan = make_plan(
        first.q, first.kv_layer, len(first.chunks), None, deterministic=False, max_query_rows=1, max_context=1024
    )
    addresses = [plan.work.tiles.data_ptr(), plan.work.programs.data_ptr(), plan.acc.data_ptr()]
    for batch in (first, second, first):
        plan.update(batch.starts, batch.contexts)
        for _layer in range(2):
            out = batch.empty_out()
            decode_attention(batch.q, batch.kv_layer, batch.tables, batch.starts, shape.head_dim**-0.5, out, plan)
            batch.check(out)
    assert addresses == [plan.work.tiles.data_ptr(), plan.work.programs.data_ptr(), plan.acc.data_ptr()]


def _work(chunks: list[Chunk], device: torch.device, *, deterministic: bool, heads: int = 2) -> tuple[Tensor, int]:
    """(units per program, units of all segments) of the plan of a batch."""
    batch = draw(chunks, Shape(q_heads=heads, kv_heads=heads), device)
    plan = make_plan(
        batch.q,
        batch.kv_layer,
        len(chunks),
        None,
        deterministic=deterministic,
        max_query_rows=max(rows for rows, _ in chunks),
        max_context=max(keys for _, keys in chunks),
    )
    plan.update(batch.starts, batch.contexts)
    shape, tiles = plan.work.shape, plan.work.tiles.cpu()
    units, before = tiles[:, 5], tiles[:, 6]
    assert torch.equal(before, units.cumsum(0) - units)
    share, total = int(plan.work.header), int(units.sum()) * heads
    taken = torch.zeros(shape.num_programs, dtype=torch.int64)
    for program, (first, last) in enumerate(plan.work.programs.tolist()):
        for segment in range(first, last):
            tile, head = divmod(segment, heads)
            begin = int(before[tile]) * heads + head * int(units[tile])
            end = begin + int(units[tile])
            taken[program] += max(0, min(end, (program + 1) * share) - max(begin, program * share))
    assert int(taken.sum()) == total, "each unit has exactly one program"
    return taken, share


@pytest.mark.parametrize("deterministic", [False, True], ids=["shared", "fixed"])
@pytest.mark.parametrize(
    "chunks",
    [[(1, 4096)], [(1, 8000), *[(1, 250)] * 31], [(1, 1)] * 300, [(4, 900)] * 7, [(0, 0), (1, 5000), (0, 0)]],
    ids=["one long", "skewed", "many short", "verify", "with gaps"],
)
def test_every_program_has_the_same_share(
    triton_device: torch.device, chunks: list[Chunk], deterministic: bool
) -> None:
    taken, share = _work(chunks, triton_device, deterministic=deterministic)
    busy = taken[taken > 0]
    assert int(busy.max()) <= share
    assert bool((busy[:-1] == share).all()), "only the last one may have less"


@pytest.fixture
def _products_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, a matrix product whose rows do not depend on their place, as those of tensor cores do not.

    numpy's own goes to a BLAS that treats a matrix's last rows otherwise than its first.
    """
    if not INTERPRETED:
        return

    def create_dot(self: object, a: Any, b: Any, c: Any, *options: object) -> Any:
        product = np.einsum("mk,kn->mn", a.data, b.data, dtype=c.data.dtype, optimize=False)
        return interpreter.TensorHandle(product + c.data, c.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("_products_by_row")
@pytest.mark.parametrize("window", [None, 50], ids=["causal", "window50"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_rows_do_not_depend_on_company(
    triton_device: torch.device, dtype: torch.dtype, window: int | None
) -> None:
    """A row alone = in a batch = in any chunk = with any block size = split over the GPU or not, bit for bit."""
    lengths = [70, 1, 140]
    sequences = Sequences.random(lengths, Shape(dtype=dtype, window=window), triton_device)
    whole = sequences.batch([(n, n) for n in lengths]).attend(deterministic=True).split(lengths)
    # Alone, a long sequence is cut over the programs.
    alone = sequences.batch([(1, 140)], [2]).attend(deterministic=True)
    assert torch.equal(alone[0], whole[2][-1])
    for begin, end in ((0, 23), (23, 64), (64, 70)):
        mixed = sequences.batch([(end - begin, end), (1, 140)], [0, 2]).attend(deterministic=True)
        assert torch.equal(mixed[:-1], whole[0][begin:end])
        assert torch.equal(mixed[-1], whole[2][-1])
    other = replace(sequences, shape=replace(sequences.shape, block_size=8, padding=3))
    decoded = other.batch([(1, n) for n in lengths]).attend(deterministic=True)
    assert all(torch.equal(decoded[s], rows[-1]) for s, rows in enumerate(whole))


def test_large_scores_do_not_overflow(triton_device: torch.device) -> None:
    batch = draw([(1, 200), (30, 70)], Shape(), triton_device)
    loud = replace(batch, q=batch.q * 1e4)
    torch.testing.assert_close(loud.attend(), loud.reference(), atol=1e-3, rtol=1e-3)


def test_no_rows_and_no_sequences(triton_device: torch.device) -> None:
    batch = draw([(0, 0)], Shape(), triton_device)
    assert batch.attend().shape[0] == 0
    padding = draw([], Shape(padding=3), triton_device)
    assert not padding.attend().any()
    idle = draw([(0, 9), (0, 0)], Shape(padding=3), triton_device)
    assert not idle.attend().any()
    assert not idle.attend(max_query_rows=20).any()


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    chunks=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 160)).map(lambda c: (c[0], c[0] + c[1])), min_size=1, max_size=5
    ),
    heads=st.sampled_from([(2, 2), (3, 1), (4, 2), (8, 2)]),
    window=st.one_of(st.none(), st.integers(1, 80)),
    block_size=st.sampled_from([8, 16, 32, 64]),
    padding=st.integers(0, 3),
    deterministic=st.booleans(),
)
def test_any_batch(
    triton_device: torch.device,
    chunks: list[Chunk],
    heads: tuple[int, int],
    window: int | None,
    block_size: int,
    padding: int,
    deterministic: bool,
) -> None:
    shape = Shape(q_heads=heads[0], kv_heads=heads[1], window=window, block_size=block_size, padding=padding)
    batch = draw(chunks, shape, triton_device)
    batch.check(batch.attend(deterministic=deterministic))


def test_prefill_leaves_shorter_sequences_alone(triton_device: torch.device) -> None:
    batch = draw([(9, 40), (8, 30)], Shape(), triton_device)
    out = batch.empty_out()
    prefill_attention.prefill_attention(
        batch.q,
        batch.kv_layer,
        batch.tables,
        batch.starts,
        batch.contexts,
        batch.q.shape[-1] ** -0.5,
        None,
        out,
        fewest_rows=9,
    )
    assert out[9:].isnan().all()
    torch.testing.assert_close(out[:9], batch.reference()[:9], atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale"),
        ({"q": torch.float64}, "fp32, bf16 or fp16"),
        ({"kv_layer": torch.float16}, "fp32, bf16 or fp16"),
        ({"context_lens": torch.int64}, "int32"),
        ({"block_tables": torch.int64}, "int32"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_is_refused(
    triton_device: torch.device, change: dict[str, float | torch.dtype], message: str
) -> None:
    batch = draw([(1, 5)], Shape(), triton_device)
    given = {
        "q": batch.q,
        "kv_layer": batch.kv_layer,
        "block_tables": batch.tables,
        "query_start": batch.starts,
        "context_lens": batch.contexts,
        "scale": 1.0,
        "sliding_window": None,
        "out": batch.empty_out(),
    }
    for name, value in change.items():
        given[name] = given[name].to(value) if isinstance(value, torch.dtype) else value  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=message):
        paged_attention(**given)  # type: ignore[arg-type]


def test_too_many_query_heads_are_refused(triton_device: torch.device) -> None:
    batch = draw([(1, 5)], Shape(q_heads=129, kv_heads=1), triton_device)
    with pytest.raises(ValueError, match="at most 128 query heads"):
        batch.attend()
    with pytest.raises(ValueError, match="at most 128 query heads"):
        batch.attend(min_query_rows=9, max_query_rows=9)
