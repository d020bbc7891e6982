"""Clients that begin a request and vanish: before the answer, during the prefill, at the first token, in mid-stream;
half of them over HTTP, half over gRPC. None of them says good-bye."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import httpx

from baton.cluster.chaos.prompts import NUM_PROMPTS, body_of, salted
from baton.proto.baton.v1 import inference_pb2, inference_pb2_grpc

__all__ = ["PHASES", "Vanishers"]

PHASES = ("before the answer", "during the prefill", "at the first token", "in mid-stream")
_AT_ONCE = 32
_LONGEST_S = 30.0
_PREFILL_S = 0.08
_MAX_TOKENS = 400


class Vanishers:
    """Clients of a cluster.

    Args:
        urls, grpc_addresses: of the routers that are there now.
    """

    def __init__(
        self,
        urls: Callable[[], Sequence[str]],
        grpc_addresses: Callable[[], Sequence[str]],
        *,
        model: str,
        api_key: str | None = None,
    ) -> None:
        self._urls = urls
        self._grpc_addresses = grpc_addresses
        self._model = model
        self._api_key = api_key
        self._tls = httpx.create_ssl_context()  # once: it takes longer than a request
        self.left = 0

    async def leave(self, clients: int, seed: int, *, at_once: int = _AT_ONCE) -> Counter[str]:
        """So many clients, `at_once` at a time; returns how many left in which phase, or could not come."""
        draw = random.Random(seed)
        counted: Counter[str] = Counter()
        waiting = [(number, draw.choice(PHASES), draw.random(), draw.random() < 0.5) for number in range(clients)]

        async def one_after_another() -> None:
            while waiting:
                number, phase, chance, over_http = waiting.pop()
                body = body_of(number % NUM_PROMPTS, model=self._model, max_tokens=_MAX_TOKENS)
                body = salted(body, f"vanish-{seed}-{number}")
                try:
                    async with asyncio.timeout(_LONGEST_S):
                        await (self._http if over_http else self._grpc)(body, phase, chance)
                except (httpx.HTTPError, grpc.aio.AioRpcError, TimeoutError, IndexError):
                    phase = "not served"
                counted[phase] += 1
                self.left += phase in PHASES

        await asyncio.gather(*(one_after_another() for _ in range(min(at_once, clients))))
        return counted

    async def _http(self, body: dict[str, Any], phase: str, chance: float) -> None:
        urls = self._urls()
        url = urls[int(chance * len(urls))]
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        async with httpx.AsyncClient(timeout=_LONGEST_S, trust_env=False, headers=headers, verify=self._tls) as client:
            if (stay_s := _stay_s(phase, chance)) is not None:
                sending = asyncio.ensure_future(client.post(f"{url}/v1/completions", json=body))
                await asyncio.wait([sending], timeout=stay_s)
                sending.cancel()
                await asyncio.wait([sending])
                if not sending.cancelled():
                    sending.result()
                return
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                wanted = _tokens(phase, chance)
                async for line in response.aiter_lines():
                    wanted -= line.startswith("data: {")
                    if wanted <= 0:
                        return

    async def _grpc(self, body: dict[str, Any], phase: str, chance: float) -> None:
        addresses = self._grpc_addresses()
        options = inference_pb2.GenerationOptions(
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            ignore_eos=True,
            cache_salt=body["cache_salt"],
        )
        request = inference_pb2.GenerateRequest(model=self._model, text=body["prompt"], options=options, stream=True)
        metadata = [("authorization", f"Bearer {self._api_key}")] if self._api_key else []
        async with grpc.aio.insecure_channel(addresses[int(chance * len(addresses))]) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=metadata, timeout=_LONGEST_S)
            if (stay_s := _stay_s(phase, chance)) is not None:
                reading = asyncio.ensure_future(call.read())
                await asyncio.wait([reading], timeout=stay_s)
                reading.cancel()
                await asyncio.wait([reading])
                if not reading.cancelled():
                    reading.result()
                return
            wanted = _tokens(phase, chance)
            async for _ in call:
                wanted -= 1
                if wanted <= 0:
                    return


def _stay_s(phase: str, chance: float) -> float | None:
    """How long a client that leaves without a token stays; None for those that wait for tokens."""
    if phase == PHASES[0]:
        return 0.01 * chance
    return _PREFILL_S * chance if phase == PHASES[1] else None


def _tokens(phase: str, chance: float) -> int:
    return 1 if phase == PHASES[2] else 2 + int(60 * chance)
