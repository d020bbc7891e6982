"""One sender's stream as the receiver holds it: introduction, data path, outgoing replies, and the fetching threads.

Messages come and go by the gRPC stream and, where the data path has one, by its lane. The lane has a thread of its own,
which fetches what it is offered on the spot: neither the event loop nor another thread has to be woken for a payload.

Everything but the fetch jobs and the lane's thread runs on the event loop's thread. A link whose data path or stream
fails is closed at once; its jobs finish by themselves within the fetch deadline and report to their handovers as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial

import torch
from google.protobuf.message import DecodeError

from baton.errors import BatonError, ChecksumError, HandoverError, IncompatibleError
from baton.kv_transfer.checksum import Checksum
from baton.kv_transfer.handover import Offer, RefusalCause
from baton.kv_transfer.link_threads import LinkThreads
from baton.kv_transfer.numbered_lane import NumberedLane
from baton.kv_transfer.peer import LocalPeer, mismatch, peer_from_proto, peer_to_proto
from baton.kv_transfer.transports.base import ReceiveLink, ReceiveSetup, Transport
from baton.kv_transfer.transports.choice import candidates, why_none
from baton.kv_transfer.transports.failures import TransportFailures
from baton.proto.baton.v1 import worker_pb2
from baton.proto.stream_order import SequenceGapError, StreamOrder

__all__ = ["ReceiverLink", "WritePayload"]

_log = logging.getLogger(__name__)

# Returns the checksum of what it wrote on links that have no checksum of their own.
WritePayload = Callable[[torch.Tensor], int | None]

_MAX_PAYLOAD_BYTES = 1 << 30
_MAX_IN_FLIGHT = 256
_MAX_OFFERED = 16
_MAX_NAME = 32
_MAX_OUTBOX = 4096
# What a lane's end means, the stream says soon, and in words.
_LANE_GRACE_S = 1.0


class ReceiverLink:
    """A link from one prefill rank. Made by `introduce`, ended by `close`; `on_refused` may be called by any thread."""

    def __init__(
        self,
        peer: LocalPeer,
        transport_name: str,
        *,
        checksum: Checksum | None,
        fetch_timeout_s: float,
        on_refused: Callable[[RefusalCause], None],
    ) -> None:
        self.peer = peer
        self.transport_name = transport_name
        self.is_closed = False
        self.close_reason = ""
        self._checksum = checksum
        self._fetch_timeout_s = fetch_timeout_s
        self._on_refused = on_refused
        # Of the stream; the lane numbers its own.
        self._sent = StreamOrder()
        self._receive: ReceiveLink | None = None
        self._lane: NumberedLane | None = None
        self._outbox: asyncio.Queue[worker_pb2.ShipReply | None] = asyncio.Queue()
        self._num_in_flight = 0
        self._room = asyncio.Event()
        self._room.set()
        self._loop = asyncio.get_running_loop()
        self._threads = LinkThreads(f"baton-receive-{peer.instance_id}")

    @property
    def is_at_work(self) -> bool:
        """It is being set up, or payloads are on their way."""
        return not self.is_closed and (self._receive is None or self._num_in_flight > 0)

    # ---------------------------------------------------------------- set-up

    @staticmethod
    def choose(
        hello: worker_pb2.LinkHello, me: LocalPeer, transports: Sequence[Transport], failures: TransportFailures
    ) -> tuple[LocalPeer, str, ReceiveSetup]:
        """Decide on a hello: who it is, and the sender's best transport that both sides can set up. Blocking.

        `failures` keeps the warning about a transport that fails to one per peer.

        Raises:
            IncompatibleError: the peers cannot exchange pages; the text lists the differences.
        """
        peer = peer_from_proto(hello.sender)
        differences = mismatch(me, peer)
        if differences:
            raise IncompatibleError(f"{me} cannot take pages of {peer}: {differences}")
        by_name = {transport.name: transport for transport in transports}
        offered = [name[:_MAX_NAME] for name in hello.transports[:_MAX_OFFERED]]
        failed: dict[str, str] = {}
        names = candidates(offered, list(by_name), sender_host_id=peer.host_id, receiver_host_id=me.host_id)
        for name in names:
            try:
                return peer, name, by_name[name].open_receive(hello.transport_options, peer=str(peer))
            except HandoverError as error:
                failed[name] = str(error)
                is_news = failures.note(str(peer), name, str(error), 0.0)
                level = logging.WARNING if is_news else logging.DEBUG
                _log.log(level, "transport %s with %s cannot be set up, trying the next: %s", name, peer, error)
        reasons = why_none(
            offered, list(by_name), sender_host_id=peer.host_id, receiver_host_id=me.host_id, failures=failed
        )
        raise IncompatibleError(f"no common transport of {peer} and {me}: {reasons}")

    def welcome(self, me: LocalPeer, options: Mapping[str, str]) -> None:
        """Send the answer to the hello."""
        self.send(
            worker_pb2.ShipReply(
                welcome=worker_pb2.LinkWelcome(
                    receiver=peer_to_proto(me), transport=self.transport_name, transport_options=options
                )
            )
        )

    def withdraw(self, me: LocalPeer, reason: str) -> None:
        """Take the welcome back: the data path that it promised cannot be had, and the sender should offer others."""
        self.send(
            worker_pb2.ShipReply(
                welcome=worker_pb2.LinkWelcome(
                    receiver=peer_to_proto(me), transport=self.transport_name, refusal=reason
                )
            )
        )

    async def connect(self, setup: ReceiveSetup) -> None:
        """Complete the data path. Raises HandoverError or DeadlineError."""
        link = await self._threads.call(partial(setup.finish, self._fetch_timeout_s))
        if self.is_closed:
            link.close()
            raise HandoverError(f"link to {self.peer} was closed during set-up: {self.close_reason}")
        self._receive = link

    def listen(
        self, on_message: Callable[[worker_pb2.ShipMessage], None], on_offer: Callable[[worker_pb2.PageOffer], None]
    ) -> None:
        """Read the lane, where the data path has one: offers are told on its thread, all else on the loop's thread.

        Errors of either close the link.
        """
        assert self._receive is not None
        if self._receive.lane is not None:
            self._lane = NumberedLane(self._receive.lane)
            name = f"baton-lane-{self.peer.instance_id}"
            threading.Thread(
                target=self._read_lane, args=(self._lane, on_message, on_offer), name=name, daemon=True
            ).start()

    def _read_lane(
        self,
        lane: NumberedLane,
        on_message: Callable[[worker_pb2.ShipMessage], None],
        on_offer: Callable[[worker_pb2.PageOffer], None],
    ) -> None:
        def on_loop(message: worker_pb2.ShipMessage) -> None:
            try:
                if not self.is_closed:
                    on_message(message)
            except HandoverError as error:
                self.close(str(error))

        ended = f"{self.peer} closed its message lane"
        try:
            while data := lane.receive(wait=True):
                message = worker_pb2.ShipMessage.FromString(data)
                if not lane.is_new(message.seq):
                    continue
                if message.WhichOneof("message") == "offer":
                    on_offer(message.offer)
                else:
                    self.call_soon(partial(on_loop, message))
        except SequenceGapError as error:
            self._on_refused(RefusalCause.GAP)
            self.call_soon(partial(self.close, f"a message of {self.peer} is missing: {error}"))
        except DecodeError:
            ended = f"{self.peer} sent bytes that are no message"
        except Exception as error:
            _log.exception("reading the lane from %s failed", self.peer)
            ended = f"reading the lane failed: {type(error).__name__}: {error}"
        self.call_soon(partial(self._close_later, ended))

    def _close_later(self, reason: str) -> None:
        if not self.is_closed:
            self._loop.call_later(_LANE_GRACE_S, self.close, reason)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Have something called on the loop's thread; not when the loop is closed before. For any thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    # ---------------------------------------------------------------- messages out

    def send(self, reply: worker_pb2.ShipReply) -> None:
        """Send a reply by the lane, or queue it; on a closed link it goes nowhere."""
        if self.is_closed or (self._lane is not None and self._lane.send(reply)):
            return
        if self._outbox.qsize() >= _MAX_OUTBOX:
            self.close(f"{self.peer} does not read: {_MAX_OUTBOX} replies wait")
            return
        self._outbox.put_nowait(reply)

    async def replies(self) -> AsyncIterator[worker_pb2.ShipReply]:
        """What `send` queued, until the link is closed."""
        while (reply := await self._outbox.get()) is not None:
            reply.seq = self._sent.next()
            yield reply

    def ack(self, reservation_id: int, epoch: int, seq: int, refusal: str) -> None:
        """Answer an offer. For any thread."""
        ack = worker_pb2.PageAck(reservation_id=reservation_id, epoch=epoch, seq=seq, refusal=refusal)
        reply = worker_pb2.ShipReply(ack=ack)
        if self._lane is None or not self._lane.send(reply):
            self.call_soon(partial(self.send, reply))

    # ---------------------------------------------------------------- payloads in

    async def wait_for_room(self) -> None:
        """Wait while too many payloads are on their way; each ends within the fetch deadline."""
        await self._room.wait()

    def fetch(
        self, offer: Offer, write: WritePayload, wanted: Callable[[], bool], ended: Callable[[str], None]
    ) -> None:
        """Fetch, verify and write one payload on a thread, then call `ended` with the refusal on the loop's thread.

        `ended` is called exactly once, when nothing of this link touches the payload or what `write` writes to.
        `wanted` is asked, on the thread, before the copy: a handover that is over already saves itself the work.
        """
        self._submit(lambda: self._fetch(offer, write, wanted), ended)

    def refuse(self, offer: Offer, reservation_id: int, epoch: int, refusal: str) -> None:
        """Drain a payload that is not wanted, then ack it with the refusal. A drain that fails closes the link."""
        self._submit(lambda: self._discard(offer), lambda _: self.ack(reservation_id, epoch, offer.seq, refusal))

    def fetch_now(self, offer: Offer, write: WritePayload, wanted: Callable[[], bool]) -> str:
        """As `fetch`, on the calling thread; returns the refusal."""
        try:
            return self._fetch(offer, write, wanted)
        except Exception as error:
            self.call_soon(partial(self._fetch_failed, error))
            return str(error) or type(error).__name__

    def _fetch_failed(self, error: BaseException) -> None:
        if not isinstance(error, BatonError):
            _log.error("fetching from %s failed", self.peer, exc_info=error)
        self.close(f"fetching failed: {error}")

    def _submit(self, job: Callable[[], str], ended: Callable[[str], None]) -> None:
        if self.is_closed:
            self._loop.call_soon(ended, f"link is closed: {self.close_reason}")
            return

        def on_done(refusal: str) -> None:
            self._num_in_flight -= 1
            self._room.set()
            ended(refusal)

        def on_failed(error: BaseException) -> None:
            self._fetch_failed(error)
            on_done(str(error) or type(error).__name__)

        self._num_in_flight += 1
        if self._num_in_flight >= _MAX_IN_FLIGHT:
            self._room.clear()
        self._threads.submit(job, on_done, on_failed)

    def _fetch(self, offer: Offer, write: WritePayload, wanted: Callable[[], bool]) -> str:
        receive = self._data_path(offer)
        payload = receive.fetch(offer.locator, offer.num_bytes, self._fetch_timeout_s)
        try:
            with receive.reading():
                if not wanted():
                    return "not wanted any more"
                if self._checksum is not None:
                    refusal = self._verify(offer, self._checksum(payload))
                    return refusal or self._write(offer, write, payload)[0]
                refusal, found = self._write(offer, write, payload)
                return refusal or self._verify(offer, found)
        finally:
            receive.done(payload)

    def _write(self, offer: Offer, write: WritePayload, payload: torch.Tensor) -> tuple[str, int | None]:
        try:
            return "", write(payload)
        except Exception as error:
            _log.exception("copying %s of %s into the KV pool failed", offer.pages, self.peer)
            return f"copying failed: {type(error).__name__}: {error}", None

    def _verify(self, offer: Offer, found: int | None) -> str:
        assert found is not None, "a write that sums returns the checksum"
        if found == offer.checksum:
            return ""
        self._on_refused(RefusalCause.CHECKSUM)
        error = ChecksumError(f"{offer.pages} from {self.peer}: {found:#018x} came, {offer.checksum:#018x} was sent")
        _log.error("damaged payload: %s", error)
        return f"checksum differs: {error}"

    def _discard(self, offer: Offer) -> str:
        self._data_path(offer).discard(offer.locator, offer.num_bytes, self._fetch_timeout_s)
        return ""

    def _data_path(self, offer: Offer) -> ReceiveLink:
        if self._receive is None or self.is_closed:
            raise HandoverError(f"link to {self.peer} is closed: {self.close_reason}")
        if not 0 < offer.num_bytes <= _MAX_PAYLOAD_BYTES:
            raise HandoverError(f"{self.peer} offers {offer.num_bytes} bytes; the limit is {_MAX_PAYLOAD_BYTES}")
        return self._receive

    # ---------------------------------------------------------------- end

    def close(self, reason: str) -> None:
        """End the stream and the data path. Idempotent; jobs that run finish by themselves."""
        if self.is_closed:
            return
        self.is_closed = True
        self.close_reason = reason
        self._outbox.put_nowait(None)
        if self._receive is not None:
            self._receive.close()
        self._threads.close()
