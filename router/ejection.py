"""Which workers are set aside because they are slow, though alive: pure. Time is an argument; outcomes are values.

    HEALTHY --too slow for `_HOLD_S`--> EJECTED --pause over--> PROBING --fast, or not slow, `_GRACE_S` after its first
       ^                                   ^                      |       request--> HEALTHY
       |                                   +--slow again: twice as long a pause
       +------ a new incarnation begins anew

How slow a worker is it says itself (`WorkerLoad.slowness`: over its own best); it is too slow where that is more than
`threshold` times what the other workers of its role say, at their median: where all are slow, the machine is, and
nobody is set aside. Never more than half of a role is, and never the only one. The pauses double, and shrink again in
good times: outlier ejection as Envoy does it, by step times in place of errors.

While a worker is set aside it computes nothing that it could be judged by, and what it last said is old. So its word
counts again only when it has had work for a while; until then it gets a few requests at a time.

Requests that run on a worker that is set aside stay there: it is alive, and moving costs a prefill. Only where it is
`abandon` times as slow they are given up, and go on elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

__all__ = ["Ejection", "EjectionConfig", "Outcome", "Reading"]

_HOLD_S = 3.0
_STALE_S = 5.0
_GRACE_S = 3.0
_MAX_PROBES = 2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 300.0
_MAX_SHARE = 0.5
_MAX_COUNTED = 6  # the longest pause is reached


@dataclass(frozen=True, slots=True, kw_only=True)
class EjectionConfig:
    """When a worker counts as slow; None: never."""

    threshold: float | None = 4.0
    abandon: float | None = 32.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is known of a worker now.

    Attributes:
        usable: ready for new requests.
        slowness: as it last said; 0 where it does not know, having computed little lately.
        own_requests: this router's, there and not ended.
    """

    instance_id: str
    role: str
    incarnation: bytes
    usable: bool
    slowness: float
    own_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A worker that was set aside (`pause_s` > 0) or taken back.

    Attributes:
        abandon: give up what runs there.
        reason: for the log.
    """

    instance_id: str
    role: str
    pause_s: float
    abandon: bool
    reason: str


class _State(Enum):
    HEALTHY = "healthy"
    EJECTED = "ejected"
    PROBING = "probing"


@dataclass(slots=True)
class _Worker:
    """`since_s`: of being too slow, where healthy; of its first request, where probing; None: not yet.

    `seen_s`: when it was last too slow.
    """

    role: str
    incarnation: bytes
    state: _State = _State.HEALTHY
    since_s: float | None = None
    seen_s: float = 0.0
    until_s: float = 0.0
    ejections: int = 0


class Ejection:
    """All workers of one router."""

    def __init__(self, config: EjectionConfig) -> None:
        self._config = config
        self._workers: dict[str, _Worker] = {}

    def is_out(self, instance_id: str, own_requests: int) -> bool:
        """Whether new requests should go elsewhere."""
        worker = self._workers.get(instance_id)
        if worker is None or worker.state is _State.HEALTHY:
            return False
        return worker.state is _State.EJECTED or own_requests >= _MAX_PROBES

    def state_of(self, instance_id: str) -> str:
        """ "healthy", "ejected" or "probing"."""
        worker = self._workers.get(instance_id)
        return (worker.state if worker is not None else _State.HEALTHY).value

    def num_ejected(self, role: str) -> int:
        """How many workers of `role` are set aside."""
        return sum(worker.state is _State.EJECTED and worker.role == role for worker in self._workers.values())

    def tick(self, readings: Sequence[Reading], now_s: float) -> list[Outcome]:
        """Judges every worker; call it every half second or so while there is work.

        Args:
            readings: one of each known worker.
        """
        known = {reading.instance_id: reading for reading in readings}
        for gone in self._workers.keys() - known.keys():
            del self._workers[gone]
        outcomes = []
        for reading in readings:
            worker = self._workers.get(reading.instance_id)
            if worker is None or worker.incarnation != reading.incarnation:
                worker = self._workers[reading.instance_id] = _Worker(reading.role, reading.incarnation)
            outcome = self._judge(worker, reading, readings, now_s)
            if outcome is not None:
                outcomes.append(outcome)
        return outcomes

    def _judge(self, worker: _Worker, reading: Reading, readings: Sequence[Reading], now_s: float) -> Outcome | None:
        if self._config.threshold is None:
            return None
        if worker.state is _State.EJECTED:
            if now_s < worker.until_s:
                return None
            worker.state, worker.since_s = _State.PROBING, None
            return self._readmitted(reading, "its pause is over")
        if worker.state is _State.PROBING:
            if worker.since_s is None:
                worker.since_s = now_s if reading.own_requests else None
                return None
            if now_s - worker.since_s < _GRACE_S:
                return None
            if self._times_others(reading, readings) < self._config.threshold:
                worker.state, worker.since_s, worker.until_s = _State.HEALTHY, None, now_s + _pause_s(worker.ejections)
                return None
            return self._eject(worker, reading, readings, now_s)
        if worker.ejections and now_s >= worker.until_s:
            worker.ejections -= 1
            worker.until_s = now_s + _pause_s(worker.ejections)
        if not reading.slowness:
            return None
        if self._times_others(reading, readings) < self._config.threshold:
            worker.since_s = None
            return None
        if worker.since_s is None or now_s - worker.seen_s > _STALE_S:
            worker.since_s = now_s
        worker.seen_s = now_s
        return self._eject(worker, reading, readings, now_s) if now_s - worker.since_s >= _HOLD_S else None

    def _times_others(self, reading: Reading, readings: Sequence[Reading]) -> float:
        """How many times slower than the others of its role."""
        others = [
            r.slowness for r in readings if r.role == reading.role and r is not reading and r.usable and r.slowness
        ]
        return reading.slowness / (statistics.median(others) if others else 1.0)

    def _eject(self, worker: _Worker, reading: Reading, readings: Sequence[Reading], now_s: float) -> Outcome | None:
        num_peers = sum(r.role == reading.role and r.usable for r in readings)
        if self.num_ejected(reading.role) + 1 > num_peers * _MAX_SHARE:
            return None
        times = self._times_others(reading, readings)
        worker.ejections = min(worker.ejections + 1, _MAX_COUNTED)
        pause_s = _pause_s(worker.ejections)
        worker.state, worker.since_s, worker.until_s = _State.EJECTED, None, now_s + pause_s
        abandon = self._config.abandon is not None and times >= self._config.abandon
        reason = (
            f"its steps take {reading.slowness:.1f} times as long as at their best, {times:.1f} times what the other"
            f" {reading.role} workers say (router.eject_slowness={self._config.threshold:g}): no new requests for"
            f" {pause_s:.0f} s" + (", and what runs there goes on elsewhere" if abandon else "")
        )
        return Outcome(
            instance_id=reading.instance_id, role=reading.role, pause_s=pause_s, abandon=abandon, reason=reason
        )

    def _readmitted(self, reading: Reading, reason: str) -> Outcome:
        return Outcome(instance_id=reading.instance_id, role=reading.role, pause_s=0.0, abandon=False, reason=reason)


def _pause_s(ejections: int) -> float:
    return min(_FIRST_PAUSE_S * 2.0 ** max(ejections - 1, 0), _LONGEST_PAUSE_S)
