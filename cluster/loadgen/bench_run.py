"""One `baton bench` from options to tables: finds the server, runs the plan, writes what was found."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from baton.cluster.event_loop import run_event_loop
from baton.cluster.loadgen.bench import Bench
from baton.cluster.loadgen.bench_files import BenchFiles, load_trace
from baton.cluster.loadgen.machine import describe_machine, describe_versions
from baton.cluster.loadgen.plan import Plan
from baton.cluster.loadgen.progress_bar import ProgressBar
from baton.cluster.loadgen.report import print_result
from baton.cluster.loadgen.result import PointResult, Result
from baton.cluster.loadgen.target import Sampling, ServerInfo, Target
from baton.cluster.run_state import read_run_state
from baton.cluster.summary import base_url
from baton.errors import ConfigError, UnavailableError

__all__ = ["Where", "run_bench"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """The server: `url`, else the cluster of that name that runs here."""

    cluster: str = "baton"
    url: str | None = None
    over_grpc: bool = False
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None

    def resolve(self) -> Where:
        """With the URL of the running cluster.

        Raises:
            UnavailableError: no such cluster, or it is not ready.
            ConfigError: the URL is of another kind.
        """
        if self.url is None:
            state = read_run_state(self.cluster)
            if not state.ready:
                raise UnavailableError(
                    f"{self.cluster} is still starting; `baton status --name {self.cluster}` shows it"
                )
            url = f"grpc://{state.grpc_address}" if self.over_grpc else state.http_url
            return Where(
                cluster=self.cluster, url=url, api_key=self.api_key or state.api_key, model=self.model
            ).resolve()
        kind, separator, rest = self.url.partition("://")
        if not separator or kind not in ("http", "https", "grpc") or not rest.strip("/"):
            raise ConfigError(f"the server must be http://..., https://... or grpc://host:port, got {self.url!r}")
        if self.over_grpc and kind != "grpc":
            raise ConfigError(
                f"--grpc is for the cluster that runs here; as a URL say grpc://host:port, got {self.url!r}"
            )
        return Where(cluster=self.cluster, url=base_url(self.url), api_key=self.api_key, model=self.model)


def run_bench(plan: Plan, where: Where, files: BenchFiles) -> bool:
    """Measure, print, write; whether any request was answered.

    Raises:
        BatonError: the options contradict each other, or the server cannot be reached or refuses such requests.
    """
    files.check()
    plan.check()
    trace = load_trace(Path(plan.trace), plan.max_trace_rows) if plan.trace else None
    where = where.resolve()
    info = _find(plan, where)
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    with ProgressBar(plan, sys.stderr) as bar:

        async def measure() -> list[PointResult]:
            # A gRPC channel belongs to the loop that it is made in.
            target = _open(plan, where, info)
            bench = Bench(plan, target, trace=trace, on_progress=bar.show, on_point=files.add_records)
            return await bench.run()

        points = run_event_loop(measure())
    about = {
        "begun": begun,
        "command": _shown(sys.argv[1:], where.api_key),
        "server": asdict(info),
        "versions": describe_versions(),
        "machine": describe_machine(),
    }
    result = Result(parameters=plan.as_dict(), about=about, points=points)
    if points:
        print_result(result, Console())
        files.write(result)
    return any(point.summary.ok for point in points)


def _shown(arguments: list[str], api_key: str | None) -> list[str]:
    """The command line without the key."""
    return ["baton", *(text.replace(api_key, "...") if api_key else text for text in arguments)]


def _find(plan: Plan, where: Where) -> ServerInfo:
    assert where.url is not None
    if where.url.startswith("grpc://"):
        from baton.cluster.loadgen.grpc_target import find_grpc_server

        if plan.chat:
            raise ConfigError("--chat needs HTTP: the gRPC request has no such field")
        return find_grpc_server(where.url.removeprefix("grpc://"), api_key=where.api_key)
    from baton.cluster.loadgen.http_target import find_server

    return find_server(where.url, api_key=where.api_key, model=where.model)


def _open(plan: Plan, where: Where, info: ServerInfo) -> Target:
    sampling = Sampling(temperature=plan.temperature, ignore_eos=plan.ignore_eos, send_slo=plan.send_slo)
    if info.kind == "grpc":
        from baton.cluster.loadgen.grpc_target import GrpcTarget

        return GrpcTarget(info, sampling, api_key=where.api_key)
    from baton.cluster.loadgen.http_target import HttpTarget

    return HttpTarget(info, sampling, api_key=where.api_key, is_chat=plan.chat, wants_ids=not plan.text)
