"""The private Ray of one cluster: its start, and the return of its head process (the GCS) when that dies.

    serving --the head dies--> serving on without it --started again on its port, from its store--> serving

The head knows where everything runs, and nothing runs through it: workers, routers and their streams go on while it is
away; starts of instances and Ray's own restarts of the controller wait. It keeps its tables in an embedded database in
the private folder (`RAY_gcs_storage`), so that the next one goes on where the last one was. Where Ray is too old for
that, the head stays away: one that begins with empty tables would end every process of the cluster.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import ray
import ray._private.node as ray_node
import ray._private.worker as ray_worker

from baton.cluster.launchers import ray_reaper
from baton.cluster.launchers.ray_daemons import only_needed_daemons

__all__ = ["PrivateHead"]

logger = logging.getLogger(__name__)

# In the environment of every process of a private Ray, with its folder as value.
_MARK = "BATON_PRIVATE_RAY"
_NUM_CPUS = 4
_OBJECT_STORE_BYTES = 80 << 20
_REAPER_DEADLINE_S = 15.0
_GCS = "gcs_server"
# A head that dies again within this time is started with growing pauses.
_STABLE_S = 10.0
_MIN_PAUSE_S = 0.5
_MAX_PAUSE_S = 10.0
_GONE = (
    "Ray's head process died and does not come back: requests are served on, but what dies from now on stays dead;"
    " when you can, stop the cluster and start it again (baton down, baton up); a newer Ray may do better"
)


class PrivateHead:
    """Starts a Ray and keeps its head alive.

    Everything but `end` is called on one and the same thread: the kernel ends Ray's processes when the thread that
    started them ends.

    Args:
        tell: gets one line whenever the head dies or returns.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._reaper: subprocess.Popen[bytes] | None = None
        self._folder = ""
        self._node: Any = None
        self._is_durable = hasattr(ray_node.Node, "_is_rocksdb_gcs")
        self._is_gone = False
        self._started_s = 0.0
        self._pause_s = 0.0
        self._not_before_s = 0.0

    def start(self, **options: Any) -> None:
        """`ray.init` with `options`, in a folder of its own that a watching process removes when this one ends."""
        # Short, since Ray's sockets below it must fit 107 characters.
        folder = self._folder = tempfile.mkdtemp(prefix="baton-")
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", ray_reaper.__file__, f"{_MARK}={folder}", folder],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        os.environ[_MARK] = folder
        if self._is_durable:
            os.environ.update({"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": os.path.join(folder, "gcs")})
        with only_needed_daemons():
            ray.init(
                address="local",
                num_cpus=max(_NUM_CPUS, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=folder,
                **options,
            )
        self._node = ray_worker._global_node

    def look(self, now_s: float) -> None:
        """Start the head again where it has died. Call it often."""
        process = self._process()
        if process is None or self._is_gone:
            return
        if process.poll() is None:
            if now_s - self._started_s >= _STABLE_S:
                self._pause_s = 0.0
            return
        if not self._is_durable:
            self._is_gone = True
            self._tell(_GONE)
            return
        if not self._not_before_s:
            self._not_before_s = now_s + self._pause_s
            self._pause_s = min(_MAX_PAUSE_S, max(_MIN_PAUSE_S, 2 * self._pause_s))
        if now_s < self._not_before_s:
            return
        self._started_s, self._not_before_s = now_s, 0.0
        try:
            self._node.kill_gcs_server(check_alive=False)
            self._node.start_gcs_server()
        except Exception as error:
            # Of Ray's inner workings; what serves must not end because of it.
            logger.exception("Ray's head cannot be started again")
            self._is_gone = True
            self._tell(f"{_GONE} ({type(error).__name__}: {error})")
            return
        self._tell(f"Ray's head process died (code {process.returncode}) and was started again; requests are served on")

    def end(self) -> bool:
        """End every process of this Ray, whatever state it is in, and remove its folder. False: some do not end."""
        if self._reaper is None:
            return True
        self._reaper.communicate(timeout=_REAPER_DEADLINE_S)
        # What Ray's part of this very process may have written since.
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._reaper.returncode == 0

    def _process(self) -> subprocess.Popen[bytes] | None:
        """The head's process, where Ray tells."""
        processes = getattr(self._node, "all_processes", {}).get(_GCS)
        process: subprocess.Popen[bytes] | None = processes[0].process if processes else None
        return process
