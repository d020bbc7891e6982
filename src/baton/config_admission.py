"""`admission:` of `cluster.yaml`: who is let in, in which order, and who is refused early. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from baton.config_section import Section

__all__ = ["AdmissionConfig", "ClassConfig", "NamedTenantConfig", "SloConfig", "TenantConfig"]

_Milliseconds = Annotated[float, Field(gt=0, le=86_400_000, allow_inf_nan=False)]
_Weight = Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)]
_Tokens = Annotated[float, Field(ge=1, le=1e12, allow_inf_nan=False)]
_ApiKey = Annotated[str, Field(min_length=8, max_length=512)]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class SloConfig(Section):
    """What requests are held to that do not say it themselves."""

    ttft_ms: _Milliseconds | None = None
    """To the first token, in milliseconds; null: whatever it takes."""
    tpot_ms: _Milliseconds | None = None
    """Between tokens after the first, in milliseconds; null: whatever it takes."""


class ClassConfig(Section):
    """A class of requests, which they name as `priority_class`."""

    priority: int = Field(default=0, ge=-1000, le=1000)
    """Lower goes first, as long as no other class is far behind its share."""
    weight: _Weight = 1.0
    """Its share of the work while others wait too, over the sum of their weights."""
    slo: SloConfig = SloConfig()
    max_queued_requests: int = Field(default=1024, ge=1, le=1_000_000)
    """Requests of this class that may wait; more are refused with 429."""


class TenantConfig(Section):
    """What a tenant may use."""

    weight: _Weight = 1.0
    """Its share of its class's work while other tenants wait too, over the sum of their weights."""
    tokens_per_s: _Tokens | None = None
    """Prompt and output tokens; more is refused with 429 until they are there. Null: no limit."""
    burst_tokens: _Tokens | None = None
    """Tokens that may be used at once after a pause; null: those of ten seconds."""
    max_queued_requests: int = Field(default=256, ge=1, le=1_000_000)
    """Requests of this tenant that may wait; more are refused with 429; who names none is not held to it."""

    @model_validator(mode="after")
    def _check_burst(self) -> Self:
        if self.burst_tokens is not None and self.tokens_per_s is None:
            raise ValueError(f"burst_tokens={self.burst_tokens:g} means nothing without tokens_per_s")
        return self


class NamedTenantConfig(TenantConfig):
    """A tenant that is known by name, or by keys of its own."""

    api_keys: Annotated[tuple[_ApiKey, ...], Field(max_length=64)] = Field(default=(), repr=False)
    """Requests with one of these are this tenant's, and no others are; none: whoever sends its name is believed."""


class AdmissionConfig(Section):
    """Priority classes, tenants' shares, and early refusal."""

    reject_early: bool = True
    """Refuse a request at once where its predicted time to the first token misses what it asks for."""
    reject_slack: float = Field(default=1.0, ge=0.5, le=10.0)
    """How far a prediction may pass what is asked for before a request is refused, as a factor."""
    classes: Annotated[Mapping[_Name, ClassConfig], Field(min_length=1, max_length=64)] = {
        "interactive": ClassConfig(priority=0, weight=8.0),
        "batch": ClassConfig(priority=10, weight=1.0),
    }
    """Classes by name; these take the place of the two that there are else."""
    default_class: str = "interactive"
    """Class of requests that name none."""
    tenants: Annotated[Mapping[_Name, NamedTenantConfig], Field(max_length=10_000)] = {}
    """Tenants by name, as `X-Baton-Tenant` says it or their API keys do; any other name gets `default_tenant`."""
    default_tenant: TenantConfig = TenantConfig()
    max_tenants: int = Field(default=1000, ge=1, le=100_000)
    """Tenants that have an account of their own; those beyond share one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.default_class not in self.classes:
            raise ValueError(f"default_class={self.default_class!r} is none of {', '.join(self.classes)}")
        if len(self.tenants) > self.max_tenants:
            raise ValueError(f"max_tenants={self.max_tenants} is below the {len(self.tenants)} tenants that are named")
        owners: dict[str, str] = {}
        for name, tenant in self.tenants.items():
            for key in tenant.api_keys:
                if owners.setdefault(key, name) != name:
                    raise ValueError(f"tenants {owners[key]} and {name} have an API key in common")
        return self

    @property
    def has_keys(self) -> bool:
        """Whether some tenant has keys of its own."""
        return any(tenant.api_keys for tenant in self.tenants.values())
