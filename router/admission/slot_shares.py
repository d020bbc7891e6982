"""How much of the workers a tenant may hold while others are about: pure. Time is an argument.

A prompt of another tenant can go before those that wait, but not before answers that are being written, nor before
prompts that workers have in hand: a tenant that has filled those with its own is felt by all, however fair the queue
is. So while others have come within RECENT_S,

- nobody holds more than SLACK times his share of all slots, by weight, and never less than LEAST;
- whoever holds more than his share has no more prompts read at a time than there are workers to read them, and workers
  serve these after all others' (`Standing.BEYOND`).

Whoever is alone may have everything; what is written when another one comes is written to its end.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum

from baton.router.admission.tenants import Tenant

__all__ = ["LEAST", "RECENT_S", "SLACK", "SlotShares", "Standing"]

RECENT_S = 10.0
SLACK = 1.5
LEAST = 2


class Standing(Enum):
    """Of a tenant that wants more."""

    WITHIN = "within"
    """his share."""
    BEYOND = "beyond"
    """it, by what may be lent him."""
    OVER = "over"
    """all that he may have."""


class SlotShares:
    """One router's tenants: who has come lately, and who holds how much."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._unread: dict[str, int] = {}
        """Of what is held, choices whose first token has not come."""
        self._lately: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """When each came last, and its weight, the longest ago first."""

    def came(self, account: Tenant, now_s: float) -> None:
        """A request of this tenant is here."""
        self._lately[account.name] = now_s, account.weight
        self._lately.move_to_end(account.name)

    def granted(self, account: Tenant, choices: int) -> None:
        """So many choices of it take a slot each, and have a prompt to be read."""
        for counts in (self._held, self._unread):
            counts[account.name] = counts.get(account.name, 0) + choices

    def began(self, account: Tenant, choices: int) -> None:
        """Their prompts are read."""
        _take_off(self._unread, account.name, choices)

    def ended(self, account: Tenant, choices: int, *, has_begun: bool) -> None:
        """They have given their slots back; `has_begun`: their prompts had been read."""
        _take_off(self._held, account.name, choices)
        if not has_begun:
            _take_off(self._unread, account.name, choices)

    def standing(self, account: Tenant, choices: int, *, slots: int, readers: int, now_s: float) -> Standing:
        """Where a tenant would be with `choices` more. Within, for one that holds nothing.

        Args:
            slots: of all workers.
            readers: workers that read prompts.
        """
        held = self._held.get(account.name, 0)
        if not held:
            return Standing.WITHIN
        while self._lately and next(iter(self._lately.values()))[0] < now_s - RECENT_S:
            self._lately.popitem(last=False)
        others = sum(weight for name, (_, weight) in self._lately.items() if name != account.name)
        if not others:
            return Standing.WITHIN
        share = slots * account.weight / (account.weight + others)
        if held + choices <= share:
            return Standing.WITHIN
        is_over = held + choices > max(SLACK * share, LEAST) or self._unread.get(account.name, 0) >= readers
        return Standing.OVER if is_over else Standing.BEYOND


def _take_off(counts: dict[str, int], name: str, choices: int) -> None:
    left = counts[name] - choices
    assert left >= 0, name
    if left:
        counts[name] = left
    else:
        del counts[name]
