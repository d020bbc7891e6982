"""Processes of this host: signals to them, their memory and descriptors, who listens on a port."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

from baton.config import split_host_port
from baton.errors import UnavailableError

__all__ = ["descriptors", "is_local", "listener_pid", "resident_bytes", "send_signal"]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def is_local(host: str) -> bool:
    """Whether `host` (a name or an address) is this machine: only its own addresses can be bound."""
    try:
        found = socket.getaddrinfo(host or "127.0.0.1", 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        with suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


def send_signal(pid: int, number: signal.Signals) -> bool:
    """Whether there was such a process.

    Raises:
        UnavailableError: it belongs to somebody else.
    """
    assert pid > 1, pid
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise UnavailableError(f"process {pid} belongs to another user; {number.name} was not sent") from error
    return True


def resident_bytes(pid: int) -> int:
    """Memory of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def descriptors(pid: int) -> int:
    """Open file descriptors of a process; 0 when it is gone or somebody else's."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def listener_pid(address: str) -> int | None:
    """The process of this user that listens on host:port; None where none is found."""
    _, port = split_host_port(address)
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening(table, port)}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and any(_holds(folder, inode) for inode in inodes):
            return int(folder.name)
    return None


def _listening(table: str, port: int) -> list[str]:
    try:
        rows = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    except OSError:
        return []
    fields = [row.split() for row in rows]
    return [row[9] for row in fields if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port]


def _holds(folder: Path, inode: str) -> bool:
    with suppress(OSError):
        for entry in os.scandir(folder / "fd"):
            with suppress(OSError):
                if os.readlink(entry.path) == f"socket:[{inode}]":
                    return True
    return False
