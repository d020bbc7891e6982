"""What each worker was given to compute lately: pure. A sum that fades, so that what is long past does not count."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["RecentWork"]

_MAX_HALVINGS = 64.0


class RecentWork:
    """Prompt tokens by instance; `half_life_s` later they count half.

    Kept as they would count at one moment that all share, so that reading them is one multiplication each.
    """

    def __init__(self, half_life_s: float = 900.0) -> None:
        assert half_life_s > 0, half_life_s
        self._half_life_s = half_life_s
        self._tokens: dict[str, float] = {}
        self._since_s = 0.0

    def add(self, instance_id: str, tokens: float, now_s: float) -> None:
        """A worker is given `tokens` to compute; fewer than none takes back what it was not asked to do after all."""
        growth = self._growth(now_s)
        self._tokens[instance_id] = max(self._tokens.get(instance_id, 0.0) + tokens * growth, 0.0)

    def tokens(self, instance_ids: Iterable[str], now_s: float) -> dict[str, float]:
        """What counts now, for workers of one role.

        One that is new begins with the mean of the others: it is not behind them, and must not be flooded.
        """
        ids = list(instance_ids)
        new = [each for each in ids if each not in self._tokens]
        if new:
            known = [self._tokens[each] for each in ids if each in self._tokens]
            self._tokens.update(dict.fromkeys(new, sum(known) / len(known) if known else 0.0))
        growth = self._growth(now_s)
        return {each: self._tokens[each] / growth for each in ids}

    def forget(self, instance_id: str) -> None:
        """The worker is gone; who comes back under its name is new."""
        self._tokens.pop(instance_id, None)

    def _growth(self, now_s: float) -> float:
        halvings = (now_s - self._since_s) / self._half_life_s
        if halvings > _MAX_HALVINGS:
            factor = 2.0 ** -min(halvings, 1000.0)
            self._tokens = {each: tokens * factor for each, tokens in self._tokens.items()}
            self._since_s, halvings = now_s, 0.0
        return float(2.0**halvings)
