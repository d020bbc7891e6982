"""One simulated cluster: the product's own services, each in a process of its own, and a launcher that starts them.

    controller process   ControllerService.run() with SimLauncher     (controller, registry)
    worker processes     decode_worker.service.serve, prefill_worker.service.serve
    router processes     router.service.serve, without its HTTP port: clients call its `GenerationClient`

The launcher is the one piece of `cluster/` that is replaced: it makes `Process`es. All checks that hold at every step
are made in `checked_engine.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.simulation.checked_engine import SimEngine
from tests.simulation.launcher import SimDoors, SimLauncher
from tests.simulation.model import SimRunner
from tests.simulation.network import Network
from tests.simulation.payloads import Payloads, SimTransport
from tests.simulation.process import Process
from tests.simulation.scenario import Scenario
from tests.simulation.shared_state import SharedStore, SimState
from tests.simulation.threads import sleep
from tests.simulation.world import World

from baton.cluster.controller import StartInstance
from baton.cluster.controller_service import ControllerService
from baton.config import ClusterConfig
from baton.decode_worker import service as decode_service
from baton.decode_worker.worker import DecodeWorker
from baton.engine.engine import Engine
from baton.placement import Placement
from baton.prefill_worker import service as prefill_service
from baton.prefill_worker.worker import PrefillWorker
from baton.router import service as router_service

__all__ = ["SimCluster"]

_REGISTRY_PORT = 20_000

_SERVE = {"decode": decode_service.serve, "prefill": prefill_service.serve, "router": router_service.serve}


class SimCluster:
    """All processes of a run.

    Attributes:
        processes: the newest of each instance, by name; "controller" too. all_processes: also the dead.
        num_open: requests that have not ended.
        engines, workers, frontends: of the processes that have come so far.
    """

    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world = world
        self.scenario = scenario
        self.config: ClusterConfig = scenario.config
        self.network = Network(world)
        self.network.make_path = scenario.make_path
        self.payloads = Payloads(
            self.network, has_lanes=scenario.has_lanes, seconds_per_byte=scenario.payload_seconds_per_byte
        )
        self.processes: dict[str, Process] = {}
        self.all_processes: list[Process] = []
        self.engines: dict[Process, SimEngine] = {}
        self.workers: dict[Process, DecodeWorker | PrefillWorker] = {}
        self.frontends: dict[Process, Any] = {}
        self.launched: dict[str, tuple[str, Process]] = {}
        self.store = SharedStore(world)
        self.num_open = 0
        self.controller: ControllerService | None = None

    # ---------------------------------------------------------------- processes

    def start(self) -> None:
        """Start the controller; it starts the rest."""
        process = self._new_process("controller")

        async def main() -> None:
            self.controller = ControllerService(self.config, SimLauncher(self), "simulated")
            await self.controller.start(port=_REGISTRY_PORT)
            await self.controller.run()

        process.loop.call_soon(self._run, process, main)

    def _new_process(self, name: str) -> Process:
        process = self.processes[name] = Process(self.world, name)
        self.all_processes.append(process)
        return process

    def _run(self, process: Process, main: Callable[[], Any]) -> None:
        process.main = process.loop.create_task(main(), name="main")
        process.main.add_done_callback(lambda task: self._ended(process, task))

    def _ended(self, process: Process, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        process.kill("exit" if error is None else f"{type(error).__name__}: {error}")

    def launch(self, start: StartInstance, registry_address: str, start_id: str) -> Process:
        """A new process for an instance."""
        process = self._new_process(start.instance_id)
        placement = Placement(instance_id=start.instance_id, start_id=start_id)

        async def main() -> None:
            stop = process.stop = asyncio.Event()
            serve = _SERVE[start.role]
            await serve(self.config, placement=placement, registry_address=registry_address, stop=stop)

        delay_s = self.scenario.random("starts").uniform(0.02, 0.2)
        self.world.after(delay_s, lambda: process.loop.call_soon(self._run, process, main))
        return process

    def alive(self, role: str) -> list[Process]:
        """Processes of a role that are not dead."""
        return [
            process for name, process in sorted(self.processes.items()) if name.startswith(role) and not process.is_dead
        ]

    # ---------------------------------------------------------------- parts of a worker's process

    def build_engine(self, config: ClusterConfig, pool: Any, progress: Callable[[str, float], None]) -> Engine:
        """Stands in for `worker.load.build_engine`."""
        process = self.world.current
        assert process is not None
        progress("loading", 0.1)
        sleep(self.scenario.load_s)
        runner = SimRunner(
            process,
            num_blocks=pool.num_blocks,
            block_size=pool.block_size,
            num_layers=self.scenario.num_layers,
            max_model_len=config.model.max_model_len or 1,
            base_s=self.scenario.step_base_s,
            token_s=self.scenario.step_token_s,
            on_wrong_page=lambda text: self.world.fail("pages are what was written", f"{process.name}: {text}"),
        )
        engine = SimEngine(
            runner,  # type: ignore[arg-type]
            max_batch_tokens=pool.max_batch_tokens,
            max_batch_size=pool.max_batch_size,
            layers_per_group=self.scenario.layers_per_group,
            max_prefill_tokens=config.max_local_prefill_tokens if pool is config.decode else None,
        )
        engine.watch(self.world, process, self.scenario.copy_s)
        self.engines[process] = engine
        return engine

    def make_transports(self, config: ClusterConfig, placement: Placement, device: str) -> tuple[SimTransport, ...]:
        """Stands in for `worker.peer.rank_transports`."""
        del placement, device
        process = self.world.current
        assert process is not None
        return tuple(
            SimTransport(name, self.payloads, process, self.scenario.arena_bytes) for name in self.scenario.transports
        )

    def open_state(self) -> SimState:
        """Stands in for `state.open.open_state`, where the state is shared."""
        process = self.world.current
        assert process is not None
        return SimState(self.store, self.world.random(f"state {process.name} {self.world.now_s}"))

    def make_doors(self, frontend: Any, **_: Any) -> SimDoors:
        """Stands in for `router.doors.Doors`."""
        assert self.world.current is not None
        return SimDoors(self, self.world.current, frontend)

    def make_decode_worker(self, *args: Any) -> DecodeWorker:
        """Stands in for the class."""
        assert self.world.current is not None
        worker = self.workers[self.world.current] = DecodeWorker(*args)
        return worker

    def make_prefill_worker(self, *args: Any) -> PrefillWorker:
        """Stands in for the class."""
        assert self.world.current is not None
        worker = self.workers[self.world.current] = PrefillWorker(*args)
        return worker
