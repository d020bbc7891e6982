"""`RayLauncher`: an actor per rank, in placement groups on chosen nodes. Runs inside the controller actor.

    adopt   what the controller that died has left running, by the names in `rank_names.py`; halves are ended
    start   choose a node per stage (`node_choice.py`) -> a placement group per stage, pinned to its node, with a bundle
            per rank -> an actor per rank in its bundle
    alive --a rank's `run` ended--> dead: the other ranks are asked to end at once, and killed 1 s later
    alive --stop--> all ranks are asked, and killed when the grace is over

Actors and groups are detached: they outlive the controller that made them, and only `stop`, `forget` and `close` of a
launcher of the same cluster end them.

Ranks run on other nodes only where their pool's host is "auto"; any other host is an address of the node where
`baton up` runs. The router is there too, without a bundle, so that a node without free CPUs can hold it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import secrets
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import get_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from baton.clock import Clock, MonotonicClock
from baton.cluster.controller import StartInstance, role_of
from baton.cluster.launchers.base import LaunchedInstance, host_of
from baton.cluster.launchers.instance_log import log_name, log_path, log_tail, note_end
from baton.cluster.launchers.node_choice import Node
from baton.cluster.launchers.rank_exits import EndKind, RankEnd, cause_of, cause_text
from baton.cluster.launchers.rank_names import Shape, actor_name, group_name
from baton.cluster.launchers.ray_actors import RankActor
from baton.cluster.launchers.ray_instance import (
    KILL_DEADLINE_S,
    Launched,
    Rank,
    ask_to_stop,
    destroy,
    end_of,
    kill,
    never_began,
    wait_ended,
)
from baton.cluster.launchers.ray_leftovers import end_all, end_named, find_leftovers, node_id_of
from baton.cluster.launchers.ray_placement import RayPlacement
from baton.config import ClusterConfig
from baton.errors import UnavailableError
from baton.placement import Placement

__all__ = ["RayLauncher"]

logger = logging.getLogger(__name__)

_PLACEMENT_DEADLINE_S = 30.0
_BEGIN_DEADLINE_S = 120.0
# What the other ranks are given to end by themselves when one has.
_END_S = 1.0


class RayLauncher:
    """See the module.

    Args:
        log_dir: where ranks write their logs, on the node of each.
        num_gpus_per_rank: what each worker rank books.
        run: of this `baton up`; only what its controllers started is adopted.
        generation: later controllers of a run have higher ones; ranks answer to the highest that came to them.
        actor_class: what runs a rank; `RankActor`, or in tests something that behaves like it.
        placement_deadline_s: how long a start waits for room.
        begin_deadline_s: how long Ray may take to start a rank's process, in which nothing is loaded yet.
    """

    def __init__(
        self,
        config: ClusterConfig,
        log_dir: Path,
        num_gpus_per_rank: float,
        *,
        run: str,
        generation: int = 1,
        actor_class: type = RankActor,
        placement_deadline_s: float = _PLACEMENT_DEADLINE_S,
        begin_deadline_s: float = _BEGIN_DEADLINE_S,
        clock: Clock | None = None,
    ) -> None:
        self._config = config
        self._config_json = config.model_dump_json()
        self._log_dir = log_dir
        self._num_gpus = num_gpus_per_rank
        self._run = run
        self._generation = generation
        self._actor_class: Any = ray.remote(actor_class)
        self._clock = clock or MonotonicClock()
        self._placement = RayPlacement(config, num_gpus_per_rank, deadline_s=placement_deadline_s, clock=self._clock)
        self._begin_deadline_s = begin_deadline_s
        self._launched: dict[str, Launched] = {}
        self._closed = False

    @property
    def outlives_controller(self) -> bool:
        """See `Launcher.outlives_controller`."""
        return True

    async def adopt(self) -> list[str]:
        """See `Launcher.adopt`."""
        self._launched.update(await asyncio.to_thread(self._adopt))
        return sorted(self._launched)

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
        ask_to_stop(launched)
        await asyncio.to_thread(wait_ended, launched, self._config.stop_grace_s)
        await asyncio.to_thread(destroy, launched)

    async def forget(self, instance_id: str) -> None:
        """See `Launcher.forget`. Ranks that still end because another one has are given their moment, then killed."""
        launched = self._launched.get(instance_id)
        if launched is not None:
            await asyncio.to_thread(wait_ended, launched, launched.kill_at_s - self._clock.now_s())
            await asyncio.to_thread(destroy, launched)
            self._launched.pop(instance_id, None)
        self._placement.forget(instance_id)

    async def observe(self) -> list[LaunchedInstance]:
        """See `Launcher.observe`. Where one rank has ended, the others are made to."""
        for instance_id, launched in self._launched.items():
            if not launched.exit_text:
                self._look(instance_id, launched)
            elif not launched.stopping and launched.killing is None and self._clock.now_s() >= launched.kill_at_s:
                launched.killing = asyncio.create_task(asyncio.to_thread(kill, launched))
        return [
            LaunchedInstance(instance_id, launched.role, not launched.exit_text, launched.exit_text)
            for instance_id, launched in self._launched.items()
        ]

    async def close(self) -> None:
        """See `Launcher.close`. What a start under way has made by now is found by its name."""
        self._closed = True
        for end in (kill, destroy):
            for launched in self._launched.values():
                await asyncio.to_thread(end, launched)
        await asyncio.to_thread(end_all, self._config.name, deadline_s=KILL_DEADLINE_S)

    def _adopt(self) -> dict[str, Launched]:
        found = find_leftovers(self._config.name, self._run, self._shape)
        if found.actors or found.groups:
            logger.warning("ending what is left by halves: %s", ", ".join([*found.actors, *found.groups]))
            end_named(found.actors, found.groups, deadline_s=KILL_DEADLINE_S)
        nodes = {node.node_id: node for node in self._placement.nodes()}
        adopted = {}
        for instance_id in found.whole:
            launched = Launched(
                role_of(instance_id), [get_placement_group(name) for name in self._group_names(instance_id)]
            )
            for rank, name in enumerate(self._actor_names(instance_id)):
                try:
                    actor = ray.get_actor(name)
                except ValueError:
                    # It ended just now: the next look finds an instance with a rank missing.
                    break
                node = nodes.get(node_id_of(actor)) or nodes[self._placement.own_node_id]
                launched.ranks.append(Rank(rank, node, actor, self._generation))
            else:
                adopted[instance_id] = launched
                self._placement.note(instance_id, [rank.node.node_id for rank in launched.ranks])
        return adopted

    def _start(self, instance: StartInstance, registry_address: str) -> Launched:
        # Names that are still taken: what a start that failed by halves could not end.
        end_named(
            self._actor_names(instance.instance_id),
            self._group_names(instance.instance_id),
            deadline_s=KILL_DEADLINE_S,
        )
        nodes, groups = self._placement.reserve(
            instance.instance_id, instance.role, self._group_names(instance.instance_id)
        )
        launched = Launched(instance.role, groups)
        try:
            self._start_ranks(instance, registry_address, nodes, launched)
        except BaseException:
            destroy(launched)
            raise
        launched.begin_until_s = self._clock.now_s() + self._begin_deadline_s
        return launched

    def _start_ranks(
        self, instance: StartInstance, registry_address: str, nodes: tuple[Node, ...], launched: Launched
    ) -> None:
        """An actor per rank, in the bundles that `launched` has."""
        start_id = secrets.token_hex(8)
        num_ranks = self._config.num_ranks_of(instance.role)
        ranks_per_stage = num_ranks // len(nodes)
        names = self._actor_names(instance.instance_id)
        for rank in range(num_ranks):
            if self._closed:
                raise UnavailableError(f"{instance.instance_id} is not started: the cluster stops")
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
                name=names[rank],
                lifetime="detached",
                max_concurrency=4,
                max_restarts=0,
                scheduling_strategy=strategy,
                **options,
            ).remote(
                self._config_json, instance.role, dataclasses.asdict(placement), registry_address, str(self._log_dir)
            )
            launched.ranks.append(Rank(rank, node, actor, self._generation))

    def _shape(self, role: str) -> Shape:
        num_groups = 0 if role == "router" else self._config.pool(role).pipeline_parallel
        return Shape(self._config.num_ranks_of(role), num_groups)

    def _actor_names(self, instance_id: str) -> list[str]:
        num_ranks = self._shape(role_of(instance_id)).num_ranks
        return [actor_name(self._config.name, self._run, instance_id, rank) for rank in range(num_ranks)]

    def _group_names(self, instance_id: str) -> list[str]:
        num_groups = self._shape(role_of(instance_id)).num_groups
        return [group_name(self._config.name, self._run, instance_id, stage) for stage in range(num_groups)]

    def _look(self, instance_id: str, launched: Launched) -> None:
        """Note the first rank that has ended, and ask the others to end."""
        ends = [end for rank in launched.ranks if rank.run.done() and (end := end_of(rank)) is not None]
        if not ends and self._clock.now_s() >= launched.begin_until_s:
            ends = never_began(launched, self._begin_deadline_s)
            launched.begin_until_s = math.inf
        if not ends:
            return
        num_ranks = len(launched.ranks)
        cause = cause_of(ends, driver_rank=self._config.driver_rank_of(launched.role))
        text = cause_text(cause, num_ranks=num_ranks)
        launched.exit_text = text + self._last_words(instance_id, launched, cause)
        launched.kill_at_s = self._clock.now_s() + _END_S
        if not launched.stopping:
            ask_to_stop(launched)
            note_end(self._log_dir, instance_id, cause.rank, num_ranks, launched.exit_text)

    def _last_words(self, instance_id: str, launched: Launched, cause: RankEnd) -> str:
        """The last line of a rank that could not say why it ended, or where to find it."""
        name, node = log_name(instance_id, cause.rank, len(launched.ranks)), launched.ranks[cause.rank].node
        if node.node_id != self._placement.own_node_id:
            return f" (on node {node.address}, where its log is {log_path(self._log_dir, name)})"
        last = log_tail(self._log_dir, name, 1) if cause.kind is EndKind.KILLED else []
        return f", its last line: {last[0]}" if last else ""
