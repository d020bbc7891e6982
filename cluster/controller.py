"""Observed -> desired: which instances to start and stop now. Pure; time is an argument.

    per instance id          absent --Start--> present --(process ends)--> ended --Start, after a pause--> present
                             present --Stop, when it is stuck--------> ended
                             present --Stop, when no longer desired--> ended --Forget--> absent

`reconcile` is idempotent: an action that is under way (returned, and `finished` not yet called) is not returned again,
and there is at most one per instance. An instance that dies again and again is restarted with growing pauses; one that
stayed up for `stable_s` starts over with the shortest pause.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

__all__ = [
    "Action",
    "Controller",
    "ForgetInstance",
    "ObservedInstance",
    "StartInstance",
    "StopInstance",
    "instance_id_of",
    "role_of",
]

ROLES = ("prefill", "decode", "router")


def instance_id_of(role: str, index: int) -> str:
    """The name of an instance, stable over restarts: "decode-1"."""
    return f"{role}-{index}"


def role_of(instance_id: str) -> str:
    """ "decode" for "decode-1"."""
    return instance_id.rpartition("-")[0]


@dataclass(frozen=True, slots=True)
class ObservedInstance:
    """One instance as its launcher sees it.

    Attributes:
        alive: false once its process has ended.
        stuck: it is alive and has not been heard of for too long.
    """

    instance_id: str
    alive: bool
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class StartInstance:
    """Start instance `index` of `role`."""

    instance_id: str
    role: str
    index: int


@dataclass(frozen=True, slots=True)
class StopInstance:
    """Ask the instance to end, and make it end. `is_stuck`: it is wanted, and says nothing."""

    instance_id: str
    is_stuck: bool = False


@dataclass(frozen=True, slots=True)
class ForgetInstance:
    """Drop what is left of an instance that ended and is no longer wanted."""

    instance_id: str


Action = StartInstance | StopInstance | ForgetInstance


@dataclass(slots=True)
class _History:
    restarts: int = 0
    started_s: float = 0.0
    not_before_s: float = 0.0
    ended: bool = False


class Controller:
    """Holds the desired replicas per role, what is under way, and when each instance may start again.

    Args:
        replicas: desired instances per role.
        min_backoff_s, max_backoff_s: pause before the first restart, and the longest one; it doubles in between.
        stable_s: an instance that lived this long is forgiven its earlier deaths.
    """

    def __init__(
        self,
        replicas: Mapping[str, int],
        *,
        min_backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        stable_s: float = 60.0,
    ) -> None:
        self._replicas = dict(replicas)
        self._min_backoff_s = min_backoff_s
        self._max_backoff_s = max_backoff_s
        self._stable_s = stable_s
        self._held: frozenset[str] = frozenset()
        self._in_flight: set[str] = set()
        self._history: dict[str, _History] = {}

    def scale(self, role: str, replicas: int) -> None:
        """Set the desired number of instances of `role`."""
        assert replicas >= 0, replicas
        self._replicas[role] = replicas

    def hold(self, instance_ids: Collection[str]) -> None:
        """Do not desire these instances, whatever the number of replicas; those held before are desired again."""
        self._held = frozenset(instance_ids)

    def stop_all(self) -> None:
        """Desire nothing any more."""
        self._replicas = dict.fromkeys(self._replicas, 0)

    @property
    def desired(self) -> dict[str, StartInstance]:
        """Desired instances by id, in the order in which they are started."""
        return {
            instance_id_of(role, index): StartInstance(instance_id_of(role, index), role, index)
            for role, replicas in self._replicas.items()
            for index in range(replicas)
            if instance_id_of(role, index) not in self._held
        }

    def reconcile(self, observed: Iterable[ObservedInstance], now_s: float) -> list[Action]:
        """What to do now. The caller carries out every action and calls `finished` for each."""
        seen = {instance.instance_id: instance for instance in observed}
        desired = self.desired
        actions: list[Action] = []
        for instance_id, instance in seen.items():
            history = self._history.setdefault(instance_id, _History())
            if not instance.alive and not history.ended and instance_id in desired:
                self._note_end(history, now_s)
            if instance_id not in desired and instance_id not in self._in_flight:
                actions.append(StopInstance(instance_id) if instance.alive else ForgetInstance(instance_id))
            elif instance.alive and instance.stuck and instance_id not in self._in_flight:
                actions.append(StopInstance(instance_id, is_stuck=True))
        for instance_id, start in desired.items():
            present = instance_id in seen and seen[instance_id].alive
            history = self._history.setdefault(instance_id, _History())
            if not present and instance_id not in self._in_flight and now_s >= history.not_before_s:
                history.started_s = now_s
                history.ended = False
                actions.append(start)
        self._in_flight.update(action.instance_id for action in actions)
        return actions

    def finished(self, instance_id: str, *, ok: bool, now_s: float) -> None:
        """The action for `instance_id` is over; a failed one is tried again after a pause."""
        assert instance_id in self._in_flight, instance_id
        self._in_flight.remove(instance_id)
        if not ok:
            self._note_end(self._history.setdefault(instance_id, _History()), now_s)

    def restarts(self, instance_id: str) -> int:
        """Deaths in a row of `instance_id`."""
        history = self._history.get(instance_id)
        return history.restarts if history is not None else 0

    def _note_end(self, history: _History, now_s: float) -> None:
        history.ended = True
        history.restarts = 1 if now_s - history.started_s >= self._stable_s else history.restarts + 1
        pause_s = self._min_backoff_s * 2 ** min(history.restarts - 1, 32)
        history.not_before_s = now_s + min(self._max_backoff_s, pause_s)
