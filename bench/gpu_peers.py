"""What others need for the same steps on the same GPU: transformers, and vLLM where it is installed.

    python bench/gpu_peers.py OUT.json transformers|vllm [--device cuda] [--budget-s 60]

Random weights of the shape that `gpu_steps.py` measures. transformers runs eagerly with SDPA attention and a dynamic
cache that is filled with random keys and values; vLLM as it is by default, its decode step from the difference of a
long and a short answer. Cases that do not fit in memory or time are left out, and say so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_device import resolve_device
from gpu_progress import Progress
from gpu_rows import Row

_STEPS = 10


class Transformers:
    """A model of transformers' own."""

    kind = "transformers"

    def __init__(self, config: dict[str, Any], device: torch.device, folder: Path) -> None:
        import transformers

        del folder
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                shape = transformers.LlamaConfig(**config, attn_implementation="sdpa")
                self._model = transformers.LlamaForCausalLM(shape).eval()
        finally:
            torch.set_default_dtype(before)
        self._cache_type = transformers.DynamicCache
        self._config = config
        self._device = device

    def decode(self, batch: int, context: int) -> float:
        """Median seconds of one step."""
        config = self._config
        size = (batch, config["num_key_value_heads"], context, config["head_dim"])
        cache = self._cache_type()
        for layer in range(config["num_hidden_layers"]):
            k, v = (torch.empty(size, dtype=torch.bfloat16, device=self._device).normal_() for _ in range(2))
            cache.update(k, v, layer)
        token = torch.ones((batch, 1), dtype=torch.int64, device=self._device)
        times = [self._timed(lambda: self._model(token, past_key_values=cache, use_cache=True)) for _ in range(_STEPS)]
        return statistics.median(times[3:])

    def prefill(self, length: int) -> float:
        """Median seconds until the logits of the last token."""
        prompt = torch.randint(self._config["vocab_size"], (1, length), device=self._device)
        times = [self._timed(lambda: self._model(prompt, use_cache=True, logits_to_keep=1)) for _ in range(3)]
        return statistics.median(times[1:])

    def _timed(self, call: Callable[[], object]) -> float:
        _synchronize(self._device)
        begin_s = time.perf_counter()
        call()
        _synchronize(self._device)
        return time.perf_counter() - begin_s


class Vllm:
    """vLLM's offline engine."""

    kind = "vllm"

    def __init__(self, config: dict[str, Any], device: torch.device, folder: Path) -> None:
        import vllm  # type: ignore[import-not-found]

        del device
        (folder / "config.json").write_text(json.dumps(config))
        self._llm = vllm.LLM(
            str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=33000
        )
        self._sampling = vllm.SamplingParams
        self._vocabulary = config["vocab_size"]
        self._serial = 0

    def decode(self, batch: int, context: int) -> float:
        """Seconds of one step."""
        self._answer(batch, context, 2)
        return (self._answer(batch, context, 2 + 32) - self._answer(batch, context, 2)) / 32

    def prefill(self, length: int) -> float:
        """Seconds of a prompt with one token of answer."""
        return min(self._answer(1, length, 1) for _ in range(3))

    def _answer(self, batch: int, context: int, tokens: int) -> float:
        self._serial += 1
        generator = random.Random(self._serial)
        ids = [generator.choices(range(self._vocabulary), k=context) for _ in range(batch)]
        options = self._sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        begin_s = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": prompt} for prompt in ids], options, use_tqdm=False)
        return time.perf_counter() - begin_s


def measure(
    peer: Transformers | Vllm,
    decode: tuple[tuple[int, int], ...],
    prefill: tuple[int, ...],
    end_s: float,
) -> list[Row]:
    """One row per case."""
    rows: list[Row] = []
    progress = Progress(len(decode) + len(prefill))
    works = [(batch, context, lambda b=batch, c=context: peer.decode(b, c)) for batch, context in decode]
    for batch, context, work in works + [(0, length, lambda n=length: peer.prefill(n)) for length in prefill]:
        kind = f"{peer.kind} {'decode' if batch else 'prefill'}"
        row: dict[str, str | int | float] = {"kind": kind, "batch": batch or 1, "context": context}
        rows.append(row)
        if time.monotonic() > end_s:
            row["note"] = "left out: no time"
            continue
        progress.step(f"{kind}, batch {batch or 1}, {context} tokens")
        try:
            taken_s = work()
        except torch.cuda.OutOfMemoryError:
            row["note"] = "left out: no memory"
            continue
        row["step_ms"] = taken_s * 1e3
        row["tok_s"] = (batch or context) / taken_s
    progress.end()
    return rows


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Writes rows as JSON; none where the peer is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("peer", choices=["transformers", "vllm"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("--small", action="store_true", help="the shape of tests, also on a GPU")
    options = parser.parse_args()
    end_s = time.monotonic() + options.budget_s
    if importlib.util.find_spec(options.peer) is None:
        print(f"{options.peer} is not installed here")
        options.out.write_text("[]")
        return 0
    from gpu_steps import FULL, TINY

    device = resolve_device(options.device)
    plan = TINY if options.small or device.type == "cpu" else FULL
    kinds: dict[str, type[Transformers] | type[Vllm]] = {"transformers": Transformers, "vllm": Vllm}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        peer = kinds[options.peer](plan.config, device, Path(folder))
        rows = measure(peer, plan.decode, plan.prefill, end_s)
    options.out.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
