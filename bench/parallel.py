"""Measures what the ranks of an instance gain and cost: one core against PP=2 and TP=2 on two, each rank one process.

Usage: python bench/parallel.py MODEL_DIR [--streams 16] [--prompt 256] [--output 64] [--requests 32] [--cores 0 1]
                                [--rounds 3] [--layouts 1x1 1x2 2x1] [--layers 9 7] [--quick]

Engines without cluster or network: each rank is a process of one thread, pinned to a core of its own with the threads
of its connections. Prompts are random tokens, so no prefix is shared; the model of `bench/make_model.py` is the usual
one. Best with nothing else running.

First table, per layout (TP x PP):
    whole load     output tokens/s while `--streams` requests run at any time until `--requests` are done, prompts
                   computed on the way
    decode         output tokens/s of `--streams` running sequences, no prompt computed
    bubble         of each stage's core during the whole load and during decode: steps were under way, none was computed
                   here (of a TP stage, its first rank; waits of tensor ranks for each other are no bubble)

Second table, a decode step of n rows: on one core, and the work of two stages on a micro-batch of half the streams. A
step reads all weights whatever n is, which bounds what PP can gain in decode: per token of each stream one core takes
T(streams), two stages, each with half the layers, twice T(streams / 2) / 2. So the gain is T(streams) / T(streams / 2)
at most, which is 2 only where T grows with n from nothing on.

Third table: an all-reduce between two ranks as the layers use it (fp32 sum in rank order, equal bits in any batch),
against torch.distributed's own on the same kind of connections (gloo, dtype of the model).

Rounds of all layouts take turns and the best of each counts. The defaults take two minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.console import Console
from rich.table import Table

from baton.engine.collectives import RankGroup, host_store
from baton.engine.engine import Engine
from baton.engine.model_config import ModelConfig
from baton.engine.parallel import Shard
from baton.engine.parallel_runner import ParallelRunner, run_follower
from baton.engine.pipeline_figures import PipelineFigures
from baton.engine.request import EngineRequest, SamplingParams
from baton.engine.runner import ModelRunner, SequenceRows

HOST = "127.0.0.1"
WAIT_S = 300.0
BLOCK_SIZE = 16

_dist: Any = torch.distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is measured. `prompt` and `output` in tokens of each request."""

    model: Path
    streams: int
    prompt: int
    output: int
    requests: int

    @property
    def runner_options(self) -> dict[str, Any]:
        """The same on every rank."""
        length = self.prompt + self.output + 1
        return {
            "device": "cpu",
            "block_size": BLOCK_SIZE,
            "num_blocks": (self.streams + 1) * (-(-length // BLOCK_SIZE) + 1),
            "max_model_len": length,
            "max_batch_size": self.streams,
            "max_batch_tokens": 2048,
        }


@dataclass(slots=True)
class Figures:
    """What one layout did: output tokens per second; each stage's share of bubble and work per step."""

    load_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    load_bubbles: list[float] = field(default_factory=list)
    decode_bubbles: list[float] = field(default_factory=list)
    decode_work_s: list[float] = field(default_factory=list)
    decode_step_s: dict[int, float] = field(default_factory=dict)


# ------------------------------------------------------------ ranks


def make_shard(model: Path, layout: tuple[int, int], rank: int, port: int, layers: Sequence[int]) -> Shard:
    """This rank's place in an instance of its own."""
    return Shard.connect(
        ModelConfig.from_dir(model),
        tensor_parallel=layout[0],
        pipeline_parallel=layout[1],
        rank=rank,
        store_host=HOST,
        store_port=port,
        own_host=HOST,
        name="bench",
        layers_per_stage=layers or None,
    )


def pin(core: int) -> None:
    """One thread on one core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def follow(
    load: Load, layout: tuple[int, int], rank: int, port: int, layers: Sequence[int], core: int, asked: Connection
) -> None:
    """A rank that is told what to do; answers `asked` with its figures."""
    pin(core)
    figures = PipelineFigures()

    def answer() -> None:
        while asked.recv():
            asked.send(figures.copy())

    threading.Thread(target=answer, daemon=True).start()
    shard = make_shard(load.model, layout, rank, port, layers)
    run_follower(ModelRunner(load.model, shard=shard, **load.runner_options), shard, figures=figures)


def drive(
    load: Load,
    layout: tuple[int, int],
    port: int,
    layers: Sequence[int],
    core: int,
    stages: list[Connection],
    asked: Connection,
) -> None:
    """The rank that plans: runs a round whenever `asked`. `stages` lead to the first ranks of the earlier stages."""
    pin(core)
    rank = (layout[1] - 1) * layout[0]
    shard = make_shard(load.model, layout, rank, port, layers)
    runner = ParallelRunner(ModelRunner(load.model, shard=shard, **load.runner_options), shard)
    runner.warm_up()
    engine = Engine(
        runner, max_batch_tokens=2048, max_batch_size=load.streams, max_steps_in_flight=runner.max_steps_in_flight
    )

    def readings() -> list[PipelineFigures]:
        for stage in stages:
            stage.send(True)
        return [*(stage.recv() for stage in stages), runner.figures.copy()]

    work = Work(engine, load)
    work.serve(load.streams, output=2)
    asked.send(True)
    while asked.recv():
        figures = Figures()
        before = readings()
        begin_s = time.perf_counter()
        num_tokens = work.serve(load.requests)
        figures.load_tokens_per_s = num_tokens / (time.perf_counter() - begin_s)
        figures.load_bubbles = bubbles(spans(before, readings()))
        work.start_streams()
        before = readings()
        begin_s = time.perf_counter()
        num_tokens = work.decode()
        figures.decode_tokens_per_s = num_tokens / (time.perf_counter() - begin_s)
        decoded = spans(before, readings())
        figures.decode_bubbles = bubbles(decoded)
        figures.decode_work_s = [span.work_s / max(1, span.steps) for span in decoded]
        work.end()
        if layout == (1, 1):
            figures.decode_step_s = decode_steps(runner.runner, load)
        asked.send(figures)
    for stage in stages:
        stage.send(False)
    runner.stop()


def spans(before: list[PipelineFigures], after: list[PipelineFigures]) -> list[PipelineFigures]:
    """What each stage added between two readings."""
    return [late.since(early) for early, late in zip(before, after, strict=True)]


def bubbles(stages: list[PipelineFigures]) -> list[float]:
    """Each stage's share of bubble; the driver, last, plans and samples when it does not wait."""
    driver = stages[-1]
    return [*(stage.bubble_share_of(driver.busy_s) for stage in stages[:-1]), driver.bubble_s / driver.busy_s]


class Work:
    """Requests for an engine."""

    def __init__(self, engine: Engine, load: Load) -> None:
        self._engine = engine
        self._load = load
        self._names = itertools.count()
        self._random = random.Random(0)

    def serve(self, num_requests: int, *, output: int | None = None) -> int:
        """Runs `num_requests`, the load's streams at a time; returns the tokens they got.

        The first ones end early, spread over a request's length, so that later ones come one by one.
        """
        length, num_tokens, added, running = output or self._load.output, 0, 0, 0
        while added < num_requests or running:
            while added < num_requests and running < self._load.streams:
                share = min(1.0, (added + 1) / self._load.streams)
                self._add(max(1, round(length * share)))
                added += 1
                running += 1
            for output_ in self._engine.step().outputs:
                num_tokens += len(output_.token_ids)
                running -= output_.finish_reason is not None
        return num_tokens

    def start_streams(self) -> None:
        """Brings as many sequences as there are streams to where all of them decode."""
        for _ in range(self._load.streams):
            self._add(self._load.output)
        # Until the last has its first token, those before it go on.
        first: set[str] = set()
        while len(first) < self._load.streams:
            first |= {output.request_id for output in self._engine.step().outputs}

    def decode(self) -> int:
        """Goes on until the first stream ends; returns the tokens of all until then."""
        num_tokens, is_over = 0, False
        while not is_over:
            outputs = self._engine.step().outputs
            num_tokens += len(outputs)
            is_over = any(output.finish_reason is not None for output in outputs)
        return num_tokens

    def end(self) -> None:
        """Computes what is left."""
        while self._engine.has_work:
            self._engine.step()

    def _add(self, num_tokens: int) -> None:
        vocab_size = self._engine.runner.vocab_size
        prompt = tuple(self._random.randrange(vocab_size) for _ in range(self._load.prompt))
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        problem = self._engine.add(
            EngineRequest(request_id=str(next(self._names)), prompt_token_ids=prompt, sampling=sampling)
        )
        assert not problem, problem


def decode_steps(runner: ModelRunner, load: Load) -> dict[int, float]:
    """Seconds of a decode step by its number of rows: the median of a few."""
    seconds = {}
    width = -(-(load.prompt + 1) // BLOCK_SIZE)
    counts = sorted({1, max(1, load.streams // 4), max(1, load.streams // 2), load.streams})
    for count in counts:
        rows = [SequenceRows([5], load.prompt, list(range(i * width, (i + 1) * width))) for i in range(count)]
        seconds[count] = middle_s(lambda rows=rows: runner.forward(runner.buffers.build(rows)), 9)
    return seconds


def middle_s(call: Callable[[], object], rounds: int) -> float:
    """Seconds of the middle one of `rounds` calls."""
    seconds = []
    for _ in range(rounds):
        begin_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin_s)
    return sorted(seconds)[rounds // 2]


class Instance:
    """The processes of one layout (TP, PP)."""

    def __init__(self, load: Load, layout: tuple[int, int], cores: Sequence[int], layers: Sequence[int] = ()) -> None:
        tp, pp = layout
        self.layout = layout
        self._store = host_store(HOST)
        context = multiprocessing.get_context("spawn")
        layers = layers if pp > 1 else ()
        driver, stages, port = (pp - 1) * tp, [], self._store.port
        self._processes: list[BaseProcess] = []
        for rank in (rank for rank in range(tp * pp) if rank != driver):
            ours, theirs = context.Pipe()
            if rank % tp == 0:
                stages.append(ours)
            arguments = (load, layout, rank, port, layers, cores[rank], theirs)
            self._processes.append(context.Process(target=follow, args=arguments, daemon=True))
        self._asked, theirs = context.Pipe()
        arguments = (load, layout, port, layers, cores[driver], stages, theirs)
        self._processes.append(context.Process(target=drive, args=arguments, daemon=True))
        for process in self._processes:
            process.start()
        receive(self._asked, self._processes)

    def run(self) -> Figures:
        """One round."""
        self._asked.send(True)
        figures: Figures = receive(self._asked, self._processes)
        return figures

    def stop(self) -> None:
        """Ends the processes."""
        self._asked.send(False)
        end(self._processes)


def receive(connection: Connection, processes: Sequence[BaseProcess]) -> Any:
    """What comes next on `connection`, while all `processes` live."""
    deadline_s = time.monotonic() + WAIT_S
    while not connection.poll(0.1):
        failed = [process for process in processes if process.exitcode]
        if failed or time.monotonic() > deadline_s:
            raise SystemExit("a rank ended early: see above" if failed else f"no result within {WAIT_S:g} s")
    return connection.recv()


def end(processes: Sequence[BaseProcess]) -> None:
    """Waits for `processes` to end, and ends those that do not."""
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def best(rounds: Sequence[Figures]) -> Figures:
    """The best round of each kind: what else runs on a machine only ever slows it down."""
    whole = max(rounds, key=lambda figures: figures.load_tokens_per_s)
    decode = max(rounds, key=lambda figures: figures.decode_tokens_per_s)
    return Figures(
        load_tokens_per_s=whole.load_tokens_per_s,
        load_bubbles=whole.load_bubbles,
        decode_tokens_per_s=decode.decode_tokens_per_s,
        decode_bubbles=decode.decode_bubbles,
        decode_work_s=decode.decode_work_s,
        decode_step_s={count: min(figures.decode_step_s[count] for figures in rounds) for count in whole.decode_step_s},
    )


# ------------------------------------------------------------ all-reduce


def reduce_on(rank: int, port: int, core: int, sizes: Sequence[int], hidden: int, sent: Connection | None) -> None:
    """One of two ranks that sum tensors [rows, hidden] in bf16, in both ways; rank 0 sends {rows: (ours, theirs)}."""
    pin(core)
    group = RankGroup.connect(store_host=HOST, store_port=port, rank=rank, size=2, tensor_ranks=(0, 1), name="ours")
    timeout = timedelta(seconds=WAIT_S)
    store = _dist.PrefixStore("theirs", _dist.TCPStore(HOST, port, None, False, timeout, wait_for_workers=False))
    options = _dist.ProcessGroupGloo._Options()
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=HOST)]
    theirs = _dist.ProcessGroupGloo(store, rank, 2, options)
    seconds = {}
    for rows in sizes:
        tensor = torch.ones((rows, hidden), dtype=torch.bfloat16)
        seconds[rows] = (
            middle_s(lambda tensor=tensor: group.all_reduce(tensor), 50),
            middle_s(lambda tensor=tensor: theirs.allreduce([tensor]).wait(), 50),
        )
    group.all_gather_ints([0])
    if sent is not None:
        sent.send(seconds)


def measure_all_reduce(cores: Sequence[int], sizes: Sequence[int], hidden: int) -> dict[int, tuple[float, float]]:
    """Seconds of one all-reduce, ours and torch's, by number of rows."""
    store = host_store(HOST)
    context = multiprocessing.get_context("spawn")
    result, sent = context.Pipe(duplex=False)
    processes = [
        context.Process(
            target=reduce_on, args=(rank, store.port, cores[rank], sizes, hidden, sent if rank == 0 else None)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    reduced: dict[int, tuple[float, float]] = receive(result, processes)
    end(processes)
    return reduced


# ------------------------------------------------------------ tables


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Throughput of TP and PP on pinned cores.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--layouts", nargs="+", default=["1x1", "1x2", "2x1"], help="TPxPP")
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="of each stage, instead of balanced ones")
    parser.add_argument("--quick", action="store_true", help="one round of 4 streams of 16 + 8 tokens, to see it run")
    args = parser.parse_args()
    load = Load(
        model=args.model,
        streams=4 if args.quick else args.streams,
        prompt=16 if args.quick else args.prompt,
        output=8 if args.quick else args.output,
        requests=8 if args.quick else args.requests,
    )
    layouts = [(int(tp), int(pp)) for tp, pp in (name.split("x") for name in args.layouts)]
    num_ranks = max([2, *(tp * pp for tp, pp in layouts)])
    if len(args.cores) < num_ranks:
        raise SystemExit(f"{num_ranks} ranks want a core each, --cores names {len(args.cores)}")
    instances = [Instance(load, layout, args.cores, args.layers) for layout in layouts]
    # In turn, so that a slow minute of the machine touches all of them.
    rounds = [[instance.run() for instance in instances] for _ in range(1 if args.quick else args.rounds)]
    for instance in instances:
        instance.stop()
    figures = {layout: best([row[index] for row in rounds]) for index, layout in enumerate(layouts)}
    console = Console(width=110)
    console.print(throughput_table(load, figures))
    if (1, 1) in figures:
        console.print(step_table(figures))
    config = ModelConfig.from_dir(load.model)
    sizes = [1, load.streams, 4 * load.streams] if args.quick else [1, load.streams, 256, 1024]
    console.print(reduce_table(config, measure_all_reduce(args.cores, sizes, config.hidden_size)))


def throughput_table(load: Load, figures: dict[tuple[int, int], Figures]) -> Table:
    """The first table."""
    table = Table(title=f"{load.streams} streams, prompts of {load.prompt}, outputs of {load.output} tokens")
    for column in ("TP x PP", "whole load, tok/s", "", "bubble of stages", "decode, tok/s", "", "bubble of stages"):
        table.add_column(column, justify="right")
    base = next(iter(figures.values()))
    for (tp, pp), row in figures.items():
        table.add_row(
            f"{tp} x {pp}",
            f"{row.load_tokens_per_s:.1f}",
            f"{row.load_tokens_per_s / base.load_tokens_per_s:.2f}x",
            ", ".join(f"{share:.1%}" for share in row.load_bubbles),
            f"{row.decode_tokens_per_s:.1f}",
            f"{row.decode_tokens_per_s / base.decode_tokens_per_s:.2f}x",
            ", ".join(f"{share:.1%}" for share in row.decode_bubbles),
        )
    return table


def step_table(figures: dict[tuple[int, int], Figures]) -> Table:
    """The second table."""
    one_core = figures[1, 1].decode_step_s
    table = Table(title="A decode step, ms")
    table.add_column("")
    for count in one_core:
        table.add_column(f"{count} rows", justify="right")
    table.add_row("one core", *(f"{seconds * 1e3:.1f}" for seconds in one_core.values()))
    half = sorted(one_core)[-2] if len(one_core) > 1 else 0
    for (tp, pp), row in figures.items():
        if pp == 2:
            stages = " + ".join(f"{seconds * 1e3:.1f}" for seconds in row.decode_work_s)
            table.add_row(f"{tp} x {pp}, by stage", *(stages if count == half else "" for count in one_core))
    return table


def reduce_table(config: ModelConfig, reduced: dict[int, tuple[float, float]]) -> Table:
    """The third table."""
    num_sums = 2 * config.num_layers + 1
    table = Table(title=f"All-reduce of rows of {config.hidden_size} in bf16 between two cores, ms")
    for column in ("rows", "in rank order", "torch's", f"{num_sums} per step, in rank order", "torch's"):
        table.add_column(column, justify="right")
    for rows, seconds in reduced.items():
        once, per_step = ([f"{n * s * 1e3:.{digits}f}" for s in seconds] for n, digits in ((1, 3), (num_sums, 1)))
        table.add_row(str(rows), *once, *per_step)
    return table


if __name__ == "__main__":
    main()
