"""Which faults come when, whom they hit, and what cannot be done to a cluster."""

from __future__ import annotations

import pytest

from baton.cluster.chaos.members import CONTROLLER, Member, Rank, choose_victim, has_spare, member_of, refusal
from baton.cluster.chaos.scenarios import SCENARIOS, Rules, drawn_strikes, find, strikes_of
from baton.errors import ConfigError
from baton.fault_rules import parse_rule
from baton.proto.baton.v1 import worker_pb2 as pb


def member(name: str, state: str = "ready", host: str = "127.0.0.1") -> Member:
    role = name.partition("-")[0]
    return Member(instance_id=name, role=role, state=state, ranks=(Rank(100, host),))


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_described_and_fits_the_default_duration(name: str) -> None:
    scenario = find(name)
    assert scenario.name == name
    assert len(scenario.description) > 30
    strikes = strikes_of(scenario, duration_s=20, seed=3)
    assert strikes
    assert all(strike.at_s + scenario.hold_s <= 20 for strike in strikes)
    # One is lifted before the next one begins.
    assert scenario.hold_s < scenario.every_s


def test_a_seed_gives_the_same_rules() -> None:
    scenario = find("lose-messages")
    assert isinstance(scenario.act, Rules)
    first, second = (strikes_of(scenario, duration_s=12, seed=40) for _ in range(2))
    assert [strike.rules() for strike in first] == [strike.rules() for strike in second]
    assert first[0].rules() != first[1].rules()


@pytest.mark.parametrize("name", SCENARIOS)
def test_rules_are_rules(name: str) -> None:
    (strike, *_) = strikes_of(find(name), duration_s=20, seed=3)
    act = strike.scenario.act
    rules = strike.rules(f"{act.victim}-1" if isinstance(act, Rules) else "")
    assert [str(parse_rule(rule)) for rule in rules] == list(rules)
    assert bool(rules) == isinstance(act, Rules)


def test_a_duration_without_room_for_a_fault_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stop-decode needs --duration 4 or more, got 3"):
        strikes_of(find("stop-decode"), duration_s=3, seed=1)
    assert len(strikes_of(find("stop-decode"), duration_s=4, seed=1)) == 1


def test_a_steady_fault_lasts_all_along() -> None:
    (strike,) = strikes_of(find("lose-messages"), duration_s=600, seed=3, is_steady=True)
    assert (strike.at_s, strike.scenario.hold_s) == (1.0, 599.0)
    assert strike.rules() == strikes_of(find("lose-messages"), duration_s=20, seed=3)[0].rules()
    with pytest.raises(ConfigError, match="kill-decode does not last"):
        strikes_of(find("kill-decode"), duration_s=600, seed=3, is_steady=True)
    with pytest.raises(ConfigError, match="needs --duration 5 or more, got 4"):
        strikes_of(find("lose-messages"), duration_s=4, seed=3, is_steady=True)


def test_an_unknown_scenario_is_told_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean kill-decode"):
        find("kil-decode")
    with pytest.raises(ConfigError, match="there are kill-decode, "):
        find("?")


def test_drawn_faults_are_all_kinds_in_an_order_of_the_seed() -> None:
    kinds = list(SCENARIOS.values())
    strikes = list(drawn_strikes(kinds, duration_s=1200, every_s=10, seed=5))
    assert [strike.at_s for strike in strikes][:2] == [5.0, 15.0]
    assert len(strikes) == 120
    names = [strike.scenario.name for strike in strikes]
    assert set(names[: len(kinds)]) == set(SCENARIOS)
    assert strikes == list(drawn_strikes(kinds, duration_s=1200, every_s=10, seed=5))
    assert names != [strike.scenario.name for strike in drawn_strikes(kinds, duration_s=1200, every_s=10, seed=6)]
    assert all(strike.at_s + strike.scenario.hold_s <= 1200 for strike in strikes)


def test_victims_come_in_turn_and_the_last_one_is_left_alone() -> None:
    pool = [member("decode-1"), member("decode-0"), member("prefill-0")]
    assert [choose_victim(pool, "decode", turn).instance_id for turn in range(3)] == [  # type: ignore[union-attr]
        "decode-0",
        "decode-1",
        "decode-0",
    ]
    pool[1] = member("decode-0", "starting")
    assert choose_victim(pool, "decode", 0) is None
    # Decode workers can do a prefill worker's work; an only decode worker is hit by whoever asks for it.
    assert choose_victim([member("prefill-0"), member("prefill-1", "dead")], "prefill", 0) is not None
    assert choose_victim([member("decode-0")], "decode", 4) is not None
    assert choose_victim([], "router", 0) is None
    assert has_spare(pool, "decode")
    assert not has_spare([member("decode-0")], "decode")
    assert has_spare([member("prefill-0")], "prefill")


def test_what_cannot_be_done_is_refused_with_the_way_to_do_it() -> None:
    pool = [member("decode-0"), member("prefill-0", host="10.1.2.3"), member("router-0"), member(CONTROLLER)]

    def why_not(name: str, launcher: str = "ray") -> str:
        return refusal(find(name), pool, lambda host: host == "127.0.0.1", launcher)

    assert why_not("kill-decode") == ""
    assert why_not("vanish") == ""
    assert why_not("slow-link") == ""
    assert why_not("lose-messages") == ""
    assert "prefill-0 runs on 10.1.2.3" in why_not("kill-prefill")
    assert "router.replicas=2" in why_not("kill-router")
    assert why_not("kill-controller") == ""
    assert "use launcher ray" in why_not("kill-controller", "local")
    pool.append(member("router-1"))
    assert why_not("kill-router") == ""
    pool = [each for each in pool if each.role != "prefill"]
    assert why_not("stop-prefill") == "stop-prefill: this cluster has no prefill"
    assert why_not("slow-link") == "slow-link: this cluster has no prefill"


def test_a_member_is_what_the_registry_lists() -> None:
    status = pb.WorkerStatus(
        instance_id="router-0",
        role="router",
        state="ready",
        incarnation=b"\x01\x02",
        http_url="http://127.0.0.1:8000/v1",
        ranks=[pb.RankStatus(pid=7, host="127.0.0.1")],
    )
    found = member_of(status)
    assert (found.incarnation, found.http_url, found.ranks) == (
        "0102",
        "http://127.0.0.1:8000",
        (Rank(7, "127.0.0.1"),),
    )
