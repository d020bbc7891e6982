"""The page `/metrics/vllm`: what gateways, autoscalers and dashboards look for, under the names that vLLM gives it.

Five gauges make up the model server protocol of the Gateway API Inference Extension; the other families are what charts
made for vLLM show. Colons are not for names that are exported, `promtool` says, so they have a page of their own. A
worker's page has no latencies: the router measures them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.metrics import Metrics

__all__ = ["ALIASES", "EngineFacts", "facts_of", "render_vllm"]

ALIASES = {
    "baton_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "baton_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "baton_request_duration_seconds": "vllm:e2e_request_latency_seconds",
    "baton_queue_time_seconds": "vllm:request_queue_time_seconds",
    "baton_prompt_tokens": "vllm:prompt_tokens",
    "baton_generation_tokens": "vllm:generation_tokens",
    "baton_prefix_cache_queries_tokens": "vllm:prefix_cache_queries",
    "baton_prefix_cache_hit_tokens": "vllm:prefix_cache_hits",
    "baton_preemptions": "vllm:num_preemptions",
    "baton_requests": "vllm:request_success",
}
"""Families that are repeated, by their own name."""
_LABELS = {"finish_reason": "finished_reason"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What the five gauges tell.

    Attributes:
        kv_usage_ratio: owned KV blocks over all blocks, 0 to 1.
        num_blocks: KV blocks in all.
    """

    running: float
    waiting: float
    kv_usage_ratio: float
    block_size: int
    num_blocks: int


def facts_of(metrics: Metrics) -> EngineFacts:
    """Of one worker, from its own gauges."""
    found = {family.name: family.samples[0].value for family in metrics.registry.collect() if family.samples}
    return EngineFacts(
        running=found["baton_requests_running"],
        waiting=found["baton_requests_waiting"],
        kv_usage_ratio=found["baton_kv_usage_ratio"],
        block_size=metrics.block_size,
        num_blocks=metrics.num_blocks,
    )


def render_vllm(metrics: Metrics, facts: EngineFacts, *, model: str) -> bytes:
    """The page, in Prometheus' text format."""
    return generate_latest(_Page(metrics, facts, model))


class _Page(Collector):
    def __init__(self, metrics: Metrics, facts: EngineFacts, model: str) -> None:
        self._metrics = metrics
        self._facts = facts
        self._labels = {"model_name": model, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        """Gauges first."""
        facts = self._facts
        yield self._gauge("vllm:num_requests_running", "Requests that run.", facts.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", facts.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "KV cache in use, 0 to 1.", facts.kv_usage_ratio)
        about = {"block_size": str(facts.block_size), "num_gpu_blocks": str(facts.num_blocks)}
        yield self._gauge("vllm:cache_config_info", "KV cache: tokens per block and blocks.", 1, **about)
        # No adapters are served: zero of them, at all times.
        none = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        yield self._gauge("vllm:lora_requests_info", "Adapters; the value is the present time.", time.time(), **none)
        for family in self._metrics.registry.collect():
            alias = ALIASES.get(family.name)
            if alias is not None and (self._metrics.role == "router" or any(s.value for s in family.samples)):
                yield self._renamed(family, alias)

    def _gauge(self, name: str, help: str, value: float, **labels: str) -> Metric:
        gauge = GaugeMetricFamily(name, help, labels=[*self._labels, *labels])
        gauge.add_metric([*self._labels.values(), *labels.values()], value)
        return gauge

    def _renamed(self, family: Metric, alias: str) -> Metric:
        renamed = Metric(alias, family.documentation, family.type)
        for sample in family.samples:
            own = {_LABELS.get(key, key): value for key, value in sample.labels.items() if key != "role"}
            name = alias + sample.name.removeprefix(family.name)
            renamed.add_sample(name, {**self._labels, **own}, sample.value)
        return renamed
