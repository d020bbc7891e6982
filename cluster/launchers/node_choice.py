"""On which nodes the stages of an instance run. Pure.

All ranks of a stage are on one node, since they reduce over each other in every layer. Stages prefer nodes that no
other stage of their instance has, then nodes with the fewest ranks of this cluster, so that instances spread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Node", "choose_nodes", "nodes_text"]

# Ray keeps resources in units of 1/10000.
_EPSILON = 1e-4


@dataclass(frozen=True, slots=True)
class Node:
    """One node as it is now.

    Attributes:
        node_id: the launcher's name for it.
        address: its host, as other nodes reach it.
        free: resources nobody has booked, by name.
        num_ranks: of this cluster, running there.
    """

    node_id: str
    address: str
    free: Mapping[str, float]
    num_ranks: int = 0


def choose_nodes(
    nodes: Sequence[Node], *, num_stages: int, ranks_per_stage: int, bundle: Mapping[str, float]
) -> tuple[Node, ...] | None:
    """The node of each stage, or None when there is no room now; `bundle` is what one rank needs."""
    stages_there: Counter[str] = Counter()
    chosen: list[Node] = []
    room = {node.node_id: _stages_that_fit(node, ranks_per_stage, bundle, num_stages) for node in nodes}
    for _ in range(num_stages):
        fitting = [node for node in nodes if room[node.node_id] > stages_there[node.node_id]]
        if not fitting:
            return None
        best = min(fitting, key=lambda node: (stages_there[node.node_id], node.num_ranks, node.address, node.node_id))
        stages_there[best.node_id] += 1
        chosen.append(best)
    return tuple(chosen)


def nodes_text(nodes: Sequence[Node], names: Sequence[str]) -> str:
    """What each node has free of the resources `names`, for an error."""
    texts = []
    for node in nodes:
        free = ", ".join(f"{name} {node.free.get(name, 0.0):g}" for name in names)
        texts.append(f"{node.address} ({free} free, {node.num_ranks} ranks of this cluster)")
    return "; ".join(texts) or "none"


def _stages_that_fit(node: Node, ranks_per_stage: int, bundle: Mapping[str, float], limit: int) -> int:
    wanted = {name: amount * ranks_per_stage for name, amount in bundle.items() if amount > 0}
    return min((int((node.free.get(name, 0.0) + _EPSILON) / amount) for name, amount in wanted.items()), default=limit)
