"""The outside client: `vllm bench serve` on the same loads, its detailed result read back as a `Run`.

It sends text of random tokens; all servers get the same text for the same seed. Each load is one process of it, which
takes some seconds to start.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from load_client import LoadError, Server
from load_figures import Run, Stream
from standard_loads import Load, seed_number

__all__ = ["find_vllm", "run_vllm_load", "vllm_command"]

TIMEOUT_S = 1800.0


def find_vllm(path: str | None) -> str | None:
    """The executable at `path`, or the one on PATH; None if there is none."""
    return shutil.which(path or "vllm")


def vllm_command(vllm: str, server: Server, load: Load, *, tokenizer: Path, seed: str, result: Path) -> list[str]:
    """`vllm bench serve` with everything that matters said, since its defaults have changed between versions."""
    options: dict[str, Any] = {
        "--backend": "openai",
        "--base-url": server.url,
        "--endpoint": "/v1/completions",
        "--model": server.model,
        "--tokenizer": tokenizer,
        "--dataset-name": "random",
        "--random-input-len": load.input_tokens,
        "--random-output-len": load.output_tokens,
        "--num-prompts": load.requests,
        "--request-rate": load.rate_per_s or "inf",
        "--temperature": 0,
        "--seed": seed_number(seed),
        # As our own client: a chunk for every token.
        "--extra-body": json.dumps({"return_token_ids": True}),
        "--percentile-metrics": "ttft,tpot,itl",
        "--ready-check-timeout-sec": 0,
        "--result-dir": result.parent,
        "--result-filename": result.name,
    }
    if load.concurrency:
        options["--max-concurrency"] = load.concurrency
    flags = ["--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]
    return [vllm, "bench", "serve", *(str(part) for pair in options.items() for part in pair), *flags]


def run_vllm_load(vllm: str, server: Server, load: Load, *, tokenizer: Path, seed: str) -> Run:
    """Runs one load.

    Raises:
        LoadError: the client failed, a request failed, or an answer had another length than asked.
    """
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        result = Path(folder) / "result.json"
        command = vllm_command(vllm, server, load, tokenizer=tokenizer, seed=seed, result=result)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        # Its interpreter is another one: our modules would shadow its own.
        environment.pop("PYTHONPATH", None)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"vllm bench serve did not end load {load.name} within {TIMEOUT_S:.0f} s") from error
        if done.returncode or not result.exists():
            raise LoadError(f"vllm bench serve ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return read_result(json.loads(result.read_text()), load, counts_apart=server.counts_apart)


def read_result(result: dict[str, Any], load: Load, *, counts_apart: bool) -> Run:
    """What `--save-result --save-detailed` wrote, as a run.

    This client reads a token count only from a chunk of its own. Where a server sends it with the last token, as
    llama.cpp does, the client counts the tokens of the text again, and broken characters become several: by a sixth
    too many were seen. Then the number asked for is taken, which the warm-up by our own client has verified.

    Raises:
        LoadError: not every request was served in full.
    """
    lengths = result["output_lens"] if counts_apart else [load.output_tokens] * load.requests
    if result["completed"] != load.requests or any(length != load.output_tokens for length in lengths):
        errors = [error for error in result.get("errors", []) if error][:1]
        raise LoadError(
            f"{result['completed']} of {load.requests} requests served, lengths {sorted(set(lengths))}"
            f" instead of {load.output_tokens}: {errors}"
        )
    columns = zip(result["ttfts"], result["itls"], result["latencies"], result["input_lens"], lengths, strict=True)
    return Run([Stream(*row) for row in columns], float(result["duration"]))
