"""One prefill and one decode worker in virtual time, with known laws, and a router that chooses between two ways.

Steps are those of the engine in what matters here: decode rows first, then prompt tokens up to a limit, half of them to
the oldest prompt and the rest to the shortest. Loads are reported late, as real ones are.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from baton.engine.scheduler import share_prefill_budget
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.costs.model import CostModel
from baton.router.routing.facts import InstanceView, RequestFacts
from baton.router.routing.handover_choice import HandoverChoice, Mode, choose_handover

CHUNK, BATCH = 16, 2048
_REPORT_EVERY_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Seconds: of a step, and for each token of a prompt, token attended to, decode row, context token."""

    step: float = 2e-3
    token: float = 1e-4
    attended: float = 5e-9
    row: float = 1e-4
    context: float = 2e-8
    shared: float = 1.0
    """Times longer while the other worker is at work."""

    def step_s(self, sample: pb.StepSample) -> float:
        return (
            self.step
            + self.token * sample.prefill_tokens
            + self.attended * sample.prefill_attended_tokens
            + self.row * sample.decode_rows
            + self.context * sample.decode_context_tokens
        )


@dataclass(slots=True, eq=False)
class Request:
    at_s: float
    prompt: int
    output: int
    computed: int = 0
    written: int = 0
    choice: HandoverChoice | None = None
    first_s: float | None = None
    end_s: float | None = None

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.at_s

    @property
    def tpot_s(self) -> float:
        assert self.first_s is not None
        assert self.end_s is not None
        return (self.end_s - self.first_s) / max(self.output - 1, 1)


@dataclass(slots=True, eq=False)
class _Worker:
    role: str
    law: Law
    chunk: int
    requests: list[Request] = field(default_factory=list)
    is_stepping: bool = False
    own_requests: int = 0
    own_prefill_tokens: int = 0
    view: InstanceView | None = None
    told_s: float = -1.0
    samples: list[pb.StepSample] = field(default_factory=list)
    learned_s: float = -1.0

    def plan(self) -> tuple[list[Request], list[tuple[Request, int]], pb.StepSample]:
        rows = [r for r in self.requests if r.computed >= r.prompt]
        prompts = [r for r in self.requests if r.computed < r.prompt]
        shares = share_prefill_budget([r.prompt - r.computed for r in prompts], self.chunk if rows else BATCH)
        given = [(r, share) for r, share in zip(prompts, shares, strict=True) if share]
        sample = pb.StepSample(
            decode_rows=len(rows),
            decode_context_tokens=sum(r.prompt + r.written for r in rows),
            prefill_tokens=sum(share for _, share in given),
            prefill_attended_tokens=sum(share * r.computed + share * (share + 1) // 2 for r, share in given),
        )
        return rows, given, sample


class VirtualPair:
    """Runs a load to its end.

    Args:
        on_step: may change the law of a worker, by role and time.
    """

    def __init__(
        self,
        law: Law,
        *,
        mode: Mode,
        costs: CostModel | None = None,
        seed: int = 0,
        noise: float = 0.1,
        handover_s: float = 5e-3,
        on_step: Callable[[str, float, float], float] = lambda role, now_s, step_s: step_s,
    ) -> None:
        self.costs = costs or CostModel(max_local_prefill_tokens=CHUNK)
        self.mode: Mode = mode
        self.handovers = 0
        self._law = law
        self._noise = noise
        self._handover_s = handover_s
        self._on_step = on_step
        self._random = random.Random(seed)
        self._workers = {
            role: _Worker(role, law, CHUNK if role == "decode" else BATCH) for role in ("prefill", "decode")
        }
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._now_s = 0.0

    def run(self, requests: Sequence[Request]) -> None:
        for number, request in enumerate(requests):
            self._at(request.at_s, lambda request=request, number=number: self._arrive(request, number))  # type: ignore[misc]
        while self._events:
            self._now_s, _, act = heapq.heappop(self._events)
            act()

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, act))

    def _view(self, worker: _Worker) -> InstanceView:
        if worker.view is None or self._now_s - worker.told_s >= _REPORT_EVERY_S:
            rows = len(worker.requests)
            worker.told_s = self._now_s
            worker.view = InstanceView(
                instance_id=f"{worker.role}-0",
                role=worker.role,
                running_requests=rows,
                pending_prefill_tokens=sum(r.prompt - r.computed for r in worker.requests),
                context_tokens=sum(r.computed + r.written for r in worker.requests),
                max_remaining_tokens=sum(r.output - r.written for r in worker.requests),
            )
        return worker.view

    def _views(self) -> dict[str, InstanceView]:
        return {
            role: replace(
                self._view(worker), own_requests=worker.own_requests, own_prefill_tokens=worker.own_prefill_tokens
            )
            for role, worker in self._workers.items()
        }

    def _arrive(self, request: Request, number: int) -> None:
        views = self._views()
        facts = RequestFacts(prompt_tokens=request.prompt, request_id=f"r{number}", max_tokens=request.output)
        request.choice = choose_handover(views["decode"], [views["prefill"]], facts, self.costs, self.mode)
        is_handover = request.choice.chosen.prefill_id is not None
        self.handovers += is_handover
        worker = self._workers["prefill" if is_handover else "decode"]
        self._workers["decode"].own_requests += 1
        self._workers["prefill"].own_requests += is_handover
        worker.own_prefill_tokens += request.prompt
        worker.requests.append(request)
        self._step(worker)

    def _step(self, worker: _Worker) -> None:
        if worker.is_stepping or not worker.requests:
            return
        rows, given, sample = worker.plan()
        step_s = self._law.step_s(sample) * (1 + self._noise * self._random.uniform(-1, 1))
        if any(other.is_stepping for other in self._workers.values()):
            step_s *= self._law.shared
        sample.step_s = step_s = self._on_step(worker.role, self._now_s, step_s)
        worker.is_stepping = True
        self._at(self._now_s + step_s, lambda: self._stepped(worker, rows, given, sample))

    def _stepped(
        self, worker: _Worker, rows: list[Request], given: list[tuple[Request, int]], sample: pb.StepSample
    ) -> None:
        worker.is_stepping = False
        worker.samples.append(sample)
        if self._now_s - worker.learned_s >= _REPORT_EVERY_S:
            self.costs.learn_steps(f"{worker.role}-0", b"1", worker.role, worker.samples[-20:])
            worker.learned_s, worker.samples = self._now_s, []
        for request, share in given:
            request.computed += share
            if request.computed == request.prompt:
                worker.own_prefill_tokens -= request.prompt
                if worker.role == "prefill":
                    worker.own_requests -= 1
                    worker.requests.remove(request)
                    exposed_s = self._handover_s * (1 + self._noise * self._random.uniform(-1, 1))
                    self.costs.learn_transfer("prefill-0", "decode-0", tokens=request.prompt, exposed_s=exposed_s)
                    self._at(self._now_s + exposed_s, lambda request=request: self._attach(request))  # type: ignore[misc]
                else:
                    self._write(request)
        for request in rows:
            self._write(request)
        self._step(worker)

    def _attach(self, request: Request) -> None:
        decode = self._workers["decode"]
        decode.requests.append(request)
        self._write(request)
        self._step(decode)

    def _write(self, request: Request) -> None:
        request.written += 1
        if request.first_s is None:
            request.first_s = self._now_s
            assert request.choice is not None
            self.costs.learn_outcome(request.choice.chosen.prediction, request.ttft_s)
        if request.written >= request.output:
            request.end_s = self._now_s
            self._workers["decode"].requests.remove(request)
            self._workers["decode"].own_requests -= 1


def load(
    rate_per_s: float, lengths: Sequence[tuple[int, int]], *, seconds: float = 20.0, seed: int = 1
) -> list[Request]:
    """Poisson arrivals of prompts and answers drawn from `lengths`."""
    chance, now_s, requests = random.Random(seed), 0.0, list[Request]()
    while (now_s := now_s + chance.expovariate(rate_per_s)) < seconds:
        prompt, output = chance.choice(lengths)
        requests.append(Request(now_s, prompt, output))
    return requests


def goodput(requests: Sequence[Request], law: Law, *, ttft: float = 5.0, tpot: float = 2.0) -> float:
    """Share of requests within multiples of what they take alone."""
    good = 0
    for request in requests:
        alone = law.step_s(pb.StepSample(prefill_tokens=request.prompt, prefill_attended_tokens=request.prompt**2 // 2))
        step_s = law.step_s(pb.StepSample(decode_rows=1, decode_context_tokens=request.prompt + request.output // 2))
        good += request.ttft_s <= ttft * alone and request.tpot_s <= tpot * step_s
    return good / len(requests)
