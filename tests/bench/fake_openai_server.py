"""A small OpenAI-compatible server: answers anything with words, as strictly or loosely as its options say.

Usage: python fake_openai_server.py PORT [--text-only] [--count-with-last] [--tokens-per-chunk N] [--short]
                                    [--child FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FakeOpenAIServer(ThreadingHTTPServer):
    """Counts a text's words as its tokens. `prompts` holds what came, in order.

    Args:
        text_only: refuses token ids.
        count_with_last: sends usage in the chunk of the last token, as llama.cpp does.
        tokens_per_chunk: holds tokens back.
        short: ends answers one token early.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        port: int = 0,
        *,
        text_only: bool = False,
        count_with_last: bool = False,
        tokens_per_chunk: int = 1,
        short: bool = False,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.text_only = text_only
        self.count_with_last = count_with_last
        self.tokens_per_chunk = tokens_per_chunk
        self.short = short
        self.prompts: list[list[int] | str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeOpenAIServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, "application/json", json.dumps({"data": [{"id": "fake"}]}).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["prompt"]
        if self.server.text_only and not isinstance(prompt, str):
            self._answer(400, "application/json", b'{"error": {"message": "prompt must be text"}}')
            return
        self.server.prompts.append(prompt)
        tokens = asked["max_tokens"] - self.server.short
        usage = {
            "prompt_tokens": len(prompt.split() if isinstance(prompt, str) else prompt),
            "completion_tokens": tokens,
        }
        if not asked.get("stream"):
            body = json.dumps({"choices": [{"text": "word " * tokens}], "usage": usage})
            self._answer(200, "application/json", body.encode())
            return
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in self._chunks(tokens, usage))
        self._answer(200, "text/event-stream", f"{lines}data: [DONE]\n\n".encode())

    def _chunks(self, tokens: int, usage: dict[str, int]) -> Iterator[dict[str, Any]]:
        size = self.server.tokens_per_chunk
        for begin in range(0, tokens, size):
            yield {"choices": [{"text": "word " * min(size, tokens - begin), "finish_reason": None}]}
        last: dict[str, Any] = {"choices": [{"text": "", "finish_reason": "length"}]}
        if self.server.count_with_last:
            yield {**last, "usage": usage}
        else:
            yield last
            yield {"choices": [], "usage": usage}

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--text-only", action="store_true")
    parser.add_argument("--count-with-last", action="store_true")
    parser.add_argument("--tokens-per-chunk", type=int, default=1)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--child", type=Path, help="leave a process behind, its id in this file")
    options = vars(parser.parse_args())
    if child := options.pop("child"):
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        child.write_text(str(sleeper.pid))
    FakeOpenAIServer(**options).serve_forever()


if __name__ == "__main__":
    main()
