"""Blocking calls from the command line to a running cluster: its registry, and each worker's own status."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import grpc

from baton.errors import NotFoundError, UnavailableError
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc

__all__ = ["ClusterView", "get_cluster", "hold_instance", "list_instances", "stop_cluster"]

_REGISTRY_DEADLINE_S = 5.0
_WORKER_DEADLINE_S = 2.0
# A controller that died is back by then: what a command holds it must be able to release.
_HOLD_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The registry's list, with each worker's own fresh status where it answered.

    Attributes:
        unreachable: ids of instances that have an address and did not answer; their status is the last announced one.
    """

    instances: worker_pb2.InstanceList
    unreachable: frozenset[str]


def get_cluster(registry_address: str) -> ClusterView:
    """Ask the registry, then every instance.

    Raises:
        UnavailableError: the registry does not answer.
    """
    instances = list_instances(registry_address)
    unreachable = set()
    for status in instances.instances:
        if not status.address or status.role == "router":
            continue
        fresh = _get_status(status.address)
        if fresh is None or fresh.incarnation != status.incarnation:
            unreachable.add(status.instance_id)
        else:
            status.CopyFrom(fresh)
    return ClusterView(instances, frozenset(unreachable))


def list_instances(registry_address: str) -> worker_pb2.InstanceList:
    """What the registry has heard of every instance lately.

    Raises:
        UnavailableError: the registry does not answer.
    """
    with grpc.insecure_channel(registry_address) as channel:
        try:
            listed: worker_pb2.InstanceList = worker_pb2_grpc.RegistryStub(channel).GetCluster(
                worker_pb2.GetClusterRequest(), timeout=_REGISTRY_DEADLINE_S
            )
        except grpc.RpcError as error:
            raise _unavailable(registry_address, error) from error
        return listed


def stop_cluster(registry_address: str) -> None:
    """Ask the controller to stop everything.

    Raises:
        UnavailableError: the registry does not answer.
    """
    with grpc.insecure_channel(registry_address) as channel:
        try:
            worker_pb2_grpc.RegistryStub(channel).StopCluster(
                worker_pb2.StopClusterRequest(), timeout=_REGISTRY_DEADLINE_S
            )
        except grpc.RpcError as error:
            raise _unavailable(registry_address, error) from error


def hold_instance(registry_address: str, instance_id: str, *, held: bool) -> None:
    """Have the controller drain an instance and keep it away, or release it.

    Raises:
        NotFoundError: there is no such instance.
        UnavailableError: the registry does not answer.
    """
    request = worker_pb2.HoldRequest(instance_id=instance_id, held=held)
    with grpc.insecure_channel(registry_address) as channel:
        try:
            worker_pb2_grpc.RegistryStub(channel).Hold(request, timeout=_HOLD_DEADLINE_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.NOT_FOUND:
                raise NotFoundError(str(error.details())) from error
            raise _unavailable(registry_address, error, _HOLD_DEADLINE_S) from error


def _get_status(address: str) -> worker_pb2.WorkerStatus | None:
    with grpc.insecure_channel(address) as channel, suppress(grpc.RpcError):
        status: worker_pb2.WorkerStatus = worker_pb2_grpc.WorkerStub(channel).GetStatus(
            worker_pb2.GetStatusRequest(), timeout=_WORKER_DEADLINE_S
        )
        return status
    return None


def _unavailable(address: str, error: grpc.RpcError, deadline_s: float = _REGISTRY_DEADLINE_S) -> UnavailableError:
    code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
    return UnavailableError(
        f"the controller at {address} does not answer ({code} within {deadline_s:.0f} s); one that died is back in a"
        " moment, and what serves goes on; if it is gone for good, `baton down` cleans up"
    )
