"""Reservations as a decode instance sees them: one on every rank, one outcome.

    open on every rank --all landed--> on_landed (once) ------------------------------> all settled: on_settled
                       --one failed, or cancelled--> on_failed (once), others cancelled --> all settled: on_settled

The blocks are the same on every rank; before `on_settled` some rank may still write to them. The callbacks and their
order are those of `HandoverReceiver`, which does this for one rank; a reservation for the next try may be opened in
`on_settled` of the one before. Lives on the driver's event loop; for an instance of one rank there are no followers to
tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from baton.kv_transfer.handover import Fail, HandoverKey, RefusalCause
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.receiver import HandoverReceiver
from baton.kv_transfer.wire import FirstToken
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.worker.parts import Parts

__all__ = ["Reservations"]


@dataclass(slots=True, eq=False)
class _Open:
    parts: Parts
    first_token: FirstToken | None = None


class Reservations:
    """All reservations of a decode instance.

    Args:
        peer: the driver.
        tell_followers: sends a command to every other rank.
        on_landed, on_failed, on_settled: see the module's text.
        on_refused: told of what any rank refuses; may be called by any thread.
        receiver_options: for the driver's own `HandoverReceiver`.

    Attributes:
        receiver: the driver's own.
    """

    def __init__(
        self,
        peer: LocalPeer,
        *,
        tell_followers: Callable[[pb.RankCommand], None],
        on_landed: Callable[[HandoverKey, FirstToken], None],
        on_failed: Callable[[HandoverKey, Fail], None],
        on_settled: Callable[[HandoverKey], None],
        on_refused: Callable[[RefusalCause], None],
        **receiver_options: Any,
    ) -> None:
        self._ranks = range(peer.num_ranks)
        self._driver = peer.rank
        self._tell = tell_followers
        self._on_landed = on_landed
        self._on_failed = on_failed
        self._on_settled = on_settled
        self._on_refused = on_refused
        self._open: dict[HandoverKey, _Open] = {}
        self.receiver = HandoverReceiver(
            peer,
            on_landed=lambda key, first: self._landed(self._driver, key, first),
            on_failed=lambda key, failure: self._failed(self._driver, key, failure),
            on_settled=lambda key: self._settled(self._driver, key),
            on_refused=on_refused,
            **receiver_options,
        )

    def open_reservation(
        self, key: HandoverKey, block_ids: Sequence[int], *, cached_tokens: int, num_tokens: int
    ) -> None:
        """Blocks are reserved for this request, on every rank. See `HandoverReceiver.open_reservation`."""
        assert key not in self._open, f"{key} has a reservation"
        self._open[key] = _Open(Parts(self._ranks))
        command = pb.OpenReservation(
            request_id=key.request_id,
            attempt=key.attempt,
            handover=key.handover,
            block_ids=block_ids,
            cached_tokens=cached_tokens,
            num_tokens=num_tokens,
        )
        self._tell(pb.RankCommand(open_reservation=command))
        self.receiver.open_reservation(key, block_ids, cached_tokens=cached_tokens, num_tokens=num_tokens)

    def cancel(self, key: HandoverKey, reason: str) -> None:
        """Give up on the pages of a request, on every rank. See `HandoverReceiver.cancel`."""
        command = pb.CancelReservation(
            request_id=key.request_id, attempt=key.attempt, handover=key.handover, reason=reason
        )
        self._tell(pb.RankCommand(cancel_reservation=command))
        self.receiver.cancel(key, reason)

    def on_part(self, rank: int, event: pb.PartEvent) -> None:
        """What a follower says of its part."""
        key = HandoverKey(event.request_id, event.attempt, event.handover)
        match event.kind:
            case pb.PartEvent.LANDED:
                self._landed(rank, key, None)
            case pb.PartEvent.FAILED:
                self._failed(rank, key, Fail(event.reason, event.by_peer))
            case pb.PartEvent.SETTLED:
                self._settled(rank, key)
            case pb.PartEvent.REFUSED:
                self._on_refused(RefusalCause(event.reason))

    def _landed(self, rank: int, key: HandoverKey, first: FirstToken | None) -> None:
        opened = self._open[key]
        opened.first_token = first or opened.first_token
        if opened.parts.landed(rank):
            assert opened.first_token is not None, "the driver's landing carries the first token"
            self._on_landed(key, opened.first_token)

    def _failed(self, rank: int, key: HandoverKey, failure: Fail) -> None:
        parts = self._open[key].parts
        if parts.failed(rank, failure.reason):
            self._on_failed(key, Fail(parts.failure, failure.by_peer))
            if len(self._ranks) > 1:
                self.cancel(key, parts.failure)

    def _settled(self, rank: int, key: HandoverKey) -> None:
        if self._open[key].parts.settled(rank):
            del self._open[key]
            self._on_settled(key)
