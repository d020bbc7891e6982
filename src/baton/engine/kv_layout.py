"""The shape of a KV cache and who may share pages with whom: a pure value, no torch.

One tensor per rank: `kv[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`; index 0 of the third axis is
K (after rotary embedding), 1 is V. A block is contiguous across layers, so copies move one large piece.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["DTYPE_BYTES", "KvLayout"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Layout of one instance's KV pages, all ranks together.

    Attributes:
        num_layers, num_kv_heads: of the whole model.
        head_dim: elements.
        block_size: tokens per block.
        dtype: "float32", "bfloat16" or "float16".
        tensor_parallel, pipeline_parallel: how heads and layers are split over ranks.
        layers_per_stage: of all stages; empty where they are as even as can be, the later ones the longer.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    layers_per_stage: tuple[int, ...] = ()

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and heads."""
        return self.token_bytes * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def fingerprint(self) -> str:
        """Digest over what two peers must share to exchange pages (not TP, PP or block size)."""
        text = f"{self.num_layers}/{self.num_kv_heads}/{self.head_dim}/{self.dtype}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]
