"""Configuration: defaults, limits, and errors that name the key, its path and the nearest valid one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from baton.cluster.config_text import config_text
from baton.config import (
    ClusterConfig,
    config_from_json,
    format_bytes,
    is_loopback,
    json_schema,
    load_config,
    parse_bytes,
    parse_override,
    resolve_model_path,
    split_host_port,
)
from baton.errors import ConfigError


def test_without_a_file_every_setting_has_its_default() -> None:
    config = load_config()
    assert config.prefill.max_batch_size == 16
    assert config.decode.max_batch_size == 64
    assert config.decode.max_batch_tokens == 512
    assert config.transfer.arena == 64 << 20
    assert config.served_model_name == "tiny"


def test_the_example_of_the_repository_loads() -> None:
    example = Path(__file__).parent.parent / "deploy" / "examples" / "cluster.yaml"
    assert load_config(example) == load_config()
    for other in example.parent.glob("*.yaml"):
        assert load_config(other).launcher in ("auto", "ray", "local")


def test_a_pool_may_use_gpus_in_its_own_way() -> None:
    config = load_config(None, {"gpu.memory_fraction": 0.9, "prefill.gpu.memory_fraction": 0.3})
    assert config.gpu_of("prefill").memory_fraction == 0.3
    assert config.gpu_of("decode").memory_fraction == 0.9
    assert config.gpu_of("prefill").cuda_graphs
    assert not config.deterministic
    with pytest.raises(ConfigError, match=r"gpu\.memory_fraction"):
        load_config(None, {"gpu.memory_fraction": 1.5})


def test_routers_may_be_many_and_share_state() -> None:
    config = load_config(None, {"router.replicas": 3, "state": "rediss://me:word@host:6380/2?ssl_ca_certs=ca.pem"})
    assert config.router.replicas == 3
    assert config.state.endswith("ca.pem")
    assert "word" not in repr(config)
    assert "rediss://********@host:6380/2" in config_text(config)
    assert "word" not in config_text(config).replace("password", "")
    with pytest.raises(ConfigError, match="state") as caught:
        load_config(None, {"state": "redis://me:word@host:x/0"})
    assert "word" not in str(caught.value)
    assert load_config(None, {"router.replicas": 2}).state == "memory://"


def test_file_then_overrides_then_defaults(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("prefill: {replicas: 2, max_batch_tokens: 1024}\nkv: {memory: 2GiB}\ndecode:\n")
    config = load_config(path, {"prefill.replicas": 3})
    assert config.prefill.replicas == 3
    assert config.prefill.max_batch_tokens == 1024
    assert config.kv.memory == 2 << 30
    assert config.decode == ClusterConfig().decode


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"prefill.replica": 2}, ["prefill.replica", "did you mean prefill.replicas?"]),
        ({"prefil.replicas": 2}, ["unknown key prefil", "did you mean prefill?"]),
        ({"kv.block-size": 2}, ["kv.block-size", "did you mean kv.block_size?"]),
        ({"kv.lease_s": 2}, ["unknown key kv.lease_s", "did you mean transfer.lease_s?"]),
        ({"kv.zzzzzz": 2}, ["valid keys: block_size, memory, num_blocks"]),
        ({"kv.memory": "lots"}, ["kv.memory", "'lots'", "64MiB"]),
        ({"prefill.max_batch_size": 0}, ["prefill.max_batch_size", "greater than or equal to 1", "got 0"]),
        ({"decode.tensor_parallel": 0}, ["decode.tensor_parallel", "greater than or equal to 1"]),
        (
            {"prefill.port": 65530, "prefill.replicas": 2, "prefill.tensor_parallel": 4},
            ["port=65530", "2 replicas of 4"],
        ),
        ({"router.replicas": 0}, ["router.replicas", "greater than or equal to 1"]),
        ({"router.replicas": 65}, ["router.replicas", "less than or equal to 64"]),
        ({"transfer.rate_limit_gbit_s": 10}, ["transfer", "rate_limit_gbit_s", "gloo only, not for auto"]),
        (
            {"transfer.rate_limit_gbit_s": 10, "transfer.transport": ["gloo", "shm"]},
            ["rate_limit_gbit_s", "gloo only, not for [gloo, shm]"],
        ),
        ({"transfer.transport": "tcp"}, ["transfer.transport: 'tcp'", "auto, one of shm, gloo, nccl, cuda_ipc"]),
        ({"transfer.transport": []}, ["transfer.transport: []"]),
        ({"transfer.transport": ["shm", "shm"]}, ["transfer.transport", "a list of these"]),
        ({"transfer.transport": ["nccl", "gloo"], "device": "cpu"}, ["transfer.transport: nccl", "device is cpu"]),
        ({"prefill.host": "auto"}, ["prefill.host: auto", "insecure: true"]),
        ({"transfer.transport": "gloo", "transfer.rate_limit_gbit_s": 0}, ["rate_limit_gbit_s", "greater than 0"]),
        ({"decode.max_batch_tokens": 8}, ["max_batch_tokens=8", "max_batch_size=64"]),
        ({"router.http": "localhost"}, ["router.http", "host:port"]),
        ({"router.http": "127.0.0.1:99999"}, ["router.http", "65535"]),
        ({"state": "mysql://x"}, ["state", "redis://host:6379/0"]),
        ({"state": "redis://"}, ["state", "redis://host:6379/0"]),
        ({"state": "redis://host:port/0"}, ["state", "redis://host:6379/0"]),
        ({"state": "redis://host/zero"}, ["state", "redis://host:6379/0"]),
        ({"state": "redis://host/0?socket_timeout=900&ssl_cert_reqs=none"}, ["begin with ssl_, not socket_timeout"]),
        ({"device": "tpu"}, ["device", "'tpu'"]),
        ({"prefill.port": 65535, "prefill.replicas": 2}, ["port=65535"]),
        ({"name": "../x"}, ["name"]),
        ({"cpu.cores": "two"}, ["cpu.cores: 'two'", "0-3,8"]),
        ({"decode.cpu": {"cores": "3-1"}}, ["decode.cpu.cores: '3-1'"]),
        ({"cpu.cores": [0, 256]}, ["cpu.cores", "0 to 255"]),
        ({"cpu.cores": []}, ["cpu.cores"]),
        ({"decode.cpu.threads": 0}, ["decode.cpu.threads", "greater than or equal to 1"]),
        ({"prefill.replicas": -1}, ["prefill.replicas", "greater than or equal to 0"]),
        ({"model": "tiny"}, ["model"]),
    ],
)
def test_a_wrong_setting_is_told_with_its_path(overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("cores", ["0-2,8", [0, 1, 2, 8], [8, "0-2"], " 8, 0 - 2 "])
def test_cores_are_a_list_or_ranges(cores: object) -> None:
    config = load_config(None, {"prefill.cpu": {"cores": cores}, "cpu": {"cores": 4, "threads": 3}})
    assert config.cpu_of("prefill").cores == (0, 1, 2, 8)
    assert config.cpu_of("prefill").threads == "auto"
    assert config.cpu_of("decode").cores == (4,)
    assert config.cpu_of("decode").threads == 3
    assert config_from_json(config.model_dump_json()) == config


def test_without_prefill_workers_decode_workers_take_larger_pieces_of_prompts() -> None:
    config = load_config(None, {"prefill.replicas": 0})
    assert config.is_colocated
    assert config.num_worker_ranks == 1
    assert config.max_local_prefill_tokens > load_config().max_local_prefill_tokens
    assert load_config(None, {"decode.max_prefill_tokens": 7}).max_local_prefill_tokens == 7
    assert load_config(None, {"device": "cuda"}).max_local_prefill_tokens == load_config().decode.max_batch_tokens


def test_ports_count_over_ranks_and_instances() -> None:
    pool = load_config(None, {"decode.port": 7000, "decode.tensor_parallel": 2, "decode.pipeline_parallel": 2}).decode
    assert [pool.port_of(index, rank) for index in (0, 1) for rank in range(4)] == list(range(7000, 7008))
    assert pool.driver_rank == 2
    assert load_config().decode.port_of(3) == 0


def test_worker_ranks_are_those_of_both_pools() -> None:
    config = load_config(None, {"prefill.tensor_parallel": 2, "decode.pipeline_parallel": 2, "decode.replicas": 3})
    assert config.num_worker_ranks == 2 + 6
    assert [config.num_ranks_of(role) for role in ("router", "prefill", "decode")] == [1, 2, 2]


def test_transports_may_be_a_list_in_order_of_preference() -> None:
    config = load_config(None, {"transfer.transport": ["gloo", "shm"]})
    assert config.transfer.transport == ("gloo", "shm")
    assert config_from_json(config.model_dump_json()) == config
    assert ClusterConfig.model_validate(yaml.safe_load(config_text(config))) == config
    limited = load_config(None, {"transfer.transport": ["gloo"], "transfer.rate_limit_gbit_s": 10})
    assert limited.transfer.rate_limit_gbit_s == 10


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"kv.memry": 1, "decode.replicas": 0})
    assert "kv.memory" in str(caught.value)
    assert "decode.replicas" in str(caught.value)


@pytest.mark.parametrize("key", ["router.http", "router.grpc"])
def test_listening_beyond_this_machine_needs_a_key(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        load_config(None, {key: "0.0.0.0:8000"})
    assert load_config(None, {key: "0.0.0.0:8000", "router.api_key": "a-long-key"}).router.api_key == "a-long-key"
    assert load_config(None, {key: "0.0.0.0:8000", "insecure": True}).insecure


@pytest.mark.parametrize("section", ["prefill", "decode", "metrics"])
def test_workers_beyond_this_machine_must_be_asked_for(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.host"):
        load_config(None, {f"{section}.host": "0.0.0.0", "router.api_key": "a-long-key"})


def test_a_key_is_never_shown() -> None:
    config = load_config(None, {"router.api_key": "very-secret"})
    assert "very-secret" not in repr(config)
    assert "very-secret" not in config_text(config)
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"router.api_key": "short"})
    assert "'short'" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"), [("a: [", "not valid YAML"), ("- 1", "keys and values"), ("\xff", "not valid YAML")]
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=word):
        load_config(path)
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("64MiB", 64 << 20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), (4096, 4096), ("10k", 10_240), ("7b", 7)],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "1e9", "12 parsecs", "99999999TiB", True])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"size in bytes|outside"):
        parse_bytes(text)


@given(st.integers(1, 1 << 49))
def test_sizes_are_printed_to_a_tenth(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.06)


def test_addresses() -> None:
    assert split_host_port("[::1]:80") == ("::1", 80)
    assert split_host_port("example.org:0") == ("example.org", 0)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_overrides_are_yaml() -> None:
    assert parse_override("a.b=[1, 2]") == ("a.b", [1, 2])
    assert parse_override("a=") == ("a", None)
    for wrong in ("a", "=1", "a={"):
        with pytest.raises(ConfigError):
            parse_override(wrong)


def test_the_dump_for_another_process_loads_again() -> None:
    config = load_config(
        None, {"router.api_key": "a-long-key", "kv.memory": "1GiB", "transfer.layers_per_group": "auto"}
    )
    assert config_from_json(config.model_dump_json()) == config
    with pytest.raises(ConfigError, match="did you mean name"):
        config_from_json(json.dumps({"nme": 1}))


def test_the_commented_form_loads_again() -> None:
    config = load_config(None, {"kv.memory": "1GiB", "model.served_name": "a: b", "prefill.port": 7000})
    assert ClusterConfig.model_validate(yaml.safe_load(config_text(config))) == config


def test_names_of_classes_and_tenants_are_the_users(tmp_path: Path) -> None:
    config = load_config(
        None,
        {
            "admission.classes.gold.slo.ttft_ms": 500,
            "admission.default_class": "gold",
            "admission.tenants.acme": {"tokens_per_s": 1000, "api_keys": ["acme-secret-1", "acme-secret-2"]},
        },
    )
    assert list(config.admission.classes) == ["gold"]
    assert config_from_json(config.model_dump_json()) == config
    text = config_text(config)
    assert "secret" not in text
    assert "secret" not in repr(config)
    again = ClusterConfig.model_validate(yaml.safe_load(text))
    assert again.admission.classes == config.admission.classes
    assert len(again.admission.tenants["acme"].api_keys) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tenants.acme.wieght", 2, "did you mean admission.tenants.acme.weight?"),
        ("classes.gold.slo.ttft", 2, "did you mean admission.classes.gold.slo.ttft_ms?"),
        ("classes.gold.weight", -1, "admission.classes.gold.weight: input should be greater .* got -1"),
        ("tenants.a b.weight", 1, "should match pattern"),
        ("tenants.acme.burst_tokens", 5, "burst_tokens=5 means nothing without tokens_per_s"),
        ("default_class", "gold", "default_class='gold' is none of interactive, batch"),
        ("tenants", {"a": {"api_keys": ["k" * 8]}, "b": {"api_keys": ["k" * 8]}}, "tenants a and b have an API key"),
        ("tenants.acme.api_keys", ["short"], r"admission\.tenants\.acme\.api_keys: String should have at least 8"),
    ],
)
def test_wrong_admission_is_told_by_its_whole_path(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, {f"admission.{key}": value})
    assert "short" not in str(caught.value)
    assert "kkkk" not in str(caught.value)


def test_every_setting_is_described_and_in_the_schema() -> None:
    def walk(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            if isinstance(field.default, BaseModel):
                assert type(field.default).__doc__, name
                walk(type(field.default))
            else:
                assert field.description, name

    walk(ClusterConfig)
    assert json_schema()["additionalProperties"] is False
    assert json_schema()["$defs"]["KvConfig"]["properties"]["memory"]["type"] == ["integer", "string"]


def test_model_paths(tmp_path: Path) -> None:
    assert resolve_model_path(str(tmp_path)) == tmp_path.resolve()
    (tmp_path / "file").touch()
    for path in (str(tmp_path / "file"), str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(ConfigError, match=r"model\.path"):
            resolve_model_path(path)


def test_a_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match="check the name and the network"):
        resolve_model_path("owner/name")
