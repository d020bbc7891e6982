"""The kernels that the rest of Baton calls: checks here, arithmetic in a backend.

    ops.py -> cpu/library.py (C++, for tensors on CPU)  |  reference/ (plain torch, any device)

On CPU with the library, every result is row-invariant to the last bit: what one row gives depends on that row's inputs
(for attention: on its own sequence's keys and values), never on how many rows come along, where the row stands, how a
prompt was cut into chunks, the block size, the block ids or the number of threads. The reference agrees within
rounding, and does not promise invariance; `gumbel_noise`, `checksum` and the copies are equal everywhere.

x dtypes are fp32, bf16 and fp16; arithmetic is fp32, rounded where Hugging Face's modules round. Wrong shapes, dtypes,
strides or indices raise `ValueError`; nothing has been written then, as long as the library checks them (the reference
leaves index checks to torch). Calls release the GIL and may come from several threads.

Shapes: T rows (tokens), S sequences, H hidden, Hq and Hk query and KV heads, D head_dim, R rows of logits,
V vocabulary size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.cpu import library
from baton.kernels.decoder import Decoder, DecoderLayer, DecoderShape
from baton.kernels.packed_linear import PackedLinear, Quantization
from baton.kernels.reference import activation, attention, noise, norm, pages, rotary
from baton.kernels.reference import checksum as checksum_reference
from baton.kernels.reference import linear as linear_reference
from baton.kernels.reference import logits as logits_reference
from baton.kernels.reference import sampling as sampling_reference
from baton.kernels.reference.sampling import NOT_A_NUMBER, PACKED_BYTES, pack_sampling

__all__ = [
    "NOT_A_NUMBER",
    "PackedLinear",
    "Quantization",
    "attach_cores",
    "available_backends",
    "backend",
    "block_copy",
    "checksum",
    "decoder",
    "detach_cores",
    "draw_tokens",
    "enter_cores",
    "gather_pages",
    "gather_pages_summed",
    "gumbel_noise",
    "helped_items",
    "leave_cores",
    "linear",
    "logits_lse",
    "num_threads",
    "pack_linear",
    "pack_sampling",
    "paged_attention",
    "rms_norm",
    "rope_and_cache",
    "scatter_pages",
    "scatter_pages_summed",
    "set_num_threads",
    "silu_mul",
    "use_backend",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REFERENCE = "reference"


def _initial_backend() -> library.CpuLibrary | None:
    wanted = os.environ.get("BATON_KERNELS", "auto")
    if wanted == "auto":
        return library.load_best()
    return None if wanted == _REFERENCE else library.load(wanted)


_native: library.CpuLibrary | None = _initial_backend()


def backend() -> str:
    """Name of what runs for CPU tensors: "cpu-avx512bf16", "cpu-avx512", "cpu-avx2", "cpu-generic" or "reference"."""
    return _REFERENCE if _native is None else _native.name


def available_backends() -> tuple[str, ...]:
    """Backends that are built and that this processor can run, fastest first; "reference" is the last."""
    return (*library.available(), _REFERENCE)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run CPU tensors through backend `name` inside the block, in every thread of the process. For tests.

    Raises:
        ValueError: the backend is not one of `available_backends()`.
    """
    global _native
    previous = _native
    threads = 1 if previous is None else previous.num_threads()
    _native = None if name == _REFERENCE else library.load(name)
    if _native is not None:
        _native.set_num_threads(threads)
    try:
        yield
    finally:
        _native = previous


def set_num_threads(num_threads: int) -> None:
    """Let the CPU library use up to `num_threads` threads per call, the caller's included; 1, the start, makes none.

    The reference runs on torch's threads and is not affected.
    """
    if not 1 <= num_threads <= 256:
        raise ValueError(f"num_threads must be in [1, 256], got {num_threads}")
    if _native is not None:
        _native.set_num_threads(num_threads)


def num_threads() -> int:
    """Threads per call of the active backend; for the reference, torch's own."""
    return torch.get_num_threads() if _native is None else _native.num_threads()


def attach_cores(path: str, slot: int, max_threads: int) -> None:
    """Keep the CPU library's threads to the cores that the board at `path` gives to `slot` and to those that are lent.

    From then on only the thread that has called `enter_cores` is helped by others. The reference is not affected.

    Raises:
        ValueError: the file is not such a board.
    """
    if _native is not None:
        _native.attach_cores(path, slot, max_threads)


def detach_cores() -> None:
    """End `attach_cores`."""
    if _native is not None:
        _native.attach_cores(None, 0, 1)


def enter_cores() -> None:
    """The calling thread works from now on: it moves to its cores, and guests leave them. Cheap where it does already.

    Without a board, nothing happens.
    """
    if _native is not None:
        _native.enter_cores()


def leave_cores() -> None:
    """The calling thread has nothing to do: others may borrow its cores."""
    if _native is not None:
        _native.leave_cores()


def helped_items() -> int:
    """Pieces of work that helper threads have done since the process began; 0 for the reference."""
    return 0 if _native is None else _native.helped_items()


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _expect_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _expect_like(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(f"{name} must be {other.dtype} on {other.device}, got {tensor.dtype} on {tensor.device}")


def _expect_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be of {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def _expect_dense_rows(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous, got strides {tensor.stride()}")


def _expect_index(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device, *dtypes: torch.dtype) -> None:
    _expect_shape(name, tensor, shape)
    _expect_dtype(name, tensor, *dtypes)
    if tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous on {device}, got strides {tensor.stride()} on {tensor.device}")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """RMS norm over the last dimension, as Hugging Face's `LlamaRMSNorm` rounds it.

    Args:
        x: [T, H], or [T, heads, D] for a norm per head; may be a strided view (the last dimension is contiguous).
        weight: [H] or [D], dtype of x.
        residual: [T, H]; `residual += x` (rounded to the dtype) happens in place, and the sum is normed.
        out: like x; may be x itself.
    Returns:
        `out`, shape and dtype of x.
    """
    _expect(x.dim() in (2, 3), f"x must have 2 or 3 dimensions, got {x.dim()}")
    _expect_dtype("x", x, *_DTYPES)
    _expect_dense_rows("x", x)
    _expect_shape("weight", weight, x.shape[-1:])
    _expect_like("weight", weight, x)
    _expect(weight.is_contiguous(), "weight must be contiguous")
    if residual is not None:
        _expect(x.dim() == 2, "residual goes with x of 2 dimensions only")
        _expect_shape("residual", residual, x.shape)
        _expect_like("residual", residual, x)
        _expect_dense_rows("residual", residual)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        _expect_shape("out", out, x.shape)
        _expect_like("out", out, x)
        _expect_dense_rows("out", out)
    if _native is not None and x.is_cpu:
        _native.rms_norm(x, weight, eps, residual, out)
    else:
        norm.rms_norm(x, weight, eps, residual, out)
    return out


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, each rounded to the dtype.

    Args:
        gate_up: [T, 2*I], gate in the first half; the last dimension is contiguous.
        out: [T, I].
    """
    _expect(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"gate_up must be [T, 2*I], got {tuple(gate_up.shape)}")
    _expect_dtype("gate_up", gate_up, *_DTYPES)
    _expect_dense_rows("gate_up", gate_up)
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    if out is None:
        out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    else:
        _expect_shape("out", out, shape)
        _expect_like("out", out, gate_up)
        _expect_dense_rows("out", out)
    if _native is not None and gate_up.is_cpu:
        _native.silu_mul(gate_up, out)
    else:
        activation.silu_mul(gate_up, out)
    return out


def _expect_kv_layer(kv_layer: Tensor, like: Tensor, head_dim: int) -> None:
    _expect(
        kv_layer.dim() == 5 and kv_layer.shape[1] == 2 and kv_layer.shape[4] == head_dim,
        f"kv_layer must be [num_blocks, 2, Hk, block_size, {head_dim}], got {tuple(kv_layer.shape)}",
    )
    _expect_like("kv_layer", kv_layer, like)
    _expect_dense_rows("kv_layer", kv_layer)


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_layer: Tensor,
    slots: Tensor,
) -> None:
    """Rotate q in place, and write rotated k, and v, into the paged cache. k and v stay as they are.

    The rotation is Hugging Face's half-split `x*cos + rotate_half(x)*sin` with cos, sin and each step rounded to the
    dtype of x. Dimensions from `rot` on (partial rotary) are not rotated.

    Args:
        q: [T, Hq, D]; k, v: [T, Hk, D]; strided views of a fused projection are fine (D contiguous).
        cos, sin: fp32 [P, rot/2], contiguous, one row per position.
        positions: int32 [T], in [0, P).
        kv_layer: [num_blocks, 2, Hk, block_size, D], a view `kv[:, layer]` of the pool.
        slots: int32 or int64 [T], `block_id * block_size + offset`; negative: do not cache this row.
    """
    _expect(q.dim() == 3 and k.dim() == 3, f"q and k must be [T, heads, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    num_rows, _, head_dim = q.shape
    _expect_dtype("q", q, *_DTYPES)
    _expect_shape("k", k, (num_rows, k.shape[1], head_dim))
    _expect_shape("v", v, k.shape)
    _expect_like("k", k, q)
    _expect_like("v", v, q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _expect_dense_rows(name, tensor)
    _expect(cos.dim() == 2 and 0 < 2 * cos.shape[1] <= head_dim, f"cos must be [P, rot/2], got {tuple(cos.shape)}")
    _expect_index("cos", cos, cos.shape, q.device, torch.float32)
    _expect_index("sin", sin, cos.shape, q.device, torch.float32)
    _expect_index("positions", positions, (num_rows,), q.device, torch.int32)
    _expect_index("slots", slots, (num_rows,), q.device, torch.int32, torch.int64)
    _expect_kv_layer(kv_layer, q, head_dim)
    _expect(kv_layer.shape[2] == k.shape[1], f"kv_layer has {kv_layer.shape[2]} KV heads, k has {k.shape[1]}")
    if _native is not None and q.is_cpu:
        _native.rope_and_cache(q, k, v, cos, sin, positions, kv_layer, slots)
    else:
        rotary.rope_and_cache(q, k, v, cos, sin, positions, kv_layer, slots)


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of a mixed batch of decode rows and prefill chunks over paged keys and values.

    Sequence s owns rows `query_start[s] .. query_start[s+1]` (none is fine); its last row stands at position
    `context_lens[s] - 1`. A row at position p sees keys 0..p, or the last `sliding_window` of them, itself included.
    Keys and values that no row sees are never read. Rows from `query_start[S]` on are padding and give zeros.

    Args:
        q: [T, Hq, D], strided views are fine (D contiguous); Hq is a multiple of Hk.
        kv_layer: [num_blocks, 2, Hk, block_size, D], a view `kv[:, layer]` of the pool, dtype of q.
        block_tables: int32 [S, max_blocks]; entries past a sequence's last block, or before its window, are not read.
        query_start: int32 [S+1], starting at 0, not decreasing.
        context_lens: int32 [S].
        scale: factor of the scores, usually D ** -0.5.
        out: [T, Hq, D].
    Returns:
        `out`, dtype of q.
    """
    _expect(q.dim() == 3, f"q must be [T, Hq, D], got {tuple(q.shape)}")
    _expect_dtype("q", q, *_DTYPES)
    _expect_dense_rows("q", q)
    _expect_kv_layer(kv_layer, q, q.shape[2])
    _expect(q.shape[1] % kv_layer.shape[2] == 0, f"{q.shape[1]} query heads do not divide over {kv_layer.shape[2]}")
    num_sequences = context_lens.shape[0]
    _expect(block_tables.dim() == 2, f"block_tables must be [S, max_blocks], got {tuple(block_tables.shape)}")
    _expect_shape("block_tables", block_tables, (num_sequences, block_tables.shape[1]))
    _expect_dtype("block_tables", block_tables, torch.int32)
    _expect_dense_rows("block_tables", block_tables)
    _expect_index("query_start", query_start, (num_sequences + 1,), q.device, torch.int32)
    _expect_index("context_lens", context_lens, (num_sequences,), q.device, torch.int32)
    _expect(sliding_window is None or sliding_window >= 1, f"sliding_window must be at least 1, got {sliding_window}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        _expect_shape("out", out, q.shape)
        _expect_like("out", out, q)
        _expect_dense_rows("out", out)
    if _native is not None and q.is_cpu:
        _native.paged_attention(q, kv_layer, block_tables, query_start, context_lens, scale, sliding_window, out)
    else:
        attention.paged_attention(q, kv_layer, block_tables, query_start, context_lens, scale, sliding_window, out)
    return out


def logits_lse(logits: Tensor) -> Tensor:
    """Natural log-sum-exp of each row of logits, fp32 [R, V] (V contiguous) -> fp32 [R]. -inf counts as nothing."""
    _expect(logits.dim() == 2, f"logits must be [R, V], got {tuple(logits.shape)}")
    _expect_dtype("logits", logits, torch.float32)
    _expect_dense_rows("logits", logits)
    out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if _native is not None and logits.is_cpu:
        _native.logits_lse(logits, out)
    else:
        logits_reference.logits_lse(logits, out)
    return out


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int, out: Tensor | None = None) -> Tensor:
    """Standard Gumbel noise, each element a pure function of (seed, position, token id), the same on every backend.

    Adding it to `logits / temperature` and taking the argmax draws from the softmax.
    The generator is spelled out in `reference/noise.py`.

    Args:
        seeds: int64 [R], the bits of unsigned 64-bit seeds.
        positions: int64 [R].
        vocab: number of token ids, at least 1.
        out: fp32 [R, vocab], contiguous.
    """
    _expect(vocab >= 1, f"vocab must be at least 1, got {vocab}")
    _expect(seeds.dim() == 1, f"seeds must be [R], got {tuple(seeds.shape)}")
    _expect_index("seeds", seeds, seeds.shape, seeds.device, torch.int64)
    _expect_index("positions", positions, seeds.shape, seeds.device, torch.int64)
    if out is None:
        out = torch.empty((seeds.shape[0], vocab), dtype=torch.float32, device=seeds.device)
    else:
        _expect_index("out", out, (seeds.shape[0], vocab), seeds.device, torch.float32)
    if _native is not None and seeds.is_cpu:
        _native.gumbel_noise(seeds, positions, out)
    else:
        noise.gumbel_noise(seeds, positions, out)
    return out


def draw_tokens(
    logits: Tensor, row_ids: npt.NDArray[np.int64], samplings: bytes, positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Draws one token for each of N requests, a function of its row, its `pack_sampling` and its position alone.

    `reference/sampling.py` spells out how; every backend gives the same tokens for the same logits.

    Args:
        logits: fp32 [R, V] (V contiguous), not changed.
        row_ids: [N], the row of each request.
        samplings: N results of `pack_sampling`, one after the other.
        positions: [N], of the tokens to be drawn.
    Returns:
        [N] token ids, `NOT_A_NUMBER` where the row holds NaN or its largest entry is infinite.
    """
    _expect(logits.dim() == 2 and logits.shape[1] >= 1, f"logits must be [R, V], got {tuple(logits.shape)}")
    _expect_dtype("logits", logits, torch.float32)
    _expect_dense_rows("logits", logits)
    for name, array in (("row_ids", row_ids), ("positions", positions)):
        _expect(array.dtype == np.int64 and array.flags.c_contiguous, f"{name} must be contiguous int64")
    count = len(row_ids)
    _expect(len(positions) == count, f"{len(positions)} positions for {count} row_ids")
    _expect(len(samplings) == count * PACKED_BYTES, f"{len(samplings)} bytes of samplings for {count} row_ids")
    if count == 0:
        return np.empty(0, dtype=np.int64)
    low, high = int(row_ids.min()), int(row_ids.max())
    _expect(low >= 0 and high < logits.shape[0], f"row_ids must be in [0, {logits.shape[0]}), got {low} to {high}")
    if _native is not None and logits.is_cpu:
        return _native.draw_tokens(logits, row_ids, samplings, positions)
    return sampling_reference.draw_tokens(logits, row_ids, samplings, positions)


def checksum(data: Tensor) -> int:
    """64-bit checksum of the bytes of a contiguous tensor of any dtype, in [0, 2^64); equal on every backend.

    Damage confined to one aligned 8-byte word is always detected. Defined in `reference/checksum.py`.
    """
    _expect(data.is_contiguous(), f"data must be contiguous, got strides {data.stride()} for {tuple(data.shape)}")
    data_bytes = data.reshape(-1).view(torch.uint8)
    if _native is not None and data.is_cpu:
        return _native.checksum(data_bytes)
    return checksum_reference.checksum(data_bytes)


def _expect_pool(kv: Tensor) -> None:
    _expect(
        kv.dim() == 6 and kv.shape[2] == 2,
        f"kv must be [num_blocks, num_layers, 2, Hk, block_size, D], got {tuple(kv.shape)}",
    )
    _expect_dense_rows("kv", kv)


def _expect_blocks(name: str, block_ids: Tensor, num_blocks: int) -> None:
    if block_ids.numel() and not (int(block_ids.min()) >= 0 and int(block_ids.max()) < num_blocks):
        raise ValueError(f"{name} must be in [0, {num_blocks}), got {int(block_ids.min())} to {int(block_ids.max())}")


def block_copy(kv: Tensor, pairs: Tensor) -> None:
    """Copy whole blocks, all layers: block `pairs[i, 0]` to block `pairs[i, 1]`.

    Args:
        kv: [num_blocks, num_layers, 2, Hk, block_size, D], contiguous.
        pairs: int64 [N, 2] on CPU; no block is both read and written, none is written twice.
    """
    _expect_pool(kv)
    _expect(kv.is_contiguous(), "kv must be contiguous")
    _expect_index("pairs", pairs, (pairs.shape[0], 2), torch.device("cpu"), torch.int64)
    _expect_blocks("pairs", pairs, kv.shape[0])
    if _native is not None and kv.is_cpu:
        _native.block_copy(kv, pairs)
    else:
        pages.block_copy(kv, pairs.to(kv.device))


def _expect_pages(
    kv: Tensor,
    layers: tuple[int, int],
    block_ids: Tensor,
    block_size: int,
    tokens: tuple[int, int],
    data_name: str,
    data: Tensor,
) -> None:
    _expect_pool(kv)
    _expect(block_size == kv.shape[4], f"block_size is {block_size}, but the pool's is {kv.shape[4]}")
    _expect(0 <= layers[0] <= layers[1] <= kv.shape[1], f"layers {layers} are not within the pool's {kv.shape[1]}")
    _expect(block_ids.dim() == 1, f"block_ids must be [B], got {tuple(block_ids.shape)}")
    _expect_index("block_ids", block_ids, block_ids.shape, torch.device("cpu"), torch.int64)
    _expect_blocks("block_ids", block_ids, kv.shape[0])
    held = block_ids.shape[0] * block_size
    _expect(0 <= tokens[0] <= tokens[1] <= held, f"tokens {tokens} are not within the {held} of block_ids")
    shape = (layers[1] - layers[0], 2, kv.shape[3], tokens[1] - tokens[0], kv.shape[5])
    _expect_shape(data_name, data, shape)
    _expect_like(data_name, data, kv)
    _expect(data.is_contiguous(), f"{data_name} must be contiguous")


def gather_pages(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    out: Tensor,
) -> Tensor:
    """Copy tokens `token_begin .. token_end` of one sequence out of the pool, for the layers of a group.

    Token t lives in block `block_ids[t // block_size]` at offset `t % block_size`.

    Args:
        kv: [num_blocks, num_layers, 2, Hk, block_size, D] of any dtype; a view on some heads is fine (D contiguous).
        block_ids: int64 [B] on CPU.
        out: [layers, 2, Hk, tokens, D], contiguous, dtype and device of kv.
    Returns:
        `out`.
    """
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "out", out)
    if _native is not None and kv.is_cpu:
        _native.move_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, out, to_pool=False)
    else:
        pages.gather_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, out)
    return out


def scatter_pages(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    data: Tensor,
) -> None:
    """Copy `data` [layers, 2, Hk, tokens, D] into the pool: the inverse of `gather_pages`; block_ids are distinct."""
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "data", data)
    if _native is not None and kv.is_cpu:
        _native.move_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, data, to_pool=True)
    else:
        pages.scatter_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, data)


def gather_pages_summed(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    out: Tensor,
) -> int:
    """`gather_pages`, and the `checksum` of `out`: one pass over memory on CPU where rows are whole 8-byte words."""
    if _native is None or not kv.is_cpu or not _has_whole_words(kv):
        return checksum(gather_pages(kv, layer_begin, layer_end, block_ids, block_size, token_begin, token_end, out))
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "out", out)
    return _native.move_pages(
        kv, layer_begin, layer_end, block_ids, token_begin, token_end, out, to_pool=False, with_checksum=True
    )


def scatter_pages_summed(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    data: Tensor,
) -> int:
    """`scatter_pages`, and the `checksum` of the bytes that were written, each read once: see `gather_pages_summed`.

    The pool has been written to when the checksum is known. Blocks whose sum is not the expected one hold garbage.
    """
    if _native is None or not kv.is_cpu or not _has_whole_words(kv):
        scatter_pages(kv, layer_begin, layer_end, block_ids, block_size, token_begin, token_end, data)
        return checksum(data)
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "data", data)
    return _native.move_pages(
        kv, layer_begin, layer_end, block_ids, token_begin, token_end, data, to_pool=True, with_checksum=True
    )


def _has_whole_words(kv: Tensor) -> bool:
    return kv.dim() == 6 and kv.shape[5] * kv.element_size() % 8 == 0


def pack_linear(
    weight: Tensor, bias: Tensor | None = None, *, quantization: Quantization = "none", group: int = 128
) -> PackedLinear:
    """Lay out the weight of a linear layer for `linear` with the active backend.

    Args:
        weight: [N, K] on CPU; the last dimension is contiguous. It is copied and can be freed afterwards.
        bias: [N], dtype of `weight`, contiguous; it is kept.
        quantization: "int8" or "int4" rounds weights to integers, as `reference/linear.py` spells out.
        group: how many input features share a scale, a multiple of 8; means nothing without quantization.
    """
    _expect(weight.dim() == 2 and weight.is_cpu, f"weight must be [N, K] on CPU, got {tuple(weight.shape)}")
    _expect(min(weight.shape) >= 1, f"weight must not be empty, got {tuple(weight.shape)}")
    _expect_dtype("weight", weight, *_DTYPES)
    _expect_dense_rows("weight", weight)
    _expect(quantization in ("none", "int8", "int4"), f"quantization must be none, int8 or int4, got {quantization!r}")
    _expect(group >= 8 and group % 8 == 0, f"group must be a positive multiple of 8, got {group}")
    if bias is not None:
        _expect_shape("bias", bias, weight.shape[:1])
        _expect_like("bias", bias, weight)
        _expect(bias.is_contiguous(), "bias must be contiguous")
    if quantization == "none":
        group = 0
    if _native is not None:
        return _native.pack_linear(weight, bias, quantization, group)
    return linear_reference.pack_linear(weight, bias, quantization, group)


def linear(x: Tensor, packed: PackedLinear, out: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, summed in fp32 and rounded once.

    Args:
        x: [T, K], dtype of the weight; may be a strided view (the last dimension is contiguous).
        packed: of `pack_linear`; the backend that packed it multiplies, whichever is active now.
        out: [T, N]; the last dimension is contiguous.
    Returns:
        `out`.
    """
    _expect(x.dim() == 2 and x.is_cpu, f"x must be [T, K] on CPU, got {tuple(x.shape)} on {x.device}")
    _expect_shape("x", x, (x.shape[0], packed.in_features))
    _expect_dtype("x", x, packed.dtype)
    _expect_dense_rows("x", x)
    shape = (x.shape[0], packed.out_features)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype)
    else:
        _expect_shape("out", out, shape)
        _expect_like("out", out, x)
        _expect_dense_rows("out", out)
    if packed.backend != _REFERENCE:
        library.load(packed.backend).linear(x, packed, out)
    else:
        linear_reference.linear(x, packed, out)
    return out


def decoder(
    shape: DecoderShape,
    layers: Sequence[DecoderLayer],
    cos: Tensor,
    sin: Tensor,
    *,
    embed: Tensor | None,
    final_norm: Tensor | None,
    head: PackedLinear | None,
    max_rows: int,
    max_logit_rows: int,
) -> Decoder | None:
    """Decoder layers as one call of the library: see `Decoder`. None where these weights were not packed by it."""
    weights = [weight for layer in layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    if head is not None:
        weights.append(head)
    if _native is None or any(weight.native is None or weight.backend != _native.name for weight in weights):
        return None
    return Decoder(
        _native,
        shape,
        layers,
        cos,
        sin,
        embed=embed,
        final_norm=final_norm,
        head=head,
        max_rows=max_rows,
        max_logit_rows=max_logit_rows,
    )
