"""A Redis of a test's own: a free port, a folder of its own, ended by its process id."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

import pytest

__all__ = ["RedisProcess"]

_START_TIMEOUT_S = 20.0


class RedisProcess:
    """Context manager; skips the test where there is no redis-server. Nothing is written to disk.

    Attributes:
        url: for `state:`.
    """

    def __init__(self, folder: Path) -> None:
        self._program = shutil.which("redis-server")
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisProcess:
        if self._program is None:
            pytest.skip("needs redis-server on the path")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it (again, on the same port, with nothing of what it held before)."""
        assert self._program is not None
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)),
                    *("--save", "", "--appendonly", "no"),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                assert self.ask("PING").startswith(b"+PONG")
                return
            except OSError:
                assert time.monotonic() < until_s, (self._folder / "redis.log").read_text()
                assert self._process.poll() is None, (self._folder / "redis.log").read_text()
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, stopped or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def stop(self) -> None:
        """SIGSTOP: it is there and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def ask(self, *command: str | bytes) -> bytes:
        """The first bytes of what it answers to a command."""
        parts = [part.encode() if isinstance(part, str) else part for part in command]
        request = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(request)
            return connection.recv(4096)
