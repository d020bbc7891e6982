"""`RayLauncher`: an actor per rank, in placement groups on chosen nodes. Runs inside the controller actor.

    start   choose a node per stage (`node_choice.py`) -> a placement group per stage, pinned to its node, with a bundle
            per rank -> an actor per rank in its bundle
    alive --a rank's `run` ended--> dead: the other ranks are asked to end at once, and killed 1 s later
    alive --stop--> all ranks are asked, and killed when the grace is over

Ranks run on other nodes only where their pool's host is "auto"; any other host is an address of the node where
`baton up` runs. The router is there too, without a bundle, so that a node without free CPUs can hold it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray._private.state as ray_state
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from baton.clock import Clock, MonotonicClock
from baton.cluster.controller import StartInstance
from baton.cluster.launchers.base import LaunchedInstance, host_of
from baton.cluster.launchers.instance_log import log_name, log_path, log_tail, note_end
from baton.cluster.launchers.node_choice import Node, choose_nodes, nodes_text
from baton.cluster.launchers.rank_exits import EndKind, RankEnd, cause_of, cause_text
from baton.cluster.launchers.ray_actors import RankActor
from baton.config import ClusterConfig
from baton.config_values import AUTO_HOST
from baton.errors import UnavailableError
from baton.placement import Placement

__all__ = ["KILL_DEADLINE_S", "RayLauncher"]

KILL_DEADLINE_S = 5.0
_PLACEMENT_DEADLINE_S = 30.0
_PLACEMENT_PAUSE_S = 0.25
# A group that Ray does not grant by then was promised from an outdated view: look again.
_GROUP_DEADLINE_S = 5.0
# What the other ranks are given to end by themselves when one has.
_END_S = 1.0
_NODE_LABEL = "ray.io/node-id"


@dataclass(slots=True)
class _Rank:
    rank: int
    node: Node
    actor: Any
    run: concurrent.futures.Future[str]


@dataclass(slots=True)
class _Launched:
    role: str
    groups: list[Any]
    ranks: list[_Rank] = field(default_factory=list)
    stopping: bool = False
    # Set once a rank has ended.
    exit_text: str = ""
    kill_at_s: float = 0.0
    killing: asyncio.Task[None] | None = None


class RayLauncher:
    """See the module.

    Args:
        log_dir: where ranks write their logs, on the node of each.
        num_gpus_per_rank: what each worker rank books.
        actor_class: what runs a rank; `RankActor`, or in tests something that behaves like it.
        placement_deadline_s: how long a start waits for room.
    """

    def __init__(
        self,
        config: ClusterConfig,
        log_dir: Path,
        num_gpus_per_rank: float,
        *,
        actor_class: type = RankActor,
        placement_deadline_s: float = _PLACEMENT_DEADLINE_S,
        clock: Clock | None = None,
    ) -> None:
        self._config = config
        self._config_json = config.model_dump_json()
        self._log_dir = log_dir
        self._num_gpus = num_gpus_per_rank
        self._actor_class: Any = ray.remote(actor_class)
        self._placement_deadline_s = placement_deadline_s
        self._clock = clock or MonotonicClock()
        self._own_node_id = str(ray.get_runtime_context().get_node_id())
        self._launched: dict[str, _Launched] = {}
        # Starts run in threads of their own: which nodes each instance has, so that the next one goes elsewhere.
        self._choosing = threading.Lock()
        self._nodes_of: dict[str, list[str]] = {}

    async def start(self, instance: StartInstance, registry_address: str) -> None:
        """See `Launcher.start`."""
        await self.forget(instance.instance_id)
        self._launched[instance.instance_id] = await asyncio.to_thread(self._start, instance, registry_address)

    async def stop(self, instance_id: str) -> None:
        """Ask every rank, wait out the grace, kill."""
        launched = self._launched.get(instance_id)
        if launched is None:
            return
        launched.stopping = True
        _ask_to_stop(launched)
        await asyncio.to_thread(_wait_ended, launched, self._config.stop_grace_s)
        await asyncio.to_thread(_destroy, launched)

    async def forget(self, instance_id: str) -> None:
        """See `Launcher.forget`. Ranks that still end because another one has are given their moment, then killed."""
        launched = self._launched.get(instance_id)
        if launched is not None:
            await asyncio.to_thread(_wait_ended, launched, launched.kill_at_s - self._clock.now_s())
            await asyncio.to_thread(_destroy, launched)
            self._launched.pop(instance_id, None)
        with self._choosing:
            self._nodes_of.pop(instance_id, None)

    async def observe(self) -> list[LaunchedInstance]:
        """See `Launcher.observe`. Where one rank has ended, the others are made to."""
        for instance_id, launched in self._launched.items():
            if not launched.exit_text:
                self._look(instance_id, launched)
            elif not launched.stopping and launched.killing is None and self._clock.now_s() >= launched.kill_at_s:
                launched.killing = asyncio.create_task(asyncio.to_thread(_kill, launched))
        return [
            LaunchedInstance(instance_id, launched.role, not launched.exit_text, launched.exit_text)
            for instance_id, launched in self._launched.items()
        ]

    async def close(self) -> None:
        """See `Launcher.close`."""
        for kill in (_kill, _destroy):
            for launched in self._launched.values():
                await asyncio.to_thread(kill, launched)

    def _start(self, instance: StartInstance, registry_address: str) -> _Launched:
        nodes, launched = self._place(instance)
        try:
            self._start_ranks(instance, registry_address, nodes, launched)
        except BaseException:
            _destroy(launched)
            raise
        return launched

    def _start_ranks(
        self, instance: StartInstance, registry_address: str, nodes: tuple[Node, ...], launched: _Launched
    ) -> None:
        """An actor per rank, in the bundles that `launched` has."""
        start_id = secrets.token_hex(8)
        num_ranks = self._config.num_ranks_of(instance.role)
        ranks_per_stage = num_ranks // len(nodes)
        for rank in range(num_ranks):
            stage, bundle_index = divmod(rank, ranks_per_stage)
            node = nodes[stage]
            placement = Placement(
                instance_id=instance.instance_id,
                start_id=start_id,
                rank=rank,
                num_ranks=num_ranks,
                host=host_of(self._config, instance.role, node.address),
            )
            options: dict[str, Any] = {"num_cpus": 0}
            if launched.groups:
                strategy: Any = PlacementGroupSchedulingStrategy(launched.groups[stage], bundle_index)
                options = {"num_cpus": self._config.ray.cpus_per_rank, "num_gpus": self._num_gpus}
            else:
                strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            actor = self._actor_class.options(
                name=f"{self._config.name}-{instance.instance_id}-rank{rank}-{start_id[:6]}",
                max_concurrency=4,
                max_restarts=0,
                scheduling_strategy=strategy,
                **options,
            ).remote(
                self._config_json, instance.role, dataclasses.asdict(placement), registry_address, str(self._log_dir)
            )
            launched.ranks.append(_Rank(rank, node, actor, actor.run.remote().future()))

    def _place(self, instance: StartInstance) -> tuple[tuple[Node, ...], _Launched]:
        """The node of each stage, and their placement groups, granted.

        Raises:
            UnavailableError: no room within the deadline; says what was asked and what the nodes have.
        """
        if instance.role == "router":
            own = [node for node in self._nodes() if node.node_id == self._own_node_id]
            return tuple(own), _Launched(instance.role, [])
        pool = self._config.pool(instance.role)
        bundle = {"CPU": self._config.ray.cpus_per_rank}
        if self._num_gpus:
            bundle["GPU"] = self._num_gpus
        until_s = self._clock.now_s() + self._placement_deadline_s
        while True:
            with self._choosing:
                nodes = [node for node in self._nodes() if pool.host == AUTO_HOST or node.node_id == self._own_node_id]
                chosen = choose_nodes(
                    nodes, num_stages=pool.pipeline_parallel, ranks_per_stage=pool.tensor_parallel, bundle=bundle
                )
                if chosen is not None:
                    ids = [node.node_id for node in chosen for _ in range(pool.tensor_parallel)]
                    self._nodes_of[instance.instance_id] = ids
            if chosen is not None:
                groups = self._reserve(instance.instance_id, chosen, [bundle] * pool.tensor_parallel)
                if groups is not None:
                    return chosen, _Launched(instance.role, groups)
                with self._choosing:
                    self._nodes_of.pop(instance.instance_id, None)
            if self._clock.now_s() >= until_s:
                where = "" if pool.host == AUTO_HOST else f"; others need {instance.role}.host: auto"
                raise UnavailableError(
                    f"Ray found no room for {instance.instance_id} within {self._placement_deadline_s:.0f} s: asked for"
                    f" {pool.pipeline_parallel} x {pool.tensor_parallel} ranks of {_bundle_text(bundle)}, each"
                    f" {pool.tensor_parallel} on one node; nodes: {nodes_text(nodes, list(bundle))}{where};"
                    " free some, add nodes, or lower ray.cpus_per_rank"
                )
            # A thread of its own, between two looks.
            threading.Event().wait(_PLACEMENT_PAUSE_S)

    def _reserve(self, instance_id: str, chosen: tuple[Node, ...], bundles: list[dict[str, float]]) -> list[Any] | None:
        """A group per stage on its node; None, and nothing reserved, when Ray does not grant them."""
        groups = [
            placement_group(
                bundles,
                strategy="STRICT_PACK",
                name=f"{self._config.name}-{instance_id}-stage{stage}",
                bundle_label_selector=[{_NODE_LABEL: node.node_id}] * len(bundles),
            )
            for stage, node in enumerate(chosen)
        ]
        if all(group.wait(timeout_seconds=_GROUP_DEADLINE_S) for group in groups):
            return groups
        for group in groups:
            remove_placement_group(group)
        return None

    def _nodes(self) -> list[Node]:
        """Live nodes with what is free there; `ray.nodes()` alone tells only what each has in total."""
        free: dict[str, dict[str, float]] = ray_state.available_resources_per_node()  # type: ignore[no-untyped-call]
        there = [node_id for ids in self._nodes_of.values() for node_id in ids]
        return [
            Node(node["NodeID"], node["NodeManagerAddress"], free.get(node["NodeID"], {}), there.count(node["NodeID"]))
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]

    def _look(self, instance_id: str, launched: _Launched) -> None:
        """Note the first rank that has ended, and ask the others to end."""
        ends = [_end_of(rank) for rank in launched.ranks if rank.run.done()]
        if not ends:
            return
        num_ranks = len(launched.ranks)
        cause = cause_of(ends, driver_rank=self._config.driver_rank_of(launched.role))
        text = cause_text(cause, num_ranks=num_ranks)
        launched.exit_text = text + self._last_words(instance_id, launched, cause)
        launched.kill_at_s = self._clock.now_s() + _END_S
        if not launched.stopping:
            _ask_to_stop(launched)
            note_end(self._log_dir, instance_id, cause.rank, num_ranks, launched.exit_text)

    def _last_words(self, instance_id: str, launched: _Launched, cause: RankEnd) -> str:
        """The last line of a rank that could not say why it ended, or where to find it."""
        name, node = log_name(instance_id, cause.rank, len(launched.ranks)), launched.ranks[cause.rank].node
        if node.node_id != self._own_node_id:
            return f" (on node {node.address}, where its log is {log_path(self._log_dir, name)})"
        last = log_tail(self._log_dir, name, 1) if cause.kind is EndKind.KILLED else []
        return f", its last line: {last[0]}" if last else ""


def _end_of(rank: _Rank) -> RankEnd:
    error = rank.run.exception(timeout=0)
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return RankEnd(rank.rank, EndKind.FAILED, f"could not start: {str(error).strip().splitlines()[-1]}")
    if isinstance(error, RayActorError):
        return RankEnd(rank.rank, EndKind.KILLED, f"was lost: its process died ({type(error).__name__})")
    if error is not None:
        return RankEnd(
            rank.rank, EndKind.FAILED, f"failed: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        )
    text = rank.run.result(timeout=0)
    return (
        RankEnd(rank.rank, EndKind.FAILED, f"failed: {text}") if text else RankEnd(rank.rank, EndKind.STOPPED, "ended")
    )


def _ask_to_stop(launched: _Launched) -> None:
    for rank in launched.ranks:
        if not rank.run.done():
            rank.actor.stop.remote()


def _wait_ended(launched: _Launched, deadline_s: float) -> None:
    concurrent.futures.wait([rank.run for rank in launched.ranks], timeout=max(0.0, deadline_s))


def _kill(launched: _Launched) -> None:
    for rank in launched.ranks:
        ray.kill(rank.actor)


def _destroy(launched: _Launched) -> None:
    _kill(launched)
    _wait_ended(launched, KILL_DEADLINE_S)
    for group in launched.groups:
        remove_placement_group(group)


def _bundle_text(bundle: dict[str, float]) -> str:
    return " and ".join(f"{name} {amount:g}" for name, amount in bundle.items())
