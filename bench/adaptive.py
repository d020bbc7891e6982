"""To hand over or not: goodput of `routing.disaggregate` auto against always and never, over prompt length and load.

Usage: python bench/adaptive.py [--quick] [--model DIR] [--mixes short mixed ...] [--out OUT.json]

Three clusters of one prefill and one decode worker (launcher local) stand side by side, one for each setting, and are
asked one at a time; the others are idle. First come requests one by one, for what they take on an idle machine: a
request is good when its first token comes within 5 times, and its other tokens within twice what the better of the two
fixed settings took. Then each mix is run at shares of what the better of the two serves when it is flooded, with the
same arrivals and prompts for each setting, in turn, --rounds times with others; the first of a round is another setting
each time. What counts is the sum: near its limit a setting serves from 17 to 40 of the same 60 requests in time, by
what else the machine does in those seconds. `auto` learns what it costs from a load of everything before, as a cluster
that has been up for half a minute has.

    short    32 tokens in          mid    256 in          long    1024 in
    mixed    nine of 48 in for each of 1024               bursts  the same in bursts of a second

Prints goodput (good requests a second) of each setting, auto over the better, and auto over each; then how auto chose
and how far its predictions were off, from its metrics. Half an hour, with --quick under three minutes. The machine must
be quiet: two cores hold three processes of a cluster and this one. Exit status 1 when a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.cluster.loadgen.http_target import HttpTarget, find_server
from baton.cluster.loadgen.plan import Plan, Point
from baton.cluster.loadgen.prompts import TokenSource
from baton.cluster.loadgen.records import Outcome, Record
from baton.cluster.loadgen.run import Limits
from baton.cluster.loadgen.runner import Runner
from baton.cluster.loadgen.slo import Slo
from baton.cluster.loadgen.summary import is_good
from baton.cluster.loadgen.target import Sampling
from own_cluster import Cluster, settings
from quiet_machine import describe_machine

MODES = ("always", "never", "auto")
FIXED = ("always", "never")
TTFT_TIMES, TPOT_TIMES = 5.0, 2.0
FLOOD = 24
ALONE_REQUESTS = 8
LATENCY_FLOOR_MS = 10.0
TPOT_FLOOR_MS = 1.5
"""Taken as least times alone: below, the machine's own hiccups decide."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Classes as `baton bench --class` takes them, `arrivals` as `--arrivals`."""

    name: str
    classes: tuple[str, ...]
    arrivals: str = "poisson"


_BOTH = ("short:0.9:input=48,output=32", "long:0.1:input=1024,output=32")
MIXES = (
    Mix("short", ("short:1:input=32,output=32",)),
    Mix("mid", ("mid:1:input=256,output=32",)),
    Mix("long", ("long:1:input=1024,output=32",)),
    Mix("mixed", _BOTH),
    Mix("bursts", _BOTH, "bursts:on_s=1,off_s=1"),
)
QUICK_MIXES = ("short", "long", "mixed")


class Client:
    """Sends loads to the clusters by their settings' names."""

    def __init__(self, urls: dict[str, str], vocabulary: int) -> None:
        self._servers = {mode: find_server(url, api_key=None, model=None) for mode, url in urls.items()}
        self._vocabulary = vocabulary

    def run(self, mode: str, plan: Plan, seed: str) -> list[Record]:
        """One load."""
        return asyncio.run(self._run(mode, plan, seed))

    async def _run(self, mode: str, plan: Plan, seed: str) -> list[Record]:
        server = self._servers[mode]
        target = HttpTarget(
            server,
            Sampling(temperature=0.0, ignore_eos=True, send_slo=False),
            api_key=None,
            is_chat=False,
            wants_ids=True,
        )
        point: Point = plan.points()[0]
        workload = plan.workload(point, trace=None, max_model_len=server.max_model_len)
        limits = Limits(
            duration_s=plan.duration_s,
            drain_s=plan.drain_s,
            timeout_s=plan.timeout_s,
            max_in_flight=plan.max_in_flight,
        )
        runner = Runner(
            target,
            workload.jobs(seed),
            TokenSource(seed=f"{mode}/{seed}", vocabulary=self._vocabulary),
            limits,
            concurrency=point.concurrency,
            as_text=False,
        )
        try:
            return (await runner.run()).records
        finally:
            await target.close()


def alone(client: Client, mix: Mix, mode: str) -> dict[str, tuple[float, float]]:
    """By class, the medians of TTFT and TPOT in ms, one request at a time."""
    found = {}
    for text in mix.classes:
        name = text.partition(":")[0]
        plan = Plan(concurrency=1, requests=ALONE_REQUESTS, duration_s=20.0, classes=(text,))
        records = [record for record in client.run(mode, plan, f"alone/{text}")[2:] if record.outcome is Outcome.OK]
        if not records:
            raise SystemExit(f"no request of {text} was answered by {mode}")
        found[name] = (
            _median_ms([record.ttft_s for record in records]),
            _median_ms([record.tpot_s for record in records]),
        )
    return found


def objectives(client: Client, mix: Mix) -> dict[str, Slo]:
    """By class, multiples of what the better of the fixed settings takes alone."""
    times = [alone(client, mix, mode) for mode in FIXED]
    return {
        name: Slo(
            ttft_ms=TTFT_TIMES * max(min(each[name][0] for each in times), LATENCY_FLOOR_MS),
            tpot_ms=TPOT_TIMES * max(min(each[name][1] for each in times), TPOT_FLOOR_MS),
        )
        for name in times[0]
    }


def capacity(client: Client, mix: Mix, seconds: float) -> float:
    """Requests a second of the better of the fixed settings, flooded."""
    best = 0.0
    for mode in FIXED:
        begin_s = time.monotonic()
        plan = Plan(concurrency=FLOOD, requests=100_000, duration_s=seconds, classes=mix.classes)
        done = sum(record.outcome is Outcome.OK for record in client.run(mode, plan, f"flood/{mix.name}"))
        best = max(best, done / (time.monotonic() - begin_s))
    return best


def measure(
    client: Client, mix: Mix, rate_per_s: float, slos: dict[str, Slo], options: argparse.Namespace
) -> dict[str, Any]:
    """One point: every setting in turn, `rounds` times, each setting the first of a round as often as the others."""
    plan = Plan(
        rate_per_s=rate_per_s, arrivals=mix.arrivals, duration_s=options.seconds, drain_s=20.0, classes=mix.classes
    )
    records: dict[str, list[Record]] = {mode: [] for mode in MODES}
    rounds: dict[str, list[int]] = {mode: [] for mode in MODES}
    for number in range(options.rounds):
        first = number % len(MODES)
        for mode in MODES[first:] + MODES[:first]:
            found = client.run(mode, plan, f"{options.seed}/{number}/{mix.name}/{rate_per_s}")
            records[mode] += found
            rounds[mode].append(sum(is_good(record, slos[record.class_name]) for record in found))
    return {"mix": mix.name, "rate_per_s": rate_per_s} | {
        mode: _setting(records[mode], rounds[mode], options.seconds) for mode in MODES
    }


def _setting(records: Sequence[Record], good: Sequence[int], seconds: float) -> dict[str, Any]:
    return {
        "requests": len(records),
        "good": sum(good),
        "good_by_round": list(good),
        "goodput_per_s": sum(good) / len(good) / seconds,
        "failed": sum(record.outcome is not Outcome.OK for record in records),
        "ttft_p50_ms": _median_ms([record.ttft_s for record in records]),
        "tpot_p50_ms": _median_ms([record.tpot_s for record in records]),
    }


def _median_ms(values_s: Sequence[float | None]) -> float:
    known = [value * 1e3 for value in values_s if value is not None]
    return statistics.median(known) if known else 0.0


def ratios(point: dict[str, Any]) -> tuple[float, float, float]:
    """auto over the better, over always, over never."""
    auto, always, never = (max(point[mode]["good"], 0.5) for mode in ("auto", "always", "never"))
    return auto / max(always, never), auto / always, auto / never


def show(points: Sequence[dict[str, Any]], slos: dict[str, dict[str, Slo]]) -> None:
    """The table, in Markdown."""
    print("| mix | load | always | never | auto | auto / better | auto / always | auto / never |")
    print("|---|---|---|---|---|---|---|---|")
    for point in points:
        cells = [f"{point[mode]['goodput_per_s']:.1f}/s" for mode in MODES]
        told = [f"{ratio:.2f}" for ratio in ratios(point)]
        print(f"| {point['mix']} | {point['rate_per_s']:.1f}/s | {' | '.join(cells)} | {' | '.join(told)} |")
    if points:
        worst = min(points, key=lambda point: ratios(point)[0])
        best = max(points, key=lambda point: min(ratios(point)[1:]))
        print(f"\nauto over the better of the two, at the worst point: {ratios(worst)[0]:.2f} ({worst['mix']})")
        print(f"auto over each of the two, at the best point: {min(ratios(best)[1:]):.2f} ({best['mix']})")
    for name, classes in slos.items():
        print(f"good in {name}: " + "; ".join(f"{each}: {slo}" for each, slo in classes.items()))


def metrics(url: str) -> list[str]:
    """A router's lines about choices and predictions."""
    names = ("baton_routing_choices_total", "baton_predicted_ttft_error_ratio")
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        return [line for line in answer.read().decode().splitlines() if line.startswith(names)]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter points")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--mixes", nargs="+", choices=[mix.name for mix in MIXES])
    parser.add_argument("--loads", nargs="+", type=float, help="shares of the flooded rate")
    parser.add_argument("--seconds", type=float, help="of each point, setting and round")
    parser.add_argument("--rounds", type=int, help="of each point")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    names = options.mixes or (QUICK_MIXES if options.quick else [mix.name for mix in MIXES])
    options.mixes = [mix for mix in MIXES if mix.name in names]
    options.loads = options.loads or ([0.4, 0.7] if options.quick else [0.3, 0.55, 0.8])
    options.seconds = options.seconds or (5.0 if options.quick else 10.0)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and shows; the exit status."""
    options = parse_options(arguments)
    points: list[dict[str, Any]] = []
    slos: dict[str, dict[str, Slo]] = {}
    with ExitStack() as stack:
        urls = {}
        for mode in MODES:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            pairs = (
                f"name=adaptive-{mode}",
                f"model.path={options.model}",
                "router.http=127.0.0.1:0",
                "router.grpc=127.0.0.1:0",
                "prefill.replicas=1",
                "decode.replicas=1",
                "kv.num_blocks=3072",
                f"routing.disaggregate={mode}",
            )
            cluster = stack.enter_context(Cluster(folder, ["--launcher", "local", *settings(*pairs)]))
            cluster.wait_ready()
            urls[mode] = cluster.run_state.http_url
        client = Client(urls, options.vocabulary)
        everything = tuple({text.partition(":")[0]: text for mix in MIXES for text in mix.classes}.values())
        for mode in MODES:
            plan = Plan(concurrency=6, requests=100_000, duration_s=5.0, classes=everything)
            client.run(mode, plan, "warm-up")
        for mix in options.mixes:
            slos[mix.name] = objectives(client, mix)
            most = capacity(client, mix, 2.0 if options.quick else 3.0)
            for share in options.loads:
                point = measure(client, mix, round(share * most, 2), slos[mix.name], options)
                points.append(point)
                told = ", ".join(
                    f"{mode} {point[mode]['good']}/{point[mode]['requests']} {point[mode]['good_by_round']}"
                    f" (TTFT {point[mode]['ttft_p50_ms']:.0f}, TPOT {point[mode]['tpot_p50_ms']:.1f} ms)"
                    for mode in MODES
                )
                print(f"{mix.name} at {point['rate_per_s']:.1f}/s: {told}", file=sys.stderr, flush=True)
        choices = metrics(urls["auto"])
    print("\n".join(choices))
    print(f"{describe_machine()}; model {options.model}, {options.rounds} times {options.seconds:g} s a point\n")
    show(points, slos)
    if options.out:
        told = {
            "points": points,
            "slos": {name: {c: str(slo) for c, slo in each.items()} for name, each in slos.items()},
        }
        options.out.write_text(json.dumps(told, indent=1))
    return 1 if any(point[mode]["failed"] for point in points for mode in MODES) else 0


if __name__ == "__main__":
    sys.exit(main())
