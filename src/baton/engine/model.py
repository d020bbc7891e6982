"""The model: embedding, decoder layers, head. Architecture only; families differ by what their weights hold.

Legend: T tokens of the batch, R rows whose logits are wanted, H hidden, Hq and Hk query and KV heads, D head_dim,
I intermediate, V vocabulary. Sums are rounded to the dtype where transformers rounds them: after each linear layer,
each norm, each step of the rotation, and each addition to the residual.

Two paths with equal bits: `Decoder` runs whole groups of layers in one call of the compiled kernels where it is given
and they are active; else the layers are spelled out here, op by op, for any device and for ranks that share layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.linear import LinearLike
from baton.engine.model_config import ModelConfig
from baton.engine.weights import LayerWeights, ModelWeights
from baton.kernels import ops
from baton.kernels.decoder import Decoder

__all__ = ["ForwardBatch", "LlamaModel", "OnLayers"]

OnLayers = Callable[[int, int], None]
"""Called with (begin, end) once the KV of layers begin..end-1 is written, on the thread that computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One step's tokens of S sequences, decode rows and prefill chunks alike.

    Attributes:
        token_ids: int64 [T], sequence after sequence.
        positions: int32 [T], counted from the prompt's start.
        slots: int64 [T], where K and V go: `block_id * block_size + offset`.
        block_tables: int32 [S, max_blocks], the blocks of each sequence; entries past its context are not read.
        query_start: int32 [S + 1], where each sequence's tokens begin.
        context_lens: int32 [S], tokens in the cache once this step is done.
        logit_rows: int64 [R], tokens (indices into T) whose logits are wanted, ascending.
        query_rows: the fewest and the most tokens of a sequence, where the host knows: it never looks at the device.
        tags: a number of each sequence that the model does not read: other ranks know sequences by it. May be empty.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor
    logit_rows: Tensor
    query_rows: tuple[int, int] | None = None
    tags: tuple[int, ...] = ()


class LlamaModel:
    """Llama, Mistral, Qwen2 and Qwen3 by composition.

    Args:
        config: the architecture.
        weights: as `load_weights` gives them.
        cos, sin: fp32 [max_model_len, D / 2].
        decoder: of the same weights, if there is one; it writes to the pool that `forward` is given.
        deterministic: on a GPU, attention in tiles and splits that do not depend on the batch; elsewhere it always is.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        cos: Tensor,
        sin: Tensor,
        decoder: Decoder | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        self._config = config
        self._weights = weights
        self._cos = cos
        self._sin = sin
        self._decoder = decoder
        self._deterministic = deterministic

    def forward(
        self,
        batch: ForwardBatch,
        kv_layers: Sequence[Tensor],
        on_layers: OnLayers | None = None,
        layers_per_group: int = 4,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Run all layers and write the batch's K and V.

        Args:
            kv_layers: per layer a view [num_blocks, 2, Hk, block_size, D] of the pool.
            on_layers: told about each group of `layers_per_group` layers (the last may be smaller) once its KV is
                written; what it raises ends the step.
            hidden: [T, H], what the layers before these gave for every token; None embeds the tokens.
        Returns:
            hidden rows [R, H] of `batch.logit_rows`, before the final norm; valid until the next call.
        """
        if self._is_native:
            return self._forward_native(batch, on_layers, layers_per_group, hidden)
        config, eps = self._config, self._config.rms_norm_eps
        if hidden is None:
            assert self._weights.embed is not None, "the first layers need an embedding"
            hidden = self._weights.embed(batch.token_ids)
        # Layers with the same window share what is worked out about a step.
        plans: dict[int | None, object] = {}
        delta = hidden  # [T, H]
        residual = torch.zeros_like(delta)
        for index, layer in enumerate(self._weights.layers):
            x = ops.rms_norm(delta, layer.input_norm, eps, residual=residual)
            q = self._project(layer, x, batch, kv_layers[index])
            end = index + 1
            is_last = end == config.num_layers
            if on_layers is not None and (is_last or end % layers_per_group == 0):
                on_layers(index // layers_per_group * layers_per_group, end)
            if is_last and batch.logit_rows.shape[0] == 0:
                return residual[:0]
            window = config.sliding_windows[index]
            if window not in plans:
                plans[window] = ops.attention_plan(
                    q,
                    kv_layers[index],
                    batch.block_tables,
                    batch.query_start,
                    batch.context_lens,
                    sliding_window=window,
                    deterministic=self._deterministic,
                    query_rows=batch.query_rows,
                )
            x = ops.paged_attention(
                q,
                kv_layers[index],
                batch.block_tables,
                batch.query_start,
                batch.context_lens,
                scale=config.attention_scale,
                sliding_window=window,
                deterministic=self._deterministic,
                query_rows=batch.query_rows,
                plan=plans[window],
            ).flatten(1)
            if is_last:
                # After the last attention no row depends on another: only the wanted ones go on.
                residual, x = residual[batch.logit_rows], x[batch.logit_rows]
            x = ops.rms_norm(layer.o(x), layer.post_norm, eps, residual=residual)
            delta = layer.down(ops.silu_mul(layer.gate_up(x)))
        return residual.add_(delta)

    def logits(self, hidden_rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Final norm and head of what `forward` returned last: [R, H] -> fp32 [R, V], valid until the next but one.

        Args:
            out: fp32 [R, V], where the result may go; look at what is returned.
        """
        if self._is_native:
            assert self._decoder is not None
            return self._decoder.logits(hidden_rows.shape[0])
        assert self._weights.final_norm is not None, "the last layers need a norm and a head"
        assert self._weights.lm_head is not None
        x = ops.rms_norm(hidden_rows, self._weights.final_norm, self._config.rms_norm_eps)
        logits = self._weights.lm_head(x)
        return logits.float() if out is None else out.copy_(logits)

    def linears(self) -> tuple[LinearLike, ...]:
        """One linear layer of each shape that is computed for many rows."""
        layer, head = self._weights.layers[0], self._weights.lm_head
        return (layer.qkv, layer.o, layer.gate_up, layer.down, *(() if head is None else (head,)))

    @property
    def _is_native(self) -> bool:
        return self._decoder is not None and self._decoder.backend == ops.backend()

    def _forward_native(
        self, batch: ForwardBatch, on_layers: OnLayers | None, layers_per_group: int, hidden: Tensor | None
    ) -> Tensor:
        decoder = self._decoder
        assert decoder is not None
        num_layers = decoder.num_layers
        per_call = num_layers if on_layers is None else layers_per_group
        for begin in range(0, num_layers, per_call):
            end = min(begin + per_call, num_layers)
            # Who listens hears of a group as soon as its KV is written, before the last layer's attention.
            decoder.run(batch, begin, end, finish=on_layers is None, hidden=hidden)
            if on_layers is not None:
                on_layers(begin, end)
        if on_layers is not None:
            decoder.finish(batch)
        return decoder.hidden_rows(batch.logit_rows.shape[0])

    def _project(self, layer: LayerWeights, x: Tensor, batch: ForwardBatch, kv_layer: Tensor) -> Tensor:
        """Write K and V of x [T, H] to their slots; return the rotated queries [T, Hq, D]."""
        num_q, num_kv = self._config.num_q_heads, self._config.num_kv_heads
        heads = layer.qkv(x).view(-1, num_q + 2 * num_kv, self._config.head_dim)
        q, k, v = heads[:, :num_q], heads[:, num_q:-num_kv], heads[:, -num_kv:]
        ops.qk_norm_rope_and_cache(
            q,
            k,
            v,
            layer.q_norm,
            layer.k_norm,
            self._config.rms_norm_eps,
            self._cos,
            self._sin,
            batch.positions,
            kv_layer,
            batch.slots,
        )
        return q
