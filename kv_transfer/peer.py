"""Who a worker is for its peers, and whether two of them may exchange pages."""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.kv_layout import DTYPE_BYTES, KvLayout
from baton.errors import IncompatibleError
from baton.proto.baton.v1 import worker_pb2
from baton.proto.codec import layout_from_proto, layout_to_proto

__all__ = ["PROTOCOL_VERSION", "LocalPeer", "mismatch", "peer_from_proto", "peer_to_proto"]

PROTOCOL_VERSION = 3

_MAX_AXIS = 1 << 16
_MAX_RANKS = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPeer:
    """One worker process, a rank of its instance, as it introduces itself on a link.

    Attributes:
        instance_id: name of the instance, for people.
        rank: `stage * tensor_parallel + tensor_rank` in the instance's layout.
        incarnation: 16 random bytes, drawn at process start.
        model_fingerprint: digest over the weights and configuration that shape the KV cache.
        host_id: see `transports/select.py`.
    """

    instance_id: str
    incarnation: bytes
    model_fingerprint: str
    layout: KvLayout
    host_id: str
    rank: int = 0
    protocol_version: int = PROTOCOL_VERSION

    @property
    def num_ranks(self) -> int:
        """Ranks of the instance."""
        return self.layout.tensor_parallel * self.layout.pipeline_parallel

    def __str__(self) -> str:
        rank = f".{self.rank}" if self.num_ranks > 1 else ""
        return f"{self.instance_id}{rank}/{self.incarnation.hex()[:8]}"


def mismatch(mine: LocalPeer, theirs: LocalPeer) -> str:
    """What keeps the two from exchanging pages, one `name: mine, theirs` per difference; empty when nothing does.

    Tensor parallelism, pipeline parallelism and block size may differ: the transfer plan maps any to any.
    """
    pairs: list[tuple[str, object, object]] = [
        ("protocol_version", mine.protocol_version, theirs.protocol_version),
        ("model_fingerprint", mine.model_fingerprint, theirs.model_fingerprint),
        ("layout.dtype", mine.layout.dtype, theirs.layout.dtype),
        ("layout.num_layers", mine.layout.num_layers, theirs.layout.num_layers),
        ("layout.num_kv_heads", mine.layout.num_kv_heads, theirs.layout.num_kv_heads),
        ("layout.head_dim", mine.layout.head_dim, theirs.layout.head_dim),
    ]
    return "; ".join(
        f"{name}: {mine_value} here, {their_value} there"
        for name, mine_value, their_value in pairs
        if mine_value != their_value
    )


def peer_to_proto(peer: LocalPeer) -> worker_pb2.PeerInfo:
    """As a message."""
    return worker_pb2.PeerInfo(
        instance_id=peer.instance_id,
        rank=peer.rank,
        incarnation=peer.incarnation,
        protocol_version=peer.protocol_version,
        model_fingerprint=peer.model_fingerprint,
        host_id=peer.host_id,
        layout=layout_to_proto(peer.layout),
    )


def peer_from_proto(message: worker_pb2.PeerInfo) -> LocalPeer:
    """From a message of the other side, which is not trusted.

    Raises:
        IncompatibleError: a field is missing or out of bounds; the text names it and its value.
    """
    layout = message.layout
    for name in ("num_layers", "num_kv_heads", "head_dim", "block_size", "tensor_parallel", "pipeline_parallel"):
        value = getattr(layout, name)
        if not 1 <= value <= _MAX_AXIS:
            raise IncompatibleError(f"peer's layout.{name} is {value}; it must be between 1 and {_MAX_AXIS}")
    if layout.dtype not in DTYPE_BYTES:
        raise IncompatibleError(
            f"peer's layout.dtype is {layout.dtype[:32]!r}; it must be one of {', '.join(DTYPE_BYTES)}"
        )
    num_ranks = layout.tensor_parallel * layout.pipeline_parallel
    if layout.pipeline_parallel > layout.num_layers:
        raise IncompatibleError(
            f"peer's layout.pipeline_parallel is {layout.pipeline_parallel}, more than its {layout.num_layers} layers"
        )
    stages = list(layout.layers_per_stage)
    if stages and (len(stages) != layout.pipeline_parallel or sum(stages) != layout.num_layers or min(stages) < 1):
        raise IncompatibleError(
            f"peer's layout.layers_per_stage is {stages[:64]}; it must be {layout.pipeline_parallel} numbers of at "
            f"least 1 that sum to its {layout.num_layers} layers"
        )
    if num_ranks > _MAX_RANKS:
        raise IncompatibleError(f"peer's layout has {num_ranks} ranks; at most {_MAX_RANKS} are possible")
    if message.rank >= num_ranks:
        raise IncompatibleError(f"peer's rank is {message.rank}; its layout has ranks 0 to {num_ranks - 1}")
    if len(message.incarnation) != 16:
        raise IncompatibleError(f"peer's incarnation has {len(message.incarnation)} bytes; it must have 16")
    return LocalPeer(
        instance_id=message.instance_id[:128],
        rank=message.rank,
        incarnation=message.incarnation,
        model_fingerprint=message.model_fingerprint[:256],
        host_id=message.host_id[:256],
        protocol_version=message.protocol_version,
        layout=layout_from_proto(layout),
    )
