"""The model of the simulation, and the oracle: what a request's tokens must be.

The next token's logits are a function of a hash over all tokens before it, and the runner takes these tokens from
nowhere but the KV pool: a page that is lost, stale, misplaced or not verified gives other logits, and so other tokens,
as with a real model. Each cell of the pool holds the token and a stamp of position and layer; what is read and is not
what a sequence at that place wrote is reported at once. Sampling is the product's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tests.simulation.process import Process
from tests.simulation.threads import sleep

from baton.engine.kv_layout import KvLayout
from baton.engine.logits import LogitsProcessor
from baton.engine.request import SamplingParams
from baton.engine.sampler import RequestSampler, SamplerRow, sample

__all__ = ["EOS", "VOCAB_SIZE", "SimRunner", "expected_answer", "logits_after"]

VOCAB_SIZE = 64
EOS = 1
_PRIME = 2_147_483_647
_NUM_ROWS = 509
_MAX_LEN = 4096
_LOGITS = torch.from_numpy(np.random.default_rng(7).normal(0.0, 2.0, (_NUM_ROWS, VOCAB_SIZE)).astype(np.float32))
_LOGITS[:, EOS] -= 3.0
_WEIGHTS: npt.NDArray[np.int64] = np.arange(_MAX_LEN, dtype=np.int64) * 1_000_003 % 1_000_000 + 12_345


def _row_after(tokens: npt.NDArray[np.int64]) -> int:
    state = int(((tokens + 1) * _WEIGHTS[: len(tokens)] % _PRIME).sum() % _PRIME)
    return state % _NUM_ROWS


def logits_after(tokens: Sequence[int]) -> torch.Tensor:
    """Logits [1, vocab_size] of the token that follows."""
    row = _row_after(np.array(tokens, dtype=np.int64))
    return _LOGITS[row : row + 1]


def expected_answer(prompt: Sequence[int], sampling: SamplingParams, max_model_len: int) -> tuple[list[int], str]:
    """The oracle: the tokens of a request that nothing disturbs, and why it ends."""
    processor = LogitsProcessor(sampling, tuple(prompt), (EOS,), VOCAB_SIZE)
    sampler = RequestSampler(sampling, processor)
    tokens, output = list(prompt), []
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS,))}
    while True:
        token = sample(logits_after(tokens), [SamplerRow(sampler, len(tokens), tuple(output))])[0].token_id
        tokens.append(token)
        output.append(token)
        if token in ends and len(output) >= sampling.min_tokens:
            return output, "stop"
        if len(output) >= sampling.max_tokens or len(tokens) >= max_model_len:
            return output, "length"


@dataclass(slots=True)
class _SimBatch:
    """What a step computes: (tokens, start, block ids, whether logits of its last row are wanted) of each sequence."""

    rows: list[tuple[Sequence[int], int, Sequence[int], bool]]


class _SimBuffers:
    """Stands in for `BatchBuffers`."""

    def build_decode(self, tokens: Any, starts: Any, block_ids: Any, tags: Any = ()) -> _SimBatch:
        """See `BatchBuffers`."""
        del tags
        return _SimBatch(
            [((token,), start, ids, True) for token, start, ids in zip(tokens, starts, block_ids, strict=True)]
        )

    def build(self, rows: Sequence[Any]) -> _SimBatch:
        """See `BatchBuffers`."""
        return _SimBatch([(row.token_ids, row.start, row.block_ids, row.wants_logits == "last") for row in rows])


class SimRunner:
    """See `baton.engine.engine.Runner`. Sleeps, on virtual time, as long as a step takes.

    Attributes:
        process: in which it runs.
        base_s, token_s: what a step takes, and each token of it besides.
        on_wrong_page: told what was read that nobody wrote for that place.
    """

    def __init__(
        self,
        process: Process,
        *,
        num_blocks: int,
        block_size: int,
        num_layers: int,
        max_model_len: int,
        base_s: float,
        token_s: float,
        on_wrong_page: Callable[[str], None],
    ) -> None:
        self.process = process
        self.layout = KvLayout(
            num_layers=num_layers, num_kv_heads=1, head_dim=2, block_size=block_size, dtype="float32"
        )
        self.kv = torch.full((num_blocks, num_layers, 2, 1, block_size, 2), -1.0)
        self._cells: npt.NDArray[np.float32] = self.kv.numpy()
        self.num_blocks = num_blocks
        self.max_model_len = min(max_model_len, num_blocks * block_size)
        self.vocab_size = VOCAB_SIZE
        self.fingerprint = "simulated"
        self.eos_token_ids = (EOS,)
        self.buffers: Any = _SimBuffers()
        self.base_s, self.token_s = base_s, token_s
        self.on_wrong_page = on_wrong_page
        self.on_write: Callable[[Sequence[int]], None] = lambda blocks: None

    def forward(
        self, batch: Any, on_layers: Callable[[int, int], None] | None = None, layers_per_group: int = 4
    ) -> torch.Tensor:
        """See `Runner`."""
        rows = batch.rows
        step_s = (self.base_s + self.token_s * sum(len(row[0]) for row in rows)) * self.process.slowness
        num_layers, size = self.layout.num_layers, self.layout.block_size
        chunks = []
        for tokens, start, block_ids, _ in rows:
            positions = np.arange(start, start + len(tokens))
            ids = np.array(block_ids, dtype=np.int64)
            chunks.append((np.array(tokens, dtype=np.float32), positions, ids[positions // size], positions % size))
        groups = [
            (begin, min(begin + layers_per_group, num_layers)) for begin in range(0, num_layers, layers_per_group)
        ]
        if on_layers is None:
            groups = [(0, num_layers)]
        for begin, end in groups:
            sleep(step_s * (end - begin) / num_layers)
            for tokens, positions, blocks, offsets in chunks:
                self.on_write(sorted(set(blocks.tolist())))
                for layer in range(begin, end):
                    self._cells[blocks, layer, :, 0, offsets, 0] = tokens[:, None]
                    self._cells[blocks, layer, :, 0, offsets, 1] = positions[:, None] * 16 + layer
            if on_layers is not None:
                on_layers(begin, end)
        wanted = [
            self._read(np.array(block_ids, dtype=np.int64), start + len(tokens))
            for tokens, start, block_ids, wants in rows
            if wants
        ]
        return _LOGITS[wanted]

    def _read(self, block_ids: npt.NDArray[np.int64], num_tokens: int) -> int:
        size, num_layers = self.layout.block_size, self.layout.num_layers
        pages = self._cells[block_ids[: -(-num_tokens // size)], :, :, 0]  # [blocks, layers, 2, size, 2]
        cells = pages.transpose(1, 2, 4, 0, 3).reshape(num_layers, 2, 2, -1)[..., :num_tokens]
        tokens = cells[0, 0, 0].astype(np.int64)
        stamps = np.arange(num_tokens)[None, None, :] * 16 + np.arange(num_layers)[:, None, None]
        if not ((cells[:, :, 0] == tokens).all() and (cells[:, :, 1] == stamps).all() and (tokens >= 0).all()):
            wrong = np.argwhere((cells[:, :, 0] != tokens) | (cells[:, :, 1] != stamps))
            self.on_wrong_page(f"layer, half, position {wrong[:3].tolist()} of blocks {block_ids.tolist()}")
        return _row_after(tokens)
