"""A served cluster on one device: prefill and decode workers that share it, against workers that do both.

    python bench/gpu_cluster.py [--device cuda] [--transport cuda_ipc] [--prompts 6] [--tokens 24]

Starts `baton up` with launcher local twice on the model that ships, in fp32: disaggregated with the transport, and
colocated. The same greedy requests go to both over HTTP, one by one; tokens must be equal, and the prefill worker must
have been where each prompt was computed. Needs the packages of a served cluster (`gpu_packages.SERVING`), no Ray and no
network.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baton.config import ClusterConfig

START_S = 90.0
STOP_S = 20.0
REQUEST_S = 30.0
LENGTHS = (300, 70, 129, 500, 90, 200)


@contextmanager
def cluster(folder: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`baton up` for the length of the block; gives its run state.

    Raises:
        RuntimeError: it did not become ready; the text holds the ends of the logs.
    """
    name = folder.name
    folder.mkdir(parents=True)
    pairs = {"name": name, "router.http": "127.0.0.1:0", "router.grpc": "127.0.0.1:0", **settings}
    command = [sys.executable, "-m", "baton.cluster.cli", "up", "--launcher", "local"]
    command += [part for key, value in pairs.items() for part in ("--set", f"{key}={value}")]
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "XDG_RUNTIME_DIR": str(folder), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield _wait_ready(process, folder, name)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)


def _wait_ready(process: subprocess.Popen[bytes], folder: Path, name: str) -> dict[str, Any]:
    end_s = time.monotonic() + START_S
    path = folder / "baton" / f"{name}.json"
    while process.poll() is None and time.monotonic() < end_s:
        if path.exists() and (state := json.loads(path.read_text() or "{}")).get("ready"):
            return dict(state)
        time.sleep(0.1)
    why = "ended" if process.poll() is not None else f"was not ready within {START_S:g} s"
    raise RuntimeError(f"baton up {why}:\n{_logs(folder)}")


def _logs(folder: Path) -> str:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix == ".log"]
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in files)


def complete(url: str, prompt: list[int], max_tokens: int) -> tuple[list[int], str]:
    """Greedy tokens of one prompt of token ids, and which instance prefilled it."""
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    asked = urllib.request.Request(
        f"{url.removesuffix('/v1')}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=REQUEST_S) as reply:
        return list(json.load(reply)["choices"][0]["token_ids"]), reply.headers.get("X-Baton-Prefill-Instance", "")


def answers(
    folder: Path, settings: dict[str, Any], prompts: list[list[int]], max_tokens: int
) -> list[tuple[list[int], str]]:
    """What `complete` gives for each prompt, of a cluster with these settings."""
    with cluster(folder, settings) as state:
        return [complete(str(state["http_url"]), prompt, max_tokens) for prompt in prompts]


def main() -> int:
    """Says what came out; returns 1 where tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--transport", help="cuda_ipc on a GPU, shm on a CPU")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    transport = options.transport or ("cuda_ipc" if options.device == "cuda" else "shm")
    generator = random.Random(7)
    prompts = [generator.choices(range(4000), k=LENGTHS[at % len(LENGTHS)]) for at in range(options.prompts)]
    shared = {
        "model.path": "tiny",
        "model.dtype": "float32",
        "model.served_name": "m",
        "device": options.device,
        "kv.num_blocks": 256,
        "transfer.transport": transport,
        "routing.disaggregate": "always",
    }
    if "deterministic" in ClusterConfig.model_fields:
        shared["deterministic"] = True
    with tempfile.TemporaryDirectory(prefix="baton-") as scratch:
        print("starting a cluster with prefill and decode workers", flush=True)
        pair = answers(Path(scratch) / "pair", shared, prompts, options.tokens)
        print("starting a cluster whose decode workers prefill", flush=True)
        single = answers(Path(scratch) / "single", {**shared, "prefill.replicas": 0}, prompts, options.tokens)
    wrong = 0
    for prompt, (tokens, where), (expected, _) in zip(prompts, pair, single, strict=True):
        if tokens != expected or not where.startswith("prefill"):
            wrong += 1
            print(f"prompt of {len(prompt)} tokens, prefilled on {where}: {tokens}, by one worker {expected}")
    print(f"{len(prompts) - wrong} of {len(prompts)} answers are equal, over {transport} and by one worker")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
