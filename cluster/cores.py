"""Which cores and how many threads the workers of this host get, as configured. Free of torch, asked before that."""

from __future__ import annotations

import math
import os
from pathlib import Path

from baton.config import ClusterConfig
from baton.engine.core_plan import Place, plan_cores

__all__ = ["available_cores", "cores_text", "group_cores", "num_threads", "place_of", "whole_cores"]

_GROUPS = ("prefill", "decode")
"""The order in which workers of a host take cores."""


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, and the limit of its control group where there is one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def whole_cores() -> list[int]:
    """Numbers of the cores that this process may pin threads to; none where it has a share of all, not its own."""
    cores = sorted(os.sched_getaffinity(0))
    return cores if available_cores() == len(cores) else []


def num_threads(config: ClusterConfig, role: str, cores: int) -> int:
    """Threads of torch's operators in a rank of `role`; auto shares `cores` among the ranks of all workers."""
    if role == "router":
        return 1
    cpu = config.cpu_of(role)
    if cpu.threads != "auto":
        return cpu.threads
    if cpu.cores != "auto":
        pool = config.pool(role)
        return max(1, len(cpu.cores) // (pool.replicas * pool.num_ranks))
    return max(1, cores // config.num_worker_ranks)


def place_of(role: str, index: int, rank: int) -> Place:
    """A worker's place among those of its host."""
    return Place(_GROUPS.index(role), index, rank)


def group_cores(config: ClusterConfig) -> dict[int, tuple[int, ...]]:
    """Groups that have cores of their own."""
    return {group: cores for group, role in enumerate(_GROUPS) if (cores := config.cpu_of(role).cores) != "auto"}


def cores_text(config: ClusterConfig, host_cores: list[int]) -> str:
    """Which cores each worker owns if all run on this host: "prefill-0 core 0, decode-0 core 1; ..."."""
    if not host_cores:
        return f"a share of {available_cores()} cores: threads are not pinned, no core is lent"
    places = [
        place_of(role, index, rank)
        for role in _GROUPS
        for index in range(config.pool(role).replicas)
        for rank in range(config.num_ranks_of(role))
    ]
    plan = plan_cores(places, host_cores, group_cores(config))
    parts = []
    for role in _GROUPS:
        owned = [cores for place, cores in plan.items() if _GROUPS[place.group] == role]
        if not owned:
            continue
        threads = config.cpu_of(role).threads
        each = "as many threads as cores, more while others are idle" if threads == "auto" else f"{threads} threads"
        parts.append(f"{role} {' | '.join(map(_ranges, owned))} ({each})")
    return f"{len(host_cores)} cores: {'; '.join(parts)}"


def _ranges(cores: tuple[int, ...]) -> str:
    """ "0-3,8" of (0, 1, 2, 3, 8)."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
