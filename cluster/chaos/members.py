"""The instances of a cluster as chaos sees them, whom a strike hits, and what cannot be done to a cluster. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.cluster.chaos.scenarios import Kill, Leave, Rules, Scenario, Stop
from baton.proto.baton.v1.worker_pb2 import WorkerStatus

__all__ = ["CONTROLLER", "Member", "Rank", "choose_victim", "has_spare", "member_of", "refusal"]

CONTROLLER = "controller"


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of an instance."""

    pid: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One instance as the registry lists it; the controller itself is one, of role "controller".

    Attributes:
        incarnation: in hexadecimal digits; empty while it starts.
        address: of its Worker service.
    """

    instance_id: str
    role: str
    state: str = "ready"
    incarnation: str = ""
    address: str = ""
    ranks: tuple[Rank, ...] = ()
    http_url: str = ""
    grpc_address: str = ""
    metrics_url: str = ""


def member_of(status: WorkerStatus) -> Member:
    """From the registry's own words."""
    return Member(
        instance_id=status.instance_id,
        role=status.role,
        state=status.state,
        incarnation=status.incarnation.hex(),
        address=status.address,
        ranks=tuple(Rank(rank.pid, rank.host) for rank in status.ranks),
        http_url=status.http_url.rstrip("/").removesuffix("/v1"),
        grpc_address=status.grpc_address,
        metrics_url=status.metrics_url,
    )


def choose_victim(members: Sequence[Member], role: str, turn: int) -> Member | None:
    """Whom to hit: the ready ones of `role` in turn. None: it must wait.

    Where several are wanted, the last ready decode worker or router is left alone: with nobody there to go on, nothing
    could be promised.
    """
    of_role = sorted((member for member in members if member.role == role), key=lambda member: member.instance_id)
    ready = [member for member in of_role if member.state == "ready"]
    if not ready or (len(ready) == 1 < len(of_role) and role in ("decode", "router")):
        return None
    return ready[turn % len(ready)]


def has_spare(members: Sequence[Member], role: str) -> bool:
    """Whether somebody can go on where an instance of `role` is lost; decode workers can do a prefill worker's work."""
    return role not in ("decode", "router") or sum(member.role == role for member in members) > 1


def refusal(scenario: Scenario, members: Sequence[Member], is_local: Callable[[str], bool], launcher: str) -> str:
    """Why `scenario` cannot be done to this cluster; empty when it can.

    Args:
        is_local: whether an address is this host's.
    """
    act = scenario.act
    if isinstance(act, Leave):
        return ""
    role = act.victim if isinstance(act, Rules) else act.role
    hit = [member for member in members if member.role == role]
    if role and not hit:
        return f"{scenario.name}: this cluster has no {role}"
    if isinstance(act, Rules):
        return ""
    assert isinstance(act, Kill | Stop)
    if act.role == "router" and len(hit) == 1:
        return (
            f"{scenario.name}: this cluster has one router, and its clients have nowhere to go;"
            " start it with --set router.replicas=2"
        )
    if act.role == CONTROLLER and launcher == "local":
        return f"{scenario.name}: with launcher local the controller is `baton up` itself; use launcher ray"
    for member in hit:
        for rank in member.ranks:
            if not is_local(rank.host):
                return (
                    f"{scenario.name}: {member.instance_id} runs on {rank.host};"
                    " processes can be hit on this host only, so run this there"
                )
    return ""
