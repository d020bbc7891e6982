"""The scheduler's promises: budget kept, blocks conserved, nobody starves, everybody ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.block_pool import BlockPool
from baton.engine.request import EngineRequest, FinishReason, SamplingParams
from baton.engine.scheduler import Scheduler, StepPlan, TokenSums, share_prefill_budget
from baton.engine.sequence import SequenceState


def make(num_blocks: int = 64, block_size: int = 4, tokens: int = 16, size: int = 8, length: int = 64) -> Scheduler:
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(pool, max_batch_tokens=tokens, max_batch_size=size, max_model_len=length, eos_token_ids=[0])


def request(name: str, prompt: int | list[int], max_tokens: int = 4, **options: object) -> EngineRequest:
    ids = tuple(prompt) if isinstance(prompt, list) else tuple(range(1, prompt + 1))
    sampling = SamplingParams(max_tokens=max_tokens, **{k: v for k, v in options.items() if k != "priority"})  # type: ignore[arg-type]
    return EngineRequest(
        request_id=name, prompt_token_ids=ids, sampling=sampling, priority=int(options.get("priority", 0))
    )  # type: ignore[call-overload]


def carry_out(scheduler: Scheduler, plan: StepPlan, token_id: int = 9) -> dict[str, FinishReason | None]:
    ended = {}
    for row in plan.rows:
        samples = row.samples
        scheduler.advance(row)
        if samples:
            ended[row.seq.key[0]] = scheduler.append(row.seq, token_id)
    scheduler.pool.check()
    return ended


@pytest.mark.parametrize(
    ("remaining", "budget", "shares"),
    [
        ([100], 10, [10]),
        ([100, 100], 10, [10, 0]),
        ([8, 8], 10, [8, 2]),
        ([100, 3], 10, [7, 3]),
        ([100, 50, 2, 1], 10, [5, 2, 2, 1]),
        ([1, 100], 10, [1, 9]),
        ([3, 3], 0, [0, 0]),
        ([], 5, []),
    ],
)
def test_prefill_budget_is_shared(remaining: list[int], budget: int, shares: list[int]) -> None:
    assert share_prefill_budget(remaining, budget) == shares


@pytest.mark.parametrize(
    ("remaining", "priorities", "shares"),
    [
        ([100, 3], [0, 1], [14, 2]),
        ([100, 3, 200], [0, 0, 0], [13, 3, 0]),
        ([100, 3, 200], [0, 1, 1], [14, 2, 0]),
        ([5, 5, 100, 4], [0, 0, 1, 2], [5, 5, 4, 2]),
    ],
)
def test_urgent_prompts_go_first_and_leave_the_others_an_eighth(
    remaining: list[int], priorities: list[int], shares: list[int]
) -> None:
    assert share_prefill_budget(remaining, 16, priorities) == shares


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(-1, 2)), max_size=12), st.integers(0, 600))
def test_shares_never_exceed_and_never_waste_the_budget(prompts: list[tuple[int, int]], budget: int) -> None:
    prompts.sort(key=lambda prompt: prompt[1])
    remaining, priorities = [prompt[0] for prompt in prompts], [prompt[1] for prompt in prompts]
    shares = share_prefill_budget(remaining, budget, priorities)
    if remaining and budget >= 8:
        assert shares[priorities.index(priorities[-1])] >= 1
    assert all(0 <= share <= want for share, want in zip(shares, remaining, strict=True))
    assert sum(shares) == min(budget, sum(remaining))
    if remaining and budget:
        assert shares[0] >= min(remaining[0], budget // 2)


def test_a_long_prompt_does_not_hold_up_a_short_one() -> None:
    scheduler = make(tokens=8, num_blocks=64, length=200)
    scheduler.add(request("long", 100))
    scheduler.add(request("short", [50, 51, 52]))
    plan = scheduler.schedule()
    assert [(row.seq.key[0], row.count) for row in plan.rows] == [("long", 5), ("short", 3)]
    assert carry_out(scheduler, plan) == {"short": None}


def test_decode_rows_come_first() -> None:
    scheduler = make(tokens=8)
    scheduler.add(request("a", 3))
    carry_out(scheduler, scheduler.schedule())
    scheduler.add(request("b", 30))
    plan = scheduler.schedule()
    assert [(row.seq.key[0], row.start, row.count) for row in plan.rows] == [("a", 3, 1), ("b", 0, 7)]


def test_prompts_beside_running_answers_come_in_small_pieces() -> None:
    pool = BlockPool(64, 4)
    scheduler = Scheduler(pool, max_batch_tokens=16, max_batch_size=8, max_model_len=64, max_prefill_tokens=3)
    scheduler.add(request("first", 10, max_tokens=6))
    counts = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        counts.append([row.count for row in plan.rows])
        carry_out(scheduler, plan)
        if len(counts) == 1:
            scheduler.add(request("second", [5] * 14, max_tokens=1))
    assert counts == [[10], [1, 3], [1, 3], [1, 3], [1, 3], [1, 2]], "nothing runs beside the first prompt"


def test_prefix_hit_leaves_at_least_one_token_to_compute() -> None:
    scheduler = make()
    scheduler.add(request("a", 8, max_tokens=1))
    assert carry_out(scheduler, scheduler.schedule()) == {"a": FinishReason.LENGTH}
    again = scheduler.add(request("b", 8, max_tokens=1))
    plan = scheduler.schedule()
    assert again.cached_tokens == 4  # two full blocks are known, the last one is computed again
    assert [(row.start, row.count) for row in plan.rows] == [(4, 4)]
    assert scheduler.prefix_hit_tokens == 4


def test_salted_prompts_do_not_hit() -> None:
    scheduler = make()
    scheduler.add(request("a", 8, max_tokens=1))
    carry_out(scheduler, scheduler.schedule())
    salted = EngineRequest(
        request_id="b", prompt_token_ids=tuple(range(1, 9)), sampling=SamplingParams(max_tokens=1), cache_salt="x"
    )
    sequence = scheduler.add(salted)
    scheduler.schedule()
    assert sequence.cached_tokens == 0


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    scheduler = make(num_blocks=5, block_size=4, length=20, tokens=32)
    old = scheduler.add(request("old", [1] * 8, max_tokens=10))
    young = scheduler.add(request("young", [2] * 7, max_tokens=10))
    preempted_at = None
    for step in range(60):
        plan = scheduler.schedule()
        if plan.preempted and preempted_at is None:
            assert plan.preempted == [young]
            assert young.state is SequenceState.WAITING
            assert young.block_ids == []
            assert young.num_output > 0
            preempted_at = step
        carry_out(scheduler, plan)
        if not len(scheduler):
            break
    assert preempted_at is not None
    assert old.num_output == young.num_output == 10
    assert scheduler.pool.counts().owned == 0


def test_reservation_takes_blocks_and_attaches_with_the_first_token() -> None:
    scheduler = make()
    seq = scheduler.add(request("r", 10), remote_prefill=True)
    plan = scheduler.schedule()
    assert plan.reserved == [seq]
    assert plan.rows == []
    assert len(seq.block_ids) == 3
    assert not scheduler.has_work
    assert scheduler.attach(seq.key, 42) is None
    plan = scheduler.schedule()
    assert [(row.start, row.count, row.samples) for row in plan.rows] == [(10, 1, True)]
    # Attached pages are in the prefix cache like computed ones.
    other = scheduler.add(request("s", 10))
    scheduler.schedule()
    assert other.cached_tokens == 8


def test_failed_handover_prefills_in_the_reserved_blocks() -> None:
    scheduler = make()
    seq = scheduler.add(request("r", 10), remote_prefill=True)
    scheduler.schedule()
    blocks = list(seq.block_ids)
    scheduler.prefill_here(seq.key)
    plan = scheduler.schedule()
    assert [(row.start, row.count) for row in plan.rows] == [(0, 10)]
    assert seq.block_ids == blocks


def test_prefill_only_holds_its_blocks_until_released() -> None:
    scheduler = make()
    seq = scheduler.add(request("p", 10), prefill_only=True)
    assert carry_out(scheduler, scheduler.schedule()) == {"p": None}
    assert seq.state is SequenceState.HELD
    assert scheduler.pool.counts().owned == 3
    assert not scheduler.has_work
    assert scheduler.release(seq.key)
    assert not scheduler.release(seq.key)
    assert scheduler.pool.counts().owned == 0


def test_ends() -> None:
    scheduler = make(tokens=64)
    scheduler.add(request("eos", [1, 2]))
    scheduler.add(request("ignores", [1, 3], max_tokens=2, ignore_eos=True))
    scheduler.add(request("early", [1, 4], max_tokens=3, min_tokens=2))
    assert carry_out(scheduler, scheduler.schedule(), token_id=0) == {
        "eos": FinishReason.STOP,
        "ignores": None,
        "early": None,
    }
    assert carry_out(scheduler, scheduler.schedule(), token_id=0) == {
        "ignores": FinishReason.LENGTH,
        "early": FinishReason.STOP,
    }


def test_the_window_ends_a_request() -> None:
    scheduler = make(length=12, tokens=64)
    scheduler.add(request("w", 10, max_tokens=100))
    ended: dict[str, FinishReason | None] = {}
    for _ in range(4):
        ended |= carry_out(scheduler, scheduler.schedule())
    assert ended == {"w": FinishReason.LENGTH}


def test_priority_goes_first() -> None:
    scheduler = make(size=1)
    scheduler.add(request("later", 4, priority=1))
    scheduler.add(request("sooner", 4, priority=0))
    assert [s.key[0] for s in scheduler.schedule().admitted] == ["sooner"]


_Arrival = st.tuples(st.integers(1, 30), st.integers(1, 12), st.booleans(), st.integers(0, 2))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(_Arrival, min_size=1, max_size=20),
    st.integers(1, 8),
    st.integers(11, 40),
    st.integers(8, 40),
    st.randoms(use_true_random=False),
)
def test_everybody_ends_and_every_block_comes_back(arrivals, size, num_blocks, tokens, random) -> None:  # type: ignore[no-untyped-def]
    """Any mix of local, remote (landing, failing or cancelled) requests on a small pool ends with all tokens."""
    scheduler = make(num_blocks=num_blocks, block_size=4, tokens=max(tokens, size), size=size, length=44)
    pending = [(f"r{i}", *arrival) for i, arrival in enumerate(arrivals)]
    lengths: dict[str, int] = {}
    reserved: list[str] = []
    for _ in range(3000):
        while pending and random.random() < 0.5:
            name, prompt, max_tokens, remote, priority = pending.pop()
            scheduler.add(request(name, prompt, max_tokens, priority=priority, ignore_eos=True), remote_prefill=remote)
            lengths[name] = max_tokens
        plan = scheduler.schedule()
        assert sum(row.count for row in plan.rows) <= scheduler.max_batch_tokens
        assert len({row.seq.key for row in plan.rows}) == len(plan.rows)
        for row in plan.rows:
            assert row.start == row.seq.num_computed
            assert len(row.seq.block_ids) * 4 >= row.start + row.count
        reserved += [seq.key[0] for seq in plan.reserved]
        for name, reason in carry_out(scheduler, plan).items():
            if reason is not None:
                del lengths[name]
        while reserved and random.random() < 0.5:
            name = reserved.pop(random.randrange(len(reserved)))
            outcome = random.random()
            if outcome < 0.5:
                if scheduler.attach((name, 0), 9) is not None:
                    del lengths[name]
            elif outcome < 0.8:
                scheduler.prefill_here((name, 0))
            else:
                scheduler.release((name, 0))
                del lengths[name]
        if not pending and not len(scheduler):
            break
    assert lengths == {}
    counts = scheduler.pool.counts()
    assert counts.owned == 0
    assert counts.free + counts.cached == counts.total


def test_tokens_are_summed_over_all_that_is_there() -> None:
    scheduler = make(tokens=8, size=4, length=32)
    assert scheduler.token_sums() == TokenSums(0, 0, 0)
    scheduler.add(request("long", 12, max_tokens=100))
    scheduler.add(request("short", 2, max_tokens=5), prefill_only=True)
    assert scheduler.token_sums() == TokenSums(14, 0, 20)
    carry_out(scheduler, scheduler.schedule())
    assert scheduler.token_sums() == TokenSums(6, 6 + 3, 20), "the short one is held, with its first token"
    scheduler.add(request("remote", 9, max_tokens=7), remote_prefill=True)
    assert scheduler.token_sums() == TokenSums(6, 9, 27)
    carry_out(scheduler, scheduler.schedule())
    assert scheduler.token_sums() == TokenSums(0, 12 + 3 + 9, 19 + 7), "pages are on their way to blocks"
    for name in ("long", "short", "remote"):
        scheduler.release((name, 0))
    assert scheduler.token_sums() == TokenSums(0, 0, 0)
