"""`baton up --detach`: the foreground command in a session of its own, waited for until it is ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from baton.cluster.run_state import is_running, log_dir, read_run_state
from baton.config import ClusterConfig
from baton.errors import ConfigError, UnavailableError

__all__ = ["run_detached"]

_POLL_S = 0.1
# Beyond the start-up deadline that the foreground command keeps itself.
_SLACK_S = 60.0


def run_detached(config: ClusterConfig, arguments: list[str]) -> int:
    """Start `baton <arguments>` in the background; print what it prints until ready. Returns the exit code.

    Raises:
        ConfigError: a cluster of this name runs already.
    """
    if is_running(config.name):
        raise ConfigError(
            f"a cluster named {config.name!r} is running already; `baton down --name {config.name}` stops it"
        )
    folder = log_dir(config.name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "up.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "baton.cluster.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    until_s = time.monotonic() + config.startup_timeout_s + _SLACK_S
    try:
        while process.poll() is None and not _ready(config.name):
            if time.monotonic() >= until_s:
                raise UnavailableError(
                    f"{config.name} was not ready within {config.startup_timeout_s:.0f} s; see {path}"
                )
            time.sleep(_POLL_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    sys.stdout.write(path.read_text(errors="replace"))
    return process.poll() or 0


def _ready(name: str) -> bool:
    try:
        return read_run_state(name).ready
    except UnavailableError:
        return False
