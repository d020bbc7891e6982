"""Decides what one engine step computes: continuous batching with chunked prefill. Pure: values in, a plan out.

`schedule()` returns a `StepPlan`; the engine carries it out and reports back through `advance` and `append`. There are
no prefill and decode phases: every sequence has `num_computed` chasing `len(token_ids)` (the idea of vLLM's V1
scheduler), so chunked prefill, prefix hits, preemption by recompute and attached pages are one mechanism.

Order within a step
    1. decode rows, one token each, oldest first; where blocks run out the youngest running sequence is preempted:
       its blocks go back, its tokens stay, it waits at its old place in the queue and is computed again later;
    2. admission in (priority, arrival) order, never around the head of the queue (no starvation); a sequence is
       admitted when the blocks of all its present tokens are there, and takes them at once: no prefill is half-starved;
    3. the rest of the token budget goes to prompts: half to the first in the queue, the rest to the most urgent ones
       with the shortest remainders, so no prompt waits for the whole of a longer one's.

With `max_steps_in_flight` of more than one (pipeline stages), plans are made while earlier steps are still computed:
`dispatch` marks a plan's rows as in flight, `advance` ends that. A sequence in flight gets no row but the next chunk of
its prompt, and steps share the work: each takes at most its part of the decode rows, so that disjoint groups of them
rotate through the stages, and prompts stream through in steps of `streamed_tokens`.

Where sampled tokens stay on the device until a later step has read them (`dispatch(plan, has_futures=True)`), a
sequence in flight gets its next decode row at once: its token is a future one, and so is the KV row's place that it
takes. If the token turns out to end the sequence, the row behind it was for nothing: its result is dropped, and blocks
come back when it has landed. Ends by length are known beforehand and cost no such row.

Ownership: the scheduler owns the sequences and, through them, all block references. RESERVED and HELD blocks are read
or written by handover threads; they come back only when their owner says so (`attach`, `prefill_here`, `release`).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from baton.engine.block_pool import BlockPool
from baton.engine.prefix_cache import HashChain
from baton.engine.request import EngineRequest, FinishReason
from baton.engine.sequence import Key, Sequence, SequenceState

__all__ = ["Row", "Scheduler", "StepPlan", "TokenSums", "share_prefill_budget", "streamed_tokens"]

STEP_COST_TOKENS = 16
"""Prompt tokens that take as long to compute as a step takes by itself, which is reading all weights once.

Measured for bf16 on one core of an AVX-512 CPU: 13.5 ms of a 246 M model's step, and 0.8 ms per token. A GPU computes
much more in the time of a read: some hundreds.
"""

_LEAST_URGENT_SHARE = 8
"""One in so many of a step's prompt tokens keeps prompts going that more urgent ones would else hold up for ever."""


@dataclass(slots=True)
class Row:
    """Compute tokens [start, start + count) of `seq`; `samples` when that reaches its last token: it yields the next.

    A start of `len(seq.token_ids)` means a future token.
    """

    seq: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True)
class StepPlan:
    """What one step does.

    Attributes:
        rows: what to compute, decode rows first.
        num_decode_rows: how many of them are decode rows: one token each, which yields the next one.
        admitted: sequences that got their blocks in this step and compute their prompt here.
        reserved: sequences that got their blocks and now await pages from a prefill worker.
        preempted: sequences that lost their blocks in this step.
    """

    rows: list[Row] = field(default_factory=list)
    num_decode_rows: int = 0
    admitted: list[Sequence] = field(default_factory=list)
    reserved: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Tokens of all sequences of a scheduler.

    Attributes:
        pending_prefill: prompt tokens not yet computed here, of waiting and running sequences.
        context: in blocks, or on their way there from a prefill worker.
        max_remaining: that sequences may still write.
    """

    pending_prefill: int
    context: int
    max_remaining: int


def share_prefill_budget(
    remaining: SequenceOf[int], budget: int, priorities: SequenceOf[int] | None = None
) -> list[int]:
    """Splits `budget` tokens over prompts with `remaining` tokens each; returns one share each.

    The first is sure of half. The rest goes to the most urgent ones, of these to whoever has the least left then, and
    of equal ones to the first: prompts of one size end one after another, and not all together when the last one could.
    Where some are less urgent than others, the first of the least urgent ones is sure of an eighth.

    Args:
        remaining: in the order of the queue: by priority, then the oldest first.
        priorities: of each, lower is more urgent; None: all alike.
    """
    size = len(remaining)
    shares = [0] * size
    if not size or budget <= 0:
        return shares
    ranks = list(priorities) if priorities is not None else [0] * size
    sure = [(0, budget if size == 1 else -(-budget // 2))]
    if ranks[-1] != ranks[0]:
        sure.append((ranks.index(ranks[-1]), budget // _LEAST_URGENT_SHARE))
    for index, most in sure:
        shares[index] = min(remaining[index], most, budget)
        budget -= shares[index]
    for index in sorted(range(size), key=lambda i: (ranks[i], remaining[i] - shares[i], i)):
        more = min(remaining[index] - shares[index], budget)
        shares[index] += more
        budget -= more
    return shares


def streamed_tokens(pending: int, num_stages: int, step_cost_tokens: int = STEP_COST_TOKENS) -> int:
    """Prompt tokens of a step when `pending` of them stream through `num_stages` stages, at least one.

    Cut into n / m steps of m tokens, n tokens take (n / m + stages - 1) times the time of (step cost + m): the pipeline
    fills and empties once, and each step costs something by itself. That is least at
    m = sqrt(n * step cost / (stages - 1)). Below the step cost a step of few tokens is hardly shorter.
    """
    return max(step_cost_tokens, math.isqrt(pending * step_cost_tokens // max(1, num_stages - 1)), 1)


class Scheduler:
    """Sequences, their blocks and the plan of each step.

    Args:
        pool: the worker's blocks.
        max_batch_tokens: tokens computed per step, at most.
        max_batch_size: sequences that run or hold a reservation at once, at most.
        max_model_len: tokens of prompt and output together, at most.
        eos_token_ids: end of text, unless a request ignores it.
        max_steps_in_flight: how many plans may be under way at once; the number of stages.
        max_prefill_tokens: prompt tokens in a step that has decode rows, at most; None: what the step has room for.
        step_cost_tokens: prompt tokens that cost as much as a step does by itself, see `STEP_COST_TOKENS`.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_batch_size: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        max_steps_in_flight: int = 1,
        max_prefill_tokens: int | None = None,
        step_cost_tokens: int = STEP_COST_TOKENS,
    ) -> None:
        assert max_batch_tokens >= 1
        assert max_steps_in_flight >= 1
        assert max_batch_size >= 1
        assert pool.num_blocks * pool.block_size >= max_model_len, "one request of full length must fit the pool"
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_steps_in_flight = max_steps_in_flight
        self.max_prefill_tokens = max_batch_tokens if max_prefill_tokens is None else max_prefill_tokens
        self.step_cost_tokens = step_cost_tokens
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._sequences: dict[Key, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._arrivals = 0

    # ------------------------------------------------------------ what is there

    @property
    def running(self) -> SequenceOf[Sequence]:
        """RUNNING sequences in admission order."""
        return self._running

    @property
    def waiting(self) -> SequenceOf[Sequence]:
        """WAITING sequences in the order they will be admitted."""
        return self._waiting

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may have something to do (a RESERVED or HELD sequence alone is not work)."""
        return bool(self._waiting or self._running)

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, key: Key) -> Sequence | None:
        """The live sequence of `key`."""
        return self._sequences.get(key)

    def sequences(self) -> list[Sequence]:
        """Every live sequence, whatever its state."""
        return list(self._sequences.values())

    def token_sums(self) -> TokenSums:
        """Tokens that the sequences here have and may get."""
        pending = context = remaining = 0
        waiting, running, max_model_len = SequenceState.WAITING, SequenceState.RUNNING, self.max_model_len
        for seq in self._sequences.values():
            num_tokens, state = len(seq.token_ids), seq.state
            if state is waiting:
                if not seq.remote_prefill:
                    pending += num_tokens
            elif state is running:
                computed = seq.num_computed
                context += computed
                if num_tokens - computed > 1:
                    pending += num_tokens - computed
            else:
                context += num_tokens
            if not seq.prefill_only:
                most = seq.num_prompt + seq.request.sampling.max_tokens
                remaining += (most if most < max_model_len else max_model_len) - num_tokens
        return TokenSums(pending, context, remaining)

    # ------------------------------------------------------------ coming and going

    def add(
        self, request: EngineRequest, *, remote_prefill: bool = False, prefill_only: bool = False, tag: int = 0
    ) -> Sequence:
        """Queues a request. The caller has checked it: 1 <= prompt tokens < max_model_len, and the key is new."""
        seq = Sequence(
            request=request,
            chain=HashChain(self.pool.block_size, request.cache_salt),
            arrival=self._arrivals,
            remote_prefill=remote_prefill,
            prefill_only=prefill_only,
            tag=tag,
            token_ids=[*request.prompt_token_ids, *request.resumed_token_ids],
        )
        assert seq.key not in self._sequences, f"{seq.key} is already here"
        assert 1 <= len(seq.token_ids) < self.max_model_len
        self._arrivals += 1
        self._sequences[seq.key] = seq
        self._enqueue(seq)
        return seq

    def attach(self, key: Key, first_token_id: int, cached_tokens: int = 0) -> FinishReason | None:
        """The pages of a RESERVED sequence have landed: it runs from its first token on."""
        seq = self._sequences[key]
        assert seq.state is SequenceState.RESERVED, f"{key} is {seq.state}"
        seq.num_computed = seq.num_scheduled = len(seq.token_ids)
        seq.cached_tokens = max(seq.cached_tokens, cached_tokens)
        self._name_blocks(seq)
        self._run(seq)
        return self.append(seq, first_token_id)

    def prefill_here(self, key: Key) -> None:
        """No pages will come, and nothing writes into the reserved blocks any more: compute the prompt here."""
        seq = self._sequences[key]
        seq.remote_prefill = False
        if seq.state is SequenceState.RESERVED:
            self._run(seq)

    def hold(self, key: Key) -> None:
        """Stops scheduling a sequence but keeps its blocks until `release` (pages of it are being shipped)."""
        seq = self._sequences[key]
        self._unlist(seq)
        seq.state = SequenceState.HELD

    def release(self, key: Key) -> bool:
        """Ends a sequence in any state; False where it is not here (any more).

        Its blocks go back at once, or with the last of its steps in flight.
        """
        seq = self._sequences.pop(key, None)
        if seq is None:
            return False
        self._unlist(seq)
        seq.state = SequenceState.FINISHED
        if not seq.num_in_flight:
            self._give_back(seq)
        return True

    # ------------------------------------------------------------ one step

    def schedule(self) -> StepPlan:
        """Plans the next step and takes the blocks it needs."""
        plan = StepPlan()
        budget = self.max_batch_tokens
        num_decode_rows = min(budget, -(-len(self._running) // self.max_steps_in_flight))
        waits_for_blocks = False
        block_size = self.pool.block_size
        for seq in list(self._running):
            if len(plan.rows) == num_decode_rows:
                break
            start = seq.num_scheduled
            if seq.state is not SequenceState.RUNNING or len(seq.token_ids) + seq.num_future - start != 1:
                continue
            if start < len(seq.block_ids) * block_size or self._grow(seq, plan):
                plan.rows.append(Row(seq, start, 1, True))
                plan.num_decode_rows += not seq.wants_prompt_logprobs
            elif seq.state is SequenceState.RUNNING:
                waits_for_blocks = True
                break
        budget -= len(plan.rows)
        if plan.rows:
            budget = min(budget, self.max_prefill_tokens)
        if plan.preempted:
            plan.rows = [row for row in plan.rows if row.seq.state is SequenceState.RUNNING]
            plan.num_decode_rows = sum(not row.seq.wants_prompt_logprobs for row in plan.rows)
        elif not waits_for_blocks:
            self._admit(plan)
        if not waits_for_blocks:
            self._add_prompts(plan, budget)
        return plan

    def _add_prompts(self, plan: StepPlan, budget: int) -> None:
        """Gives what is left of a step's tokens to prompts."""
        if budget <= 0 or len(plan.rows) == len(self._running):
            return
        planned = {id(row.seq) for row in plan.rows}
        prompts = [s for s in self._running if self._wants_prompt_row(s) and id(s) not in planned]
        remaining = [s.num_unscheduled for s in prompts]
        if self.max_steps_in_flight > 1:
            # Several small steps stream through the stages where one large step would leave all but one idle.
            # Beside decode rows, which pay for a step anyway, steps grow smaller towards a prompt's end, so that the
            # last heavy one is not followed by light ones that overtake it in the stages before and then wait.
            pending = sum(remaining) if plan.rows else sum(len(s.token_ids) - s.cached_tokens for s in prompts)
            budget = min(budget, streamed_tokens(pending, self.max_steps_in_flight, self.step_cost_tokens))
        shares = share_prefill_budget(remaining, budget, [seq.request.priority for seq in prompts])
        plan.rows += [
            Row(seq, seq.num_scheduled, share, share == rest)
            for seq, share, rest in zip(prompts, shares, remaining, strict=True)
            if share
        ]

    def _wants_prompt_row(self, seq: Sequence) -> bool:
        # A lone token behind a sampled one is a decode row: those wait for their turn in the next step.
        is_decode = self.max_steps_in_flight > 1 and seq.num_unscheduled == 1 and seq.num_output > 0
        return seq.num_unscheduled >= 1 and not is_decode

    def dispatch(self, plan: StepPlan, *, has_futures: bool = False) -> None:
        """The rows of `plan` are being computed while other plans are made; `advance` or `abandon` must follow.

        Args:
            has_futures: what the rows sample may be computed further before `append` tells what it is.
        """
        for row in plan.rows:
            seq = row.seq
            seq.num_scheduled = end = row.start + row.count
            seq.num_in_flight += 1
            if has_futures and row.samples and not self._ends_at(seq, end + 1):
                seq.num_future += 1

    def abandon(self, plan: StepPlan) -> None:
        """A plan that was dispatched will not be computed."""
        for row in plan.rows:
            self._land(row.seq)
            row.seq.num_scheduled = row.seq.num_computed
            row.seq.num_future = 0

    def advance(self, row: Row) -> None:
        """The KV of `row` is computed."""
        seq = row.seq
        self._land(seq)
        if seq.state is SequenceState.FINISHED:
            return
        seq.num_computed = computed = row.start + row.count
        if seq.num_scheduled < computed:
            seq.num_scheduled = computed
        if computed // self.pool.block_size > seq.num_named:
            self._name_blocks(seq)

    def append(self, seq: Sequence, token_id: int) -> FinishReason | None:
        """Adds a sampled token; after the last one the sequence ends (HELD when prefill only). Returns why, or None."""
        seq.token_ids.append(token_id)
        if seq.num_future:
            seq.num_future -= 1
        reason = self._finish_reason(seq, token_id)
        if seq.prefill_only:
            self.hold(seq.key)
        elif reason is not None:
            self.release(seq.key)
        seq.finish_reason = reason
        return reason

    # ------------------------------------------------------------ inside

    def _land(self, seq: Sequence) -> None:
        """A step of `seq` is not in flight any more (it never was where steps are made one at a time)."""
        if seq.num_in_flight:
            seq.num_in_flight -= 1
            if not seq.num_in_flight and seq.state is SequenceState.FINISHED:
                self._give_back(seq)

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        sampling = seq.request.sampling
        if seq.num_output >= sampling.min_tokens and (
            token_id in sampling.stop_token_ids or (not sampling.ignore_eos and token_id in self.eos_token_ids)
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if self._is_full(seq, len(seq.token_ids)) else None

    def _is_full(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` gets no more."""
        return num_tokens - seq.num_prompt >= seq.request.sampling.max_tokens or num_tokens >= self.max_model_len

    def _ends_at(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether `seq` is computed no further here once it has `num_tokens`, whatever they are."""
        return seq.prefill_only or self._is_full(seq, num_tokens)

    def _enqueue(self, seq: Sequence) -> None:
        seq.state = SequenceState.WAITING
        bisect.insort(self._waiting, seq, key=_queue_order)

    def _run(self, seq: Sequence) -> None:
        seq.state = SequenceState.RUNNING
        bisect.insort(self._running, seq, key=_queue_order)

    def _unlist(self, seq: Sequence) -> None:
        if seq.state is SequenceState.RUNNING:
            self._running.remove(seq)
        elif seq.state is SequenceState.WAITING:
            self._waiting.remove(seq)

    def _give_back(self, seq: Sequence) -> None:
        self.pool.release(seq.block_ids)
        seq.block_ids = []
        seq.num_computed = 0
        seq.num_scheduled = 0
        seq.num_named = 0

    def _admit(self, plan: StepPlan) -> None:
        if not self._waiting:
            return
        reserved = sum(1 for s in self._sequences.values() if s.state is SequenceState.RESERVED)
        while self._waiting and len(self._running) + reserved < self.max_batch_size:
            seq = self._waiting[0]
            # Each running sequence may need one more block soon: admitting into the last blocks would only preempt.
            spare = len(self._running) if self._running else 0
            if not self._take_prompt_blocks(seq, spare):
                return
            del self._waiting[0]
            if seq.remote_prefill:
                seq.state = SequenceState.RESERVED
                reserved += 1
                plan.reserved.append(seq)
            else:
                self._run(seq)
                plan.admitted.append(seq)

    def _take_prompt_blocks(self, seq: Sequence, spare: int) -> bool:
        size = self.pool.block_size
        names = seq.chain.names(seq.token_ids)[: (len(seq.token_ids) - 1) // size]
        hits = [] if seq.wants_prompt_logprobs else self.pool.match(names)
        self.pool.acquire(hits)
        needed = -(-len(seq.token_ids) // size) - len(hits)
        fresh = self.pool.allocate(needed) if needed + spare <= self.pool.num_available else None
        if fresh is None:
            self.pool.release(hits)
            return False
        seq.block_ids = hits + fresh
        seq.num_computed = seq.num_scheduled = len(hits) * size
        seq.num_named = len(hits)
        if not seq.admitted_before:
            seq.admitted_before = True
            seq.cached_tokens = seq.num_computed
            self.prefix_query_tokens += len(seq.token_ids)
            self.prefix_hit_tokens += seq.num_computed
        return True

    def _grow(self, seq: Sequence, plan: StepPlan) -> bool:
        """Takes one more block for `seq`, preempting the youngest until it fits.

        False: that was `seq`, or the youngest is in flight and goes when its steps are done.
        """
        while True:
            fresh = self.pool.allocate(1)
            if fresh is not None:
                seq.block_ids += fresh
                return True
            victim = self._running[-1]
            if victim.num_in_flight:
                return False
            self._preempt(victim)
            plan.preempted.append(victim)
            if victim is seq:
                return False

    def _preempt(self, victim: Sequence) -> None:
        assert not victim.num_future, "a sequence in flight keeps its blocks"
        self._unlist(victim)
        self._give_back(victim)
        victim.prompt_logprobs.clear()
        victim.remote_prefill = False
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(victim)

    def _name_blocks(self, seq: Sequence) -> None:
        full = seq.num_computed // self.pool.block_size
        if full > seq.num_named:
            names = seq.chain.names(seq.token_ids)
            for index in range(seq.num_named, full):
                self.pool.name(seq.block_ids[index], names[index])
            seq.num_named = full


_queue_order: Callable[[Sequence], tuple[int, int]] = lambda seq: (seq.request.priority, seq.arrival)  # noqa: E731
