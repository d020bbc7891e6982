"""What HTTP and gRPC share of one router: the model, the client, who may come in, and whether it takes new work."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from typing import TypeVar

from baton.engine.tokenizer import Tokenizer
from baton.errors import AuthenticationError, InvalidRequestError, UnavailableError
from baton.metrics import Metrics
from baton.router import limits
from baton.router.answered_once import AnsweredOnce
from baton.router.client import GenerationClient
from baton.router.cluster_facts import cluster_facts
from baton.router.dispatch import Dispatcher
from baton.router.instances import InstanceTable
from baton.router.model_card import ModelCard
from baton.state.base import SharedState
from baton.state.memory import MemoryState
from baton.vllm_metrics import facts_of, render_vllm

__all__ = ["Frontend", "is_request_id", "new_request_id"]

_Result = TypeVar("_Result")
_INLINE_BYTES = 64 << 10
_INLINE_CHARS = 2 << 10
"""What takes up to a millisecond, to parse and to encode: a thread would take longer to begin."""
_TENANT = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{limits.MAX_TENANT_CHARS - 1}}}")
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{limits.MAX_REQUEST_ID_CHARS}}}")


def new_request_id() -> str:
    """A fresh public request id."""
    return secrets.token_hex(12)


def is_request_id(text: str) -> bool:
    """Whether `text` may serve as a request id: short, and safe in headers and logs."""
    return _REQUEST_ID.fullmatch(text) is not None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Frontend:
    """Everything a request handler needs.

    Args:
        state: what this router shares with others; None: nothing.
        tenant_keys: tenant by API key, of those that have keys of their own.
        idempotency_ttl_s: how long an answer is replayed to who repeats its idempotency key.
        logs_requests: whether each generation has its line in the log.
        vllm_aliases: whether there is a page of metrics under the names of vLLM.

    Attributes:
        once: requests that carry an idempotency key.
        draining: set once, when the router is told to stop: what runs goes on, nothing new is taken.
    """

    def __init__(
        self,
        *,
        card: ModelCard,
        tokenizer: Tokenizer,
        client: GenerationClient,
        dispatcher: Dispatcher,
        table: InstanceTable,
        metrics: Metrics,
        api_key: str | None,
        tenant_keys: Mapping[str, str] | None = None,
        state: SharedState | None = None,
        idempotency_ttl_s: float = 600.0,
        logs_requests: bool = True,
        vllm_aliases: bool = True,
    ) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self.client = client
        self.dispatcher = dispatcher
        self.table = table
        self.metrics = metrics
        self.state = state or MemoryState()
        self.once = AnsweredOnce(self.state, metrics, ttl_s=idempotency_ttl_s)
        self.draining = False
        # By digest: how long a look takes says nothing about a key.
        self._tenants = {_digest(key.encode()): tenant for key, tenant in (tenant_keys or {}).items()}
        self._keyed = frozenset(self._tenants.values())
        self._open_key = None if api_key is None else _digest(api_key.encode())
        self.logs_requests = logs_requests
        self._vllm_aliases = vllm_aliases

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be served."""
        return not self.draining and self.dispatcher.ready

    def metrics_pages(self) -> dict[str, Callable[[], bytes]]:
        """What may be scraped, by name: see `metrics_server.page_of`."""
        pages: dict[str, Callable[[], bytes]] = {"metrics": self.metrics.render}
        if self._vllm_aliases:
            pages["vllm"] = lambda: render_vllm(
                self.metrics,
                cluster_facts(self.table.all(), facts_of(self.metrics).waiting),
                model=self.card.model_id,
            )
        return pages

    def check_open(self) -> None:
        """Raises `UnavailableError` while the router is stopping."""
        if self.draining:
            raise UnavailableError("this router is stopping; send the request to another one")

    def check_key(self, authorization: bytes | None) -> None:
        """Raises `AuthenticationError` unless `authorization` is "Bearer KEY" (or no key is configured)."""
        if self._open_key is None and not self._tenants:
            return
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise AuthenticationError("send the API key as `Authorization: Bearer KEY`", code="missing_api_key")
        digest = _digest(key.strip())
        if digest != self._open_key and digest not in self._tenants:
            raise AuthenticationError("the API key is wrong")

    def check_admin_key(self, authorization: bytes | None) -> None:
        """Raises `AuthenticationError` unless it is the operator's key: tenants may see and end only what is theirs."""
        self.check_key(authorization)
        digest = _digest((authorization or b"").partition(b" ")[2].strip())
        if self._tenants and (self._open_key is None or digest != self._open_key):
            raise AuthenticationError("this is for the operator's key, router.api_key, and for no tenant's")

    def tenant(self, authorization: str, claimed: str, param: str) -> str:
        """Whose request it is: that of its key, where a tenant has keys, else who it says; "" where nobody says.

        Raises:
            InvalidRequestError: `claimed` is no name, or that of another tenant than the key's.
            AuthenticationError: it is that of a tenant with keys, and came without one of them.
        """
        if claimed and _TENANT.fullmatch(claimed) is None:
            raise InvalidRequestError(
                f"{param} must be 1 to {limits.MAX_TENANT_CHARS} characters of A-Z a-z 0-9 . _ -,"
                f" got {claimed[: limits.MAX_TENANT_CHARS]!r}",
                param=param,
            )
        if not self._tenants:
            return claimed
        owner = self._tenants.get(_digest(authorization.partition(" ")[2].strip().encode()))
        if owner is not None and claimed not in ("", owner):
            raise InvalidRequestError(f"{param} must be {owner!r}, whose API key it is, got {claimed!r}", param=param)
        if owner is None and claimed in self._keyed:
            raise AuthenticationError(f"requests of tenant {claimed!r} need an API key of its own")
        return owner or claimed

    async def off_loop(self, work: Callable[[], _Result], *, num_bytes: int = 0, num_chars: int = 0) -> _Result:
        """Run `work`, which parses `num_bytes` and encodes `num_chars`: much on a thread, so that streams go on."""
        is_short = num_bytes <= _INLINE_BYTES and num_chars <= _INLINE_CHARS
        return work() if is_short else await asyncio.to_thread(work)
