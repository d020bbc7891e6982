"""What `/admin/explain/` tells, for people: who could have served a request, how each scored, and why this one. Pure.

An arrow marks what was chosen; of the rest the best comes first, and last who was left out, and by what. Under the
scorers' names are their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from baton.cluster.columns import columns

__all__ = ["explain_text"]

_NONE = "-"


def explain_text(answer: Mapping[str, Any]) -> str:
    """All decisions of one request of one router."""
    decisions = answer["decisions"]
    parts = [_decision_text(answer, told) for told in decisions]
    if answer.get("left_out"):
        parts.append(f"{answer['left_out']} earlier decisions are left out")
    if answer.get("namesakes"):
        parts.append(f"{answer['namesakes']} earlier requests had the same id; ask by a unique id for one of them")
    return "\n\n".join(parts)


def _decision_text(answer: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    decision = told["decision"]
    policy = decision.get("policy")
    head = (
        f"{told['unique_id']}: choice {told['choice']}, attempt {told['attempt']}, {told['age_s']:.1f} s ago on"
        f" {answer['router']}{f', policy {policy}' if policy else ''}"
    )
    decode, prefill, handover = (decision.get(part) or {} for part in ("decode", "prefill", "handover"))
    lines = [head, "", f"decode: {decode.get('chosen')} writes the answer", *_candidates(decode)]
    if prefill.get("candidates"):
        best = prefill.get("chosen")
        lines += ["", f"prefill: {f'{best} suits best' if best else 'nobody can'}", *_candidates(prefill)]
    lines += ["", *_handover(handover, str(decode.get("chosen")))]
    return "\n".join(lines)


def _candidates(stage: Mapping[str, Any]) -> list[str]:
    candidates: Sequence[Mapping[str, Any]] = stage.get("candidates") or []
    chosen = stage.get("chosen")
    weights: dict[str, float] = {}
    for candidate in candidates:
        for name, scored in (candidate.get("scores") or {}).items():
            weights.setdefault(name, scored["weight"])
    if not candidates:
        return []
    rows = [("", "", *weights, "total", ""), ("", "", *(f"x{weight:g}" for weight in weights.values()), "", "")]
    for candidate in sorted(candidates, key=lambda each: _rank(each, chosen)):
        scores = candidate.get("scores") or {}
        dropped = candidate.get("dropped_by")
        rows.append(
            (
                "->" if candidate["instance"] == chosen else "",
                candidate["instance"],
                *(f"{scores[name]['score']:.2f}" if name in scores else _NONE for name in weights),
                _NONE if dropped or candidate.get("total") is None else f"{candidate['total']:.3f}",
                f"left out: {dropped}" if dropped else "",
            )
        )
    return _indented(rows)


def _rank(candidate: Mapping[str, Any], chosen: str | None) -> tuple[bool, bool, float, str]:
    name = candidate["instance"]
    return name != chosen, bool(candidate.get("dropped_by")), -(candidate.get("total") or 0.0), name


def _handover(handover: Mapping[str, Any], decode: str) -> list[str]:
    reader = handover.get("chosen")
    who = f"{reader} reads the prompt and hands it over" if reader else f"{decode} reads the prompt itself"
    lines = [f"handover ({handover.get('mode', 'auto')}): {who}", f"  {handover.get('reason') or 'no reason is told'}"]
    options: Sequence[Mapping[str, Any]] = handover.get("options") or []
    if not options:
        return lines
    rows = [("", "read by", "new tokens", "TTFT ms", "TPOT ms", "holds up ms", "cost ms", "")]
    for option in sorted(options, key=lambda each: (each.get("prefill") != reader, each["cost_s"])):
        parts = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in (option.get("parts") or {}).items() if seconds)
        rows.append(
            (
                "->" if option.get("prefill") == reader else "",
                option.get("prefill") or f"{decode} itself",
                f"{option['new_tokens']:,}",
                _ms(option.get("ttft_s")),
                _ms(option.get("tpot_s")),
                _ms(option.get("imposed_s")),
                _ms(option["cost_s"]),
                f"TTFT: {parts}" if parts else "",
            )
        )
    return lines + _indented(rows)


def _indented(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"  {line}" for line in columns(rows, left=2)]


def _ms(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{seconds * 1e3:.1f}"
