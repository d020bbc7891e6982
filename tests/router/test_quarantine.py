"""Who is to blame for workers that die: the poisonous request, after two or three deaths, and nobody else ever."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tests.router.fake_worker import FakeDecode, expected
from tests.router.harness import running_router

from baton.router.quarantine import Quarantine, Verdict


def test_silence_counts_half() -> None:
    quarantine = Quarantine()
    quarantine.lost("r", b"1")
    quarantine.lost("r", b"2", is_silent=True)
    quarantine.lost("r", b"2", is_silent=True)
    assert not quarantine.is_suspected("r")
    assert quarantine.judge("r", _dead) is Verdict.FREE
    quarantine.lost("r", b"3", is_silent=True)
    assert quarantine.is_suspected("r")
    assert quarantine.judge("r", lambda worker: worker == b"3") is Verdict.FREE
    quarantine.lost("r", b"2")
    assert quarantine.judge("r", _dead) is Verdict.GUILTY


def _dead(_: bytes) -> bool:
    return False


def test_two_deaths_convict() -> None:
    quarantine = Quarantine()
    quarantine.lost("r", b"1")
    assert not quarantine.is_suspected("r")
    assert quarantine.judge("r", _dead) is Verdict.FREE
    quarantine.lost("r", b"1")
    assert not quarantine.is_suspected("r")
    quarantine.lost("r", b"2")
    assert quarantine.is_suspected("r")
    assert quarantine.judge("r", _dead) is Verdict.GUILTY


def test_a_worker_that_lives_is_no_evidence() -> None:
    quarantine = Quarantine()
    for worker in (b"1", b"2", b"3"):
        quarantine.lost("r", worker)
    assert quarantine.judge("r", lambda worker: worker != b"2") is Verdict.FREE
    quarantine.lost("r", b"4")
    assert quarantine.judge("r", _dead) is Verdict.GUILTY


def test_tokens_prove_innocence() -> None:
    quarantine = Quarantine()
    quarantine.lost("r", b"1")
    quarantine.proven("r")
    quarantine.lost("r", b"2")
    assert quarantine.judge("r", _dead) is Verdict.FREE


def test_company_is_tried_one_by_one() -> None:
    quarantine = Quarantine()
    for worker in (b"1", b"2"):
        for request in ("poison", "innocent"):
            quarantine.lost(request, worker)
    assert quarantine.judge("poison", _dead) is Verdict.ALONE
    assert quarantine.judge("innocent", _dead) is Verdict.ALONE
    assert quarantine.enter("innocent")
    assert not quarantine.enter("poison")
    quarantine.proven("innocent")
    assert quarantine.enter("poison")
    quarantine.lost("poison", b"3")
    assert quarantine.judge("poison", _dead) is Verdict.GUILTY


def test_one_shared_death_is_no_company() -> None:
    quarantine = Quarantine()
    quarantine.lost("poison", b"1")
    quarantine.lost("innocent", b"1")
    quarantine.lost("poison", b"2")
    assert quarantine.judge("poison", _dead) is Verdict.GUILTY
    assert quarantine.judge("innocent", _dead) is Verdict.FREE


@given(st.randoms(use_true_random=False), st.integers(1, 6), st.integers(1, 4))
def test_the_poison_is_found_and_nobody_else(random: object, num_innocent: int, num_workers: int) -> None:
    """Requests begin on random workers, in rounds; the poison kills whatever it begins on."""
    choice = random.choice  # type: ignore[attr-defined]
    quarantine, deaths = Quarantine(), 0
    beginning = ["poison", *(f"innocent-{index}" for index in range(num_innocent))]
    alone: list[str] = []
    while beginning or alone:
        if not beginning:
            assert quarantine.enter(alone[0])
            beginning = [alone.pop(0)]
        places = {request: choice(range(num_workers)) for request in beginning}
        poisoned = places.get("poison")
        killed = [request for request in beginning if places[request] == poisoned]
        for request in set(beginning) - set(killed):
            quarantine.proven(request)
        deaths += bool(killed)
        beginning = []
        for request in killed:
            quarantine.lost(request, b"%d" % deaths)
        for request in killed:
            verdict = quarantine.judge(request, _dead)
            quarantine.leave(request)
            if verdict is Verdict.GUILTY:
                assert request == "poison"
            elif verdict is Verdict.ALONE:
                alone.append(request)
            else:
                beginning.append(request)
    assert 2 <= deaths <= 3


def test_the_oldest_are_forgotten() -> None:
    quarantine = Quarantine()
    for index in range(5000):
        quarantine.lost(f"r{index}", b"1")
    assert len(quarantine._records) == 4096


async def test_a_connection_that_breaks_twice_convicts_nobody(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        router.decode.break_after = 0
        body = {"prompt": [20] * 5, "max_tokens": 6}
        running = asyncio.create_task(router.post("/v1/completions", body))
        await router.decode.until(lambda: len(router.decode.submits) == 1)
        router.decode.break_after = 0
        answer = await running
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == router.text(expected([20] * 5, 6))


async def test_workers_that_were_back_meanwhile_are_no_evidence_when_they_are_lost_again(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        workers = [router.decode, FakeDecode("decode-1")]
        await workers[1].start()
        ports = [int(worker.address.rpartition(":")[2]) for worker in workers]
        for worker in workers:
            worker.dies_of = 5
        await router.registry.publish(*workers)
        await router.until_connected("decode-0", "decode-1")
        try:
            running = asyncio.create_task(router.post("/v1/completions", {"prompt": [20] * 5, "max_tokens": 6}))
            for worker in workers:
                await worker.until(lambda worker=worker: len(worker.submits) == 1 and len(worker.hellos) == 2)
                worker.dies_of = None
            # Before the verdict, which comes a second after the second loss, both are lost once more.
            for worker in workers:
                await worker.stop()
            await asyncio.sleep(1.5)
            for worker, port in zip(workers, ports, strict=True):
                await worker.start(port)
            answer = await running
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == router.text(expected([20] * 5, 6))
        finally:
            await workers[1].stop()


async def test_a_poisonous_request_is_refused_and_its_neighbours_are_served(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        workers = [router.decode, *(FakeDecode(f"decode-{index}") for index in range(1, 5))]
        for worker in workers[1:]:
            await worker.start()
        for worker in workers:
            worker.dies_of = 7
        dead: set[str] = set()

        async def bury() -> None:
            """Takes whoever got the poison off the list."""
            while True:
                for worker in workers:
                    has_died = any(len(submit.request.prompt_token_ids) == 7 for submit in worker.submits)
                    if has_died and worker.instance_id not in dead:
                        dead.add(worker.instance_id)
                        await worker.stop()
                        await router.registry.publish(*(w for w in workers if w.instance_id not in dead))
                await asyncio.sleep(0.01)

        await router.registry.publish(*workers)
        await router.until_connected(*(worker.instance_id for worker in workers))
        burying = asyncio.create_task(bury())
        try:
            body = {"prompt": [20] * 5, "max_tokens": 60}
            for worker in workers:
                worker.plain_pause_s = 0.02
            neighbours = [asyncio.create_task(router.post("/v1/completions", body)) for _ in range(10)]
            poison = await router.post("/v1/completions", {"prompt": [20] * 7})
            assert poison.status_code == 500
            assert poison.json()["error"]["code"] == "request_quarantined"
            assert poison.headers["X-Should-Retry"] == "false"
            assert 2 <= len(dead) <= 3
            for answer in await asyncio.gather(*neighbours):
                assert answer.json()["choices"][0]["text"] == router.text(expected([20] * 5, 60))
        finally:
            burying.cancel()
            for worker in workers[1:]:
                await worker.stop()
