"""What a fault rule says, in words and as a value. Pure; `fault_events.py` decides by rules, `faults.py` acts.

A rule is a line of words, in `faults.rules` of the configuration, in BATON_FAULTS (`;` between rules) and in
`Worker.SetFaults`:

    COMPONENT POINT [CONDITION ...] ACTION [PARAMETER]

    decode-0 emit nth=7 kill
    prefill transfer.post nth=2 flip
    router rpc.receive method=Decode.Stream chance=0.05 seed=3 fail

COMPONENT: an instance (decode-0), a role (prefill, decode, router, controller), or any.

POINT, what one event is, and where it happens (a `hang` or `delay` holds up just that):

    load            a worker loads its model                                        thread that loads
    submit          a request comes to a router or a worker                         its event loop
    step            an engine step begins                                           engine thread
    emit            a decode worker is about to send an output token, a router to   its event loop
                    hand it on (each token counts)
    layers          a prefill worker has offered a group of layers                  its event loop
    announce        an instance announces itself to the controller                  its event loop
    transfer.setup  either half of a link for KV pages is made                      that set-up
    transfer.stage  the sender takes a staging buffer                               that payload
    transfer.post   the sender makes a payload fetchable, its checksum taken        that link's postings
    transfer.fetch  the receiver brings a payload, before it is verified            that payload
    rpc.send        a message leaves by a gRPC call this process has made           that call's direction
    rpc.receive     a message comes by such a call                                  that call's direction

The side that made a call sees both directions of it: what a decode worker tells a router is `router rpc.receive`. What
goes by a link's message lane (see `kv_transfer/transports/lane.py`) counts as messages of Handover.Ship, on both sides.

CONDITION, of the events that match peer, method and token, all of those given must hold:

    nth=K      the Kth only, from 1             chance=P   with this probability, by a hash of (seed, count)
    every=K    each Kth                         seed=S     for chance; 0 unless given
    after=K    all after the first K            times=N    so many times at most
    peer=P     rpc, transfer, announce: an instance or a role at the other end, or host:port where that is known
    method=M   rpc: Service.Method or Service.*
    token=ID   submit: the prompt holds this token

Counts are a process's own: they start anew with it. The same events in the same order give the same faults.

ACTION and what it does at which points:

    kill        SIGKILL to its own process                                          all
    hang        stands still for `for=SECONDS`, without it for ever                 all
    delay       goes on after `for=SECONDS`                                         all
    fail        load, step, transfer: an error; rpc: the call breaks (UNAVAILABLE)
    refuse      transfer.setup: the transport is not to be had; rpc.send: a call is refused as it begins (its events
                are calls, not messages)
    drop        transfer.post, transfer.fetch: the payload never comes; rpc: the message is lost, the call goes on
    duplicate   transfer.post, rpc: it comes twice
    truncate    transfer.post, transfer.fetch: the second half is zeros; rpc: only the first half of the message comes
    flip        transfer.post, transfer.fetch, rpc: one bit, drawn from the seed and the count, is the other one. Pages
                carry a checksum and messages none: a message may come with another token in it
    slow        transfer.post, transfer.fetch, rpc: takes its bytes at `rate=BYTES_PER_S`
    blackhole   rpc: nothing more in this direction of this call, which stays open
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from baton.errors import ConfigError

__all__ = [
    "ACTIONS",
    "METHODS",
    "POINTS",
    "ROLES",
    "FaultRule",
    "parse_rule",
    "parse_rules",
    "unknown_name",
]

ROLES = ("prefill", "decode", "router", "controller")
ANY = "any"
_PROCESS = ("kill", "hang", "delay")
_PAYLOAD = (*_PROCESS, "fail", "drop", "truncate", "flip", "slow")
_MESSAGE = (*_PAYLOAD, "duplicate", "blackhole")
_WORKERS = ("prefill", "decode")

POINTS: Mapping[str, tuple[str, ...]] = {
    "load": (*_PROCESS, "fail"),
    "submit": _PROCESS,
    "step": (*_PROCESS, "fail"),
    "emit": _PROCESS,
    "layers": _PROCESS,
    "announce": _PROCESS,
    "transfer.setup": (*_PROCESS, "fail", "refuse"),
    "transfer.stage": (*_PROCESS, "fail"),
    "transfer.post": (*_PAYLOAD, "duplicate"),
    "transfer.fetch": _PAYLOAD,
    "rpc.send": (*_MESSAGE, "refuse"),
    "rpc.receive": _MESSAGE,
}
"""The actions that go with each point."""
ACTIONS = tuple(dict.fromkeys(action for actions in POINTS.values() for action in actions))
_ROLES_AT: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("load", "step", "transfer.setup"), _WORKERS),
    **dict.fromkeys(("layers", "transfer.stage", "transfer.post"), ("prefill",)),
    "submit": (*_WORKERS, "router"),
    "emit": ("decode", "router"),
    "transfer.fetch": ("decode",),
    "announce": ("controller",),
    **dict.fromkeys(("rpc.send", "rpc.receive"), ROLES),
}
METHODS: Mapping[str, tuple[str, ...]] = {
    "Decode": ("Stream",),
    "Prefill": ("Prefill",),
    "Handover": ("Ship",),
    "Ranks": ("Join",),
    "Worker": ("Follow", "GetStatus", "Shutdown", "SetFaults"),
    "Registry": ("Announce", "Watch", "GetCluster", "Meet", "StopCluster", "Hold"),
}
"""The methods of each service inside the cluster."""
_MAX_COUNT = 2**53
_MAX_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRule:
    """One rule; `str` gives its words, which `parse_rule` reads again. Fields that are None or "" were not given."""

    component: str
    point: str
    action: str
    nth: int | None = None
    every: int | None = None
    after: int | None = None
    chance: float | None = None
    seed: int = 0
    times: int | None = None
    peer: str = ""
    method: str = ""
    token: int | None = None
    for_s: float | None = None
    rate_bytes_s: int | None = None

    def __str__(self) -> str:
        words = [
            f"{key}={_text(value)}" for key, (name, _) in _KEYS.items() if _is_given(key, value := getattr(self, name))
        ]
        parameters = [word for word in words if word.startswith(_PARAMETERS)]
        conditions = [word for word in words if not word.startswith(_PARAMETERS)]
        return " ".join([self.component, self.point, *conditions, self.action, *parameters])

    def concerns(self, instance_id: str, role: str) -> bool:
        """Whether it is about this process."""
        return self.component in (instance_id, role, ANY)

    def matches(self, *, peers: Collection[str], method: str, tokens: Collection[int]) -> bool:
        """Whether an event at its point is one that it counts."""
        if self.peer and self.peer not in peers:
            return False
        if self.method and self.method not in (method, method.partition(".")[0] + ".*"):
            return False
        return self.token is None or self.token in tokens

    def fires(self, count: int, fired: int, instance_id: str) -> bool:
        """Whether it fires at its `count`th event, having fired `fired` times."""
        return (
            (self.nth is None or count == self.nth)
            and (self.every is None or count % self.every == 0)
            and (self.after is None or count > self.after)
            and (self.times is None or fired < self.times)
            and (self.chance is None or self.draw(count, instance_id) < self.chance)
        )

    def draw(self, count: int, salt: str = "") -> float:
        """In [0, 1), by this rule's seed and place; so the events that fail at 1 % are among those that fail at 5 %."""
        text = f"{self.seed}/{self.component}/{self.point}/{self.method}/{self.action}/{salt}/{count}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def parse_rules(text: str) -> tuple[FaultRule, ...]:
    """The rules in a text, with `;` or line breaks between them. Raises as `parse_rule`."""
    return tuple(parse_rule(line) for line in re.split(r"[;\n]", text) if line.strip())


def parse_rule(text: str) -> FaultRule:
    """The rule of a line of words.

    Raises:
        ConfigError: names the word that is wrong, and what may stand there.
    """
    words = text.split()
    component, point, *rest = words + [""] * (2 - len(words))

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"fault rule {' '.join(words)!r}: {what}")

    if not _COMPONENT.fullmatch(component):
        hint = _hint(component, (*ROLES, ANY))
        raise wrong(f"{component!r} is no component; {hint}, or an instance such as decode-0")
    if point not in POINTS:
        raise wrong(f"{point!r} is no point; {_hint(point, POINTS)}")
    actions = [word for word in rest if "=" not in word]
    if len(actions) != 1:
        given = f"found {' and '.join(actions)}" if actions else "found none"
        raise wrong(f"it needs one action, {given}; actions at {point}: {', '.join(POINTS[point])}")
    action = actions[0]
    if action not in POINTS[point]:
        known = "does not go with" if action in ACTIONS else "is no action at"
        raise wrong(f"{action!r} {known} {point}; {_hint(action, POINTS[point])}")
    values: dict[str, Any] = {}
    for word in (word for word in rest if "=" in word):
        key, _, value = word.partition("=")
        if key not in _KEYS:
            raise wrong(f"{key!r} in {word!r} is no condition; {_hint(key, _KEYS)}")
        name, read = _KEYS[key]
        if name in values:
            raise wrong(f"{key} is given twice")
        try:
            values[name] = read(value)
        except ValueError as error:
            raise wrong(f"{word!r}: {error}") from None
    rule = FaultRule(component=component, point=point, action=action, **values)
    if problem := _problem(rule, values):
        raise wrong(problem)
    return rule


def unknown_name(rules: Iterable[FaultRule], instances: Mapping[str, int]) -> str:
    """The first component or peer that a cluster does not have, in a sentence; empty when it has all.

    Args:
        instances: how many there are of each role.
    """
    names = (*ROLES, *(f"{role}-{index}" for role, count in instances.items() for index in range(count)))
    for rule in rules:
        for what, name in (("component", rule.component), ("peer", rule.peer)):
            if name and name != ANY and ":" not in name and name not in names:
                return f"fault rule '{rule}': this cluster has no {what} {name!r}; {_hint(name, names)}"
    return ""


def _problem(rule: FaultRule, given: Mapping[str, Any]) -> str:
    """Why the words of a rule do not go together; empty when they do."""
    role = rule.component.rpartition("-")[0] or rule.component
    if role != ANY and role not in _ROLES_AT[rule.point]:
        return f"{rule.point} happens in {' and '.join(_ROLES_AT[rule.point])} only, not in {rule.component}"
    is_rpc = rule.point.startswith("rpc.")
    if rule.method and not is_rpc:
        return f"method= goes with rpc.send and rpc.receive only, not with {rule.point}"
    if rule.peer and not (is_rpc or rule.point.startswith("transfer.") or rule.point == "announce"):
        return f"peer= goes with rpc, transfer and announce only, not with {rule.point}"
    if rule.token is not None and rule.point != "submit":
        return f"token= goes with submit only, not with {rule.point}"
    if "seed" in given and rule.chance is None and rule.action != "flip":
        return "seed= goes with chance= or flip only"
    if (rule.for_s is None) != (rule.action != "delay") and rule.action != "hang":
        return "delay needs for=SECONDS" if rule.action == "delay" else "for= goes with hang and delay only"
    if (rule.rate_bytes_s is None) != (rule.action != "slow"):
        return "slow needs rate=BYTES_PER_S" if rule.action == "slow" else "rate= goes with slow only"
    return ""


def _hint(word: str, valid: Iterable[str]) -> str:
    valid = tuple(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    listed = ", ".join(valid[:24])
    return f"did you mean {close[0]}? It may be one of {listed}" if close else f"it may be one of {listed}"


def _integer(low: int, high: int = _MAX_COUNT) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not an integer of {low} to {high}")
        return int(text)

    return read


def _number(high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value <= high:
            raise ValueError(f"{text!r} is not a number above 0 and at most {high:g}")
        return value

    return read


def _peer(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not (_COMPONENT.fullmatch(text) and text != ANY) and not (host and port.isdecimal()):
        raise ValueError(f"{text!r} is neither an instance such as decode-0, nor a role, nor host:port")
    return text


def _method(text: str) -> str:
    service, _, method = text.partition(".")
    if service not in METHODS:
        raise ValueError(f"{service!r} is no service; {_hint(service, METHODS)}")
    if method not in (*METHODS[service], "*"):
        raise ValueError(f"{method!r} is no method of {service}; {_hint(method, (*METHODS[service], '*'))}")
    return text


def _is_given(key: str, value: Any) -> bool:
    return value is not None and value != "" and (key, value) != ("seed", 0)


def _text(value: Any) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


_COMPONENT = re.compile(rf"({'|'.join(ROLES)})|{ANY}|(prefill|decode|router)-(0|[1-9][0-9]{{0,4}})")
_KEYS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "peer": ("peer", _peer),
    "method": ("method", _method),
    "token": ("token", _integer(0)),
    "nth": ("nth", _integer(1)),
    "every": ("every", _integer(1)),
    "after": ("after", _integer(0)),
    "chance": ("chance", _number(1.0)),
    "seed": ("seed", _integer(0, 2**64 - 1)),
    "times": ("times", _integer(1)),
    "for": ("for_s", _number(_MAX_SECONDS)),
    "rate": ("rate_bytes_s", _integer(1)),
}
"""The field of each key, and how its value is read."""
_PARAMETERS = ("for=", "rate=")
