"""What each way of serving a request would take, from laws fitted online: pure.

    StepSample of any worker   --learn_steps-->     step_cost.py       what a step takes
    PrefillReply               --learn_transfer-->  transfer_cost.py   what of a transfer shows
    first token of a request   --learn_outcome-->   outcomes.py        how far off the two were

    predict(decode, prefill)   ttft = queue ahead + own prompt + transfer + step, corrected
    predict(decode, None)      ttft = queue ahead + own prompt in chunks beside the decode rows + step, corrected

Docs: docs/cost-model.md has the formulas. Memory is bounded by the workers that are there (`keep`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.costs.outcomes import Option, Outcomes
from baton.router.costs.step_cost import StepCost, StepCosts, StepShape, attended_tokens
from baton.router.costs.transfer_cost import TransferCosts
from baton.router.routing.costs import Prediction
from baton.router.routing.facts import InstanceView

__all__ = ["CostModel"]

_STEP_ALREADY_BEGUN = 0.5
"""Of a decode step, until the next one takes new work in, on average."""
_MORE_TO_COME = 0.5
"""Answers of which nothing is known yet and that a prompt on the decode worker will hold up too."""
_BORROWED = 0.4
"""By so much of a prompt's time on its prefill worker answers on the same host come later: while it reads, the decode
worker does without the core that it lends. A decode step of 8 to 32 rows took 0.60 to 0.66 of its time on two cores."""
_SLOWER = _BORROWED / (1 - _BORROWED)
"""By so much of its time a prompt on the decode worker takes longer while that has no cores lent to it."""
_LONGER = 1.5
"""So many times as long as this prompt, prompts ahead let it pass."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """Seconds until a worker has computed a prompt, and by how many it makes the steps longer that it is in."""

    queue_s: float
    own_s: float
    work_s: float


class CostModel:
    """One router's; it implements `routing.costs.Costs`.

    Args:
        max_local_prefill_tokens: prompt tokens in a step of a decode worker in which answers stream.
        decode_batch_tokens, prefill_batch_tokens: tokens in a step, at most.
    """

    def __init__(
        self,
        *,
        max_local_prefill_tokens: int = 32,
        decode_batch_tokens: int = 2048,
        prefill_batch_tokens: int = 2048,
    ) -> None:
        self._max_local_prefill_tokens = max_local_prefill_tokens
        self._decode_batch_tokens = decode_batch_tokens
        self._prefill_batch_tokens = prefill_batch_tokens
        self._steps = StepCosts()
        self._transfers = TransferCosts()
        self._outcomes = Outcomes()

    # ------------------------------------------------------------ what is learned

    def learn_steps(self, instance_id: str, incarnation: bytes, role: str, samples: Iterable[pb.StepSample]) -> None:
        """Steps of one worker, oldest first."""
        told = [
            (
                StepShape(
                    prefill_tokens=sample.prefill_tokens,
                    attended_tokens=sample.prefill_attended_tokens,
                    decode_rows=sample.decode_rows,
                    decode_context_tokens=sample.decode_context_tokens,
                ),
                sample.step_s,
            )
            for sample in samples
        ]
        if role in ("prefill", "decode") and told:
            self._steps.learn(instance_id, incarnation, role, told)

    def learn_transfer(self, prefill_id: str, decode_id: str, *, tokens: int, exposed_s: float) -> None:
        """One handover that went well."""
        if tokens > 0 and exposed_s >= 0:
            self._transfers.learn((prefill_id, decode_id), tokens=tokens, exposed_s=exposed_s)

    def learn_outcome(self, prediction: Prediction, taken_s: float) -> None:
        """A request that was served as predicted had its first token `taken_s` after it was dispatched."""
        option: Option = "handover" if "transfer" in prediction.parts else "local"
        law_s = sum(prediction.parts.values()) - prediction.parts.get("correction", 0.0)
        self._outcomes.note(option, law_s, taken_s, is_shared=prediction.is_shared)

    def keep(self, instance_ids: Iterable[str]) -> None:
        """Forget all other workers."""
        kept = set(instance_ids)
        self._steps.keep(kept)
        self._transfers.keep(kept)

    # ------------------------------------------------------------ what is told

    def predict(
        self,
        decode: InstanceView,
        prefill: InstanceView | None,
        *,
        new_tokens: int,
        cached_tokens: int,
        beside: Sequence[InstanceView] = (),
    ) -> Prediction:
        """See `Costs.predict`."""
        cost = self._steps.of(decode.instance_id, "decode")
        rows, context = _decode_rows(decode)
        step_s = cost.step_s(StepShape(decode_rows=rows, decode_context_tokens=context)) if rows else 0.0
        mean_context = new_tokens + cached_tokens
        tpot_s = cost.step_s(StepShape(decode_rows=rows + 1, decode_context_tokens=context + mean_context))
        parts = {"admission": _admission_s(decode, new_tokens + cached_tokens, tpot_s)}
        if prefill is None:
            option: Option = "local"
            chunk = self._max_local_prefill_tokens if rows else self._decode_batch_tokens
            reading = _read(cost, decode, new_tokens, cached_tokens, chunk, rows=rows, context=context)
            slower_s = _SLOWER * min(reading.own_s, self._busy_s(decode, beside))
            parts["borrowed"] = slower_s
            # Those whose pages are still coming will stream before this prompt is done.
            imposed_s = (max(rows, decode.requests) + _MORE_TO_COME) * (reading.work_s + slower_s)
            is_shared = False
        else:
            option = "handover"
            of_prefill = self._steps.of(prefill.instance_id, "prefill")
            reading = _read(of_prefill, prefill, new_tokens, cached_tokens, self._prefill_batch_tokens)
            is_shared = rows > 0
            link = prefill.instance_id, decode.instance_id
            exposed_s = parts["transfer"] = self._transfers.exposed_s(link, new_tokens + cached_tokens)
            is_near = prefill.lends_cores and prefill.host_id == decode.host_id
            # Between workers of one host pages travel by the cores that answers are written with.
            felt_by = rows + (decode.prefill_tokens > 0)
            imposed_s = felt_by * (_BORROWED * reading.own_s + exposed_s) if is_near else 0.0
        parts |= {"queue": reading.queue_s, "prefill": reading.own_s, "step": _STEP_ALREADY_BEGUN * step_s}
        law_s = sum(parts.values())
        ttft_s = self._outcomes.correct(option, law_s, is_shared=is_shared)
        parts["correction"] = ttft_s - law_s
        return Prediction(
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            imposed_s=imposed_s,
            parts=parts,
            is_old=self._outcomes.is_old(option),
            is_shared=is_shared,
        )

    def _busy_s(self, decode: InstanceView, beside: Sequence[InstanceView]) -> float:
        """How long prefill workers of its host will need the cores that they would else lend."""
        busy_s = 0.0
        for view in beside:
            tokens = view.prefill_tokens
            if tokens and view.lends_cores and view.host_id == decode.host_id:
                shape = StepShape(prefill_tokens=tokens, attended_tokens=attended_tokens(tokens, 0))
                busy_s = max(busy_s, self._steps.of(view.instance_id, "prefill").work_s(1, shape))
        return busy_s

    def error_ratio(self, option: Option) -> float:
        """See `Outcomes.error_ratio`."""
        return self._outcomes.error_ratio(option)

    def steps_of(self, instance_id: str) -> dict[str, Any] | None:
        """What a worker's steps take, as `report` tells it of all; None: nothing was learned of it yet."""
        return self._steps.report_of(instance_id)

    def report(self) -> dict[str, Any]:
        """All fits, with units, errors and how many samples each has seen; for JSON."""
        return {
            "steps": self._steps.report(),
            "transfers": self._transfers.report(),
            "ttft": self._outcomes.report(),
            "limits": {
                "max_local_prefill_tokens": self._max_local_prefill_tokens,
                "decode_batch_tokens": self._decode_batch_tokens,
                "prefill_batch_tokens": self._prefill_batch_tokens,
            },
        }


def _decode_rows(view: InstanceView) -> tuple[int, int]:
    """Answers that stream there, and the tokens that they attend to in sum."""
    prompts = 1 if view.pending_prefill_tokens else 0
    rows = max(view.running_requests - prompts, 0)
    mean = view.context_tokens / view.running_requests if view.running_requests else 0.0
    return rows, int(mean * rows)


def _admission_s(view: InstanceView, tokens: int, tpot_s: float) -> float:
    """Until a full decode worker has room, whoever computes the prompt: answers end one after another."""
    running = view.running_requests
    blocks = -(-tokens // view.block_size)
    lacks_blocks = bool(view.kv_blocks_total) and blocks > view.kv_blocks_free + view.kv_blocks_cached
    lacks_rows = bool(view.max_running_requests) and running >= view.max_running_requests
    if not running or not (lacks_blocks or lacks_rows):
        return 0.0
    # Half of what they may still write, of each; those that wait already go first.
    per_end_s = view.max_remaining_tokens / running * tpot_s / 2 / running
    return per_end_s * (1 + view.waiting_requests)


def _read(
    cost: StepCost,
    view: InstanceView,
    new_tokens: int,
    cached_tokens: int,
    chunk: int,
    *,
    rows: int = 0,
    context: int = 0,
) -> _Reading:
    """How a worker computes a prompt behind and beside those that it has, in steps of `chunk` prompt tokens.

    The scheduler gives half of a step to the oldest prompt and the rest to the shortest rest: prompts ahead that are no
    longer than this one are computed before it, and of longer ones as much as it has itself, or as fits into its
    steps beside it.
    """
    ahead = view.prefill_tokens
    if ahead > _LONGER * new_tokens * max(view.requests - rows, 1):
        ahead = min(ahead, max(new_tokens, chunk - new_tokens))
    own = attended_tokens(new_tokens, cached_tokens)
    # Prompts ahead are taken to be like this one.
    theirs = int(ahead * own / new_tokens) if new_tokens else 0
    whole = StepShape(
        prefill_tokens=ahead + new_tokens,
        attended_tokens=theirs + own,
        decode_rows=rows,
        decode_context_tokens=context,
    )
    alone = StepShape(prefill_tokens=new_tokens, attended_tokens=own, decode_rows=rows, decode_context_tokens=context)
    own_s = cost.work_s(ceil(new_tokens / chunk), alone)
    whole_s = cost.work_s(ceil((ahead + new_tokens) / chunk), whole)
    # What the prompt adds to the steps that it is in: those steps come anyway where answers stream.
    work_s = cost.work_s(0, StepShape(prefill_tokens=new_tokens, attended_tokens=own))
    return _Reading(queue_s=max(whole_s - own_s, 0.0), own_s=own_s, work_s=work_s)
