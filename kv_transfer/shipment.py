"""One handover as a prefill rank sees it: its pages, straight to every decode rank that needs some of them.

    engine thread                  event loop                                      one PairShipment per decode rank
    shipment.offer(pages) ───────> Shipment ── computed, completed ──────────────> stage, post, offer, acks
    shipment.complete(token) ────>   │  <────── failed, settled ──────────────────┘
    await shipment.settled() <───────┘

The engine thread only queues: pages are gathered by the links' staging threads, so the blocks must stay as they are
until the shipment has settled. Everything else runs on the event loop's thread. One pair that fails fails the shipment
at once, and the other pairs are aborted; the shipment has settled when all its pairs have.

A prefill instance of several ranks has one shipment per rank. They know nothing of each other: `on_failed` and
`settled` tell whoever drives the instance, who aborts the shipments of the other ranks when one has failed.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from baton.engine.kv_layout import KvLayout
from baton.errors import HandoverError, IncompatibleError, RefusedError
from baton.kv_transfer.handover import Fail, HandoverKey
from baton.kv_transfer.pair_shipment import Gather, PairShipment, ShipmentContext
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import PageRange, driver_rank, rank_pages, transfer_pairs
from baton.kv_transfer.wire import FirstToken

__all__ = ["DecodeTarget", "Gather", "RankAddress", "ShipResult", "Shipment"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankAddress:
    """Where a decode rank serves `Handover`, and the process that is meant: another one there is a stranger."""

    address: str
    incarnation: bytes


@dataclass(frozen=True, slots=True)
class DecodeTarget:
    """A decode instance, to be shipped to.

    Attributes:
        ranks: in the order of its layout.
        layout: not needed for an instance of one rank.
    """

    ranks: tuple[RankAddress, ...]
    layout: KvLayout | None = None

    def full_layout(self, me: LocalPeer) -> KvLayout:
        """The layout, or that of one rank of the same model."""
        return self.layout or replace(me.layout, tensor_parallel=1, pipeline_parallel=1, layers_per_stage=())

    def ranks_for(self, me: LocalPeer) -> tuple[int, ...]:
        """The decode ranks that need something from this prefill rank, ascending.

        Raises:
            IncompatibleError: the layout is missing, is not one of that many ranks, or is of another model.
        """
        layout = self.full_layout(me)
        if layout.tensor_parallel * layout.pipeline_parallel != len(self.ranks):
            raise IncompatibleError(
                f"the decode instance has {len(self.ranks)} ranks, but its layout tensor_parallel x pipeline_parallel "
                f"= {layout.tensor_parallel} x {layout.pipeline_parallel}"
            )
        return tuple(sorted(rank for source, rank in transfer_pairs(me.layout, layout) if source == me.rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShipResult:
    """What a handover that succeeded moved, as far as this rank is concerned.

    Attributes:
        num_bytes, num_tokens: shipped; tokens that the receiver held already are not among them.
        exposed_s: seconds from the completion of the prefill until the receivers had attached the pages.
    """

    num_bytes: int
    num_tokens: int
    exposed_s: float


class Shipment:
    """One handover as a prefill rank sees it; `offer`, `complete`, `abort` and `failure` are for any thread."""

    def __init__(
        self,
        key: HandoverKey,
        context: ShipmentContext,
        target: DecodeTarget,
        *,
        timeout_s: float,
        on_failed: Callable[[HandoverKey, str], None] | None,
        forget: Callable[[Shipment], None],
    ) -> None:
        ranks = target.ranks_for(context.peer)
        assert ranks, f"{context.peer} has nothing to ship"
        self._is_driver = context.peer.rank == driver_rank(context.peer.layout)
        self._decode_driver = driver_rank(target.full_layout(context.peer))
        self._key = key
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._held = rank_pages(context.peer.layout, context.peer.rank, 0, 0)
        self._on_failed = on_failed
        self._forget = forget
        self._failure: HandoverError | None = None
        self._completed_s = 0.0
        self._settled: asyncio.Future[ShipResult | None] = self._loop.create_future()
        self.pairs = {
            rank: PairShipment(
                key, rank, context, timeout_s=timeout_s, on_failed=self._pair_failed, on_settled=self._pair_settled
            )
            for rank in ranks
        }

    # ---------------------------------------------------------------- any thread

    @property
    def key(self) -> HandoverKey:
        """Whose pages."""
        return self._key

    @property
    def failure(self) -> HandoverError | None:
        """Why the handover failed: the engine need not compute on. None while it goes well."""
        return self._failure

    def offer(self, layer_begin: int, layer_end: int, token_begin: int, token_end: int, gather: Gather) -> None:
        """These pages are computed and stay as they are until the shipment has settled. Queues, never blocks.

        Layers count within this rank's pool; all its heads are offered. `gather` is called on staging threads, up to
        once per payload, several at a time, only before the shipment has settled.
        """
        held = self._held
        pages = PageRange(
            held.layer_begin + layer_begin,
            held.layer_begin + layer_end,
            held.head_begin,
            held.head_end,
            token_begin,
            token_end,
        )
        self._call(lambda: self._computed(pages, gather))

    def complete(self, first_token: FirstToken | None) -> None:
        """Everything is offered, and this token was sampled (None but on the driver). Queues, never blocks."""
        assert first_token is not None or not self._is_driver, "the driver tells the first token"
        self._call(lambda: self._complete(first_token))

    def abort(self, reason: str) -> None:
        """Give up: the receivers are told. Queues, never blocks; `settled` tells when the blocks are free."""
        self._call(lambda: self._fail(HandoverError(f"handover {self._key} failed: {reason}"), reason))

    def _call(self, event: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(event)

    # ---------------------------------------------------------------- the loop's thread

    async def settled(self) -> ShipResult:
        """Wait until nothing reads this rank's blocks for this shipment any more.

        The wait is bounded by the lease. Cancelling it does not abort the shipment.

        Raises:
            HandoverError: the pages were not handed over; RefusedError where the receiver does not want them from
                anybody any more.
        """
        result = await asyncio.shield(self._settled)
        if result is None:
            assert self._failure is not None
            # Another one: raised, it keeps this frame, and that the shipment with its links.
            raise copy.copy(self._failure)
        return result

    @property
    def has_tickets(self) -> bool:
        """Every pair has its ticket, and none has settled."""
        return all(pair.reservation_id for pair in self.pairs.values())

    def tick(self) -> None:
        """Look at the deadlines."""
        for pair in list(self.pairs.values()):
            pair.tick()

    def _computed(self, pages: PageRange, gather: Gather) -> None:
        for pair in self.pairs.values():
            pair.computed(pages, gather)

    def _complete(self, first_token: FirstToken | None) -> None:
        self._completed_s = self._context.clock()
        for rank, pair in self.pairs.items():
            carries = self._is_driver and rank == self._decode_driver
            pair.completed(first_token if carries else None)

    def _pair_failed(self, rank: int, failure: HandoverError | Fail) -> None:
        reason = failure.reason if isinstance(failure, Fail) else str(failure)
        if len(self.pairs) > 1:
            reason = f"decode rank {rank}: {reason}"
        if isinstance(failure, Fail):
            kind = RefusedError if failure.by_peer else HandoverError
            failure = kind(f"handover {self._key} failed: {reason}")
        self._fail(failure, reason)

    def _fail(self, error: HandoverError, reason: str) -> None:
        """The outcome, decided once. An abort that comes after every pair has settled changes nothing."""
        if self._failure is not None or self._settled.done():
            return
        self._failure = copy.copy(error)  # without the frames that it went through
        _log.warning("%s", error)
        if self._on_failed is not None:
            self._on_failed(self._key, reason)
        for pair in self.pairs.values():
            pair.abort(reason)

    def _pair_settled(self) -> None:
        if any(not pair.has_settled for pair in self.pairs.values()):
            return
        self._forget(self)
        self._on_failed = None  # it may hold this shipment
        if self._failure is not None:
            if not self._settled.done():
                self._settled.set_result(None)
            return
        self._settled.set_result(
            ShipResult(
                num_bytes=sum(pair.shipped_bytes for pair in self.pairs.values()),
                num_tokens=max(pair.num_tokens for pair in self.pairs.values()),
                exposed_s=self._context.clock() - self._completed_s,
            )
        )
