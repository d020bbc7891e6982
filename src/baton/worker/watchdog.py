"""Tells a stuck engine from a slow one, and ends the process of a stuck one, so that it is started anew.

A step is stuck when it has run for longer than `floor_s` and than `factor` times the longest of the last steps. The
event loop looks, not the thread that computes. A process whose event loop is stuck too says nothing any more, which
others notice (`router.silence_s`, the registry's lease).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque

from baton.engine.loop import EngineLoop

__all__ = ["EXIT_STUCK", "StepLimit", "watch_steps"]

EXIT_STUCK = 86
_FACTOR = 20.0
_REMEMBERED_STEPS = 256
_PERIOD_S = 0.25
_log = logging.getLogger(__name__)


class StepLimit:
    """How long a step may take, from how long steps take. Pure.

    Args:
        floor_s: no step is stuck before.
        factor: times the longest of the last steps.
    """

    def __init__(self, floor_s: float, factor: float = _FACTOR) -> None:
        assert floor_s > 0, floor_s
        assert factor >= 1, factor
        self._floor_s = floor_s
        self._factor = factor
        self._steps_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)

    def observe(self, step_s: float) -> None:
        """A step took so long."""
        self._steps_s.append(step_s)

    @property
    def limit_s(self) -> float:
        """How long the next one may take."""
        return max(self._floor_s, self._factor * max(self._steps_s, default=0.0))


async def watch_steps(loop: EngineLoop, *, instance_id: str, floor_s: float) -> None:
    """Looks at `loop` until cancelled; ends the process with `EXIT_STUCK` when a step is stuck."""
    limit = StepLimit(floor_s)
    seen = 0
    while True:
        await asyncio.sleep(_PERIOD_S)
        number, running_s, last_s = loop.progress()
        if number != seen and last_s is not None:
            seen = number
            limit.observe(last_s)
        if running_s is not None and running_s > limit.limit_s:
            _log.critical(
                "%s is stuck: step %d has run for %.1f s, more than %.1f s; the process ends and is started anew",
                instance_id,
                number,
                running_s,
                limit.limit_s,
            )
            logging.shutdown()
            os._exit(EXIT_STUCK)
