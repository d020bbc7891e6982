"""Routing choices: filters, scores in [0, 1], local prefill, and what happens under any load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequestError, UnavailableError
from baton.router.policy import InstanceView, PolicyConfig, RequestFacts, choose, decode_score, prefill_score

CONFIG = PolicyConfig(local_prefill_threshold_tokens=64)
LONG = RequestFacts(prompt_tokens=1000)


def _decode(name: str = "decode-0", **fields: object) -> InstanceView:
    return InstanceView(instance_id=name, role="decode", kv_blocks_total=1000, kv_blocks_free=1000, **fields)  # type: ignore[arg-type]


def _prefill(name: str = "prefill-0", **fields: object) -> InstanceView:
    return InstanceView(instance_id=name, role="prefill", **fields)  # type: ignore[arg-type]


def test_long_prompts_go_to_a_prefill_worker_and_the_choice_is_explained() -> None:
    decision = choose([_decode(), _prefill()], LONG, CONFIG)
    assert (decision.decode_id, decision.prefill_id) == ("decode-0", "prefill-0")
    assert "decode-0" in decision.reasons[0]
    assert "1000 uncached" in decision.reasons[1]


@pytest.mark.parametrize(
    ("instances", "facts", "reason"),
    [
        ([_decode(), _prefill()], RequestFacts(prompt_tokens=64), "64 uncached"),
        ([_decode(), _prefill()], RequestFacts(prompt_tokens=1000, wants_prompt_logprobs=True), "log-probabilities"),
        ([_decode()], LONG, "no prefill worker"),
        ([_decode(), _prefill(state="draining")], LONG, "no prefill worker"),
        ([_decode(), _prefill()], RequestFacts(prompt_tokens=1000, prefix_blocks={"decode-0": 60}), "40 uncached"),
    ],
)
def test_the_decode_worker_prefills_itself(instances: list[InstanceView], facts: RequestFacts, reason: str) -> None:
    decision = choose(instances, facts, CONFIG)
    assert decision.prefill_id is None
    assert reason in decision.reasons[1]


@pytest.mark.parametrize(
    ("queued", "running", "pending", "local"),
    [
        (0, 0, 0, False),
        (400, 0, 0, False),
        (600, 0, 0, True),
        (600, 0, 400, False),
        (1000, 4, 0, False),
        (1400, 4, 0, True),
        (1400, 32, 0, False),
        (2200, 32, 0, True),
        (2200, 32, 200, False),
    ],
)
def test_a_long_queue_for_prefill_sends_prompts_to_a_decode_worker_that_has_room(
    queued: int, running: int, pending: int, local: bool
) -> None:
    decode = _decode(running_requests=running, pending_prefill_tokens=pending)
    decision = choose([decode, _prefill(pending_prefill_tokens=queued)], LONG, CONFIG)
    assert (decision.prefill_id is None) is local
    assert not local or "to wait for" in decision.reasons[1]


def test_no_decode_worker() -> None:
    for instances in ([], [_prefill()], [_decode(state="starting")], [_decode(connected=False)]):
        with pytest.raises(UnavailableError):
            choose(instances, LONG, CONFIG)


def test_a_prompt_that_fits_nowhere_is_the_clients_error() -> None:
    with pytest.raises(InvalidRequestError, match="holds 16000"):
        choose([_decode()], RequestFacts(prompt_tokens=16_000), CONFIG)


def test_own_choices_count_before_they_are_reported() -> None:
    busy = _decode("decode-0", own_requests=20)
    idle = _decode("decode-1", running_requests=1)
    assert choose([busy, idle], LONG, CONFIG).decode_id == "decode-1"
    prefills = [_prefill("prefill-0", own_prefill_tokens=5000), _prefill("prefill-1", pending_prefill_tokens=10)]
    assert choose([idle, *prefills], LONG, CONFIG).prefill_id == "prefill-1"


def test_a_held_prefix_attracts_and_a_failed_worker_is_avoided() -> None:
    both = [_decode("decode-0"), _decode("decode-1")]
    facts = RequestFacts(prompt_tokens=1000, prefix_blocks={"decode-1": 50})
    assert choose(both, facts, CONFIG).decode_id == "decode-1"
    assert choose(both, facts, CONFIG).uncached_tokens == 200
    avoided = RequestFacts(prompt_tokens=1000, prefix_blocks={"decode-1": 50}, avoid={"decode-1"})
    assert choose(both, avoided, CONFIG).decode_id == "decode-0"
    assert choose(both[:1], RequestFacts(prompt_tokens=10, avoid={"decode-0"}), CONFIG).decode_id == "decode-0"


views = st.builds(
    InstanceView,
    instance_id=st.sampled_from([f"i{n}" for n in range(6)]),
    role=st.sampled_from(["prefill", "decode"]),
    state=st.sampled_from(["ready", "starting", "draining"]),
    connected=st.booleans(),
    running_requests=st.integers(0, 1000),
    waiting_requests=st.integers(0, 1000),
    kv_blocks_total=st.integers(0, 1000),
    kv_blocks_free=st.integers(0, 500),
    kv_blocks_cached=st.integers(0, 500),
    pending_prefill_tokens=st.integers(0, 10**7),
    own_requests=st.integers(0, 1000),
    own_prefill_tokens=st.integers(0, 10**7),
)


@given(
    st.lists(views, max_size=8, unique_by=lambda view: view.instance_id),
    st.integers(1, 20_000),
    st.dictionaries(st.sampled_from([f"i{n}" for n in range(6)]), st.integers(0, 2000)),
    st.sets(st.sampled_from([f"i{n}" for n in range(6)])),
)
def test_any_choice_is_usable_and_any_refusal_is_true(
    instances: list[InstanceView], prompt_tokens: int, prefix: dict[str, int], avoid: set[str]
) -> None:
    facts = RequestFacts(prompt_tokens=prompt_tokens, prefix_blocks=prefix, avoid=avoid)
    by_id = {view.instance_id: view for view in instances}
    usable = [view for view in instances if view.role == "decode" and view.usable]
    try:
        decision = choose(instances, facts, CONFIG)
    except UnavailableError:
        assert not usable
        return
    except InvalidRequestError:
        assert all(0 < view.kv_blocks_total * view.block_size <= prompt_tokens for view in usable)
        return
    assert by_id[decision.decode_id] in usable
    assert 1 <= decision.uncached_tokens <= prompt_tokens
    if decision.prefill_id is not None:
        assert by_id[decision.prefill_id].usable
        assert by_id[decision.prefill_id].role == "prefill"
        assert decision.uncached_tokens > CONFIG.local_prefill_threshold_tokens
    for view in instances:
        assert 0 <= decode_score(view, facts) <= 1
        assert 0 <= prefill_score(view) <= 1
    assert choose(list(reversed(instances)), facts, CONFIG) == decision


def test_workers_set_aside_are_taken_only_where_nothing_else_is_left() -> None:
    pool = [_decode("a"), _decode("b"), _prefill("p"), _prefill("q")]
    out = RequestFacts(prompt_tokens=500, ejected=frozenset({"a", "p"}))
    assert choose(pool, out, PolicyConfig()).decode_id == "b"
    assert choose(pool, out, PolicyConfig()).prefill_id == "q"
    # Rather a slow one than one that has just failed.
    both = RequestFacts(prompt_tokens=500, ejected=frozenset({"a", "p"}), avoid=frozenset({"b", "q"}))
    assert choose(pool, both, PolicyConfig()).decode_id == "a"
    assert choose(pool, both, PolicyConfig()).prefill_id == "p"
