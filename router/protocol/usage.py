"""Token counts of one client request over all its choices."""

from __future__ import annotations

from typing import Any

from baton.router.client import ChoiceDelta

__all__ = ["UsageMeter"]


class UsageMeter:
    """Fed with every delta. A prompt counts once, however many answers it gets.

    Args:
        n: answers per prompt.
        with_timing: tell where the time until the first token went.
    """

    def __init__(self, n: int, *, with_timing: bool = False) -> None:
        self._n = n
        self._with_timing = with_timing
        self._latest: dict[int, ChoiceDelta] = {}

    def add(self, delta: ChoiceDelta) -> None:
        """Take over the counters of `delta`."""
        self._latest[delta.index] = delta

    @property
    def pair(self) -> dict[str, str]:
        """Which instances read the prompt and wrote the answer, of the first choice that is known."""
        if not self._latest:
            return {"prefill_instance": "", "decode_instance": ""}
        first = self._latest[min(self._latest)]
        return {"prefill_instance": first.prefill_instance, "decode_instance": first.decode_instance}

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's usage object, with Baton's pair of instances, and the timing of the first choice where asked for."""
        prompts: dict[int, ChoiceDelta] = {}
        for index in sorted(self._latest):
            prompts.setdefault(index // self._n, self._latest[index])
        prompt_tokens = sum(delta.prompt_tokens for delta in prompts.values())
        completion_tokens = sum(delta.completion_tokens for delta in self._latest.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(delta.cached_tokens for delta in prompts.values())},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "baton": self._extension(),
        }

    def _extension(self) -> dict[str, Any]:
        if not self._with_timing or not self._latest:
            return self.pair
        timing = self._latest[min(self._latest)].timing
        return {**self.pair, "timing": None if timing is None else timing.as_dict()}
