"""What an idempotency key stands for, and what a request that carries one is to do: pure.

    absent --claim--> running --answered--> done --time to live--> absent
                        |  ^renewed by its router while the request runs
                        +--router died (not renewed), failed, client left--> absent: it runs again

A record is the value under one key of the shared state. A running one holds a random claim id, so that a router that
lost its claim (its event loop stood still for longer than `CLAIM_TTL_S`) can neither renew nor finish what another one
has taken over: every change of a record names the bytes it replaces. A done one holds the answer as it was sent,
deflated: events of a stream are much alike, and take a tenth to a twentieth of their length.

Records belong to one caller (API key) and one endpoint. The body's digest is kept, since a key that comes with another
body is a client's mistake (draft-ietf-httpapi-idempotency-key-header, section 2.6). Where a request sends no seed, it
is drawn from its key: a request that runs again writes the same tokens again.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256

from baton.errors import InvalidRequestError
from baton.router import limits

__all__ = [
    "CLAIM_TTL_S",
    "FREED",
    "Budget",
    "Done",
    "Next",
    "Running",
    "Scope",
    "check_key",
    "decide",
    "decode",
]

CLAIM_TTL_S = 3.0
"""How long a claim outlives the router that stopped renewing it."""
FREED = b"F"
"""In place of a claim that was given up: as good as nothing, and replaced in one step."""
_RUNNING, _DONE = b"R", b"D"
_DIGEST_BYTES = 32
_CLAIM_BYTES = 16
_META_LENGTH = struct.Struct(">I")
_RECORD_OVERHEAD_BYTES = 512


def check_key(key: str) -> str:
    """`key` itself.

    Raises:
        InvalidRequestError: it is empty, too long, or not visible ASCII.
    """
    if not 0 < len(key) <= limits.MAX_IDEMPOTENCY_KEY_CHARS or not all("!" <= char <= "~" for char in key):
        raise InvalidRequestError(
            f"Idempotency-Key must be 1 to {limits.MAX_IDEMPOTENCY_KEY_CHARS} visible ASCII characters,"
            f" got {len(key)} characters",
            param="Idempotency-Key",
        )
    return key


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose key it is, for what.

    Attributes:
        caller: the API key, or nothing.
        endpoint: for example the path.
        key: checked, see `check_key`.
    """

    caller: bytes
    endpoint: str
    key: str

    @property
    def record_key(self) -> str:
        """The key in the shared state; tells nothing of what it is made of."""
        return f"idempotency/{self._hash(b'record').hex()}"

    @property
    def seed(self) -> int:
        """64 bits for a request that sends no seed."""
        return int.from_bytes(self._hash(b"seed")[:8], "big")

    def _hash(self, purpose: bytes) -> bytes:
        # Digests have one length: no two triples run together.
        parts = (purpose, self.caller, self.endpoint.encode(), self.key.encode())
        return sha256(b"".join(sha256(part).digest() for part in parts)).digest()


@dataclass(frozen=True, slots=True)
class Running:
    """A request is in work.

    Attributes:
        claim: 16 random bytes of the attempt that runs.
        digest: SHA-256 of the body.
    """

    claim: bytes
    digest: bytes

    def encode(self) -> bytes:
        """The record."""
        assert len(self.claim) == _CLAIM_BYTES
        assert len(self.digest) == _DIGEST_BYTES
        return _RUNNING + self.claim + self.digest


@dataclass(frozen=True, slots=True)
class Done:
    """A request has been answered.

    Attributes:
        digest: SHA-256 of its body.
        answer: the answer's body as sent.
        headers: what the answer says besides.
    """

    digest: bytes
    answer: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The record."""
        assert len(self.digest) == _DIGEST_BYTES
        meta = json.dumps(dict(self.headers)).encode()
        return _DONE + self.digest + _META_LENGTH.pack(len(meta)) + meta + zlib.compress(self.answer, zlib.Z_BEST_SPEED)


def decode(record: bytes) -> Running | Done | None:
    """What `record` says; None where it was given up or is none of ours."""
    kind, rest = record[:1], record[1:]
    if kind == _RUNNING and len(rest) == _CLAIM_BYTES + _DIGEST_BYTES:
        return Running(rest[:_CLAIM_BYTES], rest[_CLAIM_BYTES:])
    if kind == _DONE and len(rest) >= _DIGEST_BYTES + _META_LENGTH.size:
        digest, rest = rest[:_DIGEST_BYTES], rest[_DIGEST_BYTES:]
        begin = _META_LENGTH.size
        end = begin + _META_LENGTH.unpack(rest[:begin])[0]
        inflate = zlib.decompressobj()
        try:
            headers = json.loads(rest[begin:end])
            answer = inflate.decompress(rest[end:], limits.MAX_KEPT_ANSWER_BYTES + 1)
        except (ValueError, zlib.error):
            return None
        if not inflate.eof:
            return None
        if isinstance(headers, dict) and all(isinstance(value, str) for value in headers.values()):
            return Done(digest, answer, headers)
    return None


class Next(Enum):
    """What a request does that found a record."""

    TAKE = "take"  # put a claim in the record's place, and run
    REPLAY = "replay"
    WAIT = "wait"  # refuse: the same request is in work
    REFUSE = "refuse"  # the key stands for another body


def decide(record: bytes, digest: bytes) -> Next:
    """What a request with a body of this digest does that found `record`."""
    there = decode(record)
    if there is None:
        return Next.TAKE
    if there.digest != digest:
        return Next.REFUSE
    return Next.REPLAY if isinstance(there, Done) else Next.WAIT


class Budget:
    """How many bytes of records of answers one router keeps in the shared state.

    Args:
        ttl_s: how long each stays there.
    """

    def __init__(self, *, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._kept: deque[tuple[float, int]] = deque()
        self._num_bytes = 0

    def take(self, num_bytes: int, now_s: float) -> bool:
        """Whether a record of so many bytes may be kept; if so it counts until its time is over."""
        while self._kept and self._kept[0][0] <= now_s:
            self._num_bytes -= self._kept.popleft()[1]
        num_bytes += _RECORD_OVERHEAD_BYTES
        if self._num_bytes + num_bytes > self._max_bytes:
            return False
        self._num_bytes += num_bytes
        self._kept.append((now_s + self._ttl_s, num_bytes))
        return True
