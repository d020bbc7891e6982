"""One line per generation in the log: who asked for what, how it ended, what it took and who served it.

    POST /v1/chat/completions 200 in 0.942 s: stop, 512 (256 cached) + 64 tokens, first after 0.105 s, p-0 > d-1

As JSON the same as fields. `log.requests: false` turns it off.
"""

from __future__ import annotations

import logging
from typing import Any

from baton.router.journal import Visit

__all__ = ["log_visit"]

_log = logging.getLogger("baton.access")


def log_visit(visit: Visit, *, request_id: str, status: int | str, duration_s: float) -> None:
    """Write the line of a call that is over.

    Args:
        status: of HTTP, or the name of gRPC's.
    """
    if not _log.isEnabledFor(logging.INFO):
        return
    summary = {} if visit.journal is None else visit.journal.summary()
    fields: dict[str, Any] = {
        "request_id": request_id,
        "route": visit.route,
        "status": status,
        "duration_s": round(duration_s, 6),
        **summary,
    }
    if visit.journal is not None and visit.journal.trace_id:
        fields["trace_id"] = visit.journal.trace_id
    _log.info("%s", _line(fields), extra={"fields": fields})


def _line(fields: dict[str, Any]) -> str:
    line = f"{fields['route']} {fields['status']} in {fields['duration_s']:.3f} s"
    if "outcome" not in fields:
        return line
    cached = f" ({fields['cached_tokens']} cached)" if fields["cached_tokens"] else ""
    parts = [fields["outcome"], f"{fields['prompt_tokens']}{cached} + {fields['completion_tokens']} tokens"]
    if "ttft_s" in fields:
        parts.append(f"first after {fields['ttft_s']:.3f} s")
    pair = [fields[key] for key in ("prefill_instance", "decode_instance") if key in fields]
    if pair:
        parts.append(" > ".join(dict.fromkeys(pair)))
    if "error" in fields:
        parts.append(fields["error"])
    return f"{line}: {', '.join(parts)}"
