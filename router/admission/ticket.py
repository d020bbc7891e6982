"""What admission knows of a request: what it asks for, its class and account, and where it stands. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from baton.router.admission.fair_queue import Waiting
from baton.router.admission.tenants import Tenant

__all__ = ["Ask", "PriorityClass", "State", "Ticket", "Work"]


class Work(Protocol):
    """A choice that runs, as far as admission looks at it; see `dispatch.LiveRequest`."""

    decode_instance: str
    emitted_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorityClass:
    """Requests that are served alike; lower priorities are more urgent."""

    name: str
    priority: int = 0
    weight: float = 1.0
    ttft_s: float | None = None
    max_queued_requests: int = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request at the door.

    Attributes:
        choices: prompt tokens and most output tokens of each.
        priority: among its tenant's own.
        ttft_s: what it asks for; None: what its class does.
        deadline_s: when it ends, answered or not; a moment.
        predict_s: from dispatch to the first token, as the cost model sees it; None where it does not know.
    """

    choices: tuple[tuple[int, int], ...]
    deadline_s: float
    class_name: str = ""
    tenant: str = ""
    priority: int = 0
    ttft_s: float | None = None
    predict_s: Callable[[], float | None] = lambda: None

    @property
    def num_tokens(self) -> int:
        """Prompt plus most output tokens of all choices."""
        return sum(prompt + output for prompt, output in self.choices)


class State(Enum):
    """Of a ticket."""

    QUEUED = "queued"
    GRANTED = "granted"
    ENDED = "ended"


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """An accepted request.

    Attributes:
        cost: tokens of work that it is expected to be.
        predicted_s, predicted_ttft_s: what was thought at the door of the workers alone, and with the queue before
            them; None and 0: nothing.
        is_beyond_share: it was let in although its tenant has his share, see `slot_shares.py`.
        has_begun: its first token has come.
        works: its choices, once they run.
    """

    ask: Ask
    rule: PriorityClass
    account: Tenant
    cost: float
    expected: int
    arrival_s: float
    predicted_s: float | None
    predicted_ttft_s: float = 0.0
    state: State = State.QUEUED
    granted_s: float = 0.0
    is_beyond_share: bool = False
    has_begun: bool = False
    waiting: Waiting[Ticket] | None = None
    works: Sequence[Work] = field(default_factory=tuple)

    @property
    def queue_s(self) -> float:
        """How long it waited, once granted."""
        return self.granted_s - self.arrival_s
