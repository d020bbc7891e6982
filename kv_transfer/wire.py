"""Handover messages to the values of `handover.py` and back."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.kv_transfer.handover import Completion, HandoverKey, Offer, TicketTerms
from baton.kv_transfer.plan import PageRange
from baton.proto.baton.v1 import worker_pb2

__all__ = [
    "FirstToken",
    "completion_from_proto",
    "completion_to_proto",
    "offer_from_proto",
    "offer_to_proto",
    "terms_from_proto",
    "ticket_to_proto",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """The end of a prefill.

    Attributes:
        token_id: first output token, sampled by the prefill worker.
        logprobs: its log-probabilities where they were asked for, as `proto/codec.py` encodes them.
        cached_tokens: prompt tokens that the prefill worker found in its prefix cache.
        prefill_s: seconds from the call until it was sampled; `queue_s` of them before the prompt was taken up.
        sampled_s: when that was, on the monotonic clock of the process that holds this value.
        prefill_instance: who computed it; filled in by the receiver.
    """

    token_id: int
    logprobs: worker_pb2.TokenLogprobs | None = None
    cached_tokens: int = 0
    prefill_s: float = 0.0
    queue_s: float = 0.0
    sampled_s: float = field(default=0.0, compare=False)
    prefill_instance: str = ""


def ticket_to_proto(
    key: HandoverKey, terms: TicketTerms, receiver_incarnation: bytes, block_ids: tuple[int, ...]
) -> worker_pb2.Ticket:
    """A granted ticket."""
    return worker_pb2.Ticket(
        request_id=key.request_id,
        attempt=key.attempt,
        handover=key.handover,
        reservation_id=terms.reservation_id,
        epoch=terms.epoch,
        receiver_incarnation=receiver_incarnation,
        block_ids=block_ids,
        cached_tokens=terms.cached_tokens,
        num_tokens=terms.num_tokens,
        lease_s=terms.lease_s,
    )


def terms_from_proto(ticket: worker_pb2.Ticket) -> TicketTerms:
    """The terms of a granted ticket."""
    return TicketTerms(
        reservation_id=ticket.reservation_id,
        epoch=ticket.epoch,
        cached_tokens=ticket.cached_tokens,
        num_tokens=ticket.num_tokens,
        lease_s=ticket.lease_s,
    )


def offer_to_proto(offer: Offer, terms: TicketTerms, sender_incarnation: bytes) -> worker_pb2.PageOffer:
    """An offer under a ticket."""
    pages = offer.pages
    return worker_pb2.PageOffer(
        reservation_id=terms.reservation_id,
        epoch=terms.epoch,
        sender_incarnation=sender_incarnation,
        seq=offer.seq,
        layer_begin=pages.layer_begin,
        layer_end=pages.layer_end,
        token_begin=pages.token_begin,
        token_end=pages.token_end,
        head_begin=pages.head_begin,
        head_end=pages.head_end,
        num_bytes=offer.num_bytes,
        checksum=offer.checksum,
        locator=offer.locator,
    )


def offer_from_proto(message: worker_pb2.PageOffer) -> Offer:
    """The offer in a message; whether it makes sense is the state machine's question."""
    return Offer(
        seq=message.seq,
        pages=PageRange(
            message.layer_begin,
            message.layer_end,
            message.head_begin,
            message.head_end,
            message.token_begin,
            message.token_end,
        ),
        num_bytes=message.num_bytes,
        checksum=message.checksum,
        locator=message.locator,
    )


def completion_to_proto(
    completion: Completion, terms: TicketTerms, sender_incarnation: bytes, *, now_s: float
) -> worker_pb2.ShipComplete:
    """The end of a shipment, told at `now_s` of the sender's clock."""
    message = worker_pb2.ShipComplete(
        reservation_id=terms.reservation_id,
        epoch=terms.epoch,
        sender_incarnation=sender_incarnation,
        num_offers=completion.num_offers,
    )
    first = completion.first_token
    if first is not None:
        assert isinstance(first, FirstToken)
        message.first_token_id = first.token_id
        message.cached_tokens = first.cached_tokens
        message.prefill_s, message.queue_s = first.prefill_s, first.queue_s
        message.sampled_ago_s = max(now_s - first.sampled_s, 0.0) if first.sampled_s else 0.0
        if first.logprobs is not None:
            message.first_token_logprobs.CopyFrom(first.logprobs)
    return message


def completion_from_proto(message: worker_pb2.ShipComplete, prefill_instance: str, *, now_s: float) -> Completion:
    """The end of a shipment by `prefill_instance`, heard at `now_s` of the receiver's clock."""
    if not message.HasField("first_token_id"):
        return Completion(num_offers=message.num_offers, first_token=None)
    return Completion(
        num_offers=message.num_offers,
        first_token=FirstToken(
            token_id=message.first_token_id,
            logprobs=message.first_token_logprobs if message.HasField("first_token_logprobs") else None,
            cached_tokens=message.cached_tokens,
            prefill_s=message.prefill_s,
            queue_s=message.queue_s,
            sampled_s=now_s - message.sampled_ago_s,
            prefill_instance=prefill_instance,
        ),
    )
