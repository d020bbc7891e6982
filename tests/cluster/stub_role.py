"""A process that behaves like a role towards its launcher: takes its configuration, announces itself, ends on SIGTERM.

`stub_role.py MODE --role ROLE --instance-id ID --registry HOST:PORT`, where MODE is
    good        announces itself until SIGTERM
    stubborn    ignores SIGTERM, and starts a child that does too
    broken      ends with code 3
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import grpc

from baton.cluster import role
from baton.config import config_from_json
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc


def main() -> int:
    mode, instance_id, registry = sys.argv[1], sys.argv[5], sys.argv[7]
    role.die_with_parent()
    config = config_from_json(sys.stdin.read())
    if mode == "broken":
        print("the reason why", flush=True)
        return 3
    stop = threading.Event()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else lambda *_: stop.set())
    pids = [os.getpid()]
    if mode == "stubborn":
        pids.append(subprocess.Popen(["sleep", "600"]).pid)
    status = worker_pb2.WorkerStatus(
        instance_id=instance_id,
        role=sys.argv[3],
        state="ready",
        incarnation=os.urandom(16),
        detail=config.name,
        ranks=[worker_pb2.RankStatus(rank=rank, pid=pid) for rank, pid in enumerate(pids)],
        http_url="http://127.0.0.1:8000",
        grpc_address="127.0.0.1:50051",
        max_model_len=100,
        layout=worker_pb2.KvLayout(block_size=16),
        load=worker_pb2.WorkerLoad(kv_blocks_total=70, kv_blocks_free=70),
    )
    with grpc.insecure_channel(registry) as channel:
        stub = worker_pb2_grpc.RegistryStub(channel)
        while not stop.is_set():
            stub.Announce(status, timeout=10, wait_for_ready=True)
            stop.wait(0.3)
    print("stopped well", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
