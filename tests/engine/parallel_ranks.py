"""Ranks as real processes: starts an instance's followers, makes its driver in this process, ends them all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from baton.engine.collectives import host_store
from baton.engine.model_config import ModelConfig
from baton.engine.parallel import Shard
from baton.engine.parallel_runner import ParallelRunner, run_follower
from baton.engine.pipeline_figures import PipelineFigures
from baton.engine.runner import ModelRunner
from baton.engine.step_message import StepBody
from baton.errors import BatonError

__all__ = ["FAIL_TAG", "Instance", "start_instance"]

FAIL_TAG = 666
"""A follower that meets it in a step fails."""
_HOST = "127.0.0.1"


@dataclass
class Instance:
    """An instance's driver and the processes of its followers."""

    runner: ParallelRunner
    followers: dict[int, BaseProcess]
    logs: Path

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        pid = self.followers[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def figures(self, rank: int) -> PipelineFigures:
        """What steps cost a follower that has ended."""
        return PipelineFigures(**json.loads((self.logs / f"figures{rank}.json").read_text()))

    def log(self, rank: int) -> str:
        """What a follower raised, by its type and text."""
        path = self.logs / f"rank{rank}.txt"
        return path.read_text() if path.exists() else ""


def make_shard(
    model: Path, rank: int, tp: int, pp: int, port: int, deadline_s: float, layers_per_stage: tuple[int, ...] | None
) -> Shard:
    return Shard.connect(
        ModelConfig.from_dir(model),
        tensor_parallel=tp,
        pipeline_parallel=pp,
        rank=rank,
        store_host=_HOST,
        store_port=port,
        own_host=_HOST,
        name="test-1",
        deadline_s=deadline_s,
        layers_per_stage=layers_per_stage,
    )


def follower(
    model: Path,
    rank: int,
    tp: int,
    pp: int,
    port: int,
    deadline_s: float,
    layers_per_stage: tuple[int, ...] | None,
    logs: Path,
    options: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    tags: list[int] = []

    def on_layers(body: StepBody, begin: int, end: int) -> None:
        tags.extend(body.tags.tolist())
        (logs / f"tags{rank}.txt").write_text(",".join(map(str, tags)))
        if FAIL_TAG in tags:
            raise ValueError("the disk is full of water")

    try:
        shard = make_shard(model, rank, tp, pp, port, deadline_s, layers_per_stage)
        with shard.reporting():
            runner = ModelRunner(model, device="cpu", shard=shard, **options)
        figures = PipelineFigures()
        run_follower(runner, shard, on_layers=on_layers, figures=figures)
        (logs / f"figures{rank}.json").write_text(json.dumps(asdict(figures)))
    except BatonError as error:
        (logs / f"rank{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        sys.exit(3)
    except BaseException:
        (logs / f"rank{rank}.txt").write_text(traceback.format_exc())
        sys.exit(4)


@contextmanager
def start_instance(
    model: Path,
    logs: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    deadline_s: float = 20.0,
    tick_s: float = 0.5,
    layers_per_stage: tuple[int, ...] | None = (),
    on_broken: Any = None,
    **options: Any,
) -> Iterator[Instance]:
    """An instance of `tp * pp` ranks; this process is its driver."""
    torch.set_num_threads(1)
    logs.mkdir(exist_ok=True)
    store = host_store(_HOST)
    driver = (pp - 1) * tp
    context = multiprocessing.get_context("spawn")
    arguments = (tp, pp, store.port, deadline_s, layers_per_stage, logs, options)
    followers: dict[int, BaseProcess] = {
        rank: context.Process(target=follower, args=(model, rank, *arguments), daemon=True)
        for rank in range(tp * pp)
        if rank != driver
    }
    for process in followers.values():
        process.start()
    instance = None
    try:
        shard = make_shard(model, driver, tp, pp, store.port, deadline_s, layers_per_stage)
        runner = ParallelRunner(
            ModelRunner(model, device="cpu", shard=shard, **options), shard, tick_s=tick_s, on_broken=on_broken
        )
        instance = Instance(runner, followers, logs)
        yield instance
    finally:
        if instance is not None:
            instance.runner.stop()
        for process in followers.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)
