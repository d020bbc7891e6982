"""Follows the instances of the shared state: read at the start, whenever one says that it changed, and every second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from baton.errors import UnavailableError
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.state.base import SharedState
from baton.state.instances import CHANNEL, GROUP, decode_instance

__all__ = ["watch_state"]

_log = logging.getLogger(__name__)
_PERIOD_S = 1.0
_RETRY_S = 0.25
# Changes that come close together are read together.
_GATHER_S = 0.02
_MAX_WARNED = 256


async def watch_state(
    state: SharedState,
    on_list: Callable[[list[pb.WorkerStatus]], None],
    on_away: Callable[[], None],
    stop: asyncio.Event,
) -> None:
    """Call `on_list` with all instances that `state` holds, `on_away` when it does not answer, until `stop` is set.

    Both are called again and again, also where nothing has changed. What is no instance is left out, with one warning.
    """
    changed = asyncio.Event()
    warned: set[tuple[str, str]] = set()
    listener = asyncio.create_task(_listen(state, changed), name="listen for instances")
    try:
        while not stop.is_set():
            wait_s = _PERIOD_S
            changed.clear()
            try:
                on_list(_instances(await state.scan(GROUP), warned))
            except UnavailableError:
                on_away()
                wait_s = _RETRY_S
            await asyncio.sleep(_GATHER_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), wait_s)
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)


async def _listen(state: SharedState, changed: asyncio.Event) -> None:
    while True:
        with contextlib.suppress(UnavailableError):
            async for _ in state.listen(CHANNEL):
                changed.set()
        await asyncio.sleep(_RETRY_S)


def _instances(values: dict[str, bytes], warned: set[tuple[str, str]]) -> list[pb.WorkerStatus]:
    statuses = []
    for key, value in values.items():
        status = decode_instance(key, value)
        if isinstance(status, pb.WorkerStatus):
            statuses.append(status)
        elif (key, status) not in warned and len(warned) < _MAX_WARNED:
            warned.add((key, status))
            _log.warning("%r in the shared state is ignored: %s", key[:120], status)
    return statuses
