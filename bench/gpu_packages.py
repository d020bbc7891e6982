"""Which packages the parts of a GPU check need.

A machine with one GPU and no network has torch, Triton and what its image holds. Kernels and engine need no more; the
served cluster needs some small packages that can be carried as wheels (`SERVING`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ENGINE", "SERVING", "install_wheels", "missing"]

ENGINE = ("torch", "triton", "numpy", "safetensors", "pytest")
"""Modules without which nothing here runs."""

SERVING: Mapping[str, str] = {
    "grpc": "grpcio",
    "google.protobuf": "protobuf",
    "transformers": "transformers",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic_core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "orjson": "orjson",
    "fastapi": "fastapi",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "uvloop": "uvloop",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
    "typer": "typer",
    "rich": "rich",
    "jinja2": "jinja2",
    "tokenizers": "tokenizers",
    "anyio": "anyio",
    "h11": "h11",
    "httptools": "httptools",
    "click": "click",
}
"""Module -> package of what a served cluster needs besides; the router's own and theirs."""


def missing(modules: Sequence[str]) -> list[str]:
    """Those of `modules` that cannot be found."""

    def is_missing(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ModuleNotFoundError:
            return True

    return [name for name in modules if is_missing(name)]


def install_wheels(folder: Path, target: Path) -> Path:
    """Unpacks every wheel of `folder` below `target`, without a network, once for each set of wheels.

    Raises:
        ValueError: there are none, or pip refuses them.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"{folder} holds no wheels (*.whl)")
    digest = hashlib.sha256("\n".join(f"{wheel.name} {wheel.stat().st_size}" for wheel in wheels).encode())
    site = target / digest.hexdigest()[:12]
    if not site.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--no-cache-dir", "--target", str(site), *map(str, wheels)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise ValueError(f"pip cannot install the wheels of {folder}: {done.stderr.strip()[-400:]}")
    return site
