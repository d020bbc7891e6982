"""What admission is for: goodput under overload, and tenants that leave each other their share.

Usage: python bench/admission.py overload|fairness [--seconds 8] [--rounds 3] [--limit SHARES] [--json FILE] [--set k=v]

Both start `baton up` (launcher local, the model that ships, a worker of each kind), measure how many requests a second
it serves (closed loop), and send loads as they come (Poisson) from the generator of `baton bench`, in this process; all
loads in turn, --rounds times, since a machine that is shared is another one every minute.

overload  0.5 to 3 times that, with `admission.reject_early` and without: requests a second whose first token came
          within --slo-ms, of which every request tells the router. Held: at 3x, 90 % of the most.
fairness  Four tenants that send an eighth of the capacity each (--share 8), alone, beside a fifth that does too, and
          beside one that sends ten times as much. Held: the four's p95 TTFT moves by at most 20 % between the last two.
          Five of a sixth (--share 6) are at the machine's limit, where no queue has a p95 to speak of. With --limit
          each tenant has a token rate of so many shares, and a burst of two seconds of it.

Exit code 1 where what is held is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.cluster.event_loop import run_event_loop
from baton.cluster.loadgen.bench import Bench
from baton.cluster.loadgen.http_target import HttpTarget, find_server
from baton.cluster.loadgen.plan import Plan, Point
from baton.cluster.loadgen.records import Outcome, Record
from baton.cluster.loadgen.result import PointResult
from baton.cluster.loadgen.target import Sampling
from own_cluster import Cluster, settings
from quiet_machine import describe_machine, others_cores

_LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)
_CAPACITY_CLIENTS = 32
_CAPACITY_S = 6.0
_DRAIN_S = 3.0
_FILLING_S = 1.0
"""Of a load, until its queue is as long as it gets."""
_CALM = ("a", "b", "c", "d")
_HELD_GOODPUT = 0.9
_HELD_P95 = 1.2
_BURST_S = 2.0
_ROWS = {"alone": 0, "beside one that sends its share": 1, "beside one that sends 10x": 10}
"""Of the fairness table: how many shares the fifth sends."""


class Load:
    """Sends plans to one cluster; a number of its own for each, so that no two share prompts."""

    def __init__(self, cluster: Cluster, options: argparse.Namespace) -> None:
        statuses = cluster.wait_ready()
        self._url = next(status.http_url for status in statuses.values() if status.role == "router")
        self._seed = options.seed * 1000
        self._lengths = {"input": options.input, "output": options.output}

    def send(self, **options: Any) -> tuple[PointResult, list[Record]]:
        """One run, and all that became of its requests."""
        self._seed += 1
        plan = Plan(**self._lengths, drain_s=_DRAIN_S, seed=self._seed, **options)
        records: list[Record] = []

        def keep(point: Point, found: Sequence[Record]) -> None:
            records.extend(found)

        async def run() -> list[PointResult]:
            sampling = Sampling(send_slo=plan.send_slo)
            target = HttpTarget(
                find_server(self._url, api_key=None, model=None), sampling, api_key=None, is_chat=False, wants_ids=False
            )
            return await Bench(plan, target, trace=None, on_progress=lambda *_: None, on_point=keep).run()

        (result,) = run_event_loop(run())
        return result, records

    def capacity_per_s(self) -> float:
        """Answered requests a second with many clients."""
        result, _ = self.send(concurrency=_CAPACITY_CLIENTS, requests=100_000, duration_s=_CAPACITY_S)
        return result.summary.requests_per_s


def overload(options: argparse.Namespace) -> dict[str, Any]:
    """Goodput over the load, with early refusal and without."""
    rows: dict[str, list[dict[str, float]]] = {}
    capacity_per_s = 0.0
    for rejects in (True, False):
        with _cluster(options, f"admission.reject_early={str(rejects).lower()}") as cluster:
            load = Load(cluster, options)
            capacity_per_s = capacity_per_s or load.capacity_per_s()
            name = "early refusal" if rejects else "none"
            print(f"{name}: serves {capacity_per_s:.1f} requests/s, SLO {options.slo_ms:g} ms to the first token")
            found: dict[float, list[tuple[PointResult, list[Record]]]] = {factor: [] for factor in _LOADS}
            for _ in range(options.rounds):
                for factor in _LOADS:
                    sent = load.send(
                        rate_per_s=factor * capacity_per_s,
                        duration_s=options.seconds,
                        slo=f"ttft_ms={options.slo_ms:g}",
                        send_slo=True,
                    )
                    found[factor].append(sent)
            rows[name] = [_goodput_row(factor, sent, options) for factor, sent in found.items()]
    early = [row["goodput_per_s"] for row in rows["early refusal"]]
    kept = early[-1] / max(early)
    print(f"at {_LOADS[-1]:g}x: {kept:.0%} of the most with early refusal,", end=" ")
    print(f"{rows['none'][-1]['goodput_per_s'] / max(early):.0%} without")
    return {"capacity_per_s": capacity_per_s, "rows": rows, "kept": kept, "holds": kept >= _HELD_GOODPUT}


def _goodput_row(
    factor: float, sent: Sequence[tuple[PointResult, list[Record]]], options: argparse.Namespace
) -> dict[str, Any]:
    summaries = [result.summary for result, _ in sent]
    requests = sum(each.requests for each in summaries)
    attained = sum((each.attainment or 0.0) * each.requests for each in summaries)
    good = [_goodput_per_s(records, options) for _, records in sent]
    row = {
        "load": factor,
        "offered_per_s": requests / options.seconds / len(sent),
        "goodput_per_s": sum(good) / len(good),
        "goodput_by_round": good,
        "rejected": sum(each.rejection_rate * each.requests for each in summaries) / max(requests, 1),
        "too_late": (sum(each.ok for each in summaries) - attained) / max(requests, 1),
        "aborted": sum(each.abort_rate * each.requests for each in summaries) / max(requests, 1),
    }
    by_round = ", ".join(f"{each:.1f}" for each in good)
    print(
        f"  {factor:3.1f}x {row['offered_per_s']:7.1f}/s offered, {row['goodput_per_s']:7.1f}/s in time ({by_round}),"
        f" {row['rejected']:4.0%} refused, {row['too_late']:4.0%} too late, {row['aborted']:4.0%} cut off"
    )
    return row


def _goodput_per_s(records: Sequence[Record], options: argparse.Namespace) -> float:
    """First tokens that came in time while the load lasted: what is answered after its end would favour deep queues."""
    slo_s = options.slo_ms / 1000
    good = [
        record
        for record in records
        if record.outcome is Outcome.OK
        and record.ttft_s is not None
        and record.ttft_s <= slo_s
        and _FILLING_S <= record.chunk_at_s[0] < options.seconds
    ]
    return len(good) / (options.seconds - _FILLING_S)


def fairness(options: argparse.Namespace) -> dict[str, Any]:
    """The TTFT of four tenants beside a fifth."""
    capacity_per_s = options.capacity
    if not capacity_per_s:
        with _cluster(options) as cluster:
            capacity_per_s = Load(cluster, options).capacity_per_s()
    share_per_s = capacity_per_s / options.share
    print(f"serves {capacity_per_s:.1f} requests/s; a share is {share_per_s:.1f} requests/s")
    with _cluster(options, *_limits(options, share_per_s)) as cluster:
        load = Load(cluster, options)
        load.send(concurrency=_CAPACITY_CLIENTS, requests=100_000, duration_s=_CAPACITY_S)  # to know what things cost
        found: dict[str, list[tuple[PointResult, list[Record]]]] = {name: [] for name in _ROWS}
        for _ in range(options.rounds):
            for name, times in _ROWS.items():
                classes = [f"{tenant}:1:tenant={tenant}" for tenant in _CALM]
                classes += [f"e:{times}:tenant=e"] if times else []
                rate_per_s = share_per_s * (len(_CALM) + times)
                sent = load.send(rate_per_s=rate_per_s, duration_s=2 * options.seconds, classes=tuple(classes))
                found[name].append(sent)
    rows = {name: _wait_row(name, sent) for name, sent in found.items()}
    with_share, with_ten = (row["p95_ms"] for row in list(rows.values())[1:])
    print(f"p95 beside the one that sends 10x: {with_ten / with_share:.2f} of that beside one that sends its share")
    return {
        "capacity_per_s": capacity_per_s,
        "limit_shares": options.limit,
        "rows": rows,
        "moved": with_ten / with_share,
        "holds": with_ten <= _HELD_P95 * with_share,
    }


def _limits(options: argparse.Namespace, share_per_s: float) -> list[str]:
    """Settings of a token rate for each tenant."""
    if not options.limit:
        return []
    rate = options.limit * share_per_s * (int(options.input) + int(options.output))
    key = "admission.default_tenant"
    return [f"{key}.tokens_per_s={rate:.0f}", f"{key}.burst_tokens={_BURST_S * rate:.0f}"]


def _wait_row(name: str, sent: Sequence[tuple[PointResult, list[Record]]]) -> dict[str, Any]:
    """What the four waited, in all rounds and in each."""
    rounds = [sorted(r.ttft_s for r in records if r.class_name != "e" and r.ttft_s is not None) for _, records in sent]
    calm = sorted(ttft_s for each in rounds for ttft_s in each)
    by_round = [1e3 * each[int(0.95 * len(each))] for each in rounds]
    row = {
        "p50_ms": 1e3 * calm[len(calm) // 2],
        "p95_ms": 1e3 * calm[int(0.95 * len(calm))],
        "p95_ms_by_round": by_round,
        "answered": len(calm),
        "refused": sum(result.classes[tenant].rejected for result, _ in sent for tenant in _CALM),
        "requests_per_s": sum(result.summary.requests_per_s for result, _ in sent) / len(sent),
    }
    print(
        f"  {name:32} the four: p50 {row['p50_ms']:6.1f} ms, p95 {row['p95_ms']:6.1f} ms"
        f" ({', '.join(f'{each:.0f}' for each in by_round)}), {row['answered']} answered, {row['refused']} refused;"
        f" all {row['requests_per_s']:6.1f}/s"
    )
    return row


def _cluster(options: argparse.Namespace, *pairs: str) -> Cluster:
    folder = Path(tempfile.mkdtemp(prefix="baton-admission-"))
    fixed = ("name=bench-admission", "router.http=127.0.0.1:0", "router.grpc=127.0.0.1:0")
    return Cluster(folder, ["--launcher", "local", *settings(*fixed, *pairs, *options.set)])


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("overload", "fairness"))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument(
        "--input", default="256", help="prompt tokens; small requests measure the generator's cores too"
    )
    parser.add_argument("--output", default="64", help="answer tokens")
    parser.add_argument("--slo-ms", type=float, default=1000.0)
    parser.add_argument("--rounds", type=int, default=3, help="of all loads in turn")
    parser.add_argument("--capacity", type=float, help="requests/s, where it is known")
    parser.add_argument("--limit", type=float, help="of fairness: each tenant's token rate, in shares")
    parser.add_argument("--share", type=float, default=8.0, help="of the capacity, what a tenant sends: one in so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", action="append", default=[], help="key=value of the cluster's configuration")
    options = parser.parse_args()
    machine = {**describe_machine(), "others_cores": others_cores()}
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['others_cores']:.1f} of them busy otherwise")
    result = {"overload": overload, "fairness": fairness}[options.command](options)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, **result}, indent=1))
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    main()
