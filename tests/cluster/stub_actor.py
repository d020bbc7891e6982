"""An actor that behaves like a rank towards launcher `ray`: there until asked to stop, and tells where it is."""

from __future__ import annotations

import os
import time
from typing import Any

import ray

from baton.cluster.launchers.watch_point import WatchPoint
from baton.placement import Placement


class StubActor:
    """As `RankActor`; a role of "decode" whose instance is "decode-9" does not stop when asked."""

    def __init__(
        self, config_json: str, role: str, placement: dict[str, Any], registry_address: str, log_dir: str
    ) -> None:
        self.placement = Placement(**placement)
        self.watch_point = WatchPoint()

    def watch(self, generation: int) -> tuple[bool, str]:
        """As `RankActor.watch`."""
        return self.watch_point.watch(generation)

    def stop(self) -> None:
        """End."""
        if self.placement.instance_id != "decode-9":
            self.watch_point.end("")

    def where(self) -> tuple[int, str, dict[str, Any]]:
        """(pid, node id, placement)."""
        placement = {name: getattr(self.placement, name) for name in ("start_id", "rank", "num_ranks", "host")}
        return os.getpid(), ray.get_runtime_context().get_node_id(), placement


class LateActor(StubActor):
    """Is not there for a long time."""

    def __init__(self, *arguments: Any) -> None:
        time.sleep(60.0)


class BrokenActor(StubActor):
    """Fails before it can run."""

    def __init__(self, *arguments: Any) -> None:
        raise ImportError("no such module")
