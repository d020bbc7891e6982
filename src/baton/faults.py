"""Faults on purpose: rules that say where, when and what goes wrong in a process. Pure, but for `install`."""

from __future__ import annotations

__all__: list[str] = []
