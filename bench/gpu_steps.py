"""Steps of one engine, through its scheduler, runner and sampler: decode steps and whole prefills.

    python bench/gpu_steps.py OUT.json [--device cuda] [--budget-s 90]

Weights are random, of Llama-3-8B's shape in bf16 (a tiny shape on the CPU); keys and values of the contexts too: as on
a decode worker, sequences are reserved and then attached, without computing their prompts. Where not all contexts fit,
sequences share the first blocks of their prompt, as with a common system prompt; the column says how many tokens.

step_ms is wall time per step over many steps. host_ms is what the engine's thread computed meanwhile: its processor
time without what it spent waiting for a step, an event or a stream. Blocking copies do count: they keep the thread from
planning. floor_ms is the time to read the weights and all contexts once at the rate of a device copy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_device import Timer, measure_roof, resolve_device
from gpu_model import LLAMA_3_8B, SMALL, make_engine, random_weights, write_folder
from gpu_progress import Progress
from gpu_rows import Row

from baton.engine.engine import Engine  # isort: skip
from baton.engine.request import EngineRequest, SamplingParams  # isort: skip
from baton.engine.sequence import SequenceState  # isort: skip
from baton.engine.step_buffers import StepSet  # isort: skip

_BLOCK_SIZE = 16
# Left free beside weights and KV: activations, logits, graphs, the library's workspaces.
_WORKSPACE_BYTES = 12 << 30
# Steps in a row that reserve nothing, at most: an engine that plans ahead tells of a reservation later.
_IDLE_STEPS = 8
# More tokens than are measured: some are written while others are still being attached.
_SLACK_TOKENS = 32
# Where a thread waits for the device; the engine looks at an event again and again until its deadline.
_WAITS: list[tuple[Any, str]] = [(owner, "synchronize") for owner in (torch.cuda.Event, torch.cuda.Stream, torch.cuda)]
_WAITS.append((StepSet, "wait"))
_names = itertools.count()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    config: dict[str, Any]
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[int, ...]
    max_batch_tokens: int
    steps: int


FULL = Plan(
    LLAMA_3_8B,
    tuple((batch, context) for context in (1024, 4096) for batch in (1, 8, 32, 64, 128, 256)),
    (512, 2048, 8192, 32768),
    8192,
    40,
)
TINY = Plan(SMALL, ((1, 20), (3, 45)), (17, 60), 32, 6)


class HostClock:
    """Processor time of the calling thread without what it waits for the device."""

    def __init__(self) -> None:
        self._waited_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Looks at waits inside the block."""
        before = [(owner, name, getattr(owner, name)) for owner, name in _WAITS]
        for owner, name, wait in before:
            setattr(owner, name, self._watched(wait))
        try:
            yield
        finally:
            for owner, name, wait in before:
                setattr(owner, name, wait)

    def now_s(self) -> float:
        """Only differences mean something."""
        return time.thread_time() - self._waited_s

    def _watched(self, wait: Callable[..., object]) -> Callable[..., object]:
        def watched(*arguments: object, **options: object) -> object:
            begin_s = time.thread_time()
            try:
                return wait(*arguments, **options)
            finally:
                self._waited_s += time.thread_time() - begin_s

        return watched


def request(prompt: list[int], max_tokens: int) -> EngineRequest:
    """Greedy, not ended by the model."""
    return EngineRequest(
        request_id=f"bench-{next(_names)}",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
    )


def clear(engine: Engine) -> None:
    """Ends every request and forgets every cached block."""
    for seq in engine.scheduler.sequences():
        engine.release(seq.key)
    while engine.has_work:  # what is in flight
        engine.step()
    engine.pool.clear_cache()


def attached(engine: Engine, batch: int, context: int, max_tokens: int) -> int:
    """Fills the engine with running sequences; returns how many tokens of their prompts they share."""
    clear(engine)
    vocabulary = engine.runner.vocab_size
    generator = random.Random(batch * 1_000_003 + context)
    width = -(-(context + max_tokens) // _BLOCK_SIZE)
    # Admission leaves a block for each running sequence.
    room = engine.runner.num_blocks - 2 * batch
    shared = 0 if batch * width <= room else -(-(batch * width - room) // (batch - 1))
    if shared * _BLOCK_SIZE >= context:
        raise MemoryError(f"{batch} x {context} tokens do not fit {engine.runner.num_blocks} blocks")
    prefix = [generator.randrange(vocabulary) for _ in range(shared * _BLOCK_SIZE)]
    for group in ((0, 1), (1, batch)):
        for _ in range(*group):
            own = [generator.randrange(vocabulary) for _ in range(context - len(prefix))]
            refusal = engine.add(request(prefix + own, max_tokens), remote_prefill=True)
            assert not refusal, refusal
        idle = 0
        while any(seq.state is not SequenceState.RUNNING for seq in engine.scheduler.sequences()):
            reserved = engine.step().plan.reserved
            for seq in reserved:
                engine.attach(seq.key, generator.randrange(vocabulary), None, 0)
            idle = 0 if reserved else idle + 1
            assert idle < _IDLE_STEPS, "the engine takes no more sequences"
    return len(prefix)


def decode(engine: Engine, batch: int, context: int, steps: int, device: torch.device) -> tuple[float, float, int]:
    """Seconds per step, host seconds per step, and tokens of prompt shared."""
    warm = 6
    shared = attached(engine, batch, context, steps + warm + _SLACK_TOKENS)
    clock = HostClock()
    tokens = 0

    def run(count: int) -> None:
        nonlocal tokens
        for _ in range(count):
            for output in engine.step().outputs:
                assert not output.error, output.error
                tokens += len(output.token_ids)

    run(warm)
    _synchronize(device)
    tokens = 0
    with clock.running():
        begin_s, host_s = time.perf_counter(), clock.now_s()
        run(steps)
        host_s = clock.now_s() - host_s
        _synchronize(device)
        taken_s = time.perf_counter() - begin_s
    assert tokens == steps * batch, f"{tokens} tokens in {steps} steps of {batch}"
    clear(engine)
    return taken_s / steps, host_s / steps, shared


def prefill(engine: Engine, length: int, device: torch.device, repeats: int = 3) -> float:
    """Median seconds from adding a prompt to its first token."""
    times = []
    for repeat in range(1 + repeats):
        clear(engine)
        prompt = random.Random(repeat).choices(range(engine.runner.vocab_size), k=length)
        asked = request(prompt, 1)
        _synchronize(device)
        begin_s = time.perf_counter()
        refusal = engine.add(asked)
        assert not refusal, refusal
        told = False
        while not told:
            outputs = engine.step().outputs
            assert not any(output.error for output in outputs), outputs
            told = bool(outputs)
        if repeat:
            times.append(time.perf_counter() - begin_s)
    clear(engine)
    return statistics.median(times)


def measure(plan: Plan, device: torch.device, folder: Path, budget_s: float) -> list[Row]:
    """Rows of everything that the budget allows; raises what the engine raises."""
    end_s = time.monotonic() + budget_s
    roof = measure_roof(Timer(device, budget_s=0.05), device)
    progress = Progress(1 + len(plan.decode) + len(plan.prefill))
    progress.step("making the engine")
    write_folder(folder, plan.config)
    weight_bytes = (folder / "model.safetensors").stat().st_size
    max_batch = max(batch for batch, _ in plan.decode)
    with random_weights():
        engine = make_engine(
            folder,
            device=str(device),
            num_blocks=_num_blocks(plan, device, weight_bytes),
            max_batch_tokens=max(plan.max_batch_tokens, max_batch),
            max_batch_size=max_batch,
            max_model_len=max(*plan.prefill, *(context for _, context in plan.decode)) + 128,
            block_size=_BLOCK_SIZE,
        )
    engine.runner.kv.normal_()
    embedding_bytes = 2 * plan.config["vocab_size"] * plan.config["hidden_size"]
    read_bytes = weight_bytes - embedding_bytes
    shortest = min(context for _, context in plan.decode)
    works: list[Row] = [{"kind": "decode", "batch": b, "context": c} for b, c in plan.decode]
    works += [{"kind": "prefill", "batch": 1, "context": length} for length in plan.prefill]
    # What matters most comes first, should time be short: decode steps at the shortest context, then prefills.
    works.sort(
        key=lambda row: 0 if (row["kind"], row["context"]) == ("decode", shortest) else 1 + (row["kind"] == "decode")
    )
    rows: list[Row] = []
    for row in works:
        kind, batch, context = str(row["kind"]), int(row["batch"]), int(row["context"])
        if time.monotonic() > end_s:
            rows.append({**row, "note": "left out: no time"})
            continue
        progress.step(f"{kind}, batch {batch}, {context} tokens")
        if kind == "prefill":
            taken_s = prefill(engine, context, device)
            flops = _prefill_flops(plan.config, read_bytes, context)
            figures: Row = {
                "step_ms": taken_s * 1e3,
                "tok_s": context / taken_s,
                "tflop_s": flops / taken_s / 1e12,
                "matmul_share": flops / taken_s / roof.matmul_flops_s,
            }
            rows.append({**row, **figures})
            continue
        try:
            step_s, host_s, shared = decode(engine, batch, context, plan.steps, device)
        except MemoryError as error:
            rows.append({**row, "note": f"left out: {error}"})
            continue
        floor_s = (read_bytes + batch * context * engine.runner.layout.token_bytes) / roof.copy_bytes_s
        figures = {
            "shared_prefix": shared,
            "step_ms": step_s * 1e3,
            "host_ms": host_s * 1e3,
            "tok_s": batch / step_s,
            "floor_ms": floor_s * 1e3,
            "of_floor": step_s / floor_s,
        }
        rows.append({**row, **figures})
    progress.end()
    return rows


def _prefill_flops(config: dict[str, Any], read_bytes: int, length: int) -> float:
    """Products with all weights but the head for each token, with the head for the last, and causal attention."""
    head = config["vocab_size"] * config["hidden_size"]
    dense = 2.0 * ((read_bytes / 2 - head) * length + head)
    pairs = length * (length + 1) / 2
    return dense + 4.0 * config["head_dim"] * config["num_attention_heads"] * config["num_hidden_layers"] * pairs


def _num_blocks(plan: Plan, device: torch.device, weight_bytes: int) -> int:
    """Blocks that hold the largest case, or those that there is room for."""
    longest = max(max(plan.prefill), *(batch * (context + 128) + 32 * batch for batch, context in plan.decode)) + 128
    wanted = -(-longest // _BLOCK_SIZE)
    if device.type != "cuda":
        return wanted
    config = plan.config
    block_bytes = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * _BLOCK_SIZE
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return min(wanted, (free_bytes - weight_bytes - _WORKSPACE_BYTES) // block_bytes)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Writes rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget-s", type=float, default=90.0)
    parser.add_argument("--small", action="store_true", help="the shape of tests, also on a GPU")
    options = parser.parse_args()
    device = resolve_device(options.device)
    plan = TINY if options.small or device.type == "cpu" else FULL
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        rows = measure(plan, device, Path(folder), options.budget_s)
    options.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
