"""Tenants' token rates: local buckets, or leases on buckets in the shared state, so that all routers count together.

    request --held by this router's lease--> taken at once; the lease is filled up behind it
            --not held--> asks the state for what is missing and a little more
                            |--granted----> taken
                            |--too little-> refused until then, without asking again for a while
                            `--away-------> this router's part of the limit, from a bucket of its own

So Redis is asked a few times a second for each busy tenant, and its loss changes who counts, not whether requests go.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from baton.errors import UnavailableError
from baton.router.admission.rate_limit import RateLimit, TokenBucket
from baton.router.admission.tenants import Tenant
from baton.state.base import SharedState

__all__ = ["TokenRates"]

_LEASE_S = 0.2
"""A lease is filled with what the limit yields in so long."""
_MAX_LEASE_OF_BURST = 1 / 8
_ASK_AGAIN_S = 0.05
"""After the state has given all that it had."""
_GROUP = "limits/"


@dataclass(slots=True)
class _Lease:
    """What this router may still use of a tenant's tokens."""

    bucket: TokenBucket
    held: float = 0.0
    empty_until_s: float = 0.0
    is_filling: bool = False


class TokenRates:
    """Takes and gives back tokens of tenants that have a limit.

    Args:
        state: None: this router counts alone.
        max_tenants: leases and buckets kept; the longest unused go first.
        num_routers: that share a limit while the state is away.
    """

    def __init__(self, state: SharedState | None, *, max_tenants: int, num_routers: int = 1) -> None:
        self._state = state
        self._max_tenants = max_tenants
        self._leases: OrderedDict[str, _Lease] = OrderedDict()
        self._background: set[asyncio.Task[None]] = set()
        self.num_routers = num_routers

    async def take(self, tenant: Tenant, tokens: float, now_s: float) -> float:
        """Takes them and returns 0, or takes nothing and returns how long to wait in seconds."""
        limit = tenant.limit
        if limit is None:
            return 0.0
        lease = self._lease(tenant.name, limit, now_s)
        if self._state is None:
            return lease.bucket.take(tokens, now_s)
        if lease.held >= tokens:
            lease.held -= tokens
            if lease.held < _most_held(limit) / 2 and not lease.is_filling and now_s >= lease.empty_until_s:
                lease.is_filling = True
                self._spawn(self._fill(tenant.name, limit, lease, now_s))
            return 0.0
        if now_s < lease.empty_until_s:
            return lease.empty_until_s - now_s
        part, lease.held = lease.held, 0.0
        missing = tokens - part
        most = missing + _most_held(limit)
        try:
            granted, wait_s = await self._ask(tenant.name, limit, missing, most)
        except UnavailableError:
            lease.held += part
            lease.bucket.limit = limit.over(1 / max(self.num_routers, 1))
            return lease.bucket.take(tokens, now_s)
        except asyncio.CancelledError:
            lease.held += part
            raise
        if wait_s > 0:
            lease.held += part
            lease.empty_until_s = now_s + min(wait_s, _ASK_AGAIN_S)
            return wait_s
        lease.held += granted - missing
        if granted < most:
            lease.empty_until_s = now_s + _ASK_AGAIN_S
        return 0.0

    def missing_s(self, tenant: Tenant, tokens: float, now_s: float) -> float:
        """How long until they can be there, as far as this router knows by itself; 0: perhaps now. Takes nothing."""
        limit = tenant.limit
        if limit is None:
            return 0.0
        lease = self._lease(tenant.name, limit, now_s)
        if self._state is None:
            return lease.bucket.wait_s(tokens, now_s)
        return 0.0 if lease.held >= tokens else max(lease.empty_until_s - now_s, 0.0)

    def refund(self, tenant: Tenant, tokens: float, now_s: float) -> None:
        """Give back what was taken and not used."""
        limit = tenant.limit
        if limit is None or tokens <= 0:
            return
        lease = self._lease(tenant.name, limit, now_s)
        if self._state is None:
            lease.bucket.refund(tokens, now_s)
            return
        lease.held += tokens
        if lease.held > 2 * _most_held(limit):
            excess, lease.held = lease.held - _most_held(limit), _most_held(limit)
            self._spawn(self._give_back(tenant.name, limit, excess))

    async def close(self) -> None:
        """Ends what runs behind."""
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def _lease(self, name: str, limit: RateLimit, now_s: float) -> _Lease:
        lease = self._leases.get(name)
        if lease is None:
            own = limit if self._state is None else limit.over(1 / max(self.num_routers, 1))
            lease = self._leases[name] = _Lease(TokenBucket(own, now_s=now_s))
            if len(self._leases) > self._max_tenants:
                self._leases.popitem(last=False)
        self._leases.move_to_end(name)
        return lease

    async def _ask(self, name: str, limit: RateLimit, least: float, most: float) -> tuple[float, float]:
        assert self._state is not None
        return await self._state.take_tokens(
            _GROUP + (name or "-"),
            least=least,
            most=most,
            tokens_per_s=limit.tokens_per_s,
            burst_tokens=limit.burst_tokens,
        )

    async def _fill(self, name: str, limit: RateLimit, lease: _Lease, now_s: float) -> None:
        try:
            granted, _ = await self._ask(name, limit, 0.0, _most_held(limit))
            lease.held += granted
            if granted < _most_held(limit):
                lease.empty_until_s = now_s + _ASK_AGAIN_S
        except UnavailableError:
            pass  # the state itself logs that it is away; the next request without tokens finds out
        finally:
            lease.is_filling = False

    async def _give_back(self, name: str, limit: RateLimit, tokens: float) -> None:
        assert self._state is not None
        try:
            await self._state.return_tokens(_GROUP + (name or "-"), tokens, burst_tokens=limit.burst_tokens)
        except UnavailableError:
            return  # as if they had been used: a limit is never passed by what was lost

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _most_held(limit: RateLimit) -> float:
    return min(limit.tokens_per_s * _LEASE_S, limit.burst_tokens * _MAX_LEASE_OF_BURST)
