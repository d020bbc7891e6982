"""The spans of one request in its decode worker, made of its moments when it is over.

decode ─┬─ reserve ─┬─ prefill (here) or ship (elsewhere) ─┬─ attach ─┬─ first_step ┐
        └────────────────────────────────────────────────────────────┴─── write ───┴──...
"""

from __future__ import annotations

from baton.decode_worker.session import Live
from baton.tracing import Tracing

__all__ = ["record_decode"]


def record_decode(tracing: Tracing, live: Live, now_s: float) -> None:
    """Tells of a request that a router traces, and that has just ended here."""
    moments = live.moments
    span = tracing.start(
        "decode",
        start_s=moments.submitted_s,
        traceparent=live.traceparent,
        attributes={"baton.unique_id": live.key[0], "baton.attempt": live.key[1]},
    )
    if span is None:
        return
    is_here = moments.landed_s is None
    began_s = moments.taken_up_s if is_here else moments.reserved_s
    read_s = moments.sampled_s if is_here else moments.landed_s
    stretches = (
        ("reserve", moments.submitted_s, began_s),
        ("prefill" if is_here else "ship", began_s, read_s),
        ("attach", read_s, moments.first_told_s),
        ("first_step", moments.first_told_s, moments.second_s),
        ("write", moments.first_told_s, now_s),
    )
    for name, begin_s, end_s in stretches:
        if begin_s is not None and end_s is not None:
            span.record(name, begin_s, end_s)
    span.end(now_s, error=live.cancelled)
