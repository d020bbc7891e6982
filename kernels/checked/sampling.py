"""Drawing tokens: checks, then the backend."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.backends import library_for, uses_triton
from baton.kernels.checked.arguments import expect, expect_dense_rows, expect_dtype, expect_index
from baton.kernels.reference import sampling as reference
from baton.kernels.reference.sampling import NOT_A_NUMBER, PACKED_BYTES, pack_sampling

__all__ = ["NOT_A_NUMBER", "draw_tokens", "draw_tokens_into", "draw_workspace", "pack_sampling"]


def draw_tokens(
    logits: Tensor, row_ids: npt.NDArray[np.int64], samplings: bytes, positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Draws one token for each of N requests, a function of its row, its `pack_sampling` and its position alone.

    `reference/sampling.py` spells out how; every backend gives the same tokens for the same logits.

    Args:
        logits: fp32 [R, V] (V contiguous), not changed.
        row_ids: [N], the row of each request.
        samplings: N results of `pack_sampling`, one after the other.
        positions: [N], of the tokens to be drawn.
    Returns:
        [N] token ids, `NOT_A_NUMBER` where the row holds NaN or its largest entry is infinite.
    """
    _check_logits(logits)
    for name, array in (("row_ids", row_ids), ("positions", positions)):
        expect(array.dtype == np.int64 and array.flags.c_contiguous, f"{name} must be contiguous int64")
    count = len(row_ids)
    expect(len(positions) == count, f"{len(positions)} positions for {count} row_ids")
    expect(len(samplings) == count * PACKED_BYTES, f"{len(samplings)} bytes of samplings for {count} row_ids")
    if count == 0:
        return np.empty(0, dtype=np.int64)
    low, high = int(row_ids.min()), int(row_ids.max())
    expect(low >= 0 and high < logits.shape[0], f"row_ids must be in [0, {logits.shape[0]}), got {low} to {high}")
    if uses_triton(logits):
        return _draw_on_device(logits, row_ids, samplings, positions)
    if (native := library_for(logits)) is not None:
        return native.draw_tokens(logits, row_ids, samplings, positions)
    return reference.draw_tokens(logits, row_ids, samplings, positions)


def draw_tokens_into(
    logits: Tensor,
    row_ids: Tensor,
    samplings: Tensor,
    positions: Tensor,
    out: Tensor,
    workspace: Tensor | None = None,
) -> None:
    """`draw_tokens` with all arguments on the device of the logits. On a GPU nothing waits, nothing is looked at.

    Args:
        logits: fp32 [R, V] (V contiguous), not changed.
        row_ids: int64 [N], the row of each request; -1: none, which gives `NOT_A_NUMBER`. Not checked on a GPU.
        samplings: int64 [N, 5], the bytes of N results of `pack_sampling`.
        positions: int64 [N], of the tokens to be drawn.
        out: int64 [N].
        workspace: of `draw_workspace` for at least N requests; None: allocated.
    """
    _check_logits(logits)
    count = row_ids.shape[0]
    for name, tensor, shape in (
        ("row_ids", row_ids, (count,)),
        ("samplings", samplings, (count, PACKED_BYTES // 8)),
        ("positions", positions, (count,)),
        ("out", out, (count,)),
    ):
        expect_index(name, tensor, shape, logits.device, torch.int64)
    if uses_triton(logits):
        from baton.kernels.triton import sampling as triton

        if workspace is None:
            workspace = draw_workspace(count, logits.device)
        expect(
            workspace.dim() == 2 and workspace.shape[0] >= count and workspace.shape[1] >= triton.WORKSPACE_WORDS,
            f"workspace must be of draw_workspace({count}), got {tuple(workspace.shape)}",
        )
        expect_index("workspace", workspace, workspace.shape, logits.device, torch.int64)
        triton.draw_tokens(logits, row_ids, samplings, positions, out, workspace)
        return
    rows = row_ids.numpy(force=True)
    wanted = np.flatnonzero(rows >= 0)
    packed = samplings.numpy(force=True)[wanted].tobytes()
    tokens = draw_tokens(logits, rows[wanted], packed, positions.numpy(force=True)[wanted])
    out.fill_(NOT_A_NUMBER)
    out[torch.from_numpy(wanted).to(out.device)] = torch.from_numpy(tokens).to(out.device)


def draw_workspace(num_requests: int, device: torch.device) -> Tensor:
    """Memory that `draw_tokens_into` needs for that many requests: int64, 17 KiB each on a GPU, next to none on CPU."""
    words = 1
    if uses_triton(torch.empty(0, device=device)):
        from baton.kernels.triton import sampling as triton

        words = triton.WORKSPACE_WORDS
    return torch.empty((num_requests, words), dtype=torch.int64, device=device)


def _draw_on_device(
    logits: Tensor, row_ids: npt.NDArray[np.int64], samplings: bytes, positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Everything goes to the device in one copy, and the tokens come back in one."""
    count = len(row_ids)
    words = np.empty((PACKED_BYTES // 8 + 2, count), dtype=np.int64)
    words[0], words[1] = row_ids, positions
    words[2:].reshape(-1)[:] = np.frombuffer(samplings, dtype=np.int64)
    inputs = torch.from_numpy(words).to(logits.device)
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    draw_tokens_into(logits, inputs[0], inputs[2:].view(count, -1), inputs[1], out)
    tokens: npt.NDArray[np.int64] = out.numpy(force=True)
    return tokens


def _check_logits(logits: Tensor) -> None:
    expect(logits.dim() == 2 and logits.shape[1] >= 1, f"logits must be [R, V], got {tuple(logits.shape)}")
    expect_dtype("logits", logits, torch.float32)
    expect_dense_rows("logits", logits)
