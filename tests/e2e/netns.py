"""Two "machines" on this one, each a network namespace with its own address and its own /dev/shm, and Ray on both.

    host ── bridge 198.18.<n>.254 ─┬─ veth ── node 0: 198.18.<n>.1   ray start --head
                                   └─ veth ── node 1: 198.18.<n>.2   ray start --address

    with TwoNodes(folder) as nodes:
        subprocess.run(nodes.command(0, "baton", "up", ...))       # in node 0
        httpx.get(f"http://{nodes.addresses[0]}:8000/...")         # from the host, over the bridge

Nothing on one node is reached over loopback or shared memory from the other. Files are shared, /dev/shm and Ray's own
folder excepted. Everything is torn down at the end: every process in a namespace is killed by its id.
`python tests/e2e/netns.py` keeps two nodes up until Ctrl-C, to try things out.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import baton

__all__ = ["RAY_PORT", "TwoNodes", "why_not"]

RAY_PORT = 6379
START_TIMEOUT_S = 90.0
_RAY_FOLDER = Path("/tmp/ray")
_TOOLS = ("ip", "nsenter", "unshare", "mount")
_COUNT_NODES = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
print(sum(node["Alive"] for node in ray.nodes()))
"""


def why_not() -> str:
    """Why two nodes cannot be made here; empty where they can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing:
        return f"there is no {', '.join(missing)} here"
    name = f"baton-try-{os.getpid()}"
    made = subprocess.run(
        ["ip", "link", "add", f"bt{os.getpid()}", "type", "veth", "peer", "name", "bt-try"],
        capture_output=True,
        text=True,
        check=False,
    )
    subprocess.run(["ip", "link", "del", f"bt{os.getpid()}"], capture_output=True, check=False)
    if made.returncode == 0:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"the kernel refuses network namespaces: {made.stderr.strip()}"


class TwoNodes:
    """Context manager; see the module.

    Args:
        folder: for logs of Ray and of what runs here.
        num_cpus: that Ray has on each node.

    Attributes:
        addresses: of the two nodes, the head first.
        ray_address: for `ray.address`, from either node.
    """

    def __init__(self, folder: Path, *, num_cpus: int = 4) -> None:
        self._folder = folder
        self._num_cpus = num_cpus
        self._tag = f"bt{os.getpid() % 100_000}"
        # 198.18.0.0/15 is set aside for tests of networks between machines.
        self._net = f"198.18.{os.getpid() % 254}"
        self._holders: list[subprocess.Popen[bytes]] = []
        self._rays: list[subprocess.Popen[bytes]] = []
        self.addresses = (f"{self._net}.1", f"{self._net}.2")
        self.ray_address = f"{self.addresses[0]}:{RAY_PORT}"
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(baton.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
            ).rstrip(os.pathsep),
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_usage_stats_enabled": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            # Whatever token this user's other Rays have left at home: it makes a head ask for it, and not its drivers.
            "RAY_AUTH_MODE": "disabled",
        }

    def __enter__(self) -> TwoNodes:
        try:
            self._make_network()
            self._start_ray()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tear_down()

    def command(self, node: int, *command: str) -> list[str]:
        """`command` as it must be called to run on `node`."""
        holder = self._holders[node].pid
        return ["nsenter", f"--net=/proc/{holder}/ns/net", f"--mount=/proc/{holder}/ns/mnt", *command]

    def pids(self, node: int) -> list[int]:
        """Every process on `node`, except the one that holds its namespaces open."""
        done = subprocess.run(["ip", "netns", "pids", self._name(node)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split() if int(pid) != self._holders[node].pid]

    def log(self) -> str:
        """What Ray's start printed on both nodes."""
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self._folder.glob("ray-node*.log"))

    def _name(self, node: int) -> str:
        return f"{self._tag}-{node}"

    def _make_network(self) -> None:
        bridge = f"{self._tag}br"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        _RAY_FOLDER.mkdir(exist_ok=True)
        for node, address in enumerate(self.addresses):
            name, outer = self._name(node), f"{self._tag}v{node}"
            _ip("netns", "add", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outer, "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            mounts = f"mount -t tmpfs -o size=2g tmpfs /dev/shm && mount -t tmpfs tmpfs {_RAY_FOLDER}"
            hold = f"{mounts} && echo ready && exec sleep infinity"
            holder = subprocess.Popen(
                [*f"ip netns exec {name} unshare --mount --propagation private sh -c".split(), hold],
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            self._holders.append(holder)
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n", f"cannot mount a /dev/shm of its own for node {node}"

    def _start_ray(self) -> None:
        for node, address in enumerate(self.addresses):
            role = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
            join = role if node == 0 else [f"--address={self.ray_address}"]
            # As `ray start`, whichever Python runs this.
            start = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", *join]
            options = [f"--node-ip-address={address}", f"--num-cpus={self._num_cpus}", "--disable-usage-stats"]
            with (self._folder / f"ray-node{node}.log").open("wb") as log:
                self._rays.append(
                    subprocess.Popen(
                        self.command(node, *start, *options, f"--object-store-memory={80 << 20}", "--block"),
                        env=self.environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            self._wait_nodes(node + 1)

    def _wait_nodes(self, wanted: int) -> None:
        until_s = time.monotonic() + START_TIMEOUT_S
        counted = ""
        while counted != str(wanted):
            assert time.monotonic() < until_s, f"Ray has {counted or 'no'} nodes, not {wanted}:\n{self.log()}"
            assert all(ray.poll() is None for ray in self._rays), self.log()
            time.sleep(0.5)
            done = subprocess.run(
                self.command(0, sys.executable, "-c", _COUNT_NODES, self.ray_address),
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=START_TIMEOUT_S,
                check=False,
            )
            counted = done.stdout.strip()

    def _tear_down(self) -> None:
        for process in self._rays:
            if process.poll() is None:
                process.terminate()
        for process in self._rays:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for node, holder in enumerate(self._holders):
            for pid in self.pids(node):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            holder.kill()
            holder.wait(10)
            assert holder.stdout is not None
            holder.stdout.close()
        for process in self._rays:
            process.wait(10)
        for node in range(2):
            # With a namespace its end of the veth goes, and with that the other.
            subprocess.run(["ip", "netns", "del", self._name(node)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self._tag}br"], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


def main() -> None:
    """Keep two nodes up until Ctrl-C."""
    reason = why_not()
    if reason:
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder, TwoNodes(Path(folder)) as nodes, suppress(KeyboardInterrupt):
        print(f"Ray at {nodes.ray_address}, logs in {folder}")
        for node, address in enumerate(nodes.addresses):
            print(f"node {node} ({address}): {' '.join(nodes.command(node, 'bash'))}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
