"""Payloads through a pairwise Gloo process group, for CPU peers on different hosts.

Each link is a process group of its own: rank 0 sends, rank 1 receives, no global group, so a peer's death breaks its
own links only. They meet at a key-value store that the receiver hosts on its own host address and a free port; the
key prefix holds a random number, so a link that is made anew never meets its predecessor.

A locator is the tag of one send. Sends return at once and wait for their receive, which is posted only when the offer
has arrived: an idle link has nothing pending, hence nothing that can time out. A receive that passes its deadline
leaves the connection in the middle of a message: such a link says so for ever after.

For tests and benchmarks the receiver can emulate a slower network: a payload that has come is held back until a link of
that rate would have delivered it. All links of one transport share the rate, as they would share a network card.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from baton.errors import DeadlineError, HandoverError
from baton.kv_transfer.transports.base import (
    DEFAULT_ARENA_BYTES,
    ReceiveLink,
    ReceiveSetup,
    SendLink,
    SendSetup,
    Staged,
    Transport,
)
from baton.kv_transfer.transports.link_store import host_store
from baton.kv_transfer.transports.rate_limiter import RateLimiter

__all__ = ["GlooTransport"]

# The type stubs of torch cover neither process groups of one's own nor stores.
_dist: Any = torch.distributed

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,9}")
_MAX_TAG = (1 << 31) - 1
_SPARE_BUFFERS = 2


class GlooTransport(Transport):
    """Gloo over TCP.

    Args:
        host: address of this host that peers reach; store and connections are bound to it and to nothing else.
        arena_bytes: staging memory of each link on the sender.
        setup_timeout_s: how long a receiver waits for the sender to show up.
        rate_limit_bytes_s: what is received at most, all links together; None for no limit.
    """

    name = "gloo"

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        setup_timeout_s: float = 10.0,
        rate_limit_bytes_s: float | None = None,
    ) -> None:
        self._host = host
        self._arena_bytes = arena_bytes
        self._setup_timeout_s = setup_timeout_s
        self._limiter = None if rate_limit_bytes_s is None else RateLimiter(rate_limit_bytes_s)
        self._store: Any = None
        self._store_lock = threading.Lock()

    def open_send(self, *, peer: str) -> SendSetup:
        """Nothing is made before the receiver says where to meet."""
        return _GlooSendSetup(self._host, self._arena_bytes, peer)

    def open_receive(self, options: Mapping[str, str], *, peer: str) -> ReceiveSetup:
        """Host the store, once for all links, and draw the link's prefix."""
        del options
        with self._store_lock:
            if self._store is None:
                self._store = host_store(self._host, self._setup_timeout_s)
            return _GlooReceiveSetup(self._host, self._store.port, peer, self._limiter)

    def close(self) -> None:
        """Stop the store."""
        with self._store_lock:
            self._store = None


class _GlooSendSetup(SendSetup):
    def __init__(self, host: str, arena_bytes: int, peer: str) -> None:
        self._host = host
        self._arena_bytes = arena_bytes
        self._peer = peer
        self.options = {}

    def finish(self, options: Mapping[str, str], deadline_s: float) -> SendLink:
        store, prefix = options.get("gloo.store", ""), options.get("gloo.prefix", "")
        host, _, port = store.rpartition(":")
        if not host or not _DECIMAL.fullmatch(port) or not prefix:
            raise HandoverError(f"{self._peer} names no usable store: {store[:64]!r}")
        group = _make_group(self._host, host, int(port), prefix, rank=0, deadline_s=deadline_s, peer=self._peer)
        # Written to once, so that the first payloads cost no page faults.
        memory = torch.empty(self._arena_bytes, dtype=torch.uint8).zero_()
        return _GlooSendLink(group, memory, peer=self._peer)

    def cancel(self) -> None:
        return None


class _GlooSendLink(SendLink):
    def __init__(self, group: Any, memory: torch.Tensor, *, peer: str) -> None:
        super().__init__(memory, peer=peer)
        self._group: Any = group
        self._next_tag = 0
        self._works: dict[int, Any] = {}

    def post(self, staged: Staged) -> str:
        with self._room:
            group = self._group
            if group is None:
                raise HandoverError(f"link to {self._peer} is closed")
            tag = self._next_tag
            self._next_tag = (tag + 1) & _MAX_TAG
            try:
                self._works[staged.offset] = group.send([staged.payload], 1, tag)
            except RuntimeError as error:
                raise HandoverError(f"sending to {self._peer} failed: {_first_line(error)}") from error
        return str(tag)

    def release(self, staged: Staged) -> None:
        with self._room:
            self._works.pop(staged.offset, None)
        super().release(staged)

    def close(self) -> None:
        super().close()
        with self._room:
            self._group = None
            self._works.clear()


class _GlooReceiveSetup(ReceiveSetup):
    def __init__(self, host: str, port: int, peer: str, limiter: RateLimiter | None) -> None:
        self._host = host
        self._port = port
        self._peer = peer
        self._limiter = limiter
        self._prefix = f"link/{secrets.token_hex(16)}"
        self.options = {"gloo.store": f"{host}:{port}", "gloo.prefix": self._prefix}

    def finish(self, deadline_s: float) -> ReceiveLink:
        group = _make_group(
            self._host, self._host, self._port, self._prefix, rank=1, deadline_s=deadline_s, peer=self._peer
        )
        return _GlooReceiveLink(group, self._peer, self._limiter)

    def cancel(self) -> None:
        return None


class _GlooReceiveLink(ReceiveLink):
    def __init__(self, group: Any, peer: str, limiter: RateLimiter | None) -> None:
        self._group: Any = group
        self._peer = peer
        self._limiter = limiter
        self._broken = ""
        self._lock = threading.Lock()
        self._spare: list[torch.Tensor] = []

    def fetch(self, locator: str, num_bytes: int, deadline_s: float) -> torch.Tensor:
        group = self._group
        if group is None:
            raise HandoverError(f"link to {self._peer} is closed")
        if self._broken:
            raise HandoverError(f"link to {self._peer} is broken: {self._broken}")
        if not _DECIMAL.fullmatch(locator) or int(locator) > _MAX_TAG or num_bytes <= 0:
            raise HandoverError(f"{self._peer} offers {num_bytes} bytes at {locator[:32]!r}, which is no tag")
        now_s = time.monotonic()
        end_s = now_s + deadline_s
        due_s = 0.0 if self._limiter is None else self._limiter.book(num_bytes, now_s)
        payload = self._buffer(num_bytes)
        try:
            group.recv([payload], 0, int(locator)).wait(timedelta(seconds=deadline_s))
        except RuntimeError as error:
            text = _first_line(error)
            self._broken = self._broken or text
            if "Timed out" in text:
                raise DeadlineError(
                    f"{self._peer} did not deliver {num_bytes} bytes within {deadline_s:g} s"
                ) from error
            raise HandoverError(f"receiving from {self._peer} failed: {text}") from error
        if due_s:
            self._wait_until(due_s, num_bytes, end_s, deadline_s)
        return payload

    def _wait_until(self, due_s: float, num_bytes: int, end_s: float, deadline_s: float) -> None:
        time.sleep(max(0.0, min(due_s, end_s) - time.monotonic()))
        if due_s > end_s:
            self._broken = self._broken or "a payload was late"
            raise DeadlineError(
                f"{self._peer} did not deliver {num_bytes} bytes within {deadline_s:g} s: the rate limit is too low"
            )

    def done(self, payload: torch.Tensor) -> None:
        with self._lock:
            if self._group is not None:
                self._spare.append(payload)
                self._spare.sort(key=_capacity_bytes)
                del self._spare[:-_SPARE_BUFFERS]

    def discard(self, locator: str, num_bytes: int, deadline_s: float) -> None:
        self.done(self.fetch(locator, num_bytes, deadline_s))

    def close(self) -> None:
        with self._lock:
            self._group = None
            self._spare.clear()

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        """Memory that was used before costs no page faults."""
        with self._lock:
            for i, spare in enumerate(self._spare):
                if _capacity_bytes(spare) >= num_bytes:
                    return self._spare.pop(i).as_strided((num_bytes,), (1,), 0)
        return torch.empty(num_bytes, dtype=torch.uint8)


def _capacity_bytes(buffer: torch.Tensor) -> int:
    return buffer.untyped_storage().nbytes()


def _make_group(
    own_host: str, store_host: str, store_port: int, prefix: str, *, rank: int, deadline_s: float, peer: str
) -> Any:
    """Meet the peer. Each link has its own store client: a client serves one waiting call at a time."""
    timeout = timedelta(seconds=deadline_s)
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._threads = 1
    try:
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=own_host)]
        client = _dist.TCPStore(store_host, store_port, None, False, timeout, wait_for_workers=False)
        return _dist.ProcessGroupGloo(_dist.PrefixStore(prefix, client), rank, 2, options)
    except RuntimeError as error:
        raise HandoverError(f"no gloo link with {peer} within {deadline_s:g} s: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
