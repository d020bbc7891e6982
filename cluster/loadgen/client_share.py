"""How busy the generator itself was: a client that is short of CPU measures itself."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

__all__ = ["ClientShare", "ClientWatch"]


@dataclass(frozen=True, slots=True)
class ClientShare:
    """CPU seconds of this process in `wall_s`; it runs on one core, so 1.0 is all that it can have."""

    cpu_s: float
    wall_s: float

    @property
    def of_one_core(self) -> float:
        """1.0 is a generator at its limit."""
        return self.cpu_s / max(self.wall_s, 1e-9)


class ClientWatch:
    """Counts from its making on."""

    def __init__(self) -> None:
        self._begin = _cpu_s(), time.monotonic()

    def share(self) -> ClientShare:
        """So far."""
        cpu_s, wall_s = self._begin
        return ClientShare(_cpu_s() - cpu_s, time.monotonic() - wall_s)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
