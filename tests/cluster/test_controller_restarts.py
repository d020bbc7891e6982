"""The controller is killed at every write, and again; what it desires is reached, and no instance ever runs twice.

The world is what Ray keeps: one live actor per name, groups by name. A controller's life is the pure core driven as its
shell drives it, action by action and write by write, until a crash ends it; the next life knows the world alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from baton.cluster.controller import Action, Controller, ObservedInstance, StartInstance, role_of
from baton.cluster.launchers.rank_names import Shape, actor_name, group_name, sort_out

REPLICAS = {"router": 1, "prefill": 1, "decode": 2}
SHAPES = {"router": Shape(1, 0), "prefill": Shape(1, 1), "decode": Shape(4, 2)}
CLUSTER, RUN = "c", "r1"


class CrashError(Exception):
    """The controller's process is gone."""


class TakenError(Exception):
    """A live actor has this name."""


@dataclass
class World:
    """What outlives a controller.

    Attributes:
        actors: name -> number of the start that made it.
        crash_at: the write, counted from 0, at which the controller dies: before its effect where even, else after.
        is_contested: two controllers write.
    """

    actors: dict[str, int] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    num_starts: int = 0
    num_writes: int = 0
    crash_at: int | None = None
    is_contested: bool = False

    def _crash(self) -> None:
        if self.num_writes == self.crash_at:
            raise CrashError
        self.num_writes += 1

    def create(self, name: str, start: int) -> None:
        self._crash()
        if name in self.actors:
            raise TakenError(name)
        self.actors[name] = start
        self.check()
        self._crash()

    def kill(self, name: str) -> None:
        self._crash()
        self.actors.pop(name, None)
        self._crash()

    def reserve(self, name: str) -> None:
        self._crash()
        self.groups.add(name)
        self._crash()

    def release(self, name: str) -> None:
        self._crash()
        self.groups.discard(name)
        self._crash()

    def check(self) -> None:
        """Of each instance ranks of one start live, and no others.

        Of two controllers at once each may have started some; no rank is there twice, so no instance is whole twice.
        """
        starts = defaultdict(set)
        for name, start in self.actors.items():
            starts[name.split("/")[2]].add(start)
        assert self.is_contested or all(len(of_instance) == 1 for of_instance in starts.values()), self.actors

    def whole(self) -> list[str]:
        return sort_out(CLUSTER, RUN, self.actors, self.groups, SHAPES.__getitem__).whole


def names_of(instance_id: str) -> tuple[list[str], list[str]]:
    shape = SHAPES[role_of(instance_id)]
    return (
        [actor_name(CLUSTER, RUN, instance_id, rank) for rank in range(shape.num_ranks)],
        [group_name(CLUSTER, RUN, instance_id, stage) for stage in range(shape.num_groups)],
    )


class Life:
    """One controller from its start to its crash; `step` does the next write of some action under way."""

    def __init__(self, world: World, rng: random.Random, replicas: dict[str, int] = REPLICAS) -> None:
        self.world = world
        self.rng = rng
        self.controller = Controller(replicas, min_backoff_s=0.1, max_backoff_s=1.0)
        self.under_way: dict[str, Iterator[None]] = {}
        self.launched: set[str] = set()
        self.now_s = 0.0

    def adopt(self) -> None:
        found = sort_out(CLUSTER, RUN, self.world.actors, self.world.groups, SHAPES.__getitem__)
        for name in found.actors:
            self.world.kill(name)
        for name in found.groups:
            self.world.release(name)
        self.launched = set(found.whole)

    def observe(self) -> list[ObservedInstance]:
        """An instance lives with all its ranks; those of different starts do not meet, and end."""
        starts = {each: {self.world.actors.get(name) for name in names_of(each)[0]} for each in sorted(self.launched)}
        return [
            ObservedInstance(each, None not in of_ranks and len(of_ranks) == 1) for each, of_ranks in starts.items()
        ]

    def step(self) -> None:
        self.now_s += 0.05
        for action in self.controller.reconcile(self.observe(), self.now_s):
            assert action.instance_id not in self.under_way, "two actions at once"
            self.under_way[action.instance_id] = self._perform(action)
        if self.under_way:
            instance_id = self.rng.choice(sorted(self.under_way))
            try:
                ended = next(self.under_way[instance_id], "ended") == "ended"
                ok = True
            except TakenError:
                ended, ok = True, False
            if ended:
                del self.under_way[instance_id]
                self.controller.finished(instance_id, ok=ok, now_s=self.now_s)

    def _perform(self, action: Action) -> Iterator[None]:
        actors, groups = names_of(action.instance_id)
        for name in actors:
            self.world.kill(name)
            yield
        for name in groups:
            self.world.release(name)
            yield
        if not isinstance(action, StartInstance):
            self.launched.discard(action.instance_id)
            return
        for name in groups:
            self.world.reserve(name)
            yield
        self.world.num_starts += 1
        start = self.world.num_starts
        for name in actors:
            self.world.create(name, start)
            yield
        self.launched.add(action.instance_id)


def live(world: World, rng: random.Random, *, replicas: dict[str, int] = REPLICAS, num_steps: int = 150) -> None:
    """One life; a crash ends it early."""
    life = Life(world, rng, replicas)
    try:
        life.adopt()
        for _ in range(num_steps):
            life.step()
            world.check()
    except CrashError:
        pass
    world.crash_at = None


def expected(replicas: dict[str, int] = REPLICAS) -> list[str]:
    return sorted(f"{role}-{index}" for role, count in replicas.items() for index in range(count))


def num_writes_of_a_start() -> int:
    world = World()
    live(world, random.Random(0))
    return world.num_writes


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_every_write_of_the_first_start(seed: int) -> None:
    for crash_at in range(num_writes_of_a_start()):
        world, rng = World(crash_at=crash_at), random.Random(seed)
        live(world, rng)
        before = dict(world.actors)
        whole = world.whole()
        live(world, rng)
        assert world.whole() == expected()
        assert len(world.groups) == 1 + 2 * 2
        # What was whole was taken over as it was, not started a second time.
        for instance_id in whole:
            for name in names_of(instance_id)[0]:
                assert world.actors[name] == before[name]


def test_killed_at_every_write_of_what_follows_a_death() -> None:
    for victim in names_of("decode-1")[0]:
        for crash_at in range(26):
            world, rng = World(), random.Random(crash_at)
            live(world, rng)
            starts = dict(world.actors)
            del world.actors[victim]
            world.num_writes, world.crash_at = 0, crash_at
            live(world, rng)
            live(world, rng)
            assert world.whole() == expected()
            others = {name: start for name, start in starts.items() if "/decode-1/" not in name}
            assert {name: world.actors[name] for name in others} == others


def test_killed_again_and_again_while_ranks_die() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        world = World()
        for _ in range(rng.randrange(1, 8)):
            world.num_writes, world.crash_at = 0, rng.randrange(120)
            if world.actors and rng.random() < 0.5:
                del world.actors[rng.choice(sorted(world.actors))]
            live(world, rng)
        live(world, rng)
        assert world.whole() == expected()
        found = sort_out(CLUSTER, RUN, world.actors, world.groups, SHAPES.__getitem__)
        assert found.actors == found.groups == []


def test_killed_at_every_write_of_a_stop_it_leaves_nothing_in_the_end() -> None:
    nothing = dict.fromkeys(REPLICAS, 0)
    for crash_at in range(32):
        world, rng = World(), random.Random(crash_at)
        live(world, rng)
        world.num_writes, world.crash_at = 0, crash_at
        live(world, rng, replicas=nothing)
        live(world, rng, replicas=nothing)
        assert world.actors == {}
        assert world.groups == set()


def test_a_controller_that_comes_back_from_a_pause_starts_nothing_twice() -> None:
    """Two at once for a moment: the paused one goes on with the action it was in, beside its successor."""
    for seed in range(150):
        rng = random.Random(seed)
        world = World(is_contested=True)
        paused = Life(world, rng)
        paused.adopt()
        for _ in range(rng.randrange(40)):
            paused.step()
        successor = Life(world, rng)
        successor.adopt()
        for _ in range(rng.randrange(60)):
            _advance(paused, rng)
            successor.step()
        # Its next look tells the paused one that it was replaced; the successor's own lives go on.
        live(world, rng)
        assert world.whole() == expected()
        world.is_contested = False
        world.check()


def _advance(paused: Life, rng: random.Random) -> None:
    """A write of an action that was under way; nothing new, since observing tells that its time is over."""
    if paused.under_way:
        instance_id = rng.choice(sorted(paused.under_way))
        try:
            if next(paused.under_way[instance_id], "ended") == "ended":
                del paused.under_way[instance_id]
        except TakenError:
            del paused.under_way[instance_id]
