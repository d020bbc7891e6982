"""Names for full blocks of tokens: pure, equal in every process, torch-free.

A block's name is `sha256(canonical CBOR of [parent name, token ids, salt, adapter])`, chained from an empty parent, so
equal names mean equal prefixes (same idea as vLLM's `sha256_cbor`, vllm:v1/core/kv_cache_utils.py). CBOR because its
canonical form is the same in every process and language; no process-random hash seeds.

The encoding (RFC 8949) is written out here for this one shape, since every prompt is named on its way in: shortest
heads, in definite length. Where the C++ kernels are built they do the same several times as fast, for prompts; tests
hold both against the cbor2 package.
"""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Sequence

from baton.kernels.cpu.block_names import load_block_names

__all__ = ["HashChain", "block_hashes"]

_UNSIGNED, _BYTES, _TEXT, _ARRAY = (major << 5 for major in (0, 2, 3, 4))
_MAX_KEPT = 1 << 18
_MIN_NATIVE_BLOCKS = 4


def _head(major: int, value: int) -> bytes:
    """An item's first bytes: its kind, and a number in as few bytes as it fits."""
    assert 0 <= value < 1 << 64, value
    if value < 24:
        return bytes((major | value,))
    for code, size in ((24, 1), (25, 2), (26, 4)):
        if value < 1 << (8 * size):
            return bytes((major | code,)) + value.to_bytes(size, "big")
    return bytes((major | 27,)) + value.to_bytes(8, "big")


_ROOT_HEAD = _head(_ARRAY, 4) + _head(_BYTES, 0)
_CHILD_HEAD = _head(_ARRAY, 4) + _head(_BYTES, 32)


class _EncodedIds(dict[int, bytes]):
    """Token id -> its encoding, remembered: a vocabulary has few."""

    def __missing__(self, token_id: int) -> bytes:
        encoded = _head(_UNSIGNED, token_id)
        if len(self) < _MAX_KEPT:
            self[token_id] = encoded
        return encoded


_encoded_id = _EncodedIds().__getitem__


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _head(_TEXT, len(encoded)) + encoded


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str = "", adapter: str = "") -> list[bytes]:
    """Names of all full blocks of `token_ids`, first to last."""
    return HashChain(block_size, salt, adapter).names(token_ids)


class HashChain:
    """Block names of one growing token sequence, each computed once.

    `salt` keeps tenants apart: it enters the first block's name and, by chaining, all that follow.
    """

    __slots__ = ("_array_head", "_block_size", "_names", "_tail")

    def __init__(self, block_size: int, salt: str = "", adapter: str = "") -> None:
        assert block_size > 0
        self._block_size = block_size
        # What the encodings of all blocks but the first have in common before and after the ids, names apart.
        self._array_head = _head(_ARRAY, block_size)
        self._tail = _text(salt) + _text(adapter)
        self._names: list[bytes] = []

    def names(self, token_ids: Sequence[int]) -> list[bytes]:
        """Names of the full blocks of `token_ids`, which must extend what was given before."""
        size, names = self._block_size, self._names
        full = len(token_ids) // size
        native = load_block_names() if full - len(names) >= _MIN_NATIVE_BLOCKS else None
        if native is not None:
            with contextlib.suppress(OverflowError):  # ids of more than 32 bits are for the way below
                ids = array("I", token_ids[len(names) * size : full * size])
                names += native(ids, size, names[-1] if names else None, self._tail)
        sha256, join, array_head, tail = hashlib.sha256, b"".join, self._array_head, self._tail
        parent = _CHILD_HEAD + names[-1] if names else _ROOT_HEAD
        encoded = map(_encoded_id, token_ids[len(names) * size : full * size])
        for block in zip(*(encoded,) * size, strict=True):
            name = sha256(join((parent, array_head, *block, tail))).digest()
            names.append(name)
            parent = _CHILD_HEAD + name
        return names[:full]
