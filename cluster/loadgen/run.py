"""One run of a load: what bounds it, how far it is, and all that came of it."""

from __future__ import annotations

from dataclasses import dataclass

from baton.cluster.loadgen.client_share import ClientShare
from baton.cluster.loadgen.records import Record

__all__ = ["Limits", "Progress", "Run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds a run.

    Attributes:
        duration_s: no job begins later.
        drain_s: how long answers may take after that, all together.
        timeout_s: of one request, waiting out refusals included.
        max_in_flight: requests at once; in an open loop what comes due beyond is not sent.
        retries: how often a refusal (429) is waited out as its Retry-After says, and sent again.
    """

    duration_s: float
    drain_s: float
    timeout_s: float
    max_in_flight: int
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """So far."""

    elapsed_s: float
    ended: int
    ok: int
    in_flight: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Run:
    """All of one run; `duration_s` from the begin to the last end."""

    records: list[Record]
    duration_s: float
    ended_early: bool
    client: ClientShare
