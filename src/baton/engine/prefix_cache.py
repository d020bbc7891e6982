"""Names for full blocks of tokens: pure, equal in every process, torch-free.

A block's name is `sha256(canonical CBOR of [parent name, token ids, salt, adapter])`, chained from an empty parent, so
equal names mean equal prefixes (same idea as vLLM's `sha256_cbor`, vllm:v1/core/kv_cache_utils.py). CBOR because its
canonical form is the same in every process and language; no process-random hash seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import cbor2

__all__ = ["HashChain", "block_hashes", "child_hash"]


def child_hash(parent: bytes, token_ids: Sequence[int], salt: str = "", adapter: str = "") -> bytes:
    """Name of the block of `token_ids` that follows the block named `parent` (empty for the first), 32 bytes."""
    return hashlib.sha256(cbor2.dumps([parent, list(token_ids), salt, adapter], canonical=True)).digest()


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str = "", adapter: str = "") -> list[bytes]:
    """Names of all full blocks of `token_ids`, first to last."""
    return HashChain(block_size, salt, adapter).names(token_ids)


class HashChain:
    """Block names of one growing token sequence, each computed once.

    `salt` keeps tenants apart: it enters the first block's name and, by chaining, all that follow.
    """

    __slots__ = ("_adapter", "_block_size", "_names", "_salt")

    def __init__(self, block_size: int, salt: str = "", adapter: str = "") -> None:
        assert block_size > 0
        self._block_size = block_size
        self._salt = salt
        self._adapter = adapter
        self._names: list[bytes] = []

    def names(self, token_ids: Sequence[int]) -> list[bytes]:
        """Names of the full blocks of `token_ids`, which must extend what was given before."""
        size = self._block_size
        full = len(token_ids) // size
        while len(self._names) < full:
            start = len(self._names) * size
            parent = self._names[-1] if self._names else b""
            self._names.append(child_hash(parent, token_ids[start : start + size], self._salt, self._adapter))
        return self._names[:full]
