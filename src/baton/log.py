"""Logs of one process: lines for people or JSON objects, each with the instance and, where there is one, the request.

`request_context` marks everything logged inside it (asyncio tasks and threads started with a copied context included).
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO

__all__ = ["request_context", "setup_logging"]

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("baton_request_id", default="")


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Attach `request_id` to every log line written inside."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


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


class _HumanFormatter(logging.Formatter):
    def __init__(self, instance_id: str) -> None:
        super().__init__()
        self._instance = f" {instance_id}" if instance_id else ""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        request_id = _request_id.get()
        request = f" [{request_id}]" if request_id else ""
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
            "request_id": _request_id.get(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps({key: value for key, value in entry.items() if value}, ensure_ascii=False)
