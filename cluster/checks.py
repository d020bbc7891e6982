"""What a first start trips over, each with its fix. Every check is a function that returns one `Check`."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from baton.cluster.cores import cores_text, group_cores, whole_cores
from baton.cluster.foreground import port_error
from baton.cluster.launchers.base import resolve_launcher
from baton.cluster.model_fit import check_layouts
from baton.cluster.run_state import is_running, run_root
from baton.cluster.summary import layout_text
from baton.config import ClusterConfig, format_bytes, resolve_model_path, split_host_port
from baton.config_values import without_password
from baton.engine.host_memory import available_host_bytes
from baton.engine.model_config import ModelConfig
from baton.errors import BatonError, ConfigError
from baton.state.open import is_shared, open_state

__all__ = ["Check", "run_checks"]

_SHM_SLACK_BYTES = 64 << 20
_MIN_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `fix` is told when it is not ok. A warning does not fail the doctor."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    warning: bool = False


def run_checks(config: ClusterConfig) -> Iterator[Check]:
    """All checks for a start with `config`, in order; one that itself breaks becomes a failed check."""
    for check in _CHECKS:
        try:
            yield check(config)
        except Exception as error:
            name = check.__name__.strip("_").replace("_", " ")
            yield Check(name, False, f"{type(error).__name__}: {error}", "install Baton again: pip install -e .")


def _python(config: ClusterConfig) -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", sys.version_info >= (3, 11), version, "Baton needs Python 3.11 or newer")


def _torch(config: ClusterConfig) -> Check:
    torch = importlib.import_module("torch")
    device = f"{torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "CPU"
    wanted = config.device != "cuda" or torch.cuda.is_available()
    return Check("torch", wanted, f"{torch.__version__}, {device}", "device: cuda needs a GPU; set device: cpu or auto")


def _kernels(config: ClusterConfig) -> Check:
    backend = importlib.import_module("baton.kernels.ops").backend()
    return Check(
        "kernels",
        backend != "reference",
        str(backend),
        "the C++ kernels are not built (it works, slowly); install a C++ compiler, then pip install -e . again",
        warning=True,
    )


def _cores(config: ClusterConfig) -> Check:
    cores = whole_cores()
    missing = {core for own in group_cores(config).values() for core in own} - set(cores) if cores else set()
    return Check(
        "cores",
        not missing,
        cores_text(config, cores) + (f"; not here: {', '.join(map(str, sorted(missing)))}" if missing else ""),
        "set cpu.cores to cores of this host, or to auto",
        warning=True,
    )


def _transformers(config: ClusterConfig) -> Check:
    version = importlib.metadata.version("transformers")
    return Check("transformers", int(version.split(".")[0]) == 5, version, "pip install 'transformers>=5,<6'")


def _launcher(config: ClusterConfig) -> Check:
    launcher = resolve_launcher(config.launcher)
    if launcher == "local":
        return Check("launcher", True, "local (plain processes)")
    version = importlib.metadata.version("ray")
    return Check("launcher", True, f"ray {version}")


def _ports(config: ClusterConfig) -> Check:
    busy = []
    for key, address in (
        ("http", config.router.http),
        ("grpc", config.router.grpc),
        *(("admin", config.router.admin_of(index)) for index in range(config.router.replicas)),
    ):
        host, port = split_host_port(address)
        if (why := port_error(host, port)) and not is_running(config.name):
            busy.append(f"router.{key} {host}:{port}: {why}")
    free = f"{config.router.http} and {config.router.grpc} are free"
    if is_running(config.name):
        free = f"cluster {config.name!r} is running on them"
    return Check("ports", not busy, "; ".join(busy) or free, "end what listens there, or --set router.http=127.0.0.1:0")


def _state(config: ClusterConfig) -> Check:
    if not is_shared(config.state):
        return Check("state", True, "memory://, each router's own")
    where = without_password(config.state)
    try:
        asyncio.run(_ask_state(config))
    except BatonError as error:
        fix = "start it, or correct `state`; Baton serves without it, but its routers share nothing"
        return Check("state", False, str(error), fix, warning=True)
    return Check("state", True, f"{where} answers")


async def _ask_state(config: ClusterConfig) -> None:
    state = open_state(config.state, cluster=config.name)
    try:
        await state.get("doctor/anything")
    finally:
        await state.close()


def _shared_memory(config: ClusterConfig) -> Check:
    choice = config.transfer.transport
    if choice != "auto" and "shm" not in ((choice,) if isinstance(choice, str) else choice):
        return Check("shared memory", True, "not used by the transports chosen")
    num_links = math.prod(pool.replicas * pool.num_ranks for pool in (config.prefill, config.decode))
    needed = config.transfer.arena * num_links + _SHM_SLACK_BYTES
    free = shutil.disk_usage("/dev/shm").free
    return Check(
        "shared memory",
        free >= needed,
        f"{format_bytes(free)} free in /dev/shm, {format_bytes(needed)} wanted",
        "give the container more (--shm-size=1g), lower transfer.arena, or set transfer.transport: gloo",
    )


def _memory(config: ClusterConfig) -> Check:
    weights_bytes = _model_bytes(config)
    available = available_host_bytes()
    kv_bytes = 0 if config.kv.memory == "auto" else config.kv.memory
    num_instances = config.prefill.replicas + config.decode.replicas
    needed = num_instances * weights_bytes + config.num_worker_ranks * kv_bytes + _MIN_MEMORY_BYTES
    return Check(
        "memory",
        available >= needed,
        f"{format_bytes(available)} available, about {format_bytes(needed)} wanted",
        "lower kv.memory or the number of workers, or serve a smaller model",
    )


def _model(config: ClusterConfig) -> Check:
    try:
        folder = resolve_model_path(config.model.path)
    except BatonError as error:
        return Check("model", False, str(error), "set model.path to tiny, a checkpoint directory, or a hub name")
    missing = [name for name in ("config.json", "tokenizer.json") if not os.access(folder / name, os.R_OK)]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    size = format_bytes(_model_bytes(config))
    detail = f"{folder}: cannot read {', '.join(missing)}" if missing else f"{folder} ({size} of weights)"
    return Check("model", not missing, detail, "download the checkpoint again; Baton reads safetensors only")


def _layouts(config: ClusterConfig) -> Check:
    shapes = [
        f"{role} {layout_text(pool.tensor_parallel, pool.pipeline_parallel, pool.num_ranks)}"
        for role, pool in (("prefill", config.prefill), ("decode", config.decode))
        if pool.replicas
    ]
    try:
        check_layouts(config, ModelConfig.from_dir(resolve_model_path(config.model.path)))
    except ConfigError as error:
        return Check("layouts", False, str(error), "set tensor_parallel and pipeline_parallel to what works")
    except BatonError as error:
        return Check("layouts", False, str(error), "see the model check")
    return Check("layouts", True, "; ".join(shapes))


def _model_bytes(config: ClusterConfig) -> int:
    """Size of the weights; 0 when there is no model, which is another check's finding."""
    try:
        folder = resolve_model_path(config.model.path)
    except BatonError:
        return 0
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _tokenizer(config: ClusterConfig) -> Check:
    tokenizers = importlib.import_module("tokenizers")
    try:
        path = resolve_model_path(config.model.path) / "tokenizer.json"
    except BatonError:
        return Check("tokenizer", False, "there is no model", "see the model check")
    if not path.is_file():
        return Check("tokenizer", False, f"no {path}", "Baton needs a tokenizer.json next to the weights")
    size = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    return Check("tokenizer", size > 0, f"{size:,} tokens", "download the checkpoint again")


def _run_folder(config: ClusterConfig) -> Check:
    folder = run_root()
    return Check("run folder", os.access(folder, os.W_OK), str(folder), "set XDG_RUNTIME_DIR to a folder you can write")


_CHECKS: tuple[Callable[[ClusterConfig], Check], ...] = (
    _python,
    _torch,
    _kernels,
    _cores,
    _transformers,
    _launcher,
    _ports,
    _state,
    _shared_memory,
    _model,
    _tokenizer,
    _layouts,
    _memory,
    _run_folder,
)
