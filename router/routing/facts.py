"""What a routing decision is made from: frozen values. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

__all__ = ["InstanceView", "RequestFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """What the router knows of one worker at one moment.

    Attributes:
        connected: the token stream stands (decode), or the address is known (prefill).
        running_requests, waiting_requests, kv_blocks_*, pending_prefill_tokens: as last reported.
        max_running_requests: requests that its batch holds; 0: not reported.
        context_tokens, max_remaining_tokens: what its requests have computed, and may still write.
        preemptions: how often it has put a running request back because memory ran out, so far.
        slowness: of its steps, over its own best; 0: not known.
        host_id: equal for workers of one host; "": not known.
        lends_cores: computes on cores, which others of its host borrow while it is idle.
        own_requests, own_prefill_tokens: what this router has sent there and not seen end, and other routers just now.
        own_max_tokens: prompt and maximal output tokens of these.
    """

    instance_id: str
    role: str
    state: str = "ready"
    connected: bool = True
    block_size: int = 16
    running_requests: int = 0
    waiting_requests: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0
    pending_prefill_tokens: int = 0
    max_running_requests: int = 0
    context_tokens: int = 0
    max_remaining_tokens: int = 0
    preemptions: int = 0
    slowness: float = 0.0
    host_id: str = ""
    lends_cores: bool = False
    own_requests: int = 0
    own_prefill_tokens: int = 0
    own_max_tokens: int = 0

    @property
    def usable(self) -> bool:
        """Ready for new work."""
        return self.state == "ready" and self.connected

    @property
    def requests(self) -> int:
        """Requests there, running and waiting."""
        return max(self.running_requests + self.waiting_requests, self.own_requests)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens it has still to compute."""
        return max(self.pending_prefill_tokens, self.own_prefill_tokens)

    @property
    def kv_available_share(self) -> float:
        """Share of KV blocks that are free or could be, in [0, 1]; 1 where nothing is reported yet."""
        if not self.kv_blocks_total:
            return 1.0
        return min((self.kv_blocks_free + self.kv_blocks_cached) / self.kv_blocks_total, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What matters about a request here.

    Attributes:
        max_tokens: output tokens at most.
        prefix_blocks: instance id -> leading prompt blocks it probably holds, prefill workers included.
        session_instances: where the session's earlier requests were served, by role ("prefill", "decode").
        recent_tokens: instance id -> prompt tokens that it was given lately to compute, see `recent_work.py`.
        turn: the number of this choice.
        avoid: instances that have just failed this request.
        ejected: instances set aside for all requests, see `ejection.py`; taken where nothing else is left.
    """

    prompt_tokens: int
    request_id: str = ""
    max_tokens: int = 0
    wants_prompt_logprobs: bool = False
    prefix_blocks: Mapping[str, int] = field(default_factory=dict)
    session_instances: Mapping[str, str] = field(default_factory=dict)
    recent_tokens: Mapping[str, float] = field(default_factory=dict)
    turn: int = 0
    avoid: AbstractSet[str] = frozenset()
    ejected: AbstractSet[str] = frozenset()
