"""What `baton up` says once everything is ready: where to connect, what fits, and what to type next."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from baton.config import ClusterConfig
from baton.proto.baton.v1 import worker_pb2

__all__ = ["base_url", "capacity_text", "faults_text", "layout_text", "ready_text", "stop_text"]


def base_url(http_url: str) -> str:
    """The router's URL without a trailing slash or version."""
    return http_url.rstrip("/").removesuffix("/v1")


def layout_text(tensor_parallel: int, pipeline_parallel: int, num_ranks: int) -> str:
    """ "TP2 x PP2, 4 ranks"; "1 rank"."""
    return "1 rank" if num_ranks == 1 else f"TP{tensor_parallel} x PP{pipeline_parallel}, {num_ranks} ranks"


def capacity_text(instances: Sequence[worker_pb2.WorkerStatus]) -> str:
    """How much the decode workers hold: tokens, and requests of the greatest length at once."""
    decoders = [status for status in instances if status.role == "decode"]
    num_tokens = sum(status.load.kv_blocks_total * status.layout.block_size for status in decoders)
    max_model_len = max((status.max_model_len for status in decoders), default=0)
    if not num_tokens or not max_model_len:
        return "unknown"
    at_once = sum(status.load.kv_blocks_total // -(-max_model_len // status.layout.block_size) for status in decoders)
    return (
        f"{num_tokens:,} tokens on the decode side: {at_once:,} requests at once at the full {max_model_len:,} tokens"
    )


def faults_text(config: ClusterConfig) -> str:
    """Lines that nobody overlooks where things are to go wrong on purpose; empty where not."""
    lines = [f"FAULTS ARE ON  {rule}" for rule in config.faults.rules]
    if config.faults.allow_at_runtime:
        lines.append("FAULTS ARE ON  any, set at run time: faults.allow_at_runtime is for tests, never for production")
    return "".join(f"{line}\n" for line in lines)


def stop_text(name: str, *, detached: bool) -> str:
    """How to stop the cluster `name`: the line with which `ready_text` ends, but for faults."""
    return f"{_command()} down{_name_option(name)} stops everything." if detached else "Ctrl-C stops everything."


def ready_text(
    config: ClusterConfig, launcher: str, instances: Sequence[worker_pb2.WorkerStatus], *, detached: bool = False
) -> str:
    """The lines printed by `baton up`."""
    routers = [status for status in instances if status.role == "router"]
    router, url = routers[0], base_url(routers[0].http_url)
    baton, name = _command(), _name_option(config.name)
    pools = [
        f"{pool.replicas} {role}"
        + (
            f" of {layout_text(pool.tensor_parallel, pool.pipeline_parallel, ranks)}"
            if (ranks := pool.num_ranks) > 1
            else ""
        )
        for role, pool in (("prefill", config.prefill), ("decode", config.decode))
        if pool.replicas
    ]
    if config.is_colocated:
        pools.append("colocated")
    if len(routers) > 1:
        pools.append(f"{len(routers)} routers")
    body = json.dumps(
        {"model": config.served_model_name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    )
    key = ' -H "Authorization: Bearer $BATON_API_KEY"' if config.router.api_key else ""
    return f"""
Baton serves {config.served_model_name} ({", ".join([*pools, launcher])})

  OpenAI API  {url}/v1
  gRPC        {router.grpc_address}
  metrics     {", ".join(status.metrics_url for status in routers)}
  KV cache    {capacity_text(instances)}

Next
  {baton} chat{name}
  curl {url}/v1/chat/completions -H "Content-Type: application/json"{key} -d '{body}'
  {baton} status{name}
  {baton} top{name}

{stop_text(config.name, detached=detached)}
{faults_text(config)}"""


def _name_option(name: str) -> str:
    return "" if name == "baton" else f" --name {name}"


def _command() -> str:
    """How this user can type `baton`."""
    if shutil.which("baton"):
        return "baton"
    program = Path(sys.executable).parent / "baton"
    if not program.exists():
        return f"{sys.executable} -m baton.cluster.cli"
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)
