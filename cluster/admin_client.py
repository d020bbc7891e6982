"""Asks the `/admin/` of every router at once: who knows, who does not, who says nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

from baton.cluster.client import list_instances
from baton.cluster.run_state import read_run_state
from baton.errors import AuthenticationError, NotFoundError, UnavailableError
from baton.proto.baton.v1.worker_pb2 import WorkerStatus

__all__ = ["Asked", "ask_router", "ask_routers", "find_request"]

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one router said.

    Attributes:
        status: of HTTP; 0: it did not answer.
        answer: empty where it has none.
        problem: why not, in words.
    """

    router_id: str
    url: str
    status: int = 0
    answer: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


async def ask_router(client: httpx.AsyncClient, router_id: str, url: str, path: str) -> Asked:
    """GET /admin/`path` of one router, within the client's timeout."""
    try:
        response = await client.get(f"{url}/admin/{path}")
        content = response.json()
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        return Asked(router_id=router_id, url=url, problem=f"no answer: {str(error) or type(error).__name__}")
    if response.status_code == 200:
        return Asked(router_id=router_id, url=url, status=200, answer=content)
    problem = str((content.get("error") or {}).get("message", response.text[:200]))
    return Asked(router_id=router_id, url=url, status=response.status_code, problem=problem)


async def ask_routers(routers: Iterable[WorkerStatus], path: str, api_key: str | None) -> list[Asked]:
    """GET /admin/`path` of all that have announced where it is."""
    async with admin_client(api_key, _TIMEOUT_S) as client:
        asking = [
            ask_router(client, status.instance_id, status.admin_url, path) for status in routers if status.admin_url
        ]
        return await asyncio.gather(*asking)


def admin_client(api_key: str | None, timeout_s: float) -> httpx.AsyncClient:
    """For calls to `/admin/` with this key."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # These ports are in the cluster: a proxy of this shell's is not between.
    return httpx.AsyncClient(headers=headers, timeout=timeout_s, trust_env=False)


def find_request(name: str, what: str, request_id: str, api_key: str | None) -> list[dict[str, Any]]:
    """/admin/`what`/`request_id` of those routers of the cluster `name` that know the request.

    Raises:
        UnavailableError: no cluster of this name runs here, its registry does not answer, or no router does.
        AuthenticationError: the key is wrong.
        NotFoundError: no router knows it; says who was asked, and what to do.
    """
    state = read_run_state(name)
    listed = list_instances(state.registry_address)
    routers = [status for status in listed.instances if status.role == "router"]
    path = f"{what}/{quote(request_id, safe='')}"
    asked = asyncio.run(ask_routers(routers, path, api_key or state.api_key))
    return found_answers(asked, request_id)


def found_answers(asked: Sequence[Asked], request_id: str) -> list[dict[str, Any]]:
    """The answers of those that know. Raises as `find_request` does."""
    found = [each.answer for each in asked if each.status == 200]
    if found:
        return found
    for each in asked:
        if each.status == 401:
            raise AuthenticationError(f"{each.router_id}: {each.problem}; give --api-key or BATON_API_KEY")
    told = "".join(f"\n  {each.router_id} at {each.url}: {each.problem}" for each in asked)
    if not any(each.status for each in asked):
        raise UnavailableError("no router answers on its admin port; `baton status` shows who is there" + told)
    raise NotFoundError(
        f"no router knows request {request_id!r}. Take the X-Request-Id of its answer, or what an error or log calls"
        f" it; records go when newer requests push them out, and when a router restarts. Asked were:{told}"
    )
