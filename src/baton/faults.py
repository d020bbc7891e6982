"""The faults of this process: which rules hold, and what happens at the points of the process itself.

    install(words, instance_id, role)      once, as the process starts (`cluster/role.py`)
    active: Faults | None                  asked at every point; None when nothing is to go wrong
    is_possible: bool                      the cluster has rules, or SetFaults may bring some: links and channels
                                           are then of a kind that can have faults

A point costs one look, `if faults.active is not None`, and what is there then:

    strike(point)                          at a point of the process itself: kill, hang, delay or fail, here and now
    act(fault)                             the same for a fault that was decided elsewhere (links, channels)

What rules mean is in `fault_rules.py`, when they fire in `fault_events.py`. `fail` raises `FaultError`, which is an
UnavailableError: what goes wrong on purpose takes the way that it takes otherwise.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Collection, Sequence

from baton.errors import ConfigError, UnavailableError
from baton.fault_events import Fault, Faults
from baton.fault_rules import FaultRule, parse_rule

__all__ = [
    "ConfigError",
    "Fault",
    "FaultError",
    "FaultRule",
    "Faults",
    "act",
    "active",
    "allows_replacement",
    "install",
    "is_possible",
    "learn_peer",
    "note",
    "replace",
    "step_begins",
    "strike",
]

_log = logging.getLogger(__name__)
_LONG_S = 3600.0
_ALL_LOGGED = 16

active: Faults | None = None
"""What holds now; whoever looks, looks each time."""
is_possible = False
"""Whether this cluster has any rules, or may get some at run time."""
allows_replacement = False
"""Whether `replace` may come from outside."""
_peers: dict[str, str] = {}
_identity = ("", "")


class FaultError(UnavailableError):
    """Something failed on purpose; the text names the rule."""


def install(words: Sequence[str], *, instance_id: str, role: str, allow_at_runtime: bool = False) -> None:
    """Makes `words` the rules of this process, and says so loudly.

    Args:
        words: one rule each, for the whole cluster; those about others are left out.
        role: "prefill", "decode", "router" or "controller".
        allow_at_runtime: whether `replace` may come.

    Raises:
        ConfigError: what is wrong with a rule.
    """
    global is_possible, allows_replacement, _identity
    _identity = (instance_id, role)
    replace(words)
    allows_replacement = allow_at_runtime
    is_possible = allow_at_runtime or bool(words)
    if allow_at_runtime:
        _log.warning("FAULTS may be set in this process at run time (faults.allow_at_runtime)")


def replace(words: Sequence[str]) -> list[tuple[FaultRule, int]]:
    """Makes `words` the rules from now on; returns how often each earlier one has fired. Raises as `install`."""
    global active
    instance_id, role = _identity
    rules = [parse_rule(text) for text in words]
    before, now = active, Faults(rules, instance_id=instance_id, role=role, peers=_peers)
    active = now if now.rules else None
    for rule in now.rules:
        _log.warning("FAULTS ARE ON in this process: %s", rule)
    if before is not None and active is None:
        _log.warning("faults are off")
    return [] if before is None else before.fired()


def learn_peer(address: str, instance_id: str) -> None:
    """Who is at host:port, so that rules may name it; asked only where faults are possible."""
    if is_possible and address:
        _peers[address] = instance_id


def strike(point: str, *, peer: str = "", tokens: Collection[int] = (), count: int = 1) -> None:
    """Has happen what the rules say, `count` times, at a point of the process itself.

    Raises:
        FaultError: a rule says fail.
    """
    faults = active
    if faults is None:
        return
    for _ in range(count):
        for fault in faults.decide(point, peer=peer, tokens=tokens):
            act(fault)


def note(fault: Fault) -> None:
    """Writes into the log that a fault happens: of the first of each rule, later of each that doubles their number."""
    level = logging.WARNING if fault.fired <= _ALL_LOGGED or not fault.fired & (fault.fired - 1) else logging.DEBUG
    _log.log(level, "%s, for the %dth time", fault, fault.fired)


def act(fault: Fault) -> None:
    """Kills this process, holds this thread up, or raises; a fault of another kind is for who decided it.

    Raises:
        FaultError: the rule says fail or refuse.
    """
    note(fault)
    rule = fault.rule
    match rule.action:
        case "kill":
            logging.shutdown()
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang" if rule.for_s is None:
            while True:
                time.sleep(_LONG_S)
        case "hang" | "delay":
            assert rule.for_s is not None
            time.sleep(rule.for_s)
        case "fail" | "refuse":
            raise FaultError(str(fault))


def step_begins() -> None:
    """For the engine's loop: a step begins."""
    if active is not None:
        strike("step")
