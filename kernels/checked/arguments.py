"""What `checked/` asks of arguments. Every function raises `ValueError` that names the argument and what it holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "expect",
    "expect_dense_rows",
    "expect_dtype",
    "expect_index",
    "expect_kv_layer",
    "expect_like",
    "expect_shape",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def expect_like(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(f"{name} must be {other.dtype} on {other.device}, got {tensor.dtype} on {tensor.device}")


def expect_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be of {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def expect_dense_rows(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous, got strides {tensor.stride()}")


def expect_index(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device, *dtypes: torch.dtype) -> None:
    expect_shape(name, tensor, shape)
    expect_dtype(name, tensor, *dtypes)
    if tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous on {device}, got strides {tensor.stride()} on {tensor.device}")


def expect_kv_layer(kv_layer: Tensor, like: Tensor, head_dim: int) -> None:
    expect(
        kv_layer.dim() == 5 and kv_layer.shape[1] == 2 and kv_layer.shape[4] == head_dim,
        f"kv_layer must be [num_blocks, 2, Hk, block_size, {head_dim}], got {tuple(kv_layer.shape)}",
    )
    expect_like("kv_layer", kv_layer, like)
    expect_dense_rows("kv_layer", kv_layer)
