"""What happens to the messages of one call on a faulty channel (see `faulty_channel.py`), in each of its directions."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from baton import faults

__all__ = ["CallLink", "Deserialize", "Failure", "Serialize"]

Serialize = Callable[[Any], bytes] | None
Deserialize = Callable[[bytes], Any] | None


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call broke."""

    code: grpc.StatusCode
    details: str

    def error(self) -> grpc.aio.AioRpcError:
        """To be raised once: an error that is kept keeps the frames it went through, and they the call."""
        return grpc.aio.AioRpcError(self.code, grpc.aio.Metadata(), grpc.aio.Metadata(), self.details, None)


class CallLink:
    """What the two directions of one call share: whose it is, how its messages read, and whether it has ended.

    Args:
        keepalive_s: how soon gRPC finds out that a connection carries nothing any more; None: never.
    """

    def __init__(
        self, peer: str, method: str, serialize: Serialize, deserialize: Deserialize, keepalive_s: float | None
    ) -> None:
        self.peer = peer
        self.method = method
        self.ended = asyncio.Event()
        self.failure: Failure | None = None
        # Has the call inside end for the other side too.
        self.break_off: Callable[[], object] = lambda: None
        self.send = _Direction("rpc.send", self)
        self.receive = _Direction("rpc.receive", self)
        self._serialize = serialize
        self._deserialize = deserialize
        self._keepalive_s = keepalive_s

    def begin(self) -> None:
        """The call is about to be made. Raises AioRpcError where it is refused."""
        if faults.active is not None:
            for fault in faults.active.decide("rpc.send", peer=self.peer, method=self.method, begins=True):
                faults.note(fault)
                raise self.fail(grpc.StatusCode.UNAVAILABLE, str(fault))

    def fail(self, code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
        """The call is broken: the error that everybody gets who reads or writes from now on."""
        if self.failure is None:
            self.failure = Failure(code, details)
        self.ended.set()
        self.break_off()
        return self.failure.error()

    def go_dead(self) -> None:
        """A direction carries nothing any more: pings neither, which gRPC notices where it sends any."""
        if self._keepalive_s is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(self._keepalive_s, self._miss_pings)

    def _miss_pings(self) -> None:
        if not self.ended.is_set():
            self.fail(grpc.StatusCode.UNAVAILABLE, "keepalive: nothing comes back through a black hole")

    def to_bytes(self, message: Any) -> bytes:
        """A message as it travels."""
        return bytes(message) if self._serialize is None else self._serialize(message)

    def from_bytes(self, data: bytes) -> Any:
        """A message that came. Raises AioRpcError where it cannot be read: the call is broken."""
        try:
            return data if self._deserialize is None else self._deserialize(data)
        except Exception as error:
            raise self.fail(grpc.StatusCode.INTERNAL, f"a message of {self.method} cannot be read: {error}") from error


class _Direction:
    """One direction of one call."""

    def __init__(self, point: str, link: CallLink) -> None:
        self.is_dead = False
        self._point = point
        # Weakly: each call would leave a cycle else, and one that uses a direction has the link.
        self._link: CallLink = weakref.proxy(link)

    async def carry(self, data: bytes) -> Sequence[bytes]:
        """What comes out at the other end where `data` goes in.

        Raises:
            AioRpcError: the call breaks here, or has broken while this message was held up.
            CancelledError: the call was cancelled meanwhile.
        """
        if self.is_dead:
            return ()
        if faults.active is None:
            return (data,)
        messages: tuple[bytes, ...] = (data,)
        for fault in faults.active.decide(self._point, peer=self._link.peer, method=self._link.method):
            rule = fault.rule
            match rule.action:
                case "kill":
                    faults.act(fault)
                case "hang" | "delay":
                    faults.note(fault)
                    await self._hold_up(rule.for_s)
                case "slow":
                    assert rule.rate_bytes_s is not None
                    await self._hold_up(len(data) / rule.rate_bytes_s)
                case "fail":
                    faults.note(fault)
                    raise self._link.fail(grpc.StatusCode.UNAVAILABLE, str(fault))
                case "drop" | "blackhole":
                    faults.note(fault)
                    if rule.action == "blackhole":
                        self.is_dead = True
                        self._link.go_dead()
                    return ()
                case "duplicate":
                    faults.note(fault)
                    messages *= 2
                case "truncate" | "flip":
                    faults.note(fault)
                    messages = tuple(fault.damaged(message) for message in messages)
        return messages

    async def _hold_up(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._link.ended.wait()
                if self._link.failure is not None:
                    raise self._link.failure.error()
                raise asyncio.CancelledError
