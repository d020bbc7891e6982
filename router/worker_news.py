"""What workers tell besides tokens, and what becomes of it: the thin shell around `prefix_index`.

    decode workers:  DecodeLink --.
                                  +--> blocks --> PrefixIndex      steps --> StepSink (the cost model)
    prefill workers: Follow ------'

Says loudly where the signal is stale: one warning per episode, and metrics. Whoever is stale while its stream stands is
asked for a snapshot again from time to time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

from baton.metrics import Metrics
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.follow import Follow
from baton.router.instances import Instance
from baton.router.news_sink import StepSink
from baton.router.prefix_index import PrefixIndex

__all__ = ["WorkerNews"]

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5
_LOOKS_PER_ASKING = 10
_SWEEP_KEYS = 1000
"""Taken out of the index at a time: some hundred microseconds."""


def _learn_nothing(instance: Instance, samples: Sequence[pb.StepSample]) -> None:
    """Where there is no cost model."""


class WorkerNews:
    """Implements `NewsSink`; owns the streams to prefill workers.

    Args:
        on_steps: learns from the steps that workers tell of.
        on_load: called after a prefill worker said how it is.
        ask: asks the decode worker of this id for a snapshot of its blocks.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        router_id: str,
        silence_s: float,
        ask: Callable[[str], None],
        on_steps: StepSink | None = None,
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        self.index = PrefixIndex()
        self._metrics = metrics
        self._router_id = router_id
        self._silence_s = silence_s
        self._ask = ask
        self._on_steps = on_steps or _learn_nothing
        self._on_load = on_load
        self._follows: dict[str, Follow] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._next_look: asyncio.TimerHandle | None = None
        self._next_sweep: asyncio.Handle | None = None
        self._looks = 0

    def reconcile(self, instances: Iterable[Instance]) -> None:
        """Follow new prefill workers, and no longer those that are gone."""
        current = {instance.instance_id: instance for instance in instances if instance.status.role == "prefill"}
        for instance_id, follow in list(self._follows.items()):
            if current.get(instance_id) is not follow.instance:
                del self._follows[instance_id]
                self.forget(instance_id)
                self._close(follow)
        for instance_id, instance in current.items():
            if instance.status.address and instance_id not in self._follows:
                follow = Follow(
                    instance,
                    router_id=self._router_id,
                    silence_s=self._silence_s,
                    sink=self,
                    on_load=self._on_load,
                )
                self._follows[instance_id] = follow
                follow.start()
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def forget(self, instance_id: str) -> None:
        """This worker, or its incarnation, is gone."""
        self.index.forget(instance_id)
        if self._next_sweep is None:
            self._sweep()

    async def close(self) -> None:
        """End every stream."""
        for handle in (self._next_look, self._next_sweep):
            if handle is not None:
                handle.cancel()
        for follow in self._follows.values():
            self._close(follow)
        self._follows.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)

    # ------------------------------------------------------------ what streams say

    def opened(self, instance: Instance) -> None:
        """See `NewsSink`."""
        self.index.opened(instance.instance_id, instance.status.incarnation, _now_s())

    def closed(self, instance: Instance) -> None:
        """See `NewsSink`."""
        self.index.closed(instance.instance_id, instance.status.incarnation, _now_s())

    def blocks(self, instance: Instance, events: Sequence[pb.BlockEvents]) -> bool:
        """See `NewsSink`."""
        now_s, instance_id, incarnation = _now_s(), instance.instance_id, instance.status.incarnation
        has_gap = False
        for batch in events:
            if self.index.apply(instance_id, incarnation, batch, now_s):
                has_gap = True
                _log.warning("%s: %s; asking for a snapshot", instance_id, self.index.reason(instance_id))
                self._metrics.block_event_gaps.labels(instance=instance_id).inc()
        return has_gap

    def steps(self, instance: Instance, samples: Sequence[pb.StepSample]) -> None:
        """See `NewsSink`."""
        self._on_steps(instance, samples)

    # ------------------------------------------------------------ how true it is

    def _look(self) -> None:
        self._next_look = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)
        for instance_id, reason in self.index.look(_now_s()):
            _log.warning(
                "what is known of the blocks of %s is stale (%s): requests are routed by what was sent there lately",
                instance_id,
                reason,
            )
        stale = self.index.stale()
        self._metrics.set_prefix_index(num_blocks=len(self.index), num_stale=len(stale))
        self._looks += 1
        if self._looks % _LOOKS_PER_ASKING == 0:
            for instance_id in stale:
                follow = self._follows.get(instance_id)
                if follow is not None:
                    follow.ask_for_snapshot()
                else:
                    self._ask(instance_id)

    def _sweep(self) -> None:
        self._next_sweep = None
        if self.index.sweep(_SWEEP_KEYS):
            self._next_sweep = asyncio.get_running_loop().call_soon(self._sweep)

    def _close(self, follow: Follow) -> None:
        task = asyncio.create_task(follow.close(), name="follow end")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
