"""Carries out what `ejection.py` decides: looks at the workers while requests run, logs, counts, gives streams up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from baton.metrics import Metrics
from baton.router.ejection import Ejection, EjectionConfig, Reading
from baton.router.instances import InstanceTable
from baton.router.routing.facts import InstanceView

__all__ = ["Outliers"]

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5
_ROLES = ("prefill", "decode")


class Outliers:
    """Slow workers of one router's table.

    Args:
        on_abandon: told (instance id, reason) when requests that run on a worker should go on elsewhere.
    """

    def __init__(
        self,
        table: InstanceTable,
        metrics: Metrics,
        config: EjectionConfig,
        *,
        on_abandon: Callable[[str, str], None],
    ) -> None:
        self._table = table
        self._metrics = metrics
        self._ejection = Ejection(config)
        self._on_abandon = on_abandon
        self._num_attempts = 0
        self._next_look: asyncio.TimerHandle | None = None

    def is_out(self, view: InstanceView) -> bool:
        """Whether new requests should go elsewhere."""
        return self._ejection.is_out(view.instance_id, view.own_requests)

    def state_of(self, instance_id: str) -> str:
        """ "healthy", "ejected" or "probing"."""
        return self._ejection.state_of(instance_id)

    def attempt_began(self) -> None:
        """Some worker has work: look at all of them now and then."""
        self._num_attempts += 1
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def attempt_ended(self) -> None:
        """One less."""
        self._num_attempts -= 1

    def close(self) -> None:
        """Look no more."""
        if self._next_look is not None:
            self._next_look.cancel()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._next_look = loop.call_later(_LOOK_EVERY_S, self._look) if self._num_attempts else None
        readings = [
            Reading(
                instance_id=instance.instance_id,
                role=instance.status.role,
                incarnation=instance.status.incarnation,
                usable=instance.view().usable,
                slowness=instance.load.slowness,
                own_requests=instance.own_requests,
            )
            for instance in self._table.all()
        ]
        for outcome in self._ejection.tick(readings, loop.time()):
            if not outcome.pause_s:
                _log.info("%s gets requests again: %s", outcome.instance_id, outcome.reason)
                continue
            _log.warning("%s is set aside: %s", outcome.instance_id, outcome.reason)
            self._metrics.ejections.labels(instance=outcome.instance_id).inc()
            if outcome.abandon:
                self._on_abandon(outcome.instance_id, f"{outcome.instance_id} is set aside: {outcome.reason}")
        for role in _ROLES:
            self._metrics.set_ejected(role, self._ejection.num_ejected(role))
