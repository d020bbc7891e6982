"""Idempotency keys carried out over the shared state; what to do is decided in `idempotency.py`.

    found = await once.begin(scope, body)          Claim, Replay, or an error that says why not now
    claim.add(piece); ... await claim.keep(headers) the whole answer is known, and about to be sent
    await claim.release()                           always, when the request is over; a kept answer stays

While the state is away requests are served as if they carried no key (`Claim.status` says so): a router must not stop
answering because it cannot remember. An answer that is too long, or comes when this router's share of the state is
full, is not kept; a retry computes it again, and gets the same tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from baton.errors import ConflictError, KeyReuseError, UnavailableError
from baton.metrics import Metrics
from baton.router import limits
from baton.router.idempotency import CLAIM_TTL_S, FREED, Budget, Done, Next, Running, Scope, decide, decode
from baton.state.base import SharedState

__all__ = ["AnsweredOnce", "Claim", "Replay"]

_log = logging.getLogger(__name__)
_RENEW_EVERY_S = CLAIM_TTL_S / 3
_FREED_TTL_S = 1.0
_TRIES = 3
_RETRY_AFTER_S = 1.0
_ENCODED_HERE_BYTES = 64 << 10
"""Longer answers do not hold up the event loop while they are encoded."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The request was answered before: the answer's body, and what else was said."""

    answer: bytes
    headers: Mapping[str, str]


class AnsweredOnce:
    """All idempotency keys of one router.

    Args:
        ttl_s: how long an answer is replayed.
    """

    def __init__(self, state: SharedState, metrics: Metrics, *, ttl_s: float) -> None:
        self.state = state
        self.metrics = metrics
        self.ttl_s = ttl_s
        self.budget = Budget(max_bytes=limits.MAX_KEPT_ANSWERS_BYTES, ttl_s=ttl_s)

    async def begin(self, scope: Scope, body: bytes) -> Claim | Replay:
        """Claims the key for a request with this body, or finds its answer.

        Raises:
            ConflictError: the same request is in work.
            KeyReuseError: the key stands for another body.
        """
        digest = sha256(body).digest()
        claim = Claim(self, scope.record_key, digest)
        try:
            found = await self._claim(claim, digest)
        except UnavailableError as error:
            _log.warning("an idempotency key is not honoured: %s", error.message)
            claim.status = "unavailable"
            self.count("unavailable")
            return claim
        if isinstance(found, Replay):
            self.count("replayed")
        else:
            self.count("claimed")
            found.start()
        return found

    def count(self, outcome: str) -> None:
        """One more of this kind in the metrics."""
        self.metrics.idempotency.labels(outcome=outcome).inc()

    async def _claim(self, claim: Claim, digest: bytes) -> Claim | Replay:
        for _ in range(_TRIES):
            there = await self.state.put_new(claim.key, claim.record, ttl_s=CLAIM_TTL_S)
            if there is None:
                return claim
            match decide(there, digest):
                case Next.TAKE:
                    if await self.state.replace(claim.key, there, claim.record, ttl_s=CLAIM_TTL_S):
                        return claim
                case Next.REPLAY:
                    done = decode(there)
                    assert isinstance(done, Done)
                    return Replay(done.answer, done.headers)
                case Next.REFUSE:
                    self.count("refused")
                    raise KeyReuseError(
                        "this Idempotency-Key was used with another body; a new request needs a new key",
                        param="Idempotency-Key",
                    )
                case Next.WAIT:
                    break
        self.count("busy")
        raise ConflictError(
            f"a request with this Idempotency-Key is in work; ask again in {_RETRY_AFTER_S:.0f} s for its answer",
            retry_after_s=_RETRY_AFTER_S,
        )


class Claim:
    """The right of one request to answer for its key.

    Attributes:
        status: "" where all is as it should be, else why a retry may compute again: "unavailable" (the shared state
            is away) or "not-kept" (the answer is too long, or there is no room for it).
    """

    def __init__(self, once: AnsweredOnce, key: str, digest: bytes) -> None:
        self._once = once
        self.key = key
        self.record = Running(os.urandom(16), digest).encode()
        self.status = ""
        self._digest = digest
        # One buffer: pieces by themselves would be some hundred small objects that keep each other's pages in use.
        self._body = bytearray()
        self._num_bytes = 0
        self._is_held = self._is_over = False
        self._renewal: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Keeps the claim alive until `release`."""
        self._is_held = True
        self._renewal = asyncio.create_task(self._renew(), name="idempotency claim")

    def add(self, piece: bytes) -> None:
        """A piece of the answer's body, in order."""
        self._num_bytes += len(piece)
        if self._num_bytes <= limits.MAX_KEPT_ANSWER_BYTES:
            self._body += piece
        else:
            self._body.clear()

    async def keep(self, headers: Mapping[str, str]) -> None:
        """The pieces are the whole answer: who asks again with this key gets them."""
        if not self._is_held:
            return
        self._stop_renewal()
        once = self._once
        record = await self._done_record(headers)
        if record is None or not once.budget.take(len(record), asyncio.get_running_loop().time()):
            self.status = "not-kept"
            once.count("not_kept")
            return
        try:
            self._is_over = await once.state.replace(self.key, self.record, record, ttl_s=once.ttl_s)
        except UnavailableError as error:
            _log.warning("an answer is not kept for its idempotency key: %s", error.message)
        if not self._is_over:
            self.status = "unavailable"
            once.count("not_kept")

    async def _done_record(self, headers: Mapping[str, str]) -> bytes | None:
        if self._num_bytes > limits.MAX_KEPT_ANSWER_BYTES:
            return None
        done = Done(self._digest, bytes(self._body), headers)
        # To deflate takes some 5 us for each KiB.
        return done.encode() if self._num_bytes <= _ENCODED_HERE_BYTES else await asyncio.to_thread(done.encode)

    async def release(self) -> None:
        """The request is over; without a kept answer the key is free again. May be called again."""
        if not self._is_held or self._is_over:
            self._stop_renewal()
            return
        self._is_over = True
        self._stop_renewal()
        with contextlib.suppress(UnavailableError):  # then it ends by itself, soon
            await self._once.state.replace(self.key, self.record, FREED, ttl_s=_FREED_TTL_S)

    def _stop_renewal(self) -> None:
        # The task holds this claim, and with it the answer.
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.cancel()

    async def _renew(self) -> None:
        state = self._once.state
        while True:
            await asyncio.sleep(_RENEW_EVERY_S)
            try:
                if await state.replace(self.key, self.record, self.record, ttl_s=CLAIM_TTL_S):
                    continue
                # The state was emptied, or this process stood still.
                if await state.put_new(self.key, self.record, ttl_s=CLAIM_TTL_S) is None:
                    continue
            except UnavailableError:
                continue
            _log.warning("another router has taken over an idempotency key that is in work here")
            self._once.count("lost")
            return
