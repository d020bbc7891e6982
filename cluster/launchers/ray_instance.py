"""One instance as `RayLauncher` holds it: its actors, its placement groups, and what became of its ranks.

A rank is watched by a call to its actor that returns when its role has ended (`RankActor.watch`). The call of a new
controller takes the place of the old one's, which returns too and tells the old controller that its time is over.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.placement_group import remove_placement_group

from baton.cluster.launchers.base import SupersededError
from baton.cluster.launchers.node_choice import Node
from baton.cluster.launchers.rank_exits import EndKind, RankEnd

__all__ = ["KILL_DEADLINE_S", "Launched", "Rank", "ask_to_stop", "destroy", "end_of", "kill", "wait_ended"]

KILL_DEADLINE_S = 5.0


class Rank:
    """A rank's actor on its node, watched by a controller of this generation."""

    def __init__(self, rank: int, node: Node, actor: Any, generation: int) -> None:
        self.rank = rank
        self.node = node
        self.actor = actor
        self._generation = generation
        self.watch()

    def watch(self) -> None:
        """Have its end told by `run`: (is over, how)."""
        self.run: concurrent.futures.Future[tuple[bool, str]] = self.actor.watch.remote(self._generation).future()


@dataclass(slots=True)
class Launched:
    """An instance that was started or found running.

    Attributes:
        exit_text: set once a rank has ended; `kill_at_s` is then when the others are made to.
    """

    role: str
    groups: list[Any]
    ranks: list[Rank] = field(default_factory=list)
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
