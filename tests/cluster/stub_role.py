"""A process that behaves like a role towards its launcher: takes its configuration, announces itself, ends on SIGTERM.

`stub_role.py MODE` and the arguments of `baton.cluster.role`, where MODE is
    good        announces itself until SIGTERM
    stubborn    ignores SIGTERM, and starts a child that does too
    broken      ends with code 3

Of several ranks, rank 0 speaks for the instance. Every rank meets it in the registry under a name of its own, with
"<pid>:1" as address, so that rank 0 learns the pids of all and lists them.
"""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    for name in ("role", "instance-id", "start-id", "host", "registry"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--num-ranks", required=True, type=int)
    options = parser.parse_args()
    mode = options.mode
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
        instance_id=options.instance_id,
        role=options.role,
        state="ready",
        incarnation=os.urandom(16),
        detail=config.name,
        ranks=[worker_pb2.RankStatus(rank=rank, pid=pid, host=options.host) for rank, pid in enumerate(pids)],
        http_url="http://127.0.0.1:8000",
        grpc_address="127.0.0.1:50051",
        max_model_len=100,
        layout=worker_pb2.KvLayout(block_size=16),
        load=worker_pb2.WorkerLoad(kv_blocks_total=70, kv_blocks_free=70),
    )
    with grpc.insecure_channel(options.registry) as channel:
        stub = worker_pb2_grpc.RegistryStub(channel)
        if options.num_ranks > 1:
            status.ranks.clear()
            for rank in range(options.num_ranks) if options.rank == 0 else [options.rank]:
                request = worker_pb2.MeetRequest(
                    instance_id=f"{options.instance_id}/{rank}", start_id=options.start_id, timeout_s=30
                )
                if rank == options.rank:
                    request.driver_address = f"{os.getpid()}:1"
                met = stub.Meet(request, timeout=40, wait_for_ready=True)
                pid = int(met.driver_address.partition(":")[0])
                status.ranks.add(rank=rank, pid=pid, host=options.host)
            pool = config.pool(options.role)
            status.layout.tensor_parallel = pool.tensor_parallel
            status.layout.pipeline_parallel = pool.pipeline_parallel
        while not stop.is_set():
            if options.rank == 0:
                try:
                    stub.Announce(status, timeout=10, wait_for_ready=True)
                except grpc.RpcError:
                    # The registry died in the midst of it, and with it who started this: SIGTERM is on its way.
                    if not stop.wait(5.0):
                        raise
            stop.wait(0.3)
    print("stopped well", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
