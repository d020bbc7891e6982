"""What a worker tells of its steps, for the routers' cost model: which steps, and in which words.

    sample = log.observe(plan, step_s)      after every step; None: this one is not told

Whether a step is told is settled before it runs, by how much time the steps before it took: else long ones would be
told more often, and the fit would believe in them. Steps that compute prompts say most, and nearly all of them are
told; those that only write answers are alike, and about 20 in a second are enough.
"""

from __future__ import annotations

from baton.engine.scheduler import StepPlan
from baton.proto.baton.v1 import worker_pb2 as pb

__all__ = ["StepLog"]

_DECODE_EVERY_S, _PROMPT_EVERY_S = 0.05, 0.008
"""Busy seconds between two steps that are told, of each kind."""


class StepLog:
    """One worker's; called on the engine's thread."""

    def __init__(self) -> None:
        # Since the last step of the kind that was told.
        self._since_decode_s = self._since_prompt_s = float("inf")

    def observe(self, plan: StepPlan, step_s: float) -> pb.StepSample | None:
        """One step that computed `plan` and took `step_s`."""
        rows = plan.rows
        has_prompts = len(rows) > plan.num_decode_rows
        is_told = self._since_prompt_s >= _PROMPT_EVERY_S if has_prompts else self._since_decode_s >= _DECODE_EVERY_S
        self._since_decode_s += step_s
        self._since_prompt_s += step_s
        if not is_told or not rows or step_s <= 0:
            return None
        # What this step took is time after the choice, and part of what the next one is chosen by.
        if has_prompts:
            self._since_prompt_s = step_s
        else:
            self._since_decode_s = step_s
        decodes, context, tokens, attended = 0, 0, 0, 0
        for row in rows:
            if row.count == 1 and row.samples and row.start >= row.seq.num_prompt:
                decodes += 1
                context += row.start + 1
            else:
                tokens += row.count
                attended += row.count * row.start + row.count * (row.count + 1) // 2
        return pb.StepSample(
            decode_rows=decodes,
            decode_context_tokens=context,
            prefill_tokens=tokens,
            prefill_attended_tokens=attended,
            step_s=step_s,
        )
