"""The shipments of one prefill rank: which sequence of a step belongs to which, and what of it has been offered.

    begin(tag) -> open --rows of steps--> pages offered --last layer of the last token--> complete -> settled -> forget

Every rank of an instance has one, the driver too. Steps name sequences by tag; a tag that is not known yet belongs to a
shipment whose `begin` is on its way (steps and commands travel separately), so its rows wait; one at or below the
highest that was begun, and not open, is over, and its rows mean nothing any more.

Threads: `on_rows` is for the thread that computes; everything else runs on the event loop, where rows are taken up in
the order in which they came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from baton import faults
from baton.engine.pages import KvPages
from baton.errors import BatonError, RefusedError
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import PageRange
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.shipment import DecodeTarget, Shipment, ShipResult
from baton.kv_transfer.wire import FirstToken

__all__ = ["RankShipments", "ShippedRows"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShippedRows:
    """What a step computes of one sequence.

    Attributes:
        tag: names the shipment; not 0.
        block_ids: of the sequence from position 0; cover `start + count` tokens, may be more.
        start, count: positions computed in this step.
    """

    tag: int
    block_ids: Sequence[int]
    start: int
    count: int


@dataclass(slots=True, eq=False)
class _Open:
    shipment: Shipment
    num_tokens: int
    in_one_message: bool
    is_driver: bool
    prefix_offered: bool = False
    task: asyncio.Task[None] | None = field(default=None)


class RankShipments:
    """Shipments of one rank.

    Args:
        peer: this rank.
        sender: its sender; started and closed by whoever made it.
        pages: this rank's part of the pool.
        is_driver: the driver completes with the first token, others when everything is offered.
        on_failed: told (tag, reason, whether the decode side wants no pages any more) at most once.
        on_settled: told (tag, what was shipped; None where it failed) once.
    """

    def __init__(
        self,
        peer: LocalPeer,
        sender: HandoverSender,
        pages: KvPages,
        *,
        is_driver: bool,
        on_failed: Callable[[int, str, bool], None],
        on_settled: Callable[[int, ShipResult | None], None],
    ) -> None:
        self._peer = peer
        self._sender = sender
        self._pages = pages
        self._is_driver = is_driver
        self._on_failed = on_failed
        self._on_settled = on_settled
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, _Open] = {}
        self._early: dict[int, list[tuple[ShippedRows, int, int]]] = {}
        self._last_tag = 0

    # ------------------------------------------------------------ the thread that computes

    def on_rows(self, rows: Sequence[ShippedRows], begin: int, end: int) -> None:
        """This rank's layers [begin, end), numbered within its pool, are written for `rows`."""
        if rows:
            self._loop.call_soon_threadsafe(self._take, rows, begin, end)

    # ------------------------------------------------------------ event loop

    def begin(
        self,
        tag: int,
        key: HandoverKey,
        target: DecodeTarget,
        *,
        timeout_s: float,
        num_tokens: int,
        in_one_message: bool,
    ) -> None:
        """Starts a shipment. Tags count up.

        Args:
            timeout_s: how long links and tickets may take.
            num_tokens: of the prompt.
            in_one_message: offer a step's pages at once, after the last layer.

        Raises:
            IncompatibleError: the target's layout does not fit.
        """
        assert tag > self._last_tag, f"tag {tag} after {self._last_tag}"
        if not target.ranks_for(self._peer):
            # Others hold the same heads and ship them: this part is over before it began.
            self._last_tag = tag
            self._early.pop(tag, None)
            self._loop.call_soon(self._on_settled, tag, ShipResult(num_bytes=0, num_tokens=0, exposed_s=0.0))
            return
        shipment = self._sender.begin(
            key,
            target,
            timeout_s,
            on_failed=lambda _, reason: self._on_failed(tag, reason, isinstance(shipment.failure, RefusedError)),
        )
        self._last_tag = tag
        opened = self._open[tag] = _Open(shipment, num_tokens, in_one_message, self._is_driver)
        opened.task = self._loop.create_task(self._wait_settled(tag, shipment), name=f"shipment {tag}")
        for early in self._early.pop(tag, []):
            self._offer(opened, *early)

    def complete(self, tag: int, first_token: FirstToken) -> None:
        """The driver knows the first token."""
        self._open[tag].shipment.complete(first_token)

    def abort(self, tag: int, reason: str) -> None:
        """Gives up, where it is not over."""
        if tag in self._open:
            self._open[tag].shipment.abort(reason)

    def forget(self, tag: int) -> None:
        """It is settled on every rank."""
        opened = self._open.pop(tag, None)
        assert opened is None or opened.task is None or opened.task.done(), f"shipment {tag} is not settled"

    def _take(self, rows: Sequence[ShippedRows], begin: int, end: int) -> None:
        for row in rows:
            opened = self._open.get(row.tag)
            if opened is not None:
                self._offer(opened, row, begin, end)
            elif row.tag > self._last_tag:
                self._early.setdefault(row.tag, []).append((row, begin, end))

    def _offer(self, opened: _Open, row: ShippedRows, begin: int, end: int) -> None:
        num_layers = self._pages.num_layers
        gather = partial(self._gather, list(row.block_ids))
        if not opened.prefix_offered:
            opened.prefix_offered = True
            if row.start:
                # Found in the prefix cache: computed long ago.
                opened.shipment.offer(0, num_layers, 0, row.start, gather)
        is_last = end == num_layers
        if opened.in_one_message:
            if not is_last:
                return
            begin = 0
        opened.shipment.offer(begin, end, row.start, row.start + row.count, gather)
        if faults.active is not None:
            faults.strike("layers")
        if is_last and row.start + row.count == opened.num_tokens and not opened.is_driver:
            opened.shipment.complete(None)

    def _gather(self, block_ids: list[int], pages: PageRange, out: Tensor) -> int:
        """Runs on a link's staging threads; the blocks stay as they are until the shipment has settled."""
        return self._pages.gather(block_ids, pages.layers, pages.tokens, out, heads=pages.heads)

    async def _wait_settled(self, tag: int, shipment: Shipment) -> None:
        result: ShipResult | None = None
        try:
            result = await shipment.settled()
        except BatonError as error:
            _log.info("shipment %d ended: %s", tag, error)
        self._on_settled(tag, result)
