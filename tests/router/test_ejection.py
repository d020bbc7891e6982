"""Slow workers are set aside for a while, never too many, and come back by probes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.router.fake_worker import FakeDecode, expected
from tests.router.harness import running_router

from baton.router.ejection import Ejection, EjectionConfig, Outcome, Reading

TICK_S = 0.5


class Pool:
    """Decode workers by their slowness; `own` requests on each."""

    def __init__(self, *slownesses: float, config: EjectionConfig | None = None) -> None:
        self.slowness = dict(enumerate(slownesses))
        self.own = dict.fromkeys(self.slowness, 0)
        self.incarnation = dict.fromkeys(self.slowness, b"a")
        self.usable = dict.fromkeys(self.slowness, True)
        self.ejection = Ejection(config or EjectionConfig(abandon=None))
        self.now_s = 0.0

    def run(self, seconds: float) -> list[Outcome]:
        """What happens in the next seconds."""
        outcomes = []
        for _ in range(int(seconds / TICK_S)):
            self.now_s += TICK_S
            readings = [
                Reading(
                    instance_id=str(index),
                    role="decode",
                    incarnation=self.incarnation[index],
                    usable=self.usable[index],
                    slowness=slowness,
                    own_requests=self.own[index],
                )
                for index, slowness in self.slowness.items()
            ]
            outcomes += self.ejection.tick(readings, self.now_s)
        return outcomes

    def out(self) -> list[int]:
        """Who gets no new requests."""
        return [index for index in self.slowness if self.ejection.is_out(str(index), self.own[index])]


def test_the_slow_one_is_set_aside_and_its_reason_told() -> None:
    pool = Pool(1.2, 9.0, 1.0)
    assert pool.run(3.0) == []
    (outcome,) = pool.run(2.0)
    assert outcome.instance_id == "1"
    assert "9.0 times as long" in outcome.reason
    assert "no new requests for 10 s" in outcome.reason
    assert pool.out() == [1]
    assert pool.ejection.num_ejected("decode") == 1
    assert pool.ejection.num_ejected("prefill") == 0


def test_a_moment_is_not_enough() -> None:
    pool = Pool(1.0, 1.0)
    for _ in range(20):
        pool.slowness[1] = 20.0
        assert pool.run(TICK_S) == []
        pool.slowness[1] = 1.0
        assert pool.run(TICK_S) == []


def test_no_word_neither_clears_nor_convicts() -> None:
    pool = Pool(1.0, 9.0)
    pool.run(2.0)
    pool.slowness[1] = 0.0
    assert pool.run(2.0) == []
    pool.slowness[1] = 9.0
    assert len(pool.run(2.0)) == 1
    fresh = Pool(1.0, 9.0)
    fresh.run(2.0)
    fresh.slowness[1] = 0.0
    assert fresh.run(60.0) == []
    fresh.slowness[1] = 9.0
    assert fresh.run(2.0) == []


def test_who_does_not_know_is_no_measure_for_others() -> None:
    assert len(Pool(9.0, 0.0).run(5.0)) == 1
    assert Pool(9.0, 8.0, 0.0).run(60.0) == []


def test_where_all_are_slow_nobody_is() -> None:
    pool = Pool(9.0, 8.0, 10.0, 11.0)
    assert pool.run(60) == []


def test_the_only_one_stays_and_so_does_half() -> None:
    assert Pool(50.0).run(60) == []
    pool = Pool(50.0, 1.0)
    pool.usable[1] = False
    assert pool.run(60) == []
    crowd = Pool(50.0, 60.0, 70.0, 1.0, 1.0, 1.0, 1.0)
    crowd.slowness[3] = 80.0
    crowd.run(8)
    assert len(crowd.out()) <= 3


def test_a_worker_comes_back_by_probes() -> None:
    pool = Pool(1.0, 9.0)
    pool.run(4)
    assert pool.out() == [1]
    (back,) = pool.run(10)
    assert back.pause_s == 0
    assert pool.out() == []
    # A few requests at a time; its old word does not count, nor does time without work.
    assert pool.run(30) == []
    pool.own[1] = 2
    assert pool.out() == [1]
    pool.run(2)
    pool.slowness[1] = 1.1
    assert pool.run(4) == []
    assert pool.out() == []


def test_one_that_is_still_slow_is_set_aside_for_longer() -> None:
    pool = Pool(1.0, 9.0)
    pool.own[1] = 1
    pauses = [outcome.pause_s for outcome in pool.run(3000) if outcome.pause_s]
    assert pauses[:6] == [10, 20, 40, 80, 160, 300]
    assert set(pauses[6:]) == {300}
    # Good times are counted too.
    pool.slowness[1] = 1.0
    pool.run(3000)
    pool.slowness[1] = 9.0
    assert next(outcome.pause_s for outcome in pool.run(10) if outcome.pause_s) == 10


def test_a_new_incarnation_begins_anew() -> None:
    pool = Pool(1.0, 9.0)
    pool.run(4)
    pool.incarnation[1], pool.slowness[1] = b"b", 0.0
    assert pool.run(5) == []
    assert pool.out() == []


def test_extreme_slowness_gives_up_what_runs_there() -> None:
    config = EjectionConfig(threshold=4.0, abandon=32.0)
    assert [outcome.abandon for outcome in Pool(1.0, 31.0, config=config).run(4)] == [False]
    (outcome,) = Pool(1.0, 33.0, config=config).run(4)
    assert outcome.abandon
    assert "goes on elsewhere" in outcome.reason


def test_it_can_be_turned_off() -> None:
    assert Pool(1.0, 1e5, config=EjectionConfig(threshold=None)).run(60) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 9.0, 99.0]), min_size=4, max_size=4), max_size=60),
    st.integers(1, 4),
)
def test_never_more_than_half(history: list[list[float]], size: int) -> None:
    pool = Pool(*[1.0] * size)
    for slownesses in history:
        pool.slowness = dict(enumerate(slownesses[:size]))
        pool.own = {index: int(slowness > 0) for index, slowness in pool.slowness.items()}
        pool.run(2)
        assert pool.ejection.num_ejected("decode") <= size // 2


@pytest.mark.parametrize("slowness", [9.0, 99.0])
async def test_a_router_sets_a_slow_worker_aside(tmp_path: Path, slowness: float) -> None:
    async with running_router(tmp_path) as router:
        other = FakeDecode("decode-1")
        await other.start()
        try:
            await router.registry.publish(router.decode, other)
            await router.until_connected("decode-0", "decode-1")
            # One stream on each; that of the slow one goes on there, or elsewhere where it is very slow.
            for worker in (router.decode, other):
                worker.pause_after = 2
            body = {"prompt": [20] * 5, "max_tokens": 6}
            running = [asyncio.create_task(router.post("/v1/completions", body)) for _ in range(2)]
            async with asyncio.timeout(10):
                while router.decode.gate.is_set() or other.gate.is_set():
                    await asyncio.sleep(0.02)
            other.load.slowness, router.decode.load.slowness = slowness, 1.0
            other.tell_load()
            router.decode.tell_load()
            async with asyncio.timeout(10):
                while 'baton_ejected_instances{pool="decode",role="router"} 1.0' not in await _metrics(router.http_url):
                    await asyncio.sleep(0.1)
            assert 'baton_ejections_total{instance="decode-1",role="router"} 1.0' in await _metrics(router.http_url)
            router.decode.pause_after = None
            router.decode.gate.set()
            for _ in range(3):
                assert (await router.post("/v1/completions", body)).status_code == 200
            if slowness > 32:
                answers = await asyncio.gather(*running)
                assert len(other.cancelled) == 1
            else:
                other.gate.set()
                answers = await asyncio.gather(*running)
            assert {a.json()["choices"][0]["text"] for a in answers} == {router.text(expected([20] * 5, 6))}
            assert len(other.submits) == 1
        finally:
            await other.stop()


async def _metrics(url: str) -> str:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"{url}/metrics")).text
