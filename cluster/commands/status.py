"""`baton status`: every instance of a running cluster, for people or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from baton.cluster.commands.options import NameOption

if TYPE_CHECKING:
    from baton.cluster.client import ClusterView
    from baton.proto.baton.v1.worker_pb2 import WorkerStatus

__all__ = ["status"]


def status(
    name: NameOption = "baton",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every rank of every instance.")] = False,
) -> None:
    """Show instances, processes, KV blocks and load."""
    from baton.cluster.client import get_cluster
    from baton.cluster.run_state import read_run_state

    view = get_cluster(read_run_state(name).registry_address)
    if as_json:
        import json

        typer.echo(json.dumps(cluster_dict(view), indent=2))
    else:
        typer.echo(table_text(cluster_dict(view), verbose=verbose))


def cluster_dict(view: ClusterView) -> dict[str, Any]:
    """The JSON form; KV blocks are None for instances without a KV cache."""
    return {
        "name": view.instances.cluster_name,
        "launcher": view.instances.launcher,
        "controller_address": view.instances.controller_address,
        "version": view.instances.version,
        "instances": [
            _instance_dict(status, status.instance_id in view.unreachable) for status in view.instances.instances
        ],
    }


def _instance_dict(status: WorkerStatus, unreachable: bool) -> dict[str, Any]:
    load = status.load
    blocks = {
        "total": load.kv_blocks_total,
        "free": load.kv_blocks_free,
        "cached": load.kv_blocks_cached,
        "owned": load.kv_blocks_owned,
    }
    return {
        "id": status.instance_id,
        "role": status.role,
        "state": "unreachable" if unreachable else status.state,
        "detail": status.detail,
        "incarnation": status.incarnation.hex(),
        "address": status.address,
        "tensor_parallel": status.layout.tensor_parallel or 1,
        "pipeline_parallel": status.layout.pipeline_parallel or 1,
        "ranks": [
            {"rank": rank.rank, "pid": rank.pid, "host": rank.host, "address": rank.address} for rank in status.ranks
        ],
        "running": load.running_requests,
        "waiting": load.waiting_requests,
        "kv_blocks": blocks if status.role != "router" else None,
        "block_size": status.layout.block_size or None,
        "max_model_len": status.max_model_len or None,
        "model_fingerprint": status.model_fingerprint or None,
        "metrics_url": status.metrics_url or None,
        "admin_url": status.admin_url or None,
        "http_url": status.http_url or None,
        "grpc_address": status.grpc_address or None,
    }


def table_text(cluster: dict[str, Any], *, verbose: bool = False) -> str:
    """The form for people: one aligned line per instance, and per rank when `verbose`; never cut off."""
    head = ("instance", "state", "layout", "pid", "address", "incarnation", "run", "wait")
    rows: list[tuple[str, ...]] = [(*head, "KV total = free + cached + owned")]
    for instance in cluster["instances"]:
        blocks, ranks = instance["kv_blocks"], instance["ranks"]
        rows.append(
            (
                instance["id"],
                instance["state"],
                _layout_text(instance),
                ",".join(str(rank["pid"]) for rank in ranks),
                instance["http_url"] or instance["address"],
                instance["incarnation"][:8],
                str(instance["running"]),
                str(instance["waiting"]),
                f"{blocks['total']} = {blocks['free']} + {blocks['cached']} + {blocks['owned']}" if blocks else "",
            )
        )
        if verbose:
            rows += [_rank_row(rank) for rank in ranks]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{cluster['name']} ({cluster['launcher']}), registry {cluster['controller_address']}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for instance in cluster["instances"]:
        if instance["state"] != "ready":
            lines.append(f"{instance['id']}: {instance['state']}, {instance['detail'] or 'no answer'}")
    return "\n".join(lines)


def _layout_text(instance: dict[str, Any]) -> str:
    from baton.cluster.summary import layout_text

    num_ranks = len(instance["ranks"])
    return layout_text(instance["tensor_parallel"], instance["pipeline_parallel"], num_ranks) if num_ranks else ""


def _rank_row(rank: dict[str, Any]) -> tuple[str, ...]:
    return f"  rank {rank['rank']}", "", rank["host"], str(rank["pid"]), rank["address"], "", "", "", ""
