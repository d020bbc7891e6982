"""Whether a request whose attempt broke is tried again, and when. Pure: time and chance are arguments.

A request has a budget of attempts, which tokens fill up again: one that makes progress goes on however often it is
interrupted, one that makes none gives up soon. Pauses double, with full jitter (Brooker, "Exponential Backoff And
Jitter", 2015), so that requests of one dead worker do not come back as one wave; the first break of an attempt that
brought tokens is none of the request's fault, and costs no pause. A request is in one attempt at a time, so retries
never multiply the load. Whether a request itself kills workers is another question, see `quarantine.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import BatonError, UnavailableError

__all__ = ["MAX_ATTEMPTS", "Retries", "pause_s"]

MAX_ATTEMPTS = 20
_TOKENS_PER_ATTEMPT = 8
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
        budget: attempts that may still break.
    """

    failures: int = 0
    attempts: int = 0
    budget: float = MAX_ATTEMPTS

    def broke(self, error: BatonError, *, gained_tokens: int, chance: float) -> float:
        """Notes a broken attempt; returns the pause before the next one, in seconds.

        Args:
            gained_tokens: what the attempt brought.
            chance: uniform in [0, 1).

        Raises:
            UnavailableError: the budget of attempts is spent.
        """
        self.attempts += 1
        self.budget = min(self.budget + gained_tokens / _TOKENS_PER_ATTEMPT, MAX_ATTEMPTS) - 1
        if self.budget < 1:
            raise UnavailableError(
                f"the request was interrupted {self.attempts} times; send it again: {error.message}"
            ) from error
        self.failures = 1 if gained_tokens else self.failures + 1
        return 0.0 if gained_tokens else pause_s(self.failures, chance)
