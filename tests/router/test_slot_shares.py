"""A tenant's share of the slots: all of them alone, so many beside others, whatever comes and goes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.router.admission.slot_shares import LEAST, RECENT_S, SLACK, SlotShares, Standing
from baton.router.admission.tenants import Tenant

ONE, OTHER = Tenant(name="one"), Tenant(name="other", weight=3.0)


def test_alone_it_may_have_them_all() -> None:
    shares = SlotShares()
    shares.came(ONE, 0.0)
    for _ in range(64):
        assert shares.standing(ONE, 1, slots=64, readers=64, now_s=0.0) is not Standing.OVER
        shares.granted(ONE, 1)


def test_beside_another_it_has_its_share_by_weight_until_that_has_been_away() -> None:
    shares = SlotShares()
    shares.came(OTHER, 0.0)
    shares.came(ONE, 0.0)
    limit = SLACK * 64 / 4
    taken = 0
    while shares.standing(ONE, 1, slots=64, readers=64, now_s=1.0) is not Standing.OVER:
        shares.granted(ONE, 1)
        taken += 1
    assert taken == int(limit)
    assert shares.standing(OTHER, 64, slots=64, readers=64, now_s=1.0) is not Standing.OVER, (
        "who holds nothing is never refused"
    )
    shares.came(ONE, RECENT_S + 1.0)
    assert shares.standing(ONE, 1, slots=64, readers=64, now_s=RECENT_S + 1.0) is not Standing.OVER


def test_beyond_its_share_it_has_one_prompt_read_at_a_time() -> None:
    shares = SlotShares()
    for account in (ONE, OTHER):
        shares.came(account, 0.0)
    for _ in range(16):
        assert shares.standing(ONE, 1, slots=64, readers=1, now_s=1.0) is not Standing.OVER
        shares.granted(ONE, 1)
    assert shares.standing(ONE, 1, slots=64, readers=16, now_s=1.0) is Standing.OVER
    assert shares.standing(ONE, 1, slots=64, readers=17, now_s=1.0) is not Standing.OVER
    assert shares.standing(ONE, 1, slots=64, readers=17, now_s=1.0) is Standing.BEYOND
    for _ in range(16):
        shares.began(ONE, 1)
    assert shares.standing(ONE, 1, slots=64, readers=1, now_s=1.0) is not Standing.OVER
    shares.granted(ONE, 1)
    assert shares.standing(ONE, 1, slots=64, readers=1, now_s=1.0) is Standing.OVER
    shares.ended(ONE, 1, has_begun=False)
    assert shares.standing(ONE, 1, slots=64, readers=1, now_s=1.0) is not Standing.OVER


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.booleans()), max_size=60), st.integers(1, 40))
def test_nobody_holds_more_than_the_bound_while_others_are_about(
    events: list[tuple[str, int, bool]], slots: int
) -> None:
    shares, held = SlotShares(), {"a": 0, "b": 0, "c": 0}
    accounts = {name: Tenant(name=name) for name in held}
    for account in accounts.values():
        shares.came(account, 0.0)
    for name, choices, ends in events:
        account = accounts[name]
        if ends and held[name] >= choices:
            shares.ended(account, choices, has_begun=False)
            held[name] -= choices
        elif shares.standing(account, choices, slots=slots, readers=40, now_s=1.0) is not Standing.OVER:
            first = not held[name]
            shares.granted(account, choices)
            held[name] += choices
            assert first or held[name] <= max(SLACK * slots / 3, LEAST)
