"""Who is in the cluster: leases, incarnations and a version that moves at each change. Pure; time is an argument.

An instance holds its place as long as it announces itself within the lease. A new incarnation under the same id
replaces the old one at once, and the old one can never come back: a process that was declared gone and speaks again
is ignored. `value` is opaque; `content` is what counts as a change (loads move all the time and do not).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Entry", "RegistryState"]

T = TypeVar("T")

_RETIRED_LIMIT = 4096


@dataclass(slots=True)
class Entry(Generic[T]):
    """One live instance. `expires_s` is on the caller's clock."""

    incarnation: bytes
    content: bytes
    value: T
    expires_s: float


class RegistryState(Generic[T]):
    """The table behind the registry; `lease_s` is how long one announcement holds."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.version = 1
        self._entries: dict[str, Entry[T]] = {}
        self._retired: deque[tuple[str, bytes]] = deque(maxlen=_RETIRED_LIMIT)
        self._silent_since_s: dict[str, float] = {}

    def announce(self, instance_id: str, incarnation: bytes, content: bytes, value: T, now_s: float) -> bool:
        """Take an announcement. False when it comes from an incarnation that was replaced or removed before."""
        if (instance_id, incarnation) in self._retired:
            return False
        entry = self._entries.get(instance_id)
        if entry is not None and entry.incarnation != incarnation:
            self._retired.append((instance_id, entry.incarnation))
        if entry is None or entry.incarnation != incarnation or entry.content != content:
            self.version += 1
        self._silent_since_s.pop(instance_id, None)
        self._entries[instance_id] = Entry(incarnation, content, value, now_s + self.lease_s)
        return True

    def remove(self, instance_id: str) -> bool:
        """Forget an instance for good, for example because its process ended. False when it was not there."""
        entry = self._entries.pop(instance_id, None)
        self._silent_since_s.pop(instance_id, None)
        if entry is None:
            return False
        self._retired.append((instance_id, entry.incarnation))
        self.version += 1
        return True

    def expire(self, now_s: float) -> list[str]:
        """Drop and return the instances whose lease ran out.

        Unlike `remove` this is not for good: an incarnation that was only silent may announce itself again.
        """
        gone = [instance_id for instance_id, entry in self._entries.items() if entry.expires_s <= now_s]
        for instance_id in gone:
            self._silent_since_s[instance_id] = self._entries.pop(instance_id).expires_s
        self.version += bool(gone)
        return gone

    def extend(self, by_s: float) -> None:
        """Nobody could be heard for so long: no lease ran meanwhile, and no silence counts."""
        for entry in self._entries.values():
            entry.expires_s += by_s
        for instance_id in self._silent_since_s:
            self._silent_since_s[instance_id] += by_s

    def expect(self, instance_id: str, now_s: float) -> None:
        """An instance that runs and was never heard of here is silent from now on, until it speaks or is removed."""
        if instance_id not in self._entries:
            self._silent_since_s.setdefault(instance_id, now_s)

    def silent_for(self, now_s: float) -> dict[str, float]:
        """Instances that said nothing since their lease ran out, or since they are expected, and for how long, in s."""
        return {instance_id: now_s - since_s for instance_id, since_s in self._silent_since_s.items()}

    def values(self) -> dict[str, T]:
        """Live instances by id, in order of first announcement."""
        return {instance_id: entry.value for instance_id, entry in self._entries.items()}
