"""Who is in the cluster, as this router sees it: feeds `ViewMerge` from the registry and the shared state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.watch import watch_registry
from baton.router.view_merge import Source, ViewMerge
from baton.state.base import SharedState
from baton.state.instances import LEASE_S
from baton.state.watch import watch_state

__all__ = ["follow_cluster"]


async def follow_cluster(
    registry_address: str,
    watcher_id: str,
    state: SharedState | None,
    on_view: Callable[[list[pb.WorkerStatus]], None],
    stop: asyncio.Event,
) -> None:
    """Call `on_view` with all instances whenever a list came or a source was lost, until `stop` is set.

    Args:
        state: None where no other process sees it; the registry alone is followed then.
    """
    registry, shared = Source(), Source(linger_s=LEASE_S)
    merge = ViewMerge([registry] if state is None else [registry, shared], lease_s=LEASE_S)
    loop = asyncio.get_running_loop()

    def on_registry(instances: pb.InstanceList) -> None:
        merge.heard(
            registry,
            instances.instances,
            loop.time(),
            is_partial=instances.is_partial,
            author=instances.incarnation,
        )
        on_view(merge.view(loop.time()))

    def on_state(statuses: list[pb.WorkerStatus]) -> None:
        merge.heard(shared, statuses, loop.time())
        on_view(merge.view(loop.time()))

    def on_away(source: Source) -> None:
        merge.lost(source, loop.time())
        if source.entries:
            on_view(merge.view(loop.time()))

    watches = [watch_registry(registry_address, watcher_id, on_registry, stop, on_away=lambda: on_away(registry))]
    if state is not None:
        watches.append(watch_state(state, on_state, lambda: on_away(shared), stop))
    await asyncio.gather(*watches)
