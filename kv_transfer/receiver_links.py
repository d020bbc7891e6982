"""The links that a decode rank holds: capped in number, the least recently used idle one gives way, silent ones end.

A prefill rank renews its leases every few seconds, also when it has none: a link on which nothing comes belongs to a
process or a host that is gone without a word. What it holds (a mapped arena, a process group) is let go then, and the
sender, should it live, makes the link anew with its next shipment.

Pure bookkeeping: who calls closes the links that are named, and says which of them are busy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from baton.errors import HandoverError

__all__ = ["ReceiverLinks"]

LinkT = TypeVar("LinkT")


class ReceiverLinks(Generic[LinkT]):
    """Open links, the least recently used first.

    Args:
        max_links: at a time, those that are being introduced included.
        silence_s: how long an idle link may say nothing.
    """

    def __init__(self, *, max_links: int, silence_s: float) -> None:
        self._max_links = max_links
        self._silence_s = silence_s
        self._heard_s: OrderedDict[LinkT, float] = OrderedDict()
        self._num_introducing = 0

    def __len__(self) -> int:
        return len(self._heard_s)

    def __iter__(self) -> Iterator[LinkT]:
        return iter(list(self._heard_s))

    def begin_introduction(self, is_busy: Callable[[LinkT], bool]) -> LinkT | None:
        """Keep a place for one more link; returns the idle link to be closed for it, which is out already, or None.

        Every call that returns is followed by one `end_introduction`.

        Raises:
            HandoverError: all links are busy.
        """
        evicted = None
        if len(self._heard_s) + self._num_introducing >= self._max_links:
            evicted = next((link for link in self._heard_s if not is_busy(link)), None)
            if evicted is None:
                raise HandoverError(f"{self._max_links} links are open and busy, which is the limit")
            del self._heard_s[evicted]
        self._num_introducing += 1
        return evicted

    def end_introduction(self, link: LinkT | None, now_s: float) -> None:
        """Its place is taken by this link, or by none when the introduction failed."""
        self._num_introducing -= 1
        if link is not None:
            self._heard_s[link] = now_s

    def heard(self, link: LinkT, now_s: float, *, is_use: bool) -> None:
        """Something came on a link. A renewal of leases is no use of it, but a sign of life."""
        if link not in self._heard_s:
            return
        self._heard_s[link] = now_s
        if is_use:
            self._heard_s.move_to_end(link)

    def discard(self, link: LinkT) -> None:
        """The link is closed."""
        self._heard_s.pop(link, None)

    def silent(self, now_s: float, is_busy: Callable[[LinkT], bool]) -> list[LinkT]:
        """Idle links on which nothing came for too long."""
        return [
            link for link, heard_s in self._heard_s.items() if now_s - heard_s >= self._silence_s and not is_busy(link)
        ]
