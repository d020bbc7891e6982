"""How many slots a tenant may hold while others are about: pure. Time is an argument.

A prompt of another tenant can go before those that wait, but not before answers that are being written: a tenant that
has filled every batch with its own is felt by all, however fair the queue is. So while others have come within
RECENT_S, nobody holds more than SLACK times his share of all slots, by weight, and never less than LEAST. Whoever is
alone may have them all; what is written when another one comes is written to its end.
"""

from __future__ import annotations

from collections import OrderedDict

from baton.router.admission.tenants import Tenant

__all__ = ["LEAST", "RECENT_S", "SLACK", "SlotShares"]

RECENT_S = 10.0
SLACK = 1.5
LEAST = 2


class SlotShares:
    """One router's tenants: who has come lately, and who holds how much."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._lately: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """When each came last, and its weight, the longest ago first."""

    def came(self, account: Tenant, now_s: float) -> None:
        """A request of this tenant is here."""
        self._lately[account.name] = now_s, account.weight
        self._lately.move_to_end(account.name)

    def granted(self, account: Tenant, choices: int) -> None:
        """So many choices of it take a slot each."""
        self._held[account.name] = self._held.get(account.name, 0) + choices

    def ended(self, account: Tenant, choices: int) -> None:
        """And have given it back."""
        left = self._held[account.name] - choices
        assert left >= 0, account.name
        if left:
            self._held[account.name] = left
        else:
            del self._held[account.name]

    def is_over(self, account: Tenant, choices: int, *, slots: int, now_s: float) -> bool:
        """Whether `choices` more would be more than its share of `slots`. Never for one that holds nothing."""
        held = self._held.get(account.name, 0)
        if not held:
            return False
        while self._lately and next(iter(self._lately.values()))[0] < now_s - RECENT_S:
            self._lately.popitem(last=False)
        others = sum(weight for name, (_, weight) in self._lately.items() if name != account.name)
        if not others:
            return False
        share = slots * account.weight / (account.weight + others)
        return held + choices > max(SLACK * share, LEAST)
