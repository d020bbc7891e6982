"""What became of each request: the generator's raw findings. Pure.

ok           answered to its end
rejected     refused early, with 429 or RESOURCE_EXHAUSTED
failed       any other error, a broken stream, or no end within the request's timeout
unfinished   still running when the run ended
not sent     too many were running already; never sent
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

__all__ = ["Outcome", "Record"]


class Outcome(StrEnum):
    """See the module."""

    OK = "ok"
    REJECTED = "rejected"
    FAILED = "failed"
    UNFINISHED = "unfinished"
    NOT_SENT = "not sent"


@dataclass(slots=True, kw_only=True)
class Record:
    """One request. Times are seconds since the begin of the run.

    Attributes:
        scheduled_s: when it was due: by its arrival time in an open loop, after its client's last answer and thinking
            in a conversation, when its client was free in a closed loop. Latencies count from here, so that neither a
            slow server nor a slow generator can hide time by sending late.
        sent_s: when the generator came to send it.
        chunk_at_s: of each chunk that carried tokens.
        asked_tokens: of the answer.
        rejections: answers of 429 that were waited out before this outcome, and this one if it is the outcome.
        was_cut: the prompt was shortened to fit into the model's window.
    """

    index: int
    turn: int
    class_name: str
    scheduled_s: float
    sent_s: float
    end_s: float
    outcome: Outcome
    asked_tokens: int
    chunk_at_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0
    rejections: int = 0
    was_cut: bool = False
    http_status: int = 0
    detail: str = ""

    @property
    def lag_s(self) -> float:
        """How late the generator was."""
        return max(0.0, self.sent_s - self.scheduled_s)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None where none came."""
        return self.chunk_at_s[0] - self.scheduled_s if self.chunk_at_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for answers of fewer than two."""
        if self.output_tokens < 2 or not self.chunk_at_s:
            return None
        return (self.chunk_at_s[-1] - self.chunk_at_s[0]) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """From the scheduled time to the end."""
        return self.end_s - self.scheduled_s

    def gaps_s(self) -> list[float]:
        """Between chunks."""
        return [after - before for before, after in pairwise(self.chunk_at_s)]

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {name: getattr(self, name) for name in self.__slots__} | {"outcome": str(self.outcome)}
