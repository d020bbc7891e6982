"""Where the ranks of one start of an instance find their driver. Pure.

    instance  --first call with a new start id--> waiting --driver tells its address--> met
              a start id that was replaced is over for good: what is left of it never meets the ranks of the next start

Bounded: one present start per instance, a limited number of instances, and a limited memory of starts that are over.
"""

from __future__ import annotations

from collections import deque

__all__ = ["Rendezvous"]

_INSTANCE_LIMIT = 4096
_OVER_LIMIT = 4096


class Rendezvous:
    """Driver addresses by (instance, start)."""

    def __init__(self) -> None:
        # instance id -> (start id, driver's address or "")
        self._present: dict[str, tuple[str, str]] = {}
        self._over: deque[tuple[str, str]] = deque(maxlen=_OVER_LIMIT)

    def enter(self, instance_id: str, start_id: str) -> str:
        """Make `start_id` the present start of its instance. Returns why it cannot be, or the empty string."""
        if (instance_id, start_id) in self._over:
            return f"start {start_id} of {instance_id} is over; another one took its place"
        known = self._present.get(instance_id)
        if known is not None and known[0] == start_id:
            return ""
        if known is None and len(self._present) >= _INSTANCE_LIMIT:
            return f"{_INSTANCE_LIMIT} instances are known already; {instance_id} is one too many"
        if known is not None:
            self._over.append((instance_id, known[0]))
        self._present[instance_id] = (start_id, "")
        return ""

    def tell(self, instance_id: str, start_id: str, address: str) -> None:
        """Note the driver's address of the present start."""
        assert self._present[instance_id][0] == start_id, (instance_id, start_id)
        self._present[instance_id] = (start_id, address)

    def address(self, instance_id: str, start_id: str) -> str | None:
        """The driver's address; empty while it is not known, None when this start is over."""
        known = self._present.get(instance_id)
        return known[1] if known is not None and known[0] == start_id else None

    def forget(self, instance_id: str) -> None:
        """Drop an instance that is no longer wanted."""
        known = self._present.pop(instance_id, None)
        if known is not None:
            self._over.append((instance_id, known[0]))
