"""Values of `cluster.yaml` that are more than a number or a word: sizes, addresses, transports. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import BeforeValidator, Field, WithJsonSchema

from baton.errors import ConfigError
from baton.fault_rules import parse_rules

__all__ = [
    "AUTO_HOST",
    "DEVICE_TRANSPORTS",
    "TRANSPORTS",
    "Address",
    "Bytes",
    "BytesOrAuto",
    "Cores",
    "FaultRules",
    "Port",
    "Seconds",
    "StateUrl",
    "Transports",
    "format_bytes",
    "is_loopback",
    "parse_bytes",
    "split_host_port",
    "without_password",
]

AUTO_HOST = "auto"
"""For a pool's host: the address of the node on which a rank runs."""
TRANSPORTS = ("shm", "gloo", "nccl", "cuda_ipc")
DEVICE_TRANSPORTS = ("nccl", "cuda_ipc")
"""Those that move pages from GPU to GPU, and nothing else."""

_BYTE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _BYTE_UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power, _letter: 1024**_power}
_MAX_BYTES = 1 << 50
_MAX_CORE = 255


def parse_bytes(text: str | int) -> int:
    """Bytes of "64MiB", "2GB", "1.5 GiB", "4096" or 4096 (K, M, G, T alone are powers of 1024).

    Raises:
        ValueError: not a size, not positive, or above 1 PiB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if isinstance(text, bool) or match is None or match[2].lower() not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not a size in bytes; write a number or for example 64MiB or 2GiB")
    num_bytes = int(float(match[1]) * _BYTE_UNITS[match[2].lower()])
    if not 0 < num_bytes <= _MAX_BYTES:
        raise ValueError(f"{text!r} is outside 1 byte to 1 PiB")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """A size for people, in powers of 1024: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def split_host_port(address: str) -> tuple[str, int]:
    """("127.0.0.1", 8000) of "127.0.0.1:8000"; "[::1]:8000" for IPv6, brackets dropped. Port 0 picks a free one.

    Raises:
        ValueError: not host:port.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port with a port of 0 to 65535, for example 127.0.0.1:8000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def without_password(url: str) -> str:
    """A URL to be shown: without user and password, and without options."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host` (a name or an IP address)."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_address(address: object) -> str:
    if not isinstance(address, str):
        raise ValueError(f"{address!r} is not host:port, for example 127.0.0.1:8000")
    split_host_port(address)
    return address


def _bytes_or_auto(value: Any) -> Any:
    return value if value == "auto" else parse_bytes(value)


def _cores(value: object) -> str | tuple[int, ...]:
    """ "auto", or core numbers in ascending order: of "0-3,8", [0, 1] or 2."""
    if value == "auto":
        return "auto"
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    cores: set[int] = set()
    for part in parts:
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", str(part))
        if isinstance(part, bool) or match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{value!r} is not a set of cores; write auto, a list such as [0, 1], or 0-3,8")
        cores |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not cores or max(cores) > _MAX_CORE:
        raise ValueError(f"{value!r} is not a set of cores of 0 to {_MAX_CORE}")
    return tuple(sorted(cores))


def _transports(value: object) -> str | tuple[str, ...]:
    """ "auto", one name, or several in order of preference."""
    names = tuple(value) if isinstance(value, list | tuple) else (value,)
    if value == "auto":
        return "auto"
    if not names or len(set(names)) < len(names) or not set(names) <= set(TRANSPORTS):
        raise ValueError(
            f"{value!r} is not a choice of transports; write auto, one of {', '.join(TRANSPORTS)},"
            " or a list of these, the preferred one first"
        )
    return names if isinstance(value, list | tuple) else str(value)


def _fault_rules(value: object) -> tuple[str, ...]:
    """The words of every rule, in one form, of a list of rules or of a text that holds several."""
    lines = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{value!r} is not a list of rules; write for example [decode-0 emit nth=7 kill]")
    try:
        return tuple(str(rule) for line in lines for rule in parse_rules(line))
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _state_url(value: object) -> str:
    """ "memory://", or the URL of a Redis; of its options only those of TLS, since timeouts are ours to set."""
    example = "write memory://, redis://host:6379/0, or rediss://host:6379/0 for TLS"
    if value == "memory://":
        return "memory://"
    try:
        parts = urlsplit(str(value))
        is_fine = parts.scheme in ("redis", "rediss") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_fine = False
    # The text itself may hold a password.
    if not is_fine or not re.fullmatch(r"(/\d{0,5})?", parts.path) or parts.fragment:
        raise ValueError(f"not a place for shared state; {example}")
    strange = sorted({name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if name[:4] != "ssl_"})
    if strange:
        raise ValueError(f"options of a Redis are those that begin with ssl_, not {', '.join(strange)}")
    return str(value)


Address = Annotated[str, BeforeValidator(_check_address)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema({"type": ["integer", "string"]})]
BytesOrAuto = Annotated[
    int | Literal["auto"], BeforeValidator(_bytes_or_auto), WithJsonSchema({"type": ["integer", "string"]})
]
Cores = Annotated[
    Literal["auto"] | tuple[int, ...],
    BeforeValidator(_cores),
    WithJsonSchema({"anyOf": [{"type": ["string", "integer"]}, {"type": "array", "items": {"type": "integer"}}]}),
]
Transports = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_transports),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": ["auto", *TRANSPORTS]},
                {"type": "array", "items": {"enum": list(TRANSPORTS)}, "minItems": 1, "uniqueItems": True},
            ]
        }
    ),
]
FaultRules = Annotated[
    tuple[str, ...],
    BeforeValidator(_fault_rules),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
StateUrl = Annotated[
    str, BeforeValidator(_state_url), WithJsonSchema({"type": "string", "pattern": r"^(memory://|rediss?://\S+)$"})
]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
