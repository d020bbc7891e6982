"""One instance as `RayLauncher` holds it: its actors, its placement groups, and what became of its ranks.

A rank is watched by a call to its actor that returns when its role has ended (`RankActor.watch`). The call of a new
controller takes the place of the old one's, which returns too and tells the old controller that its time is over.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.placement_group import remove_placement_group

from baton.cluster.launchers.base import SupersededError
from baton.cluster.launchers.node_choice import Node
from baton.cluster.launchers.rank_exits import EndKind, RankEnd

__all__ = [
    "KILL_DEADLINE_S",
    "Launched",
    "Rank",
    "ask_to_stop",
    "destroy",
    "end_of",
    "kill",
    "never_began",
    "wait_ended",
]

KILL_DEADLINE_S = 5.0


class Rank:
    """A rank's actor on its node, watched by a controller of this generation.

    Attributes:
        begun: done once Ray has its process, or knows that there will be none.
    """

    def __init__(self, rank: int, node: Node, actor: Any, generation: int) -> None:
        self.rank = rank
        self.node = node
        self.actor = actor
        self._generation = generation
        self.begun: concurrent.futures.Future[bool] = actor.__ray_ready__.remote().future()
        self.watch()

    def watch(self) -> None:
        """Have its end told by `run`: (is over, how)."""
        self.run: concurrent.futures.Future[tuple[bool, str]] = self.actor.watch.remote(self._generation).future()


@dataclass(slots=True)
class Launched:
    """An instance that was started or found running.

    Attributes:
        begin_until_s: when each rank must have a process: Ray's head may die with a start in its hands, and forget it.
        exit_text: set once a rank has ended; `kill_at_s` is then when the others are made to.
    """

    role: str
    groups: list[Any]
    ranks: list[Rank] = field(default_factory=list)
    begin_until_s: float = math.inf
    stopping: bool = False
    exit_text: str = ""
    kill_at_s: float = 0.0
    killing: asyncio.Task[None] | None = None


def end_of(rank: Rank) -> RankEnd | None:
    """How a rank ended whose watch has; None where it goes on.

    Raises:
        SupersededError: another controller watches it now.
    """
    error = rank.run.exception(timeout=0)
    if isinstance(error, ActorUnavailableError):
        # Its process could not be reached, or Ray cannot say yet what became of it.
        rank.watch()
        return None
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return RankEnd(rank.rank, EndKind.FAILED, f"could not start: {str(error).strip().splitlines()[-1]}")
    if isinstance(error, RayActorError):
        return RankEnd(rank.rank, EndKind.KILLED, f"was lost: its process died ({type(error).__name__})")
    if error is not None:
        return RankEnd(
            rank.rank, EndKind.FAILED, f"failed: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        )
    is_over, text = rank.run.result(timeout=0)
    if not is_over:
        raise SupersededError("another controller watches the instances now")
    return (
        RankEnd(rank.rank, EndKind.FAILED, f"failed: {text}") if text else RankEnd(rank.rank, EndKind.STOPPED, "ended")
    )


def never_began(launched: Launched, deadline_s: float) -> list[RankEnd]:
    """Ranks for which Ray has made no process within `deadline_s`, told once that has passed."""
    text = f"was lost: Ray did not start its process within {deadline_s:.0f} s"
    return [RankEnd(rank.rank, EndKind.FAILED, text) for rank in launched.ranks if not rank.begun.done()]


def ask_to_stop(launched: Launched) -> None:
    """Ask every rank that runs to end."""
    for rank in launched.ranks:
        if not rank.run.done():
            rank.actor.stop.remote()


def wait_ended(launched: Launched, deadline_s: float) -> None:
    """Wait until every rank has ended, for `deadline_s` at most."""
    concurrent.futures.wait([rank.run for rank in launched.ranks], timeout=max(0.0, deadline_s))


def kill(launched: Launched) -> None:
    """Kill every rank; returns at once."""
    for rank in launched.ranks:
        ray.kill(rank.actor)


def destroy(launched: Launched) -> None:
    """Kill every rank and remove the groups."""
    kill(launched)
    wait_ended(launched, KILL_DEADLINE_S)
    for group in launched.groups:
        remove_placement_group(group)
