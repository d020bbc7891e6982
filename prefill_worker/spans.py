"""The spans of one prompt in its prefill worker: prefill ─┬─ queue ─┬─ compute ─┬─ transfer ─┐ (what there was)."""

from __future__ import annotations

from itertools import pairwise

from baton.engine.request import EngineRequest
from baton.tracing import Tracing

__all__ = ["record_prefill"]


def record_prefill(
    tracing: Tracing, request: EngineRequest, times: tuple[float, float, float, float], *, error: str
) -> None:
    """Tells of a prompt that a router traces, and that is over here.

    Args:
        times: called, taken up, first token sampled (0 where it did not come to that), settled; monotonic.
    """
    span = tracing.start(
        "prefill",
        start_s=times[0],
        traceparent=request.traceparent,
        attributes={
            "baton.unique_id": request.request_id,
            "baton.attempt": request.attempt,
            "gen_ai.usage.input_tokens": request.num_tokens,
        },
    )
    if span is None:
        return
    for name, (begin_s, end_s) in zip(("queue", "compute", "transfer"), pairwise(times), strict=True):
        if begin_s and end_s:
            span.record(name, begin_s, end_s)
    span.end(times[-1], error=error)
