"""A fresh router per test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from tests.router.harness import Harness, running_router


@pytest_asyncio.fixture
async def router(tmp_path: Path) -> AsyncIterator[Harness]:
    async with running_router(tmp_path) as harness:
        yield harness
