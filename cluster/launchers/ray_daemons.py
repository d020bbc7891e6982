"""Which daemons a private Ray starts: without its autoscaler, log forwarder and dashboard, which serve nobody here.

They cost three processes and, on a small machine, seconds of the start. Ray has no public switch for them; where a
version of Ray is built differently than expected here, it simply starts all of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray._private.node as ray_node
import ray._private.parameter as ray_parameter

__all__ = ["only_needed_daemons"]

_UNNEEDED = {"no_monitor": True, "include_log_monitor": False}


@contextmanager
def only_needed_daemons() -> Iterator[None]:
    """Around `ray.init(address="local")`."""
    parameters: Any = ray_parameter.RayParams
    node: Any = ray_node.Node
    dashboard = getattr(node, "start_api_server", None)
    if dashboard is None or not _UNNEEDED.keys() <= inspect.signature(parameters).parameters.keys():
        yield
        return
    module: Any = ray_parameter
    module.RayParams = functools.partial(parameters, **_UNNEEDED)
    node.start_api_server = _start_nothing
    try:
        yield
    finally:
        module.RayParams = parameters
        node.start_api_server = dashboard


def _start_nothing(node: Any, **options: Any) -> None:
    """In place of the dashboard."""
