"""What a pipeline costs: sums that each rank keeps of its own steps, and the bubble that follows from them.

The bubble of a stage is the time in which the instance has steps under way and the stage computes none of them. Only
the driver knows when steps are under way (`busy_s`), only a stage knows when it computes (`work_s`): every rank keeps
its sums, and whoever has both subtracts. Sums only grow, so rates over any window follow from two readings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["PipelineFigures"]


@dataclass(slots=True)
class PipelineFigures:
    """One rank's steps, in sums since the start. Written by the thread that computes; others may read.

    Attributes:
        steps: finished.
        step_s: from taking up a step to the end of this rank's part.
        bubble_s: of it, waiting for the stage before.
        busy_s: with at least one step under way, in any stage; the driver's alone, 0 elsewhere.
    """

    steps: int = 0
    step_s: float = 0.0
    bubble_s: float = 0.0
    busy_s: float = 0.0

    @property
    def work_s(self) -> float:
        """Time in which this rank computed its part of steps."""
        return self.step_s - self.bubble_s

    @property
    def bubble_share(self) -> float:
        """Part of the own steps' time that was bubble, in [0, 1]: on the driver, which plans between its steps."""
        return self.bubble_s / self.step_s if self.step_s > 0 else 0.0

    def bubble_s_of(self, busy_s: float) -> float:
        """Of `busy_s`, the driver's, the seconds in which this rank computed nothing."""
        return max(0.0, busy_s - self.work_s)

    def bubble_share_of(self, busy_s: float) -> float:
        """`bubble_s_of` as a part of `busy_s`, in [0, 1]."""
        return min(1.0, self.bubble_s_of(busy_s) / busy_s) if busy_s > 0 else 0.0

    def since(self, before: PipelineFigures) -> PipelineFigures:
        """What has been added since `before`."""
        return PipelineFigures(
            steps=self.steps - before.steps,
            step_s=self.step_s - before.step_s,
            bubble_s=self.bubble_s - before.bubble_s,
            busy_s=self.busy_s - before.busy_s,
        )

    def copy(self) -> PipelineFigures:
        """The sums as they are now."""
        return replace(self)
