"""Where the stages of an instance go in a Ray cluster: nodes chosen, a placement group on each, granted. Blocking."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ray
import ray._private.state as ray_state
from ray.util.placement_group import placement_group, remove_placement_group

from baton.clock import Clock
from baton.cluster.launchers.node_choice import Node, choose_nodes, nodes_text
from baton.config import ClusterConfig
from baton.config_values import AUTO_HOST
from baton.errors import UnavailableError

__all__ = ["RayPlacement"]

_PAUSE_S = 0.25
# A group that Ray does not grant by then was promised from an outdated view: look again.
_GROUP_DEADLINE_S = 5.0
_NODE_LABEL = "ray.io/node-id"


class RayPlacement:
    """Thread-safe: starts run in threads of their own, and each knows where the others go.

    Args:
        num_gpus: what each worker rank books.
        deadline_s: how long a start waits for room.
    """

    def __init__(self, config: ClusterConfig, num_gpus: float, *, deadline_s: float, clock: Clock) -> None:
        self.own_node_id = str(ray.get_runtime_context().get_node_id())
        self._config = config
        self._num_gpus = num_gpus
        self._deadline_s = deadline_s
        self._clock = clock
        self._choosing = threading.Lock()
        # Instance -> node of each of its ranks.
        self._nodes_of: dict[str, list[str]] = {}

    def nodes(self) -> list[Node]:
        """Live nodes with what is free there; `ray.nodes()` alone tells only what each has in total."""
        free: dict[str, dict[str, float]] = ray_state.available_resources_per_node()  # type: ignore[no-untyped-call]
        there = [node_id for ids in self._nodes_of.values() for node_id in ids]
        return [
            Node(node["NodeID"], node["NodeManagerAddress"], free.get(node["NodeID"], {}), there.count(node["NodeID"]))
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]

    def note(self, instance_id: str, node_ids: Sequence[str]) -> None:
        """The ranks of an instance are on these nodes."""
        with self._choosing:
            self._nodes_of[instance_id] = list(node_ids)

    def forget(self, instance_id: str) -> None:
        """An instance is nowhere any more."""
        with self._choosing:
            self._nodes_of.pop(instance_id, None)

    def reserve(self, instance_id: str, role: str, group_names: Sequence[str]) -> tuple[tuple[Node, ...], list[Any]]:
        """The node of each stage, and their placement groups, granted; the router gets this node, and no group.

        Raises:
            UnavailableError: no room within the deadline; says what was asked and what the nodes have.
        """
        if role == "router":
            return tuple(node for node in self.nodes() if node.node_id == self.own_node_id), []
        pool = self._config.pool(role)
        bundle = {"CPU": self._config.ray.cpus_per_rank}
        if self._num_gpus:
            bundle["GPU"] = self._num_gpus
        until_s = self._clock.now_s() + self._deadline_s
        while True:
            with self._choosing:
                nodes = [node for node in self.nodes() if pool.host == AUTO_HOST or node.node_id == self.own_node_id]
                chosen = choose_nodes(
                    nodes, num_stages=pool.pipeline_parallel, ranks_per_stage=pool.tensor_parallel, bundle=bundle
                )
                if chosen is not None:
                    ids = [node.node_id for node in chosen for _ in range(pool.tensor_parallel)]
                    self._nodes_of[instance_id] = ids
            if chosen is not None:
                groups = _create_groups(group_names, chosen, [bundle] * pool.tensor_parallel)
                if groups is not None:
                    return chosen, groups
                self.forget(instance_id)
            if self._clock.now_s() >= until_s:
                where = "" if pool.host == AUTO_HOST else f"; others need {role}.host: auto"
                raise UnavailableError(
                    f"Ray found no room for {instance_id} within {self._deadline_s:.0f} s: asked for"
                    f" {pool.pipeline_parallel} x {pool.tensor_parallel} ranks of {_bundle_text(bundle)}, each"
                    f" {pool.tensor_parallel} on one node; nodes: {nodes_text(nodes, list(bundle))}{where};"
                    " free some, add nodes, or lower ray.cpus_per_rank"
                )
            # A thread of its own, between two looks.
            threading.Event().wait(_PAUSE_S)


def _create_groups(names: Sequence[str], nodes: tuple[Node, ...], bundles: list[dict[str, float]]) -> list[Any] | None:
    """A group per stage on its node; None, and nothing reserved, when Ray does not grant them."""
    groups = [
        placement_group(
            bundles,
            strategy="STRICT_PACK",
            name=name,
            lifetime="detached",
            bundle_label_selector=[{_NODE_LABEL: node.node_id}] * len(bundles),
        )
        for name, node in zip(names, nodes, strict=True)
    ]
    if all(group.wait(timeout_seconds=_GROUP_DEADLINE_S) for group in groups):
        return groups
    for group in groups:
        remove_placement_group(group)
    return None


def _bundle_text(bundle: dict[str, float]) -> str:
    return " and ".join(f"{name} {amount:g}" for name, amount in bundle.items())
