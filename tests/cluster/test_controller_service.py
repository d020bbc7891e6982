"""The controller's shell with a launcher that runs nothing: what it takes over, remembers, and leaves alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.cluster.controller import StartInstance, role_of
from baton.cluster.controller_notes import ControllerNotes
from baton.cluster.controller_service import ControllerService
from baton.cluster.launchers.base import LaunchedInstance, SupersededError
from baton.config import load_config

pytestmark = pytest.mark.timeout(60)

DEADLINE_S = 20.0
ALL = ["router-0", "prefill-0", "decode-0", "decode-1"]
CONFIG = load_config(None, {"decode.replicas": 2})


class Instances:
    """What outlives a controller: instances by id."""

    def __init__(self) -> None:
        self.alive: dict[str, bool] = {}
        self.started: list[str] = []
        self.is_closed = False


class StubLauncher:
    """Starts entries of `Instances`."""

    outlives_controller = True

    def __init__(self, instances: Instances) -> None:
        self.instances = instances
        self.is_superseded = False

    async def adopt(self) -> list[str]:
        """Everything that lives."""
        return sorted(self.instances.alive)

    async def start(self, instance: StartInstance, registry_address: str) -> None:
        """As a `Launcher`."""
        self.instances.started.append(instance.instance_id)
        self.instances.alive[instance.instance_id] = True

    async def stop(self, instance_id: str) -> None:
        """As a `Launcher`."""
        self.instances.alive[instance_id] = False

    async def forget(self, instance_id: str) -> None:
        """As a `Launcher`."""
        self.instances.alive.pop(instance_id, None)

    async def observe(self) -> list[LaunchedInstance]:
        """As a `Launcher`."""
        if self.is_superseded:
            raise SupersededError("another controller watches")
        return [LaunchedInstance(each, role_of(each), alive) for each, alive in self.instances.alive.items()]

    async def close(self) -> None:
        """As a `Launcher`."""
        self.instances.is_closed = True
        self.instances.alive.clear()


class Life:
    """One controller, as a context manager; leaving it is a sudden death."""

    def __init__(self, instances: Instances, notes: Path) -> None:
        self.launcher = StubLauncher(instances)
        self.service = ControllerService(CONFIG, self.launcher, "ray", notes=ControllerNotes(notes, "r1"))

    async def __aenter__(self) -> Life:
        await self.service.start()
        self.run = asyncio.create_task(self.service.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.run.cancel()
        await asyncio.gather(self.run, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.02)


async def test_the_next_controller_takes_over_what_runs_and_restarts_what_died(tmp_path: Path) -> None:
    instances, notes = Instances(), tmp_path / "controller.json"
    async with Life(instances, notes):
        await until(lambda: sorted(instances.alive) == sorted(ALL))
    assert not instances.is_closed
    instances.started.clear()
    async with Life(instances, notes) as life:
        listed = life.service.registry.instance_list
        # Those who serve are not called starting by a registry that does not know them yet.
        assert listed().is_partial
        assert not listed().instances
        instances.alive["decode-1"] = False
        await until(lambda: instances.alive["decode-1"])
        assert instances.started == ["decode-1"]


async def test_what_is_held_stays_away_under_the_next_controller(tmp_path: Path) -> None:
    instances, notes = Instances(), tmp_path / "controller.json"
    async with Life(instances, notes) as life:
        await until(lambda: sorted(instances.alive) == sorted(ALL))
        life.service.registry.held.add("decode-1")
        life.service._note()
        await until(lambda: "decode-1" not in instances.alive)
    instances.started.clear()
    async with Life(instances, notes) as life:
        del instances.alive["decode-0"]
        await until(lambda: "decode-0" in instances.alive)
        assert instances.started == ["decode-0"]
        life.service.registry.held.clear()
        await until(lambda: "decode-1" in instances.alive)


async def test_a_cluster_that_was_told_to_stop_is_stopped_by_the_next_controller(tmp_path: Path) -> None:
    instances, notes = Instances(), tmp_path / "controller.json"
    async with Life(instances, notes):
        await until(lambda: sorted(instances.alive) == sorted(ALL))
    ControllerNotes(notes, "r1").write((), stopping=True)
    instances.started.clear()
    async with Life(instances, notes) as life:
        await asyncio.wait_for(life.run, DEADLINE_S)
    assert instances.is_closed
    assert instances.alive == {}
    assert instances.started == []


async def test_a_controller_that_was_replaced_touches_nothing(tmp_path: Path) -> None:
    instances = Instances()
    async with Life(instances, tmp_path / "controller.json") as life:
        await until(lambda: sorted(instances.alive) == sorted(ALL))
        life.launcher.is_superseded = True
        with pytest.raises(SupersededError):
            await asyncio.wait_for(life.run, DEADLINE_S)
    assert not instances.is_closed
    assert sorted(instances.alive) == sorted(ALL)
