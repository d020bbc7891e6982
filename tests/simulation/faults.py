"""Makes a scenario's faults happen, and undoes them. One method per kind.

Attributes of the run that checkers need come from here: when the last fault was undone, and how often each decode
worker was lost (`num_losses`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.simulation.cluster import SimCluster
from tests.simulation.scenario import Fault

__all__ = ["Faults"]

_SHIP = "/baton.v1.Handover/Ship"
_SEEMS_LOST_S = 1.0


class Faults:
    """The faults of one run.

    Attributes:
        healed_s: when nothing was wrong any more.
        num_losses: how often a worker died, stopped, or was cut off for so long that it seemed so.
        num_happened: how many have begun.
    """

    def __init__(self, cluster: SimCluster) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self._message_rules: list[Callable[[str, str, str, Any], str]] = []
        self._payload_rules: list[Callable[[str, str], str]] = []
        self.healed_s = 0.0
        self.num_losses = 0
        self.num_happened = 0
        for fault in cluster.scenario.faults:
            self._world.at(fault.time_s, lambda fault=fault: self._happen(fault))  # type: ignore[misc]

    def _happen(self, fault: Fault) -> None:
        self._world.log(f"FAULT {fault.kind} {fault.target} {fault.other} {fault.detail} {fault.duration_s:.3f} s", "-")
        self.num_happened += 1
        is_end = fault.kind in ("crash", "vanish", "pause", "terminate") and fault.target != "controller"
        is_long_cut = fault.kind in ("cut", "half_cut") and fault.duration_s >= _SEEMS_LOST_S
        self.num_losses += is_end or is_long_cut
        self.healed_s = max(self.healed_s, self._world.now_s)
        getattr(self, f"_{fault.kind}")(fault)

    def _until(self, fault: Fault, undo: Callable[[], None]) -> None:
        end_s = self._world.now_s + fault.duration_s
        self.healed_s = max(self.healed_s, end_s)

        def heal() -> None:
            self._world.log(f"HEALED {fault.kind} {fault.target} {fault.other}", "-")
            undo()

        self._world.at(end_s, heal)

    # ---------------------------------------------------------------- processes

    def _crash(self, fault: Fault) -> None:
        process = self._cluster.processes.get(fault.target)
        if process is not None:
            process.kill("killed")

    def _vanish(self, fault: Fault) -> None:
        """The whole host is gone: nobody is told."""
        process = self._cluster.processes.get(fault.target)
        if process is not None:
            for connection in self._cluster.network.list_connections():
                if process in (connection.client, connection.server and connection.server.process):
                    connection.fall_silent()
            process.kill("vanished")

    _crash_router = _crash

    def _crash_controller(self, fault: Fault) -> None:
        self._crash(fault)
        self._until(fault, self._cluster.start)

    def _state_away(self, fault: Fault) -> None:
        store = self._cluster.store
        store.is_away = True
        self._until(fault, lambda: setattr(store, "is_away", False))

    def _state_lost(self, fault: Fault) -> None:
        del fault
        self._cluster.store.flush()

    def _terminate(self, fault: Fault) -> None:
        process = self._cluster.processes.get(fault.target)
        if process is not None and process.stop is not None:
            process.loop.call_soon(process.stop.set)

    def _pause(self, fault: Fault) -> None:
        process = self._cluster.processes.get(fault.target)
        if process is not None and not process.is_paused:
            process.pause()
            self._until(fault, process.resume)

    _hiccup = _pause

    def _slow_worker(self, fault: Fault) -> None:
        process = self._cluster.processes.get(fault.target)
        if process is not None:
            process.slowness = 10.0
            self._until(fault, lambda: setattr(process, "slowness", 1.0))

    def _registry_away(self, fault: Fault) -> None:
        if fault.other == "pause":
            self._pause(fault)
            return
        names = [name for name in self._cluster.processes if name != "controller"]
        network = self._cluster.network
        for name in names:
            network.cut(name, "controller")
            network.cut("controller", name)

        def undo() -> None:
            for name in names:
                network.mend(name, "controller")
                network.mend("controller", name)

        self._until(fault, undo)

    # ---------------------------------------------------------------- network

    def _cut(self, fault: Fault) -> None:
        network = self._cluster.network
        network.cut(fault.target, fault.other)
        network.cut(fault.other, fault.target)

        def undo() -> None:
            network.mend(fault.target, fault.other)
            network.mend(fault.other, fault.target)

        self._until(fault, undo)

    def _half_cut(self, fault: Fault) -> None:
        ends = (fault.target, fault.other) if fault.nth % 2 else (fault.other, fault.target)
        self._cluster.network.cut(*ends)
        self._until(fault, lambda: self._cluster.network.mend(*ends))

    def _slow_link(self, fault: Fault) -> None:
        paths = [
            self._cluster.network.path(fault.target, fault.other),
            self._cluster.network.path(fault.other, fault.target),
        ]
        for path in paths:
            path.delay_s, path.seconds_per_byte = 0.03, 2e-4

        def undo() -> None:
            for path in paths:
                path.delay_s, path.seconds_per_byte = 1e-4, 0.0

        self._until(fault, undo)

    def _break_connections(self, fault: Fault) -> None:
        for connection in self._cluster.network.list_connections():
            if {connection.client.name, connection.server_name} == {fault.target, fault.other}:
                connection.break_off("connection reset by the network")

    # ---------------------------------------------------------------- messages and payloads

    def _message(self, source: str, destination: str, method: str, message: Any) -> str:
        for rule in self._message_rules:
            verdict = rule(source, destination, method, message)
            if verdict:
                self._world.log(f"FAULT {verdict} {method} {source} -> {destination}", "-")
                return verdict
        return ""

    def _add_message_rule(self, fault: Fault, method: str, verdict: str) -> None:
        left = fault.nth

        def rule(source: str, destination: str, called: str, message: Any) -> str:
            nonlocal left
            del message
            if called != method or fault.target not in (source, destination):
                return ""
            left -= 1
            if left == 0:
                self.healed_s = max(self.healed_s, self._world.now_s)
            return verdict if left == 0 else ""

        self._message_rules.append(rule)
        self._cluster.network.on_message = self._message

    def _handover_message(self, fault: Fault) -> None:
        self._add_message_rule(fault, _SHIP, fault.detail)

    def _storm(self, fault: Fault) -> None:
        """Messages of all calls break their connections, one of some dozens."""
        chance = self._world.random(f"storm {fault.time_s}").random
        share = 0.002 * fault.nth

        def rule(*_: object) -> str:
            return "break" if chance() < share else ""

        self._message_rules.append(rule)
        self._cluster.network.on_message = self._message
        self._until(fault, lambda: self._message_rules.remove(rule))

    def _break_at_message(self, fault: Fault) -> None:
        self._add_message_rule(fault, fault.detail, "break")

    def _payload(self, sender: str, receiver: str) -> str:
        for rule in self._payload_rules:
            verdict = rule(sender, receiver)
            if verdict:
                self._world.log(f"FAULT {verdict} of a payload {sender} -> {receiver}", "-")
                return verdict
        return ""

    def _add_payload_rule(self, fault: Fault, verdict: str) -> None:
        left = fault.nth

        def rule(sender: str, receiver: str) -> str:
            nonlocal left
            left -= fault.target in (sender, receiver)
            if left != 0:
                return ""
            left = -1
            return verdict

        self._payload_rules.append(rule)
        self._cluster.payloads.spoil = self._payload

    def _flip(self, fault: Fault) -> None:
        self._add_payload_rule(fault, "flip")

    def _fail_payload(self, fault: Fault) -> None:
        self._add_payload_rule(fault, "fail")
