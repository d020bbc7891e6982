"""What a slower link would deliver when."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from baton.errors import DeadlineError
from baton.kv_transfer.transports.base import SendLink
from baton.kv_transfer.transports.gloo import GlooTransport
from baton.kv_transfer.transports.rate_limiter import RateLimiter
from baton.kv_transfer.transports.select import make_transports


def test_bookings_queue_and_an_idle_link_starts_at_once() -> None:
    limiter = RateLimiter(1000)
    assert limiter.book(500, 10.0) == 10.5
    assert limiter.book(250, 10.0) == 10.75
    assert limiter.book(250, 20.0) == 20.25


def test_a_burst_is_what_an_idle_link_has_saved() -> None:
    limiter = RateLimiter(1000, burst_bytes=500)
    assert limiter.book(500, 10.0) == 10.0
    assert limiter.book(500, 10.0) == 10.5
    assert limiter.book(500, 99.0) == 99.0


def test_gloo_delivers_no_sooner_than_the_rate_allows() -> None:
    transport = GlooTransport(arena_bytes=1 << 20, rate_limit_bytes_s=1e6)
    setup = transport.open_send(peer="receiver")
    answer = transport.open_receive(setup.options, peer="sender")
    links: list[SendLink] = []
    thread = threading.Thread(target=lambda: links.append(setup.finish(answer.options, 10.0)))
    thread.start()
    receive = answer.finish(10.0)
    thread.join()
    (send,) = links
    begin_s = time.monotonic()
    for _ in range(2):
        staged = send.stage(50_000, 1.0)
        staged.payload.fill_(7)
        payload = receive.fetch(send.post(staged), 50_000, 10.0)
        assert torch.equal(payload, staged.payload)
        receive.done(payload)
        send.release(staged)
    assert time.monotonic() - begin_s >= 0.1
    staged = send.stage(500_000, 1.0)
    with pytest.raises(DeadlineError, match=r"500000 bytes within 0\.2 s"):
        receive.fetch(send.post(staged), 500_000, 0.2)
    receive.close()
    send.close()
    transport.close()


def test_the_configuration_counts_bits() -> None:
    (gloo,) = make_transports("gloo", rate_limit_gbit_s=8)
    assert isinstance(gloo, GlooTransport)
    assert gloo._limiter is not None
    assert gloo._limiter.book(1_000_000_000, 0.0) == 1.0
