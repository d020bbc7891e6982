"""Launcher `ray`: Ray places, starts and supervises; it is never on the path of a token.

    baton up ── RayHost ── ControllerActor "<name>-controller" (detached, on the node of `baton up`) ── RayLauncher
                                                  └─ per instance: a placement group per stage (STRICT_PACK, a bundle
                                                     per rank) and a RankActor per rank; see `ray_launcher.py`

Without `ray.address` a private Ray runs for this cluster alone: no dashboard, no prestarted workers, its files in a
folder of its own, and it ends with `baton up`, however that ends. `ray_environment.set_private_environment` must have
been called before this module is imported.

Controller and head may die, and both return: Ray starts the controller again, which serves the registry at the address
that `baton up` chose and adopts what runs; `PrivateHead` starts the head again.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baton.cluster.launchers.free_port import choose_port
from baton.cluster.launchers.instance_log import log_path, log_tail
from baton.cluster.launchers.ray_actors import ControllerActor
from baton.cluster.launchers.ray_head import PrivateHead
from baton.cluster.launchers.ray_instance import KILL_DEADLINE_S
from baton.cluster.launchers.ray_leftovers import end_all
from baton.config import ClusterConfig
from baton.config_values import AUTO_HOST
from baton.errors import ConfigError, UnavailableError

__all__ = ["RayHost"]

logger = logging.getLogger(__name__)

_CONTROLLER_DEADLINE_S = 30.0
_BACK_S = 5.0
# Beyond what the controller itself allows for its instances.
_STOP_SLACK_S = 5.0
_PERIOD_S = 0.2
_RETRY_S = 0.5
# For Ray's answer when there may be nobody who answers.
_RAY_DEADLINE_S = 5.0


class RayHost:
    """Runs in `baton up`: brings Ray and the controller actor up and down.

    Args:
        tell: gets a line for the user when something of the control plane died or returned.
    """

    def __init__(self, config: ClusterConfig, log_dir: Path, tell: Callable[[str], None] = print) -> None:
        self._config = config
        self._log_dir = log_dir
        self._tell = tell
        self._head: PrivateHead | None = None
        self._run = secrets.token_hex(4)
        self._registry_address = ""
        self._controller: Any = None

    async def start(self) -> str:
        """Start Ray where there is none, then the controller; return the registry's address.

        Raises:
            ConfigError: `ray.address` does not answer, or has a cluster of this name.
        """
        # On this very thread, see `PrivateHead`.
        self._init()
        host = _registry_host(self._config)
        self._registry_address = f"{host}:{choose_port(host)}"
        self._controller = await asyncio.to_thread(self._start_controller)
        problem = await asyncio.to_thread(self._ask_serving, _CONTROLLER_DEADLINE_S)
        if problem:
            last = log_tail(self._log_dir, "controller", 1)
            raise UnavailableError(
                f"the controller actor did not start ({problem}; {last[0] if last else 'no output'});"
                f" its log is {log_path(self._log_dir, 'controller')}"
            )
        return self._registry_address

    async def wait(self) -> None:
        """Return when the controller has ended, because of StopCluster or `stop`; see that all return that die."""
        following = asyncio.create_task(self._follow_controller())
        try:
            while not following.done():
                self._look()
                await asyncio.wait([following], timeout=_PERIOD_S)
        finally:
            following.cancel()
        await following

    async def stop(self) -> None:
        """End instances, controller, and the private Ray."""
        deadline_s = self._config.stop_grace_s + 2 * KILL_DEADLINE_S + _STOP_SLACK_S
        if self._controller is not None:
            # A head that dies now is what the end would wait for.
            await _within(deadline_s, self._stop_controller, meanwhile=self._look)
        if not await _within(_RAY_DEADLINE_S, ray.shutdown):
            # Nor shall Python ask again at its end.
            atexit.unregister(ray.shutdown)
        if self._head is not None and not await asyncio.to_thread(self._head.end):
            raise UnavailableError("some processes of the private Ray do not end even when killed")

    def _look(self) -> None:
        if self._head is not None:
            self._head.look(time.monotonic())

    def _init(self) -> None:
        common: dict[str, Any] = {
            "namespace": "baton",
            "log_to_driver": False,
            "configure_logging": False,
        }
        if self._config.ray.address is not None:
            try:
                ray.init(address=self._config.ray.address, **common)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(f"ray.address: {self._config.ray.address} does not answer ({error})") from error
            return
        self._head = PrivateHead(self._tell)
        self._head.start(**common)

    def _start_controller(self) -> Any:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        num_gpus = resources.get("GPU", 0.0) if self._config.device != "cpu" else 0.0
        try:
            return (
                ray.remote(ControllerActor)
                .options(
                    name=self._controller_name,
                    lifetime="detached",
                    num_cpus=0,
                    max_concurrency=8,
                    # However often it dies; calls under way when it does are not repeated.
                    max_restarts=-1,
                    max_task_retries=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(
                        ray.get_runtime_context().get_node_id(), soft=False
                    ),
                )
                .remote(
                    self._config.model_dump_json(),
                    str(self._log_dir),
                    self._gpu_share(num_gpus),
                    self._run,
                    self._registry_address,
                )
            )
        except ValueError as error:
            raise ConfigError(
                f"Ray has an actor {self._controller_name!r} already; stop that cluster, or start this one with"
                " --set name=other"
            ) from error

    @property
    def _controller_name(self) -> str:
        return f"{self._config.name}-controller"

    def _gpu_share(self, num_gpus: float) -> float:
        """GPUs of each worker rank: a whole one, or such a part that all ranks find room."""
        return 1.0 / math.ceil(self._config.num_worker_ranks / num_gpus) if num_gpus >= 1 else 0.0

    async def _follow_controller(self) -> None:
        """Return when the controller has ended well; tell when it dies and when it is back."""
        while True:
            try:
                await asyncio.wrap_future(self._controller.wait_ended.remote().future())
                return
            except RayActorError:
                self._tell("the controller died; requests are served on, and Ray starts it again")
            await self._controller_back()
            self._tell("the controller is back")

    async def _controller_back(self) -> None:
        """Return when a controller serves the registry again."""
        told = ""
        while True:
            problem = ""
            try:
                problem = await asyncio.wrap_future(self._controller.wait_serving.remote(_BACK_S).future())
                if not problem:
                    return
            except ActorUnavailableError:
                await asyncio.sleep(_RETRY_S)
            except RayActorError:
                # Ray has given it up, or was told to: not we.
                await asyncio.sleep(_RETRY_S)
                try:
                    self._controller = await asyncio.to_thread(self._start_controller)
                except ConfigError:
                    # It is there after all.
                    self._controller = await asyncio.to_thread(ray.get_actor, self._controller_name)
            if problem not in ("", told):
                self._tell(f"the controller does not serve yet: {problem}; requests are served on")
                told = problem

    def _ask_serving(self, deadline_s: float) -> str:
        """Why the controller does not serve; empty when it does."""
        try:
            return str(ray.get(self._controller.wait_serving.remote(deadline_s), timeout=2 * deadline_s))
        except GetTimeoutError:
            return f"no answer within {2 * deadline_s:.0f} s"
        except RayActorError as error:
            return str(error).strip().splitlines()[-1]

    def _stop_controller(self) -> None:
        """Have it end everything, as often as it dies meanwhile; then kill it and what it left."""
        until_s = time.monotonic() + self._config.stop_grace_s + 2 * KILL_DEADLINE_S
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                ray.get(self._controller.stop.remote(), timeout=left_s)
                ray.get(self._controller.wait_ended.remote(), timeout=max(0.1, until_s - time.monotonic()))
                break
            except ActorUnavailableError:
                time.sleep(_RETRY_S)
            except (RayActorError, GetTimeoutError) as error:
                logger.warning("the controller does not end by itself: %s", error)
                break
        ray.kill(self._controller)
        if self._head is None:
            end_all(self._config.name, deadline_s=KILL_DEADLINE_S)


def _registry_host(config: ClusterConfig) -> str:
    """Loopback, unless ranks may run on other nodes."""
    if AUTO_HOST not in (config.prefill.host, config.decode.host):
        return "127.0.0.1"
    from ray.util import get_node_ip_address

    address: str = get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


async def _within(
    deadline_s: float, call: Callable[[], object], *, meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """Run a blocking call of Ray's, which may never return where the head is gone; leave it behind then, with False.

    `meanwhile` is called again and again until then, on this thread.
    """
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)
        # By then nobody may wait any more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(done.set)

    # A daemon, for which nobody waits in the end.
    threading.Thread(target=run, name=f"{call.__name__}", daemon=True).start()
    until_s = loop.time() + deadline_s
    while not done.is_set() and (left_s := until_s - loop.time()) > 0:
        meanwhile()
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), min(left_s, _PERIOD_S))
    if not done.is_set():
        logger.warning("Ray did not answer within %.0f s; what is left is killed", deadline_s)
    if errors:
        logger.warning("Ray could not end in order: %s", errors[0])
    return done.is_set()
