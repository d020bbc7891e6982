"""Prometheus metrics: one registry per process, every family with base units and the label `role`.

    metrics = Metrics("decode")
    metrics.time_to_first_token_s.observe(0.12)
    metrics.handovers.labels(outcome="attached").inc()
    metrics.set_kv_blocks(free=90, cached=8, owned=2)
    page = metrics.render()

`Metrics` binds `role` once; families with a further label (see each attribute) take it through `labels`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Counted
from collections.abc import Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# When a family's child was made says nothing that a scrape does not, and costs a series for each.
disable_created_metrics()  # type: ignore[no-untyped-call]

_LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160
)  # fmt: skip
_PHASE_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60
)  # fmt: skip
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960)
_HANDOVER_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class LabelledCounter:
    """A counter with `role` filled in and one label left."""

    def __init__(self, counter: Counter, role: str) -> None:
        self._counter, self._role = counter, role

    def labels(self, **labels: str) -> Counter:
        """The child for these label values."""
        return self._counter.labels(role=self._role, **labels)


class LabelledGauge:
    """A gauge with `role` filled in and one label left."""

    def __init__(self, gauge: Gauge, role: str) -> None:
        self._gauge, self._role = gauge, role

    def labels(self, **labels: str) -> Gauge:
        """The child for these label values."""
        return self._gauge.labels(role=self._role, **labels)


class Metrics:
    """Metric families of one process of `role` "prefill", "decode" or "router".

    Attributes (histograms in seconds):
        time_to_first_token_s, inter_token_latency_s, request_duration_s, queue_time_s, handover_s, step_s: histograms.
        block_size, num_blocks: as told to `set_kv_cache`.
        requests_running, requests_waiting, kv_usage_ratio: gauges; usage is owned blocks over all blocks, in [0, 1].
        prefix_cache_queries_tokens, prefix_cache_hit_tokens, prompt_tokens, generation_tokens, preemptions,
        handover_bytes: counters.
        requests: counter with label `finish_reason`. handovers: counter with label `outcome`.
        kv_refused: counter with label `reason` (see `kv_transfer.handover.RefusalCause`): pages, tickets and links that
            were refused; what was refused is computed again.
        prefill_retries: counter with label `outcome`. "attached" and "failed": tries of another prefill worker after
            one had failed; "none": there was no other, and the decode worker computed the prompt.
        resumes: counter with label `phase` ("begun" or "streaming"): attempts that broke and were dispatched again.
        idempotency: counter with label `outcome`: "claimed", "replayed", "busy", "refused", "unavailable" (served as
            if without a key), "not_kept" (the answer), "lost" (the claim, to another router).
        ejections: counter with label `instance`, see `router/ejection.py`.
        admission_queue: gauge with label `priority_class`: requests that wait in the router.
        admission_queue_tokens: gauge.
        admission_refusals: counter with label `reason`: "full", "class_full", "tenant_full", "rate", "slo" and
            "deadline" at the door; "queued_slo", "queued_deadline" and "no_worker" of what had waited in vain.
        slo_requests: counter with label `outcome`: "kept", "ttft_missed", "tpot_missed" (the mean between its tokens).
        tenant_tokens: counter with label `tenant`, "other" from `admission.max_tenants` names on.
        block_event_gaps: counter with label `instance`: its block events had a gap, see `router/block_feed.py`.
        peer_choices: counter with label `outcome`: choices "told" to other routers, "heard" from them, "dropped" (the
            shared state was away) and "refused" (out of bounds).
        rank_work_s: counter of seconds, label `rank`. pipeline_busy_s: counter of seconds. Of an instance of several
            ranks: 1 - rate(work) / rate(busy) is the bubble, the share of the time with steps under way anywhere in
            which a rank's pipeline stage stood idle.
    """

    def __init__(self, role: str, registry: CollectorRegistry | None = None) -> None:
        self.role = role
        self.registry = registry or CollectorRegistry()
        self.time_to_first_token_s = self._histogram(
            "baton_time_to_first_token_seconds", "From arrival to the first token.", _LATENCY_BUCKETS_S
        )
        self._ttft_phase = Histogram(
            "baton_ttft_phase_seconds",
            "Where the time until the first token went; first_step follows it.",
            ["role", "phase"],
            registry=self.registry,
            buckets=_PHASE_BUCKETS_S,
        )
        self._ttft_phases: dict[str, Histogram] = {}
        self.inter_token_latency_s = self._histogram(
            "baton_inter_token_latency_seconds", "Between consecutive tokens of one stream.", _LATENCY_BUCKETS_S
        )
        self.request_duration_s = self._histogram(
            "baton_request_duration_seconds", "From arrival to the last token.", _REQUEST_BUCKETS_S
        )
        self.queue_time_s = self._histogram(
            "baton_queue_time_seconds",
            "In queues, the router's and the workers', before the prompt was taken up.",
            _LATENCY_BUCKETS_S,
        )
        self.handover_s = self._histogram(
            "baton_handover_seconds",
            "From the end of prefill compute until the pages are attached.",
            _HANDOVER_BUCKETS_S,
        )
        self.step_s = self._histogram("baton_step_seconds", "One engine step.", _LATENCY_BUCKETS_S)
        self.requests_running = self._gauge("baton_requests_running", "Requests in the running batch.")
        self.requests_waiting = self._gauge("baton_requests_waiting", "Requests accepted and not running.")
        self.kv_usage_ratio = self._gauge("baton_kv_usage_ratio", "Owned KV blocks over all blocks, 0 to 1.")
        self.prefix_cache_queries_tokens = self._counter(
            "baton_prefix_cache_queries_tokens", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_cache_hit_tokens = self._counter(
            "baton_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."
        )
        self.prompt_tokens = self._counter("baton_prompt_tokens", "Prompt tokens of admitted requests.")
        self.generation_tokens = self._counter("baton_generation_tokens", "Tokens generated.")
        self.preemptions = self._counter("baton_preemptions", "Requests put back because KV blocks ran out.")
        self.handover_bytes = self._counter("baton_handover_bytes", "KV bytes handed over.")
        self.requests = self._labelled("baton_requests", "Requests ended, by reason.", "finish_reason")
        self.resumes = self._labelled(
            "baton_resumes", "Attempts that broke and were dispatched again, by how far they had come.", "phase"
        )
        self.idempotency = self._labelled(
            "baton_idempotent_requests", "Requests with an idempotency key, by what became of them.", "outcome"
        )
        self.ejections = self._labelled(
            "baton_ejections", "Times that a worker was set aside because it was slow.", "instance"
        )
        self.admission_queue = LabelledGauge(
            Gauge(
                "baton_admission_queue_requests", "Requests that wait in the router.", ["role", "priority_class"],
                registry=self.registry,
            ),
            role,
        )  # fmt: skip
        self.admission_queue_tokens = self._gauge(
            "baton_admission_queue_tokens", "Tokens of work of the requests that wait in the router."
        )
        self.admission_refusals = self._labelled(
            "baton_admission_refusals", "Requests refused by admission, by reason.", "reason"
        )
        self.slo_requests = self._labelled(
            "baton_slo_requests", "Requests with an objective that have ended, by what became of it.", "outcome"
        )
        self.tenant_tokens = self._labelled(
            "baton_tenant_tokens", "Prompt and output tokens of requests that were let in and have ended.", "tenant"
        )
        self._ejected = Gauge(
            "baton_ejected_instances", "Workers set aside because they are slow.", ["role", "pool"],
            registry=self.registry,
        )  # fmt: skip
        self._prefix_index_blocks = self._gauge(
            "baton_prefix_index_blocks", "Distinct KV blocks that this router knows some worker to hold."
        )
        self._prefix_index_stale = self._gauge(
            "baton_prefix_index_stale_instances", "Workers of whose KV blocks this router's knowledge is stale."
        )
        self.block_event_gaps = self._labelled(
            "baton_block_event_gaps", "Gaps in the block events of a worker; a snapshot was asked for.", "instance"
        )
        self.peer_choices = self._labelled(
            "baton_peer_choices", "Choices that routers tell each other, by what became of them.", "outcome"
        )
        self.handovers = self._labelled("baton_handovers", "Handovers ended, by outcome.", "outcome")
        self.kv_refused = self._labelled("baton_kv_refused", "Pages, tickets and links refused, by reason.", "reason")
        self.prefill_retries = self._labelled(
            "baton_prefill_retries", "Failed prefills tried again on another worker, by outcome.", "outcome"
        )
        self._routing_choices = Counter(
            "baton_routing_choices",
            "Ways in which prompts were computed, and why.",
            ["role", "option", "reason"],
            registry=self.registry,
        )
        self._predicted_ttft_error = Gauge(
            "baton_predicted_ttft_error_ratio",
            "How much longer first tokens take than predicted, relative to that, by way; a running mean.",
            ["role", "option"],
            registry=self.registry,
        )
        self.rank_work_s = self._labelled(
            "baton_rank_work_seconds", "Seconds in which a rank computed its part of steps.", "rank"
        )
        self.pipeline_busy_s = self._counter(
            "baton_pipeline_busy_seconds", "Seconds with at least one step under way in any stage."
        )
        self._bubble = Gauge(
            "baton_pipeline_bubble_ratio",
            "Share of the last second or so of busy time in which a rank's stage stood idle, 0 to 1.",
            ["role", "rank"],
            registry=self.registry,
        )
        self.block_size = self.num_blocks = 0
        self._kv_cache = Gauge(
            "baton_kv_cache_info",
            "Tokens per KV block, and KV blocks of this worker; the value is 1.",
            ["role", "block_size", "num_blocks"],
            registry=self.registry,
        )
        self._adapters = Gauge(
            "baton_lora_adapters_max", "Adapters that may be served at once.", ["role"], registry=self.registry
        )
        self._adapters.labels(role=role).set(0)
        kv_blocks = Gauge("baton_kv_blocks", "KV blocks by state.", ["role", "state"], registry=self.registry)
        self._kv_blocks_by_state = {s: kv_blocks.labels(role=role, state=s) for s in ("free", "cached", "owned")}

    def observe_ttft_phases(self, seconds_by_phase: Mapping[str, float]) -> None:
        """Count one request's phases into `baton_ttft_phase_seconds{phase}`."""
        for phase, seconds in seconds_by_phase.items():
            histogram = self._ttft_phases.get(phase)
            if histogram is None:
                histogram = self._ttft_phases[phase] = self._ttft_phase.labels(role=self.role, phase=phase)
            histogram.observe(seconds)

    def observe_latencies(self, latencies_s: Sequence[float]) -> None:
        """`inter_token_latency_s.observe` of each of many at once, for the price of few."""
        histogram = self.inter_token_latency_s
        for place, count in Counted(bisect_left(_LATENCY_BUCKETS_S, latency_s) for latency_s in latencies_s).items():
            histogram._buckets[place].inc(count)
        histogram._sum.inc(sum(latencies_s))

    def set_kv_blocks(self, *, free: int, cached: int, owned: int) -> None:
        """Publish `baton_kv_blocks{state}` and `baton_kv_usage_ratio` of one moment."""
        for state, num_blocks in (("free", free), ("cached", cached), ("owned", owned)):
            self._kv_blocks_by_state[state].set(num_blocks)
        total = free + cached + owned
        self.kv_usage_ratio.set(owned / total if total else 0.0)

    def count_routing_choice(self, option: str, reason: str) -> None:
        """Publish in `baton_routing_choices_total{option, reason}`."""
        self._routing_choices.labels(role=self.role, option=option, reason=reason).inc()

    def set_predicted_ttft_error(self, option: str, ratio: float) -> None:
        """Publish `baton_predicted_ttft_error_ratio{option}`; positive: it took longer."""
        self._predicted_ttft_error.labels(role=self.role, option=option).set(ratio)

    def set_kv_cache(self, *, block_size: int, num_blocks: int) -> None:
        """Publish `baton_kv_cache_info{block_size,num_blocks}`: what this worker has of KV cache."""
        self.block_size, self.num_blocks = block_size, num_blocks
        self._kv_cache.labels(role=self.role, block_size=str(block_size), num_blocks=str(num_blocks)).set(1)

    def set_bubble(self, rank: int, ratio: float) -> None:
        """Publish `baton_pipeline_bubble_ratio{rank}`, in [0, 1]."""
        self._bubble.labels(role=self.role, rank=str(rank)).set(ratio)

    def set_prefix_index(self, *, num_blocks: int, num_stale: int) -> None:
        """Publish `baton_prefix_index_blocks` and `baton_prefix_index_stale_instances`."""
        self._prefix_index_blocks.set(num_blocks)
        self._prefix_index_stale.set(num_stale)

    def set_ejected(self, pool: str, num_instances: int) -> None:
        """Publish `baton_ejected_instances{pool}`."""
        self._ejected.labels(role=self.role, pool=pool).set(num_instances)

    def render(self) -> bytes:
        """All families in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, help, ["role"], registry=self.registry, buckets=buckets).labels(role=self.role)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, ["role"], registry=self.registry).labels(role=self.role)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(name, help, ["role"], registry=self.registry).labels(role=self.role)

    def _labelled(self, name: str, help: str, label: str) -> LabelledCounter:
        return LabelledCounter(Counter(name, help, ["role", label], registry=self.registry), self.role)
