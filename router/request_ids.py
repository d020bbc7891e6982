"""The names of a request: the public one, and those that its choices bear on workers. Pure.

    "chat-7"  ->  "chat-7-5f3a09bc-0", "chat-7-5f3a09bc-1", ...      public id, what tells it from its namesakes, choice

Clients choose public ids and may use one twice; workers must never take one request for another.
"""

from __future__ import annotations

__all__ = ["engine_id", "split_engine_id"]


def engine_id(public_id: str, unique: str, choice: int) -> str:
    """The id of one choice on workers; `unique` holds no dash."""
    return f"{public_id}-{unique}-{choice}"


def split_engine_id(name: str) -> tuple[str, str, int]:
    """(public id, what tells it from its namesakes, choice) of an `engine_id`."""
    public_id, unique, choice = name.rsplit("-", 2)
    return public_id, unique, int(choice)
