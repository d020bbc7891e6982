"""Instances in the shared state: each process's status under its id, for as long as a lease.

    instances/<instance id>     "baton-instance 1\\n", then a serialised WorkerStatus
    channel "instances"         the id of an instance that has just changed

Whoever can write to Redis can write anything there: what does not decode, or speaks for another key, or comes from a
later version of Baton, is no instance, and `decode_instance` says why.
"""

from __future__ import annotations

import re
from typing import Final

from google.protobuf.message import DecodeError

from baton.config_values import split_host_port
from baton.proto.baton.v1 import worker_pb2 as pb

__all__ = ["CHANNEL", "GROUP", "LEASE_S", "content_of", "decode_instance", "encode_instance", "key_of"]

LEASE_S: Final = 3.0
"""How long an announcement holds, in seconds, as in the controller's registry."""
GROUP: Final = "instances/"
CHANNEL: Final = "instances"

_HEAD: Final = b"baton-instance 1\n"
_ANY_HEAD: Final = re.compile(rb"baton-instance (\d{1,6})\n")
_MAX_BYTES: Final = 256 << 10
_INCARNATION_BYTES: Final = 16
_ROLES: Final = ("prefill", "decode", "router")
_STATES: Final = ("starting", "ready", "draining", "dead")


def key_of(instance_id: str) -> str:
    """Where an instance's status is."""
    return GROUP + instance_id


def encode_instance(status: pb.WorkerStatus) -> bytes:
    """The value under `key_of(status.instance_id)`."""
    return _HEAD + status.SerializeToString()


def content_of(status: pb.WorkerStatus) -> bytes:
    """What makes two announcements different for others: everything but the load."""
    content = pb.WorkerStatus()
    content.CopyFrom(status)
    content.ClearField("load")
    return content.SerializeToString(deterministic=True)


def decode_instance(key: str, value: bytes) -> pb.WorkerStatus | str:
    """The status that stands under `key`, or why there is none."""
    if len(value) > _MAX_BYTES:
        return f"{len(value)} bytes are more than an instance needs"
    head = _ANY_HEAD.match(value)
    if head is None:
        return "it is not an instance's status"
    if not value.startswith(_HEAD):
        return f"it is of version {int(head[1])}, and this Baton reads version 1"
    try:
        status = pb.WorkerStatus.FromString(value[len(_HEAD) :])
    except DecodeError:
        return "it does not decode"
    if key != key_of(status.instance_id):
        return f"it speaks for {status.instance_id[:80]!r}"
    if status.role not in _ROLES or status.state not in _STATES:
        return f"there is no role {status.role[:80]!r} in state {status.state[:80]!r}"
    if len(status.incarnation) != _INCARNATION_BYTES:
        return f"an incarnation of {len(status.incarnation)} bytes"
    for address in (status.address, *(rank.address for rank in status.ranks)):
        try:
            if address:
                split_host_port(address)
        except ValueError as error:
            return str(error)[:200]
    return status
