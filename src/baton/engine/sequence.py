"""One request inside an engine: its tokens, its blocks and how far its KV is computed. Pure, torch-free.

                add                admit (blocks taken)               last token
    (new) ----------> WAITING ------------------------> RUNNING ---------------> FINISHED
                        ^  |                             ^   |  \\
                        |  | admit, remote prefill       |   |   `-- prefill only: HELD (blocks kept while pages
                        |  v                             |   |       are shipped), released by its owner
                        | RESERVED --pages attached------+   |
                        |  | `--handover failed, settled-----+  (computes its prompt here, blocks kept)
                        +--------------preempted-------------+  (blocks given back, tokens kept)

Counters, everything else derived: `num_computed` (tokens whose KV is in the blocks) chases `num_scheduled` (those and
the ones of steps in flight), which chases `len(token_ids) + num_future`. A future token is one that a step in flight
samples: it exists on the device, and the step behind may compute its KV before the host has read what it is. While
steps of a sequence are in flight it keeps its blocks: it is not preempted, and once released it gives them back after
the last of these steps.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from baton.engine.prefix_cache import HashChain
from baton.engine.request import EngineRequest, FinishReason, TokenLogprobs

__all__ = ["Key", "Sequence", "SequenceState"]

Key = tuple[str, int]
"""(request id, attempt)."""


class SequenceState(enum.Enum):
    """See the chart above."""

    WAITING = "waiting"
    RESERVED = "reserved"
    RUNNING = "running"
    HELD = "held"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request; owned by the scheduler, changed only by it.

    Attributes:
        token_ids: prompt then output.
        block_ids: owned references, in token order.
        num_computed: tokens whose KV is valid in `block_ids`.
        num_scheduled: `num_computed` and the tokens of steps in flight.
        num_in_flight: steps in flight that compute tokens of this sequence.
        num_future: tokens behind `token_ids` that steps in flight sample and later steps may build on.
        num_named: leading blocks already offered to the prefix cache.
        cached_tokens: prompt tokens found in the prefix cache at first admission.
        remote_prefill: pages come from a prefill worker.
        prefill_only: stop after the first token and keep the blocks.
        tag: opaque here, travels with every step; 0 for none.
        arrival: admission order, smaller is earlier.
        key: (request id, attempt).
        num_prompt: prompt tokens.
    """

    request: EngineRequest
    chain: HashChain
    arrival: int
    remote_prefill: bool = False
    prefill_only: bool = False
    tag: int = 0
    state: SequenceState = SequenceState.WAITING
    token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_scheduled: int = 0
    num_in_flight: int = 0
    num_future: int = 0
    num_named: int = 0
    cached_tokens: int = 0
    num_preemptions: int = 0
    admitted_before: bool = False
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    key: Key = field(init=False)
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.request.request_id, self.request.attempt
        self.num_prompt = len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_unscheduled(self) -> int:
        """Tokens that no step has been planned for yet; future ones are among them."""
        return len(self.token_ids) + self.num_future - self.num_scheduled

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities are still to be computed."""
        return self.request.sampling.prompt_logprobs is not None and self.num_output == 0
