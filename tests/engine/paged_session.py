"""Drives a `ModelRunner` by hand: sequences with scattered blocks, prompts in chunks, steps with any mix of rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from baton.engine.runner import ModelRunner, SequenceRows, WantsLogits

__all__ = ["PagedSequence", "free_blocks", "greedy", "prefill", "step"]


class PagedSequence:
    """A sequence that owns blocks in no particular order."""

    def __init__(self, free_blocks: list[int], max_tokens: int, block_size: int) -> None:
        self.block_ids = [free_blocks.pop() for _ in range(-(-max_tokens // block_size))]
        self.length = 0

    def rows(self, token_ids: Sequence[int], wants_logits: WantsLogits = "all") -> SequenceRows:
        """Rows for the next `token_ids`; the sequence grows by them."""
        start, self.length = self.length, self.length + len(token_ids)
        return SequenceRows(token_ids, start, self.block_ids, wants_logits)


def free_blocks(runner: ModelRunner, seed: int = 0) -> list[int]:
    """All block ids of a runner, shuffled."""
    blocks = list(range(runner.num_blocks))
    random.Random(seed).shuffle(blocks)
    return blocks


def step(runner: ModelRunner, rows: Sequence[SequenceRows]) -> Tensor:
    """Logits [R, V] of one step, as a copy."""
    return runner.forward(runner.buffers.build(rows)).clone()


def prefill(runner: ModelRunner, sequence: PagedSequence, token_ids: Sequence[int], chunk: int) -> Tensor:
    """Logits of every prompt token [len(token_ids), V], computed in chunks."""
    pieces = [token_ids[begin : begin + chunk] for begin in range(0, len(token_ids), chunk)]
    return torch.cat([step(runner, [sequence.rows(piece)]) for piece in pieces])


def greedy(runner: ModelRunner, sequence: PagedSequence, token_id: int, count: int) -> list[int]:
    """`count` tokens, the first of which is `token_id`."""
    token_ids = [token_id]
    while len(token_ids) < count:
        logits = step(runner, [sequence.rows(token_ids[-1:], "last")])
        token_ids.append(int(logits[0].argmax()))
    return token_ids
