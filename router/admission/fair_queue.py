"""Who is next: pure. Classes by priority within their shares, tenants of a class by weight, each tenant's own in order.

    class    the most urgent one that waits, unless another is behind its share by more than LEAD_TOKENS: shares hold
             under any load, and within them priority decides at once
    tenant   start-time fair queueing: the one whose tag, tokens of work over its weight, is least
    entry    a tenant's own, by (priority, arrival)

A tag is where a flow stands on the clock of its level. A tenant that comes back after a pause starts at most
CREDIT_TOKENS behind that clock: who keeps within its share is served at once, bursts and all, and nobody saves up more.
A tag moves as entries are taken, and is put right (`settle`) once it is known what they took. Nothing is taken around
the head: what does not fit yet is waited for. Only whoever may have nothing more for now, whatever is free, is passed
over (`without`), and waits by himself.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["CREDIT_TOKENS", "LEAD_TOKENS", "FairQueue", "Waiting"]

LEAD_TOKENS = 16_384
"""How far a more urgent class may run ahead of its share while others wait."""
CREDIT_TOKENS = 8192
"""How far behind the others a tenant of weight 1 may start; in tokens over its weight."""
_COMPACT_ABOVE = 64

_Item = TypeVar("_Item")


@dataclass(slots=True, eq=False)
class Waiting(Generic[_Item]):
    """One entry; `is_queued` until it is taken or removed."""

    item: _Item
    class_name: str
    tenant: str
    cost: float
    order: tuple[int, int]
    is_queued: bool = True


@dataclass(slots=True)
class _Flow(Generic[_Item]):
    """A tenant's entries in one class, a heap with removed ones still in it."""

    weight: float
    tag: float = 0.0
    entries: list[tuple[tuple[int, int], Waiting[_Item]]] = field(default_factory=list)
    num_queued: int = 0
    cost: float = 0.0

    def head(self) -> Waiting[_Item]:
        """The first entry; there is one."""
        while not self.entries[0][1].is_queued:
            heapq.heappop(self.entries)
        return self.entries[0][1]

    def compact(self) -> None:
        """Keep removed entries from piling up."""
        if len(self.entries) > _COMPACT_ABOVE + 2 * self.num_queued:
            self.entries = [entry for entry in self.entries if entry[1].is_queued]
            heapq.heapify(self.entries)


@dataclass(slots=True)
class _Class(Generic[_Item]):
    name: str
    priority: int
    weight: float
    tag: float = 0.0
    clock: float = 0.0
    num_queued: int = 0
    cost: float = 0.0
    flows: dict[str, _Flow[_Item]] = field(default_factory=dict)
    """Those that have entries, or are ahead of the clock."""
    by_tag: list[tuple[float, str]] = field(default_factory=list)
    """A heap; a flow's present tag is among it, old ones are passed over."""
    forget_above: int = _COMPACT_ABOVE

    @property
    def earliest(self) -> float:
        """The tag of a flow that comes back."""
        return self.clock - CREDIT_TOKENS

    def first_flow(self, without: Collection[str] = ()) -> tuple[str, _Flow[_Item]] | None:
        """The flow to take from; None: nobody else waits."""
        passed = []
        found = None
        while self.by_tag:
            tag, tenant = self.by_tag[0]
            flow = self.flows.get(tenant)
            is_present = flow is not None and flow.num_queued and flow.tag == tag
            if is_present and tenant not in without:
                assert flow is not None
                found = tenant, flow
                break
            heapq.heappop(self.by_tag)
            if is_present:
                passed.append((tag, tenant))
        for each in passed:
            heapq.heappush(self.by_tag, each)
        return found

    def num_queued_without(self, tenants: Collection[str]) -> int:
        """Entries of all other tenants."""
        flows = (self.flows.get(tenant) for tenant in tenants)
        return self.num_queued - sum(flow.num_queued for flow in flows if flow is not None)

    def push(self, tenant: str, flow: _Flow[_Item]) -> None:
        """Its tag is new, or it has entries again."""
        heapq.heappush(self.by_tag, (flow.tag, tenant))
        if len(self.by_tag) > _COMPACT_ABOVE + 2 * len(self.flows):
            self.by_tag = [(each.tag, name) for name, each in self.flows.items() if each.num_queued]
            heapq.heapify(self.by_tag)


class FairQueue(Generic[_Item]):
    """Entries that wait, and who is next.

    Args:
        classes: name -> (priority, weight); lower priorities are more urgent.
    """

    def __init__(self, classes: dict[str, tuple[int, float]]) -> None:
        assert classes
        self._classes: dict[str, _Class[_Item]] = {
            name: _Class(name, priority, weight) for name, (priority, weight) in classes.items()
        }
        self._clock = 0.0
        self._numbers = itertools.count()
        self._num_queued: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(each.num_queued for each in self._classes.values())

    def __bool__(self) -> bool:
        return any(each.num_queued for each in self._classes.values())

    def __iter__(self) -> Iterator[Waiting[_Item]]:
        """All entries, in no order."""
        for each in self._classes.values():
            for flow in each.flows.values():
                yield from (entry for _, entry in flow.entries if entry.is_queued)

    @property
    def cost(self) -> float:
        """Tokens of work of all entries."""
        return sum(each.cost for each in self._classes.values())

    def num_in_class(self, class_name: str) -> int:
        """Entries of a class."""
        return self._classes[class_name].num_queued

    def num_of_tenant(self, tenant: str) -> int:
        """Entries of a tenant, in all classes."""
        return self._num_queued.get(tenant, 0)

    def push(
        self, item: _Item, *, class_name: str, tenant: str, weight: float, cost: float, priority: int = 0
    ) -> Waiting[_Item]:
        """Append an entry of `cost` tokens of work."""
        assert cost > 0, cost
        assert weight > 0, weight
        entry = Waiting(item, class_name, tenant, cost, (priority, next(self._numbers)))
        group = self._classes[class_name]
        if not group.num_queued:
            group.tag = max(group.tag, self._clock)
        flow = group.flows.setdefault(tenant, _Flow(weight, group.earliest))
        flow.weight = weight
        if not flow.num_queued:
            flow.tag = max(flow.tag, group.earliest)
            flow.num_queued = 1
            group.push(tenant, flow)
        else:
            flow.num_queued += 1
        heapq.heappush(flow.entries, (entry.order, entry))
        flow.cost += cost
        group.num_queued += 1
        group.cost += cost
        self._num_queued[tenant] = self._num_queued.get(tenant, 0) + 1
        return entry

    def head(self, without: Collection[str] = ()) -> Waiting[_Item] | None:
        """Who is next, these tenants passed over."""
        group = self._next_class(without)
        first = None if group is None else group.first_flow(without)
        return None if first is None else first[1].head()

    def take(self, without: Collection[str] = ()) -> Waiting[_Item]:
        """Remove and return the next one, these tenants passed over, on its tenant's and its class's account."""
        entry = self.head(without)
        assert entry is not None, "nothing waits"
        group = self._classes[entry.class_name]
        tenant, flow = entry.tenant, group.flows[entry.tenant]
        # Who was passed over for long has saved up no more than who was away.
        flow.tag = max(flow.tag, group.earliest)
        self._clock = max(self._clock, min(each.tag for each in self._classes.values() if each.num_queued))
        group.clock = max(group.clock, flow.tag)
        self._drop(entry)
        group.tag += entry.cost / group.weight
        flow.tag += entry.cost / flow.weight
        if flow.num_queued:
            group.push(tenant, flow)
        self._forget_idle(group)
        return entry

    def remove(self, entry: Waiting[_Item]) -> None:
        """Take an entry out that will not be served; costs its tenant nothing."""
        if entry.is_queued:
            self._drop(entry)
            group = self._classes[entry.class_name]
            group.flows[entry.tenant].compact()
            self._forget_idle(group)

    def settle(self, *, class_name: str, tenant: str, tokens: float) -> None:
        """What was taken cost `tokens` more than was thought; less where negative."""
        group = self._classes[class_name]
        group.tag = max(group.tag + tokens / group.weight, self._clock)
        flow = group.flows.get(tenant)
        if flow is None:
            return  # nobody waits, or it is long ago
        tag = max(flow.tag + tokens / flow.weight, group.earliest)
        if tag != flow.tag:
            flow.tag = tag
            if flow.num_queued:
                group.push(tenant, flow)

    def work_ahead(self, *, class_name: str, tenant: str, weight: float) -> float:
        """Tokens of work that would be taken before a new entry of this tenant, if nothing else came."""
        group = self._classes[class_name]
        own = group.flows.get(tenant)
        start = max(own.tag, group.earliest) if own is not None else group.earliest
        if own is not None:
            start += own.cost / weight
        ahead = sum(
            min(flow.cost, max(start - max(flow.tag, group.earliest), 0.0) * flow.weight)
            for flow in group.flows.values()
            if flow.num_queued
        )
        class_start = max(group.tag, self._clock) + ahead / group.weight
        for other in self._classes.values():
            if other is group or not other.num_queued:
                continue
            start_there, lead = class_start, 0.0
            if other.priority < group.priority:
                lead = LEAD_TOKENS
            elif other.priority > group.priority:
                start_there -= LEAD_TOKENS / group.weight
            ahead += min(other.cost, max(start_there - other.tag, 0.0) * other.weight + lead)
        return ahead

    def _next_class(self, without: Collection[str]) -> _Class[_Item] | None:
        waiting = [each for each in self._classes.values() if each.num_queued]
        if without:
            waiting = [each for each in waiting if each.num_queued_without(without)]
        if not waiting:
            return None
        if len(waiting) == 1:
            return waiting[0]
        behind = min(waiting, key=lambda each: each.tag)
        near = [each for each in waiting if (each.tag - behind.tag) * each.weight <= LEAD_TOKENS]
        return min(near, key=lambda each: (each.priority, each.tag))

    def _drop(self, entry: Waiting[_Item]) -> None:
        assert entry.is_queued
        entry.is_queued = False
        group = self._classes[entry.class_name]
        flow = group.flows[entry.tenant]
        for level in (flow, group):
            level.num_queued -= 1
            level.cost = level.cost - entry.cost if level.num_queued else 0.0
        if not flow.num_queued:
            flow.entries.clear()
        left = self._num_queued[entry.tenant] - 1
        if left:
            self._num_queued[entry.tenant] = left
        else:
            del self._num_queued[entry.tenant]

    def _forget_idle(self, group: _Class[_Item]) -> None:
        """Flows without entries stay only while their tag says that they have had their share."""
        if not group.num_queued:
            group.flows.clear()
            group.by_tag.clear()
            group.forget_above = _COMPACT_ABOVE
            return
        if len(group.flows) > group.forget_above:
            at_rest = [name for name, flow in group.flows.items() if not flow.num_queued and flow.tag <= group.earliest]
            for name in at_rest:
                del group.flows[name]
            group.forget_above = _COMPACT_ABOVE + 2 * len(group.flows)
