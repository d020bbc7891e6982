"""Which fault rules fire: counts of the events that each has seen, in one process. Pure.

faults.decide(point, ...) -> what happens to this event, usually nothing
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from baton.fault_rules import FaultRule

__all__ = ["Fault", "Faults"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule that fires now.

    Attributes:
        count: of the events that it has seen.
        fired: how often it has fired, this time too.
        draw: in [0, 1), decides what the rule leaves open, such as which bit flips.
    """

    rule: FaultRule
    count: int
    fired: int
    draw: float

    def damaged(self, message: bytes) -> bytes:
        """What comes of a message by truncate (its first half) or flip."""
        if self.rule.action == "truncate" or not message:
            return message[: len(message) // 2]
        place = int(self.draw * len(message) * 8)
        return message[: place // 8] + bytes([message[place // 8] ^ 1 << place % 8]) + message[place // 8 + 1 :]

    def __str__(self) -> str:
        return f"fault {self.rule} (event {self.count})"


class Faults:
    """The rules of one process, how many events each has seen, and how often it has fired. For any thread.

    Args:
        rules: of the whole cluster; those about others are left out.
        peers: instance by host:port, so that `peer=` may name either; filled by whoever learns it.
    """

    def __init__(
        self, rules: Iterable[FaultRule], *, instance_id: str, role: str, peers: Mapping[str, str] | None = None
    ) -> None:
        self.rules = tuple(rule for rule in rules if rule.concerns(instance_id, role))
        self._instance_id = instance_id
        self._peers = {} if peers is None else peers
        self._at: dict[str, list[int]] = {}
        for index, rule in enumerate(self.rules):
            self._at.setdefault(rule.point, []).append(index)
        self._counts = [0] * len(self.rules)
        self._fired = [0] * len(self.rules)
        self._lock = threading.Lock()

    def decide(
        self, point: str, *, peer: str = "", method: str = "", tokens: Collection[int] = (), begins: bool = False
    ) -> tuple[Fault, ...]:
        """Counts an event, and returns what happens to it, in the order of the rules.

        Args:
            begins: at rpc.send, that a call begins: an event of `refuse` rules, while messages are those of all others.
        """
        indices = self._at.get(point)
        if indices is None:
            return ()
        peers = self._names(peer)
        faults = []
        with self._lock:
            for index in indices:
                rule = self.rules[index]
                is_of_calls = rule.action == "refuse" and point == "rpc.send"
                if is_of_calls != begins or not rule.matches(peers=peers, method=method, tokens=tokens):
                    continue
                self._counts[index] = count = self._counts[index] + 1
                if rule.fires(count, self._fired[index], self._instance_id):
                    self._fired[index] += 1
                    faults.append(Fault(rule, count, self._fired[index], rule.draw(count, "what")))
        return tuple(faults)

    def concerns(self, *points: str) -> bool:
        """Whether there is any rule for one of these points."""
        return any(point in self._at for point in points)

    def fired(self) -> list[tuple[FaultRule, int]]:
        """How often each rule has fired."""
        with self._lock:
            return list(zip(self.rules, self._fired, strict=True))

    def _names(self, peer: str) -> tuple[str, ...]:
        """What `peer=` may call it: as given, its instance, its role."""
        # Links name peers as `prefill-0.1/<incarnation>`: instance, rank, and which start of it.
        name = peer.partition("/")[0].partition(".")[0] if "/" in peer else peer
        instance_id = self._peers.get(name, name)
        return (peer, instance_id, instance_id.rpartition("-")[0])
