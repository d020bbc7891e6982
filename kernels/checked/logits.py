"""Log-sum-exp of logits, and what requests do to theirs: checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.backends import library_for, uses_triton
from baton.kernels.checked.arguments import expect, expect_dense_rows, expect_dtype, expect_index
from baton.kernels.logits_tables import LogitsTables
from baton.kernels.reference import logits as reference

__all__ = ["LogitsTables", "count_tokens", "logits_lse", "process_logits"]


def logits_lse(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Natural log-sum-exp of each row of logits, fp32 [R, V] (V contiguous) -> fp32 [R]. -inf counts as nothing."""
    _check_logits(logits)
    if out is None:
        out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    else:
        expect_index("out", out, logits.shape[:1], logits.device, torch.float32)
    if uses_triton(logits):
        from baton.kernels.triton import logits as triton

        triton.logits_lse(logits, out)
    elif (native := library_for(logits)) is not None:
        native.logits_lse(logits, out)
    else:
        reference.logits_lse(logits, out)
    return out


def process_logits(logits: Tensor, slots: Tensor, tables: LogitsTables) -> None:
    """Change rows of logits in place, as their requests wish.

    In this order: allowed tokens; ends, until there are enough tokens; biases; repetition, frequency and presence
    penalties. What `engine/logits.py` does row by row on the host, to the last bit.

    Args:
        logits: fp32 [R, V] (V contiguous).
        slots: int32 [R], the slot of each row's request; negative: the row stays as it is.
        tables: on the device of the logits.
    """
    _check_logits(logits)
    expect(
        tables.counts.shape[1] == logits.shape[1] and tables.counts.device == logits.device,
        f"tables are for {tables.counts.shape[1]} tokens on {tables.counts.device}, "
        f"logits {tuple(logits.shape)} on {logits.device}",
    )
    expect_index("slots", slots, logits.shape[:1], logits.device, torch.int32)
    if uses_triton(logits):
        from baton.kernels.triton import logits as triton

        triton.process_logits(logits, slots, tables)
    else:
        reference.process_logits(logits, slots, tables)


def count_tokens(tables: LogitsTables, slots: Tensor, token_ids: Tensor) -> None:
    """Tell the tables which tokens were drawn.

    Args:
        slots: int32 [N], distinct; negative: none.
        token_ids: int64 [N]; negative (`NOT_A_NUMBER`): none.
    """
    device = tables.counts.device
    expect(slots.dim() == 1, f"slots must be [N], got {tuple(slots.shape)}")
    expect_index("slots", slots, slots.shape, device, torch.int32)
    expect_index("token_ids", token_ids, slots.shape, device, torch.int64)
    if uses_triton(slots):
        from baton.kernels.triton import logits as triton

        triton.count_tokens(tables, slots, token_ids)
    else:
        reference.count_tokens(tables, slots, token_ids)


def _check_logits(logits: Tensor) -> None:
    expect(logits.dim() == 2, f"logits must be [R, V], got {tuple(logits.shape)}")
    expect_dtype("logits", logits, torch.float32)
    expect_dense_rows("logits", logits)
