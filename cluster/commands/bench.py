"""`baton bench`: offer a load to a server, and say how it was served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from baton.cluster.commands.options import NameOption

__all__ = ["bench"]

_LOAD, _REQUESTS, _LIMITS, _OUTPUT = "Load", "Requests", "Limits", "Output"


def bench(
    url: Annotated[
        str | None, typer.Argument(help="http://... or grpc://host:port; without it the cluster that runs here.")
    ] = None,
    name: NameOption = "baton",
    grpc: Annotated[bool, typer.Option("--grpc", help="Over the cluster's gRPC instead of HTTP.")] = False,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="BATON_API_KEY", help="Key of that server.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model name, when the server has several.")] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", "-r", min=1e-6, help="Open loop: requests a second.", rich_help_panel=_LOAD),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "-c", min=1, help="Closed loop: at once.", rich_help_panel=_LOAD)
    ] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="rate=1,2,4 or concurrency=1,8,32.", rich_help_panel=_LOAD)
    ] = None,
    arrivals: Annotated[
        str,
        typer.Option(
            "--arrivals", help="poisson, constant, gamma:cv=3, bursts:on_s=5,off_s=15.", rich_help_panel=_LOAD
        ),
    ] = "poisson",
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Replay a trace, hash_ids and all.", rich_help_panel=_LOAD)
    ] = None,
    time_scale: Annotated[
        float, typer.Option("--time-scale", min=1e-6, help="Of the trace: 2 is half as fast.", rich_help_panel=_LOAD)
    ] = 1.0,
    length_scale: Annotated[
        float, typer.Option("--length-scale", min=1e-6, help="Of the trace: 0.0625 is a 16th.", rich_help_panel=_LOAD)
    ] = 1.0,
    sessions: Annotated[
        str | None,
        typer.Option(
            "--sessions",
            help="Conversations: turns=4,system_prompts=4,system_tokens=256,think_s=1.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", help="A part of the mix: gold:0.2:priority=10,tenant=a,ttft_ms=200.", rich_help_panel=_LOAD
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same load.", rich_help_panel=_LOAD)] = 1,
    input_tokens: Annotated[
        str, typer.Option("--input", help="N, LOW-HIGH, lognormal:median=256,sigma=1.", rich_help_panel=_REQUESTS)
    ] = "256",
    output_tokens: Annotated[
        str, typer.Option("--output", help="As --input; answers are exactly so long.", rich_help_panel=_REQUESTS)
    ] = "64",
    text: Annotated[
        bool, typer.Option("--text", help="Text for servers that take no token ids.", rich_help_panel=_REQUESTS)
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Text, over /v1/chat/completions.", rich_help_panel=_REQUESTS)
    ] = False,
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", help="Token ids are below this.", rich_help_panel=_REQUESTS)
    ] = 4000,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0, rich_help_panel=_REQUESTS)] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Write on behind the end of text.", rich_help_panel=_REQUESTS)
    ] = True,
    slo: Annotated[
        str, typer.Option("--slo", help="ttft_ms=300,tpot_ms=50,e2e_ms=5000.", rich_help_panel=_REQUESTS)
    ] = "",
    send_slo: Annotated[
        bool,
        typer.Option("--send-slo", help="Tell the server the objective of each request.", rich_help_panel=_REQUESTS),
    ] = False,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="Wait out a 429 so often, as told.", rich_help_panel=_REQUESTS)
    ] = 0,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            min=1,
            help="At most, each point; closed loop: 200, open: as time holds.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    duration_s: Annotated[
        float, typer.Option("--duration", "-d", min=0.001, help="Seconds for sending.", rich_help_panel=_LIMITS)
    ] = 60.0,
    drain_s: Annotated[
        float, typer.Option("--drain", min=0, help="Seconds for the last answers.", rich_help_panel=_LIMITS)
    ] = 60.0,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Seconds for one request.", rich_help_panel=_LIMITS)
    ] = 120.0,
    max_in_flight: Annotated[
        int, typer.Option("--max-in-flight", min=1, help="Open loop: most at once.", rich_help_panel=_LIMITS)
    ] = 2048,
    warm_up: Annotated[
        int, typer.Option("--warm-up", min=0, help="Requests before it counts.", rich_help_panel=_LIMITS)
    ] = 2,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures.", rich_help_panel=_OUTPUT)
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw a picture.", rich_help_panel=_OUTPUT)] = None,
    records: Annotated[
        Path | None, typer.Option("--records", help="Write a line of JSON per request.", rich_help_panel=_OUTPUT)
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Two files of --json side by side.", rich_help_panel=_OUTPUT),
    ] = None,
) -> None:
    """Offer a load to any OpenAI-compatible server, or to Baton's gRPC, and measure how it is served."""
    from baton.cluster.loadgen.bench_files import BenchFiles, compare_files
    from baton.cluster.loadgen.bench_run import Where, run_bench
    from baton.cluster.loadgen.plan import Plan

    if compare is not None:
        compare_files(*compare)
        return
    plan = Plan(
        rate_per_s=rate,
        concurrency=concurrency,
        sweep=sweep,
        arrivals=arrivals,
        trace=str(trace) if trace else None,
        time_scale=time_scale,
        length_scale=length_scale,
        sessions=sessions,
        classes=tuple(classes or ()),
        input=input_tokens,
        output=output_tokens,
        requests=requests,
        warm_up=warm_up,
        duration_s=duration_s,
        drain_s=drain_s,
        timeout_s=timeout_s,
        max_in_flight=max_in_flight,
        retries=retries,
        slo=slo,
        send_slo=send_slo,
        seed=seed,
        vocabulary=vocabulary,
        text=text or chat,
        chat=chat,
        temperature=temperature,
        ignore_eos=ignore_eos,
    )
    where = Where(cluster=name, url=url, over_grpc=grpc, api_key=api_key, model=model)
    if not run_bench(plan, where, BenchFiles(json=json_path, plot=plot, records=records)):
        raise typer.Exit(1)
