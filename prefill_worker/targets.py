"""A decode instance as messages name it."""

from __future__ import annotations

from collections.abc import Iterable

from baton.kv_transfer.shipment import DecodeTarget, RankAddress
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.codec import layout_from_proto

__all__ = ["decode_target"]


def decode_target(ranks: Iterable[pb.RankAddress], layout: pb.KvLayout) -> DecodeTarget:
    """The decode instance of these ranks; an empty layout stands for that of one rank."""
    addresses = tuple(RankAddress(rank.address, rank.incarnation) for rank in ranks)
    return DecodeTarget(addresses, layout_from_proto(layout) if layout.num_layers else None)
