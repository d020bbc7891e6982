"""What the policy decided for one request, and all that it looked at: pure. `baton explain` shows it.

{"request_id": "...", "policy": "kv_aware",
 "decode":  {"candidates": [{"instance": "decode-0",
                             "scores": {"prefix": {"score": 0.5, "weight": 1.0}, ...},   {} where it was dropped
                             "total": 2.9,                                               null where it was dropped
                             "dropped_by": null}],                                       or "memory: why"
             "chosen": "decode-0"},
 "prefill": {"candidates": [...], "chosen": null},        the best prefill worker; null: none was there
 "handover": {"mode": "auto",
              "options": [{"prefill": null, "new_tokens": 500, "cost_s": 0.1, "ttft_s": 0.1, "tpot_s": 0.01,
                           "imposed_s": 0.0, "parts": {"queue": 0.0, ...}}],
              "chosen": null,                             the prefill worker that reads the prompt; null: decode
              "reason": "..."},
 "prompt_tokens": 1000, "cached_tokens": 500, "uncached_tokens": 500, "session": {}, "reasons": ["..."]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from baton.router.routing.facts import RequestFacts
from baton.router.routing.handover_choice import HandoverChoice, HandoverOption, Mode
from baton.router.routing.profile import Ranking

__all__ = ["Decision"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The pair, and why.

    Attributes:
        policy: its name.
        mode: `routing.disaggregate`.
        facts: what was known of the request.
        decode, prefill: how candidates of each role were ranked.
        handover: who reads the prompt.
        cached_tokens: what the decode worker probably holds already.
    """

    policy: str
    mode: Mode
    facts: RequestFacts
    decode: Ranking
    prefill: Ranking
    handover: HandoverChoice
    cached_tokens: int

    @property
    def decode_id(self) -> str:
        """Who writes the answer."""
        assert self.decode.chosen is not None
        return self.decode.chosen.instance_id

    @property
    def prefill_id(self) -> str | None:
        """Who reads the prompt; None: the decode worker."""
        return self.handover.chosen.prefill_id

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that whoever reads it has to compute."""
        return self.handover.chosen.new_tokens

    @property
    def reasons(self) -> tuple[str, ...]:
        """One line per stage, for logs."""
        lines = [_line(self.decode, "decode")]
        if self.prefill_id is not None:
            lines.append(f"{_line(self.prefill, 'prefill')}, {self.uncached_tokens} uncached tokens")
        else:
            lines.append(f"prefill on the decode worker, {self.uncached_tokens} uncached tokens")
        return (*lines, f"handover: {self.handover.reason}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the shape that the module's docstring shows."""
        return {
            "request_id": self.facts.request_id,
            "policy": self.policy,
            "decode": _ranking(self.decode),
            "prefill": _ranking(self.prefill),
            "handover": {
                "mode": self.mode,
                "options": [_option(option) for option in self.handover.options],
                "chosen": self.prefill_id,
                "reason": self.handover.reason,
            },
            "prompt_tokens": self.facts.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "uncached_tokens": self.uncached_tokens,
            "session": dict(self.facts.session_instances),
            "reasons": list(self.reasons),
        }


def _line(ranking: Ranking, role: str) -> str:
    assert ranking.index is not None
    chosen = ranking.candidates[ranking.index]
    told = ", ".join(f"{name} {score:.2f}" for name, score in ranking.scores_of(ranking.index).items())
    of = f"{len(ranking.candidates)} candidates"
    return f"{role} {chosen.instance_id}: {ranking.totals[ranking.index]:.3f} of {of} ({told or 'by turn'})"


def _ranking(ranking: Ranking) -> dict[str, Any]:
    candidates: list[dict[str, Any]] = [
        {
            "instance": view.instance_id,
            "scores": {
                scorer.name: {"score": round(column[index], 4), "weight": scorer.weight}
                for scorer, column in zip(ranking.scorers, ranking.columns, strict=True)
            },
            "total": round(ranking.totals[index], 4),
            "dropped_by": None,
        }
        for index, view in enumerate(ranking.candidates)
    ]
    candidates.sort(key=lambda candidate: (-candidate["total"], candidate["instance"]))
    candidates += [
        {"instance": instance_id, "scores": {}, "total": None, "dropped_by": why}
        for instance_id, why in sorted(ranking.dropped.items())
    ]
    return {"candidates": candidates, "chosen": ranking.chosen.instance_id if ranking.chosen else None}


def _option(option: HandoverOption) -> dict[str, Any]:
    return {
        "prefill": option.prefill_id,
        "new_tokens": option.new_tokens,
        "cost_s": option.cost_s,
        "ttft_s": option.prediction.ttft_s,
        "tpot_s": option.prediction.tpot_s,
        "imposed_s": option.prediction.imposed_s,
        "parts": dict(option.prediction.parts),
    }
