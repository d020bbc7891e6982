"""The cost model: priors, pools, incarnations, bounds, and what it says of itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.costs.estimate import estimate_ttft_s
from baton.router.costs.model import CostModel
from baton.router.costs.outcomes import MAX_GAIN, Outcomes
from baton.router.costs.step_cost import COLD_STEPS, StepCosts, StepShape, attended_tokens
from baton.router.costs.transfer_cost import TransferCosts
from baton.router.routing.facts import InstanceView, RequestFacts

DECODE = InstanceView(instance_id="decode-0", role="decode")
PREFILL = InstanceView(instance_id="prefill-0", role="prefill")
BUSY = InstanceView(instance_id="decode-0", role="decode", running_requests=8, context_tokens=4000)


def _samples(token_s: float, step_s: float = 2e-3, count: int = 40) -> list[pb.StepSample]:
    sizes = [16 * (1 + number % 32) for number in range(count)]
    return [
        pb.StepSample(
            prefill_tokens=size, prefill_attended_tokens=attended_tokens(size, 0), step_s=step_s + token_s * size
        )
        for size in sizes
    ]


def _local_s(model: CostModel, decode: InstanceView = DECODE, tokens: int = 500) -> float:
    return model.predict(decode, None, new_tokens=tokens, cached_tokens=0).ttft_s


def test_before_anything_is_known_short_prompts_stay_and_long_ones_go() -> None:
    model = CostModel()

    def times(decode: InstanceView, tokens: int) -> tuple[float, float]:
        options = [model.predict(decode, reader, new_tokens=tokens, cached_tokens=0) for reader in (None, PREFILL)]
        return options[0].ttft_s + options[0].imposed_s, options[1].ttft_s + options[1].imposed_s

    local, handover = times(DECODE, 32)
    assert local < handover
    for decode in (DECODE, BUSY):
        local, handover = times(decode, 1000)
        assert handover < local


def test_attended_tokens_are_what_a_loop_counts() -> None:
    assert attended_tokens(3, 10) == 11 + 12 + 13


def test_a_new_worker_is_as_fast_as_its_pool_and_a_new_incarnation_is_a_new_worker() -> None:
    costs = StepCosts()
    shape = StepShape(prefill_tokens=256, attended_tokens=attended_tokens(256, 0))
    told = [
        (StepShape(prefill_tokens=s.prefill_tokens, attended_tokens=s.prefill_attended_tokens), s.step_s)
        for s in _samples(1e-3)
    ]
    costs.learn("prefill-0", b"1", "prefill", told)
    assert costs.of("prefill-0", "prefill").step_s(shape) == pytest.approx(0.258, rel=0.05)
    # Another of its pool, and one of the other pool that never read a prompt.
    assert costs.of("prefill-1", "prefill").step_s(shape) == pytest.approx(0.258, rel=0.05)
    costs.learn("decode-0", b"2", "decode", [(StepShape(decode_rows=4, decode_context_tokens=400), 0.003)] * 20)
    assert costs.of("decode-0", "decode").step_s(shape) == pytest.approx(0.258, rel=0.2)
    before = costs.of("prefill-0", "prefill")
    costs.learn("prefill-0", b"3", "prefill", told)
    assert costs.of("prefill-0", "prefill") is not before


def test_the_first_steps_of_a_process_are_not_counted() -> None:
    cold, warm = StepCosts(), StepCosts()
    shape = StepShape(decode_rows=4, decode_context_tokens=400)
    cold.learn("decode-0", b"1", "decode", [(shape, 9.0)] * COLD_STEPS + [(shape, 0.004)] * 20)
    warm.learn("decode-0", b"1", "decode", [(shape, 0.004)] * (COLD_STEPS + 20))
    assert cold.of("decode-0", "decode").step_s(shape) == warm.of("decode-0", "decode").step_s(shape)


def test_workers_and_links_that_are_gone_are_forgotten() -> None:
    model = CostModel()
    for number in range(50):
        model.learn_steps(f"prefill-{number}", b"1", "prefill", _samples(1e-3, count=10))
        model.learn_transfer(f"prefill-{number}", "decode-0", tokens=100, exposed_s=0.01)
    model.keep(["prefill-7", "decode-0"])
    report = model.report()
    assert list(report["steps"]["instances"]) == ["prefill-7"]
    assert list(report["transfers"]["links"]) == ["prefill-7>decode-0"]


def test_a_link_never_used_leans_on_the_others() -> None:
    costs = TransferCosts()
    for tokens in (100, 400, 1600) * 10:
        costs.learn(("p0", "d0"), tokens=tokens, exposed_s=0.01 + 1e-5 * tokens)
        costs.learn(("p1", "d0"), tokens=tokens, exposed_s=0.1 + 1e-4 * tokens)
    assert costs.exposed_s(("p0", "d0"), 1000) == pytest.approx(0.02, rel=0.1)
    assert costs.exposed_s(("p1", "d0"), 1000) == pytest.approx(0.2, rel=0.1)
    assert 0.02 < costs.exposed_s(("p2", "d0"), 1000) < 0.2


def test_work_ahead_and_running_streams_make_it_longer() -> None:
    model = CostModel()
    queued = InstanceView(instance_id="prefill-0", role="prefill", own_prefill_tokens=3500, own_requests=5)
    options = [model.predict(DECODE, reader, new_tokens=500, cached_tokens=0) for reader in (PREFILL, queued)]
    assert options[1].parts["queue"] > 0.3
    assert options[1].ttft_s > options[0].ttft_s
    assert _local_s(model, BUSY) > _local_s(model)
    busy, idle = (model.predict(view, None, new_tokens=500, cached_tokens=0) for view in (BUSY, DECODE))
    assert busy.imposed_s > 5 * idle.imposed_s


def test_a_full_decode_worker_is_waited_for_by_either_way() -> None:
    model = CostModel()
    full = InstanceView(
        instance_id="decode-0", role="decode", running_requests=8, max_running_requests=8, max_remaining_tokens=800
    )
    for reader in (None, PREFILL):
        prediction = model.predict(full, reader, new_tokens=100, cached_tokens=0)
        assert prediction.parts["admission"] > 0
        assert model.predict(BUSY, reader, new_tokens=100, cached_tokens=0).parts["admission"] == 0


def test_a_prefill_worker_at_work_makes_the_decode_worker_of_its_host_slower() -> None:
    model = CostModel(max_local_prefill_tokens=16)
    decode, idle = replace(BUSY, host_id="h"), replace(PREFILL, host_id="h", lends_cores=True)
    busy, away = replace(idle, pending_prefill_tokens=4000), replace(idle, host_id="i", pending_prefill_tokens=4000)
    alone, beside, apart = (
        model.predict(decode, None, new_tokens=500, cached_tokens=0, beside=[view]) for view in (idle, busy, away)
    )
    assert alone == apart
    assert beside.ttft_s > 1.3 * alone.ttft_s
    assert beside.imposed_s > 1.3 * alone.imposed_s
    # And a handover is felt by a prompt that is read there.
    empty = replace(DECODE, host_id="h")
    reading = replace(empty, running_requests=1, pending_prefill_tokens=500)
    least, more = (model.predict(view, idle, new_tokens=500, cached_tokens=0) for view in (empty, reading))
    assert least.imposed_s == 0 < more.imposed_s


def test_outcomes_correct_what_no_step_tells() -> None:
    outcomes = Outcomes()
    for law_s in [0.02, 0.1, 0.05] * 30:
        outcomes.note("handover", law_s, 2 * law_s, is_shared=True)
    assert outcomes.correct("handover", 0.06, is_shared=True) == pytest.approx(0.12, rel=0.15)
    assert outcomes.correct("handover", 0.06, is_shared=False) < 0.07
    assert abs(outcomes.error_ratio("handover")) < 0.15
    assert outcomes.is_old("local")
    assert not outcomes.is_old("handover")


@given(st.lists(st.tuples(st.floats(-1, 1e6), st.floats(-1, 1e6)), max_size=50), st.floats(0, 1000))
@example([(1.0, 0.0625), (5e-324, 1.0)], 0.0)  # a time so short that its correction is nothing
def test_a_correction_is_bounded_whatever_came(outcomes: list[tuple[float, float]], law_s: float) -> None:
    found = Outcomes()
    for predicted_s, taken_s in outcomes:
        found.note("local", predicted_s, taken_s, is_shared=False)
    least_s = law_s / MAX_GAIN * (1 - 1e-12)  # a division and a product by its inverse differ in the last bit
    assert least_s <= found.correct("local", law_s, is_shared=False) <= law_s * MAX_GAIN + 0.05 + 1e-9


@given(
    st.lists(
        st.builds(
            pb.StepSample,
            decode_rows=st.integers(0, 2**32 - 1),
            decode_context_tokens=st.integers(0, 2**64 - 1),
            prefill_tokens=st.integers(0, 2**32 - 1),
            prefill_attended_tokens=st.integers(0, 2**64 - 1),
            step_s=st.floats(),
        ),
        max_size=20,
    ),
    st.integers(1, 10**6),
    st.integers(0, 10**6),
)
def test_any_news_leave_predictions_that_can_be_compared(
    samples: list[pb.StepSample], new_tokens: int, cached_tokens: int
) -> None:
    model = CostModel()
    model.learn_steps("decode-0", b"1", "decode", samples)
    for decode in (DECODE, BUSY):
        for prefill in (None, PREFILL):
            prediction = model.predict(decode, prefill, new_tokens=new_tokens, cached_tokens=cached_tokens)
            assert math.isfinite(prediction.ttft_s)
            assert prediction.ttft_s >= 0
            assert prediction.imposed_s >= 0
            assert sum(prediction.parts.values()) == pytest.approx(prediction.ttft_s)
    json.dumps(model.report(), allow_nan=False)


def test_a_pool_that_is_three_times_slower_is_believed_soon() -> None:
    model = CostModel()
    model.learn_steps("decode-0", b"1", "decode", _samples(1e-3, count=100))
    before_s = _local_s(model)
    samples = _samples(3e-3, 6e-3, count=40)
    for begin in range(0, 40, 4):
        model.learn_steps("decode-0", b"1", "decode", samples[begin : begin + 4])
    assert _local_s(model) == pytest.approx(3 * before_s, rel=0.15)


def test_the_estimate_is_the_best_way_there_is() -> None:
    model, facts = CostModel(), RequestFacts(prompt_tokens=500)
    assert estimate_ttft_s([PREFILL], facts, model, "auto") is None
    alone_s = estimate_ttft_s([DECODE], facts, model, "auto")
    crowded = [
        InstanceView(
            instance_id=f"decode-{n}", role="decode", running_requests=n, own_prefill_tokens=9000, own_requests=n + 1
        )
        for n in range(1, 9)
    ]
    assert alone_s == _local_s(model)
    assert estimate_ttft_s([*crowded, DECODE], facts, model, "never") == alone_s
