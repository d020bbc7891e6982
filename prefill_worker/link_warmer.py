"""Makes links to decode instances before a request needs them: at start, and whenever a decode instance turns up.

    registry list --a decode instance in an incarnation not seen before--> every rank here makes its links to it

A link that cannot be made is made again by the first shipment that needs it, so failures are only logged. `first_done`
lets an instance wait with its readiness until the links to all that was there at its start have been tried.
Lives on the driver's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from baton.errors import BatonError
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.shipment import DecodeTarget
from baton.prefill_worker.targets import decode_target
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.watch import watch_registry

__all__ = ["LinkWarmer", "warm_links"]

_log = logging.getLogger(__name__)
_WARM_TIMEOUT_S = 10.0


class LinkWarmer:
    """Links of a prefill instance.

    Args:
        peer, sender: of the driver's own rank.
        tell_followers: sends a command to every other rank; each answers with `LinksWarm`.
    """

    def __init__(
        self,
        peer: LocalPeer,
        sender: HandoverSender,
        *,
        registry_address: str,
        tell_followers: Callable[[pb.RankCommand], None],
    ) -> None:
        self._peer = peer
        self._sender = sender
        self._registry_address = registry_address
        self._tell = tell_followers
        self._known: dict[str, bytes] = {}
        self._serial = 0
        self._missing: dict[int, set[int]] = {}
        self._changed = asyncio.Event()
        self._listed = False
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begins to follow the registry."""
        watch = watch_registry(self._registry_address, f"links of {self._peer}", self._on_list, self._stop)
        self._add(asyncio.create_task(watch, name="watch for decode instances"))

    async def first_done(self, timeout_s: float) -> None:
        """Returns once the links to every decode instance of the registry's first list have been tried, or in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._listed or self._missing:
                    self._changed.clear()
                    await self._changed.wait()

    def links_warm(self, rank: int, serial: int) -> None:
        """A rank has tried."""
        missing = self._missing.get(serial)
        if missing is not None:
            missing.discard(rank)
            if not missing:
                del self._missing[serial]
        self._changed.set()

    async def close(self) -> None:
        """Follows no more."""
        self._stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_list(self, instances: pb.InstanceList) -> None:
        present = {
            status.instance_id: status
            for status in instances.instances
            if status.role == "decode" and status.state == "ready"
        }
        for instance_id in set(self._known) - set(present):
            del self._known[instance_id]
        for instance_id, status in present.items():
            if self._known.get(instance_id) != status.incarnation:
                self._known[instance_id] = status.incarnation
                self._warm(status)
        self._listed = True
        self._changed.set()

    def _warm(self, status: pb.WorkerStatus) -> None:
        self._serial += 1
        serial, rank = self._serial, self._peer.rank
        self._missing[serial] = set(range(self._peer.num_ranks))
        ranks = [pb.RankAddress(address=each.address, incarnation=each.incarnation) for each in status.ranks]
        self._tell(
            pb.RankCommand(warm_links=pb.WarmLinks(serial=serial, decode_ranks=ranks, decode_layout=status.layout))
        )
        work = warm_links(self._sender, decode_target(ranks, status.layout), lambda: self.links_warm(rank, serial))
        self._add(asyncio.create_task(work, name=f"links to {status.instance_id}"))

    def _add(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def warm_links(sender: HandoverSender, target: DecodeTarget, done: Callable[[], None]) -> None:
    """Makes one rank's links to a decode instance; `done` is called in the end, whether it worked or not."""
    try:
        async with asyncio.timeout(_WARM_TIMEOUT_S):
            await sender.warm_up(target)
    except (BatonError, TimeoutError) as error:
        _log.warning("a link to %s could not be made yet: %s", target.ranks[0].address, error)
    finally:
        done()
