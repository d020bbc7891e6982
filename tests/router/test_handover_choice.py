"""To hand over or not: modes, causes, and what is tried now and then."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from baton.router.routing.costs import Prediction
from baton.router.routing.facts import InstanceView, RequestFacts
from baton.router.routing.handover_choice import HandoverChoice, Mode, choose_handover

DECODE = InstanceView(instance_id="decode-0", role="decode", running_requests=4, max_remaining_tokens=400)
PREFILLS = [InstanceView(instance_id=f"prefill-{n}", role="prefill") for n in range(2)]


class _Costs:
    """Says what it was told."""

    def __init__(self, local_s: float, handover_s: float, *, imposed_s: float = 0.0, is_old: bool = False) -> None:
        self.local = Prediction(ttft_s=local_s, tpot_s=0.01, imposed_s=imposed_s, is_old=is_old)
        self.handover = Prediction(ttft_s=handover_s, tpot_s=0.01, is_old=is_old)

    def predict(
        self, decode: InstanceView, prefill: InstanceView | None, *, beside: Sequence[InstanceView] = (), **prompt: int
    ) -> Prediction:
        return self.local if prefill is None else self.handover


def _choose(costs: _Costs, mode: Mode = "auto", *, prefills: int = 2, **facts: object) -> HandoverChoice:
    return choose_handover(DECODE, PREFILLS[:prefills], RequestFacts(prompt_tokens=100, **facts), costs, mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("costs", "mode", "prefills", "chosen", "cause"),
    [
        (_Costs(0.1, 0.2), "auto", 2, None, "cheapest"),
        (_Costs(0.2, 0.1), "auto", 2, "prefill-0", "cheapest"),
        (_Costs(0.102, 0.1), "auto", 2, None, "cheapest"),
        (_Costs(0.2, 0.1), "auto", 0, None, "only"),
        (_Costs(0.1, 0.2), "always", 2, "prefill-0", "mode"),
        (_Costs(0.1, 0.2), "always", 0, None, "only"),
        (_Costs(0.2, 0.1), "never", 2, None, "mode"),
    ],
)
def test_the_choice_and_its_cause(costs: _Costs, mode: Mode, prefills: int, chosen: str | None, cause: str) -> None:
    choice = _choose(costs, mode, prefills=prefills)
    assert (choice.chosen.prefill_id, choice.cause) == (chosen, cause)
    assert len(choice.options) == 1 + (prefills if mode != "never" else 0)
    assert "first token" in choice.reason


def test_only_the_decode_worker_can_tell_prompt_logprobs() -> None:
    for mode in ("auto", "always"):
        choice = _choose(_Costs(0.2, 0.1), mode, wants_prompt_logprobs=True)  # type: ignore[arg-type]
        assert (choice.chosen.prefill_id, choice.cause) == (None, "prompt_logprobs")


def test_delays_of_streams_count_the_less_the_longer_they_are() -> None:
    costs = _Costs(0.1, 0.2, imposed_s=0.3)
    facts = RequestFacts(prompt_tokens=100)
    short = InstanceView(instance_id="decode-0", role="decode", running_requests=4, max_remaining_tokens=40)
    long = InstanceView(instance_id="decode-0", role="decode", running_requests=4, max_remaining_tokens=40_000)
    assert choose_handover(short, PREFILLS, facts, costs).chosen.prefill_id == "prefill-0"
    assert choose_handover(long, PREFILLS, facts, costs).chosen.prefill_id is None


def test_a_way_with_an_old_fit_is_tried_at_a_bounded_rate_and_not_at_any_price() -> None:
    def explored(costs: _Costs) -> int:
        return sum(_choose(costs, request_id=f"r{n}").cause == "explored" for n in range(1000))

    assert 80 < explored(_Costs(0.1, 0.12, is_old=True)) < 170
    assert explored(_Costs(0.1, 0.2, is_old=True)) == 0
    assert explored(_Costs(0.1, 0.12)) == 0
    first, again = (_choose(_Costs(0.1, 0.12, is_old=True), request_id="r9") for _ in range(2))
    assert first == again


def test_a_tie_goes_to_the_first_prefill_worker_by_name() -> None:
    costs = _Costs(0.2, 0.1)
    facts = RequestFacts(prompt_tokens=100)
    assert choose_handover(DECODE, PREFILLS[::-1], facts, costs).chosen.prefill_id == "prefill-0"
