"""A trace of real traffic through the router's own policy, over simulated workers: how much of it is found cached.

    python bench/routing.py ../shared/traces/mooncake_conversation.jsonl
    python bench/routing.py TRACE --workers 4 8 16 --policy kv_aware round_robin --limit 1000 --json out.json

Nothing is served: `baton.router.policy.choose` picks among simulated workers in virtual time (`routing_replay.py`).
`hit rate` is prompt tokens found over all prompt tokens; `imbalance` the most work that one worker was given over the
mean, work being prompt tokens to compute; `choose` the router's own time for one choice, on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from baton.cluster.loadgen.trace import read_trace
from baton.config_routing import RoutingConfig
from baton.router.routing.policies import make_policy
from routing_replay import Service, replay

POLICIES = ("kv_aware", "round_robin", "random", "least_loaded")
SHOW_BAR_AFTER_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trace", type=Path, help="JSON lines with hash_ids")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--workers", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--limit", type=int, default=10**9, help="requests, from the beginning")
    parser.add_argument("--cached-tokens", type=int, default=1_000_000, help="KV memory of a worker")
    parser.add_argument("--read-rate", type=float, default=20_000.0, help="prompt tokens per second of a worker")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    with options.trace.open(encoding="utf-8") as lines:
        rows = read_trace(lines, name=str(options.trace), limit=options.limit)
    if any(row.hash_ids is None for row in rows):
        raise SystemExit(f"{options.trace} has no hash_ids: nothing in it tells which prompts begin alike")
    service = Service(cached_tokens=options.cached_tokens, read_tokens_per_s=options.read_rate)
    cases = [(name, workers) for name in options.policy for workers in options.workers]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("replaying", total=len(rows) * len(cases))
    begin_s, figures = time.monotonic(), []
    try:
        for name, workers in cases:
            bar.update(task, description=f"{name}, {workers} workers")
            policy = make_policy(RoutingConfig(policy=name, disaggregate="never"))

            def advance() -> None:
                bar.advance(task)
                if not bar.live.is_started and time.monotonic() - begin_s > SHOW_BAR_AFTER_S:
                    bar.start()

            figures.append(replay(rows, policy, workers=workers, service=service, on_request=advance).as_dict())
    finally:
        bar.stop()
    _print(figures, len(rows))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _print(figures: list[dict[str, object]], requests: int) -> None:
    table = Table(title=f"{requests} requests", title_justify="left")
    for heading in ("policy", "workers", "hit rate", "imbalance", "TTFT mean s", "TTFT p95 s", "choose us"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for row in figures:
        table.add_row(
            str(row["policy"]),
            str(row["workers"]),
            f"{row['hit_rate']:.1%}",
            f"{row['imbalance']:.3f}",
            f"{row['ttft_mean_s']:.2f}",
            f"{row['ttft_p95_s']:.2f}",
            f"{row['choose_us']:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main()
