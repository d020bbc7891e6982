"""Which transport a link uses, decided from names alone. Pure.

The sender offers what it has in order of preference, the receiver takes the first that both can do. `auto` prefers
memory that the two share over the network, and GPU memory over the way through the host:

    both pools on GPUs of one host     cuda_ipc, nccl, shm, gloo
    both on GPUs, different hosts      nccl, gloo
    one of them on CPU, one host       shm, gloo
    one of them on CPU, different      gloo
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from baton.errors import ConfigError

__all__ = ["GPU_ONLY", "TRANSPORT_NAMES", "candidates", "preference", "why_none"]

# In the order of `auto`.
TRANSPORT_NAMES = ("cuda_ipc", "nccl", "shm", "gloo")
GPU_ONLY = frozenset({"cuda_ipc", "nccl"})
_SAME_HOST_ONLY = frozenset({"cuda_ipc", "shm"})


def preference(choice: str | Sequence[str]) -> tuple[str, ...]:
    """Names in order of preference for `transfer.transport`: "auto", a name, or several of them.

    Raises:
        ConfigError: an unknown or repeated name, or none at all.
    """
    if choice == "auto":
        return TRANSPORT_NAMES
    names = (choice,) if isinstance(choice, str) else tuple(choice)
    for name in names:
        if name not in TRANSPORT_NAMES:
            raise ConfigError(f"transfer.transport is {name!r}; it must be one of auto, {', '.join(TRANSPORT_NAMES)}")
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"transfer.transport is {list(names)}; it must name each transport once, and at least one")
    return names


def candidates(
    offered: Sequence[str], available: Sequence[str], *, sender_host_id: str, receiver_host_id: str
) -> tuple[str, ...]:
    """Names that both sides have and that their hosts allow, in the sender's order."""
    same_host = _is_same_host(sender_host_id, receiver_host_id)
    return tuple(name for name in offered if name in available and (same_host or name not in _SAME_HOST_ONLY))


def why_none(
    offered: Sequence[str],
    available: Sequence[str],
    *,
    sender_host_id: str,
    receiver_host_id: str,
    failures: Mapping[str, str],
) -> str:
    """For people: every transport that either side has, and why it cannot be used.

    Args:
        failures: why those failed that were tried, by name.
    """
    same_host = _is_same_host(sender_host_id, receiver_host_id)

    def reason(name: str) -> str:
        if name in failures:
            return failures[name]
        if name not in offered:
            return "the sender does not offer it"
        if name not in available:
            return "the receiver does not have it"
        assert not same_host, f"{name} was a candidate and is said to have neither worked nor failed"
        return f"host {sender_host_id or 'unknown'} of the sender is not the receiver's {receiver_host_id or 'unknown'}"

    names = _ordered((*offered, *available, *failures))
    return "; ".join(f"{name}: {reason(name)}" for name in names) or "neither side has any"


def _is_same_host(sender_host_id: str, receiver_host_id: str) -> bool:
    return bool(sender_host_id) and sender_host_id == receiver_host_id


def _ordered(names: Iterable[str]) -> list[str]:
    """Each name once: ours as `auto` orders them, then those we do not know."""
    distinct = set(names)
    return [name for name in TRANSPORT_NAMES if name in distinct] + sorted(distinct - set(TRANSPORT_NAMES))
