"""A link to a decode worker leaves no socket, however it ended: Python's cycle collector is off in here."""

from __future__ import annotations

import asyncio

import pytest
from tests.descriptors import descriptors
from tests.router.fake_worker import FakeDecode

from baton import faults
from baton.router.instances import Instance
from baton.router.links import DecodeLink

LINKS = 6
FEW = 4
TIMEOUT_S = 10.0


class Link(DecodeLink):
    """One whose ups and downs can be waited for."""

    def __init__(self, worker: FakeDecode, silence_s: float) -> None:
        self.changed = asyncio.Event()
        instance = Instance(status=worker.status())
        super().__init__(instance, router_id="r", silence_s=silence_s, on_change=self.changed.set)

    async def until(self, connected: bool) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while self.instance.connected is not connected:
                self.changed.clear()
                await self.changed.wait()


async def up_and_down(worker: FakeDecode, how: str) -> None:
    """One link that comes up and ends."""
    link = Link(worker, 0.2 if how == "silence" else TIMEOUT_S)
    link.start()
    await link.until(True)
    if how == "break":
        worker.break_streams()
    elif how == "fault":
        faults.replace(("any rpc.receive fail",))
        worker.tell_load()
    if how != "close":
        await link.until(False)
    faults.replace(())
    await link.close()


@pytest.mark.parametrize(
    ("how", "is_possible"),
    [(how, False) for how in ("close", "break", "silence")]
    + [(how, True) for how in ("close", "break", "silence", "fault")],
)
async def test_a_link_leaves_no_socket(
    no_collector: None, monkeypatch: pytest.MonkeyPatch, how: str, is_possible: bool
) -> None:
    monkeypatch.setattr(faults, "is_possible", is_possible)
    worker = FakeDecode()
    worker.beats = how != "silence"
    await worker.start()
    try:
        await up_and_down(worker, how)
        before = descriptors()
        for _ in range(LINKS):
            await up_and_down(worker, how)
        async with asyncio.timeout(TIMEOUT_S):
            while descriptors() > before + FEW:
                await asyncio.sleep(0.02)
    finally:
        faults.replace(())
        await worker.stop()
