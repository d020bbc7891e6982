"""Hands a model's layers to the C++ library's `Decoder`, where it can run them: one call per step or group of layers.

It can where this rank computes whole layers on CPU by compiled kernels. The exchange inside layers of tensor-parallel
ranks, other devices, and plain torch take the model's own path, op by op, with the same bits for the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from baton.engine.linear import Embedding, Linear, LinearLike
from baton.engine.model_config import ModelConfig
from baton.engine.weights import ModelWeights
from baton.kernels import ops
from baton.kernels.decoder import Decoder, DecoderLayer, DecoderShape

__all__ = ["native_layers"]


def native_layers(
    config: ModelConfig,
    weights: ModelWeights,
    cos: Tensor,
    sin: Tensor,
    kv_layers: Sequence[Tensor],
    *,
    max_rows: int,
    max_logit_rows: int,
) -> Decoder | None:
    """A decoder of these weights, which keeps them and writes to `kv_layers`; None where they take the other path.

    Args:
        config: of this rank's layers.
        cos, sin: fp32 [max_model_len, rot / 2].
        kv_layers: per layer a view [num_blocks, 2, Hk, block_size, D] of the pool.
        max_rows, max_logit_rows: of the largest step, and of the usual one.
    """
    embed, head = weights.embed, weights.lm_head
    linears = [linear for layer in weights.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    if head is not None:
        linears.append(head)
    if not (embed is None or isinstance(embed, Embedding)) or any(_packed(linear) is None for linear in linears):
        return None
    layers = [
        DecoderLayer(
            input_norm=layer.input_norm,
            post_norm=layer.post_norm,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            qkv=_known(layer.qkv),
            o=_known(layer.o),
            gate_up=_known(layer.gate_up),
            down=_known(layer.down),
            kv_layer=kv_layer,
            sliding_window=window,
        )
        for layer, kv_layer, window in zip(weights.layers, kv_layers, config.sliding_windows, strict=True)
    ]
    shape = DecoderShape(
        dtype=kv_layers[0].dtype,
        hidden_size=config.hidden_size,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        eps=config.rms_norm_eps,
        attention_scale=config.attention_scale,
    )
    return ops.decoder(
        shape,
        layers,
        cos,
        sin,
        embed=None if embed is None else embed.weight,
        final_norm=weights.final_norm,
        head=None if head is None else _known(head),
        max_rows=max_rows,
        max_logit_rows=max_logit_rows,
    )


def _packed(linear: LinearLike) -> ops.PackedLinear | None:
    return linear.packed if isinstance(linear, Linear) else None


def _known(linear: LinearLike) -> ops.PackedLinear:
    packed = _packed(linear)
    assert packed is not None
    return packed
