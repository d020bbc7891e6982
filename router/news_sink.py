"""Who takes what workers tell besides tokens: the interface between their streams and what is learned from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.instances import Instance

__all__ = ["NewsSink", "NoSink", "StepSink"]

StepSink = Callable[[Instance, Sequence[pb.StepSample]], None]
"""Learns from the steps of a worker."""


class NewsSink(Protocol):
    """Told by the streams, on the event loop."""

    def opened(self, instance: Instance) -> None:
        """A stream of this worker has begun; a snapshot of its blocks will come."""
        ...

    def closed(self, instance: Instance) -> None:
        """The stream has ended."""
        ...

    def blocks(self, instance: Instance, events: Sequence[pb.BlockEvents]) -> bool:
        """The worker's blocks have changed; true: something was missed, ask for a snapshot."""
        ...

    def steps(self, instance: Instance, samples: Sequence[pb.StepSample]) -> None:
        """What some of its steps did and took."""
        ...


class NoSink:
    """Takes nothing."""

    def opened(self, instance: Instance) -> None:
        """See `NewsSink`."""

    def closed(self, instance: Instance) -> None:
        """See `NewsSink`."""

    def blocks(self, instance: Instance, events: Sequence[pb.BlockEvents]) -> bool:
        """See `NewsSink`."""
        return False

    def steps(self, instance: Instance, samples: Sequence[pb.StepSample]) -> None:
        """See `NewsSink`."""
