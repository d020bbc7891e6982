"""Fault rules: their words, when they fire, and what happens at the points of a process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import FileDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton import faults
from baton.config import add_faults, config_from_json, load_config
from baton.errors import ConfigError
from baton.fault_events import Faults
from baton.fault_rules import ACTIONS, METHODS, POINTS, ROLES, FaultRule, parse_rule, parse_rules
from baton.proto.baton.v1 import worker_pb2

_SECONDS = st.floats(min_value=1e-9, max_value=86_400, exclude_min=True)
_COUNTS = st.none() | st.integers(1, 2**53)
_WORKER_POINTS = [point for point in POINTS if not point.startswith("rpc.")]


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    faults.install([], instance_id="", role="")


@st.composite
def rules(draw: st.DrawFn) -> FaultRule:
    point = draw(st.sampled_from(list(POINTS)))
    action = draw(st.sampled_from(POINTS[point]))
    is_rpc = point.startswith("rpc.")
    methods = ["", *(f"{service}.{name}" for service, names in METHODS.items() for name in (*names, "*"))]
    chance = draw(st.none() | st.floats(min_value=0, max_value=1, exclude_min=True))
    peers = ["", "decode-1", "prefill", "controller", "127.0.0.1:4711"]
    return FaultRule(
        component="any",
        point=point,
        action=action,
        nth=draw(_COUNTS),
        every=draw(_COUNTS),
        after=draw(st.none() | st.integers(0, 2**53)),
        times=draw(_COUNTS),
        chance=chance,
        seed=draw(st.integers(0, 2**64 - 1)) if chance is not None or action == "flip" else 0,
        peer=draw(st.sampled_from(peers)) if is_rpc or point.startswith("transfer.") or point == "announce" else "",
        method=draw(st.sampled_from(methods)) if is_rpc else "",
        token=draw(st.none() | st.integers(0, 2**53)) if point == "submit" else None,
        for_s=draw(_SECONDS) if action == "delay" else draw(st.none() | _SECONDS) if action == "hang" else None,
        rate_bytes_s=draw(st.integers(1, 2**53)) if action == "slow" else None,
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(rules())
def test_words_and_rule_are_the_same_thing(rule: FaultRule) -> None:
    assert parse_rule(str(rule)) == rule
    assert parse_rules(f" {rule} ; ;\n{rule};") == (rule, rule)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet="decoprfil-019 .=;nthkansubmy\n", max_size=60))
def test_any_text_is_a_rule_or_refused_in_words(text: str) -> None:
    parsed: tuple[FaultRule, ...] = ()
    with contextlib.suppress(ConfigError):
        parsed = parse_rules(text)
    assert parse_rules(";".join(map(str, parsed))) == parsed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "'' is no component"),
        ("decod-0 emit kill", "'decod-0' is no component; did you mean"),
        ("decode-01 emit kill", "'decode-01' is no component"),
        ("decode-0 emti kill", "'emti' is no point; did you mean emit?"),
        ("decode-0 emit", "it needs one action, found none; actions at emit: kill, hang, delay"),
        ("decode-0 emit kill hang", "it needs one action, found kill and hang"),
        ("decode-0 emit flip", "'flip' does not go with emit; it may be one of kill, hang, delay"),
        ("decode-0 emit kil", "'kil' is no action at emit; did you mean kill?"),
        ("decode-0 emit nht=7 kill", "'nht' in 'nht=7' is no condition; did you mean nth?"),
        ("decode-0 emit nth=0 kill", "'nth=0': '0' is not an integer of 1 to"),
        ("decode-0 emit nth=1 nth=2 kill", "nth is given twice"),
        ("decode-0 emit nth=٣ kill", "is not an integer"),
        ("any rpc.send chance=1.5 drop", "'1.5' is not a number above 0 and at most 1"),
        ("any rpc.send chance=nan drop", "'nan' is not a number"),
        ("any rpc.send seed=3 drop", "seed= goes with chance= or flip only"),
        ("any rpc.send method=Decod.Stream drop", "'Decod' is no service; did you mean Decode?"),
        ("any rpc.send method=Decode.Strem drop", "'Strem' is no method of Decode; did you mean Stream?"),
        ("any rpc.send peer=nobody drop", "'nobody' is neither an instance"),
        ("any step method=Decode.Stream kill", "method= goes with rpc.send and rpc.receive only, not with step"),
        ("any step peer=decode-0 kill", "peer= goes with rpc, transfer and announce only, not with step"),
        ("any step token=3 kill", "token= goes with submit only, not with step"),
        ("any step delay", "delay needs for=SECONDS"),
        ("any step kill for=1", "for= goes with hang and delay only"),
        ("any rpc.send slow", "slow needs rate=BYTES_PER_S"),
        ("any rpc.send drop rate=1", "rate= goes with slow only"),
        ("prefill emit kill", "emit happens in decode and router only, not in prefill"),
        ("router-0 step kill", "step happens in prefill and decode only, not in router-0"),
    ],
)
def test_what_is_wrong_is_named(words: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rule(words)
    assert told in str(caught.value)


def test_the_table_of_methods_is_that_of_the_proto_file() -> None:
    file: FileDescriptor = worker_pb2.DESCRIPTOR
    services = {name: {method.name for method in service.methods} for name, service in file.services_by_name.items()}
    assert {name: set(methods) for name, methods in METHODS.items()} == services


def _fires(words: str, count: int, instance_id: str = "decode-0") -> list[int]:
    mine = Faults([parse_rule(words)], instance_id=instance_id, role="decode")
    point = mine.rules[0].point
    return [number for number in range(1, count + 1) if mine.decide(point)]


@pytest.mark.parametrize(
    ("conditions", "numbers"),
    [
        ("", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("nth=3", [3]),
        ("every=3", [3, 6]),
        ("after=6", [7, 8]),
        ("times=2", [1, 2]),
        ("every=2 after=3 times=2", [4, 6]),
        ("nth=2 after=2", []),
    ],
)
def test_conditions_all_hold(conditions: str, numbers: list[int]) -> None:
    assert _fires(f"any step {conditions} kill", 8) == numbers


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**64 - 1), st.floats(0.01, 0.99))
def test_chance_is_the_same_each_time_and_grows_by_adding(seed: int, chance: float) -> None:
    few = _fires(f"any step chance={chance / 2!r} seed={seed} kill", 300)
    many = _fires(f"any step chance={chance!r} seed={seed} kill", 300)
    assert many == _fires(f"any step chance={chance!r} seed={seed} kill", 300)
    assert set(few) <= set(many)


def test_chance_is_about_what_it_says_and_differs_between_instances() -> None:
    fired = [_fires(f"any step chance=0.05 seed={seed} kill", 5000) for seed in range(10)]
    assert 2250 < sum(map(len, fired)) < 2750
    assert fired[3] != _fires("any step chance=0.05 seed=3 kill", 5000, "decode-1")


def test_only_what_matches_is_counted() -> None:
    peers = {"127.0.0.1:1": "decode-0", "127.0.0.1:2": "decode-1"}
    mine = Faults(
        parse_rules(
            "router rpc.send peer=decode-1 nth=2 drop; any rpc.send peer=decode method=Decode.* nth=3 flip;"
            "any rpc.send peer=127.0.0.1:1 nth=1 kill; decode rpc.send drop; router-1 rpc.send drop;"
            "any rpc.send nth=1 refuse"
        ),
        instance_id="router-0",
        role="router",
        peers=peers,
    )
    assert [rule.action for rule in mine.rules] == ["drop", "flip", "kill", "refuse"]

    def actions(peer: str, method: str, *, begins: bool = False) -> list[str]:
        decided = mine.decide("rpc.send", peer=peer, method=method, begins=begins)
        return [fault.rule.action for fault in decided]

    assert actions("127.0.0.1:2", "Decode.Stream") == []
    assert actions("127.0.0.1:1", "Prefill.Prefill") == ["kill"]
    assert actions("127.0.0.1:1", "Decode.Stream") == []
    assert actions("127.0.0.1:2", "Decode.Stream") == ["drop", "flip"]
    assert actions("127.0.0.1:2", "Decode.Stream", begins=True) == ["refuse"]
    assert actions("127.0.0.1:2", "Decode.Stream", begins=True) == []
    assert [count for _, count in mine.fired()] == [1, 1, 1, 1]
    assert mine.concerns("step", "rpc.send")
    assert not mine.concerns("rpc.receive")


def test_a_token_is_looked_for_in_the_prompt() -> None:
    mine = Faults(parse_rules("any submit token=7 kill"), instance_id="decode-0", role="decode")
    assert not mine.decide("submit", tokens=(1, 2, 3))
    assert mine.decide("submit", tokens=(1, 7))


def test_events_of_many_threads_are_counted_once_each() -> None:
    mine = Faults(parse_rules("any step every=10 fail"), instance_id="decode-0", role="decode")
    threads = [threading.Thread(target=lambda: [mine.decide("step") for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert mine.fired()[0][1] == 400


def test_the_configuration_takes_and_checks_rules() -> None:
    config = load_config(None, {"faults.rules": ["decode-0  emit kill nth=7", "prefill transfer.post nth=2 flip"]})
    assert config.faults.rules == ("decode-0 emit nth=7 kill", "prefill transfer.post nth=2 flip")
    assert config_from_json(config.model_dump_json()) == config
    more = add_faults(config, "any load fail; router-0 rpc.send drop")
    assert more.faults.rules == (*config.faults.rules, "any load fail", "router-0 rpc.send drop")
    assert load_config(None, {"faults.rules": "any load fail; any step kill"}).faults.rules[1] == "any step kill"
    with pytest.raises(ConfigError, match=r"cluster has no component 'decode-1'; did you mean decode-0\?"):
        load_config(None, {"faults.rules": ["decode-1 step kill"]})
    with pytest.raises(ConfigError, match="cluster has no peer 'prefill-3'"):
        load_config(None, {"faults.rules": ["any rpc.send peer=prefill-3 drop"]})
    with pytest.raises(ConfigError, match=r"BATON_FAULTS: faults\.rules: fault rule 'any stp kill': 'stp' is no point"):
        add_faults(config, "any stp kill")
    with pytest.raises(ConfigError, match="is not a list of rules"):
        load_config(None, {"faults.rules": 3})


def test_rules_may_be_replaced_and_tell_how_often_they_fired() -> None:
    faults.install(["any step nth=9 fail"], instance_id="decode-0", role="decode", allow_at_runtime=True)
    assert faults.is_possible
    faults.step_begins()
    assert [(str(rule), count) for rule, count in faults.replace(["any step fail", "prefill step kill"])] == [
        ("any step nth=9 fail", 0)
    ]
    with pytest.raises(faults.FaultError, match=r"fault any step fail \(event 1\)"):
        faults.step_begins()
    assert [count for _, count in faults.replace([])] == [1]
    assert faults.active is None
    faults.step_begins()
    faults.install([], instance_id="decode-0", role="decode")
    assert not faults.is_possible


def test_points_without_rules_do_nothing() -> None:
    faults.install(["any load kill"], instance_id="decode-0", role="decode")
    for point in _WORKER_POINTS[1:]:
        faults.strike(point)
    assert set(ROLES) == {"prefill", "decode", "router", "controller"}
    assert set(ACTIONS) >= {"kill", "hang", "blackhole"}


def _strike(rule: str, count: int) -> None:
    faults.install([rule], instance_id="decode-0", role="decode")
    faults.strike("emit", count=count)
    os._exit(7)


@pytest.mark.parametrize(("count", "code"), [(6, 7), (7, -signal.SIGKILL)])
def test_kill_is_sigkill_at_the_nth_token(count: int, code: int) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_strike, args=("decode-0 emit nth=7 kill", count))
    process.start()
    process.join(30.0)
    assert process.exitcode == code
