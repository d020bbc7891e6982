"""An OpenAI-compatible server for tests that answers each request as a script says, one chunk for each token."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

__all__ = ["Reply", "ScriptedServer"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How a request is answered.

    Attributes:
        wait_s, gap_s: before the first chunk, and between chunks.
        break_after: close the connection after so many tokens.
        error_after: an error event after so many tokens.
        closes: keep-alive is promised, but the connection is closed behind the answer.
        close_delimited: neither a length nor chunks; the end of the connection ends the answer.
        never: no byte is ever sent.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    wait_s: float = 0.0
    gap_s: float = 0.0
    tokens: int | None = None
    cached_tokens: int = 0
    break_after: int | None = None
    error_after: int | None = None
    finishes: bool = True
    closes: bool = False
    close_delimited: bool = False
    never: bool = False


class ScriptedServer:
    """Context manager; the server runs in a thread of its own. `bodies`, `paths` and `heads` hold what came.

    Args:
        script: makes the reply of a request from its body and its number, from 0.
    """

    def __init__(self, script: Callable[[dict[str, Any], int], Reply] = lambda body, number: Reply()) -> None:
        self._script = script
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.heads: list[dict[str, str]] = []
        self.connections = 0
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        future = asyncio.run_coroutine_threadsafe(self._start(), self._loop)
        self.url = f"http://127.0.0.1:{future.result(10)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _stop(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                _, path, _ = head[0].split(" ")
                lengths = [int(line[15:]) for line in head if line.lower().startswith("content-length:")]
                body = await reader.readexactly(lengths[0]) if lengths else b""
                if path == "/v1/models":
                    await self._send(writer, 200, {}, b'{"data": [{"id": "scripted", "max_model_len": 4096}]}')
                    continue
                asked = json.loads(body)
                self.bodies.append(asked)
                self.paths.append(path)
                pairs = (line.partition(":") for line in head[1:] if line)
                self.heads.append({name.lower(): value.strip() for name, _, value in pairs})
                if not await self._answer(writer, asked, self._script(asked, len(self.bodies) - 1)):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _send(self, writer: asyncio.StreamWriter, status: int, headers: dict[str, str], body: bytes) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()

    async def _answer(self, writer: asyncio.StreamWriter, asked: dict[str, Any], reply: Reply) -> bool:
        """Whether the connection stays."""
        if reply.never:
            await asyncio.sleep(60)
        if reply.status != 200:
            await self._send(writer, reply.status, reply.headers, reply.body)
            return not reply.closes
        framing = "" if reply.close_delimited else "transfer-encoding: chunked\r\n"
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{framing}\r\n".encode())

        async def event(value: Any) -> None:
            data = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
            writer.write(data if reply.close_delimited else b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()

        await asyncio.sleep(reply.wait_s)
        chat = "messages" in asked
        tokens = asked["max_tokens"] if reply.tokens is None else reply.tokens
        for number in range(tokens):
            if number == reply.break_after:
                return False
            if number == reply.error_after:
                await event({"error": {"message": "the engine died"}})
                break
            if number:
                await asyncio.sleep(reply.gap_s)
            token_ids = {"token_ids": [200 + number]} if asked.get("return_token_ids") else {}
            said = {"delta": {"content": f" w{number}"}} if chat else {"text": f" w{number}"}
            await event({"choices": [{"index": 0, **said, **token_ids, "finish_reason": None}]})
        if reply.finishes:
            said = {"delta": {}} if chat else {"text": ""}
            await event({"choices": [{"index": 0, **said, "finish_reason": "length"}]})
        prompt = asked.get("prompt")
        usage = {
            "prompt_tokens": len(prompt) if isinstance(prompt, list) else 7,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
        }
        await event({"choices": [], "usage": usage})
        await event(b"[DONE]")
        if not reply.close_delimited:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return not (reply.closes or reply.close_delimited)
