"""Token rates: a bucket alone, buckets that routers share, and what happens while the shared state is away."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.redis_process import RedisProcess

from baton.errors import UnavailableError
from baton.router.admission.rate_limit import RateLimit, TokenBucket
from baton.router.admission.tenants import Tenant
from baton.router.admission.token_rates import TokenRates
from baton.state.memory import MemoryState
from baton.state.redis import RedisState

_LIMIT = RateLimit(tokens_per_s=100, burst_tokens=1000)
_TENANT = Tenant(name="a", limit=_LIMIT)


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket = TokenBucket(_LIMIT, now_s=0)
    assert bucket.take(1000, 0) == 0
    assert bucket.take(50, 0) == pytest.approx(0.5)
    assert bucket.take(50, 0.5) == 0
    bucket.refund(30, 0.5)
    assert bucket.take(30, 0.5) == 0
    assert bucket.take(1000, 100) == 0


def test_a_request_over_the_burst_goes_in_once_and_is_paid_for() -> None:
    bucket = TokenBucket(_LIMIT, now_s=0)
    assert bucket.take(1500, 0) == 0
    assert bucket.take(100, 0) == pytest.approx(6)
    assert bucket.take(100, 6) == 0


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 3000), st.booleans()), max_size=50))
def test_no_bucket_gives_more_than_it_had(steps: list[tuple[float, int, bool]]) -> None:
    bucket, now_s, used = TokenBucket(_LIMIT, now_s=0), 0.0, 0.0
    largest = 0
    for pause_s, tokens, gives_back in steps:
        now_s += pause_s
        largest = max(largest, tokens)
        wait_s = bucket.take(tokens, now_s)
        assert wait_s >= 0
        if wait_s == 0:
            used += tokens
            if gives_back:
                bucket.refund(tokens / 2, now_s)
                used -= tokens / 2
        else:
            assert copy.copy(bucket).take(tokens, now_s + wait_s) == 0
        assert used <= 1000 + 100 * now_s + max(largest - 1000, 0) + 0.1


class _Counted(MemoryState):
    """Counts what it is asked, and can be away."""

    def __init__(self, clock: SimpleNamespace) -> None:
        super().__init__(clock)  # type: ignore[arg-type]
        self.asked = 0
        self.is_away = False

    async def take_tokens(
        self, key: str, *, least: float, most: float, tokens_per_s: float, burst_tokens: float
    ) -> tuple[float, float]:
        self.asked += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise UnavailableError("away")
        return await super().take_tokens(
            key, least=least, most=most, tokens_per_s=tokens_per_s, burst_tokens=burst_tokens
        )


async def test_routers_share_a_limit_and_rarely_ask() -> None:
    clock = SimpleNamespace(now=0.0, now_s=lambda: clock.now)
    state = _Counted(clock)
    routers = [TokenRates(state, max_tenants=10, num_routers=2) for _ in range(2)]
    limit = RateLimit(tokens_per_s=1000, burst_tokens=1000)
    tenant = Tenant(name="a", limit=limit)
    used, tries = 0.0, 0
    for step in range(2000):
        clock.now = step / 200
        tries += 1
        if await routers[step % 2].take(tenant, 20, clock.now) == 0:
            used += 20
            routers[step % 2].refund(tenant, 10, clock.now)
            used -= 10
        await asyncio.sleep(0)
    # The burst and ten seconds, less what the two still hold.
    assert 10_000 <= used <= 11_000
    assert state.asked < tries / 3
    for router in routers:
        await router.close()


async def test_without_the_state_each_router_counts_its_part() -> None:
    clock = SimpleNamespace(now=0.0, now_s=lambda: clock.now)
    state = _Counted(clock)
    state.is_away = True
    router = TokenRates(state, max_tenants=10, num_routers=2)
    used = 0.0
    for step in range(1000):
        clock.now = step / 100
        if await router.take(_TENANT, 10, clock.now) == 0:
            used += 10
    assert used == pytest.approx((1000 + 100 * 10) / 2, rel=0.05)
    state.is_away = False
    assert await router.take(_TENANT, 600, clock.now) == 0  # what the others have not used is there again
    await router.close()


async def test_an_empty_bucket_is_not_asked_again_at_once() -> None:
    clock = SimpleNamespace(now=0.0, now_s=lambda: clock.now)
    state = _Counted(clock)
    router = TokenRates(state, max_tenants=10)
    assert await router.take(_TENANT, 1000, 0) == 0
    waits = [await router.take(_TENANT, 500, 0.01 + number / 1000) for number in range(50)]
    assert all(wait_s > 0 for wait_s in waits)
    assert state.asked == 2
    await router.close()


async def test_routers_over_a_real_redis_and_without_it(tmp_path: Path) -> None:
    tenant = Tenant(name="a", limit=RateLimit(tokens_per_s=0.5, burst_tokens=1000))
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(RedisProcess(tmp_path / "redis"))
        routers = []
        for _ in range(2):
            state = RedisState(server.url, cluster="test", timeout_s=5.0, probe_s=60.0)
            stack.push_async_callback(state.close)
            router = TokenRates(state, max_tenants=10, num_routers=2)
            stack.push_async_callback(router.close)
            routers.append(router)
        waits = [await routers[number % 2].take(tenant, 100, float(number)) for number in range(14)]
        assert waits.count(0) in (9, 10)
        server.kill()
        # Five hundred of the thousand are each one's part, whatever was used before.
        for router in routers:
            assert [await router.take(tenant, 100, 100.0 + number / 10) for number in range(5)] == [0] * 5
            assert await router.take(tenant, 100, 101.0) > 100


async def test_what_is_missing_is_known_without_taking_or_asking() -> None:
    rates = TokenRates(None, max_tenants=10)
    assert rates.missing_s(Tenant(name="free"), 1e9, 0.0) == 0
    assert rates.missing_s(_TENANT, 1000, 0.0) == 0
    assert await rates.take(_TENANT, 1000, 0.0) == 0
    missing_s = rates.missing_s(_TENANT, 50, 0.0)
    assert missing_s == await rates.take(_TENANT, 50, 0.0) > 0
    assert rates.missing_s(_TENANT, 50, missing_s) == 0
    assert await rates.take(_TENANT, 50, missing_s) == 0

    clock = SimpleNamespace(now=0.0, now_s=lambda: clock.now)
    state = _Counted(clock)
    shared = TokenRates(state, max_tenants=10)
    assert shared.missing_s(_TENANT, 1000, 0.0) == 0, "nobody has asked yet"
    assert await shared.take(_TENANT, 1000, 0.0) == 0
    wait_s = await shared.take(_TENANT, 500, 0.001)
    assert 0 < shared.missing_s(_TENANT, 500, 0.001) <= wait_s
    assert shared.missing_s(_TENANT, 500, 10.0) == 0
    assert state.asked == 1
    await shared.close()


async def test_names_are_bounded() -> None:
    rates = TokenRates(None, max_tenants=5)
    for number in range(100):
        assert await rates.take(Tenant(name=str(number), limit=_LIMIT), 10, 0) == 0
    assert len(rates._leases) == 5
