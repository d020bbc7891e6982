"""What several routers tell each other: what each has just sent to workers, so that they do not all choose the same.

    own choice --note--> batch --every PERIOD_S--> stream in the shared state --> the others: on_choice
                                                                                  counted in for `ttl_s`, then gone

Workers tell every router of their load and blocks, some 50 ms after the fact and only when the work is done; this
closes the gap in between. No request waits for it: without the shared state a router knows its own choices only, and
what could not be told or heard is counted. A router that dies takes nothing back: what it told runs out by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError

from baton.errors import UnavailableError
from baton.metrics import Metrics
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.state.base import SharedState

__all__ = ["Peers"]

_log = logging.getLogger(__name__)
PERIOD_S = 0.05
TTL_S = 1.0
"""How long a choice is counted in: by then the worker tells of it."""
_STREAM = "choices"
_STREAM_EVENTS = 1000
_STREAM_TTL_S = 60.0
_READ_EVENTS = 64
_READ_WAIT_S = 1.0
_RETRY_S = 0.5
_MAX_WAITING = 2048
_MAX_KEYS = 2048
_MAX_PREFILL_TOKENS = 1 << 24


class Peers:
    """One router's part in it.

    Args:
        router_id: tells own words from others'.
        on_choice: another router has sent a request; in bounds, but the instance may be unknown here.
    """

    def __init__(
        self, state: SharedState, metrics: Metrics, *, router_id: str, on_choice: Callable[[pb.PendingChoice], None]
    ) -> None:
        self._state = state
        self._metrics = metrics
        self._router_id = router_id
        self._on_choice = on_choice
        self._waiting: list[pb.PendingChoice] = []
        self._has_waiting = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Tell and hear until `close`. Idempotent."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._tell(), name="tell peers"),
                asyncio.create_task(self._hear(), name="hear peers"),
            ]

    async def close(self) -> None:
        """Stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def note(self, instance_id: str, incarnation: bytes, *, prefill_tokens: int, keys: Sequence[int]) -> None:
        """This router sends a request there.

        Args:
            keys: of the blocks that it will leave there and that are not there yet.
        """
        if len(self._waiting) >= _MAX_WAITING:
            self._metrics.peer_choices.labels(outcome="dropped").inc()
            return
        self._waiting.append(
            pb.PendingChoice(
                instance_id=instance_id,
                incarnation=incarnation,
                prefill_tokens=prefill_tokens,
                block_keys=keys[:_MAX_KEYS],
                ttl_s=TTL_S,
            )
        )
        self._has_waiting.set()

    async def _tell(self) -> None:
        while True:
            await self._has_waiting.wait()
            await asyncio.sleep(PERIOD_S)  # what comes close together is told together
            choices, self._waiting = self._waiting, []
            self._has_waiting.clear()
            message = pb.PendingChoices(router_id=self._router_id, choices=choices).SerializeToString()
            try:
                await self._state.append(_STREAM, message, max_events=_STREAM_EVENTS, ttl_s=_STREAM_TTL_S)
            except (UnavailableError, ValueError):
                self._metrics.peer_choices.labels(outcome="dropped").inc(len(choices))
            else:
                self._metrics.peer_choices.labels(outcome="told").inc(len(choices))

    async def _hear(self) -> None:
        while True:
            with contextlib.suppress(UnavailableError):
                place = await self._state.end(_STREAM)
                while True:
                    place, events = await self._state.read(_STREAM, place, max_events=_READ_EVENTS, wait_s=_READ_WAIT_S)
                    for event in events:
                        self._take(event)
            await asyncio.sleep(_RETRY_S)

    def _take(self, event: bytes) -> None:
        try:
            message = pb.PendingChoices.FromString(event)
        except DecodeError:
            self._metrics.peer_choices.labels(outcome="refused").inc()
            return
        if message.router_id == self._router_id:
            return
        for choice in message.choices[:_MAX_WAITING]:
            is_sound = (
                len(choice.block_keys) <= _MAX_KEYS
                and choice.prefill_tokens <= _MAX_PREFILL_TOKENS
                and 0 < choice.ttl_s <= 10 * TTL_S
            )
            self._metrics.peer_choices.labels(outcome="heard" if is_sound else "refused").inc()
            if is_sound:
                self._on_choice(choice)
