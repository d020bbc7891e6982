"""Shows a cluster as it is, again and again: a table that redraws itself on a terminal, tables in a row elsewhere."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from typing import Any

from baton.cluster.top.rows import Row, Table, table_of
from baton.cluster.top.sample import Sample
from baton.cluster.top.sampler import Sampler
from baton.cluster.top.table_text import HEAD, cells, plain_text

__all__ = ["show_top"]

_HITS_OVER_S = 60.0
_LONGEST_DEADLINE_S = 2.0
_BARS_FROM_CHARS = 116
"""Width of a terminal that has room for them."""


async def show_top(
    registry_address: str, api_key: str | None, *, name: str, interval_s: float, once: bool, as_json: bool
) -> None:
    """Print a table every `interval_s`, or only one.

    Raises:
        UnavailableError: the registry does not answer.
    """
    is_live = sys.stdout.isatty() and not once and not as_json
    sampler = Sampler(registry_address, api_key, deadline_s=min(max(interval_s, 0.2), _LONGEST_DEADLINE_S))
    samples: deque[Sample] = deque()
    async with sampler:
        samples.append(await sampler.take())
        screen = _Screen(name) if is_live else None
        try:
            while True:
                await asyncio.sleep(max(interval_s, 0.0))
                samples.append(await sampler.take())
                while samples[-2].at_s - samples[0].at_s > _HITS_OVER_S:
                    samples.popleft()
                table = table_of(samples[-2], samples[-1], samples[0])
                if screen is not None:
                    screen.show(table, sampler.note)
                else:
                    _print(table, sampler.note, name, as_json=as_json)
                if once:
                    return
        finally:
            if screen is not None:
                screen.close()


def _print(table: Table, note: str, name: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"cluster": name, "note": note, **table.as_dict()}), flush=True)
        return
    print(plain_text(table) + (f"\n{note}" if note else ""), flush=True)


class _Screen:
    """The table on a terminal."""

    def __init__(self, name: str) -> None:
        from rich.live import Live

        self._name = name
        self._live = Live(auto_refresh=False)
        self._live.start()

    def show(self, table: Table, note: str) -> None:
        """Draw it anew."""
        title = f"{self._name}, every {table.interval_s:.1f} s; Ctrl-C ends"
        self._live.update(_drawn(table, title, note, with_bar=self._live.console.width >= _BARS_FROM_CHARS))
        self._live.refresh()

    def close(self) -> None:
        """Leave the last one."""
        self._live.stop()


def _drawn(table: Table, title: str, note: str, *, with_bar: bool) -> Any:
    from rich.table import Table as Drawn

    drawn = Drawn(
        title=title, caption=note or None, title_justify="left", box=None, header_style="bold", pad_edge=False
    )
    for place, head in enumerate(HEAD):
        drawn.add_column(head, justify="right" if head and place >= 2 else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*cells(row, with_bar=with_bar), style=_style(row))
    drawn.add_section()
    drawn.add_row(*cells(table.total, with_bar=with_bar), style="bold")
    return drawn


def _style(row: Row) -> str:
    if row.state != "ready":
        return "red" if "no answer" in row.state or row.state == "dead" else "yellow"
    return "magenta" if row.health != "healthy" or row.is_stale else ""
