"""How long `baton up` takes until it answers, and where the time goes.

    python bench/startup.py                                   # the shipped model, the launcher that auto takes
    python bench/startup.py --set launcher=local --set model.path=/path/to/model

Prints what each kind of process spends on imports, then each line that `baton up` writes with the second it came, and
the second of the first answer. Run it twice: the first run warms the disk's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

_IMPORTS = ("torch", "baton.decode_worker.service", "baton.router.service", "baton.cluster.cli", "ray")
_DEADLINE_S = 120.0


def import_s(module: str) -> float | None:
    """Seconds that a fresh interpreter takes to import `module`; None where it is not installed."""
    begin_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, timeout=60, check=False)
    return time.monotonic() - begin_s if done.returncode == 0 else None


def first_answer(url: str, process: subprocess.Popen[str]) -> None:
    """Returns once a completion has been answered.

    Raises:
        SystemExit: the cluster ended, or the deadline passed.
    """
    body = json.dumps({"prompt": "def main():", "max_tokens": 1}).encode()
    until_s = time.monotonic() + _DEADLINE_S
    while process.poll() is None and time.monotonic() < until_s:
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_DEADLINE_S) as answer:
                answer.read()
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
    raise SystemExit("no answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to baton up")
    parser.add_argument("--port", type=int, default=18431, help="of the HTTP API")
    options = parser.parse_args()
    for module in _IMPORTS:
        seconds = import_s(module)
        print(f"import {module:30} {'not installed' if seconds is None else f'{seconds:.2f} s'}")
    settings = [f"router.http=127.0.0.1:{options.port}", "router.grpc=127.0.0.1:0", "name=startup", *options.set]
    command = [sys.executable, "-m", "baton.cluster.cli", "up"]
    for setting in settings:
        command += ["--set", setting]
    with tempfile.TemporaryDirectory() as folder:
        begin_s = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_RUNTIME_DIR": folder}
        )

        def echo() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    print(f"{time.monotonic() - begin_s:6.2f} s  {line.rstrip()[:110]}", flush=True)

        reader = threading.Thread(target=echo, daemon=True)
        reader.start()
        try:
            first_answer(f"http://127.0.0.1:{options.port}", process)
            print(f"{time.monotonic() - begin_s:6.2f} s  FIRST ANSWER", flush=True)
            time.sleep(1.0)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
            reader.join(timeout=5)


if __name__ == "__main__":
    main()
