"""The controller: what it starts, stops and restarts, and when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.controller import (
    Controller,
    ForgetInstance,
    ObservedInstance,
    StartInstance,
    StopInstance,
)

START = StartInstance("decode-0", "decode", 0)


def alive(*instance_ids: str) -> list[ObservedInstance]:
    return [ObservedInstance(instance_id, alive=True) for instance_id in instance_ids]


def ended(*instance_ids: str) -> list[ObservedInstance]:
    return [ObservedInstance(instance_id, alive=False) for instance_id in instance_ids]


def test_starts_what_is_missing_once() -> None:
    controller = Controller({"router": 1, "decode": 2})
    actions = controller.reconcile([], 0)
    assert [action.instance_id for action in actions] == ["router-0", "decode-0", "decode-1"]
    assert controller.reconcile([], 1) == []
    for action in actions:
        controller.finished(action.instance_id, ok=True, now_s=1)
    assert controller.reconcile(alive("router-0", "decode-0", "decode-1"), 2) == []


def test_stops_and_forgets_what_is_too_much() -> None:
    controller = Controller({"decode": 1})
    assert controller.reconcile(alive("decode-0", "decode-1"), 0) == [StopInstance("decode-1")]
    assert controller.reconcile(alive("decode-0", "decode-1"), 0) == []
    controller.finished("decode-1", ok=True, now_s=1)
    assert controller.reconcile(alive("decode-0") + ended("decode-1"), 1) == [ForgetInstance("decode-1")]
    controller.finished("decode-1", ok=True, now_s=1)
    assert controller.reconcile(alive("decode-0"), 1) == []


def test_an_instance_that_dies_again_and_again_waits_longer_each_time() -> None:
    controller = Controller({"decode": 1}, min_backoff_s=1, max_backoff_s=4)
    assert controller.reconcile([], 0) == [START]
    now_s, pauses_s = 0.0, []
    for _ in range(4):
        controller.finished("decode-0", ok=True, now_s=now_s)
        died_s = now_s
        assert controller.reconcile(ended("decode-0"), now_s) == []
        while not controller.reconcile(ended("decode-0"), now_s):
            now_s += 0.5
        pauses_s.append(now_s - died_s)
    assert pauses_s == [1, 2, 4, 4]
    assert controller.restarts("decode-0") == 4


def test_a_long_life_is_forgiven() -> None:
    controller = Controller({"decode": 1}, min_backoff_s=1, stable_s=60)
    controller.reconcile([], 0)
    controller.finished("decode-0", ok=True, now_s=0)
    controller.reconcile(ended("decode-0"), 0)
    assert controller.reconcile(ended("decode-0"), 1) == [START]
    controller.finished("decode-0", ok=True, now_s=1)
    controller.reconcile(alive("decode-0"), 30)
    assert controller.reconcile(ended("decode-0"), 62) == []
    assert controller.restarts("decode-0") == 1
    assert controller.reconcile(ended("decode-0"), 63) == [START]


def test_what_is_held_is_stopped_forgotten_and_started_when_released() -> None:
    controller = Controller({"decode": 2})
    for action in controller.reconcile([], 0):
        controller.finished(action.instance_id, ok=True, now_s=0)
    controller.hold({"decode-0", "decode-7"})
    assert list(controller.desired) == ["decode-1"]
    assert controller.reconcile(alive("decode-0", "decode-1"), 1) == [StopInstance("decode-0")]
    controller.finished("decode-0", ok=True, now_s=2)
    assert controller.reconcile(ended("decode-0") + alive("decode-1"), 2) == [ForgetInstance("decode-0")]
    controller.finished("decode-0", ok=True, now_s=3)
    assert controller.reconcile(alive("decode-1"), 3) == []
    controller.hold(())
    assert controller.reconcile(alive("decode-1"), 4) == [START]


def test_a_stuck_instance_is_stopped_once_and_started_anew() -> None:
    controller = Controller({"decode": 1}, min_backoff_s=1)
    (start,) = controller.reconcile([], 0)
    controller.finished("decode-0", ok=True, now_s=0)
    stuck = [ObservedInstance("decode-0", alive=True, stuck=True)]
    assert controller.reconcile(stuck, 50) == [StopInstance("decode-0", is_stuck=True)]
    assert controller.reconcile(stuck, 51) == []
    controller.finished("decode-0", ok=True, now_s=60)
    assert controller.reconcile(ended("decode-0"), 60) == []
    assert controller.reconcile(ended("decode-0"), 61) == [start]


def test_a_start_that_failed_is_tried_again_after_a_pause() -> None:
    controller = Controller({"decode": 1}, min_backoff_s=1)
    assert controller.reconcile([], 0) == [START]
    controller.finished("decode-0", ok=False, now_s=0)
    assert controller.reconcile([], 0.9) == []
    assert controller.reconcile([], 1) == [START]


def test_stop_all_ends_everything_and_starts_nothing() -> None:
    controller = Controller({"router": 1, "decode": 1})
    for action in controller.reconcile([], 0):
        controller.finished(action.instance_id, ok=True, now_s=0)
    controller.stop_all()
    actions = controller.reconcile(alive("router-0") + ended("decode-0"), 1)
    assert actions == [StopInstance("router-0"), ForgetInstance("decode-0")]


@given(st.data())
def test_whatever_happens_it_arrives_at_what_is_desired(data: st.DataObject) -> None:
    """A world of instances that die, starts and stops that take time or fail; then calm, and the desired state."""
    controller = Controller({"prefill": 2, "decode": 2}, min_backoff_s=1, max_backoff_s=8)
    world: dict[str, bool] = {}
    pending: dict[str, object] = {}
    now_s = 0.0

    def observed() -> list[ObservedInstance]:
        return [ObservedInstance(instance_id, alive) for instance_id, alive in world.items()]

    def step() -> None:
        for action in controller.reconcile(observed(), now_s):
            assert action.instance_id not in pending, "two actions at once"
            if isinstance(action, StartInstance):
                assert not world.get(action.instance_id, False), "started twice"
            pending[action.instance_id] = action

    def complete(instance_id: str, ok: bool) -> None:
        action = pending.pop(instance_id)
        if isinstance(action, StartInstance) and ok:
            world[instance_id] = True
        elif isinstance(action, StopInstance) and ok:
            world[instance_id] = False
        elif isinstance(action, ForgetInstance) and ok:
            del world[instance_id]
        controller.finished(instance_id, ok=ok, now_s=now_s)

    for _ in range(data.draw(st.integers(0, 25))):
        now_s += data.draw(st.sampled_from([0.1, 1.0, 10.0]))
        kind = data.draw(st.sampled_from(["step", "die", "complete", "fail", "scale"]))
        if kind == "die" and world:
            world[data.draw(st.sampled_from(sorted(world)))] = False
        elif kind in ("complete", "fail") and pending:
            complete(data.draw(st.sampled_from(sorted(pending))), ok=kind == "complete")
        elif kind == "scale":
            controller.scale(data.draw(st.sampled_from(["prefill", "decode"])), data.draw(st.integers(0, 3)))
        step()
    for _ in range(20):
        now_s += 10
        for instance_id in list(pending):
            complete(instance_id, ok=True)
        step()
    assert {instance_id for instance_id, up in world.items() if up} == set(controller.desired)
    assert all(world.values())
