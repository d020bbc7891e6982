"""Whose request it is, and what that tenant may use: pure. So many names are told apart, and no more.

A name that the configuration does not know gets the default limits and, while there is room, an account of its own;
those that come when there is none share one, "other". An account that is at rest makes room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from baton.router.admission.rate_limit import RateLimit

__all__ = ["OTHER", "Tenant", "Tenants"]

OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """An account; "" is that of requests that name nobody."""

    name: str
    weight: float = 1.0
    limit: RateLimit | None = None
    max_queued_requests: int = 1 << 30


class Tenants:
    """Accounts by name.

    Args:
        known: those of the configuration; they always have one of their own.
        default: what every other name gets, under its name.
        max_tenants: accounts in all, known ones included.
    """

    def __init__(self, known: Mapping[str, Tenant], default: Tenant, *, max_tenants: int) -> None:
        self._known = dict(known)
        self._default = default
        self._room = max(max_tenants - len(known), 0)
        self._seen: OrderedDict[str, int] = OrderedDict()
        """Requests in hand by name, the one at rest for longest first."""

    def enter(self, name: str) -> Tenant:
        """The account for a request that comes; `leave` it under the account's name when the request ends."""
        if name in self._known:
            return self._known[name]
        if name not in self._seen and name != OTHER:
            if len(self._seen) >= self._room and not self._make_room():
                name = OTHER
            else:
                self._seen[name] = 0
        if name != OTHER:
            self._seen[name] += 1
            self._seen.move_to_end(name)
        default = self._default
        return Tenant(
            name=name, weight=default.weight, limit=default.limit, max_queued_requests=default.max_queued_requests
        )

    def leave(self, name: str) -> None:
        """One of its requests ended."""
        if name in self._seen:
            self._seen[name] -= 1
            assert self._seen[name] >= 0, name

    def _make_room(self) -> bool:
        # The oldest few: one that is at rest is nearly always among them.
        for name in list(self._seen)[:16]:
            if not self._seen[name]:
                del self._seen[name]
                return True
        return False
