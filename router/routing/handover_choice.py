"""To hand over or not: one option per prefill worker that may compute the prompt, and one for the decode worker. Pure.

every option --predict--> ttft + what it imposes on running requests --least--> the choice, with all options told
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from baton.router.routing.costs import Costs, Prediction
from baton.router.routing.facts import InstanceView, RequestFacts

__all__ = ["HandoverChoice", "HandoverOption", "Mode", "choose_handover"]

Mode = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverOption:
    """One way to have the prompt computed.

    Attributes:
        prefill_id: None: by the decode worker.
        new_tokens: what it has to compute.
        cost_s: what is compared.
    """

    prefill_id: str | None
    new_tokens: int
    cost_s: float
    prediction: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverChoice:
    """The option taken, all that there were, and why, in words."""

    chosen: HandoverOption
    options: tuple[HandoverOption, ...]
    reason: str


def choose_handover(
    decode: InstanceView, prefills: Sequence[InstanceView], facts: RequestFacts, costs: Costs, mode: Mode = "auto"
) -> HandoverChoice:
    """The cheapest option for a request whose answer `decode` writes.

    Args:
        prefills: those that may compute the prompt, none that has just failed it.
    """
    options = [_option(decode, None, facts, costs)]
    if not facts.wants_prompt_logprobs and mode != "never":
        options += [_option(decode, prefill, facts, costs) for prefill in prefills]
    remote = [option for option in options if option.prefill_id is not None]
    chosen = min(remote if mode == "always" and remote else options, key=lambda option: option.cost_s)
    return HandoverChoice(chosen=chosen, options=tuple(options), reason=f"{chosen.cost_s * 1e3:.1f} ms")


def _option(decode: InstanceView, prefill: InstanceView | None, facts: RequestFacts, costs: Costs) -> HandoverOption:
    reader = prefill or decode
    cached = max(min(facts.prefix_blocks.get(reader.instance_id, 0) * reader.block_size, facts.prompt_tokens - 1), 0)
    new_tokens = facts.prompt_tokens - cached
    prediction = costs.predict(decode, prefill, new_tokens=new_tokens, cached_tokens=cached)
    return HandoverOption(
        prefill_id=prefill.instance_id if prefill else None,
        new_tokens=new_tokens,
        cost_s=prediction.ttft_s + prediction.imposed_s,
        prediction=prediction,
    )
