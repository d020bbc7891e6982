"""One decode rank as the sender holds it: the Ship stream, the data path, the staging threads, the shipments on it.

Everything but the staging jobs runs on the event loop's thread. Staging jobs run on the link's own two threads (one
copies while the other sums or waits), so a decode rank that does not fetch stalls nobody else's shipments. A link ends
once: its shipments fail, its staging memory is not reused, and the next shipment to that address makes a new link.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from baton.errors import BatonError, HandoverError, IncompatibleError
from baton.kv_transfer.handover import HandoverKey
from baton.kv_transfer.link_threads import LinkThreads
from baton.kv_transfer.numbered_lane import NumberedLane
from baton.kv_transfer.peer import LocalPeer, mismatch, peer_from_proto, peer_to_proto
from baton.kv_transfer.transports.base import SendLink, SendSetup, Staged, Transport
from baton.proto import channels
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc
from baton.proto.stream_order import SequenceGapError, StreamOrder

__all__ = ["MAX_UNANSWERED", "ChannelFactory", "LinkedShipment", "SenderLink", "open_channel"]

_log = logging.getLogger(__name__)

# Part of a link's time that its data path may take: its own error says more than that the time is over.
_SETUP_SHARE = 0.8
# What a lane's end means, the stream says soon, and in words.
_LANE_GRACE_S = 1.0
# How long a cancelled link waits for a setup that a thread is making.
_LATE_SETUP_S = 2.0
# Messages of the lane after which others on the loop have their turn.
_MAX_BURST = 32

MAX_UNANSWERED = 4
"""Lease renewals without an answer that end a link."""

ChannelFactory = Callable[[str], grpc.aio.Channel]


def open_channel(address: str) -> grpc.aio.Channel:
    """A plain-text channel of its own (not shared with other users of the address in this process)."""
    return channels.open_channel(address, [("grpc.use_local_subchannel_pool", 1)])


class LinkedShipment(Protocol):
    """What a link tells its shipments."""

    @property
    def key(self) -> HandoverKey:
        """Whose pages."""

    @property
    def reservation_id(self) -> int:
        """Of the ticket; 0 before."""

    def on_reply(self, reply: worker_pb2.ShipReply) -> None:
        """A ticket, an ack or the end came."""

    def on_renewed(self) -> None:
        """The receiver says that the reservation lives."""

    def on_link_lost(self, reason: str) -> None:
        """The link is closed."""


class SenderLink:
    """A link to one decode rank. Made by `connect`, ended by `close`."""

    def __init__(
        self,
        me: LocalPeer,
        address: str,
        transports: Sequence[Transport],
        open_channel: ChannelFactory,
        clock: Callable[[], float],
    ) -> None:
        self.address = address
        self.is_closed = False
        self.close_reason = ""
        # Name of the transport that was agreed on and could not be set up: another one may work.
        self.failed_transport = ""
        self.shipments: dict[HandoverKey, LinkedShipment] = {}
        self._me = me
        self._clock = clock
        self._heard_s = clock()
        self._unanswered = 0
        self._transports = tuple(transports)
        self._peer: LocalPeer | None = None
        self._send_link: SendLink | None = None
        self._lane: NumberedLane | None = None
        self._post_lock = threading.Lock()
        self._setting_up = ""
        self._loop = asyncio.get_running_loop()
        self._threads = LinkThreads("baton-send")
        self._channel = open_channel(address)
        # The generated stub is untyped.
        stub: Any = worker_pb2_grpc.HandoverStub
        self._call: Any = stub(self._channel).Ship()
        # Messages of the stream; the lane numbers its own.
        self._sent, self._received = StreamOrder(), StreamOrder()
        self._outbox: asyncio.Queue[worker_pb2.ShipMessage] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def peer(self) -> LocalPeer:
        """Who answers at the address; known once connected."""
        assert self._peer is not None
        return self._peer

    @property
    def data_path(self) -> SendLink:
        """Where payloads are staged; there once connected."""
        assert self._send_link is not None
        return self._send_link

    # ---------------------------------------------------------------- set-up

    async def connect(self, timeout_s: float) -> None:
        """Introduce ourselves and set the data path up. On any failure the link is closed.

        Raises:
            IncompatibleError: the peer refuses us, or we refuse it; the text lists the differences.
            HandoverError: nobody answers, or the data path cannot be made, within `timeout_s` seconds; in the latter
                case `failed_transport` names the transport.
        """
        setups: dict[str, SendSetup] = {}
        try:
            async with asyncio.timeout(timeout_s):
                await self._connect(setups, timeout_s)
        except TimeoutError:
            self.failed_transport = self._setting_up
            self._fail_connect(f"link to {self.address} was not up within {timeout_s:g} s")
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._fail_connect(f"link to {self.address} failed: {_rpc_text(error)}")
        except BaseException as error:
            self.close(str(error))
            raise
        finally:
            for setup in setups.values():
                setup.cancel()
            if self.is_closed:
                await self.closed()
        self._tasks = [self._loop.create_task(self._write()), self._loop.create_task(self._read())]
        if self.data_path.lane is not None:
            self._lane = NumberedLane(self.data_path.lane)
            self._loop.add_reader(self._lane, self._read_lane)
        _log.info("link to %s at %s is up", self.peer, self.address)

    async def _connect(self, setups: dict[str, SendSetup], timeout_s: float) -> None:
        options: dict[str, str] = {}
        unavailable: list[str] = []
        for transport in self._transports:
            try:
                setup = await self._open(transport)
            except HandoverError as error:
                _log.warning("transport %s to %s is not available: %s", transport.name, self.address, error)
                unavailable.append(f"; {transport.name} is not offered because {error}")
                continue
            setups[transport.name] = setup
            options.update(setup.options)
        hello = worker_pb2.LinkHello(sender=peer_to_proto(self._me), transports=list(setups), transport_options=options)
        await self._call.write(worker_pb2.ShipMessage(hello=hello, seq=self._sent.next()))
        reply = await self._call.read()
        if not isinstance(reply, worker_pb2.ShipReply) or reply.WhichOneof("reply") != "welcome":
            raise HandoverError(f"{self.address} did not answer the hello with a welcome")
        self._received.accept(reply.seq)
        welcome = reply.welcome
        if welcome.refusal:
            raise IncompatibleError(f"{self.address} refuses the link: {welcome.refusal}{''.join(unavailable)}")
        self._peer = peer_from_proto(welcome.receiver)
        differences = mismatch(self._me, self._peer)
        if differences:
            raise IncompatibleError(f"{self._me} cannot send pages to {self._peer}: {differences}")
        if welcome.transport not in setups:
            raise HandoverError(f"{self._peer} chose transport {welcome.transport[:32]!r}, which was not offered")
        self._setting_up = welcome.transport
        chosen = setups.pop(welcome.transport)
        finish = partial(chosen.finish, dict(welcome.transport_options), _SETUP_SHARE * timeout_s)
        finished = self._threads.call(finish)
        try:
            self._send_link = await asyncio.shield(finished)
        except asyncio.CancelledError:
            finished.add_done_callback(_close_late)
            raise
        except HandoverError:
            self.failed_transport = welcome.transport
            raise

    async def _open(self, transport: Transport) -> SendSetup:
        """The transport's setup, made on a thread. One that comes after a cancellation is waited for and taken back."""
        opening = self._threads.call(partial(transport.open_send, peer=self.address))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait({opening}, timeout=_LATE_SETUP_S)
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                opening.result().cancel()
            raise

    def _fail_connect(self, reason: str) -> None:
        self.close(reason)
        raise HandoverError(reason)

    # ---------------------------------------------------------------- messages

    def send(self, message: worker_pb2.ShipMessage) -> None:
        """Send a message by the lane, or queue it; on a closed link it goes nowhere."""
        if self.is_closed or (self._lane is not None and self._lane.send(message)):
            return
        self._outbox.put_nowait(message)

    def renew_leases(self, silence_s: float) -> None:
        """Tell the receiver which reservations are still worked on, if only none: it must answer.

        A link on which nothing came back for `silence_s` seconds, or to `MAX_UNANSWERED` renewals, is closed: its peer
        is stopped, stuck or cut off, though the connection may stand. Renewals are counted, since those that this
        process could not send, because it was stopped itself, say nothing about the peer.
        """
        if self._clock() - self._heard_s > silence_s:
            self.close(f"nothing heard from {self.peer} for {silence_s:g} s")
            return
        if self._unanswered >= MAX_UNANSWERED:
            self.close(f"{self.peer} left {self._unanswered} lease renewals without an answer")
            return
        self._unanswered += 1
        alive = [shipment.reservation_id for shipment in self.shipments.values() if shipment.reservation_id]
        self.send(worker_pb2.ShipMessage(renewal=worker_pb2.LeaseRenewal(reservation_ids=alive)))

    def request_ticket(self, shipment: LinkedShipment) -> None:
        """Bring a shipment onto this link. Raises HandoverError when its key is on it already."""
        if shipment.key in self.shipments:
            raise HandoverError(f"{shipment.key} is being shipped to {self.address} already")
        self.shipments[shipment.key] = shipment
        request = worker_pb2.TicketRequest(
            request_id=shipment.key.request_id,
            attempt=shipment.key.attempt,
            handover=shipment.key.handover,
            receiver_incarnation=self.peer.incarnation,
        )
        self.send(worker_pb2.ShipMessage(ticket_request=request))

    def run(self, job: Callable[[], None], failed: Callable[[str], None]) -> None:
        """Run a job on a staging thread; an error's text is told on the loop's thread."""
        if self.is_closed:
            self._loop.call_soon(failed, f"link is closed: {self.close_reason}")
            return

        def on_failed(error: BaseException) -> None:
            if not isinstance(error, BatonError):
                _log.error("staging for %s failed", self.address, exc_info=error)
            failed(f"staging failed: {error or type(error).__name__}")

        # Behind what the loop has to do already, to send messages: the thread may keep the core to itself.
        self._loop.call_soon(self._threads.submit, job, None, on_failed)

    def post(
        self, staged: Staged, to_message: Callable[[str], worker_pb2.ShipMessage], on_posted: Callable[[], None]
    ) -> None:
        """Make a staged payload fetchable and offer it. For staging threads.

        `to_message` gets the locator. `on_posted` is called before the receiver can answer. Payloads are posted and
        offered in the same order, which transports may rely on.

        Raises:
            HandoverError: the data path is broken, and the link is being closed; the payload is not posted.
        """
        with self._post_lock:
            try:
                message = to_message(self.data_path.post(staged))
            except HandoverError as error:
                self.call_soon(partial(self.close, str(error)))
                raise
            on_posted()
            if self._lane is None or not self._lane.send(message):
                self.call_soon(partial(self.send, message))

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Have something called on the loop's thread; not when the loop is closed before. For any thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    async def _write(self) -> None:
        try:
            while True:
                message = await self._outbox.get()
                message.seq = self._sent.next()
                await self._call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self.close(f"stream broke: {_rpc_text(error)}")

    async def _read(self) -> None:
        try:
            while isinstance(reply := await self._call.read(), worker_pb2.ShipReply):
                self._heard()
                if self._received.accept(reply.seq):
                    self._dispatch(reply)
            self.close("the receiver ended the stream")
        except SequenceGapError as error:
            self.close(f"a message of {self.peer} is missing: {error}")
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self.close(f"stream broke: {_rpc_text(error)}")
        finally:
            self.close("the stream is read no more")

    def _heard(self) -> None:
        self._heard_s, self._unanswered = self._clock(), 0

    def _read_lane(self) -> None:
        """Something came by the lane, or it has ended."""
        assert self._lane is not None
        self._heard()
        for _ in range(_MAX_BURST):
            if self.is_closed:
                return
            message = self._lane.receive(wait=False)
            if message is None:
                return
            if not message:
                self._loop.remove_reader(self._lane)
                self._loop.call_later(_LANE_GRACE_S, self.close, f"{self.peer} closed its message lane")
                return
            try:
                reply = worker_pb2.ShipReply.FromString(message)
                if self._lane.is_new(reply.seq):
                    self._dispatch(reply)
            except DecodeError:
                self.close(f"{self.peer} sent {len(message)} bytes that are no reply")
            except SequenceGapError as error:
                self.close(f"a message of {self.peer} is missing: {error}")

    def _dispatch(self, reply: worker_pb2.ShipReply) -> None:
        match reply.WhichOneof("reply"):
            case "ticket":
                ticket = reply.ticket
                key = HandoverKey(ticket.request_id, ticket.attempt, ticket.handover)
                shipment = self.shipments.get(key)
                if shipment is not None:
                    shipment.on_reply(reply)
                elif not ticket.refusal:
                    self.send_abort(key, ticket.reservation_id, ticket.epoch, "the shipment is over")
            case "ack":
                self._tell(reply.ack.reservation_id, reply)
            case "settled":
                self._tell(reply.settled.reservation_id, reply)
            case "renewal":
                alive = set(reply.renewal.reservation_ids)
                for shipment in list(self.shipments.values()):
                    if shipment.reservation_id in alive:
                        shipment.on_renewed()
            case "welcome" if reply.welcome.refusal:
                self.failed_transport = reply.welcome.transport
                self.close(f"{self.peer} takes its welcome back: {reply.welcome.refusal}")
            case other:
                self.close(f"{self.peer} sent {other}, which has no place here")

    def _tell(self, reservation_id: int, reply: worker_pb2.ShipReply) -> None:
        for shipment in self.shipments.values():
            if shipment.reservation_id == reservation_id:
                shipment.on_reply(reply)
                return

    def send_abort(self, key: HandoverKey, reservation_id: int, epoch: int, reason: str) -> None:
        """Tell the receiver that no more will come; zeros say that the ticket is not here."""
        abort = worker_pb2.ShipAbort(
            reservation_id=reservation_id,
            epoch=epoch,
            request_id=key.request_id,
            attempt=key.attempt,
            handover=key.handover,
            reason=reason,
        )
        self.send(worker_pb2.ShipMessage(abort=abort))

    # ---------------------------------------------------------------- end

    def close(self, reason: str) -> None:
        """End the stream and the data path, and tell the shipments. Idempotent; a job that runs finishes by itself."""
        if self.is_closed:
            return
        self.is_closed = True
        self.close_reason = reason
        _log.info("link to %s is closed: %s", self.address, reason)
        if self._lane is not None:
            self._loop.remove_reader(self._lane)
        if self._send_link is not None:
            self._send_link.close()
        self._threads.close()
        self._call.cancel()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        # A task that was cancelled keeps its frame, and that this link, with its socket: the link forgets its tasks.
        tasks, self._tasks = self._tasks, []
        self._closing = self._loop.create_task(_end(self._channel, tasks))
        for shipment in list(self.shipments.values()):
            shipment.on_link_lost(f"link to {self.address}: {reason}")

    async def closed(self) -> None:
        """Wait until the channel of a closed link is gone."""
        await asyncio.gather(self._closing, return_exceptions=True)


async def _end(channel: grpc.aio.Channel, tasks: Sequence[asyncio.Task[None]]) -> None:
    await channel.close(None)
    await asyncio.gather(*tasks, return_exceptions=True)


def _close_late(finished: asyncio.Future[SendLink]) -> None:
    """A data path that is up when nobody waits for it any more."""
    if not finished.cancelled() and finished.exception() is None:
        finished.result().close()


def _rpc_text(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
