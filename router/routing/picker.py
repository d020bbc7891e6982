"""Who is taken among scored candidates: pure.

highest       the highest sum; ties by fewest requests of this router, then by name
round_robin   one after another in the order of names, by the number of this choice
at_random     by a hash of the request's id: the same request goes to the same worker of the same set
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from baton.router.routing.facts import InstanceView, RequestFacts

__all__ = ["Picker", "at_random", "highest", "round_robin"]

Picker = Callable[[Sequence[InstanceView], Sequence[float], RequestFacts], int]
"""(candidates, their sums, the request) -> the index of who is taken."""


def highest(candidates: Sequence[InstanceView], totals: Sequence[float], facts: RequestFacts) -> int:
    """The best by weighted sum."""
    best = max(totals)
    tied = [index for index, total in enumerate(totals) if total == best]
    if len(tied) == 1:
        return tied[0]
    return min(tied, key=lambda index: (candidates[index].own_requests, candidates[index].instance_id))


def round_robin(candidates: Sequence[InstanceView], totals: Sequence[float], facts: RequestFacts) -> int:
    """The next one by name."""
    return _by_name(candidates, facts.turn)


def at_random(candidates: Sequence[InstanceView], totals: Sequence[float], facts: RequestFacts) -> int:
    """Any, equally likely."""
    digest = hashlib.blake2b(facts.request_id.encode(), digest_size=8).digest()
    return _by_name(candidates, int.from_bytes(digest, "big"))


def _by_name(candidates: Sequence[InstanceView], number: int) -> int:
    order = sorted(range(len(candidates)), key=lambda index: candidates[index].instance_id)
    return order[number % len(order)]
