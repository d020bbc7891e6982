"""What a load is sent to: one interface, over HTTP (`http_target.py`) and over gRPC (`grpc_target.py`).

A request is prepared before it is due, so that building its message costs no latency, and sent when it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from baton.cluster.loadgen.answer import Answer
from baton.cluster.loadgen.load_class import LoadClass
from baton.cluster.loadgen.prompts import TokenIds, text_of

__all__ = ["Prompt", "Sampling", "ServerInfo", "Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server says of itself; `vocabulary` and `max_model_len` are None where it does not tell."""

    kind: str
    url: str
    model: str
    max_model_len: int | None = None
    vocabulary: int | None = None
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, the same for all requests."""

    temperature: float = 0.0
    ignore_eos: bool = True
    send_slo: bool = False


class Prompt:
    """A conversation so far: what was said and answered in turn, as token ids or as text.

    Args:
        as_text: every id becomes a word, and answers are taken as the text they came as.
    """

    def __init__(self, *, as_text: bool) -> None:
        self.as_text = as_text
        self.ids: list[TokenIds] = []
        self.texts: list[str] = []
        self.num_tokens = 0

    def say(self, ids: TokenIds) -> None:
        """Append what the user says."""
        self.num_tokens += len(ids)
        if self.as_text:
            self.texts.append(text_of(ids))
        else:
            self.ids.append(ids)

    def hear(self, text: str, ids: TokenIds) -> None:
        """Append an answer."""
        self.num_tokens += len(ids)
        if self.as_text:
            self.texts.append(text)
        else:
            self.ids.append(ids)


class Target(Protocol):
    """A server. Every method may be called from one event loop only."""

    info: ServerInfo

    def prepare(self, prompt: Prompt, output_tokens: int, load_class: LoadClass) -> Any:
        """The message of a request; may be sent several times."""

    async def send(self, prepared: Any, answer: Answer) -> None:
        """Send it and fill `answer` until its end; refusals are noted there, not raised.

        Raises:
            OSError: no connection, or a broken one.
            MalformedAnswerError: what came is no answer.
        """

    async def close(self) -> None:
        """Drop all connections."""
