"""Any transport, with faults as the rules of `baton.faults` say. Without rules it is the transport inside.

    transfer.setup   refuse: `open_*` finds that it cannot be; fail, hang, delay: `finish`, within its deadline
    transfer.stage   fail, hang, delay: `stage`, within its deadline
    transfer.post    truncate, flip: the staged bytes, whose checksum has been taken; drop: not posted, and the receiver
                     waits for it in vain; duplicate: posted twice, the second is told; fail; slow, hang, delay: this
                     and the link's later posts wait
    transfer.fetch   truncate, flip: a copy of what came, before it is verified; drop, and whatever takes longer than
                     the deadline: a DeadlineError at the deadline, and the link is broken; fail: broken at once

Whatever is held up ends when the link is closed. The messages of a lane pass the rules of `rpc.send` and `rpc.receive`
for Handover.Ship (`faulty_lane.py`).

A locator of a payload that was dropped is `LOST`. The receiving half knows it where faults are possible in its process
too, which they are wherever the configuration has rules or allows them at run time; elsewhere it is a damaged locator.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from baton import faults
from baton.errors import DeadlineError, HandoverError
from baton.kv_transfer.transports.base import ReceiveLink, ReceiveSetup, SendLink, SendSetup, Staged, Transport
from baton.kv_transfer.transports.faulty_lane import faulty_lane

__all__ = ["LOST", "FaultyTransport"]

LOST = "lost"


class FaultyTransport(Transport):
    """`inner` with faults; closes it."""

    def __init__(self, inner: Transport) -> None:
        self.name = inner.name
        self.memory = inner.memory
        self._inner = inner

    def open_send(self, *, peer: str) -> SendSetup:
        """See `Transport`."""
        decided = _decide_setup(peer)
        return _FaultySendSetup(self._inner.open_send(peer=peer), peer, decided)

    def open_receive(self, options: Mapping[str, str], *, peer: str) -> ReceiveSetup:
        """See `Transport`."""
        decided = _decide_setup(peer)
        return _FaultyReceiveSetup(self._inner.open_receive(options, peer=peer), peer, decided)

    def close(self) -> None:
        """See `Transport`."""
        self._inner.close()


class _FaultySendSetup(SendSetup):
    def __init__(self, inner: SendSetup, peer: str, decided: tuple[faults.Fault, ...]) -> None:
        self.options = inner.options
        self._inner = inner
        self._peer = peer
        self._faults = decided

    def finish(self, options: Mapping[str, str], deadline_s: float) -> SendLink:
        left_s = _before_finish(self._faults, self._inner, self._peer, deadline_s)
        return _FaultySendLink(self._inner.finish(options, left_s), self._peer)

    def cancel(self) -> None:
        self._inner.cancel()


class _FaultyReceiveSetup(ReceiveSetup):
    def __init__(self, inner: ReceiveSetup, peer: str, decided: tuple[faults.Fault, ...]) -> None:
        self.options = inner.options
        self._inner = inner
        self._peer = peer
        self._faults = decided

    def finish(self, deadline_s: float) -> ReceiveLink:
        left_s = _before_finish(self._faults, self._inner, self._peer, deadline_s)
        return _FaultyReceiveLink(self._inner.finish(left_s), self._peer)

    def cancel(self) -> None:
        self._inner.cancel()


class _FaultySendLink(SendLink):
    """Takes nothing over from `SendLink`: the arena is the inner link's."""

    def __init__(self, inner: SendLink, peer: str) -> None:
        self.lane = faulty_lane(inner.lane, peer)
        self._inner = inner
        self._peer = peer
        self._closed = threading.Event()

    @property
    def max_payload_bytes(self) -> int:
        return self._inner.max_payload_bytes

    @property
    def staged_bytes(self) -> int:
        return self._inner.staged_bytes

    def stage(self, num_bytes: int, deadline_s: float) -> Staged:
        for fault in _decide("transfer.stage", self._peer):
            what = f"staging {num_bytes} bytes for {self._peer}"
            deadline_s = _undergo(fault, self._closed, what, num_bytes, deadline_s)
        return self._inner.stage(num_bytes, deadline_s)

    @contextmanager
    def filling(self) -> Iterator[None]:
        with self._inner.filling():
            yield

    def post(self, staged: Staged) -> str:
        is_lost = is_double = False
        for fault in _decide("transfer.post", self._peer):
            match fault.rule.action:
                case "truncate" | "flip":
                    faults.note(fault)
                    with self._inner.filling():
                        _damage(staged.payload, fault)
                case "drop" | "duplicate" as action:
                    faults.note(fault)
                    is_lost, is_double = is_lost or action == "drop", is_double or action == "duplicate"
                case _:
                    num_bytes = staged.payload.numel()
                    _undergo(fault, self._closed, f"posting {num_bytes} bytes to {self._peer}", num_bytes, None)
        if is_lost:
            return LOST
        if is_double:
            self._inner.post(staged)
        return self._inner.post(staged)

    def release(self, staged: Staged) -> None:
        self._inner.release(staged)

    def close(self) -> None:
        self._closed.set()
        self._inner.close()
        if self.lane is not None:
            self.lane.close()


class _FaultyReceiveLink(ReceiveLink):
    def __init__(self, inner: ReceiveLink, peer: str) -> None:
        self.lane = faulty_lane(inner.lane, peer)
        self._inner = inner
        self._peer = peer
        self._closed = threading.Event()
        self._broken = ""
        # What came, by the damaged copy that was given out in its place.
        self._damaged: dict[int, torch.Tensor] = {}

    def fetch(self, locator: str, num_bytes: int, deadline_s: float) -> torch.Tensor:
        if self._broken:
            raise HandoverError(f"link to {self._peer} is broken: {self._broken}")
        damage = []
        what = f"fetching {num_bytes} bytes from {self._peer}"
        try:
            for fault in _decide("transfer.fetch", self._peer):
                if fault.rule.action in ("truncate", "flip"):
                    damage.append(fault)
                elif fault.rule.action == "drop":
                    faults.note(fault)
                    locator = LOST
                else:
                    deadline_s = _undergo(fault, self._closed, what, num_bytes, deadline_s)
            if locator == LOST:
                _wait(None, self._closed, what, deadline_s)
        except (HandoverError, DeadlineError) as error:
            self._broken = str(error)
            raise
        payload = self._inner.fetch(locator, num_bytes, deadline_s)
        return self._copy_damaged(payload, damage) if damage else payload

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._inner.reading():
            yield

    def done(self, payload: torch.Tensor) -> None:
        self._inner.done(self._damaged.pop(id(payload), payload))

    def discard(self, locator: str, num_bytes: int, deadline_s: float) -> None:
        if locator == LOST:
            self.fetch(locator, num_bytes, deadline_s)
        else:
            self._inner.discard(locator, num_bytes, deadline_s)

    def close(self) -> None:
        self._closed.set()
        self._inner.close()
        self._damaged.clear()
        if self.lane is not None:
            self.lane.close()

    def _copy_damaged(self, payload: torch.Tensor, damage: list[faults.Fault]) -> torch.Tensor:
        with self._inner.reading():
            copy = payload.clone()
            for fault in damage:
                faults.note(fault)
                _damage(copy, fault)
        self._damaged[id(copy)] = payload
        return copy


def _decide(point: str, peer: str) -> tuple[faults.Fault, ...]:
    active = faults.active
    return () if active is None else active.decide(point, peer=peer)


def _decide_setup(peer: str) -> tuple[faults.Fault, ...]:
    """What is to happen to a set-up. Raises HandoverError where it is refused at once."""
    decided = _decide("transfer.setup", peer)
    for fault in decided:
        if fault.rule.action == "refuse":
            faults.note(fault)
            raise HandoverError(str(fault))
        if fault.rule.action == "kill":
            faults.act(fault)
    return decided


def _before_finish(
    decided: tuple[faults.Fault, ...], setup: SendSetup | ReceiveSetup, peer: str, deadline_s: float
) -> float:
    """The seconds left for the set-up inside, which is undone where there are none."""
    try:
        for fault in decided:
            deadline_s = _undergo(fault, threading.Event(), f"the link with {peer}", 0, deadline_s)
    except BaseException:
        setup.cancel()
        raise
    return deadline_s


def _undergo(
    fault: faults.Fault, closed: threading.Event, what: str, num_bytes: int, deadline_s: float | None
) -> float:
    """A fault of time or failure in `what`; returns the seconds left of `deadline_s` (None: without end).

    Raises:
        HandoverError: the fault, or the link was closed meanwhile.
        DeadlineError: there are none left.
    """
    faults.note(fault)
    rule = fault.rule
    match rule.action:
        case "kill":
            faults.act(fault)
        case "hang" | "delay":
            return _wait(rule.for_s, closed, what, deadline_s)
        case "slow":
            assert rule.rate_bytes_s is not None
            return _wait(num_bytes / rule.rate_bytes_s, closed, what, deadline_s)
    raise HandoverError(str(fault))


def _wait(wait_s: float | None, closed: threading.Event, what: str, deadline_s: float | None) -> float:
    """As `_undergo`, for `wait_s` seconds (None: without end)."""
    ends = [seconds for seconds in (wait_s, deadline_s) if seconds is not None]
    began_s = time.monotonic()
    if closed.wait(min(ends, default=None)):
        raise HandoverError(f"{what}: the link is closed")
    left_s = float("inf") if deadline_s is None else deadline_s - (time.monotonic() - began_s)
    if left_s <= 0 or wait_s is None or (deadline_s is not None and wait_s >= deadline_s):
        raise DeadlineError(f"{what} did not end within {deadline_s:g} s")
    return left_s


def _damage(payload: torch.Tensor, fault: faults.Fault) -> None:
    """Half of the payload away, or one bit the other one, in place."""
    if fault.rule.action == "truncate":
        payload[payload.numel() // 2 :] = 0
        return
    place = int(fault.draw * payload.numel() * 8)
    payload[place // 8] ^= 1 << place % 8
