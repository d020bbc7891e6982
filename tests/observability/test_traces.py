"""One request, one tree of spans over router, prefill and decode worker, below the span of whoever called."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic

import pytest
from tests.observability.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.observability.whole_cluster import WholeCluster, whole_cluster

from baton.config_tracing import TracingConfig
from baton.errors import ConfigError
from baton.tracing import Tracing, open_tracing

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
# Parent of each, and who says so.
TREE = {
    ("text_completion", "router-0"): ("", ""),
    ("queue", "router-0"): ("text_completion", "router-0"),
    ("route", "router-0"): ("text_completion", "router-0"),
    ("stream", "router-0"): ("text_completion", "router-0"),
    ("attempt", "router-0"): ("text_completion", "router-0"),
    ("decode", "decode-0"): ("attempt", "router-0"),
    ("reserve", "decode-0"): ("decode", "decode-0"),
    ("ship", "decode-0"): ("decode", "decode-0"),
    ("attach", "decode-0"): ("decode", "decode-0"),
    ("first_step", "decode-0"): ("decode", "decode-0"),
    ("write", "decode-0"): ("decode", "decode-0"),
    ("prefill", "prefill-0"): ("attempt", "router-0"),
    ("queue", "prefill-0"): ("prefill", "prefill-0"),
    ("compute", "prefill-0"): ("prefill", "prefill-0"),
    ("transfer", "prefill-0"): ("prefill", "prefill-0"),
}
_ROUNDING_NS = 1000


def _check_tree(spans: list[ReceivedSpan], operation: str) -> ReceivedSpan:
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans) == len(TREE)
    roots = []
    for span in spans:
        parent = by_id.get(span.parent_id)
        names = ("", "") if parent is None else (parent.name, parent.instance)
        name = "text_completion" if span.name == operation else span.name
        expected = TREE[name, span.instance]
        assert names == ((operation, expected[1]) if expected[0] == "text_completion" else expected), span
        assert span.service == f"baton-{span.instance.partition('-')[0]}"
        assert span.begin_ns <= span.end_ns
        if parent is None:
            roots.append(span)
        else:
            assert parent.begin_ns - _ROUNDING_NS <= span.begin_ns
            assert span.end_ns <= parent.end_ns + _ROUNDING_NS, (span, parent)
    (root,) = roots
    assert root.parent_id == CALLER
    return root


async def test_the_spans_of_a_request_form_one_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with (
        OtlpReceiver() as receiver,
        whole_cluster(monkeypatch, tmp_path, tracing={"endpoint": receiver.endpoint}) as cluster,
    ):
        await cluster.complete(headers={"traceparent": TRACEPARENT, "X-Request-Id": "mine"})
        root = _check_tree(await receiver.until(TRACE, *(name for name, _ in TREE)), "text_completion")
        assert root.attributes["gen_ai.request.model"] == "tiny"
        assert root.attributes["gen_ai.usage.input_tokens"] == 200
        assert root.attributes["gen_ai.usage.output_tokens"] == 24
        assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
        assert root.attributes["baton.request_id"] == "mine"
        assert root.attributes["baton.ttft.prefill_s"] > 0

        other = TRACE[::-1]
        names = {name for name, _ in TREE} - {"text_completion"} | {"chat"}
        await cluster.generate((("traceparent", TRACEPARENT.replace(TRACE, other)),), cache_salt="a")
        _check_tree(await receiver.until(other, *names), "chat")


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + f"-{CALLER}-01", "0" * 4000])
async def test_without_a_good_header_a_trace_begins_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, header: str
) -> None:
    async with (
        OtlpReceiver() as receiver,
        whole_cluster(monkeypatch, tmp_path, tracing={"endpoint": receiver.endpoint}) as cluster,
    ):
        await cluster.complete(headers={"traceparent": header} if header else {}, max_tokens=4)
    # Whoever ends sends what waits.
    (root,) = [span for span in receiver.spans if span.name == "text_completion"]
    assert root.parent_id == ""
    assert {span.trace_id for span in receiver.spans} == {root.trace_id}


async def _unsampled(cluster: WholeCluster) -> None:
    await cluster.complete(headers={"traceparent": TRACEPARENT.removesuffix("01") + "00"}, max_tokens=4)


async def _sampled(cluster: WholeCluster) -> None:
    await cluster.complete(headers={"traceparent": TRACEPARENT}, max_tokens=4)


@pytest.mark.parametrize(("call", "ratio", "is_traced"), [(_unsampled, 1.0, False), (_sampled, 0.0, True)])
async def test_the_caller_decides_whether_to_trace(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    call: Callable[[WholeCluster], Awaitable[None]],
    ratio: float,
    is_traced: bool,
) -> None:
    async with (
        OtlpReceiver() as receiver,
        whole_cluster(monkeypatch, tmp_path, tracing={"endpoint": receiver.endpoint, "sample_ratio": ratio}) as cluster,
    ):
        await call(cluster)
    assert bool(receiver.spans) == is_traced


async def test_an_endpoint_that_is_away_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with OtlpReceiver() as receiver:
        gone = receiver.endpoint
    async with whole_cluster(monkeypatch, tmp_path, tracing={"endpoint": gone}) as cluster:
        for _ in range(3):
            await cluster.complete(max_tokens=4)


def test_spans_that_nobody_takes_are_dropped() -> None:
    tracing = open_tracing(TracingConfig(endpoint="http://127.0.0.1:9"), role="router", instance_id="router-0")
    for _ in range(6000):
        span = tracing.start("chat", start_s=monotonic())
        assert span is not None
        span.end(monotonic())
    assert tracing._provider is not None
    (processor,) = tracing._provider._active_span_processor._span_processors
    assert len(processor._batch_processor._queue) <= 4096  # type: ignore[attr-defined]
    tracing.close(0.1)


def test_without_an_endpoint_there_is_nothing() -> None:
    tracing = open_tracing(TracingConfig(), role="router", instance_id="router-0")
    assert not tracing.is_on
    assert tracing.start("chat", start_s=1.0, traceparent=TRACEPARENT) is None
    tracing.close(1.0)
    assert Tracing().start("chat", start_s=1.0) is None


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'baton-serve\[otel\]'"):
        open_tracing(TracingConfig(endpoint="http://127.0.0.1:4317"), role="decode", instance_id="decode-0")
