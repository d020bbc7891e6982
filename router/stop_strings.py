"""Stop strings over a text that arrives in pieces: pure.

The answer ends at the first character that completes any stop string; where two are completed by the same character,
the longer one counts. So the result does not depend on how the text was cut. Text that may be the beginning of a stop
string is held back until it is clear.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopChecker"]


class StopChecker:
    """One automaton (Knuth, Morris, Pratt) per stop string, all fed together: O(stop strings) per character.

    Args:
        stop: non-empty strings; none at all lets every text through.
        include: give out the stop string too.

    Attributes:
        matched: the stop string that ended the text, None before.
    """

    __slots__ = ("_failures", "_held", "_include", "_states", "_stops", "matched")

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        assert all(stop), "an empty stop string"
        self._stops = tuple(stop)
        self._failures = [_failure_table(text) for text in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self._include = include
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """What may be given out now. After a match (`matched`) nothing more may be fed."""
        assert self.matched is None, "the text has ended"
        if not self._stops:
            return text
        buffer = self._held + text
        for at in range(len(self._held), len(buffer)):
            longest = self._advance(buffer[at])
            if longest is not None:
                self.matched = longest
                self._held = ""
                return buffer[: at + 1] if self._include else buffer[: at + 1 - len(longest)]
        keep = max(self._states)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """What is still held back, when the answer ended for another reason."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        longest = None
        for index, stop in enumerate(self._stops):
            state, failure = self._states[index], self._failures[index]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            self._states[index] = state
            if state == len(stop) and (longest is None or len(stop) > len(longest)):
                longest = stop
        return longest


def _failure_table(text: str) -> list[int]:
    """For each prefix of `text`: length of its longest proper prefix that is also its suffix."""
    table = [0] * len(text)
    length = 0
    for at in range(1, len(text)):
        while length and text[at] != text[length]:
            length = table[length - 1]
        if text[at] == text[length]:
            length += 1
        table[at] = length
    return table
