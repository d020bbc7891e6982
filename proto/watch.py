"""Follows the registry: every list it sends goes to whoever watches; while it is away, the last view stays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from baton import faults
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.channels import open_channel

__all__ = ["watch_registry"]

_log = logging.getLogger(__name__)
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0)
_OPTIONS = (
    # A registry that vanished without a word is noticed, and its connection is shared with nobody.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
)


async def watch_registry(
    registry_address: str,
    watcher_id: str,
    on_list: Callable[[pb.InstanceList], None],
    stop: asyncio.Event,
    *,
    on_away: Callable[[], None] = lambda: None,
) -> None:
    """Call `on_list` with every list the registry sends, reconnecting until `stop` is set or this is cancelled.

    `on_away` is called each time it cannot be reached.
    """
    failures = 0
    while not stop.is_set():
        async with open_channel(registry_address, _OPTIONS) as channel:
            try:
                async for instances in rpc.RegistryStub(channel).Watch(pb.WatchRequest(watcher_id=watcher_id)):
                    if failures:
                        _log.info("registry %s answers again", registry_address)
                    failures = 0
                    if faults.is_possible:
                        _learn_peers(instances)
                    on_list(instances)
                reason = "it closed the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
        on_away()
        if failures == 0:
            _log.warning("registry %s is away (%s); serving with the last view", registry_address, reason)
        try:
            await asyncio.wait_for(stop.wait(), _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
        except TimeoutError:
            failures += 1


def _learn_peers(instances: pb.InstanceList) -> None:
    for status in instances.instances:
        for address in (status.address, *(rank.address for rank in status.ranks)):
            faults.learn_peer(address, status.instance_id)
