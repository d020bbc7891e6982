"""Turns what steps report into Prometheus metrics and load messages."""

from __future__ import annotations

from baton.engine.engine import Engine, EngineLoad, StepResult
from baton.metrics import Metrics
from baton.proto.baton.v1 import worker_pb2 as pb

__all__ = ["Figures", "load_to_proto"]


def load_to_proto(load: EngineLoad) -> pb.WorkerLoad:
    """Encodes an engine's load."""
    return pb.WorkerLoad(
        running_requests=load.running,
        waiting_requests=load.waiting,
        kv_blocks_total=load.blocks_total,
        kv_blocks_free=load.blocks_free,
        kv_blocks_cached=load.blocks_cached,
        kv_blocks_owned=load.blocks_owned,
        pending_prefill_tokens=load.pending_prefill_tokens,
    )


class Figures:
    """Feeds one worker's metrics; called on the engine thread (prometheus_client locks for itself)."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._preemptions = 0
        self._queries_tokens = 0
        self._hits_tokens = 0
        self._ranks: dict[int, pb.RankFigures] = {}

    def rank_figures(self, rank: int, figures: pb.RankFigures) -> None:
        """Counts in what a rank's steps have cost, given as sums since its start."""
        before = self._ranks.get(rank, pb.RankFigures())
        step_s, bubble_s = self.metrics.rank_step_s, self.metrics.rank_bubble_s
        step_s.labels(rank=str(rank)).inc(max(0.0, figures.step_s - before.step_s))
        bubble_s.labels(rank=str(rank)).inc(max(0.0, figures.bubble_s - before.bubble_s))
        self._ranks[rank] = figures

    def observe(self, engine: Engine, result: StepResult, step_s: float) -> EngineLoad:
        """Counts one step in and returns the load after it."""
        metrics, scheduler = self.metrics, engine.scheduler
        if result.plan.rows:
            metrics.step_s.observe(step_s)
        tokens = sum(len(output.token_ids) for output in result.outputs)
        metrics.generation_tokens.inc(tokens)
        metrics.prompt_tokens.inc(sum(seq.num_prompt for seq in result.plan.admitted if not seq.num_preemptions))
        metrics.preemptions.inc(scheduler.num_preemptions - self._preemptions)
        metrics.prefix_cache_queries_tokens.inc(scheduler.prefix_query_tokens - self._queries_tokens)
        metrics.prefix_cache_hit_tokens.inc(scheduler.prefix_hit_tokens - self._hits_tokens)
        self._preemptions = scheduler.num_preemptions
        self._queries_tokens = scheduler.prefix_query_tokens
        self._hits_tokens = scheduler.prefix_hit_tokens
        return self.publish(engine.load())

    def publish(self, load: EngineLoad) -> EngineLoad:
        """Sets the gauges and returns `load`."""
        self.metrics.requests_running.set(load.running)
        self.metrics.requests_waiting.set(load.waiting)
        self.metrics.set_kv_blocks(free=load.blocks_free, cached=load.blocks_cached, owned=load.blocks_owned)
        return load
