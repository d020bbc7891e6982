"""To hand over or not: one option per prefill worker that may compute the prompt, and one for the decode worker. Pure.

every option --predict--> ttft + what it imposes on running requests --least--> the choice, with all options told

What is compared is a time: the request's own until its first token, and to it the delays of the answers that stream on
the decode worker while it computes the prompt there. Users judge both by what they are used to: a first token that
comes twice as late as on an idle machine, an answer that is written twice as slowly. So a delay of a stream is counted
as the share of its whole writing time that it is, of the time that this prompt would take by itself: with answers of
1,000 tokens a step that is held up is hardly felt, with answers of 10 it is. Where goals are of that kind (multiples
of the unloaded times, as in DistServe's and Mooncake's goodput), the least sum is the most requests that keep theirs.
It is never more than second for second, which is the least sum of everybody's latency, and the rule where nothing is
known of the answers' lengths.

A full prefill pool, a busy or a full decode worker need no rules: they show in what is predicted. Two are left:

- a handover has to be cheaper by a little, since it can fail and a local prefill cannot;
- a way of which nothing was heard for long is tried now and then, where it does not seem much dearer: else a prediction
  that was once too high would never be corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

from baton.router.routing.costs import Costs, Prediction
from baton.router.routing.facts import InstanceView, RequestFacts

__all__ = ["Cause", "HandoverChoice", "HandoverOption", "Mode", "choose_handover"]

Mode = Literal["auto", "always", "never"]
Cause = Literal["cheapest", "explored", "only", "mode", "prompt_logprobs"]

_NOTHING: Mapping[str | None, Prediction] = {}
_WORTH = 1.05
"""By so much a local prefill may be dearer and is taken nevertheless."""
_EXPLORED_SHARE = 0.125
"""Of the requests that meet a way with an old fit."""
_EXPLORED_COST = 1.5
"""Over the cheapest, at most."""
_STREAM_WEIGHT = 2.0
"""Of a share of a stream's writing time against the same share of a prompt's own time: an answer is slow sooner."""
_MOST_WEIGHT = 2.0


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
    """The option taken, all that there were, and why.

    Attributes:
        cause: why, for counting. "cheapest"; "explored": to hear of it again; "only": there was no other; "mode": as
            configured; "prompt_logprobs": only the decode worker can tell them.
    """

    chosen: HandoverOption
    options: tuple[HandoverOption, ...]
    cause: Cause = "cheapest"

    @property
    def reason(self) -> str:
        """All of it in words, put together when somebody asks: every request makes a choice, few are looked at."""
        return _words(self.chosen, self.options, self.cause)


def choose_handover(
    decode: InstanceView,
    prefills: Sequence[InstanceView],
    facts: RequestFacts,
    costs: Costs,
    mode: Mode = "auto",
    known: Mapping[str | None, Prediction] = _NOTHING,
) -> HandoverChoice:
    """The cheapest option for a request whose answer `decode` writes.

    Args:
        prefills: those that may compute the prompt, none that has just failed it.
        mode: "always": whenever there is a prefill worker; "never".
        known: what `costs` has predicted for this request already, by who reads the prompt; None: the decode worker.
    """
    views: list[InstanceView | None] = [None]
    if not facts.wants_prompt_logprobs and mode != "never":
        views += prefills
    predicted = [_predict(decode, view, facts, costs, known, prefills) for view in views]
    weight = _stream_weight(decode, [prediction for _, _, prediction in predicted])
    options = tuple(
        HandoverOption(
            prefill_id=prefill_id,
            new_tokens=new_tokens,
            cost_s=prediction.ttft_s + weight * prediction.imposed_s,
            prediction=prediction,
        )
        for prefill_id, new_tokens, prediction in predicted
    )
    chosen, cause = _take(options, facts, mode)
    return HandoverChoice(chosen=chosen, options=options, cause=cause)


def _take(options: Sequence[HandoverOption], facts: RequestFacts, mode: Mode) -> tuple[HandoverOption, Cause]:
    local, remote = options[0], list(options[1:])
    if facts.wants_prompt_logprobs:
        return local, "prompt_logprobs"
    if mode == "never":
        return local, "mode"
    if not remote:
        return local, "only"
    handover = min(remote, key=_order)
    if mode == "always":
        return handover, "mode"
    chosen, other = (handover, local) if handover.cost_s * _WORTH < local.cost_s else (local, handover)
    is_affordable = other.cost_s <= chosen.cost_s * _EXPLORED_COST
    if other.prediction.is_old and is_affordable and _draw(facts.request_id) < _EXPLORED_SHARE:
        return other, "explored"
    return chosen, "cheapest"


def _draw(request_id: str) -> float:
    """In [0, 1), the same whenever it is asked for; 1 without an id."""
    return crc32(request_id.encode()) / 2**32 if request_id else 1.0


def _order(option: HandoverOption) -> tuple[float, str]:
    return option.cost_s, option.prefill_id or ""


def _predict(
    decode: InstanceView,
    prefill: InstanceView | None,
    facts: RequestFacts,
    costs: Costs,
    known: Mapping[str | None, Prediction],
    beside: Sequence[InstanceView],
) -> tuple[str | None, int, Prediction]:
    reader, prefill_id = prefill or decode, prefill.instance_id if prefill else None
    cached = max(min(facts.prefix_blocks.get(reader.instance_id, 0) * reader.block_size, facts.prompt_tokens - 1), 0)
    new_tokens = facts.prompt_tokens - cached
    prediction = known.get(prefill_id)
    if prediction is None:
        prediction = costs.predict(decode, prefill, new_tokens=new_tokens, cached_tokens=cached, beside=beside)
    return prefill_id, new_tokens, prediction


def _stream_weight(decode: InstanceView, predictions: Sequence[Prediction]) -> float:
    """Seconds of this request that a second of a running answer's delay is worth."""
    if not decode.running_requests or not decode.max_remaining_tokens:
        return 1.0
    # On average half of an answer is still to be written.
    answer_tokens = 2 * decode.max_remaining_tokens / decode.running_requests
    writing_s = answer_tokens * min(prediction.tpot_s for prediction in predictions)
    by_itself_s = min(_by_itself_s(prediction) for prediction in predictions)
    return min(_STREAM_WEIGHT * by_itself_s / writing_s, _MOST_WEIGHT) if writing_s > 0 else 1.0


def _by_itself_s(prediction: Prediction) -> float:
    waits_s = prediction.parts.get("queue", 0.0) + prediction.parts.get("admission", 0.0)
    return max(prediction.ttft_s - waits_s, 0.0)


def _words(chosen: HandoverOption, options: Sequence[HandoverOption], cause: Cause) -> str:
    told = ", ".join(
        f"{option.prefill_id or 'the decode worker'} {option.cost_s * 1e3:.1f} ms"
        f" (first token {option.prediction.ttft_s * 1e3:.1f} ms)"
        for option in options
    )
    why = {
        "cheapest": "the least",
        "explored": "to hear of it again",
        "only": "there is no other",
        "mode": "as routing.disaggregate says",
        "prompt_logprobs": "prompt log-probabilities are asked for",
    }[cause]
    return f"prefill by {chosen.prefill_id or 'the decode worker'}, {why}: {told}"
