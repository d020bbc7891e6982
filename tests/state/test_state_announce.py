"""A process's place in the shared state: taken at its start, kept, given up to its successor, told when it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.state.announce import StateAnnouncer
from baton.state.instances import CHANNEL, GROUP, LEASE_S, decode_instance, key_of
from baton.state.memory import MemoryState

_KEY = key_of("decode-0")


class _Process:
    def __init__(self, state: MemoryState, name: bytes) -> None:
        incarnation = name * 16
        self.status = pb.WorkerStatus(instance_id="decode-0", role="decode", state="ready", incarnation=incarnation)
        self.announcer = StateAnnouncer(state, lambda: self.status)
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(self.announcer.run(self.stop))

    async def speak(self) -> None:
        """Announce now, with a load of its own, so that each value is another."""
        self.status.load.running_requests += 1
        self.announcer.nudge()
        await asyncio.sleep(0.02)

    async def end(self) -> None:
        self.stop.set()
        self.announcer.nudge()
        await asyncio.wait_for(self.task, 10)


@contextlib.asynccontextmanager
async def _running(state: MemoryState, name: bytes) -> AsyncIterator[_Process]:
    process = _Process(state, name)
    await process.speak()
    try:
        yield process
    finally:
        process.task.cancel()
        await asyncio.gather(process.task, return_exceptions=True)


async def _there(state: MemoryState) -> tuple[bytes, str]:
    status = decode_instance(_KEY, await state.get(_KEY) or b"")
    assert isinstance(status, pb.WorkerStatus), status
    return status.incarnation[:1], status.state


async def test_it_is_there_again_when_the_state_lost_its_data() -> None:
    state = MemoryState()
    async with _running(state, b"A") as process:
        assert await _there(state) == (b"A", "ready")
        for lost in (b"", b"nonsense"):
            await state.delete(_KEY)
            if lost:
                await state.put(_KEY, lost, ttl_s=60)
            async with asyncio.timeout(4 * LEASE_S):
                while not isinstance(decode_instance(_KEY, await state.get(_KEY) or b""), pb.WorkerStatus):
                    await asyncio.sleep(0.02)
        process.status.state = "draining"
        await process.speak()
        assert await _there(state) == (b"A", "draining")
        await process.end()
        assert await _there(state) == (b"A", "dead")


async def test_a_successor_takes_the_place_and_keeps_it() -> None:
    state = MemoryState()
    async with _running(state, b"A") as old, _running(state, b"B") as new:
        assert await _there(state) == (b"B", "ready")
        for _ in range(3):
            await old.speak()
            assert await _there(state) == (b"B", "ready")
            await new.speak()
            assert await _there(state) == (b"B", "ready")
        await old.end()
        assert await _there(state) == (b"B", "ready")
        await new.end()
        assert await _there(state) == (b"B", "dead")


async def test_only_changes_are_published() -> None:
    state = MemoryState()
    heard: list[bytes] = []
    note = heard.append

    async def listen() -> None:
        async for message in state.listen(CHANNEL):
            note(message)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0)
    async with _running(state, b"A") as process:
        for _ in range(3):
            await process.speak()
        assert heard == [b"decode-0"]
        process.status.state = "draining"
        await process.speak()
        await process.end()
    assert heard == [b"decode-0"] * 3
    assert set(await state.scan(GROUP)) == {_KEY}
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)
