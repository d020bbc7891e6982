"""Which cores of a host belong to which of its workers. Pure.

Workers of one host, in the order (group, index, rank), take equal runs of neighbouring cores; where cores are left over
the first workers get one more, where workers are more they share. A group with cores of its own shares those out; the
others share what no group has named, or everything where nothing is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Place", "plan_cores"]

_INDEX_BITS, _RANK_BITS = 32, 16


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A worker process among those of its cluster.

    Attributes:
        group: 0 for prefill, 1 for decode.
        index: number of its instance.
        rank: within the instance.
    """

    group: int
    index: int = 0
    rank: int = 0

    def pack(self) -> int:
        """As one number below 2**64."""
        assert 0 <= self.group < 1 << 16
        assert 0 <= self.index < 1 << _INDEX_BITS
        assert 0 <= self.rank < 1 << _RANK_BITS
        return (self.group << _INDEX_BITS | self.index) << _RANK_BITS | self.rank

    @staticmethod
    def unpack(packed: int) -> Place:
        """The inverse of `pack`."""
        index = packed >> _RANK_BITS & (1 << _INDEX_BITS) - 1
        return Place(packed >> _RANK_BITS + _INDEX_BITS, index, packed & (1 << _RANK_BITS) - 1)


def plan_cores(
    places: Iterable[Place], host_cores: Sequence[int], cores_of_group: Mapping[int, Sequence[int]]
) -> dict[Place, tuple[int, ...]]:
    """The cores of each worker, at least one.

    Args:
        places: the workers of this host.
        host_cores: cores that may be used, not empty.
        cores_of_group: groups that have cores of their own; cores that are not among `host_cores` do not count, and
            a group of which nothing remains is treated as if it had none.
    """
    named = {group: [core for core in cores if core in host_cores] for group, cores in cores_of_group.items()}
    named = {group: cores for group, cores in named.items() if cores}
    taken = {core for cores in named.values() for core in cores}
    others = [core for core in host_cores if core not in taken] or list(host_cores)
    workers: dict[int | None, list[Place]] = {}
    for place in sorted(places):
        workers.setdefault(place.group if place.group in named else None, []).append(place)
    plan: dict[Place, tuple[int, ...]] = {}
    for group, members in workers.items():
        plan.update(_share_out(others if group is None else named[group], members))
    return plan


def _share_out(cores: Sequence[int], members: Sequence[Place]) -> dict[Place, tuple[int, ...]]:
    each, more = divmod(len(cores), len(members))
    if each == 0:
        return {place: (cores[i % len(cores)],) for i, place in enumerate(members)}
    begins = [i * each + min(i, more) for i in range(len(members) + 1)]
    return {place: tuple(cores[begins[i] : begins[i + 1]]) for i, place in enumerate(members)}
