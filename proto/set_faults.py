"""`Worker.SetFaults`, the same for workers and routers."""

from __future__ import annotations

from typing import Any

import grpc

from baton import faults
from baton.proto.baton.v1 import worker_pb2 as pb

__all__ = ["set_faults"]


async def set_faults(request: pb.SetFaultsRequest, context: Any) -> pb.SetFaultsReply:
    """Replaces this process's faults; tells how often each that was there has fired.

    Ends the call with FAILED_PRECONDITION where the configuration does not allow it, and with INVALID_ARGUMENT where a
    rule is wrong; then nothing has changed.
    """
    if not faults.allows_replacement:
        text = "faults cannot be set at run time here; start the cluster with faults.allow_at_runtime: true"
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
    try:
        fired = faults.replace(list(request.rules))
    except faults.ConfigError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise AssertionError("abort raises") from error
    return pb.SetFaultsReply(fired=[pb.FiredFault(rule=str(rule), count=count) for rule, count in fired])
