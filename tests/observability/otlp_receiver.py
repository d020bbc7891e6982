"""A collector of OpenTelemetry spans: a real OTLP service over gRPC that keeps what it gets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="the OTLP exporter is not installed")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc

__all__ = ["OtlpReceiver", "ReceivedSpan"]


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span as it came; ids in hexadecimal digits, times in nanoseconds since the epoch."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begin_ns: int
    end_ns: int
    attributes: dict[str, Any]
    error: str


class OtlpReceiver(rpc.TraceServiceServicer):
    """Listens on a free port of the loopback."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.endpoint = ""
        self._changed = asyncio.Condition()
        self._server = grpc.aio.server()
        rpc.add_TraceServiceServicer_to_server(self, self._server)

    async def __aenter__(self) -> OtlpReceiver:
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    async def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        """Spans of one process."""
        async with self._changed:
            for resource in request.resource_spans:
                about = _values(resource.resource.attributes)
                self.spans += [
                    ReceivedSpan(
                        about["service.name"],
                        about["service.instance.id"],
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        _values(span.attributes),
                        span.status.message,
                    )
                    for scope in resource.scope_spans
                    for span in scope.spans
                ]
            self._changed.notify_all()
        return pb.ExportTraceServiceResponse()

    async def until(self, trace_id: str, *names: str) -> list[ReceivedSpan]:
        """The spans of a trace, once ones of all these names have come."""

        def found() -> list[ReceivedSpan]:
            return [span for span in self.spans if span.trace_id == trace_id]

        async with asyncio.timeout(15), self._changed:
            await self._changed.wait_for(lambda: {span.name for span in found()} >= set(names))
        return found()


def _values(attributes: Any) -> dict[str, Any]:
    found = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        found[attribute.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found
