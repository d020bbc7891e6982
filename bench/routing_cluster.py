"""A scaled-down trace against a real cluster of four workers on this machine, by routing policy: TTFT, and the ratio.

    python bench/routing_cluster.py ../shared/traces/mooncake_conversation.jsonl
    python bench/routing_cluster.py TRACE --rounds 3 --rate 14 --policy kv_aware round_robin least_loaded

For each policy in turn, and each round: `baton up` with the model that ships and four decode workers, each of which
reads its prompts itself, with KV memory for as many prompts of the trace as 1 M tokens hold of the real ones; then
`baton bench` replays the beginning of the trace, lengths at 1/16, at `--rate` requests a second. Some 80 s for a policy
and round, and more cores than two make it another load: see that `round robin` is busy, not drowned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from own_cluster import WAIT_S, Cluster, settings, wait

POLICIES = ("kv_aware", "round_robin", "random", "least_loaded")
LENGTH_SCALE = 1 / 16
CACHED_TOKENS = 1_000_000
BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trace", type=Path, help="JSON lines with hash_ids")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=["kv_aware", "round_robin"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--requests", type=int, default=600, help="of the trace, from its beginning")
    parser.add_argument("--rate", type=float, default=12.0, help="requests a second, in the mean")
    parser.add_argument("--prefill", type=int, default=0, help="so many of the four workers only read prompts")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    figures: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for policy in options.policy:
            figures.append({"policy": policy, "round": number, **_measure(policy, options)})
            print(f"{policy}: TTFT mean {figures[-1]['ttft_mean_ms']:.0f} ms", file=sys.stderr, flush=True)
    _print(figures, options.policy)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _measure(policy: str, options: argparse.Namespace) -> dict[str, Any]:
    num_blocks = int(CACHED_TOKENS * LENGTH_SCALE) // BLOCK_SIZE
    with tempfile.TemporaryDirectory(prefix="baton-") as scratch:
        folder = Path(scratch)
        pairs = (
            "name=routing",
            "router.http=127.0.0.1:0",
            "router.grpc=127.0.0.1:0",
            f"model.path={options.model}",
            f"prefill.replicas={options.prefill}",
            f"decode.replicas={4 - options.prefill}",
            f"kv.num_blocks={num_blocks}",
            f"kv.block_size={BLOCK_SIZE}",
            f"routing.policy={policy}",
        )
        with Cluster(folder, ["--launcher", "local", *settings(*pairs)]) as cluster:
            url = wait(lambda: cluster.run_state.ready and cluster.run_state.http_url, "the cluster to be ready")
            return load(url, options, folder, cluster.log)


def load(url: str, options: argparse.Namespace, folder: Path, log: Callable[[], str]) -> dict[str, Any]:
    """Figures of one replay against a server.

    Raises:
        SystemExit: it could not be offered; says why, with the server's log.
    """
    found, seconds = folder / "bench.json", options.requests / options.rate
    command = [sys.executable, "-m", "baton.cluster.cli", "bench", url, "--trace", str(options.trace)]
    command += ["--length-scale", str(LENGTH_SCALE), "--rate", str(options.rate), "--json", str(found)]
    command += ["--requests", str(options.requests), "--duration", str(seconds * 1.5), "--warm-up", "8"]
    begin_s = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds * 2 + WAIT_S * 2, check=False)
    if done.returncode:
        raise SystemExit(f"the load ended with {done.returncode}:\n{done.stdout[-3000:]}\n{log()}")
    (point,) = json.loads(found.read_text())["points"]
    summary = point["summary"]
    return {
        "ttft_mean_ms": summary["ttft_ms"]["mean"],
        "ttft_p50_ms": summary["ttft_ms"]["p50"],
        "ttft_p99_ms": summary["ttft_ms"]["p99"],
        "ok": summary["ok"],
        "cached_share": (summary["cached_tokens"] or 0) / max(summary["input_tokens"], 1),
        "took_s": time.monotonic() - begin_s,
        "warnings": point["warnings"],
    }


def _print(figures: list[dict[str, Any]], policies: list[str]) -> None:
    table = Table()
    for heading in ("policy", "round", "answered", "TTFT mean ms", "p50", "p99", "found cached"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for row in figures:
        numbers = (f"{row[name]:.0f}" for name in ("ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms"))
        table.add_row(row["policy"], str(row["round"]), str(row["ok"]), *numbers, f"{row['cached_share']:.1%}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    for warning in sorted({warning for row in figures for warning in row["warnings"]}):
        console.print(f"note: {warning}")
    first = policies[0]

    def median_ms(policy: str) -> float:
        return statistics.median(row["ttft_mean_ms"] for row in figures if row["policy"] == policy)

    for other in policies[1:]:
        console.print(f"TTFT mean, {other} over {first}: {median_ms(other) / median_ms(first):.2f}x")


if __name__ == "__main__":
    main()
