"""Taking instances away and bringing them back, one after another or at once; blocking, for the command line.

    present --Hold--> draining --> away --release--> starting --> ready, as another incarnation

An instance that drains finishes what it can; what is left goes on elsewhere. An interrupted restart releases what it
holds on its way out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from baton.cluster.client import get_cluster, hold_instance
from baton.errors import DeadlineError, UnavailableError
from baton.proto.baton.v1.worker_pb2 import WorkerStatus

__all__ = ["drain", "restart", "restartable"]

_POLL_S = 0.2
_AWAY_TIMEOUT_S = 60.0


def restartable(registry_address: str, wanted: Sequence[str]) -> list[str]:
    """Ids of `wanted`, or of every worker where nothing is wanted, prefill workers first.

    Raises:
        UnavailableError: the registry does not answer.
    """
    if wanted:
        return list(wanted)
    statuses = get_cluster(registry_address).instances.instances
    workers = [status for status in statuses if status.role in ("prefill", "decode")]
    return [status.instance_id for status in sorted(workers, key=lambda status: status.role != "prefill")]


def drain(registry_address: str, instance_id: str) -> None:
    """Take an instance away; returns when it has ended.

    Raises:
        NotFoundError, UnavailableError: see `hold_instance`.
        DeadlineError: it did not end.
    """
    hold_instance(registry_address, instance_id, held=True)
    _wait(
        lambda: _is_gone(registry_address, instance_id),
        _AWAY_TIMEOUT_S,
        f"{instance_id} did not end within {_AWAY_TIMEOUT_S:.0f} s",
    )


def restart(
    registry_address: str,
    instance_ids: Sequence[str],
    *,
    rolling: bool,
    ready_timeout_s: float,
    tell: Callable[[str], None],
) -> None:
    """Replace instances: rolling, each one when the one before is ready again; else all at once.

    Raises:
        NotFoundError, UnavailableError: see `hold_instance`.
        DeadlineError: one did not end, or did not become ready.
    """
    groups = [[instance_id] for instance_id in instance_ids] if rolling else [list(instance_ids)]
    for group in groups:
        began_s = time.monotonic()
        try:
            for instance_id in group:
                tell(f"draining {instance_id}")
                hold_instance(registry_address, instance_id, held=True)
            for instance_id in group:
                drain(registry_address, instance_id)
        finally:
            for instance_id in group:
                hold_instance(registry_address, instance_id, held=False)
        for instance_id in group:
            _wait(
                lambda instance_id=instance_id: _is_ready(registry_address, instance_id),  # type: ignore[misc]
                ready_timeout_s,
                f"{instance_id} was not ready again within {ready_timeout_s:.0f} s; `baton status` tells more",
            )
            tell(f"{instance_id} is ready again after {time.monotonic() - began_s:.1f} s")


def _statuses(registry_address: str) -> dict[str, WorkerStatus]:
    return {status.instance_id: status for status in get_cluster(registry_address).instances.instances}


def _is_gone(registry_address: str, instance_id: str) -> bool:
    instances = get_cluster(registry_address).instances
    # A registry that has just begun does not know everybody who is there.
    return not instances.is_partial and instance_id not in {status.instance_id for status in instances.instances}


def _is_ready(registry_address: str, instance_id: str) -> bool:
    status = _statuses(registry_address).get(instance_id)
    return status is not None and status.state == "ready"


def _wait(condition: Callable[[], bool], timeout_s: float, text: str) -> None:
    until_s = time.monotonic() + timeout_s
    while True:
        # A controller that died is back in a moment.
        with suppress(UnavailableError):
            if condition():
                return
        if time.monotonic() >= until_s:
            raise DeadlineError(text)
        time.sleep(_POLL_S)
