"""Whether a choice was served as it was asked to be. Pure."""

from __future__ import annotations

from typing import Literal

__all__ = ["Attainment", "attainment"]

Attainment = Literal["kept", "ttft_missed", "tpot_missed"]


def attainment(
    *, ttft_limit_s: float | None, tpot_limit_s: float | None, ttft_s: float | None, duration_s: float, tokens: int
) -> Attainment | None:
    """What became of it; None: it asked for nothing.

    Args:
        ttft_s: to its first token; None: none came.
        duration_s: from its arrival to its last token.
        tokens: that it was given. The time between tokens is a mean over the answer, as in goodput of the literature.
    """
    if ttft_limit_s is None and tpot_limit_s is None:
        return None
    if ttft_s is None or (ttft_limit_s is not None and ttft_s > ttft_limit_s):
        return "ttft_missed"
    is_slow = tpot_limit_s is not None and tokens > 1 and (duration_s - ttft_s) / (tokens - 1) > tpot_limit_s
    return "tpot_missed" if is_slow else "kept"
