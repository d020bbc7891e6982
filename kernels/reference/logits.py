"""Log-sum-exp over the vocabulary, and what requests do to their logits, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.logits_tables import LogitsTables

__all__ = ["count_tokens", "logits_lse", "process_logits"]


def logits_lse(logits: Tensor, out: Tensor) -> None:
    """Write the natural log-sum-exp of each row of `logits` [R, V] to `out` [R]."""
    torch.logsumexp(logits, dim=-1, out=out)


def _has_bit(words: Tensor, vocab: int) -> Tensor:
    """bool [V] from int32 [ceil(V / 32)]."""
    bits = (words.unsqueeze(1) >> torch.arange(32, device=words.device)) & 1
    return bits.flatten()[:vocab].bool()


def process_logits(logits: Tensor, slots: Tensor, tables: LogitsTables) -> None:
    """Mask, bias and penalise rows of `logits` [R, V] in place, as the tables of their slots say."""
    for row, slot in zip(logits, slots.tolist(), strict=True):
        if slot < 0:
            continue
        if tables.is_restricted[slot]:
            row[~_has_bit(tables.allowed[slot], tables.vocab)] = float("-inf")
        if tables.num_outputs[slot] < tables.min_tokens[slot]:
            row[tables.end_ids[slot, : tables.num_ends[slot]].long()] = float("-inf")
        biased = slice(0, int(tables.num_bias[slot]))
        row[tables.bias_ids[slot, biased].long()] += tables.bias[slot, biased]
        repetition, frequency, presence = tables.penalties[slot]
        counts = tables.counts[slot]
        seen = (counts > 0) | _has_bit(tables.prompt[slot], tables.vocab)
        penalised = torch.where(row > 0, row / repetition, row * repetition)
        penalised -= frequency * counts
        penalised -= presence * (counts > 0)
        row.copy_(torch.where(seen, penalised, row))


def count_tokens(tables: LogitsTables, slots: Tensor, token_ids: Tensor) -> None:
    """Count token `token_ids[i]` as written by the request of `slots[i]`; negative slots or tokens are none."""
    counted = (slots >= 0) & (token_ids >= 0)
    slots, token_ids = slots[counted].long(), token_ids[counted]
    tables.counts[slots, token_ids] += 1
    tables.num_outputs[slots] += 1
