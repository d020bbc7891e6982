"""An engine without a model: same interface, a latency model, and tokens that depend on the KV it was given.

It writes each token's id into the real KV pool and derives the next token from what the pool holds for the *whole*
context, so a lost, stale or misplaced page changes the answer just as with a real model. For tests and simulations of
everything around the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.engine.engine import Engine
from baton.engine.graph_capture import EagerGraphs
from baton.engine.kv_layout import KvLayout
from baton.engine.runner import BatchBuffers, ForwardBatch
from baton.engine.step_launcher import StepLauncher

__all__ = ["FakeEngine", "FakeRunner", "LatencyModel", "fake_next_token"]

_MIX = 1_000_003


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Seconds of a step: `base_s + token_s * tokens + context_s * (sum over rows of context length)`."""

    base_s: float = 0.0
    token_s: float = 0.0
    context_s: float = 0.0

    def step_s(self, num_tokens: int, context_tokens: int) -> float:
        """Seconds of one step over `num_tokens` new tokens with `context_tokens` of context in all."""
        return self.base_s + self.token_s * num_tokens + self.context_s * context_tokens


def fake_next_token(token_ids: list[int], vocab_size: int) -> int:
    """The greedy continuation of `token_ids` that a `FakeRunner` gives."""
    state = 7
    for position, token_id in enumerate(token_ids):
        state = (state + (token_id + 1) * (position * _MIX + 12_345)) % 2_147_483_647
    return state % vocab_size


class FakeRunner:
    """Stands in for `ModelRunner`: one layer group per layer, KV of `head_dim` 2 that holds the token ids in fp32."""

    def __init__(
        self,
        *,
        num_blocks: int = 256,
        block_size: int = 16,
        num_layers: int = 4,
        max_model_len: int = 2048,
        vocab_size: int = 512,
        max_batch_tokens: int = 2048,
        max_batch_size: int = 256,
        latency: LatencyModel | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.layout = KvLayout(
            num_layers=num_layers, num_kv_heads=1, head_dim=2, block_size=block_size, dtype="float32"
        )
        self.device = torch.device("cpu")
        self.scratch_block = num_blocks
        # With the scratch block; `kv` is what sequences get.
        self._pool = torch.full((num_blocks + 1, num_layers, 2, 1, block_size, 2), float("nan"))
        self.kv = self._pool[:num_blocks]
        self.num_blocks = num_blocks
        self.max_model_len = min(max_model_len, num_blocks * block_size)
        self.vocab_size = vocab_size
        self.fingerprint = "fake"
        self.eos_token_ids = eos_token_ids
        self.buffers = BatchBuffers(
            max_batch_tokens=max_batch_tokens,
            max_batch_size=max_batch_size,
            max_model_len=self.max_model_len,
            block_size=block_size,
            device=self.device,
        )
        self._latency = latency or LatencyModel()

    def forward(
        self,
        batch: ForwardBatch,
        on_layers: Callable[[int, int], None] | None = None,
        layers_per_group: int = 4,
        out: Tensor | None = None,
    ) -> Tensor:
        """Writes KV, sleeps as long as the latency model says, returns logits with one peak each; `out` is not used."""
        begins = batch.query_start.tolist()
        contexts = batch.context_lens.tolist()
        num_layers = self.layout.num_layers
        blocks, offsets = batch.slots // self.layout.block_size, batch.slots % self.layout.block_size
        pause_s = self._latency.step_s(len(batch.token_ids), sum(contexts))
        for begin in range(0, num_layers, layers_per_group):
            end = min(begin + layers_per_group, num_layers)
            for layer in range(begin, end):
                for half in (0, 1):
                    self._pool[blocks, layer, half, 0, offsets, 0] = batch.token_ids.float()
                    self._pool[blocks, layer, half, 0, offsets, 1] = float(layer)
            if pause_s > 0:
                time.sleep(pause_s * (end - begin) / num_layers)
            if on_layers is not None:
                on_layers(begin, end)
        wanted = batch.logit_rows.tolist()
        logits = torch.zeros((len(wanted), self.vocab_size))
        for index, row in enumerate(wanted):
            sequence = next(s for s in range(len(contexts)) if begins[s] <= row < begins[s + 1])
            context = contexts[sequence] - (begins[sequence + 1] - 1 - row)
            logits[index, fake_next_token(self._read(batch.block_tables[sequence], context), self.vocab_size)] = 20.0
        return logits

    def _read(self, block_table: Tensor, context: int) -> list[int]:
        size = self.layout.block_size
        pages = self._pool[block_table[: -(-context // size)].long()]  # [blocks, layers, 2, 1, size, 2]
        tokens = pages.permute(1, 2, 5, 0, 4, 3).reshape(self.layout.num_layers, 2, 2, -1)[..., :context]
        assert bool((tokens[:, :, 0] == tokens[:1, :1, 0]).all()), "layers disagree on the tokens: a page is wrong"
        return [int(t) for t in tokens[0, 0, 0].tolist()]


class FakeEngine(Engine):
    """An `Engine` over a `FakeRunner`: real scheduler, block pool, prefix cache and sampler, no model.

    Args:
        overlap: steps are launched ahead as on a GPU, decode steps by graphs that `EagerGraphs` stands in for.
        options: see `FakeRunner`.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int = 2048,
        max_batch_size: int = 256,
        layers_per_group: int = 4,
        overlap: bool = False,
        **options: Any,
    ) -> None:
        runner = FakeRunner(max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size, **options)
        launcher = None
        if overlap:
            launcher = StepLauncher(
                runner, max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size, graphs=EagerGraphs()
            )
            launcher.warm_up()
        super().__init__(
            runner,
            max_batch_tokens=max_batch_tokens,
            max_batch_size=max_batch_size,
            layers_per_group=layers_per_group,
            launcher=launcher,
        )
