"""One process, a rank of one role: what every launcher runs, by `python -m baton.cluster.role` or in an actor.

    configuration (stdin) -> thread settings -> logs -> claim of cores -> baton.<role>.service.serve(...) until SIGTERM

Thread counts are set in the environment before torch is imported, since OpenMP reads them once. They are those of
torch's own operators; the kernels' threads, which do nearly all the work, follow the board of cores.
A role that fails ends with code 1 and one line that says why; a failure that is not a `BatonError` logs its traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from baton import faults
from baton.cluster.cores import available_cores, group_cores, num_threads, place_of, whole_cores
from baton.cluster.event_loop import run_event_loop
from baton.config import ClusterConfig, config_from_json
from baton.errors import BatonError
from baton.log import setup_logging
from baton.placement import Placement

if TYPE_CHECKING:
    from baton.engine.core_board import CoreClaim

__all__ = ["SERVICES", "die_with_parent", "main", "prepare", "serve_role"]

# Not __name__, which is __main__ here.
logger = logging.getLogger("baton.cluster.role")

SERVICES = {
    "prefill": "baton.prefill_worker.service",
    "decode": "baton.decode_worker.service",
    "router": "baton.router.service",
}
_PR_SET_PDEATHSIG = 1


def prepare(config: ClusterConfig, role: str, placement: Placement) -> None:
    """Set this process's thread counts and logs. Before torch is imported."""
    assert "torch" not in sys.modules
    threads = str(num_threads(config, role, available_cores()))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = threads
    # OpenMP's threads must not spin on a core that another worker could use.
    for name, value in (("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0"), ("KMP_BLOCKTIME", "0")):
        os.environ.setdefault(name, value)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    setup_logging(level=config.log.level, format=config.log.format, instance_id=placement.name)
    faults.install(
        config.faults.rules,
        instance_id=placement.instance_id,
        role=role,
        allow_at_runtime=config.faults.allow_at_runtime,
    )


async def serve_role(
    config: ClusterConfig, role: str, placement: Placement, registry_address: str, stop: asyncio.Event
) -> None:
    """Run one rank of the service of `role` until `stop` is set.

    Raises:
        BatonError: what the service could not do, for the user.
    """
    faults.learn_peer(registry_address, "controller")
    service = importlib.import_module(SERVICES[role])
    claim = None if role == "router" else _claim(config, role, placement)
    try:
        await service.serve(config, placement=placement, registry_address=registry_address, stop=stop)
    finally:
        if claim is not None:
            claim.release()


def _claim(config: ClusterConfig, role: str, placement: Placement) -> CoreClaim | None:
    """This rank's cores; None where a GPU computes, whose driver thread is left to the system."""
    torch = importlib.import_module("torch")
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return None
    host_cores = whole_cores()
    if not host_cores:
        return None
    core_board = importlib.import_module("baton.engine.core_board")
    place = place_of(role, placement.index, placement.rank)
    claim: CoreClaim | None = core_board.claim_cores(config.name, place, host_cores, group_cores(config))
    if claim is not None:
        threads = config.cpu_of(role).threads
        claim.attach(None if threads == "auto" else threads)
    return claim


def main(arguments: list[str] | None = None) -> int:
    """Entry of the process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="baton.cluster.role")
    parser.add_argument("--role", required=True, choices=sorted(SERVICES))
    parser.add_argument("--instance-id", required=True)
    parser.add_argument("--start-id", required=True)
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--num-ranks", required=True, type=int)
    parser.add_argument("--host", required=True)
    parser.add_argument("--registry", required=True, metavar="HOST:PORT")
    options = parser.parse_args(arguments)
    placement = Placement(
        instance_id=options.instance_id,
        start_id=options.start_id,
        rank=options.rank,
        num_ranks=options.num_ranks,
        host=options.host,
    )
    die_with_parent()
    config = config_from_json(sys.stdin.read())
    prepare(config, options.role, placement)
    try:
        run_event_loop(_serve_until_signal(config, options.role, placement, options.registry))
    except BatonError as error:
        # Bare, since it is what `baton up` shows of this log.
        print(error, file=sys.stderr)
        return 1
    except Exception:
        logger.exception("%s failed", placement.name)
        return 1
    return 0


async def _serve_until_signal(config: ClusterConfig, role: str, placement: Placement, registry_address: str) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        # The kernel ends the process when an orderly end takes longer than the grace, whatever hangs.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, config.stop_grace_s)
        loop.call_soon_threadsafe(stop.set)

    # Not loop.add_signal_handler: that one would wait for a loop that is busy, for example loading a model.
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    await serve_role(config, role, placement, registry_address, stop)


def die_with_parent() -> None:
    """Get SIGTERM when the launcher dies, even by SIGKILL."""
    parent = os.environ.get("BATON_PARENT_PID")
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit("the launcher is gone")


if __name__ == "__main__":
    sys.exit(main())
