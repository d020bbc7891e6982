"""How far a bench is: a bar on a terminal, a line for each point elsewhere."""

from __future__ import annotations

from typing import Any, TextIO

from baton.cluster.bars import Bars
from baton.cluster.loadgen.plan import Plan, Point
from baton.cluster.loadgen.run import Progress

__all__ = ["ProgressBar"]


class ProgressBar(Bars):
    """Context manager; `show` takes each new state."""

    def __init__(self, plan: Plan, stream: TextIO) -> None:
        self._plan = plan
        self._num_points = len(plan.points())
        super().__init__(stream, label_chars=14, bar_chars=32)
        self._tasks: dict[int, Any] = {}

    def show(self, point: Point, number: int, progress: Progress) -> None:
        """Draw the newest state of a point."""
        if number not in self._tasks:
            self._tasks[number] = None
            if self._bars is not None:
                self._tasks[number] = self._bars.add_task(point.label, total=1.0, detail="")
            else:
                text = f"  {point.label}: {number + 1} of {self._num_points}, at most {self._plan.duration_s:g} s"
                print(text, file=self._stream, flush=True)
        if self._bars is None:
            return
        plan = self._plan
        share = max(progress.ended / plan.max_requests(point), min(1.0, progress.elapsed_s / plan.duration_s))
        rejected = f", {progress.rejected} rejected" if progress.rejected else ""
        detail = f"{progress.ok} answered, {progress.in_flight} running{rejected}"
        self._bars.update(self._tasks[number], completed=min(share, 1.0), detail=detail)
