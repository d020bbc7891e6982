"""One simulated cluster: the product's own services, each in a process of its own, and a launcher that starts them.

    controller process   ControllerService.run() with SimLauncher     (controller, registry)
    worker processes     decode_worker.service.serve, prefill_worker.service.serve
    router processes     router.service.serve, without its HTTP port: clients call its `GenerationClient`

The launcher is the one piece of `cluster/` that is replaced: it makes `Process`es. All checks that hold at every step
are made here, in what the engine and its pages do (`SimEngine`, `_CheckedPages`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from baton.cluster.controller import StartInstance
from baton.cluster.controller_service import ControllerService
from baton.cluster.launchers.base import LaunchedInstance
from baton.config import ClusterConfig
from baton.decode_worker import service as decode_service
from baton.decode_worker.worker import DecodeWorker
from baton.engine.engine import Engine, StepResult
from baton.engine.pages import KvPages
from baton.engine.sequence import SequenceState
from baton.placement import Placement
from baton.prefill_worker import service as prefill_service
from baton.prefill_worker.worker import PrefillWorker
from baton.router import service as router_service
from tests.simulation.model import SimRunner
from tests.simulation.network import Network
from tests.simulation.payloads import Payloads, SimTransport
from tests.simulation.process import Process
from tests.simulation.scenario import Scenario
from tests.simulation.shared_state import SharedStore, SimState
from tests.simulation.threads import sleep
from tests.simulation.world import World

__all__ = ["SimCluster", "SimEngine"]

_REGISTRY_PORT = 20_000

_SERVE = {"decode": decode_service.serve, "prefill": prefill_service.serve, "router": router_service.serve}


class SimCluster:
    """All processes of a run.

    Attributes:
        processes: the newest of each instance, by name; "controller" too. all_processes: also the dead.
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
        self.controller: ControllerService | None = None
        self.engine_type: type[SimEngine] = SimEngine

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
        engine = self.engine_type(
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

    def make_doors(self, frontend: Any, **_: Any) -> _Doors:
        """Stands in for `router.doors.Doors`."""
        assert self.world.current is not None
        return _Doors(self, self.world.current, frontend)

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


class _Doors:
    """Stands in for the router's HTTP and gRPC servers: a frontend whose doors are open can be asked by clients."""

    def __init__(self, sim: SimCluster, process: Process, frontend: Any) -> None:
        self._sim, self._process, self._frontend = sim, process, frontend
        self.http_url = self.grpc_address = ""
        self.inference = self

    @property
    def are_open(self) -> bool:
        """See `Doors`."""
        return self.http_url != ""

    async def open(self) -> None:
        """See `Doors`."""
        self.http_url, self.grpc_address = "http://simulated", "simulated:1"
        self._sim.frontends[self._process] = self._frontend

    async def update_health(self) -> None:
        """Nobody asks."""

    def turn_away(self) -> None:
        """See `Doors`."""

    async def close(self) -> None:
        """See `Doors`."""


class SimLauncher:
    """`Launcher` over simulated processes; lives in the controller's, they outlive it."""

    outlives_controller = True

    def __init__(self, cluster: SimCluster) -> None:
        self._cluster = cluster
        self._launched = cluster.launched

    async def adopt(self) -> list[str]:
        """See `Launcher`."""
        return [instance_id for instance_id, (_, process) in self._launched.items() if not process.is_dead]

    async def start(self, instance: StartInstance, registry_address: str) -> None:
        """See `Launcher`."""
        await asyncio.sleep(0.005)
        process = self._cluster.launch(instance, registry_address, f"start-{len(self._cluster.all_processes)}")
        self._launched[instance.instance_id] = instance.role, process

    async def stop(self, instance_id: str) -> None:
        """See `Launcher`."""
        launched = self._launched.get(instance_id)
        if launched is None or launched[1].is_dead:
            return
        process = launched[1]
        stop = process.stop
        if stop is not None:
            process.loop.call_soon(stop.set)
        grace_s = self._cluster.config.stop_grace_s
        loop = asyncio.get_running_loop()
        end_s = loop.time() + grace_s
        while not process.is_dead and loop.time() < end_s:
            await asyncio.sleep(0.05)
        process.kill("killed after its grace")

    async def forget(self, instance_id: str) -> None:
        """See `Launcher`."""
        self._launched.pop(instance_id, None)

    async def observe(self) -> list[LaunchedInstance]:
        """See `Launcher`."""
        return [
            LaunchedInstance(instance_id, role, not process.is_dead, process.exit_text)
            for instance_id, (role, process) in self._launched.items()
        ]

    async def close(self) -> None:
        """See `Launcher`."""
        for _, process in self._launched.values():
            process.kill("the launcher ends")


class SimEngine(Engine):
    """The product's engine; after each step every block must be where the books say, and before each write, one's own."""

    _world: World
    _process: Process

    def watch(self, world: World, process: Process, copy_s: float) -> None:
        """Begin to check."""
        self._world, self._process, self.copy_s = world, process, copy_s
        assert isinstance(self.runner, SimRunner)
        self.pages = _CheckedPages(self, self.runner.kv, self.runner.layout.block_size)
        self.runner.on_write = self.check_writable
        self.num_steps = 0

    def step(self, *args: Any) -> StepResult:
        """See `Engine`."""
        result = super().step(*args)
        self.num_steps += 1
        self.check_books()
        return result

    def check_books(self) -> None:
        """Block conservation: free + cached + owned is all there is, and what is owned is some sequence's."""
        try:
            self.pool.check()
        except AssertionError as error:
            self._fail("no block is lost, none has two owners", str(error))
            return
        references = [0] * self.pool.num_blocks
        for seq in self.scheduler.sequences():
            for block in seq.block_ids:
                references[block] += 1
        if references != self.pool._references:
            self._fail("no block is lost, none has two owners", f"{self.pool._references} != {references} of sequences")

    def check_writable(self, blocks: Sequence[int]) -> None:
        """Before the model writes."""
        for block in blocks:
            if not self.pool.writable(block):
                self._fail("single owner", f"the engine writes into block {block}, which is shared, cached or free")

    def _fail(self, checker: str, text: str) -> None:
        self._world.fail(checker, f"{self._process.name}: {text}")


class _CheckedPages(KvPages):
    """The product's pages; what is written must be reserved for it, what is read must be held, as long as it takes."""

    def __init__(self, engine: SimEngine, kv: Tensor, block_size: int) -> None:
        super().__init__(kv, block_size)
        self._engine = engine
        self._size = block_size

    def _holders(self, block_ids: Sequence[int]) -> list[Any]:
        return [
            seq for seq in self._engine.scheduler.sequences() if seq.block_ids[: len(block_ids)] == list(block_ids)
        ]

    def _check_reserved(self, block_ids: Sequence[int], tokens: tuple[int, int]) -> None:
        states = [seq.state for seq in self._holders(block_ids)]
        if SequenceState.RESERVED not in states:
            text = f"pages come for blocks {list(block_ids)}, which nobody has reserved: {states}"
            self._engine._fail("single owner", text)
        self._engine.check_writable(self._touched(block_ids, tokens))

    def _check_held(self, block_ids: Sequence[int]) -> None:
        if not self._holders(block_ids):
            self._engine._fail("single owner", f"pages leave from blocks {list(block_ids)}, which nobody holds")

    def _touched(self, block_ids: Sequence[int], tokens: tuple[int, int]) -> list[int]:
        return list(block_ids[tokens[0] // self._size : -(-tokens[1] // self._size)])

    def scatter(
        self,
        block_ids: Sequence[int],
        layers: tuple[int, int],
        tokens: tuple[int, int],
        payload: Tensor,
        *,
        heads: tuple[int, int] | None = None,
    ) -> int:
        """See `KvPages`."""
        self._check_reserved(block_ids, tokens)
        sleep(self._engine.copy_s)
        self._check_reserved(block_ids, tokens)
        return super().scatter(block_ids, layers, tokens, payload, heads=heads)

    def gather(
        self,
        block_ids: Sequence[int],
        layers: tuple[int, int],
        tokens: tuple[int, int],
        out: Tensor,
        *,
        heads: tuple[int, int] | None = None,
    ) -> int:
        """See `KvPages`."""
        self._check_held(block_ids)
        sleep(self._engine.copy_s)
        self._check_held(block_ids)
        return super().gather(block_ids, layers, tokens, out, heads=heads)
