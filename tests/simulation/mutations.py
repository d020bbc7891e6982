"""Deliberate defects, one at a time, that the checkers must catch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["MUTATIONS", "Mutation"]


@dataclass(frozen=True, slots=True)
class Mutation:
    """A defect.

    Attributes:
        name: for people.
        apply: makes it; the context it returns ends it.
    """

    name: str
    apply: Callable[[Any], contextlib.AbstractContextManager[Any]]

    def applied(self, cluster: Any) -> contextlib.AbstractContextManager[Any]:
        """For one run."""
        return self.apply(cluster)


MUTATIONS: tuple[Mutation, ...] = ()
