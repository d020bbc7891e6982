"""KV pages of one rank's pool on their way out and in: copies between blocks and flat payloads.

For threads other than the engine's, too: a caller touches only blocks that it holds, a RESERVED sequence's (pages
arriving) or a sequence's whose shipment has not settled (pages leaving).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.kernels import ops

__all__ = ["KvPages"]


class KvPages:
    """The pages of one pool.

    Args:
        kv: [num_blocks, num_layers, 2, Hk, block_size, D], this rank's layers and heads.
        block_size: tokens per block.
    """

    def __init__(self, kv: Tensor, block_size: int) -> None:
        self._kv = kv
        self._block_size = block_size

    @property
    def device(self) -> str:
        """Where the pool is, as torch writes it."""
        return str(self._kv.device)

    @property
    def num_layers(self) -> int:
        """Layers of this pool."""
        return self._kv.shape[1]

    def gather(
        self,
        block_ids: Sequence[int],
        layers: tuple[int, int],
        tokens: tuple[int, int],
        out: Tensor,
        *,
        heads: tuple[int, int] | None = None,
    ) -> int:
        """Copies KV of `tokens` in `layers` into `out`: uint8, the bytes of [layers, 2, heads, tokens, head_dim].

        Layers and heads count within this pool; `heads` None means all of them.

        Returns:
            the 64-bit checksum of `out`, made in the same pass over memory where the pool is on the CPU.
        """
        kv, pages = self._view(out, layers, tokens, heads)
        # To another device through a buffer on the pool's, on the caller's stream.
        buffer = pages if pages.device == kv.device else torch.empty_like(pages, device=kv.device)
        block_table = torch.tensor(block_ids, dtype=torch.int64)
        if buffer is pages:
            return ops.gather_pages_summed(kv, *layers, block_table, self._block_size, *tokens, pages)
        ops.gather_pages(kv, *layers, block_table, self._block_size, *tokens, buffer)
        pages.copy_(buffer)
        return ops.checksum(out)

    def scatter(
        self,
        block_ids: Sequence[int],
        layers: tuple[int, int],
        tokens: tuple[int, int],
        payload: Tensor,
        *,
        heads: tuple[int, int] | None = None,
    ) -> int:
        """The reverse of `gather`: copies `payload` into the pool, and returns the checksum of what was copied.

        The pool has been written to when the checksum is known: nobody may read these blocks before it was compared.
        """
        kv, pages = self._view(payload, layers, tokens, heads)
        block_table = torch.tensor(block_ids, dtype=torch.int64)
        return ops.scatter_pages_summed(kv, *layers, block_table, self._block_size, *tokens, pages.to(kv.device))

    def _view(
        self, flat: Tensor, layers: tuple[int, int], tokens: tuple[int, int], heads: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """The pool's `heads`, and `flat`, uint8, as [layers, 2, heads, tokens, head_dim] of the pool's dtype."""
        kv = self._kv
        if heads is not None:
            kv = kv[:, :, :, heads[0] : heads[1]]
        shape = (layers[1] - layers[0], 2, kv.shape[3], tokens[1] - tokens[0], kv.shape[5])
        return kv, flat.view(kv.dtype).view(shape)
