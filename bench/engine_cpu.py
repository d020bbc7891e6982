"""Time of engine steps on CPU by parts: linear layers, attention, and the rest (norms, rotation, activation, Python).

    python bench/engine_cpu.py /path/to/model --threads 1 2

Decode steps of 1, 8, 16 and 32 rows at 288 tokens of context, and prefills of 256 to 2048 tokens. A line gives the
median step of the compiled layers in one call, that of the same layers op by op from Python, and the parts of the
former, from clocks inside the library. Blocks lie scattered in the pool, as after hours of serving, all written:
pages that nobody has written would be one page of zeros in the cache. Takes minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from baton.engine.runner import ForwardBatch, ModelRunner, SequenceRows
from baton.kernels import ops

_CONTEXT_TOKENS = 288
_DECODE_ROWS = (1, 8, 16, 32)
_PREFILL_TOKENS = (256, 512, 1024, 2048)
_MS = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Median milliseconds of one kind of step."""

    kind: str
    threads: int
    step_ms: float
    op_by_op_ms: float
    linear_ms: float
    attention_ms: float
    rest_ms: float

    def __str__(self) -> str:
        share = 100 * self.attention_ms / self.step_ms
        return (
            f"{self.kind:>16} {self.threads:>7} {self.step_ms:>9.2f} {self.op_by_op_ms:>9.2f} {self.linear_ms:>9.2f}"
            f" {self.attention_ms:>9.2f} {self.rest_ms:>9.2f} {share:>9.1f}"
        )


_HEADER = "            step threads   step_ms op_by_op    linear attention      rest attn_pct"


def _batches(runner: ModelRunner) -> dict[str, list[SequenceRows]]:
    block_size = runner.layout.block_size
    blocks = list(range(runner.num_blocks))
    random.Random(0).shuffle(blocks)
    width = -(-_CONTEXT_TOKENS // block_size)
    batches = {
        f"decode {count}": [
            SequenceRows([5 + row], _CONTEXT_TOKENS - 1, blocks[row * width : (row + 1) * width])
            for row in range(count)
        ]
        for count in _DECODE_ROWS
    }
    for count in _PREFILL_TOKENS:
        batches[f"prefill {count}"] = [SequenceRows(list(range(5, 5 + count)), 0, blocks[: -(-count // block_size)])]
    return batches


def measure(runner: ModelRunner, kind: str, batch: ForwardBatch, *, repeat: int) -> StepTimes:
    """Time `repeat` steps of each path, in turns.

    Raises:
        SystemExit: the compiled layers do not serve this model here, or the two paths disagree.
    """
    model = runner._model
    decoder = model._decoder
    if decoder is None:
        raise SystemExit(f"kernel backend {ops.backend()} does not run layers in one call here")
    whole: list[float] = []
    single: list[float] = []
    parts: list[tuple[float, float, float]] = []
    try:
        for _ in range(repeat):
            decoder.measure(True)
            begin_s = time.perf_counter()
            logits = runner.forward(batch)
            whole.append(time.perf_counter() - begin_s)
            times = decoder.times
            parts.append((times.linear_s, times.attention_s, whole[-1] - times.linear_s - times.attention_s))
            decoder.measure(False)
            model._decoder = None
            begin_s = time.perf_counter()
            expected = runner.forward(batch)
            single.append(time.perf_counter() - begin_s)
            model._decoder = decoder
            if not torch.equal(logits, expected):
                raise SystemExit(f"{kind}: the two paths give different logits")
    finally:
        model._decoder = decoder
    linear, attention, rest = (statistics.median(part) * _MS for part in zip(*parts, strict=True))
    return StepTimes(
        kind=kind,
        threads=ops.num_threads(),
        step_ms=statistics.median(whole) * _MS,
        op_by_op_ms=statistics.median(single) * _MS,
        linear_ms=linear,
        attention_ms=attention,
        rest_ms=rest,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=15, help="decode steps of each path; prefills are a third of it")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    runner = ModelRunner(arguments.model, device="cpu", num_blocks=1200, max_model_len=2048, max_batch_tokens=2048)
    runner.warm_up()
    runner.kv.normal_(generator=torch.Generator().manual_seed(0))
    rows = []
    print(f"backend {ops.backend()}, {arguments.model}\n{_HEADER}")
    for threads in arguments.threads:
        ops.set_num_threads(threads)
        torch.set_num_threads(threads)
        for kind, sequences in _batches(runner).items():
            repeat = arguments.repeat if kind.startswith("decode") else max(2, arguments.repeat // 3)
            rows.append(measure(runner, kind, runner.buffers.build(sequences), repeat=repeat))
            print(rows[-1], flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
