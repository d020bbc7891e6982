"""What was read of every process of a cluster at one moment: pure. Metrics pages become the few numbers that count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Page", "Reading", "Sample", "read_page"]

_COUNTERS = (
    "baton_prompt_tokens_total",
    "baton_generation_tokens_total",
    "baton_handover_bytes_total",
    "baton_prefix_cache_queries_tokens_total",
    "baton_prefix_cache_hit_tokens_total",
    "baton_step_seconds_sum",
    "baton_step_seconds_count",
)
_KV_STATES = ("free", "cached", "owned")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Of one metrics page. What the page lacks is 0.

    Attributes:
        kv_blocks: by state ("free", "cached", "owned").
        counters: by the name of the sample.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One process.

    Attributes:
        state, detail: as the registry lists it.
        page: None: it serves none, or did not answer in time, which `answered` tells.
        slowness: of its steps, over its own best; 0: not known.
        health: "healthy", "ejected" or "probing", as the first router that does not call it healthy says.
        is_stale: a router does not know any more what its cache holds.
        running, waiting, kv_blocks: as last announced, for where there is no page.
    """

    instance_id: str
    role: str
    state: str
    detail: str = ""
    incarnation: str = ""
    page: Page | None = None
    answered: bool = True
    slowness: float = 0.0
    health: str = "healthy"
    is_stale: bool = False
    running: int = 0
    waiting: int = 0
    kv_blocks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A whole cluster. `at_s` is on a monotonic clock."""

    at_s: float
    readings: tuple[Reading, ...] = ()


def read_page(text: str) -> Page:
    """The numbers of a page in Prometheus' text format; those of several labels are summed.

    Raises:
        ValueError: it is none.
    """
    sums: dict[str, float] = dict.fromkeys(_COUNTERS, 0.0)
    gauges = {"baton_requests_running": 0.0, "baton_requests_waiting": 0.0}
    blocks: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
            elif sample.name in gauges:
                gauges[sample.name] += sample.value
            elif sample.name == "baton_kv_blocks" and (state := sample.labels.get("state", "")) in _KV_STATES:
                blocks[state] = blocks.get(state, 0) + int(sample.value)
    return Page(
        running=int(gauges["baton_requests_running"]),
        waiting=int(gauges["baton_requests_waiting"]),
        kv_blocks=blocks,
        counters=sums,
    )
