"""What every shared state does alike, and what Redis does besides when it is stopped, dead or holds strange things."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.redis_process import RedisProcess

from baton.clock import FakeClock
from baton.errors import ConfigError, UnavailableError
from baton.state.base import MAX_VALUE_BYTES, SharedState
from baton.state.memory import MemoryState
from baton.state.open import open_state
from baton.state.redis import RedisState

_LONG_S = 60.0
# On a machine with much else to do.
_PATIENT_S = 10.0


@pytest_asyncio.fixture(params=["memory", "redis"], name="state")
async def _state(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SharedState]:
    if request.param == "memory":
        yield open_state("memory://")
        return
    with RedisProcess(tmp_path / "redis") as server:
        state = RedisState(server.url, cluster="test", timeout_s=_PATIENT_S)
        yield state
        await state.close()


@pytest_asyncio.fixture(name="server")
async def _server(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    with RedisProcess(tmp_path / "redis") as server:
        yield server


@pytest_asyncio.fixture(name="redis")
async def _redis(server: RedisProcess) -> AsyncIterator[RedisState]:
    state = RedisState(server.url, cluster="test", timeout_s=3.0, probe_s=0.1)
    yield state
    await state.close()


async def _until(state: SharedState, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                await state.get("a/b")
                return
            except UnavailableError:
                await asyncio.sleep(0.02)


async def test_values_are_there_until_their_time_is_over(state: SharedState) -> None:
    assert await state.get("a/b") is None
    await state.put("a/b", b"one", ttl_s=_LONG_S)
    await state.put("a/short", bytes(range(256)), ttl_s=_LONG_S)
    await state.put("a/empty", b"", ttl_s=_LONG_S)
    assert await state.get("a/b") == b"one"
    assert await state.get("a/short") == bytes(range(256))
    assert await state.get("a/empty") == b""
    await state.put("a/short", bytes(range(256)), ttl_s=0.2)
    await asyncio.sleep(0.25)
    assert await state.get("a/short") is None
    assert await state.scan("a/") == {"a/b": b"one", "a/empty": b""}
    await state.put("a/b", b"two", ttl_s=_LONG_S)
    assert await state.get("a/b") == b"two"
    await state.delete("a/b")
    await state.delete("a/never")
    assert await state.get("a/b") is None


async def test_one_of_many_sets_a_new_value(state: SharedState) -> None:
    found = await asyncio.gather(*(state.put_new("a/b", b"%d" % i, ttl_s=_LONG_S) for i in range(20)))
    assert found.count(None) == 1
    winner = await state.get("a/b")
    assert winner == b"%d" % found.index(None)
    assert {each for each in found if each is not None} == {winner}
    await state.delete("a/b")
    assert await state.put_new("a/b", b"x", ttl_s=0.1) is None
    await asyncio.sleep(0.15)
    assert await state.put_new("a/b", b"y", ttl_s=_LONG_S) is None


async def test_one_of_many_replaces(state: SharedState) -> None:
    assert not await state.replace("a/b", b"", b"x", ttl_s=_LONG_S)
    assert await state.get("a/b") is None
    await state.put("a/b", b"old", ttl_s=_LONG_S)
    assert not await state.replace("a/b", b"other", b"x", ttl_s=_LONG_S)
    won = await asyncio.gather(*(state.replace("a/b", b"old", b"%d" % i, ttl_s=_LONG_S) for i in range(20)))
    assert won.count(True) == 1
    assert await state.get("a/b") == b"%d" % won.index(True)
    assert await state.replace("a/b", b"%d" % won.index(True), b"z", ttl_s=0.1)
    await asyncio.sleep(0.15)
    assert await state.get("a/b") is None


async def test_a_group_is_listed_alone(state: SharedState) -> None:
    assert await state.scan("a/") == {}
    for key in ("a/1", "a/2", "ab/3", "a/deeper/4", "c/5"):
        await state.put(key, key.encode(), ttl_s=_LONG_S)
    await state.put_new("a/6", b"6", ttl_s=_LONG_S)
    await state.delete("a/1")
    assert await state.scan("a/") == {"a/2": b"a/2", "a/6": b"6"}
    assert await state.scan("a/deeper/") == {"a/deeper/4": b"a/deeper/4"}


async def test_what_is_published_reaches_who_listens(state: SharedState) -> None:
    heard: list[bytes] = []
    note = heard.append

    async def listen(channel: str) -> None:
        async for message in state.listen(channel):
            note(message)

    listeners = [asyncio.create_task(listen(channel)) for channel in ("news", "news", "others")]
    async with asyncio.timeout(10):
        while heard.count(b"\x00hello") < 2:
            await state.publish("news", b"\x00hello")
            await asyncio.sleep(0.02)
        heard.clear()
        for number in range(50):
            await state.publish("others", b"%d" % number)
        while not heard or heard[-1] != b"49":
            await asyncio.sleep(0.01)
    assert [each for each in heard if each != b"\x00hello"] == [b"%d" % number for number in range(50)]
    for task in listeners:
        task.cancel()
    await asyncio.gather(*listeners, return_exceptions=True)
    await state.publish("news", b"nobody")


async def _read_all(state: SharedState, stream: str, after: str) -> tuple[str, list[bytes]]:
    found: list[bytes] = []
    while True:
        after, events = await state.read(stream, after, max_events=7, wait_s=0.01)
        assert len(events) <= 7
        if not events:
            return after, found
        found += events


async def test_a_stream_is_read_from_a_place_on(state: SharedState) -> None:
    begin = await state.end("news")
    assert await state.read("news", begin, max_events=10, wait_s=0.01) == (begin, [])
    events = [b"%d" % number for number in range(20)] + [b"", bytes(range(256))]
    for event in events[:12]:
        await state.append("news", event, max_events=100, ttl_s=_LONG_S)
    middle = await state.end("news")
    for event in events[12:]:
        await state.append("news", event, max_events=100, ttl_s=_LONG_S)
    await state.append("others", b"x", max_events=100, ttl_s=_LONG_S)
    assert await _read_all(state, "news", begin) == (await state.end("news"), events)
    assert await _read_all(state, "news", middle) == (await state.end("news"), events[12:])
    with pytest.raises(ValueError, match=str(MAX_VALUE_BYTES)):
        await state.append("news", bytes(MAX_VALUE_BYTES + 1), max_events=100, ttl_s=_LONG_S)


async def test_readers_of_a_stream_wait_for_the_next_event(state: SharedState) -> None:
    end = await state.end("news")

    async def read() -> list[bytes]:
        async with asyncio.timeout(_PATIENT_S):
            while True:
                _, events = await state.read("news", end, max_events=10, wait_s=1.0)
                if events:
                    return events

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert not any(reader.done() for reader in readers)
    await state.append("news", b"now", max_events=10, ttl_s=_LONG_S)
    assert await asyncio.gather(*readers) == [[b"now"]] * 3


async def test_a_stream_keeps_about_the_last_events_and_these_for_a_time(state: SharedState) -> None:
    begin = await state.end("news")
    for number in range(1500):
        await state.append("news", b"%d" % number, max_events=100, ttl_s=_LONG_S)
    _, kept = await _read_all(state, "news", begin)
    assert 0 < len(kept) < 400
    assert kept == [b"%d" % number for number in range(1500 - len(kept), 1500)]
    await state.append("news", b"last", max_events=100, ttl_s=0.3)  # they all have its time to live
    await asyncio.sleep(0.35)
    assert (await _read_all(state, "news", begin))[1] == []
    after = await state.end("news")
    await state.append("news", b"again", max_events=100, ttl_s=_LONG_S)
    assert (await _read_all(state, "news", after))[1] == [b"again"]


async def test_long_values_are_refused_and_closing_twice_is_fine(state: SharedState) -> None:
    value = bytes(MAX_VALUE_BYTES)
    await state.put("a/b", value, ttl_s=_LONG_S)
    assert await state.get("a/b") == value
    for refused in (
        state.put("a/b", value + b"x", ttl_s=1),
        state.put_new("a/c", value + b"x", ttl_s=1),
    ):
        with pytest.raises(ValueError, match=str(MAX_VALUE_BYTES)):
            await refused
    await state.close()
    await state.close()


async def test_clusters_do_not_see_one_another(server: RedisProcess) -> None:
    one, other, again = (RedisState(server.url, cluster=name, timeout_s=_PATIENT_S) for name in ("one", "other", "one"))
    await one.put("a/b", b"1", ttl_s=_LONG_S)
    assert await other.get("a/b") is None
    assert await other.scan("a/") == {}
    assert await again.scan("a/") == {"a/b": b"1"}
    for state in (one, other, again):
        await state.close()


async def test_a_stopped_redis_holds_nobody_up(server: RedisProcess, redis: RedisState) -> None:
    await redis.put("a/b", b"1", ttl_s=_LONG_S)
    server.stop()
    first = await asyncio.gather(
        *(redis.put("a/b", b"2", ttl_s=1) for _ in range(40)), redis.scan("a/"), return_exceptions=True
    )
    assert all(isinstance(each, UnavailableError) for each in first)
    # A thousand of them would outlast the test's own limit by far if each waited.
    for _ in range(1000):
        with pytest.raises(UnavailableError, match="is away"):
            await redis.get("a/b")
    server.go_on()
    await _until(redis)
    await redis.put("a/b", b"3", ttl_s=_LONG_S)
    assert await redis.get("a/b") == b"3"


async def test_a_redis_that_dies_comes_back_empty(server: RedisProcess, redis: RedisState) -> None:
    await asyncio.gather(*(redis.put(f"a/{i}", b"1", ttl_s=_LONG_S) for i in range(30)))
    server.kill()
    with pytest.raises(UnavailableError, match=rf"127\.0\.0\.1:{server.port}"):
        await redis.scan("a/")
    server.start()
    await _until(redis)
    assert await asyncio.gather(*(redis.get(f"a/{i}") for i in range(30))) == [None] * 30
    await redis.put("a/b", b"2", ttl_s=_LONG_S)
    assert await redis.scan("a/") == {"a/b": b"2"}


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_listener_ends_when_redis_is_away(server: RedisProcess, redis: RedisState, how: str) -> None:
    heard = asyncio.Event()

    async def listen() -> None:
        async for _ in redis.listen("news"):
            heard.set()

    task = asyncio.create_task(listen())
    async with asyncio.timeout(20):
        while not heard.is_set():
            await redis.publish("news", b"")
            await asyncio.sleep(0.01)
        getattr(server, how)()
        with pytest.raises(UnavailableError):
            await task


async def test_a_quiet_channel_is_listened_to_for_long(redis: RedisState) -> None:
    heard: list[bytes] = []
    note = heard.append

    async def listen() -> None:
        async for message in redis.listen("news"):
            note(message)

    task = asyncio.create_task(listen())
    await asyncio.sleep(3.5)  # several times what makes it ask whether Redis is there
    assert not task.done()
    await redis.publish("news", b"late")
    async with asyncio.timeout(10):
        while not heard:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert heard == [b"late"]


async def test_what_is_not_ours_is_left_out_with_one_warning(
    server: RedisProcess, redis: RedisState, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.put("a/good", b"1", ttl_s=_LONG_S)
    prefix = "baton:{test}:"
    server.ask("LPUSH", f"{prefix}a/list", "x")
    server.ask("SETRANGE", f"{prefix}a/giant", str(MAX_VALUE_BYTES), "x")
    server.ask("SET", "somebody's", "x")
    for member in ("a/list", "a/giant"):
        server.ask("ZADD", f"{prefix}index:a/", "9e15", prefix + member)
    server.ask("ZADD", f"{prefix}index:a/", "9e15", "somebody's", "9e15", b"\xff\x00")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await redis.scan("a/") == {"a/good": b"1"}
            assert await redis.get("a/list") is None
            assert await redis.get("a/giant") is None
    assert len(caplog.records) == 3
    assert await redis.put_new("a/list", b"mine", ttl_s=_LONG_S) is None
    assert await redis.get("a/list") == b"mine"
    assert not await redis.replace("a/giant", b"x", b"y", ttl_s=_LONG_S)
    await redis.put("a/giant", b"small", ttl_s=_LONG_S)
    assert await redis.scan("a/") == {"a/good": b"1", "a/list": b"mine", "a/giant": b"small"}
    server.ask("SET", f"{prefix}index:b/", "no index")
    with pytest.raises(UnavailableError, match="WRONGTYPE"):
        await redis.scan("b/")
    assert await redis.get("a/good") == b"1"


async def test_a_server_that_is_no_redis_is_away() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    state = RedisState(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", cluster="test")
    with pytest.raises(UnavailableError):
        await state.get("a/b")
    await state.close()
    server.close()


async def test_wrong_urls_and_secrets() -> None:
    assert isinstance(open_state("memory://"), MemoryState)
    for wrong in ("redis://host:port/0", "http://host"):
        with pytest.raises(ConfigError, match="state"):
            open_state(wrong)
    state = open_state("redis://:secret@127.0.0.1:1/0")
    with pytest.raises(UnavailableError) as caught:
        await state.get("a/b")
    assert "secret" not in str(caught.value)
    await state.close()


async def test_a_bucket_of_tokens_gives_no_more_than_it_has(state: SharedState) -> None:
    async def take(least: float, most: float, *, burst: float = 1000) -> tuple[float, float]:
        return await state.take_tokens("limits/a", least=least, most=most, tokens_per_s=0.5, burst_tokens=burst)

    given = await asyncio.gather(*(take(100, 100) for _ in range(20)))
    assert [granted for granted, _ in given].count(100) == 10
    assert all(wait_s == pytest.approx(200, abs=20) for granted, wait_s in given if not granted)
    await state.return_tokens("limits/a", 250, burst_tokens=1000)
    assert (await take(100, 200))[0] == pytest.approx(200)
    assert (await take(0, 200))[0] == pytest.approx(50, abs=10)
    await state.return_tokens("limits/a", 5000, burst_tokens=1000)
    # More than the burst is given by a full bucket, which is in debt then.
    assert (await take(1500, 1500))[0] == 1500
    granted, wait_s = await take(100, 100)
    assert granted == 0
    assert wait_s == pytest.approx(1200, abs=20)
    await state.return_tokens("limits/never", 10, burst_tokens=1000)


async def test_a_bucket_fills_again(state: SharedState) -> None:
    async def take() -> float:
        granted, _ = await state.take_tokens("limits/b", least=50, most=50, tokens_per_s=500, burst_tokens=50)
        return granted

    assert await take() == 50
    async with asyncio.timeout(10):
        while await take() == 0:
            await asyncio.sleep(0.01)


async def test_a_key_of_another_kind_is_no_bucket(server: RedisProcess, redis: RedisState) -> None:
    server.ask("SET", "baton:{test}:limits/a", "something else")
    with pytest.raises(UnavailableError):
        await redis.take_tokens("limits/a", least=1, most=1, tokens_per_s=1, burst_tokens=1)
    assert await redis.get("a/b") is None


async def test_a_value_that_is_set_again_and_again_takes_the_memory_of_one() -> None:
    clock = FakeClock()
    state = MemoryState(clock)
    await state.put("a/short", b"x", ttl_s=5)
    for number in range(1000):
        await state.put("a/b", b"%d" % number, ttl_s=600 + number % 7)
        await state.put(f"a/{number % 3}", b"y", ttl_s=600)
    assert len(state._ends) <= 2 * len(state._values) + 64 + 1
    clock.advance(6)
    assert sorted(await state.scan("a/")) == ["a/0", "a/1", "a/2", "a/b"]
    clock.advance(700)
    assert await state.scan("a/") == {}
    assert not state._ends
