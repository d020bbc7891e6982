"""Each kernel of `kernels/ops.py` on a device against its plain torch reference in higher precision on the CPU.

Small shapes of odd sizes, fresh random inputs, outputs filled with NaN before. The error is that of the whole result,
`|out - reference| / |reference|`; NaN never passes. Copies, checksums and drawn tokens must be equal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from baton.kernels import ops
from baton.kernels.reference import activation, attention, norm, pages, rotary
from baton.kernels.reference import checksum as checksum_reference
from baton.kernels.reference import sampling as sampling_reference

__all__ = ["CHECKS", "Check"]

Check = Callable[[torch.device], str]
"""Gives what is wrong, or the empty string."""

# A float32 product of TF32 operands is off by 3e-4 and does not pass.
_BOUND = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_NAN = float("nan")


def _differs(out: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> str:
    found, wanted = out.detach().cpu().double(), expected.double()
    error = float((found - wanted).norm() / wanted.norm())
    return "" if error <= _BOUND[dtype] else f"{what} of {dtype}: off by {error:.3g}, may be {_BOUND[dtype]:g}"


def _unequal(out: object, expected: object, what: str) -> str:
    return "" if out == expected else f"{what}: got {out}, expected {expected}"


def _first(*problems: str) -> str:
    return next((problem for problem in problems if problem), "")


def _attention(device: torch.device) -> str:
    return _first(
        *(
            _attention_of(device, dtype, window)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for window in (None, 37)
        )
    )


def _attention_of(device: torch.device, dtype: torch.dtype, window: int | None) -> str:
    block_size, num_kv, num_q, head_dim = 16, 2, 8, 64
    queries, contexts = [1, 63, 1, 100, 4], [1, 63, 777, 123, 300]
    widths = [-(-context // block_size) for context in contexts]
    kv = torch.randn((sum(widths) + 3, 2, num_kv, block_size, head_dim)).to(dtype)
    order = torch.randperm(sum(widths)).int().split(widths)
    tables = torch.zeros((len(contexts), max(widths)), dtype=torch.int32)
    for index, blocks in enumerate(order):
        tables[index, : len(blocks)] = blocks
    starts = torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    q = torch.randn((sum(queries), num_q, head_dim)).to(dtype)
    expected = torch.empty_like(q, dtype=torch.float32)
    attention.paged_attention(q.float(), kv.float(), tables, starts, lengths, head_dim**-0.5, window, expected)
    out = torch.full_like(q, _NAN, device=device)
    ops.paged_attention(
        *(x.to(device) for x in (q, kv, tables, starts, lengths)), scale=head_dim**-0.5, sliding_window=window, out=out
    )
    return _differs(out, expected, dtype, f"attention, window {window}")


def _norm(device: torch.device) -> str:
    problems = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, residual = torch.randn(63, 1000).to(dtype), torch.randn(1000).to(dtype), torch.randn(63, 1000)
        residual = residual.to(dtype)
        expected = torch.empty(63, 1000)
        total = (residual + x).float()
        norm.rms_norm(total, weight.float(), 1e-5, None, expected)
        out = torch.full_like(x, _NAN, device=device)
        summed = residual.to(device)
        ops.rms_norm(x.to(device), weight.to(device), 1e-5, residual=summed, out=out)
        problems += [_differs(out, expected, dtype, "norm"), _differs(summed, total, dtype, "residual")]
    return _first(*problems)


def _activation(device: torch.device) -> str:
    problems = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(63, 2 * 1001).to(dtype)
        expected = torch.empty(63, 1001)
        activation.silu_mul(x.float(), expected)
        out = torch.full((63, 1001), _NAN, dtype=dtype, device=device)
        ops.silu_mul(x.to(device), out)
        problems.append(_differs(out, expected, dtype, "silu_mul"))
    return _first(*problems)


def _norm_and_rope(device: torch.device) -> str:
    """Where there is one launch for both: as one after the other on the CPU."""
    return _rope(device, has_norm=True)


def _rope(device: torch.device, *, has_norm: bool = False) -> str:
    problems = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, num_q, num_kv, head_dim, block_size = 61, 6, 2, 64, 16
        fused = torch.randn(rows, num_q + 2 * num_kv, head_dim).to(dtype)
        angle = torch.rand(200, head_dim // 2) * 6
        cos, sin = angle.cos(), angle.sin()
        positions = torch.randint(200, (rows,), dtype=torch.int32)
        slots = torch.randperm(8 * block_size)[:rows]
        slots[3] = -1
        pool = torch.zeros(8, 2, num_kv, block_size, head_dim)
        parts = [part.float().clone() for part in fused.split((num_q, num_kv, num_kv), 1)]
        weights = [(torch.randn(head_dim) * 0.1 + 1).to(dtype) for _ in range(2)]
        if has_norm:
            for part, weight in zip(parts, weights, strict=False):
                norm.rms_norm(part.clone(), weight.float(), 1e-5, None, part)
        rotary.rope_and_cache(*parts, cos, sin, positions, pool, slots)
        on_device = fused.to(device)
        kv = torch.zeros_like(pool, dtype=dtype, device=device)
        q, k, v = on_device.split((num_q, num_kv, num_kv), 1)
        rest = (*(x.to(device) for x in (cos, sin, positions)), kv, slots.to(device))
        if has_norm:
            ops.qk_norm_rope_and_cache(q, k, v, *(weight.to(device) for weight in weights), 1e-5, *rest)
        else:
            ops.rope_and_cache(q, k, v, *rest)
        problems += [_differs(q, parts[0], dtype, "rotated queries"), _differs(kv, pool, dtype, "pages")]
    return _first(*problems)


def _pool(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A pool, block ids on the CPU, and the payload of tokens 5..69 of layers 1..2 that the reference gathers."""
    kv = torch.randn(13, 3, 2, 2, 16, 40).bfloat16()
    blocks = torch.randperm(13)[:5]
    expected = torch.empty(2, 2, 2, 64, 40, dtype=torch.bfloat16)
    pages.gather_pages(kv, 1, 3, blocks, 5, 69, expected)
    return kv, blocks, expected


def _gather(device: torch.device) -> str:
    kv, blocks, expected = _pool(device)
    out = torch.full_like(expected, _NAN, device=device)
    ops.gather_pages(kv.to(device), 1, 3, blocks, 16, 5, 69, out)
    summed = torch.full_like(expected, _NAN, device=device)
    total = ops.gather_pages_summed(kv.to(device), 1, 3, blocks, 16, 5, 69, summed)
    want = checksum_reference.checksum(expected.view(-1).view(torch.uint8))
    return _first(
        "" if torch.equal(out.cpu(), expected) else "gathered pages differ",
        "" if torch.equal(summed.cpu(), expected) else "gathered and summed pages differ",
        _unequal(total, want, "sum of gathered pages"),
    )


def _scatter(device: torch.device) -> str:
    kv, blocks, data = _pool(device)
    data = torch.randn_like(data)
    expected = kv.clone()
    pages.scatter_pages(expected, 1, 3, blocks, 5, 69, data)
    out, summed = kv.to(device), kv.to(device, copy=True)
    ops.scatter_pages(out, 1, 3, blocks, 16, 5, 69, data.to(device))
    total = ops.scatter_pages_summed(summed, 1, 3, blocks, 16, 5, 69, data.to(device))
    want = checksum_reference.checksum(data.view(-1).view(torch.uint8))
    return _first(
        "" if torch.equal(out.cpu(), expected) else "scattered pages differ",
        "" if torch.equal(summed.cpu(), expected) else "scattered and summed pages differ",
        _unequal(total, want, "sum of scattered pages"),
    )


def _copy(device: torch.device) -> str:
    kv = torch.randn(9, 3, 2, 2, 16, 40).bfloat16()
    pairs = torch.tensor([[0, 5], [3, 8], [7, 1]])
    expected, out = kv.clone(), kv.to(device, copy=True)
    pages.block_copy(expected, pairs)
    ops.block_copy(out, pairs)
    return "" if torch.equal(out.cpu(), expected) else "copied blocks differ"


def _checksum(device: torch.device) -> str:
    problems = []
    for num_bytes in (1, 8, 63, 123457):
        data = torch.randint(256, (num_bytes,), dtype=torch.uint8)
        want = checksum_reference.checksum(data)
        problems.append(_unequal(ops.checksum(data.to(device)), want, f"checksum of {num_bytes} bytes"))
    return _first(*problems)


def _lse(device: torch.device) -> str:
    logits = torch.randn(7, 5001) * 5
    return _differs(ops.logits_lse(logits.to(device)), logits.double().logsumexp(-1), torch.float32, "log-sum-exp")


def _draw(device: torch.device) -> str:
    logits = torch.randn(24, 5001) * 4
    kinds = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 50, 1.0), (1.3, 0, 0.9), (0.9, 40, 0.8)]
    packed = b"".join(
        ops.pack_sampling(
            seed=row * 7919, temperature=kinds[row % 5][0], top_k=kinds[row % 5][1], top_p=kinds[row % 5][2], min_p=0.0
        )
        for row in range(24)
    )
    ids, positions = np.arange(24)[::-1].copy(), np.arange(24) * 3
    want = sampling_reference.draw_tokens(logits, ids, packed, positions)
    found = ops.draw_tokens(logits.to(device), ids, packed, positions)
    return _unequal(np.asarray(found).tolist(), want.tolist(), "drawn tokens")


CHECKS: dict[str, Check] = {
    "paged_attention": _attention,
    "rms_norm": _norm,
    "silu_mul": _activation,
    "rope_and_cache": _rope,
    "qk_norm_rope_and_cache": _norm_and_rope,
    "gather_pages": _gather,
    "gather_pages_summed": _gather,
    "scatter_pages": _scatter,
    "scatter_pages_summed": _scatter,
    "block_copy": _copy,
    "checksum": _checksum,
    "logits_lse": _lse,
    "draw_tokens": _draw,
}
