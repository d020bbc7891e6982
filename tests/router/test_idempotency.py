"""Idempotency keys: what a record says, who may change it, and that of many routers one answers."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.clock import FakeClock
from baton.errors import ConflictError, InvalidRequestError, KeyReuseError
from baton.metrics import Metrics
from baton.router import answered_once, limits
from baton.router.answered_once import AnsweredOnce, Claim, Replay
from baton.router.idempotency import FREED, Budget, Done, Next, Running, Scope, check_key, decide, decode
from baton.state.memory import MemoryState

DIGEST, OTHER = b"d" * 32, b"o" * 32
SCOPE = Scope(b"key", "/v1/completions", "k")


def _once(state: MemoryState) -> AnsweredOnce:
    return AnsweredOnce(state, Metrics("router"), ttl_s=600)


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "tab\t", "é", "\x7f"])
def test_keys_are_short_visible_ascii(key: str) -> None:
    with pytest.raises(InvalidRequestError, match="1 to 255 visible ASCII"):
        check_key(key)


def test_scopes_do_not_run_together() -> None:
    scopes = [
        SCOPE,
        Scope(b"other", SCOPE.endpoint, "k"),
        Scope(b"key", "/v1/chat/completions", "k"),
        Scope(b"key", SCOPE.endpoint, "l"),
        Scope(b"key/v1/completions", "", "k"),
    ]
    assert len({scope.record_key for scope in scopes}) == len({scope.seed for scope in scopes}) == 5
    assert SCOPE.seed == Scope(b"key", "/v1/completions", "k").seed
    assert 0 <= SCOPE.seed < 2**64


@given(st.binary(max_size=200), st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_records_come_back_as_they_were(answer: bytes, headers: dict[str, str]) -> None:
    assert decode(Done(DIGEST, answer, headers).encode()) == Done(DIGEST, answer, headers)
    assert decode(Running(b"c" * 16, DIGEST).encode()) == Running(b"c" * 16, DIGEST)


@pytest.mark.parametrize("size", [0, 1, limits.MAX_KEPT_ANSWER_BYTES])
def test_records_of_any_length_that_is_kept(size: int) -> None:
    answer = random.Random(size).randbytes(size)
    record = Done(DIGEST, answer).encode()
    assert decode(record) == Done(DIGEST, answer)
    assert decode(record[:-1]) is None


def test_a_record_that_inflates_without_end_is_as_good_as_nothing() -> None:
    record = Done(DIGEST, bytes(10 * limits.MAX_KEPT_ANSWER_BYTES)).encode()
    assert decode(record) is None
    assert decide(record, DIGEST) is Next.TAKE


def test_a_stream_takes_a_tenth_of_its_length() -> None:
    answer = b"".join(
        b'data: {"id":"cmpl-1","choices":[{"index":0,"text":" %d"}]}\n\n' % number for number in range(200)
    )
    assert len(Done(DIGEST, answer).encode()) < len(answer) / 10


@given(st.binary(max_size=120))
def test_garbage_is_as_good_as_nothing(record: bytes) -> None:
    decode(record)
    if record[:1] not in (b"R", b"D"):
        assert decide(record, DIGEST) is Next.TAKE


def test_decisions() -> None:
    running, done = Running(b"c" * 16, DIGEST).encode(), Done(DIGEST, b"answer").encode()
    assert decide(FREED, DIGEST) is Next.TAKE
    assert decide(running, DIGEST) is Next.WAIT
    assert decide(done, DIGEST) is Next.REPLAY
    assert decide(running, OTHER) is decide(done, OTHER) is Next.REFUSE


def test_the_budget_comes_back_with_time() -> None:
    budget = Budget(max_bytes=2000, ttl_s=10)
    assert budget.take(1000, 0)
    assert not budget.take(1000, 9)
    assert budget.take(1000, 10)


async def test_one_answers_and_all_others_hear_it() -> None:
    state = MemoryState()
    first, second = _once(state), _once(state)
    claim = await first.begin(SCOPE, b"body")
    assert isinstance(claim, Claim)
    with pytest.raises(ConflictError):
        await second.begin(SCOPE, b"body")
    with pytest.raises(KeyReuseError):
        await second.begin(SCOPE, b"another body")
    claim.add(b"an ")
    claim.add(b"answer")
    await claim.keep({"a": "b"})
    await claim.release()
    assert await second.begin(SCOPE, b"body") == Replay(b"an answer", {"a": "b"})
    assert second.metrics.idempotency.labels(outcome="busy")._value.get() == 1


async def test_a_claim_lives_as_long_as_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answered_once, "_RENEW_EVERY_S", 0.02)
    monkeypatch.setattr(answered_once, "CLAIM_TTL_S", 0.5)
    state = MemoryState()
    first, second = _once(state), _once(state)
    claim = await first.begin(SCOPE, b"body")
    assert isinstance(claim, Claim)
    await asyncio.sleep(1.0)
    with pytest.raises(ConflictError):
        await second.begin(SCOPE, b"body")
    # The state is emptied: the claim comes back.
    await state.delete(SCOPE.record_key)
    await asyncio.sleep(0.2)
    with pytest.raises(ConflictError):
        await second.begin(SCOPE, b"body")
    await claim.release()
    again = await second.begin(SCOPE, b"body")
    assert isinstance(again, Claim)
    await again.release()


async def test_who_lost_a_claim_changes_nothing_any_more() -> None:
    clock = FakeClock()
    state = MemoryState(clock)
    first, second = _once(state), _once(state)
    late = await first.begin(SCOPE, b"body")
    clock.advance(60)  # its router stood still
    present = await second.begin(SCOPE, b"body")
    assert isinstance(late, Claim)
    assert isinstance(present, Claim)
    late.add(b"late")
    await late.keep({})
    assert late.status == "unavailable"
    await late.release()
    assert await state.get(SCOPE.record_key) == present.record
    present.add(b"present")
    await present.keep({})
    await late.release()
    await present.release()
    assert await first.begin(SCOPE, b"body") == Replay(b"present", {})


async def test_an_answer_beyond_the_bounds_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    once = _once(MemoryState())
    for bound in ("MAX_KEPT_ANSWER_BYTES", "none"):
        if bound != "none":
            monkeypatch.setattr(f"baton.router.limits.{bound}", 3)
        else:
            monkeypatch.undo()
            once.budget = Budget(max_bytes=3, ttl_s=600)
        claim = await once.begin(SCOPE, b"body")
        assert isinstance(claim, Claim)
        claim.add(b"long")
        claim.add(b"er")
        await claim.keep({})
        assert claim.status == "not-kept"
        await claim.release()


@pytest.mark.parametrize("seed", range(30))
async def test_any_order_of_events_gives_one_answer(seed: int) -> None:
    """Three routers, requests that end well, fail or die, and time: an answer that was kept is the only one ever."""
    rng, clock = random.Random(seed), FakeClock()
    state = MemoryState(clock)
    routers = [_once(state) for _ in range(3)]
    running: list[Claim] = []
    kept: bytes | None = None
    for number in range(120):
        what = rng.random()
        if what < 0.4:
            try:
                found = await rng.choice(routers).begin(SCOPE, b"body")
            except ConflictError:
                assert kept is None
                continue
            if isinstance(found, Replay):
                assert found.answer == kept
            else:
                assert kept is None
                running.append(found)
        elif what < 0.6:
            clock.advance(rng.choice([0.5, 2.0, 4.0]))
        elif running:
            claim = running.pop(rng.randrange(len(running)))
            if what < 0.7:
                answer = b"%d" % number
                claim.add(answer)
                await claim.keep({})
                if not claim.status:
                    assert kept is None
                    kept = answer
            if what < 0.85:
                await claim.release()
            else:
                claim._stop_renewal()  # died
    for claim in running:
        await claim.release()
