"""Checksum of bytes: checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.backends import library_for, uses_triton
from baton.kernels.checked.arguments import expect, expect_index
from baton.kernels.reference import checksum as reference

__all__ = ["checksum", "checksum_into"]


def checksum(data: Tensor) -> int:
    """64-bit checksum of the bytes of a contiguous tensor of any dtype, in [0, 2^64); equal on every backend.

    Damage confined to one aligned 8-byte word is always detected. Defined in `reference/checksum.py`. Waits for the
    device; `checksum_into` does not.
    """
    data_bytes = _bytes(data)
    if uses_triton(data):
        out = torch.empty(1, dtype=torch.int64, device=data.device)
        checksum_into(data, out)
        return int(out.item()) % (1 << 64)
    if (native := library_for(data)) is not None:
        return native.checksum(data_bytes)
    return reference.checksum(data_bytes)


def checksum_into(data: Tensor, out: Tensor) -> None:
    """The same, written to `out` int64 [1] on the device of `data`, its 64 bits. On a GPU nothing waits."""
    data_bytes = _bytes(data)
    expect_index("out", out, (1,), data.device, torch.int64)
    if uses_triton(data):
        from baton.kernels.triton import checksum as triton

        triton.checksum(data_bytes, out)
    else:
        # As bits: Python's numbers do not wrap.
        found = checksum(data)
        out.fill_(found - (1 << 64) if found >= 1 << 63 else found)


def _bytes(data: Tensor) -> Tensor:
    expect(data.is_contiguous(), f"data must be contiguous, got strides {data.stride()} for {tuple(data.shape)}")
    return data.reshape(-1).view(torch.uint8)
