"""Loads a checkpoint's weights into fused layers, strictly and one layer at a time.

Tensors are memory-mapped; q, k, v and gate, up are copied into one fused weight each, which `Linear` then lays out for
speed, so that loading needs little more memory than the model itself. A rank of several reads its own slices only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import safetensors
import torch
from torch import Tensor

from baton.engine.checkpoint import Checkpoint, TensorEntry
from baton.engine.linear import Embedding, Linear, LinearLike
from baton.engine.model_config import ModelConfig
from baton.engine.partition import Partition
from baton.errors import CheckpointError
from baton.kernels.ops import Quantization

__all__ = ["LayerWeights", "ModelWeights", "Progress", "expected_tensors", "load_weights"]

Progress = Callable[[int, int, str], None]
"""Called with (bytes loaded so far, bytes of the checkpoint, name of the tensor just loaded)."""

Range = tuple[int, int]

_EMBED = "model.embed_tokens.weight"
_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer. H hidden, D head_dim, I intermediate.

    Attributes:
        input_norm, post_norm: [H], before attention and before the MLP.
        qkv: H -> (num_q_heads + 2 * num_kv_heads) * D, in the order q, k, v.
        q_norm, k_norm: [D], or None.
        o: num_q_heads * D -> H.
        gate_up: H -> 2 * I, gate first.
        down: I -> H.
    """

    input_norm: Tensor
    qkv: LinearLike
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: LinearLike
    post_norm: Tensor
    gate_up: LinearLike
    down: LinearLike


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """Weights of a model, or of the layers of one stage.

    Attributes:
        embed: token ids -> [T, H]; None where earlier layers are elsewhere.
        final_norm: [H], and `lm_head`: H -> vocab_size; None where later layers are elsewhere.
    """

    embed: Callable[[Tensor], Tensor] | None
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor | None
    lm_head: LinearLike | None


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of this architecture; the head too where it is tied."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {_EMBED: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    shapes[_NORM] = (hidden,)
    shapes[_HEAD] = (config.vocab_size, hidden)
    return shapes


def load_weights(
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    partition: Partition | None = None,
    quantization: Quantization = "none",
) -> ModelWeights:
    """Read every weight, converted to `dtype` on `device`.

    Args:
        quantization: how the linear layers are stored, but for the head, whose rounding would show in every logit.
        partition: read only what this rank holds; None reads all. Each weight is a plain one of the rank's size, and
            the bias of o and down is there on tensor rank 0 alone: `parallel.parallelize` adds the exchange.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, not floating point, or cannot be read.
    """
    tied = config.tie_word_embeddings
    checkpoint.verify(expected_tensors(config), optional=frozenset({_HEAD} if tied else ()))
    part = partition or Partition.of(config)
    vocab = part.vocab
    with ExitStack() as stack:
        reader = _Reader(checkpoint, stack, dtype, device, progress, quantization)
        rows = reader.fused([_EMBED], [vocab]) if part.is_first_stage or (tied and part.is_last_stage) else None
        layers = tuple(_load_layer(config, part, reader, f"model.layers.{layer}.") for layer in range(*part.layers))
        embed = Embedding(rows) if rows is not None and part.is_first_stage else None
        if not part.is_last_stage:
            return ModelWeights(embed=embed, layers=layers, final_norm=None, lm_head=None)
        final_norm = reader.vector(_NORM)
        if rows is None or not tied:
            head = Linear(reader.fused([_HEAD], [vocab]))
        elif _HEAD in checkpoint.entries and not torch.equal(reader.fused([_HEAD], [vocab]), rows):
            raise CheckpointError(
                f"{checkpoint.entries[_HEAD].file}: tensor {_HEAD} differs from {_EMBED}, "
                "but config.json says tie_word_embeddings = true"
            )
        else:
            head = Linear(rows)
        return ModelWeights(embed=embed, layers=layers, final_norm=final_norm, lm_head=head)


def _load_layer(config: ModelConfig, part: Partition, reader: _Reader, prefix: str) -> LayerWeights:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    q, kv = (_scale(heads, config.head_dim) for heads in (part.q_heads, part.kv_heads))
    adds_bias = part.tensor_rank == 0
    return LayerWeights(
        input_norm=reader.vector(prefix + "input_layernorm.weight"),
        qkv=reader.linear(
            [attention + name for name in ("q_proj", "k_proj", "v_proj")], rows=[q, kv, kv], has_bias=config.qkv_bias
        ),
        q_norm=reader.vector(attention + "q_norm.weight") if config.qk_norm else None,
        k_norm=reader.vector(attention + "k_norm.weight") if config.qk_norm else None,
        o=reader.linear([attention + "o_proj"], columns=q, has_bias=config.o_bias and adds_bias),
        post_norm=reader.vector(prefix + "post_attention_layernorm.weight"),
        gate_up=reader.linear(
            [mlp + "gate_proj", mlp + "up_proj"], rows=[part.inner, part.inner], has_bias=config.mlp_bias
        ),
        down=reader.linear([mlp + "down_proj"], columns=part.inner, has_bias=config.mlp_bias and adds_bias),
    )


def _scale(bounds: Range, factor: int) -> Range:
    return bounds[0] * factor, bounds[1] * factor


class _Reader:
    """Reads tensors of a verified checkpoint through memory-mapped files that `stack` closes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stack: ExitStack,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None,
        quantization: Quantization,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._quantization = quantization
        self._loaded_bytes = 0
        self._total_bytes = sum(entry.num_bytes for entry in checkpoint.entries.values())
        self._files = {}
        for file in checkpoint.files:
            try:
                self._files[file] = stack.enter_context(safetensors.safe_open(file, framework="pt"))
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{file} is damaged: {error}") from error

    def vector(self, name: str) -> Tensor:
        """One tensor as it is, in memory of its own."""
        return self.fused([name], [None])

    def linear(
        self,
        names: Sequence[str],
        *,
        rows: Sequence[Range | None] = (None,),
        columns: Range | None = None,
        has_bias: bool,
    ) -> Linear:
        """The layers `names` fused into one, outputs in that order; of each only `rows` and `columns`."""
        weight = self.fused([name + ".weight" for name in names], rows, columns)
        bias = self.fused([name + ".bias" for name in names], rows) if has_bias else None
        return Linear(weight, bias, quantization=self._quantization)

    def fused(self, names: Sequence[str], rows: Sequence[Range | None], columns: Range | None = None) -> Tensor:
        """Slices of tensors below each other; None takes the whole."""
        entries = [self._checkpoint.entries[name] for name in names]
        bounds = [part or (0, entry.shape[0]) for part, entry in zip(rows, entries, strict=True)]
        shape = [sum(end - begin for begin, end in bounds), *entries[0].shape[1:]]
        if columns is not None:
            shape[1] = columns[1] - columns[0]
        fused = torch.empty(shape, dtype=self._dtype, device=self._device)
        at = 0
        for name, entry, (begin, end) in zip(names, entries, bounds, strict=True):
            piece = fused[at : at + end - begin]
            try:
                piece.copy_(self._read(entry, name, (begin, end), columns))
            except (OSError, RuntimeError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{entry.file}: tensor {name} cannot be read: {error}") from error
            at += end - begin
            self._loaded_bytes += piece.numel() * entry.num_bytes // math.prod(entry.shape)
            if self._progress is not None:
                self._progress(self._loaded_bytes, self._total_bytes, name)
        return fused

    def _read(self, entry: TensorEntry, name: str, rows: Range, columns: Range | None) -> Tensor:
        file = self._files[entry.file]
        if columns is None and rows == (0, entry.shape[0]):
            whole: Tensor = file.get_tensor(name)
            return whole
        # A slice touches only its own pages of the mapped file.
        stored = file.get_slice(name)
        part: Tensor = stored[slice(*rows)] if columns is None else stored[slice(*rows), slice(*columns)]
        return part
