"""The life of `baton up`: check, start, wait until ready, tell, serve, stop.

Whatever happens between start and stop, including a second Ctrl-C, every process that was started is ended. A
controller that dies and returns ends nothing: the list of instances is followed again where it broke off.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from baton.cluster.controller_service import desired_instances, empty_logs
from baton.cluster.launchers.base import Host, ray_installed, resolve_launcher
from baton.cluster.launchers.instance_log import log_name, log_path, log_tail
from baton.cluster.launchers.local import LocalHost
from baton.cluster.launchers.ray_environment import set_driver_environment, set_private_environment
from baton.cluster.model_fit import check_fit
from baton.cluster.progress import Progress
from baton.cluster.router_ports import held_router_ports
from baton.cluster.run_state import RunState, hold_run, log_dir, write_run_state
from baton.cluster.summary import faults_text, ready_text
from baton.config import ClusterConfig, resolve_model_path, split_host_port
from baton.errors import ConfigError, DeadlineError, UnavailableError
from baton.log import setup_logging
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc

__all__ = ["run_foreground"]

logger = logging.getLogger(__name__)

_LOG_LINES_SHOWN = 12
_RETRY_S = 0.5
_CHANNEL_OPTIONS = (
    # A registry that returns is found within a second, however long it was away.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


async def run_foreground(config: ClusterConfig, *, detached: bool = False) -> None:
    """Run a cluster until SIGINT, SIGTERM, SIGHUP (the terminal is gone) or `baton down`.

    `detached`: no terminal is there for a Ctrl-C, and what is printed says so.

    Raises:
        ConfigError: port taken, no such model, or a cluster of this name runs already.
        UnavailableError: an instance ended before it was ready.
        DeadlineError: not everything was ready within `startup_timeout_s`.
    """
    setup_logging(level="warning", format=config.log.format)
    launcher = resolve_launcher(config.launcher)
    _check_before_start(config, launcher)
    folder = log_dir(config.name)
    with hold_run(config.name), held_router_ports(config) as config:
        empty_logs(config, folder)
        host = _make_host(config, launcher, folder)
        stop = asyncio.Event()
        try:
            print(f"starting {config.name} with launcher {launcher}, logs in {folder}", flush=True)
            print(faults_text(config), end="", flush=True)
            address = await host.start()
            # After the start: Ray sets a SIGTERM handler of its own.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await _serve(config, launcher, folder, address, host, stop, detached=detached)
        finally:
            print("stopping", flush=True)
            await host.stop()
    print("stopped", flush=True)


async def _serve(
    config: ClusterConfig,
    launcher: str,
    folder: Path,
    address: str,
    host: Host,
    stop: asyncio.Event,
    *,
    detached: bool,
) -> None:
    state = RunState(
        name=config.name,
        pid=os.getpid(),
        launcher=launcher,
        registry_address=address,
        log_dir=str(folder),
        model=config.served_model_name,
        api_key=config.router.api_key,
    )
    write_run_state(state)
    async with grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        watch = _watch(channel)
        ended = [asyncio.create_task(stop.wait()), asyncio.create_task(host.wait())]
        try:
            starting = asyncio.create_task(_wait_ready(config, folder, watch))
            await asyncio.wait([starting, *ended], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                _raise_failures(ended)
                return
            instances = starting.result()
            router = next(status for status in instances if status.role == "router")
            state = state.ready_at(router.http_url, router.grpc_address)
            write_run_state(state)
            print(ready_text(config, launcher, instances, detached=detached), flush=True)
            following = asyncio.create_task(_tell_changes(watch))
            await asyncio.wait([following, *ended], return_when=asyncio.FIRST_COMPLETED)
            following.cancel()
            _raise_failures([following, *ended])
        finally:
            for task in ended:
                task.cancel()


def _raise_failures(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled():
            task.result()


async def _watch(channel: grpc.aio.Channel) -> AsyncIterator[worker_pb2.InstanceList]:
    """Every list of the registry, for ever: one that is away is waited for."""
    stub = worker_pb2_grpc.RegistryStub(channel)
    request = worker_pb2.WatchRequest(watcher_id=f"up-{os.getpid()}")
    while True:
        try:
            async for instances in stub.Watch(request, wait_for_ready=True):
                yield instances
        except grpc.aio.AioRpcError as error:
            logger.info("the registry broke off: %s", error.details())
        await asyncio.sleep(_RETRY_S)


async def _wait_ready(
    config: ClusterConfig, folder: Path, watch: AsyncIterator[worker_pb2.InstanceList]
) -> list[worker_pb2.WorkerStatus]:
    """Instances, once all desired ones are ready."""
    desired = desired_instances(config)
    wanted = set(desired)
    latest: dict[str, worker_pb2.WorkerStatus] = {}
    with Progress(sys.stdout) as progress:
        try:
            async with asyncio.timeout(config.startup_timeout_s):
                async for instances in watch:
                    latest = {status.instance_id: status for status in instances.instances}
                    progress.show(instances.instances)
                    for status in latest.values():
                        if status.state == "dead":
                            text = _failure_text(folder, status.instance_id, status.instance_id, status.detail)
                            raise UnavailableError(text)
                    if wanted <= {key for key, status in latest.items() if status.state == "ready"}:
                        return list(latest.values())
        except TimeoutError as error:
            late = sorted(key for key in wanted if key not in latest or latest[key].state != "ready")
            doing = latest[late[0]].detail if late[0] in latest else "not started"
            role = desired[late[0]].role
            log = log_name(late[0], config.driver_rank_of(role), config.num_ranks_of(role))
            raise DeadlineError(
                f"not ready within {config.startup_timeout_s:.0f} s: {', '.join(late)}\n"
                + _failure_text(folder, late[0], log, doing)
                + "\nraise startup_timeout_s if it is only slow"
            ) from error
    raise AssertionError("the watch never ends")


async def _tell_changes(watch: AsyncIterator[worker_pb2.InstanceList]) -> None:
    """Print when an instance dies or comes back while the cluster serves."""
    states: dict[str, str] = {}
    async for instances in watch:
        for status in instances.instances:
            before = states.get(status.instance_id, "ready")
            states[status.instance_id] = status.state
            if status.state not in (before, "draining"):
                print(f"{status.instance_id}: {status.state} {status.detail}".rstrip(), flush=True)


def _failure_text(folder: Path, instance_id: str, log: str, detail: str) -> str:
    lines = log_tail(folder, log, _LOG_LINES_SHOWN)
    shown = "".join(f"\n  | {line}" for line in lines)
    return (
        f"{instance_id}: {detail}{shown}\n"
        f"the whole log is {log_path(folder, log)}; `baton doctor` checks what a start needs"
    )


def _make_host(config: ClusterConfig, launcher: str, folder: Path) -> Host:
    if launcher == "local":
        return LocalHost(config, folder)
    (set_private_environment if config.ray.address is None else set_driver_environment)()
    from baton.cluster.launchers.ray import RayHost

    return RayHost(config, folder, _tell)


def _tell(text: str) -> None:
    print(text, flush=True)


def _check_before_start(config: ClusterConfig, launcher: str) -> None:
    """Find out at once what would otherwise fail in a process of its own, later."""
    if launcher == "ray" and not ray_installed():
        raise ConfigError("launcher: ray is not installed here; pip install ray, or use launcher: local")
    if config.launcher == "auto" and launcher == "local":
        print("Ray is not installed: using plain processes (launcher: local)", flush=True)
    folder = resolve_model_path(config.model.path)
    for key in ("http", "grpc"):
        host, port = split_host_port(getattr(config.router, key))
        taken = port_error(host, port)
        if taken:
            raise ConfigError(
                f"router.{key}: cannot listen on {host}:{port} ({taken}); try --set router.{key}={host}:0"
            )
    check_fit(config, launcher, folder)


def port_error(host: str, port: int) -> str:
    """Why nothing can listen on host:port; empty when it is free (or 0, any free one)."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""
