"""Routing choices: filters, the pair, who reads the prompt, and what happens under any load."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config_routing import RoutingConfig, RoutingWeights
from baton.errors import InvalidRequestError, UnavailableError
from baton.router.policy import choose
from baton.router.routing.facts import InstanceView, RequestFacts
from baton.router.routing.policies import SCORERS, make_policy
from baton.router.routing.prior_costs import PriorCosts

COSTS = PriorCosts()
POLICY = make_policy(RoutingConfig())
LONG = RequestFacts(prompt_tokens=1000)


def _decode(name: str = "decode-0", **fields: object) -> InstanceView:
    return InstanceView(instance_id=name, role="decode", kv_blocks_total=1000, kv_blocks_free=1000, **fields)  # type: ignore[arg-type]


def _prefill(name: str = "prefill-0", **fields: object) -> InstanceView:
    return InstanceView(instance_id=name, role="prefill", **fields)  # type: ignore[arg-type]


def test_long_prompts_go_to_a_prefill_worker_and_the_choice_is_explained() -> None:
    decision = choose([_decode(), _prefill()], LONG, POLICY, COSTS)
    assert (decision.decode_id, decision.prefill_id, decision.uncached_tokens) == ("decode-0", "prefill-0", 1000)
    assert "decode-0" in decision.reasons[0]
    assert "1000 uncached" in decision.reasons[1]


@pytest.mark.parametrize(
    ("instances", "facts"),
    [
        ([_decode(), _prefill()], RequestFacts(prompt_tokens=60)),
        ([_decode(), _prefill()], RequestFacts(prompt_tokens=1000, wants_prompt_logprobs=True)),
        ([_decode()], LONG),
        ([_decode(), _prefill(state="draining")], LONG),
        ([_decode(), _prefill(kv_blocks_total=10)], LONG),
        ([_decode(), _prefill()], RequestFacts(prompt_tokens=1000, prefix_blocks={"decode-0": 60})),
        ([_decode(), _prefill(pending_prefill_tokens=1000)], LONG),
    ],
)
def test_the_decode_worker_reads_the_prompt_itself(instances: list[InstanceView], facts: RequestFacts) -> None:
    decision = choose(instances, facts, POLICY, COSTS)
    assert decision.prefill_id is None
    assert "prefill on the decode worker" in decision.reasons[1]


def test_always_and_never_are_obeyed() -> None:
    pool = [_decode(), _prefill(pending_prefill_tokens=10**6)]
    always, never = (make_policy(RoutingConfig(disaggregate=mode)) for mode in ("always", "never"))  # type: ignore[arg-type]
    assert choose(pool, RequestFacts(prompt_tokens=2), always, COSTS).prefill_id == "prefill-0"
    assert choose(pool[:1], LONG, always, COSTS).prefill_id is None
    assert choose([_decode(), _prefill()], LONG, never, COSTS).prefill_id is None


def test_no_decode_worker() -> None:
    for instances in ([], [_prefill()], [_decode(state="starting")], [_decode(connected=False)]):
        with pytest.raises(UnavailableError):
            choose(instances, LONG, POLICY, COSTS)


def test_a_prompt_that_fits_nowhere_is_the_clients_error() -> None:
    with pytest.raises(InvalidRequestError, match="holds 16000") as refused:
        choose([_decode()], RequestFacts(prompt_tokens=16_000), POLICY, COSTS)
    assert refused.value.code == "context_length_exceeded"


def test_own_choices_count_before_they_are_reported() -> None:
    busy, idle = _decode("decode-0", own_requests=20), _decode("decode-1", running_requests=1)
    assert choose([busy, idle], LONG, POLICY, COSTS).decode_id == "decode-1"
    prefills = [_prefill("prefill-0", own_prefill_tokens=500), _prefill("prefill-1", pending_prefill_tokens=10)]
    assert choose([idle, *prefills], LONG, POLICY, COSTS).prefill_id == "prefill-1"


def test_requests_of_one_moment_do_not_herd() -> None:
    # No report comes between these choices: what this router has sent itself must spread them.
    sent = dict.fromkeys(("decode-0", "decode-1", "decode-2", "decode-3"), 0)
    for number in range(16):
        pool = [_decode(name, own_requests=count, own_prefill_tokens=300 * count) for name, count in sent.items()]
        facts = RequestFacts(prompt_tokens=300, request_id=str(number), prefix_blocks={"decode-2": 2})
        sent[choose(pool, facts, POLICY, COSTS).decode_id] += 1
    assert max(sent.values()) - min(sent.values()) <= 1


def test_a_held_prefix_attracts_and_a_failed_worker_is_avoided() -> None:
    both = [_decode("decode-0"), _decode("decode-1")]
    facts = RequestFacts(prompt_tokens=1000, prefix_blocks={"decode-1": 50})
    decision = choose(both, facts, POLICY, COSTS)
    assert (decision.decode_id, decision.uncached_tokens, decision.cached_tokens) == ("decode-1", 200, 800)
    avoided = RequestFacts(prompt_tokens=1000, prefix_blocks={"decode-1": 50}, avoid={"decode-1"})
    assert choose(both, avoided, POLICY, COSTS).decode_id == "decode-0"
    alone = RequestFacts(prompt_tokens=10, avoid={"decode-0"})
    assert choose(both[:1], alone, POLICY, COSTS).decode_id == "decode-0"


def test_the_prefill_worker_that_holds_the_prefix_reads_the_prompt() -> None:
    facts = RequestFacts(prompt_tokens=1000, prefix_blocks={"prefill-1": 40})
    decision = choose([_decode(), _prefill("prefill-0"), _prefill("prefill-1")], facts, POLICY, COSTS)
    assert (decision.prefill_id, decision.uncached_tokens, decision.cached_tokens) == ("prefill-1", 360, 0)


def test_the_session_and_the_host_decide_between_equals() -> None:
    pool = [_decode("a"), _decode("b"), _prefill("p", host_id="x"), _prefill("q", host_id="y")]
    known = RequestFacts(prompt_tokens=500, session_instances={"decode": "b", "prefill": "q"})
    assert choose(pool, known, POLICY, COSTS).decode_id == "b"
    assert choose(pool, known, POLICY, COSTS).prefill_id == "q"
    near = [_decode("a", host_id="y"), *pool[2:]]
    assert choose(near, LONG, POLICY, COSTS).prefill_id == "q"


def test_who_was_given_much_lately_rests_while_peers_catch_up() -> None:
    pool = [_decode("a"), _decode("b")]
    facts = RequestFacts(prompt_tokens=1000, prefix_blocks={"a": 10}, recent_tokens={"a": 200_000.0, "b": 100_000.0})
    assert choose(pool, facts, POLICY, COSTS).decode_id == "b"
    unweighed = make_policy(RoutingConfig(weights=RoutingWeights(balance=0)))
    assert choose(pool, facts, unweighed, COSTS).decode_id == "a"


def test_workers_set_aside_are_taken_only_where_nothing_else_is_left() -> None:
    pool = [_decode("a"), _decode("b"), _prefill("p"), _prefill("q")]
    out = RequestFacts(prompt_tokens=500, ejected=frozenset({"a", "p"}))
    assert choose(pool, out, POLICY, COSTS).decode_id == "b"
    assert choose(pool, out, POLICY, COSTS).prefill_id == "q"
    # Rather a slow one than one that has just failed.
    both = RequestFacts(prompt_tokens=500, ejected=frozenset({"a", "p"}), avoid=frozenset({"b", "q"}))
    assert choose(pool, both, POLICY, COSTS).decode_id == "a"
    assert choose(pool, both, POLICY, COSTS).prefill_id == "p"


def test_policies_to_compare_with() -> None:
    pool = [_decode("a", own_requests=3), _decode("b", own_requests=1), _decode("c", own_requests=2)]
    held = {"a": 60}

    def taken(policy: str, **fields: object) -> str:
        facts = RequestFacts(prompt_tokens=1000, prefix_blocks=held, **fields)  # type: ignore[arg-type]
        return choose(pool, facts, make_policy(RoutingConfig(policy=policy)), COSTS).decode_id  # type: ignore[arg-type]

    assert [taken("round_robin", turn=turn) for turn in range(4)] == ["a", "b", "c", "a"]
    assert taken("least_loaded") == "b"
    drawn = [taken("random", request_id=f"r{number}") for number in range(60)]
    assert set(drawn) == {"a", "b", "c"}
    assert drawn == [taken("random", request_id=f"r{number}") for number in range(60)]


def test_a_decision_tells_every_candidate_and_every_score() -> None:
    pool = [
        _decode("a"),
        _decode("b", state="draining"),
        InstanceView(instance_id="c", role="decode", kv_blocks_total=5),
        _decode("d"),
        _prefill("p"),
    ]
    facts = RequestFacts(prompt_tokens=1000, request_id="r-1", prefix_blocks={"a": 50}, avoid={"d"})
    told = choose(pool, facts, POLICY, COSTS).as_dict()
    assert json.loads(json.dumps(told)) == told
    assert (told["request_id"], told["policy"]) == ("r-1", "kv_aware")
    best, *others = told["decode"]["candidates"]
    assert (best["instance"], told["decode"]["chosen"]) == ("a", "a")
    assert set(best["scores"]) == set(SCORERS)
    assert best["total"] == pytest.approx(sum(s["score"] * s["weight"] for s in best["scores"].values()), abs=1e-3)
    assert {other["instance"]: other["dropped_by"].split(":")[0] for other in others} == {
        "b": "ready",
        "c": "memory",
        "d": "failed",
    }
    handover = told["handover"]
    assert (handover["mode"], handover["chosen"], handover["reason"] != "") == ("auto", None, True)
    options = {option["prefill"]: option for option in handover["options"]}
    assert options[None]["new_tokens"] == 200
    assert options["p"]["new_tokens"] == 1000
    assert sum(options["p"]["parts"].values()) == pytest.approx(options["p"]["ttft_s"])


ids = st.sampled_from([f"i{n}" for n in range(6)])
views = st.builds(
    InstanceView,
    instance_id=ids,
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
    st.dictionaries(ids, st.integers(0, 2000)),
    st.sets(ids),
    st.sampled_from(["kv_aware", "round_robin", "random", "least_loaded"]),
)
def test_any_choice_is_usable_and_any_refusal_is_true(
    instances: list[InstanceView], prompt_tokens: int, prefix: dict[str, int], avoid: set[str], policy: str
) -> None:
    facts = RequestFacts(prompt_tokens=prompt_tokens, prefix_blocks=prefix, avoid=avoid)
    made = make_policy(RoutingConfig(policy=policy))  # type: ignore[arg-type]
    by_id = {view.instance_id: view for view in instances}
    usable = [view for view in instances if view.role == "decode" and view.usable]
    try:
        decision = choose(instances, facts, made, COSTS)
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
    again = choose(list(reversed(instances)), facts, made, COSTS)
    assert (again.decode_id, again.prefill_id) == (decision.decode_id, decision.prefill_id)
    listed = {
        candidate["instance"] for role in ("decode", "prefill") for candidate in again.as_dict()[role]["candidates"]
    }
    assert listed == set(by_id)
