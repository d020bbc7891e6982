"""OpenTelemetry spans of one process, sent by OTLP over gRPC; nothing at all where `tracing.endpoint` is not set.

    tracing = open_tracing(config.tracing, role="router", instance_id="router-0")
    span = tracing.start("chat", start_s=monotonic(), traceparent=header)      None: this request is not traced
    span.record("queue", begin_s, end_s)                                       a child that is over
    child = span.start("attempt", start_s=...); child.traceparent              what others continue
    span.end(monotonic())

Times are of the monotonic clock, so that spans can be made from what was measured anyway, after the fact. Spans wait in
a queue of bounded length for a thread that sends them; when the endpoint is away they are dropped, and no request waits
or fails. The library is imported only here, and only when there is an endpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from baton.config_tracing import TracingConfig
from baton.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

__all__ = ["OpenSpan", "Tracing", "open_tracing"]

Attributes = Mapping[str, str | int | float | bool]

_MAX_WAITING_SPANS = 4096
_SEND_EVERY_MS = 500
_EXPORT_TIMEOUT_S = 3.0
_SAY_AGAIN_AFTER_S = 60.0
_MAX_HEADER_CHARS = 512
_STEP_NS = 1_000_000


class OpenSpan:
    """A span that has begun."""

    __slots__ = ("_span", "_tracing")

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span

    @property
    def trace_id(self) -> str:
        """Of the whole trace, in 32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """The W3C header that makes another process's span a child of this one."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def start(self, name: str, *, start_s: float, attributes: Attributes | None = None, kind: str = "") -> OpenSpan:
        """A child that begins at `start_s`. Kind: "client" where another process answers."""
        return self._tracing._start_child(self._span, name, start_s, attributes, kind)

    def record(self, name: str, begin_s: float, end_s: float, attributes: Attributes | None = None) -> None:
        """A child that is over."""
        self.start(name, start_s=begin_s, attributes=attributes).end(max(begin_s, end_s))

    def end(self, end_s: float, attributes: Attributes | None = None, *, error: str = "") -> None:
        """It is over; with an error where it failed."""
        if attributes:
            self._span.set_attributes(attributes)
        if error:
            self._tracing._mark_failed(self._span, error)
        self._span.end(self._tracing._unix_ns(end_s))


class Tracing:
    """Where spans are made; see `open_tracing`. Off without a provider."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer: Tracer | None = None if provider is None else provider.get_tracer("baton")
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    @property
    def is_on(self) -> bool:
        """Whether any request may be traced."""
        return self._tracer is not None

    def start(
        self,
        name: str,
        *,
        start_s: float,
        traceparent: str = "",
        tracestate: str = "",
        attributes: Attributes | None = None,
    ) -> OpenSpan | None:
        """The first span of this process in a trace, below `traceparent` where that is given and well formed.

        None where the request is not traced: there is no endpoint, or nobody wants this one.
        """
        if self._tracer is None:
            return None
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # A clock that was set since the start would part this process's spans from those of others.
        offset_ns = time.time_ns() - time.monotonic_ns()
        if abs(offset_ns - self._offset_ns) > _STEP_NS:
            self._offset_ns = offset_ns
        headers = {"traceparent": traceparent, "tracestate": tracestate}
        given = {key: text for key, text in headers.items() if text and len(text) <= _MAX_HEADER_CHARS}
        context = TraceContextTextMapPropagator().extract(given, Context())
        span = self._tracer.start_span(
            name,
            context,
            kind=SpanKind.SERVER,
            attributes=dict(attributes or {}),
            start_time=self._unix_ns(start_s),
        )
        return OpenSpan(self, span) if span.is_recording() else None

    def close(self, timeout_s: float) -> None:
        """Sends what waits, for `timeout_s` at most. Blocks."""
        if self._provider is None:
            return
        # The library's own shutdown has a deadline of half a minute.
        flushing = threading.Thread(target=self._provider.shutdown, name="baton-flush-spans", daemon=True)
        flushing.start()
        flushing.join(timeout_s)

    def _start_child(
        self, parent: Span, name: str, start_s: float, attributes: Attributes | None, kind: str
    ) -> OpenSpan:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, set_span_in_context

        assert self._tracer is not None
        span = self._tracer.start_span(
            name,
            set_span_in_context(parent, Context()),
            kind=SpanKind.CLIENT if kind == "client" else SpanKind.INTERNAL,
            attributes=dict(attributes or {}),
            start_time=self._unix_ns(start_s),
        )
        return OpenSpan(self, span)

    def _mark_failed(self, span: Span, error: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, error))

    def _unix_ns(self, monotonic_s: float) -> int:
        return int(monotonic_s * 1e9) + self._offset_ns


def open_tracing(config: TracingConfig, *, role: str, instance_id: str) -> Tracing:
    """Tracing of this process, off where no endpoint is set.

    Raises:
        ConfigError: there is an endpoint, and OpenTelemetry is not installed.
    """
    if config.endpoint is None:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint is {config.endpoint} and OpenTelemetry is not installed ({error});"
            " pip install 'baton-serve[otel]', or set tracing.endpoint: null"
        ) from error
    for name in ("opentelemetry.exporter", "opentelemetry.sdk"):
        for logger in _loggers_below(name):
            logger.addFilter(_Seldom())
    resource: dict[str, Any] = {"service.name": f"baton-{role}", "service.instance.id": instance_id}
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
        resource=Resource.create(resource),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(
                endpoint=config.endpoint,
                insecure=not config.endpoint.startswith("https://"),
                timeout=_EXPORT_TIMEOUT_S,
            ),
            max_queue_size=_MAX_WAITING_SPANS,
            schedule_delay_millis=_SEND_EVERY_MS,
        )
    )
    return Tracing(provider)


def _loggers_below(name: str) -> list[logging.Logger]:
    """Those that exist: a filter holds for its own logger only, not for those below."""
    found = logging.Logger.manager.loggerDict.items()
    return [logger for key, logger in found if key.startswith(name) and isinstance(logger, logging.Logger)]


class _Seldom(logging.Filter):
    """Lets one record through in a minute: an endpoint that is away is worth one line, not one for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self._next_s = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is written."""
        if record.created < self._next_s:
            return False
        self._next_s = record.created + _SAY_AGAIN_AFTER_S
        return True
