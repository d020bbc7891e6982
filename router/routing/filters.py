"""Which workers may serve a request at all, and why the others may not: pure.

    ready      connected     memory          | not failed     not ejected
    hard: who is dropped stays dropped       | soft: who is dropped comes back where nobody else is left

Hard filters come first, in any order; soft ones in the order of how bad it is to be taken all the same: rather a worker
that is slow than one that has just failed this request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.errors import BatonError, InvalidRequestError, UnavailableError
from baton.router.routing.facts import InstanceView, RequestFacts

__all__ = ["FILTERS", "Filter", "apply_filters", "refusal"]


@dataclass(frozen=True, slots=True)
class Filter:
    """One reason not to take a worker.

    Attributes:
        why: what speaks against a worker, in words; "" where nothing does.
        is_soft: the worker is taken where it drops all.
        concerns: whether it can drop anybody for this request at all.
    """

    name: str
    why: Callable[[InstanceView, RequestFacts], str]
    is_soft: bool = False
    concerns: Callable[[RequestFacts], bool] = lambda facts: True


def _ready(view: InstanceView, facts: RequestFacts) -> str:
    return "" if view.state == "ready" else view.state


def _connected(view: InstanceView, facts: RequestFacts) -> str:
    return "" if view.connected else "no stream to it"


def _memory(view: InstanceView, facts: RequestFacts) -> str:
    held = view.kv_blocks_total * view.block_size
    if not held or held > facts.prompt_tokens:
        return ""
    return f"its KV memory holds {held} tokens, the prompt has {facts.prompt_tokens}"


def _failed(view: InstanceView, facts: RequestFacts) -> str:
    return "has just failed this request" if view.instance_id in facts.avoid else ""


def _ejected(view: InstanceView, facts: RequestFacts) -> str:
    return "set aside, as it is slow" if view.instance_id in facts.ejected else ""


FILTERS = (
    Filter("ready", _ready),
    Filter("connected", _connected),
    Filter("memory", _memory),
    Filter("failed", _failed, is_soft=True, concerns=lambda facts: bool(facts.avoid)),
    Filter("ejected", _ejected, is_soft=True, concerns=lambda facts: bool(facts.ejected)),
)


def apply_filters(
    views: Sequence[InstanceView], facts: RequestFacts, filters: Sequence[Filter] = FILTERS
) -> tuple[list[InstanceView], dict[str, str]]:
    """Who is left, in the order given, and by which filter each other one was dropped ("memory: its KV memory ...")."""
    left, dropped = list(views), dict[str, str]()
    for each in filters:
        if not each.concerns(facts):
            continue
        reasons = {view.instance_id: why for view in left if (why := each.why(view, facts))}
        if reasons and not (each.is_soft and len(reasons) == len(left)):
            left = [view for view in left if view.instance_id not in reasons]
            dropped.update((instance_id, f"{each.name}: {why}") for instance_id, why in reasons.items())
    return left, dropped


def refusal(views: Sequence[InstanceView], facts: RequestFacts) -> BatonError:
    """What a client is told when no decode worker of `views` is left."""
    usable = [view for view in views if view.usable]
    if not usable:
        return UnavailableError(f"no decode worker is ready ({len(views)} known); retry shortly")
    largest = max(view.kv_blocks_total * view.block_size for view in usable)
    return InvalidRequestError(
        f"the prompt has {facts.prompt_tokens} tokens and the largest worker's KV memory holds {largest};"
        " shorten it, or raise kv.memory",
        param="prompt",
        code="context_length_exceeded",
    )
