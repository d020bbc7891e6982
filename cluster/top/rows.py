"""From two samples to a table of what happened between them: pure.

Rates are differences of counters over time. Where a process is new, or started anew in between, there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baton.cluster.top.sample import Reading, Sample

__all__ = ["Row", "Table", "table_of"]

_ROLES = ("router", "prefill", "decode")
_OF_ONE = frozenset(("role", "detail", "step_s", "slowness", "health", "is_stale"))
"""What has no meaning for all together."""
_DELTAS = {
    "prompt": "baton_prompt_tokens_total",
    "generated": "baton_generation_tokens_total",
    "sent": "baton_handover_bytes_total",
    "looked_up": "baton_prefix_cache_queries_tokens_total",
    "hit": "baton_prefix_cache_hit_tokens_total",
    "step_s": "baton_step_seconds_sum",
    "steps": "baton_step_seconds_count",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One process, or all together. None: not known, or nothing of the kind happened.

    Attributes:
        waiting, running: requests.
        kv_share: owned blocks over all, in [0, 1].
        sent_bytes_s: KV pages handed over, by who sends them.
        hit_share: prompt tokens found in the prefix cache over those looked up, in [0, 1]; since the process started
            where none were looked up in between.
        step_s: of a mean step.
    """

    instance: str
    role: str = ""
    state: str = ""
    detail: str = ""
    waiting: int | None = None
    running: int | None = None
    kv_share: float | None = None
    prompt_tokens_s: float | None = None
    generated_tokens_s: float | None = None
    sent_bytes_s: float | None = None
    hit_share: float | None = None
    step_s: float | None = None
    slowness: float | None = None
    health: str = "healthy"
    is_stale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows by role and number, and their sum: requests and tokens as clients see them, so as routers count them."""

    interval_s: float
    rows: tuple[Row, ...]
    total: Row

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "interval_s": self.interval_s,
            "rows": [asdict(row) for row in self.rows],
            "total": {key: value for key, value in asdict(self.total).items() if key not in _OF_ONE},
        }


def table_of(before: Sample | None, after: Sample, earlier: Sample | None = None) -> Table:
    """What happened between two samples.

    Args:
        earlier: prefix hits are told since then; None: since `before`.
    """
    interval_s = after.at_s - before.at_s if before is not None else 0.0
    then = _by_id(before)
    long_ago = _by_id(earlier if earlier is not None else before)
    readings = sorted(after.readings, key=_place)
    told = []
    for reading in readings:
        deltas = _deltas(then.get(reading.instance_id), reading)
        since = _deltas(long_ago.get(reading.instance_id), reading)
        told.append((reading, deltas, since or deltas))
    rows = tuple(_row(reading, deltas, since, interval_s) for reading, deltas, since in told)
    return Table(interval_s=interval_s, rows=rows, total=_total(rows, told, interval_s))


_Told = tuple[Reading, Mapping[str, float], Mapping[str, float]]


def _row(reading: Reading, deltas: Mapping[str, float], since: Mapping[str, float], interval_s: float) -> Row:
    page = reading.page
    blocks = page.kv_blocks if page is not None else reading.kv_blocks
    is_router = reading.role == "router"
    return Row(
        instance=reading.instance_id,
        role=reading.role,
        state=reading.state if reading.answered else f"{reading.state}, no answer",
        detail=reading.detail,
        waiting=page.waiting if page is not None else reading.waiting,
        running=page.running if page is not None else reading.running,
        kv_share=None if is_router else _ratio(blocks.get("owned", 0), sum(blocks.values())),
        prompt_tokens_s=_ratio(deltas.get("prompt"), interval_s),
        generated_tokens_s=_ratio(deltas.get("generated"), interval_s),
        sent_bytes_s=_ratio(deltas.get("sent"), interval_s) if reading.role == "prefill" else None,
        hit_share=_hit_share([(reading, since)]),
        step_s=None if is_router else _ratio(deltas.get("step_s"), deltas.get("steps", 0.0)),
        slowness=reading.slowness or None,
        health=reading.health,
        is_stale=reading.is_stale,
    )


def _total(rows: Sequence[Row], told: Sequence[_Told], interval_s: float) -> Row:
    routers = [row for row in rows if row.role == "router"]
    workers = [each for each in told if each[0].role != "router"]
    blocks = [reading.page.kv_blocks if reading.page else reading.kv_blocks for reading, _, _ in workers]
    return Row(
        instance="all",
        state=f"{sum(row.state == 'ready' for row in rows)} of {len(rows)} ready",
        waiting=sum(row.waiting or 0 for row in routers),
        running=sum(row.running or 0 for row in routers),
        kv_share=_ratio(sum(b.get("owned", 0) for b in blocks), sum(sum(b.values()) for b in blocks)),
        prompt_tokens_s=_sum(row.prompt_tokens_s for row in routers),
        generated_tokens_s=_sum(row.generated_tokens_s for row in routers),
        sent_bytes_s=_sum(row.sent_bytes_s for row in rows),
        hit_share=_hit_share([(reading, since) for reading, _, since in told if reading.role == "router"]),
    )


def _by_id(sample: Sample | None) -> dict[str, Reading]:
    return {reading.instance_id: reading for reading in sample.readings} if sample is not None else {}


def _place(reading: Reading) -> tuple[int, int, str]:
    role = _ROLES.index(reading.role) if reading.role in _ROLES else len(_ROLES)
    number = reading.instance_id.rpartition("-")[2]
    return role, int(number) if number.isdecimal() else 0, reading.instance_id


def _deltas(before: Reading | None, after: Reading) -> dict[str, float]:
    """What was counted between two readings; nothing where they cannot be compared."""
    if before is None or before.page is None or after.page is None or before.incarnation != after.incarnation:
        return {}
    deltas = {
        key: after.page.counters.get(name, 0.0) - before.page.counters.get(name, 0.0) for key, name in _DELTAS.items()
    }
    return deltas if min(deltas.values()) >= 0 else {}


def _hit_share(told: Sequence[tuple[Reading, Mapping[str, float]]]) -> float | None:
    looked_up = sum(deltas.get("looked_up", 0.0) for _, deltas in told)
    if looked_up:
        return sum(deltas.get("hit", 0.0) for _, deltas in told) / looked_up
    pages = [reading.page.counters for reading, _ in told if reading.page is not None]
    return _ratio(
        sum(page.get(_DELTAS["hit"], 0.0) for page in pages), sum(page.get(_DELTAS["looked_up"], 0.0) for page in pages)
    )


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _ratio(part: float | None, whole: float) -> float | None:
    return part / whole if part is not None and whole else None
