"""Choosing by learned costs in virtual time: near the better of always and never, and better than both in between."""

from __future__ import annotations

import pytest
from tests.router.virtual_pair import Law, VirtualPair, goodput, load

from baton.router.costs.model import CostModel
from baton.router.routing.handover_choice import Mode

SHORT, LONG = (48, 24), (1024, 24)
MODES: tuple[Mode, ...] = ("always", "never", "auto")


def _goodputs(law: Law, rate_per_s: float, lengths: list[tuple[int, int]]) -> dict[str, float]:
    found = {}
    for mode in MODES:
        # As many requests of each kind as can tell a share of 3 %.
        requests = load(rate_per_s, lengths, seconds=max(4.0, 60 / rate_per_s))
        VirtualPair(law, mode=mode).run(requests)
        found[mode] = goodput(requests, law)
    return found


@pytest.mark.parametrize(
    ("lengths", "rates"),
    [([SHORT], (20, 60)), ([(256, 24)], (6, 20)), ([LONG], (2, 6)), ([SHORT] * 9 + [LONG], (10,))],
    ids=["short", "mid", "long", "mixed"],
)
@pytest.mark.parametrize("law", [Law(), Law(step=8e-3, token=3e-4, row=3e-4)], ids=["fast", "slow"])
def test_auto_is_near_the_better_of_the_two(law: Law, lengths: list[tuple[int, int]], rates: tuple[float, ...]) -> None:
    for rate in rates:
        found = _goodputs(law, rate * Law().token / law.token, lengths)
        assert found["auto"] >= 0.97 * max(found["always"], found["never"]), (rate, found)


def test_auto_is_better_than_both_where_prompts_are_mixed() -> None:
    found = _goodputs(Law(), 35, [SHORT] * 9 + [LONG])
    assert found["auto"] >= 1.2 * max(found["always"], found["never"]), found


def test_wrong_priors_are_got_over() -> None:
    law = Law(step=2e-3 / 8, token=1e-4 / 8, attended=5e-9 / 8, row=1e-4 / 8)
    requests = load(40.0, [SHORT] * 4 + [LONG], seconds=4.0)
    pair = VirtualPair(law, mode="auto")
    pair.run(requests)
    for role in ("prefill", "decode"):
        fitted = pair.costs.report()["steps"]["instances"][f"{role}-0"]["coefficients"]
        taken_s = law.step + 512 * law.token
        assert fitted["step"] + 512 * fitted["prefill_token"] == pytest.approx(taken_s, rel=0.25), role
    assert abs(pair.costs.error_ratio("handover")) < 0.3
    assert abs(pair.costs.error_ratio("local")) < 0.3


def test_prompts_leave_a_prefill_pool_that_became_slow_and_come_back() -> None:
    """Three times slower in the middle third."""

    def slow(role: str, now_s: float, step_s: float) -> float:
        return step_s * (3 if role == "prefill" and 5 <= now_s < 10 else 1)

    requests = load(14.0, [(256, 24)], seconds=15.0)
    pair = VirtualPair(Law(), mode="auto", costs=CostModel(max_local_prefill_tokens=16), on_step=slow)
    pair.run(requests)

    def handed_over(begin_s: float, end_s: float) -> float:
        chosen = [r.choice.chosen.prefill_id for r in requests if r.choice and begin_s <= r.at_s < end_s]
        return sum(prefill_id is not None for prefill_id in chosen) / len(chosen)

    assert handed_over(7, 10) < handed_over(2, 5) - 0.1
    assert handed_over(12, 15) > handed_over(7, 10) + 0.1
