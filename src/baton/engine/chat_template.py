"""A model's own chat template, rendered in a sandbox: the same text as transformers renders, torch-free.

    template = ChatTemplate(source, special_tokens)
    text = template.render(messages, add_generation_prompt=True)

The template comes from the checkpoint only, never from a request. What a request may set is data: messages and those
`kwargs` that the template itself reads and that hold plain scalars. Output size and time are bounded: jinja2 yields
the text piece by piece, and both are checked at each piece.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import InvalidRequestError

__all__ = ["MAX_RENDERED_CHARS", "MAX_RENDER_S", "ChatTemplate"]

MAX_RENDERED_CHARS = 16 << 20
MAX_RENDER_S = 5.0
_MAX_KWARG_CHARS = 1024
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja text from the checkpoint.
        special_tokens: names the template may use, for example `bos_token` -> "<s>".

    Raises:
        jinja2.TemplateSyntaxError: `source` is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        syntax = environment.parse(source)
        reserved = _RESERVED | set(special_tokens) | set(environment.globals)
        self.source = source
        self.kwarg_names = frozenset(jinja2.meta.find_undeclared_variables(syntax) - reserved)
        """What `chat_template_kwargs` may set: the variables this template reads that the server does not own."""
        literals = [node.data for node in syntax.find_all(jinja2.nodes.TemplateData)]
        literals += [node.value for node in syntax.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        self.literal_text = "\0".join(literals)
        """Everything the template writes by itself; special tokens found here are control tokens."""
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Those `kwargs` that the template reads.

        Raises:
            InvalidRequestError: a name the server owns, or a value that is not a short plain scalar.
        """
        for name, value in kwargs.items():
            if name in _RESERVED or name in self._special_tokens:
                raise InvalidRequestError(
                    f"chat_template_kwargs may not set {name!r}: the server sets it", param="chat_template_kwargs"
                )
            if not isinstance(value, str | int | float | bool | None):
                raise InvalidRequestError(
                    f"chat_template_kwargs.{name[:64]} must be a string, number, boolean or null,"
                    f" got {type(value).__name__}",
                    param="chat_template_kwargs",
                )
            if isinstance(value, str) and len(value) > _MAX_KWARG_CHARS:
                raise InvalidRequestError(
                    f"chat_template_kwargs.{name[:64]} has {len(value)} characters, at most {_MAX_KWARG_CHARS}",
                    param="chat_template_kwargs",
                )
        return {name: value for name, value in kwargs.items() if name in self.kwarg_names}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of the conversation as the model was trained to see it.

        Args:
            messages: role and content each; keys with None are dropped.
            add_generation_prompt: end with the header of an assistant message.
            continue_final_message: end inside the last message, so that the model goes on writing it.

        Raises:
            InvalidRequestError: no messages, both endings at once, the template refuses the conversation (its own
                message is passed on), or the text passes `MAX_RENDERED_CHARS` or `MAX_RENDER_S`.
        """
        if not messages:
            raise InvalidRequestError("messages must hold at least one message", param="messages")
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequestError(
                    "continue_final_message and add_generation_prompt exclude each other; set one to false",
                    param="continue_final_message",
                )
            if not isinstance(chat[-1].get("content"), str):
                raise InvalidRequestError(
                    "continue_final_message needs text as content of the last message", param="continue_final_message"
                )
            chat[-1]["content"] += _CONTINUE_TAG
        text = self._bounded(
            {
                **self._special_tokens,
                **self.check_kwargs(kwargs or {}),
                "messages": chat,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut_at_tag(text) if continue_final_message else text

    def _bounded(self, variables: dict[str, Any]) -> str:
        deadline_s = time.monotonic() + MAX_RENDER_S
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise InvalidRequestError(
                        f"messages render to more than {MAX_RENDERED_CHARS} characters", param="messages"
                    )
                if time.monotonic() > deadline_s:
                    raise InvalidRequestError(
                        f"the chat template took longer than {MAX_RENDER_S:.0f} s over these messages; send fewer",
                        param="messages",
                    )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from error
        return "".join(pieces)


def _cut_at_tag(text: str) -> str:
    bare = _CONTINUE_TAG.strip()
    at = text.rfind(bare)
    if at < 0:
        raise InvalidRequestError(
            "continue_final_message: the model's chat template drops the last message",
            param="continue_final_message",
        )
    # A template that trims message ends has also trimmed the tag's space; then the text before it is trimmed too.
    return text[:at] if text[at : at + len(_CONTINUE_TAG)] == _CONTINUE_TAG else text[:at].rstrip()
