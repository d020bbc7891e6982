"""A linear layer's weight as the active backend wants it, and the memory that holds it."""

from __future__ import annotations

import ctypes
import mmap
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["NativeLinear", "PackedLinear", "Quantization", "allocate"]

Quantization = Literal["none", "int8", "int4"]

_PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20


class NativeLinear(ctypes.Structure):
    """`baton::PackedLinear` of cpu/linear.h."""

    _fields_ = (
        ("n", c_int64),
        ("k", c_int64),
        ("dtype", c_int32),
        ("format", c_int32),
        ("group", c_int64),
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLinear:
    """What `ops.pack_linear` gives and `ops.linear` takes. Read-only.

    Attributes:
        out_features, in_features: N and K.
        dtype: of input, output and bias.
        quantization: how weights are stored; group: input features that share a scale, 0 where there are none.
        backend: the one that packed it, the only one that can read it.
        weight: the layout is the backend's own; the reference keeps [N, K].
        scales: bf16, or None; the reference keeps [N, groups].
        bias: [N], or None.
        native: points into the tensors, for the C interface; None where the reference packed.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    quantization: Quantization
    group: int
    backend: str
    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None
    native: NativeLinear | None = field(repr=False)


def allocate(num_bytes: int) -> Tensor:
    """Zeros, uint8 [num_bytes], for weights that are read from end to end: in huge pages where that pays.

    Larger pages save most of the address translation, and let the hardware prefetch on past 4 KiB.
    """
    huge_bytes = (num_bytes + _HUGE_PAGE_BYTES // 2) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if huge_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    mapped_bytes = max(huge_bytes, -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES) + _HUGE_PAGE_BYTES
    mapped = mmap.mmap(-1, mapped_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    begin = -memory.data_ptr() % _HUGE_PAGE_BYTES
    mapped.madvise(mmap.MADV_HUGEPAGE, begin, huge_bytes)
    return memory[begin : begin + num_bytes]
