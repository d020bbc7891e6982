"""`baton down`: stop a running cluster, first by asking, in the end by killing."""

from __future__ import annotations

import typer

from baton.cluster.commands.options import NameOption

__all__ = ["down"]

_GRACE_S = 40.0
_POLL_S = 0.1


def down(name: NameOption = "baton") -> None:
    """Stop a running cluster and every process of it."""
    import os
    import signal
    import time
    from contextlib import suppress

    from baton.cluster.client import stop_cluster
    from baton.cluster.run_state import is_running, read_run_state
    from baton.errors import UnavailableError

    state = read_run_state(name)
    typer.echo(f"stopping {name} (pid {state.pid})")
    try:
        stop_cluster(state.registry_address)
    except UnavailableError:
        # `baton up` itself can still end its instances.
        with suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)
    until_s = time.monotonic() + _GRACE_S
    while is_running(name):
        if time.monotonic() >= until_s:
            with suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGKILL)
            raise UnavailableError(
                f"{name} (pid {state.pid}) did not stop within {_GRACE_S:.0f} s and was killed; logs: {state.log_dir}"
            )
        time.sleep(_POLL_S)
    typer.echo("stopped")
