"""A worker's pages of metrics over HTTP, from daemon threads: /metrics, and /metrics/vllm where it is wanted."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from baton.metrics import CONTENT_TYPE

__all__ = ["page_of", "serve_pages"]

_READ_TIMEOUT_S = 10.0


def page_of(path: str, query: str = "") -> str:
    """Which page is asked for: "metrics", "vllm", or "" for none."""
    if path == "/metrics/vllm" or (path == "/metrics" and "format=vllm" in query.split("&")):
        return "vllm"
    return "metrics" if path in ("/", "/metrics") else ""


def serve_pages(pages: Mapping[str, Callable[[], bytes]], host: str = "127.0.0.1", port: int = 0) -> str:
    """Serve `pages`, named as `page_of` does, and return the URL of the first; port 0 picks a free one.

    Raises:
        OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _READ_TIMEOUT_S

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            page = pages.get(page_of(path, query))
            body = b"no such page\n" if page is None else page()
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Type", "text/plain; charset=utf-8" if page is None else CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are no news."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    server = Server((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="baton-metrics", daemon=True).start()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{server.server_port}/metrics"
