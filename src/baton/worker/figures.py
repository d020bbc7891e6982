"""Turns what steps report into Prometheus metrics and load messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from time import monotonic
from typing import Protocol

from baton.engine.engine import Engine, EngineLoad, StepResult, spell_out
from baton.engine.pipeline_figures import PipelineFigures
from baton.metrics import Metrics
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.worker.slowness import Slowness
from baton.worker.step_log import StepLog

__all__ = ["Figures", "StepNews", "figures_to_proto", "load_to_proto"]


class StepNews(Protocol):
    """Who tells the routers of steps, see `news.py`."""

    def add_steps(self, samples: Sequence[pb.StepSample]) -> None:
        """To be told with the next message."""
        ...


def figures_to_proto(figures: PipelineFigures) -> pb.RankFigures:
    """Encodes what a rank's steps have cost."""
    return pb.RankFigures(steps=figures.steps, step_s=figures.step_s, bubble_s=figures.bubble_s, busy_s=figures.busy_s)


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
        slowness=load.slowness,
        preemptions=load.preemptions,
        context_tokens=load.context_tokens,
        max_remaining_tokens=load.max_remaining_tokens,
        max_running_requests=load.max_running,
    )


_WINDOW_S = 0.5
"""Busy seconds over which a bubble is told."""


_PUBLISH_EVERY_S = 0.05
"""Busy seconds between two settings of the gauges."""

_JUDGE_EVERY_S = 0.02
"""Busy seconds between two steps whose time is judged."""


class Figures:
    """Feeds one worker's metrics; called on the engine thread (prometheus_client locks for itself).

    Attributes:
        driver: its rank and what its steps cost, of an instance of several ranks; set before the first step.
        news: told of steps that routers shall hear of; None: nobody does.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._unpublished_s = 0.0
        self._slowness = Slowness()
        self._lately = 0.0
        self._is_due = False
        self._unjudged_s = 0.0
        self._preemptions = 0
        self._queries_tokens = 0
        self._hits_tokens = 0
        self._ranks: dict[int, PipelineFigures] = {}
        self._windows: dict[int, tuple[PipelineFigures, float]] = {}
        self.driver: tuple[int, PipelineFigures] | None = None
        self.news: StepNews | None = None
        self._step_log = StepLog()

    def rank_figures(self, rank: int, figures: pb.RankFigures) -> None:
        """Counts in what a follower's steps have cost, given as sums since its start."""
        sums = PipelineFigures(
            steps=figures.steps, step_s=figures.step_s, bubble_s=figures.bubble_s, busy_s=figures.busy_s
        )
        self._count_rank(rank, sums)

    def _count_rank(self, rank: int, sums: PipelineFigures) -> None:
        added = sums.since(self._ranks.get(rank, PipelineFigures()))
        self._ranks[rank] = sums
        self.metrics.rank_work_s.labels(rank=str(rank)).inc(max(0.0, added.work_s))
        self.metrics.pipeline_busy_s.inc(max(0.0, added.busy_s))
        assert self.driver is not None, "the driver's sums are known before its followers report"
        busy_s = self.driver[1].busy_s
        window = sums.since(self._windows.get(rank, (PipelineFigures(), 0.0))[0])
        window_busy_s = busy_s - self._windows.get(rank, (PipelineFigures(), 0.0))[1]
        if window_busy_s >= _WINDOW_S:
            self.metrics.set_bubble(rank, window.bubble_share_of(window_busy_s))
            self._windows[rank] = (sums, busy_s)

    def observe(self, engine: Engine, result: StepResult, step_s: float) -> EngineLoad:
        """Counts one step in and returns the load after it."""
        metrics, scheduler = self.metrics, engine.scheduler
        if result.plan.rows:
            metrics.step_s.observe(step_s)
            self._judge(result, step_s)
            if self.news is not None:
                sample = self._step_log.observe(result.plan, step_s)
                if sample is not None:
                    self.news.add_steps((sample,))
        if self.driver is not None:
            rank, sums = self.driver
            self._count_rank(rank, sums.copy())
        tokens = sum([1 if type(said) is tuple else len(spell_out(said).token_ids) for said in result.said])
        if tokens:
            metrics.generation_tokens.inc(tokens)
        plan = result.plan
        if plan.admitted or plan.reserved or plan.preempted:
            metrics.prompt_tokens.inc(sum(seq.num_prompt for seq in plan.admitted if not seq.num_preemptions))
            metrics.preemptions.inc(scheduler.num_preemptions - self._preemptions)
            metrics.prefix_cache_queries_tokens.inc(scheduler.prefix_query_tokens - self._queries_tokens)
            metrics.prefix_cache_hit_tokens.inc(scheduler.prefix_hit_tokens - self._hits_tokens)
            self._preemptions = scheduler.num_preemptions
            self._queries_tokens = scheduler.prefix_query_tokens
            self._hits_tokens = scheduler.prefix_hit_tokens
        load = dataclasses.replace(engine.load(), slowness=self._lately, preemptions=scheduler.num_preemptions)
        self._unpublished_s += step_s
        # Gauges are read every few seconds.
        if self._unpublished_s >= _PUBLISH_EVERY_S or not load.running:
            self.publish(load)
        return load

    def _judge(self, result: StepResult, step_s: float) -> None:
        # Chosen before its length is known: else long ones would be chosen more often.
        is_due, self._unjudged_s = self._is_due, self._unjudged_s + step_s
        self._is_due = self._unjudged_s >= _JUDGE_EVERY_S
        if self._is_due:
            self._unjudged_s = 0.0
        if not is_due:
            return
        rows, now_s = result.plan.rows, monotonic()
        self._slowness.observe(
            rows=len(rows),
            new_tokens=sum([row.count for row in rows]),
            context_tokens=sum([row.start + row.count for row in rows]),
            step_s=step_s,
            now_s=now_s,
        )
        self._lately = self._slowness.at(now_s)

    def publish(self, load: EngineLoad) -> EngineLoad:
        """Sets the gauges and returns `load`, with what steps take lately."""
        if not load.slowness:
            load = dataclasses.replace(load, slowness=self._slowness.at(monotonic()))
        self._unpublished_s = 0.0
        self.metrics.requests_running.set(load.running)
        self.metrics.requests_waiting.set(load.waiting)
        self.metrics.set_kv_blocks(free=load.blocks_free, cached=load.blocks_cached, owned=load.blocks_owned)
        return load
