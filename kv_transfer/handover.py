"""The words of the handover protocol: keys, terms, offers, and the actions its two state machines ask for.

A handover moves the KV pages of one (request, attempt) from a rank of a prefill worker (sender) to a rank of a decode
worker (receiver). Where instances have several ranks, each pair of ranks that the plan names has a handover of its own;
`reservation.py` joins those of one decode rank, `shipment.py` those of one prefill rank:

    sender                                           receiver
    COMPUTING ──granted──> SHIPPING ──settled──┐     RESERVED ──offer──> RECEIVING ──all landed──> LANDED
        │                      │               │         │                   │                        │ attached
        └───── any failure ────┤               │         └── any failure ────┤                     ATTACHED
                               v               v                             v                        │ released
                           ABORTING ───────> SETTLED                     ABORTING ──> SETTLED      RELEASED

Both halves are pure: events come in as method calls that carry `now_s` where time matters, and return actions for a
thin shell to carry out, in order. Three rules make them safe:

- A logical outcome (landed, failed) is decided once; nothing that arrives later revives or changes it.
- Memory comes back only with `Settle`, when each accessor has finished: jobs that fetch and copy on the receiver, jobs
  that gather and staging buffers that are posted on the sender. A lost link counts as the end of what was posted there,
  because nothing is ever placed into a closed link's staging memory again.
- Each offer is answered by exactly one ack, sent when its payload is no longer read; also when it is refused.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton.kv_transfer.plan import PageRange

__all__ = [
    "Ack",
    "BreakLink",
    "Completion",
    "Discard",
    "Fail",
    "Fetch",
    "GrantTicket",
    "HandoverKey",
    "Land",
    "Offer",
    "ReceiverAction",
    "RefusalCause",
    "RefuseTicket",
    "Release",
    "SendAbort",
    "SendComplete",
    "SenderAction",
    "Settle",
    "Stage",
    "TellSettled",
    "TicketTerms",
]


@dataclass(frozen=True, slots=True)
class HandoverKey:
    """Names one handover: a request, which dispatch of it, and which prefill worker's try for that one (from 0).

    A later try writes into the blocks of the one before: its reservation opens when that one has settled.
    """

    request_id: str
    attempt: int
    handover: int = 0

    @property
    def dispatch(self) -> tuple[str, int]:
        """What all tries have in common."""
        return self.request_id, self.attempt

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}" + (f".{self.handover}" if self.handover else "")


class RefusalCause(enum.StrEnum):
    """Why a receiver refuses pages, a ticket or a link."""

    CHECKSUM = "checksum"
    """The pages arrived damaged."""
    EPOCH = "epoch"
    """They come under another ticket than the reservation's."""
    INCARNATION = "incarnation"
    """They come from, or are meant for, another process than the one that was agreed on."""
    LAYOUT = "layout"
    """The peers differ in model, layout or protocol, or have no transport in common."""
    TAKEN = "taken"
    """The ticket was given to another sender before."""
    ENDED = "ended"
    """The reservation is over, or was never made."""
    MALFORMED = "malformed"
    """The offer contradicts the ticket, or others."""
    GAP = "gap"
    """A message of the stream is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketTerms:
    """What the receiver promises.

    Attributes:
        reservation_id: unique in the life of the receiving process.
        epoch: random fencing number; only who got this ticket knows it.
        cached_tokens: prompt tokens that the receiver holds already; only what follows is sent.
        num_tokens: length of the prompt in tokens.
        lease_s: silence after which either side gives up.
    """

    reservation_id: int
    epoch: int
    cached_tokens: int
    num_tokens: int
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One payload that the sender has ready. `locator` is the transport's word for where it is."""

    seq: int
    pages: PageRange
    num_bytes: int
    checksum: int
    locator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All pages are offered. `first_token` is carried through unread; None where another rank's completion has it."""

    num_offers: int
    first_token: object | None


# ------------------------------------------------------------ actions of the receiver


@dataclass(frozen=True, slots=True)
class GrantTicket:
    """Answer the ticket request with the terms."""

    terms: TicketTerms


@dataclass(frozen=True, slots=True)
class RefuseTicket:
    """Answer the ticket request with a reason."""

    reason: str
    cause: RefusalCause


@dataclass(frozen=True, slots=True)
class Fetch:
    """Start an accessor: fetch, verify and copy the payload, then report `fetched`."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class Discard:
    """Drain the payload without touching any block, then ack it with the refusal, under the epoch it came with."""

    offer: Offer
    epoch: int
    refusal: str
    cause: RefusalCause


@dataclass(frozen=True, slots=True)
class Ack:
    """Answer one offer; an empty refusal says landed and verified."""

    seq: int
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Land:
    """Every page is here: tell the engine, then report `attached`."""

    completion: Completion


@dataclass(frozen=True, slots=True)
class TellSettled:
    """Tell the sender that the handover is over; an empty reason says attached."""

    reason: str = ""


# ------------------------------------------------------------ actions of the sender


@dataclass(frozen=True, slots=True)
class Stage:
    """Start an accessor: stage, gather and sum these pages and post their offer, then report `posted`.

    What is not posted is reported by `stage_failed` instead, also when the handover is over meanwhile.
    """

    seq: int
    pages: PageRange


@dataclass(frozen=True, slots=True)
class Release:
    """Give the staging buffer back."""

    seq: int


@dataclass(frozen=True, slots=True)
class SendComplete:
    """Send the completion."""

    completion: Completion


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Tell the receiver that no more will come."""

    reason: str


@dataclass(frozen=True, slots=True)
class BreakLink:
    """The receiver does not answer an abort: close the link, so that it cannot read staging memory any more."""

    reason: str


# ------------------------------------------------------------ actions of both


@dataclass(frozen=True, slots=True)
class Fail:
    """The logical outcome: no handover. Memory is not free before `Settle`.

    `by_peer` says that the other half gave up or is gone: a receiver may wait for another sender's try then, and for a
    sender it means that no try of anybody's is wanted.
    """

    reason: str
    by_peer: bool = False


@dataclass(frozen=True, slots=True)
class Settle:
    """No accessor is left; the memory may be used again. Said exactly once."""


ReceiverAction = GrantTicket | RefuseTicket | Fetch | Discard | Ack | Land | Fail | TellSettled | Settle
SenderAction = Stage | Release | SendComplete | SendAbort | BreakLink | Fail | Settle
