"""What is encoded comes back equal."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.kv_layout import KvLayout
from baton.engine.request import EngineRequest, FinishReason, Phases, RequestOutput, SamplingParams, TokenLogprobs
from baton.proto.codec import (
    layout_from_proto,
    layout_to_proto,
    output_from_proto,
    output_to_proto,
    request_from_proto,
    request_to_proto,
)

ids = st.integers(0, 2**32 - 1)
floats32 = st.floats(allow_nan=False, width=32)
ids_tuple = st.lists(ids, max_size=5).map(tuple)
counts = st.integers(0, 2**31)

sampling = st.builds(
    SamplingParams,
    max_tokens=counts,
    min_tokens=counts,
    temperature=st.floats(0, 10),
    top_k=counts,
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100), max_size=4).map(lambda d: tuple(sorted(d.items()))),
    allowed_token_ids=st.none() | ids_tuple,
    bad_words_ids=st.lists(ids_tuple, max_size=3).map(tuple),
    stop_token_ids=ids_tuple,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
logprobs = st.builds(TokenLogprobs, ids, floats32, ids, st.lists(st.tuples(ids, floats32), max_size=3).map(tuple))


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        EngineRequest,
        request_id=st.text(max_size=20),
        prompt_token_ids=ids_tuple,
        sampling=sampling,
        attempt=counts,
        priority=st.integers(-(2**31), 2**31 - 1),
        cache_salt=st.text(max_size=5),
        traceparent=st.text(max_size=5),
    )
)
def test_requests(request: EngineRequest) -> None:
    assert request_from_proto(request_to_proto(request)) == request


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        RequestOutput,
        request_id=st.text(max_size=20),
        attempt=counts,
        token_ids=st.lists(ids, max_size=4),
        logprobs=st.lists(logprobs, max_size=4),
        prompt_logprobs=st.none() | st.lists(logprobs, max_size=4).map(lambda entries: [None, *entries]),
        finish_reason=st.none() | st.sampled_from(FinishReason),
        stop_token_id=st.none() | ids,
        error=st.text(max_size=9),
        cached_tokens=counts,
        phases=st.none() | st.builds(Phases, **dict.fromkeys(Phases.__dataclass_fields__, st.floats(0, 1e6))),
    )
)
def test_outputs(output: RequestOutput) -> None:
    assert output_from_proto(output_to_proto(output)) == output


def test_layouts() -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=40, block_size=8, dtype="float16", tensor_parallel=2)
    assert layout_from_proto(layout_to_proto(layout)) == layout
