"""What of a handover's transfer is not hidden behind the prefill, by link, fitted to what prefill workers reply. Pure.

    exposed seconds = a + b * tokens shipped        of one (prefill, decode) pair

A pair that was never used leans on all others' fit, and before there is any on a guess.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from baton.router.costs.least_squares import LeastSquares

__all__ = ["MAX_LINKS", "TransferCosts"]

_PRIOR = (4e-3, 1e-6)
_SCALES = (1.0, 512.0)
_LEAST_S = 1e-4
"""What is less counts as this: errors are relative."""
MAX_LINKS = 4096
"""The oldest goes first."""

Link = tuple[str, str]


class TransferCosts:
    """All links' laws."""

    def __init__(self) -> None:
        self._all = LeastSquares(prior=_PRIOR, scales=_SCALES)
        self._links: dict[Link, LeastSquares] = {}

    def learn(self, link: Link, *, tokens: int, exposed_s: float) -> None:
        """One handover over (prefill id, decode id)."""
        features, exposed_s = (1.0, float(tokens)), max(exposed_s, _LEAST_S)
        self._all.observe(features, exposed_s)
        fit = self._links.get(link)
        if fit is None:
            if len(self._links) >= MAX_LINKS:
                del self._links[next(iter(self._links))]
            fit = self._links[link] = LeastSquares(prior=self._all.coefficients, scales=_SCALES)
        fit.set_prior(self._all.coefficients)
        fit.observe(features, exposed_s)

    def exposed_s(self, link: Link, tokens: int) -> float:
        """What a handover of so many tokens adds to the time of its prefill."""
        return self._links.get(link, self._all).predict((1.0, float(tokens)))

    def keep(self, instance_ids: Iterable[str]) -> None:
        """Forget links of other workers."""
        kept = set(instance_ids)
        self._links = {link: fit for link, fit in self._links.items() if kept.issuperset(link)}

    def report(self) -> dict[str, Any]:
        """All laws."""
        return {
            "all": _report(self._all),
            "links": {f"{prefill}>{decode}": _report(fit) for (prefill, decode), fit in sorted(self._links.items())},
        }


def _report(fit: LeastSquares) -> dict[str, Any]:
    a, b = fit.coefficients
    return {
        "coefficients": {"handover": a, "token": b},
        "units": {"handover": "s per handover", "token": "s per token shipped"},
        "samples": fit.samples,
        "relative_error": fit.error,
        "relative_bias": fit.bias,
    }
