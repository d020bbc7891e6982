"""Paged attention: against torch's own, and row-invariance to the last bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from baton.kernels import ops

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Sequences:
    """Unpaged inputs of some sequences, every token a query row: q [T, Hq, D]; k, v [T, Hk, D] per sequence."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    @classmethod
    def random(cls, lengths: list[int], q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Sequences:
        def draw(heads: int) -> list[Tensor]:
            return [torch.randn(n, heads, head_dim).to(dtype) for n in lengths]

        return cls(q=draw(q_heads), k=draw(kv_heads), v=draw(kv_heads))

    def only(self, index: int) -> Sequences:
        return Sequences([self.q[index]], [self.k[index]], [self.v[index]])


def run(
    sequences: Sequences,
    chunks: list[tuple[int, int]],
    *,
    block_size: int = 16,
    window: int | None = None,
    padding_rows: int = 0,
    first_live_key: list[int] | None = None,
) -> list[Tensor]:
    """Attention of rows chunks[s] = (begin, end) of each sequence; all other memory of the pool holds NaN.

    Keys before first_live_key[s] are left NaN, and their blocks out of the table.
    """
    num_heads, head_dim = sequences.k[0].shape[1:]
    dtype = sequences.q[0].dtype
    widths = [-(-end // block_size) for _, end in chunks]
    num_blocks = sum(widths) + 2
    kv = torch.full((num_blocks, 3, 2, num_heads, block_size, head_dim), float("nan"), dtype=dtype)
    order = torch.randperm(num_blocks).tolist()
    tables = torch.full((len(chunks), max(widths) + 1), -(2**31), dtype=torch.int32)
    for s, (_, end) in enumerate(chunks):
        dead = 0 if first_live_key is None else first_live_key[s]
        for index in range(dead // block_size, widths[s]):
            block = tables[s, index] = order.pop()
            begin, stop = max(dead, index * block_size), min(end, (index + 1) * block_size)
            for pair, source in enumerate((sequences.k[s], sequences.v[s])):
                kv[block, 1, pair, :, begin % block_size : begin % block_size + stop - begin] = source[
                    begin:stop
                ].transpose(0, 1)
    rows = [q[begin:end] for q, (begin, end) in zip(sequences.q, chunks, strict=True)]
    fused = torch.full((sum(map(len, rows)) + padding_rows, rows[0].shape[1] + 3, head_dim), float("nan"), dtype=dtype)
    q = fused[:, : rows[0].shape[1]]
    q[: len(q) - padding_rows] = torch.cat(rows)
    starts = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).int()
    contexts = torch.tensor([end for _, end in chunks], dtype=torch.int32)
    out = ops.paged_attention(q, kv[:, 1], tables, starts, contexts, scale=head_dim**-0.5, sliding_window=window)
    if padding_rows:
        assert not out[-padding_rows:].any(), "padding rows must be zero"
    return list(out[: len(out) - padding_rows].split([len(r) for r in rows]))


def sdpa(sequences: Sequences, index: int, window: int | None) -> Tensor:
    """All rows of one sequence by torch's attention in fp64 -> [T, Hq, D]."""
    q, k, v = (x[index].double().transpose(0, 1) for x in (sequences.q, sequences.k, sequences.v))
    position = torch.arange(q.shape[1])
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance < (window or len(position)))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, enable_gqa=q.shape[0] != k.shape[0]
    ).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 20, 70])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128, 256])
def test_equals_torch(any_backend: str, head_dim: int, window: int | None) -> None:
    sequences = Sequences.random([63, 1, 123, 100], 4, 2, head_dim, torch.float32)
    chunks = [(0, 63), (0, 1), (122, 123), (37, 100)]
    for index, out in enumerate(run(sequences, chunks, window=window, padding_rows=2)):
        begin, end = chunks[index]
        torch.testing.assert_close(
            out.double(), sdpa(sequences, index, window)[begin:end], atol=5e-6, rtol=5e-6, check_dtype=False
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (5, 5), (14, 2), (66, 1)], ids=str)
def test_dtypes_and_head_groups(any_backend: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    sequences = Sequences.random([70, 33], *heads, 24, dtype)
    for index, out in enumerate(run(sequences, [(0, 70), (31, 33)], block_size=8)):
        begin = (0, 31)[index]
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            out.double(), sdpa(sequences, index, None)[begin:], atol=tolerance, rtol=tolerance, check_dtype=False
        )


@pytest.mark.parametrize("window", [None, 19], ids=["causal", "window19"])
@pytest.mark.parametrize("shape", [(4, 2, 64), (3, 3, 40), (8, 1, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_do_not_depend_on_company(
    native: str, dtype: torch.dtype, shape: tuple[int, int, int], window: int | None
) -> None:
    """One row alone = in a batch = in any chunk = for any block size = for any number of threads, bit for bit."""
    lengths = [123, 1, 63, 100, 32]
    sequences = Sequences.random(lengths, *shape, dtype)
    whole = run(sequences, [(0, n) for n in lengths], window=window)
    for s, n in enumerate(lengths):
        alone = sequences.only(s)
        for row in {0, n // 3, n - 1}:
            assert torch.equal(run(alone, [(row, row + 1)], window=window)[0], whole[s][row : row + 1])
        for cut in (1, 7, 16, 33, 50):
            pieces = [run(alone, [(b, min(n, b + cut))], window=window)[0] for b in range(0, n, cut)]
            assert torch.equal(torch.cat(pieces), whole[s]), f"chunks of {cut}"
    for block_size in (8, 32, 5):
        for s, out in enumerate(run(sequences, [(0, n) for n in lengths], block_size=block_size, window=window)):
            assert torch.equal(out, whole[s]), f"block size {block_size}"
    for threads in (2, 3):
        ops.set_num_threads(threads)
        for s, out in enumerate(run(sequences, [(0, n) for n in lengths], window=window)):
            assert torch.equal(out, whole[s]), f"{threads} threads"
    last_rows = run(sequences, [(n - 1, n) for n in lengths], window=window, padding_rows=1)
    for s, out in enumerate(last_rows):
        assert torch.equal(out, whole[s][-1:])


def test_keys_before_the_window_are_never_read(any_backend: str) -> None:
    sequences = Sequences.random([100, 64], 4, 2, 32, torch.float32)
    chunks, window = [(90, 100), (63, 64)], 21
    kept = run(sequences, chunks, window=window)
    dropped = run(sequences, chunks, window=window, first_live_key=[90 - window + 1, 63 - window + 1])
    for a, b in zip(kept, dropped, strict=True):
        assert torch.equal(a, b)


def test_infinite_values_stay_with_the_rows_that_see_them(native: str) -> None:
    sequences = Sequences.random([80], 4, 2, 32, torch.float16)
    clean = run(sequences, [(0, 80)])[0]
    sequences.v[0][50] = float("inf")
    sequences.k[0][50] = float("nan")
    dirty = run(sequences, [(0, 80)])[0]
    assert torch.equal(dirty[:50], clean[:50])
    assert dirty[50:].isnan().all()


def test_large_scores_do_not_overflow(any_backend: str) -> None:
    sequences = Sequences.random([70], 2, 2, 16, torch.float32)
    loud = replace(sequences, q=[sequences.q[0] * 1e4])
    torch.testing.assert_close(
        run(loud, [(0, 70)])[0].double(), sdpa(loud, 0, None), atol=1e-3, rtol=1e-3, check_dtype=False
    )


def test_no_rows(any_backend: str) -> None:
    out = ops.paged_attention(
        torch.zeros(0, 2, 8),
        torch.zeros(1, 2, 1, 16, 8),
        torch.zeros(0, 1, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int32),
        scale=1.0,
    )
    assert out.shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": [[0, 9]]}, "block_tables"),
        ({"tables": [[0, -1]]}, "block_tables"),
        ({"tables": [[0]]}, "needs 2 blocks"),
        ({"contexts": [1]}, "context_lens"),
        ({"starts": [0, 4]}, "query_start"),
        ({"starts": [1, 2]}, "query_start"),
    ],
    ids=str,
)
def test_bad_indices_are_refused(native: str, change: dict[str, list[int]], message: str) -> None:
    given = {"tables": [[0, 1]], "starts": [0, 2], "contexts": [20], **change}
    tables, starts, contexts = (torch.tensor(given[k], dtype=torch.int32) for k in ("tables", "starts", "contexts"))
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(torch.ones(3, 2, 8), torch.ones(4, 2, 1, 16, 8), tables, starts, contexts, scale=1.0)


def test_bad_shapes_are_refused() -> None:
    kv, tables = torch.ones(4, 2, 2, 16, 8), torch.zeros(1, 1, dtype=torch.int32)
    starts, contexts = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="query heads"):
        ops.paged_attention(torch.ones(1, 3, 8), kv, tables, starts, contexts, scale=1.0)
    with pytest.raises(ValueError, match="kv_layer"):
        ops.paged_attention(torch.ones(1, 2, 16), kv, tables, starts, contexts, scale=1.0)
    with pytest.raises(ValueError, match="float16"):
        ops.paged_attention(torch.ones(1, 2, 8).half(), kv, tables, starts, contexts, scale=1.0)
    with pytest.raises(ValueError, match="query_start"):
        ops.paged_attention(torch.ones(1, 2, 8), kv, tables, starts.long(), contexts, scale=1.0)
    with pytest.raises(ValueError, match="sliding_window"):
        ops.paged_attention(torch.ones(1, 2, 8), kv, tables, starts, contexts, scale=1.0, sliding_window=0)
