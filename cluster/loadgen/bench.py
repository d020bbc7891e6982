"""Runs a plan against a server: warms up, measures point after point, shows how far it is, and ends when asked to.

open_target(...)    the server of a URL, or of the cluster that runs here
Bench.run()         every point in turn; Ctrl-C ends the running one and leaves the rest out
"""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace

from baton.cluster.loadgen.plan import Plan, Point
from baton.cluster.loadgen.prompts import TokenSource
from baton.cluster.loadgen.records import Outcome, Record
from baton.cluster.loadgen.result import PointResult
from baton.cluster.loadgen.run import Limits, Progress, Run
from baton.cluster.loadgen.runner import Runner
from baton.cluster.loadgen.target import Target
from baton.cluster.loadgen.trace import TraceRow
from baton.errors import BatonError

__all__ = ["Bench"]

_PROGRESS_PERIOD_S = 0.25
_WARM_UP_TIMEOUT_S = 120.0


class Bench:
    """One bench.

    Args:
        trace: the rows of the plan's file.
        on_progress: called a few times a second with the point, its number, and how far it is.
        on_point: called with each point's records, after its run.
    """

    def __init__(
        self,
        plan: Plan,
        target: Target,
        *,
        trace: Sequence[TraceRow] | None,
        on_progress: Callable[[Point, int, Progress], None],
        on_point: Callable[[Point, Sequence[Record]], None],
    ) -> None:
        self._plan = plan
        self._target = target
        self._trace = trace
        self._on_progress = on_progress
        self._on_point = on_point
        self._runner: Runner | None = None
        self._interrupted = False

    async def run(self) -> list[PointResult]:
        """The points that were measured; the last one may have ended early.

        Raises:
            BatonError: the warm-up was not answered.
        """
        _allow_many_connections()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            await self._warm_up()
            results: list[PointResult] = []
            for number, point in enumerate(self._plan.points()):
                if self._interrupted:
                    break
                run = await self._measure(point, number)
                self._on_point(point, run.records)
                results.append(
                    PointResult.of(
                        point,
                        run.records,
                        duration_s=run.duration_s,
                        slos=self._plan.slos(),
                        cpu_share=run.client.of_one_core,
                        ended_early=run.ended_early,
                    )
                )
            return results
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            await self._target.close()

    def _interrupt(self) -> None:
        """Once ends the run; a second time whatever hangs."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        if self._runner is not None:
            self._runner.stop()

    async def _warm_up(self) -> None:
        """A few requests of the load, over other prompts; they also show whether the server takes such requests."""
        plan = self._plan
        if not plan.warm_up:
            return
        first = replace(plan, requests=plan.warm_up, duration_s=_WARM_UP_TIMEOUT_S, drain_s=0.0, sessions=None)
        run = await self._run(first, Point(label="warm-up", concurrency=1), "warm-up")
        failed = [record for record in run.records if record.outcome is not Outcome.OK]
        if failed and not run.ended_early:
            advice = " (--text sends text instead of token ids)" if failed[0].http_status in (400, 422) else ""
            raise BatonError(f"{self._target.info.url} did not answer the warm-up: {failed[0].detail}{advice}")

    async def _measure(self, point: Point, number: int) -> Run:
        async def show() -> None:
            while True:
                if self._runner is not None:
                    self._on_progress(point, number, self._runner.progress())
                await asyncio.sleep(_PROGRESS_PERIOD_S)

        showing = asyncio.ensure_future(show())
        try:
            return await self._run(self._plan, point, self._plan.point_seed(number))
        finally:
            if self._runner is not None:
                self._on_progress(point, number, self._runner.progress())
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)

    async def _run(self, plan: Plan, point: Point, seed: str) -> Run:
        workload = plan.workload(point, trace=self._trace, max_model_len=self._target.info.max_model_len)
        limits = Limits(
            duration_s=plan.duration_s,
            drain_s=plan.drain_s,
            timeout_s=plan.timeout_s,
            max_in_flight=plan.max_in_flight,
            retries=plan.retries,
        )
        vocabulary = self._target.info.vocabulary or plan.vocabulary
        self._runner = Runner(
            self._target,
            workload.jobs(seed),
            TokenSource(seed=seed, vocabulary=vocabulary),
            limits,
            concurrency=point.concurrency,
            as_text=plan.text or plan.chat,
        )
        if self._interrupted:
            self._runner.stop()
        # What is there already needs no looking at while the clock runs.
        gc.collect()
        gc.freeze()
        try:
            return await self._runner.run()
        finally:
            gc.unfreeze()


def _allow_many_connections() -> None:
    """As many open files as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
