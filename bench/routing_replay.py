"""A trace through the router's own `choose`, over simulated workers in virtual time: what `bench/routing.py` runs.

Each worker reads prompts one after another at a steady rate, writes answers beside that at a steady pace, and keeps the
blocks of what it read, least recently used ones dropped first. The router knows exactly which blocks it holds, and what
it has sent and not seen end; its load reports are as old as `report_s`.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.cluster.loadgen.trace import BLOCK_TOKENS, TraceRow
from baton.router.policy import choose
from baton.router.routing.facts import InstanceView, RequestFacts
from baton.router.routing.policies import Policy
from baton.router.routing.prior_costs import PriorCosts
from baton.router.routing.recent_work import RecentWork

__all__ = ["Replay", "Service", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What a worker can do.

    Attributes:
        cached_tokens: KV memory.
        read_tokens_per_s: of prompts.
        write_s: between two tokens of an answer.
        report_s: between two load reports.
    """

    cached_tokens: int = 1_000_000
    read_tokens_per_s: float = 20_000.0
    write_s: float = 0.02
    report_s: float = 0.05


@dataclass(slots=True, kw_only=True)
class Replay:
    """What came of it. `work` is prompt tokens computed, by worker; delays are from arrival to the prompt's end."""

    policy: str
    workers: int
    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    work: list[int] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)
    choose_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Figures for a table, and for JSON."""
        delays = sorted(self.delays_s)
        return {
            "policy": self.policy,
            "workers": self.workers,
            "requests": self.requests,
            "hit_rate": self.hit_tokens / self.prompt_tokens,
            "imbalance": max(self.work) * len(self.work) / max(sum(self.work), 1),
            "ttft_mean_s": sum(delays) / len(delays),
            "ttft_p95_s": delays[int(len(delays) * 0.95)],
            "choose_us": self.choose_s / self.requests * 1e6,
        }


class _Worker:
    def __init__(self, name: str, service: Service) -> None:
        self.name, self._service = name, service
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._capacity = service.cached_tokens // BLOCK_TOKENS
        self._read_until_s = 0.0
        self._reading: list[tuple[float, int, float]] = []  # (end of reading, tokens, end of writing)
        self._writing: list[float] = []
        self._report_due_s = 0.0
        self._reported: tuple[int, int, int] = (0, 0, 0)

    def held(self, names: Sequence[int]) -> int:
        for depth, name in enumerate(names):
            if name not in self._blocks:
                return depth
        return len(names)

    def begin(self, names: Sequence[int], tokens: int, output_tokens: int, now_s: float) -> float:
        """When the prompt will have been read."""
        start_s = max(self._read_until_s, now_s)
        self._read_until_s = start_s + tokens / self._service.read_tokens_per_s
        end_s = self._read_until_s + output_tokens * self._service.write_s
        heapq.heappush(self._reading, (self._read_until_s, tokens, end_s))
        for name in reversed(names):
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return self._read_until_s

    def view(self, now_s: float) -> InstanceView:
        while self._reading and self._reading[0][0] <= now_s:
            heapq.heappush(self._writing, heapq.heappop(self._reading)[2])
        while self._writing and self._writing[0] <= now_s:
            heapq.heappop(self._writing)
        pending = int(max(self._read_until_s - now_s, 0.0) * self._service.read_tokens_per_s)
        if now_s >= self._report_due_s:
            self._report_due_s = now_s + self._service.report_s
            self._reported = (len(self._writing), len(self._reading), pending)
        running, waiting, prefill_tokens = self._reported
        return InstanceView(
            instance_id=self.name,
            role="decode",
            block_size=BLOCK_TOKENS,
            running_requests=running,
            waiting_requests=waiting,
            kv_blocks_total=self._capacity,
            kv_blocks_free=self._capacity - len(self._blocks),
            kv_blocks_cached=len(self._blocks),
            pending_prefill_tokens=prefill_tokens,
            own_requests=len(self._writing) + len(self._reading),
            own_prefill_tokens=pending,
        )


def replay(
    rows: Iterable[TraceRow],
    policy: Policy,
    *,
    workers: int,
    service: Service | None = None,
    seed: int = 0,
    on_request: Callable[[], None] = lambda: None,
) -> Replay:
    """Serve a trace whose rows carry `hash_ids`; `seed` names the requests, which is what `random` goes by."""
    service = service or Service()
    pool = [_Worker(f"decode-{number}", service) for number in range(workers)]
    costs = PriorCosts(token_s=1 / service.read_tokens_per_s, local_chunk_tokens=1 << 20)
    by_name = {worker.name: worker for worker in pool}
    result = Replay(policy=policy.name, workers=workers, work=[0] * workers)
    recent, names_of = RecentWork(), random.Random(seed)
    for turn, row in enumerate(rows):
        assert row.hash_ids is not None
        # The last block may be a part of one, which no cache holds.
        names = row.hash_ids[: row.input_tokens // BLOCK_TOKENS]
        views = [worker.view(row.at_s) for worker in pool]
        prefix = {worker.name: held for worker in pool if (held := worker.held(names))}
        begin_s = time.perf_counter()
        facts = RequestFacts(
            prompt_tokens=row.input_tokens,
            request_id=f"{names_of.getrandbits(64):x}",
            max_tokens=row.output_tokens,
            prefix_blocks=prefix,
            recent_tokens=recent.tokens(by_name, row.at_s),
            turn=turn,
        )
        decision = choose(views, facts, policy, costs)
        recent.add(decision.decode_id, decision.uncached_tokens, row.at_s)
        result.choose_s += time.perf_counter() - begin_s
        chosen = by_name[decision.decode_id]
        tokens = row.input_tokens - decision.cached_tokens
        result.delays_s.append(chosen.begin(names, tokens, row.output_tokens, row.at_s) - row.at_s)
        result.requests += 1
        result.prompt_tokens += row.input_tokens
        result.hit_tokens += decision.cached_tokens
        result.work[pool.index(chosen)] += tokens
        on_request()
    return result
