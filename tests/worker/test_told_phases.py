"""Phases of the time until the first token: none counted twice, and told by real workers with the first two tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.worker.harness import request, workers

from baton.decode_worker.phases import Moments
from baton.engine.request import Phases

SECONDS = st.floats(0, 100, allow_nan=False)


@given(st.data())
def test_phases_are_never_negative_and_sum_to_no_more_than_the_time(data: st.DataObject) -> None:
    maybe = st.none() | SECONDS
    submitted_s = data.draw(SECONDS)
    moments = Moments(submitted_s, reserved_s=data.draw(maybe), taken_up_s=data.draw(maybe))
    moments.sampled_s = data.draw(maybe)
    if data.draw(st.booleans()):
        moments.landed(
            data.draw(SECONDS), sampled_s=data.draw(SECONDS), prefill_s=data.draw(SECONDS), queue_s=data.draw(SECONDS)
        )
    told_s = submitted_s + data.draw(SECONDS)
    phases = moments.first_told(told_s)
    assert all(getattr(phases, name) >= 0 for name in Phases.__dataclass_fields__)
    assert phases.until_first_token_s <= told_s - submitted_s + 1e-9
    assert moments.second_sampled(told_s + 1).first_step_s == pytest.approx(1)


def test_a_prompt_computed_here_leaves_no_gap() -> None:
    moments = Moments(10.0, taken_up_s=12.0, sampled_s=15.0)
    assert moments.first_told(15.5) == Phases(reserve_s=2.0, prefill_s=3.0, attach_s=0.5)


@pytest.mark.parametrize(
    ("reserved_s", "reserve_s", "transfer_s"),
    [(10.5, 0.5, 2.0), (14.0, 1.0, 2.0), (16.5, 2.5, 0.5), (None, 0.0, 2.0)],
    ids=["at once", "while it was computed", "later", "never told"],
)
def test_a_wait_for_blocks_counts_only_while_nothing_is_computed(
    reserved_s: float | None, reserve_s: float, transfer_s: float
) -> None:
    moments = Moments(10.0, reserved_s=reserved_s)
    moments.landed(17.0, sampled_s=15.0, prefill_s=4.0, queue_s=1.5)
    assert moments.first_told(17.25) == Phases(
        reserve_s=reserve_s, prefill_queue_s=1.5, prefill_s=2.5, transfer_exposed_s=transfer_s, attach_s=0.25
    )


@pytest.mark.parametrize("remote", [False, True], ids=["computed here", "handed over"])
async def test_workers_tell_phases_with_the_first_two_tokens(monkeypatch: pytest.MonkeyPatch, remote: bool) -> None:
    async with workers(monkeypatch) as cluster:
        router = await cluster.router()
        prompt = request("a", list(range(1, 40)), max_tokens=5)
        await router.submit(prompt, remote=remote)
        reply = await router.start_prefill(prompt) if remote else None
        await router.collect("a")
        await router.close()
    first, second, *others = [output.phases for output in router.outputs["a"] if output.token_ids]
    assert others == [None, None, None]
    assert first is not None
    assert second is not None
    assert first.prefill_s > 0
    assert first.first_step_s == 0
    assert second == Phases(first_step_s=second.first_step_s)
    if reply is not None:
        assert first.transfer_exposed_s > 0
        assert 0 <= reply.queue_s < reply.prefill_s
    else:
        assert first.transfer_exposed_s == first.prefill_queue_s == 0
