"""`tracing:` of `cluster.yaml`: OpenTelemetry. Pure values."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from baton.config_section import Section

__all__ = ["TracingConfig"]


class TracingConfig(Section):
    """OpenTelemetry traces across router and workers; needs `pip install baton-serve[otel]`."""

    endpoint: Annotated[str, Field(max_length=512)] | None = None
    """Where spans go by OTLP over gRPC, for example http://127.0.0.1:4317; null: nowhere."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests that are traced, where the caller's traceparent does not say."""

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"must be a URL like http://127.0.0.1:4317, got {endpoint!r}")
        return endpoint
