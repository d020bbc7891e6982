"""`baton up --detach`: the foreground command in a session of its own, waited for until it is ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from baton.cluster.run_state import is_running, log_dir
from baton.cluster.summary import stop_text
from baton.config import ClusterConfig
from baton.errors import ConfigError, UnavailableError

__all__ = ["run_detached"]

_POLL_S = 0.1
# Beyond the start-up deadline that the foreground command keeps itself.
_SLACK_S = 60.0


def run_detached(config: ClusterConfig, arguments: list[str]) -> int:
    """Start `baton <arguments>` in the background; print what it prints, as it comes, until that says how to stop it.

    The text is waited for and not the run's state, which is written before it. Returns the exit code.

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
    try:
        with path.open(errors="replace") as output:
            _follow(process, output, path, config)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    return process.poll() or 0


def _follow(process: subprocess.Popen[bytes], output: TextIO, path: Path, config: ClusterConfig) -> None:
    until_s = time.monotonic() + config.startup_timeout_s + _SLACK_S
    ending = f"\n{stop_text(config.name, detached=True)}\n"
    told = ""
    while ending not in told:
        # Looked at before the log is read: once it has ended, nothing more comes.
        has_ended = process.poll() is not None
        text = output.read()
        print(text, end="", flush=True)
        told += text
        if has_ended:
            return
        if time.monotonic() >= until_s:
            raise UnavailableError(f"{config.name} was not ready within {config.startup_timeout_s:.0f} s; see {path}")
        time.sleep(_POLL_S)
