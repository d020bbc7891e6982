"""How far each instance has come while a cluster starts: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TextIO

from baton.cluster.bars import Bars
from baton.proto.baton.v1 import worker_pb2

__all__ = ["Progress"]

# "loading weights, 3 of 7": from here on, only how far it is.
_FIGURES = re.compile(r"[\s,]*\d.*")


class Progress(Bars):
    """Context manager; `show` takes each new list of the registry."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream, label_chars=12, bar_chars=24)
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, tuple[str, str]] = {}

    def show(self, statuses: Iterable[worker_pb2.WorkerStatus]) -> None:
        """Draw the newest state of every instance."""
        for status in statuses:
            if self._bars is not None:
                self._draw(status)
            elif self._told.get(status.instance_id) != (phase := (status.state, _FIGURES.sub("", status.detail))):
                self._told[status.instance_id] = phase
                print(
                    f"  {status.instance_id:<12} {status.state:<9} {status.detail}".rstrip(),
                    file=self._stream,
                    flush=True,
                )

    def _draw(self, status: worker_pb2.WorkerStatus) -> None:
        ready = status.state == "ready"
        if status.instance_id not in self._tasks:
            self._tasks[status.instance_id] = self._bars.add_task(status.instance_id, total=1.0, detail="")
        detail = f"ready (pid {status.ranks[0].pid})" if ready and status.ranks else status.detail or status.state
        self._bars.update(
            self._tasks[status.instance_id], completed=1.0 if ready else min(status.progress, 0.99), detail=detail
        )
