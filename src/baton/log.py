"""Logs of one process: lines for people or JSON objects, each with the instance and, where there is one, the request.

    with request_context("abc"):              everything logged inside it, tasks started there included
        annotate(attempt=1, trace_id=...)     more about that request, from anywhere inside
    _log.info("...", extra=about("abc", 1))   one line, where no context is

`extra={"fields": {...}}` adds fields to a JSON line; lines for people have them in their text.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

__all__ = ["about", "annotate", "mark_task", "request_context", "setup_logging"]

_SHOWN_ID_CHARS = 16

_context: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("baton_log_context", default=None)


@contextmanager
def request_context(request_id: str, **fields: Any) -> Iterator[None]:
    """Attach `request_id` and `fields` to every log line written inside."""
    token = _context.set({"request_id": request_id, **fields})
    try:
        yield
    finally:
        _context.reset(token)


def mark_task(request_id: str, **fields: Any) -> None:
    """As `request_context`, for the rest of the present task."""
    _context.set({"request_id": request_id, **fields})


def annotate(**fields: Any) -> None:
    """Attach more to the lines of the present `request_context`, its other tasks' too; nothing where there is none."""
    context = _context.get()
    if context is not None:
        context.update(fields)


def about(request_id: str, attempt: int) -> dict[str, Any]:
    """For `extra=`: the request that one line speaks of."""
    return {"fields": {"request_id": request_id, "attempt": attempt}}


def setup_logging(
    *, level: str = "info", format: str = "human", instance_id: str = "", stream: TextIO | None = None
) -> None:
    """Send this process's logs to `stream` (default stderr) as "human" lines or "json"; a second call replaces it."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter(instance_id) if format == "json" else _HumanFormatter(instance_id))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "ray"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What is known about the request that `record` speaks of."""
    own = getattr(record, "fields", None)
    return {**(_context.get() or {}), **(own if isinstance(own, dict) else {})}


class _HumanFormatter(logging.Formatter):
    def __init__(self, instance_id: str) -> None:
        super().__init__()
        self._instance = f" {instance_id}" if instance_id else ""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        request_id = str(_fields_of(record).get("request_id", ""))
        request = f" [{request_id[:_SHOWN_ID_CHARS]}]" if request_id else ""
        text = f"{when} {record.levelname:<7}{self._instance} {record.name}{request}: {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JsonFormatter(logging.Formatter):
    def __init__(self, instance_id: str) -> None:
        super().__init__()
        self._instance_id = instance_id

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "instance": self._instance_id,
            **_fields_of(record),
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        shown = {key: value for key, value in entry.items() if value not in ("", None)}
        return json.dumps(shown, ensure_ascii=False, default=str)
