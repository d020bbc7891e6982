"""Decoder layers in one call of the C++ library: the fast form of what `baton.engine.model` computes by single ops.

    d = Decoder(...)                     workspace and pointers, once
    d.run(step, 0, n)                    a whole step ...
    d.run(step, 0, 4, finish=False)      ... or in groups: when this returns, K and V of layers 0..3 are written;
    d.run(step, 4, n, finish=False)      the rest of layer 3 is computed at the head of the next group,
    d.finish(step)                       the rest of layer n - 1 here
    d.hidden_rows(count) / d.logits(count)

Bits equal those of the single ops over the same packed weights. A `Decoder` belongs to one thread at a time and to the
library that packed its weights; it holds references to all tensors whose memory it reads. Results lie in its workspace
and are valid until the next `run` (`logits`: until the second next call of `logits`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from baton.kernels.cpu.library import _DTYPE_CODES, CpuLibrary, _Pages, _pages
from baton.kernels.packed_linear import PackedLinear

__all__ = ["Decoder", "DecoderLayer", "DecoderShape", "DecoderTimes", "StepInputs"]

BLOCK_ROWS = 256
"""Rows that pass through the MLP at once, so that what lies between its layers stays in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes and constants of a stage's layers; names as in `ModelConfig`."""

    dtype: torch.dtype
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    eps: float
    attention_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer: norms [H] and [D] (None where the family has none), packed weights, its view of the KV pool."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    kv_layer: Tensor
    sliding_window: int | None


class StepInputs(Protocol):
    """What `engine.model.ForwardBatch` holds; contiguous tensors on CPU."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def slots(self) -> Tensor: ...
    @property
    def block_tables(self) -> Tensor: ...
    @property
    def query_start(self) -> Tensor: ...
    @property
    def context_lens(self) -> Tensor: ...
    @property
    def logit_rows(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class DecoderTimes:
    """Seconds since timing was switched on."""

    linear_s: float
    attention_s: float
    rest_s: float


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("qkv", "o", "gate_up", "down")),
        ("pages", _Pages),
        ("window", c_int64),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("dtype", "hidden", "q_heads", "kv_heads", "head_dim", "inner")),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("num_positions", c_int64),
        ("half", c_int64),
        ("eps", c_double),
        ("scale", c_double),
        ("layers", c_void_p),
        ("num_layers", c_int64),
        ("embed", c_void_p),
        ("vocab", c_int64),
        ("max_rows", c_int64),
        ("block_rows", c_int64),
        *((name, c_void_p) for name in ("residual", "delta", "heads", "normed", "gate_up", "times")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "sequences", "max_blocks", "table_stride")),
        *((name, c_void_p) for name in ("token_ids", "hidden", "positions", "slots")),
        *((name, c_void_p) for name in ("block_tables", "query_start", "context_lens", "logit_rows")),
        ("num_logit_rows", c_int64),
    )


_INDEX_DTYPES = {
    "token_ids": torch.int64,
    "positions": torch.int32,
    "slots": torch.int64,
    "block_tables": torch.int32,
    "query_start": torch.int32,
    "context_lens": torch.int32,
    "logit_rows": torch.int64,
}


class Decoder:
    """A stage's layers with their workspace; see the module's docstring.

    Args:
        library: the one that packed the weights.
        cos, sin: fp32 [max_model_len, rot / 2], contiguous.
        embed: [V, H], or None where earlier layers are elsewhere.
        final_norm, head: of the last stage, else None.
        max_rows: tokens of the largest step.
        max_logit_rows: rows whose logits a step usually wants at most; more get memory of their own.
    """

    def __init__(
        self,
        library: CpuLibrary,
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
    ) -> None:
        self._library = library
        self._shape = shape
        self._embed, self._final_norm, self._head = embed, final_norm, head
        dtype, hidden = shape.dtype, shape.hidden_size
        block_rows = min(BLOCK_ROWS, max_rows)
        width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self._residual = torch.empty((max_rows, hidden), dtype=dtype)
        workspace = [
            torch.empty((max_rows, hidden), dtype=dtype),
            torch.empty((max_rows, width), dtype=dtype),
            torch.empty((block_rows, hidden), dtype=dtype),
            torch.empty((block_rows, 2 * shape.intermediate_size), dtype=dtype),
        ]
        self._layers = (_Layer * len(layers))(*(_layer(shape, layer) for layer in layers))
        self._times = (c_double * 3)()
        self._decoder = _Decoder(
            _DTYPE_CODES[dtype],
            hidden,
            shape.num_q_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.intermediate_size,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[0],
            cos.shape[1],
            shape.eps,
            shape.attention_scale,
            ctypes.addressof(self._layers),
            len(layers),
            None if embed is None else embed.data_ptr(),
            0 if embed is None else embed.shape[0],
            max_rows,
            block_rows,
            self._residual.data_ptr(),
            *(tensor.data_ptr() for tensor in workspace),
            None,
        )
        # What the structures point to.
        self._kept = (tuple(layers), cos, sin, workspace)
        self._max_logit_rows = min(max_logit_rows, max_rows)
        self._logits: list[Tensor] = []
        self._narrow: Tensor | None = None
        if head is not None:
            size = (self._max_logit_rows, head.out_features)
            self._logits = [torch.empty(size, dtype=torch.float32) for _ in range(2)]
            self._narrow = torch.empty(size, dtype=dtype)

    @property
    def backend(self) -> str:
        """Of the library that computes."""
        return self._library.name

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def run(self, step: StepInputs, begin: int, end: int, *, finish: bool = True, hidden: Tensor | None = None) -> None:
        """Compute layers begin..end-1 for the rows of `step`, and write their K and V.

        Args:
            finish: also what comes after the KV write of layer end - 1. Without it the next call goes on from there.
            hidden: [T, H], contiguous, what the layers before gave; None embeds the step's tokens.

        Raises:
            ValueError: an index of the step leads out of the pool, the tables or the vocabulary.
        """
        self._library.decoder_run(self._decoder, self._given(step, hidden), begin, end, finish=finish)

    def finish(self, step: StepInputs) -> None:
        """What comes after the KV write of the last layer, after a `run` without it."""
        end = self.num_layers
        self._library.decoder_run(self._decoder, self._given(step, None), end, end, finish=True)

    def _given(self, step: StepInputs, hidden: Tensor | None) -> _Step:
        rows = step.token_ids.shape[0]
        assert hidden is None or (hidden.shape == (rows, self._shape.hidden_size) and hidden.is_contiguous())
        assert hidden is None or hidden.dtype is self._shape.dtype, f"hidden is {hidden.dtype}"
        for name, dtype in _INDEX_DTYPES.items():
            tensor: Tensor = getattr(step, name)
            assert tensor.dtype is dtype, f"{name} must be {dtype}"
            # Rows of tables may lie apart: the step's are the first columns of wider ones.
            assert tensor.stride(-1) == 1 if name == "block_tables" else tensor.is_contiguous(), f"{name} must be dense"
        tables = step.block_tables
        return _Step(
            rows,
            tables.shape[0],
            tables.shape[1],
            tables.stride(0),
            step.token_ids.data_ptr(),
            None if hidden is None else hidden.data_ptr(),
            step.positions.data_ptr(),
            step.slots.data_ptr(),
            tables.data_ptr(),
            step.query_start.data_ptr(),
            step.context_lens.data_ptr(),
            step.logit_rows.data_ptr(),
            step.logit_rows.shape[0],
        )

    def hidden_rows(self, count: int) -> Tensor:
        """[count, H] of the wanted rows after the last layer, before the final norm."""
        return self._residual[:count]

    def logits(self, count: int) -> Tensor:
        """Final norm and head of those rows: fp32 [count, V]."""
        assert self._head is not None, "the last layers need a norm and a head"
        assert self._final_norm is not None
        assert self._narrow is not None
        if count > self._max_logit_rows:
            out = torch.empty((count, self._head.out_features), dtype=torch.float32)
        else:
            self._logits.reverse()
            out = self._logits[0][:count]
        self._library.decoder_logits(self._decoder, self._final_norm, self._head, count, self._narrow, out)
        return out

    def measure(self, on: bool) -> None:
        """Switch timing on, from zero, or off."""
        self._times[:] = [0.0] * len(self._times)
        self._decoder.times = ctypes.addressof(self._times) if on else None

    @property
    def times(self) -> DecoderTimes:
        return DecoderTimes(*self._times)


def _address(weight: PackedLinear) -> int:
    assert weight.native is not None
    return ctypes.addressof(weight.native)


def _layer(shape: DecoderShape, layer: DecoderLayer) -> _Layer:
    kv = layer.kv_layer
    assert kv.dtype is shape.dtype, f"the pool is {kv.dtype}, the model {shape.dtype}"
    assert kv.stride(-1) == 1, "heads of the pool are dense"
    for norm in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm):
        assert norm is None or (norm.dtype is shape.dtype and norm.is_contiguous())
    return _Layer(
        layer.input_norm.data_ptr(),
        layer.post_norm.data_ptr(),
        None if layer.q_norm is None else layer.q_norm.data_ptr(),
        None if layer.k_norm is None else layer.k_norm.data_ptr(),
        _address(layer.qkv),
        _address(layer.o),
        _address(layer.gate_up),
        _address(layer.down),
        _pages(kv),
        layer.sliding_window or 0,
    )
