"""From what was seen while faults came to what they cost, and which promises broke. Pure; times in seconds since the
load began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.cluster.chaos.members import Member

__all__ = ["Change", "Facts", "Outcome", "Report", "StrikeRecord", "percentile", "ready_again_s"]

_NUM_LONGEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request, as its client saw it.

    Attributes:
        number: which prompt.
        tokens: that came.
        longest_wait_s: for the first token or the next one, over all tries.
        waited_at_s: when that wait began.
        is_wrong: it ended with other tokens, or another `usage`, than without faults.
        error: why it failed; empty when it ended well.
        reconnects: connections that broke, after which it was sent again with the same idempotency key.
        refusals: answers "not now" (429, 503) before a token, after which it was sent again.
    """

    number: int
    began_s: float
    ended_s: float
    tokens: int
    longest_wait_s: float
    waited_at_s: float = 0.0
    is_wrong: bool = False
    error: str = ""
    reconnects: int = 0
    refusals: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StrikeRecord:
    """One fault that was put in.

    Attributes:
        instance_id: who was hit; empty where it was several, or nobody.
        incarnation: of the one that was hit.
        lifted_s: when the fault was taken back; None for what cannot be.
        is_kill: the instance must come back as another incarnation.
        note: what was done, or why nothing was.
        was_done: false where there was nobody to hit.
    """

    scenario: str
    began_s: float
    instance_id: str = ""
    incarnation: str = ""
    lifted_s: float | None = None
    is_kill: bool = False
    note: str = ""
    was_done: bool = True


@dataclass(frozen=True, slots=True)
class Change:
    """An instance was listed in another state, or as another incarnation, than before; state "" is not at all."""

    at_s: float
    instance_id: str
    incarnation: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that was seen.

    Attributes:
        undisturbed_wait_s: the longest wait of a stream before the first fault.
        resumes: attempts that broke and were dispatched again, as the routers count them.
        members: at the end.
        owned: KV blocks that some request still owns at the end, by worker.
        settle_s: from the end of the load until no block was owned; None: never, within `settle_limit_s`.
        has_spare: whether somebody could go on wherever one was hit, so that nobody needs to be refused.
        left: clients that vanished on purpose.
    """

    title: str
    duration_s: float
    clients: int
    outcomes: Sequence[Outcome]
    strikes: Sequence[StrikeRecord]
    changes: Sequence[Change]
    undisturbed_wait_s: float
    resumes: int
    members: Sequence[Member]
    owned: Mapping[str, int]
    settle_s: float | None
    settle_limit_s: float
    has_spare: bool = True
    left: int = 0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed; 0 of none."""
    assert 0.0 <= share <= 1.0, share
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ready_again_s(strike: StrikeRecord, changes: Sequence[Change]) -> float | None:
    """From a kill, or from the end of another fault, until the instance that was hit was ready; None: not seen."""
    since_s = strike.began_s if strike.lifted_s is None else strike.lifted_s
    state = "ready"
    for change in changes:
        if change.instance_id != strike.instance_id:
            continue
        if change.at_s < since_s:
            state = change.state
            continue
        if strike.is_kill and change.incarnation == strike.incarnation:
            continue
        if state == "ready" and not strike.is_kill:
            return 0.0
        if change.state == "ready":
            return change.at_s - since_s
    return 0.0 if state == "ready" and not strike.is_kill else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What faults cost. `broken`: the promises that did not hold, in words; empty is good.

    Waits are the longest one of each stream, in seconds; `longest` are the requests that had the longest ones.
    """

    title: str
    duration_s: float
    clients: int
    requests: int
    failed: int
    wrong: int
    refused: int
    reconnected: int
    resumed: int
    left: int
    wait_p50_s: float
    wait_p99_s: float
    wait_max_s: float
    undisturbed_wait_s: float
    ready_again_max_s: float | None
    owned: Mapping[str, int]
    settle_s: float | None
    errors: Mapping[str, int]
    longest: Sequence[Outcome]
    strikes: Sequence[tuple[StrikeRecord, float | None]]
    broken: Sequence[str] = field(default=())

    @classmethod
    def of(cls, facts: Facts) -> Report:
        """The figures of `facts`, and what they break."""
        waits_s = [outcome.longest_wait_s for outcome in facts.outcomes]
        strikes = [(strike, ready_again_s(strike, facts.changes)) for strike in facts.strikes]
        ready_s = [again_s for strike, again_s in strikes if strike.instance_id and again_s is not None]
        return cls(
            title=facts.title,
            duration_s=facts.duration_s,
            clients=facts.clients,
            requests=len(facts.outcomes),
            failed=sum(bool(outcome.error) for outcome in facts.outcomes),
            wrong=sum(outcome.is_wrong for outcome in facts.outcomes),
            refused=sum(outcome.refusals > 0 for outcome in facts.outcomes),
            reconnected=sum(outcome.reconnects > 0 for outcome in facts.outcomes),
            resumed=facts.resumes,
            left=facts.left,
            wait_p50_s=percentile(waits_s, 0.5),
            wait_p99_s=percentile(waits_s, 0.99),
            wait_max_s=max(waits_s, default=0.0),
            undisturbed_wait_s=facts.undisturbed_wait_s,
            ready_again_max_s=max(ready_s, default=None),
            owned=dict(facts.owned),
            settle_s=facts.settle_s,
            errors=Counter(outcome.error for outcome in facts.outcomes if outcome.error),
            longest=sorted(facts.outcomes, key=lambda outcome: -outcome.longest_wait_s)[:_NUM_LONGEST],
            strikes=strikes,
            broken=_broken(facts),
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        waits_s = {"p50": self.wait_p50_s, "p99": self.wait_p99_s, "max": self.wait_max_s}
        return {
            "title": self.title,
            "duration_s": self.duration_s,
            "clients": self.clients,
            "requests": self.requests,
            "failed": self.failed,
            "wrong": self.wrong,
            "refused": self.refused,
            "reconnected": self.reconnected,
            "resumed": self.resumed,
            "left": self.left,
            "longest_wait_s": {**waits_s, "undisturbed": self.undisturbed_wait_s},
            "ready_again_max_s": self.ready_again_max_s,
            "owned_blocks": dict(self.owned),
            "settle_s": self.settle_s,
            "errors": dict(self.errors),
            "longest": [
                {"wait_s": each.longest_wait_s, "at_s": each.waited_at_s, "prompt": each.number}
                for each in self.longest
            ],
            "strikes": [_strike_dict(strike, again_s) for strike, again_s in self.strikes],
            "broken": list(self.broken),
        }


def _strike_dict(strike: StrikeRecord, again_s: float | None) -> dict[str, Any]:
    return {
        "scenario": strike.scenario,
        "at_s": strike.began_s,
        "instance": strike.instance_id or None,
        "was_done": strike.was_done,
        "note": strike.note,
        "lifted_s": strike.lifted_s,
        "ready_again_s": again_s if strike.instance_id else None,
    }


def _broken(facts: Facts) -> tuple[str, ...]:
    outcomes = facts.outcomes
    broken = []
    if failed := sum(bool(outcome.error) for outcome in outcomes):
        broken.append(f"{failed} of {len(outcomes)} requests failed")
    if wrong := sum(outcome.is_wrong for outcome in outcomes):
        broken.append(f"{wrong} of {len(outcomes)} answers have wrong tokens or a wrong usage")
    if facts.has_spare and (refused := sum(outcome.refusals > 0 for outcome in outcomes)):
        broken.append(f"{refused} of {len(outcomes)} requests were refused for a while, with others there to serve")
    if facts.settle_s is None:
        owned = ", ".join(f"{count} on {name}" for name, count in facts.owned.items() if count) or "workers silent"
        broken.append(f"blocks still owned {facts.settle_limit_s:.0f} s after the last request: {owned}")
    late = [f"{member.instance_id} ({member.state})" for member in facts.members if member.state != "ready"]
    if late:
        broken.append(f"not ready again: {', '.join(late)}")
    if not outcomes:
        broken.append("no request came to its end")
    if not any(strike.was_done for strike in facts.strikes):
        broken.append("no fault could be put in")
    return tuple(broken)
