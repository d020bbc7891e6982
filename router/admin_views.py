"""What `/admin/` tells of workers and of requests in work, as JSON: pure, and bounded. Time is an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.instances import Instance
from baton.router.request_ids import split_engine_id
from baton.router.retries import Retries

__all__ = ["MAX_INSTANCES", "MAX_LISTED", "LiveView", "instances_dict", "requests_dict"]

MAX_LISTED = 1000
"""Requests in work that are told at once."""
MAX_INSTANCES = 1024
"""Workers that are told at once."""


class LiveView(Protocol):
    """What is told of a request in work, see `dispatch.LiveRequest`."""

    deadline_s: float
    emitted_ids: list[int]
    attempt: int
    decode_instance: str
    prefill_instance: str
    retries: Retries
    phase: str

    @property
    def request(self) -> Any:
        """As first dispatched."""
        ...


def _load_dict(load: pb.WorkerLoad) -> dict[str, Any]:
    """Every figure of a load report, zeros too."""
    return {field.name: getattr(load, field.name) for field in pb.WorkerLoad.DESCRIPTOR.fields}


def _instance_dict(instance: Instance, about: Mapping[str, Any]) -> dict[str, Any]:
    """One worker, as this router sees it now.

    Args:
        about: what others say of it.
    """
    view, status = instance.view(), instance.status
    looked_up = instance.looked_up_tokens
    return {
        "id": view.instance_id,
        "role": view.role,
        "state": view.state,
        "connected": view.connected,
        "listed": instance.listed,
        "slowness": view.slowness,
        "incarnation": status.incarnation.hex(),
        "address": status.address,
        "host_id": view.host_id,
        "block_size": view.block_size,
        "load": _load_dict(instance.load),
        "own": {
            "requests": view.own_requests,
            "prefill_tokens": view.own_prefill_tokens,
            "max_tokens": view.own_max_tokens,
        },
        "others": {"requests": instance.others.requests, "prefill_tokens": instance.others.prefill_tokens},
        "prefix": {
            "looked_up_tokens": looked_up,
            "hit_tokens": instance.hit_tokens,
            "hit_ratio": round(instance.hit_tokens / looked_up, 4) if looked_up else None,
        },
        **about,
    }


def instances_dict(instances: Iterable[Instance], about: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """All workers, by id; `about` says of one what `Instance` does not."""
    known = sorted(instances, key=lambda instance: instance.instance_id)
    told = [_instance_dict(instance, about(instance.instance_id)) for instance in known[:MAX_INSTANCES]]
    return {"total": len(known), "instances": told}


def requests_dict(
    running: Iterator[tuple[str, float, LiveView]], *, total: int, limit: int, now_s: float
) -> dict[str, Any]:
    """Requests in work, the oldest first.

    Args:
        running: (public id, arrival, choice), oldest first.
        total: how many there are.
        limit: how many are told.
    """
    return {"total": total, "requests": [_request_dict(*each, now_s) for each in islice(running, limit)]}


def _request_dict(public_id: str, arrival_s: float, live: LiveView, now_s: float) -> Mapping[str, Any]:
    name = live.request.request_id
    return {
        "id": public_id,
        "unique_id": name,
        "choice": split_engine_id(name)[2],
        "phase": live.phase,
        "attempt": live.attempt,
        "interruptions": live.retries.attempts,
        "prompt_tokens": len(live.request.prompt_token_ids),
        "tokens": len(live.emitted_ids),
        "max_tokens": live.request.sampling.max_tokens,
        "age_s": round(max(now_s - arrival_s, 0.0), 3),
        "deadline_in_s": round(live.deadline_s - now_s, 3),
        "prefill": live.prefill_instance,
        "decode": live.decode_instance,
    }
