"""The systems that are compared: a URL that somebody else runs, or a command that is started and stopped here.

    parse_peer("name=http://host:port")             a URL
    parse_peer("name=serve --port {port}")          a command; {port} becomes a free one, on 127.0.0.1
    parse_baton("http://host:port")                 a URL, named baton; also name=URL
    parse_baton("name=--set decode.replicas=1")     `baton up` of this interpreter with these options

`serving` starts a command in a process group of its own, waits until it answers a request, and in the end sees to it
that no process of the group is left: SIGTERM to the command, to what it left behind, then SIGKILL.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from load_client import LoadError, Server, describe

__all__ = ["System", "parse_baton", "parse_peer", "serving"]

_NAMED = re.compile(r"(?P<name>[A-Za-z0-9][\w.+-]*)=(?P<value>.*)", re.DOTALL)
_POLL_S = 0.2
STOP_TIMEOUT_S = 40.0
KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What to measure. Exactly one of `url` and `command` is set; `command` has {port} in it."""

    name: str
    url: str | None = None
    command: tuple[str, ...] | None = None
    is_baton: bool = False

    @property
    def how(self) -> str:
        """For people and results."""
        return self.url or shlex.join(self.command or ())


def parse_peer(text: str) -> System:
    """Of `--peer`.

    Raises:
        ValueError: no name, or a command that has no {port}.
    """
    match = _NAMED.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not NAME=URL or NAME='COMMAND with {{port}}'")
    name, value = match["name"], match["value"].strip()
    if _is_url(value):
        return System(name=name, url=_base(value))
    if "{port}" not in value:
        raise ValueError(f"the command of {name} does not say where {{port}} goes: {value!r}")
    return System(name=name, command=tuple(shlex.split(value)))


def parse_baton(text: str, *, model: Path | None) -> System:
    """Of `--baton`: options of `baton up`, or a URL."""
    match = _NAMED.fullmatch(text.strip()) if not _is_url(text) else None
    name, value = (match["name"], match["value"].strip()) if match else ("baton", text.strip())
    if _is_url(value):
        return System(name=name, url=_base(value), is_baton=True)
    settings = {"name": "compare-{port}", "router.http": "127.0.0.1:{port}", "router.grpc": "127.0.0.1:0"}
    command = [sys.executable, "-m", "baton.cluster.cli", "up", "--launcher", "local"]
    command += ["--model", str(model)] if model else []
    command += [part for key, setting in settings.items() for part in ("--set", f"{key}={setting}")]
    return System(name=name, command=(*command, *shlex.split(value)), is_baton=True)


@contextmanager
def serving(
    system: System, *, start_timeout_s: float, log: Path | None = None
) -> Iterator[tuple[Server, float | None]]:
    """The server, and the seconds from its start until it had answered a request (None where it ran already).

    Raises:
        LoadError: it ended before, or did not answer within `start_timeout_s`; the end of its log is in the text.
    """
    if system.url is not None:
        yield _wait(system, system.url, start_timeout_s, lambda: None), None
        return
    assert system.command is not None
    port = _free_port()
    command = [part.replace("{port}", str(port)) for part in system.command]
    with log.open("wb") if log else tempfile.TemporaryFile() as output:
        begin_s = time.monotonic()
        try:
            # No session of its own: the client, in another one, would be measured waiting for the same cores.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )
        except OSError as error:
            raise LoadError(f"{system.name} cannot be started: {error}") from error

        def check_alive() -> None:
            if process.poll() is not None:
                raise LoadError(f"{system.name} ended with {process.returncode} before it answered")

        try:
            try:
                server = _wait(system, f"http://127.0.0.1:{port}", start_timeout_s, check_alive)
            except LoadError as error:
                raise LoadError(f"{error}\n{_tail(output.fileno())}") from error
            yield server, time.monotonic() - begin_s
        finally:
            _stop(process)


def _wait(system: System, url: str, timeout_s: float, check_alive: Callable[[], None]) -> Server:
    """The server at `url` once it has answered a request."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        check_alive()
        try:
            return describe(url)
        except httpx.HTTPError as error:
            if time.monotonic() > deadline_s:
                raise LoadError(f"{system.name} did not answer at {url} within {timeout_s:.0f} s: {error}") from error
        time.sleep(_POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole group; returns when it is gone, or nothing more can be done."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline_s = time.monotonic() + KILL_TIMEOUT_S
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < deadline_s:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(_POLL_S)
    process.wait(KILL_TIMEOUT_S)


def _tail(descriptor: int, size_bytes: int = 3000) -> str:
    length = os.fstat(descriptor).st_size
    with open(f"/proc/self/fd/{descriptor}", "rb") as written:
        written.seek(max(0, length - size_bytes))
        return written.read().decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_url(text: str) -> bool:
    return text.strip().startswith(("http://", "https://"))


def _base(url: str) -> str:
    return url.strip().rstrip("/").removesuffix("/v1")
