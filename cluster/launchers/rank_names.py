"""Under which names Ray knows what a cluster has started, and what they tell a controller that begins anew. Pure.

    actor of a rank             <cluster>/<run>/<instance>/rank<r>
    placement group of a stage  <cluster>/<run>/<instance>/stage<s>

A run is one `baton up`; its controllers follow one another. Ray gives a name to one live actor only, so two controllers
that overlap for a moment cannot both start the same rank. An instance is whole when every rank and every group of it is
there; what is left of one that is not, and of other runs, is in the way of the next start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from baton.cluster.controller import role_of

__all__ = ["Leftovers", "Shape", "actor_name", "group_name", "prefix_of", "sort_out"]

_RANK, _STAGE = "rank", "stage"


@dataclass(frozen=True, slots=True)
class Shape:
    """How many actors and placement groups an instance of some role consists of."""

    num_ranks: int
    num_groups: int


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What earlier controllers started.

    Attributes:
        whole: instances of this run of which nothing is missing.
        actors, groups: names of all the rest, to be ended and removed.
    """

    whole: list[str] = field(default_factory=list)
    actors: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


def prefix_of(cluster: str, run: str = "") -> str:
    """What every name of a cluster begins with, or of one run of it."""
    return f"{cluster}/{run}/" if run else f"{cluster}/"


def actor_name(cluster: str, run: str, instance_id: str, rank: int) -> str:
    """The name of a rank's actor."""
    return f"{prefix_of(cluster, run)}{instance_id}/{_RANK}{rank}"


def group_name(cluster: str, run: str, instance_id: str, stage: int) -> str:
    """The name of a stage's placement group."""
    return f"{prefix_of(cluster, run)}{instance_id}/{_STAGE}{stage}"


def sort_out(
    cluster: str, run: str | None, actors: Iterable[str], groups: Iterable[str], shape_of: Callable[[str], Shape]
) -> Leftovers:
    """Tell whole instances of this run from what else the cluster has left; names of other clusters are no concern.

    Args:
        run: None: no run goes on, nothing is whole.
        actors, groups: every name that Ray knows.
        shape_of: by role.
    """
    own_actors = [name for name in actors if name.startswith(prefix_of(cluster))]
    own_groups = [name for name in groups if name.startswith(prefix_of(cluster))]
    if run is None:
        return Leftovers([], sorted(own_actors), sorted(own_groups))
    ranks, stages = _numbers(own_actors, prefix_of(cluster, run)), _numbers(own_groups, prefix_of(cluster, run))
    whole = []
    for instance_id in sorted(ranks):
        shape = shape_of(role_of(instance_id))
        # Numbers, not counts: an instance of another shape than today's is not whole.
        is_whole = ranks[instance_id] == set(range(shape.num_ranks))
        if is_whole and stages.get(instance_id, set()) == set(range(shape.num_groups)):
            whole.append(instance_id)
    kept = tuple(f"{prefix_of(cluster, run)}{instance_id}/" for instance_id in whole)
    return Leftovers(
        whole,
        sorted(name for name in own_actors if not name.startswith(kept)),
        sorted(name for name in own_groups if not name.startswith(kept)),
    )


def _numbers(names: Iterable[str], prefix: str) -> dict[str, set[int]]:
    """Instance -> the numbers of its ranks or stages."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if name.startswith(prefix):
            instance_id, _, part = name.removeprefix(prefix).partition("/")
            numbers[instance_id].add(int(part.removeprefix(_RANK).removeprefix(_STAGE)))
    return numbers
