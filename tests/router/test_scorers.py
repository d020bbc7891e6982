"""Every scorer: in [0, 1] whatever the views, and never the wrong way round."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.router.routing.facts import InstanceView, RequestFacts
from baton.router.routing.policies import SCORERS
from baton.router.routing.prior_costs import PriorCosts
from baton.router.routing.scene import Scene

NAMES = [f"i{number}" for number in range(5)]
counts, tokens = st.integers(0, 10**4), st.integers(0, 10**8)


@st.composite
def _pools(draw: st.DrawFn) -> list[InstanceView]:
    role = draw(st.sampled_from(["prefill", "decode"]))
    return [
        InstanceView(
            instance_id=name,
            role=role,
            running_requests=draw(counts),
            waiting_requests=draw(counts),
            kv_blocks_total=draw(counts),
            kv_blocks_free=draw(counts),
            kv_blocks_cached=draw(counts),
            pending_prefill_tokens=draw(tokens),
            max_running_requests=draw(counts),
            slowness=draw(st.floats(0, 1e6)),
            host_id=draw(st.sampled_from(["", "x", "y"])),
            own_requests=draw(counts),
            own_prefill_tokens=draw(tokens),
        )
        for name in NAMES[: draw(st.integers(1, len(NAMES)))]
    ]


facts_of_any_kind = st.builds(
    RequestFacts,
    prompt_tokens=st.integers(1, 10**6),
    prefix_blocks=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 10**5)),
    session_instances=st.dictionaries(st.sampled_from(["prefill", "decode"]), st.sampled_from(NAMES)),
    recent_tokens=st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1e12)),
)
partners = st.sampled_from([InstanceView(instance_id="d", role="decode", host_id=host) for host in ("", "x", "y")])


def _scene(facts: RequestFacts, pool: list[InstanceView], partner: InstanceView) -> Scene:
    return Scene(facts, PriorCosts(), partner=partner if pool[0].role == "prefill" else None, partner_hosts={"x"})


@pytest.mark.parametrize("name", SCORERS)
@given(_pools(), facts_of_any_kind, partners)
def test_scores_are_in_0_to_1(name: str, pool: list[InstanceView], facts: RequestFacts, partner: InstanceView) -> None:
    scores = SCORERS[name](pool, _scene(facts, pool, partner))
    assert len(scores) == len(pool)
    assert all(0 <= score <= 1 for score in scores)


# What makes a worker worse (or, below, better) to have, and who must see that.
_MORE_LOAD = {
    "running_requests": ("queue", "load", "memory"),
    "waiting_requests": ("queue", "load"),
    "own_requests": ("queue", "load", "pending"),
    "pending_prefill_tokens": ("queue", "load"),
    "own_prefill_tokens": ("queue", "load"),
    "slowness": ("health", "queue"),
}


@pytest.mark.parametrize(("field", "name"), [(field, name) for field, names in _MORE_LOAD.items() for name in names])
@given(_pools(), facts_of_any_kind, partners, st.integers(1, 10**6))
def test_more_load_never_scores_higher(
    field: str, name: str, pool: list[InstanceView], facts: RequestFacts, partner: InstanceView, more: int
) -> None:
    loaded = [dataclasses.replace(pool[0], **{field: getattr(pool[0], field) + more}), *pool[1:]]  # type: ignore[arg-type]
    before, after = (SCORERS[name](views, _scene(facts, views, partner)) for views in (pool, loaded))
    assert after[0] <= before[0] + 1e-9
    # ... nor lower for those that it was not added to.
    assert all(new >= old - 1e-9 for old, new in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize("name", ["prefix", "queue"])
@given(_pools(), facts_of_any_kind, partners, st.integers(1, 10**4))
def test_more_overlap_never_scores_lower(
    name: str, pool: list[InstanceView], facts: RequestFacts, partner: InstanceView, more: int
) -> None:
    first = pool[0].instance_id
    held = {**facts.prefix_blocks, first: facts.prefix_blocks.get(first, 0) + more}
    richer = dataclasses.replace(facts, prefix_blocks=held)
    before, after = (SCORERS[name](pool, _scene(each, pool, partner)) for each in (facts, richer))
    assert after[0] >= before[0] - 1e-9


@given(_pools(), facts_of_any_kind, partners, st.floats(1, 1e9))
def test_more_recent_work_never_scores_higher(
    pool: list[InstanceView], facts: RequestFacts, partner: InstanceView, more: float
) -> None:
    first = pool[0].instance_id
    worked = dataclasses.replace(
        facts, recent_tokens={**facts.recent_tokens, first: facts.recent_tokens.get(first, 0.0) + more}
    )
    if first in facts.recent_tokens:
        before, after = (SCORERS["balance"](pool, _scene(each, pool, partner)) for each in (facts, worked))
        assert after[0] <= before[0] + 1e-9


def test_near_is_better_than_unknown_and_that_is_better_than_far() -> None:
    pool = [InstanceView(instance_id=host or "none", role="prefill", host_id=host) for host in ("x", "", "y")]
    partner = InstanceView(instance_id="d", role="decode", host_id="x")
    assert SCORERS["topology"](pool, Scene(RequestFacts(prompt_tokens=1), PriorCosts(), partner=partner)) == [1, 0.5, 0]
