"""`cluster.yaml` as frozen values: what may be set, its limits, and errors that name the key and the nearest valid one.

    load_config(path, overrides) -> ClusterConfig      file, then `key.path=value` overrides, then defaults
    resolve_model_path("tiny")   -> Path               shipped model, directory, or hub name
    json_schema()                -> dict               for editors

Every wrong key or value ends in one `ConfigError` that lists all of them, each with its full path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from baton.config_admission import AdmissionConfig
from baton.config_errors import explain
from baton.config_routing import RoutingConfig
from baton.config_section import Section
from baton.config_tracing import TracingConfig
from baton.config_values import (
    AUTO_HOST,
    DEVICE_TRANSPORTS,
    Address,
    Bytes,
    BytesOrAuto,
    Cores,
    FaultRules,
    Port,
    Seconds,
    StateUrl,
    Transports,
    format_bytes,
    is_loopback,
    parse_bytes,
    split_host_port,
)
from baton.errors import ConfigError
from baton.fault_rules import parse_rule, unknown_name

__all__ = [
    "ASSETS",
    "ClusterConfig",
    "CpuConfig",
    "DecodeConfig",
    "FaultsConfig",
    "GpuConfig",
    "KvConfig",
    "LogConfig",
    "MetricsConfig",
    "ModelConfig",
    "PoolConfig",
    "PrefillConfig",
    "RayConfig",
    "RouterConfig",
    "TransferConfig",
    "add_faults",
    "config_from_json",
    "format_bytes",
    "is_loopback",
    "json_schema",
    "load_config",
    "parse_bytes",
    "parse_override",
    "resolve_model_path",
    "split_host_port",
]

ASSETS = Path(__file__).parent / "assets"
SHIPPED_MODELS = ("tiny", "draft")
_COLOCATED_CHUNK_TOKENS = 128
_LOCAL_CHUNK_TOKENS = 16
"""Where prefill workers take most prompts, one that does not go there must not be felt by running answers."""


class ModelConfig(Section):
    """Which model is served."""

    path: str = "tiny"
    """"tiny" (ships with Baton), "draft" (its smaller sibling), a checkpoint directory, or a hub name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and KV cache; auto takes the checkpoint's."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """On CPU, round weights to integers while loading: less to read per token, at some cost in quality."""
    max_model_len: Annotated[int, Field(ge=2, le=16_777_216)] | None = None
    """Most tokens of prompt and output together; null takes the model's."""
    served_name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Name that clients use; null takes the last part of `path`."""


class RouterConfig(Section):
    """Where clients come in, and what is let in."""

    http: Address = "127.0.0.1:8000"
    """OpenAI-compatible HTTP, host:port; port 0 picks a free one."""
    grpc: Address = "127.0.0.1:50051"
    """baton.v1.Inference, host:port; port 0 picks a free one."""
    admin: Address = "127.0.0.1:0"
    """/admin/, for `baton trace` and `explain`, host:port, the port counted up over routers; 0 picks free ones."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Router processes, on one machine: they share both ports, and know nothing of each other but `state`."""
    api_key: Annotated[str, Field(min_length=8, max_length=512)] | None = Field(default=None, repr=False)
    """Clients must send it as bearer token; null lets everyone in."""
    max_queued_requests: int = Field(default=1024, ge=1)
    """Requests accepted and not ended; more are refused with 429."""
    max_queued_tokens: int = Field(default=4_000_000, ge=1)
    """Prompt plus maximal output tokens of all accepted requests; more is refused with 429."""
    request_timeout_s: Seconds = 600.0
    """Longest life of one request."""
    eject_slowness: Annotated[float, Field(ge=1.5, le=1e6)] | None = 4.0
    """A worker whose steps take so many times longer than its best and its peers' gets no new requests for a while."""
    abandon_slowness: Annotated[float, Field(ge=1.5, le=1e6)] | None = 32.0
    """So many times longer, and what runs there goes on elsewhere too; null: it stays."""
    idempotency_ttl_s: Seconds = 600.0
    """How long the answer to a request with an Idempotency-Key is kept, to be sent again to whoever repeats it."""
    kept_requests: int = Field(default=1024, ge=1, le=1_000_000)
    """Of so many choices `baton trace` and `baton explain` can still tell; one takes about 14 KiB of each router."""
    silence_s: Seconds = 1.0
    """A decode worker whose stream says nothing for so long is lost: its requests go on elsewhere."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _, port = split_host_port(self.admin)
        if port and port + self.replicas > 65536:
            raise ValueError(f"admin={self.admin} leaves no room below 65536 for the ports of {self.replicas} routers")
        return self

    def admin_of(self, index: int) -> str:
        """Where router `index` serves /admin/: a port is counted up, as each has its own."""
        host, port = split_host_port(self.admin)
        shown = f"[{host}]" if ":" in host else host
        return f"{shown}:{port + index}" if port else self.admin


class CpuConfig(Section):
    """Cores and compute threads of every worker, or of one pool's."""

    threads: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = "auto"
    """Compute threads of a worker, at most; auto: one on each of its cores, and on each that an idle worker lends."""
    cores: Cores = "auto"
    """Cores that the workers share out among themselves, for example 0-3,8; auto: all that nobody names."""


class GpuConfig(Section):
    """GPUs of every worker, or of one pool's; means nothing on CPU."""

    memory_fraction: Annotated[float, Field(gt=0.0, le=0.98)] | Literal["auto"] = "auto"
    """Part of its GPU's memory that a rank may take, weights and all; auto: 0.9 shared out among all ranks on it."""
    cuda_graphs: bool = True
    """Record decode steps at start and replay them; false saves their memory and seconds at start, and costs speed."""
    overlap: bool = True
    """Launch each step before the one ahead has ended, so that the GPU never waits for the host."""


class PoolConfig(Section):
    """What prefill and decode pools have in common."""

    replicas: int = Field(default=1, ge=1, le=1024)
    """Instances in this pool."""
    tensor_parallel: int = Field(default=1, ge=1, le=1024)
    """Ranks that share each layer, on one node: tensor parallelism."""
    pipeline_parallel: int = Field(default=1, ge=1, le=1024)
    """Stages that share the layers, each on a node of its own where there are several: pipeline parallelism."""
    max_batch_tokens: int = Field(default=2048, ge=1, le=1_048_576)
    """Tokens computed in one step, prompt chunks included."""
    max_batch_size: int = Field(default=16, ge=1, le=65_536)
    """Requests that run at once."""
    block_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens per KV block of this pool; null takes kv.block_size."""
    num_blocks: Annotated[int, Field(ge=2)] | None = None
    """KV blocks of each instance, the same number on each of its ranks; null takes kv.num_blocks."""
    host: str = "127.0.0.1"
    """Address where ranks listen; auto takes that of the node on which each runs, which several nodes need."""
    port: Port = 0
    """Port of the first rank, counted up over ranks and instances; 0 picks free ones."""
    cpu: CpuConfig | None = None
    """Cores and threads of this pool; null takes `cpu`."""
    gpu: GpuConfig | None = None
    """Use of GPUs by this pool; null takes `gpu`. Pools that share one GPU: fractions that sum to at most 0.95."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens={self.max_batch_tokens} is below max_batch_size={self.max_batch_size}:"
                " a step must hold one token of every running request"
            )
        if self.port and self.port + self.replicas * self.num_ranks > 65536:
            raise ValueError(
                f"port={self.port} leaves no room below 65536 for {self.replicas} replicas of {self.num_ranks} ranks"
            )
        return self

    @property
    def num_ranks(self) -> int:
        """Processes of each instance."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def driver_rank(self) -> int:
        """The rank that plans, samples and speaks for its instance: the first of the last stage."""
        return (self.pipeline_parallel - 1) * self.tensor_parallel

    def port_of(self, index: int, rank: int = 0) -> int:
        """Port of `rank` of instance `index` of this pool; 0 means any free one."""
        assert 0 <= rank < self.num_ranks, rank
        return self.port + index * self.num_ranks + rank if self.port else 0


class PrefillConfig(PoolConfig):
    """Workers that read prompts. None at all (colocated): decode workers do both, on all cores, in small chunks."""

    replicas: int = Field(default=1, ge=0, le=1024)
    """Instances in this pool; 0: decode workers prefill too."""
    max_batch_tokens: int = Field(default=256, ge=1, le=1_048_576)
    """Tokens computed in one step: 256 keep a CPU busy and let one prompt end before the next; a GPU wants 2048."""


class DecodeConfig(PoolConfig):
    """Workers that write answers."""

    max_batch_tokens: int = Field(default=512, ge=1, le=1_048_576)
    """Tokens computed in one step, prompt chunks included."""
    max_batch_size: int = Field(default=64, ge=1, le=65_536)
    """Requests that run at once."""
    max_prefill_tokens: Annotated[int, Field(ge=1, le=1_048_576)] | Literal["auto"] = "auto"
    """Prompt tokens beside running answers in a step: how long a prompt holds answers up. Auto: few on a CPU."""


class KvConfig(Section):
    """KV cache of every worker."""

    block_size: int = Field(default=16, ge=1, le=1024)
    """Tokens per block."""
    memory: BytesOrAuto = "auto"
    """KV memory of each rank, for example 2GiB; auto takes a share of what is free."""
    num_blocks: Annotated[int, Field(ge=2)] | None = None
    """Blocks of each instance, the same number on each of its ranks; set, it wins over `memory`."""


class TransferConfig(Section):
    """How KV pages travel from prefill to decode workers."""

    transport: Transports = "auto"
    """shm on one host, gloo across hosts, cuda_ipc and nccl between GPUs; a list is an order; auto: the best."""
    lease_s: Seconds = 30.0
    """A reservation that nobody renews for this long is reclaimed."""
    handover_timeout_s: Seconds = 60.0
    """A decode worker that waits this long for pages computes the prompt itself."""
    one_message_below_tokens: int = Field(default=256, ge=0)
    """Prompts shorter than this travel in one message after the last layer."""
    layers_per_group: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    """Layers that are shipped together while later ones are computed."""
    arena: Bytes = Field(default=64 << 20, ge=1 << 16)
    """Staging memory of each link, for example 64MiB."""
    rate_limit_gbit_s: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Makes gloo as slow as a network of so many Gbit/s, to try one out; null: as fast as it can."""

    @model_validator(mode="after")
    def _check_rate_limit(self) -> TransferConfig:
        if self.rate_limit_gbit_s is not None and self.transport not in ("gloo", ("gloo",)):
            given = self.transport if isinstance(self.transport, str) else f"[{', '.join(self.transport)}]"
            raise ValueError(f"rate_limit_gbit_s holds for transport gloo only, not for {given}")
        return self


class RayConfig(Section):
    """Only read by the ray launcher."""

    address: str | None = None
    """A running Ray cluster ("auto" or host:port); null starts a private one that ends with Baton."""
    cpus_per_rank: float = Field(default=0.01, gt=0, le=1024)
    """CPU resource that Ray books for each rank; cores and compute threads are set in `cpu`."""


class MetricsConfig(Section):
    """Prometheus metrics of workers (the router always serves /metrics on its HTTP port)."""

    enabled: bool = True
    """Whether every worker serves metrics on a port of its own."""
    host: str = "127.0.0.1"
    """Interface of these ports."""
    vllm_aliases: bool = True
    """Whether /metrics/vllm repeats what gateways and dashboards look for under the names of vLLM."""


class LogConfig(Section):
    """Logs of every process."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level written."""
    format: Literal["human", "json"] = "human"
    """Lines for people, or one JSON object per line."""
    requests: bool = True
    """Whether each router writes a line for each generation."""


class FaultsConfig(Section):
    """Things that go wrong on purpose, to see what a cluster makes of them; BATON_FAULTS adds rules to these."""

    rules: FaultRules = ()
    """For example [decode-0 emit nth=7 kill]: where, at which point, when, and what; a list, or text with ; between."""
    allow_at_runtime: bool = False
    """Whether who reaches a worker's or router's port may set its faults, as `baton chaos` does; not in production."""


class ClusterConfig(Section):
    """A whole cluster."""

    name: str = Field(default="baton", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Tells clusters of one user apart: small letters, digits, dashes."""
    model: ModelConfig = ModelConfig()
    router: RouterConfig = RouterConfig()
    routing: RoutingConfig = RoutingConfig()
    admission: AdmissionConfig = AdmissionConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    kv: KvConfig = KvConfig()
    transfer: TransferConfig = TransferConfig()
    cpu: CpuConfig = CpuConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; auto takes a GPU when there is one."""
    gpu: GpuConfig = GpuConfig()
    deterministic: bool = False
    """On GPUs, the same tokens whatever else is in the batch, by fixed tiles and splits (slower). CPUs always do."""
    state: StateUrl = Field(default="memory://", repr=False)
    """What routers share; memory:// is each router's own, redis://host:6379/0 that of all, and lists instances too."""
    launcher: Literal["auto", "ray", "local"] = "auto"
    """ray, or local for plain processes; auto takes ray where it is installed."""
    ray: RayConfig = RayConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()
    log: LogConfig = LogConfig()
    faults: FaultsConfig = FaultsConfig()
    insecure: bool = False
    """Allow listening beyond this machine without an API key."""
    startup_timeout_s: Seconds = 300.0
    """How long `baton up` waits until every instance is ready."""
    step_timeout_s: Seconds = 30.0
    """A worker whose engine computes one step for longer, and for 20 times its longest one lately, is started anew."""
    stop_grace_s: Seconds = 10.0
    """How long an instance may take to end before it is killed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        transports = (self.transfer.transport,) if isinstance(self.transfer.transport, str) else self.transfer.transport
        on_gpu = [name for name in transports if name in DEVICE_TRANSPORTS]
        if on_gpu and self.device == "cpu":
            raise ValueError(
                f"transfer.transport: {', '.join(on_gpu)} moves pages between GPUs and device is cpu;"
                " take shm, gloo or auto, or set device: cuda"
            )
        replicas = {"router": self.router.replicas, "prefill": self.prefill.replicas, "decode": self.decode.replicas}
        if problem := unknown_name(map(parse_rule, self.faults.rules), replicas):
            raise ValueError(f"faults.rules: {problem}")
        if self.insecure:
            return self
        for key in ("http", "grpc", "admin"):
            host, _ = split_host_port(getattr(self.router, key))
            if not is_loopback(host) and self.router.api_key is None and not self.admission.has_keys:
                raise ValueError(
                    f"router.{key}: {host} is reachable from other machines and there is no API key;"
                    " set router.api_key, listen on 127.0.0.1, or say insecure: true"
                )
        for section, host in (
            ("prefill", self.prefill.host),
            ("decode", self.decode.host),
            ("metrics", self.metrics.host),
        ):
            if not is_loopback(host):
                reach = "auto is each node's own address, which is" if host == AUTO_HOST else f"{host} is"
                raise ValueError(
                    f"{section}.host: {reach} reachable from other machines and the workers' ports carry no key;"
                    " listen on 127.0.0.1, or say insecure: true inside a network that you trust"
                )
        return self

    @property
    def served_model_name(self) -> str:
        """The name clients use for the model."""
        return self.model.served_name or Path(self.model.path).name or self.model.path

    def cpu_of(self, role: str) -> CpuConfig:
        """Cores and threads of the pool of `role`."""
        return self.pool(role).cpu or self.cpu

    def gpu_of(self, role: str) -> GpuConfig:
        """Use of GPUs by the pool of `role`."""
        return self.pool(role).gpu or self.gpu

    @property
    def is_colocated(self) -> bool:
        """Whether decode workers prefill every prompt."""
        return self.prefill.replicas == 0

    @property
    def num_worker_ranks(self) -> int:
        """Processes of all prefill and decode instances."""
        return sum(pool.replicas * pool.num_ranks for pool in (self.prefill, self.decode))

    def num_ranks_of(self, role: str) -> int:
        """Processes of each instance of `role`; a router is one."""
        return 1 if role == "router" else self.pool(role).num_ranks

    def driver_rank_of(self, role: str) -> int:
        """The rank that speaks for an instance of `role`."""
        return 0 if role == "router" else self.pool(role).driver_rank

    def pool(self, role: str) -> PoolConfig:
        """The pool section of role "prefill" or "decode"."""
        assert role in ("prefill", "decode"), role
        return self.prefill if role == "prefill" else self.decode

    @property
    def max_local_prefill_tokens(self) -> int:
        """Prompt tokens that a decode worker computes in a step in which answers stream."""
        wanted = self.decode.max_prefill_tokens
        if wanted != "auto":
            return wanted
        if self.device == "cuda":
            return self.decode.max_batch_tokens
        return _COLOCATED_CHUNK_TOKENS if self.is_colocated else _LOCAL_CHUNK_TOKENS

    def block_size_of(self, role: str) -> int:
        """Tokens per KV block in the pool of `role`."""
        return self.pool(role).block_size or self.kv.block_size

    def num_blocks_of(self, role: str) -> int | None:
        """KV blocks of each instance in the pool of `role`; None means derive them from `kv.memory`."""
        return self.pool(role).num_blocks or self.kv.num_blocks


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Read a YAML file (None: only defaults), lay `overrides` ("prefill.replicas" -> value) over it, and check it.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), or a value outside its limits.
    """
    tree: dict[str, Any] = {}
    source = "configuration"
    if path is not None:
        source = str(path)
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold keys and values, found a {type(loaded).__name__}")
        # A section whose keys are all commented out reads as null; it means the defaults.
        tree = {key: value for key, value in (loaded or {}).items() if value is not None}
    for key, value in (overrides or {}).items():
        _put(tree, key, value)
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + explain(error, ClusterConfig)) from error


def config_from_json(text: str) -> ClusterConfig:
    """The inverse of `ClusterConfig.model_dump_json()`, for handing a checked configuration to another process.

    Raises:
        ConfigError: `text` is not such a dump.
    """
    try:
        return ClusterConfig.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError("configuration: " + explain(error, ClusterConfig)) from error


def add_faults(config: ClusterConfig, words: str) -> ClusterConfig:
    """`config` with the rules of BATON_FAULTS, `;` between them, after those of its own.

    Raises:
        ConfigError: names the rule and the word that is wrong.
    """
    tree = config.model_dump()
    tree["faults"]["rules"] = "\n".join([*config.faults.rules, words])
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("BATON_FAULTS: " + explain(error, ClusterConfig)) from error


def parse_override(text: str) -> tuple[str, Any]:
    """("prefill.replicas", 2) of "prefill.replicas=2"; the value is read as YAML.

    Raises:
        ConfigError: no "=", or the value is not YAML.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"{text!r} is not key=value, for example prefill.replicas=2")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"value of {key} is not valid YAML: {value!r}") from error


def json_schema() -> dict[str, Any]:
    """JSON schema of `cluster.yaml`, for editors."""
    schema = ClusterConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Baton cluster.yaml"}


def resolve_model_path(path: str) -> Path:
    """The checkpoint directory behind `model.path`: a shipped model, a directory, or a hub name (downloaded once).

    Raises:
        ConfigError: no such directory, or the hub cannot be reached or does not know the name.
    """
    directory = Path(path).expanduser()
    if path in SHIPPED_MODELS and not directory.is_dir():
        directory = ASSETS / path
        if not (directory / "config.json").is_file():
            raise ConfigError(
                f"model.path: the shipped model {path!r} is missing from {directory}; install Baton again"
            )
        return directory
    if directory.is_dir():
        return directory.resolve()
    if directory.exists():
        raise ConfigError(f"model.path: {path} is a file; give the directory that holds config.json and *.safetensors")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise ConfigError(f"model.path: there is no directory {path}")
    return _download(path)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"]))
    except Exception as error:
        # The hub client raises types of several HTTP libraries; all mean the same to the user.
        raise ConfigError(
            f"model.path: {name!r} is neither a directory here nor could it be fetched from the model hub"
            f" ({type(error).__name__}); check the name and the network, or give a checkpoint directory"
        ) from error


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
        tree = child
    tree[leaf] = value
