"""Whether a request whose attempt broke is tried again, and when. Pure: time and chance are arguments.

An attempt that brought tokens before its worker was lost says nothing against the request: it goes on elsewhere. One
that brought none may have been what killed the worker; after two such deaths the request is refused for good, so that
it does not go through the fleet. Pauses double, with full jitter (Brooker, "Exponential Backoff And Jitter", 2015), so
that requests of one dead worker do not come back as one wave.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import BatonError, QuarantinedError, UnavailableError

__all__ = ["MAX_ATTEMPTS", "MAX_SUSPICIONS", "Retries", "pause_s"]

MAX_ATTEMPTS = 20
MAX_SUSPICIONS = 2
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


def pause_s(failures: int, chance: float) -> float:
    """How long to wait before the next attempt after `failures` in a row; `chance` is uniform in [0, 1)."""
    assert failures >= 1, failures
    return chance * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures - 1, 16))


@dataclass(slots=True)
class Retries:
    """What has happened to one request.

    Attributes:
        failures: attempts that broke since the last token.
        attempts: attempts that broke, in all.
        suspicions: workers that died before the request brought a token there.
    """

    failures: int = 0
    attempts: int = 0
    suspicions: int = 0

    def broke(self, error: BatonError, *, has_died: bool, has_progressed: bool, chance: float) -> float:
        """Notes a broken attempt; returns the pause before the next one, in seconds.

        Args:
            has_died: the worker was lost; it did not just give the request up.
            has_progressed: the attempt brought at least one token.
            chance: uniform in [0, 1).

        Raises:
            QuarantinedError: it may have killed too many workers.
            UnavailableError: the budget of attempts is spent.
        """
        self.attempts += 1
        self.failures = 1 if has_progressed else self.failures + 1
        self.suspicions = 0 if has_progressed else self.suspicions + has_died
        if self.suspicions >= MAX_SUSPICIONS:
            raise QuarantinedError(
                f"{self.suspicions} workers were lost while they began this request, so it is not tried again;"
                f" the last one: {error.message}"
            ) from error
        if self.attempts >= MAX_ATTEMPTS:
            raise UnavailableError(
                f"the request was interrupted {self.attempts} times; send it again: {error.message}"
            ) from error
        if has_progressed and self.failures == 1:
            return 0.0
        return pause_s(self.failures, chance)
