"""A gRPC channel on which messages go wrong as the rules of `baton.faults` say, in both directions, one by one.

    caller <-> [FaultyChannel: serialise, rpc.send, rpc.receive, deserialise] <-> channel, which carries bytes

Each call has two directions. A message passes its direction's rules as bytes: it is lost, comes twice, late, slowly,
cut or with a bit flipped, or breaks the call; what one message waits for, those behind it in that direction wait for
too. A direction that is a black hole takes everything and gives nothing, the other side's end neither; the call stays
open until somebody loses patience: whoever made it, its deadline, or keepalive where the channel has it.

What arrives damaged and can still be read has another field; what cannot ends the call with INTERNAL. A unary call
whose message is lost ends at its deadline; one whose request comes twice is made twice, and the first answer counts.

The rules are looked up at each message: a channel that was opened when there were none has those that come later.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import grpc

from baton.proto.faulty_calls import FaultyCall, StreamCall, UnaryCall
from baton.proto.faulty_link import CallLink, Deserialize, Serialize

__all__ = ["FaultyChannel"]


class FaultyChannel(grpc.aio.Channel):
    """`inner` with faults.

    Args:
        peer: host:port of the other end.
        keepalive_s: how soon `inner` notices a connection that carries nothing any more; None: never.
    """

    def __init__(self, inner: grpc.aio.Channel, peer: str, keepalive_s: float | None = None) -> None:
        self._inner: Any = inner
        self._peer = peer
        self._keepalive_s = keepalive_s
        self._calls: weakref.WeakSet[FaultyCall] = weakref.WeakSet()

    async def __aenter__(self) -> FaultyChannel:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close(None)

    async def close(self, grace: float | None = None) -> None:
        """Ends every call, those that a fault holds up too."""
        if not grace:
            for call in list(self._calls):
                call.cancel()
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """As that of the channel inside."""
        state: grpc.ChannelConnectivity = self._inner.get_state(try_to_connect)
        return state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """As that of the channel inside."""
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """As that of the channel inside."""
        await self._inner.channel_ready()

    def unary_unary(self, method: str, *codec: Any, **options: Any) -> Any:
        """Calls of one message each way."""
        return self._calls_of(method, "unary_unary", UnaryCall, *codec, **options)

    def unary_stream(self, method: str, *codec: Any, **options: Any) -> Any:
        """Calls of one message there and many back."""
        return self._calls_of(method, "unary_stream", StreamCall, *codec, **options)

    def stream_stream(self, method: str, *codec: Any, **options: Any) -> Any:
        """Calls of many messages each way."""
        return self._calls_of(method, "stream_stream", StreamCall, *codec, **options)

    def stream_unary(self, method: str, *codec: Any, **options: Any) -> Any:
        """Without faults: the cluster has none of these."""
        return self._inner.stream_unary(method, *codec, **options)

    def _calls_of(
        self,
        path: str,
        kind: str,
        make: Callable[..., FaultyCall],
        request_serializer: Serialize = None,
        response_deserializer: Deserialize = None,
        **options: Any,
    ) -> Callable[..., Any]:
        # Without a codec of its own the call inside takes and gives bytes.
        multi_callable = getattr(self._inner, kind)(path, None, None, **options)
        method = path.rpartition("/")[0].rpartition(".")[2] + "." + path.rpartition("/")[2]

        def call(request: Any = None, **arguments: Any) -> FaultyCall:
            link = CallLink(self._peer, method, request_serializer, response_deserializer, self._keepalive_s)
            made = make(multi_callable, link, request, arguments, is_unary=kind == "unary_stream")
            self._calls.add(made)
            return made

        return call
