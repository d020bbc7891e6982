"""What a running cluster leaves for other commands of the same user: one small file, and a lock while it runs.

    <run root>/<name>.json    pid, registry address, URLs, API key; mode 0600
    <run root>/<name>.lock    held by `baton up` as long as it lives, so that a dead one is never taken for a live one
    <run root>/<name>/        logs of its instances

The run root is $XDG_RUNTIME_DIR/baton, else ~/.baton/run.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from baton.errors import ConfigError, UnavailableError

__all__ = ["RunState", "hold_run", "is_running", "log_dir", "read_run_state", "run_root", "write_run_state"]

_LOCK_ATTEMPTS = 10
_LOCK_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Attributes: `ready` is false, and the URLs are empty, while instances still start."""

    name: str
    pid: int
    launcher: str
    registry_address: str
    log_dir: str
    ready: bool = False
    http_url: str = ""
    grpc_address: str = ""
    model: str = ""
    api_key: str | None = field(default=None, repr=False)

    def ready_at(self, http_url: str, grpc_address: str) -> RunState:
        """The same run, ready to serve."""
        return replace(self, ready=True, http_url=http_url, grpc_address=grpc_address)


def run_root() -> Path:
    """The folder of all run states, created with mode 0700."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(runtime_dir) / "baton" if runtime_dir else Path.home() / ".baton" / "run"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return root


def log_dir(name: str) -> Path:
    """Where the instances of cluster `name` write their logs."""
    return run_root() / name


@contextmanager
def hold_run(name: str) -> Iterator[None]:
    """Be the one running cluster of this name; the run state goes when this ends.

    Raises:
        ConfigError: another process runs it.
    """
    with (run_root() / f"{name}.lock").open("a") as lock:
        if not _lock(lock.fileno()):
            raise ConfigError(
                f"a cluster named {name!r} is running already; stop it with `baton down --name {name}`,"
                " or start this one with --set name=other"
            )
        try:
            yield
        finally:
            _state_path(name).unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Take the exclusive lock; a moment's patience, since `is_running` holds it for an instant."""
    for _ in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return True
    return False


def is_running(name: str) -> bool:
    """Whether some process holds the run of `name`."""
    try:
        with (run_root() / f"{name}.lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def write_run_state(state: RunState) -> None:
    """Replace the run state in one step."""
    path = _state_path(state.name)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(state), file)
    temporary.replace(path)


def read_run_state(name: str) -> RunState:
    """The run state of a live cluster.

    Raises:
        UnavailableError: no cluster of this name runs here.
    """
    try:
        state = RunState(**json.loads(_state_path(name).read_text()))
    except FileNotFoundError:
        state = None
    except (ValueError, TypeError) as error:
        raise UnavailableError(f"{_state_path(name)} is damaged ({error}); remove it") from error
    if state is None or not is_running(name):
        others = sorted(path.stem for path in run_root().glob("*.json") if is_running(path.stem))
        hint = f"running: {', '.join(others)} (use --name)" if others else "start one with `baton up`"
        raise UnavailableError(f"no cluster named {name!r} is running here; {hint}")
    return state


def _state_path(name: str) -> Path:
    return run_root() / f"{name}.json"
