"""What happens in one run: topology, sizes, requests and faults, all drawn from the seed. Values only.

Everything is small on purpose: pools of a few dozen blocks so that requests wait and are preempted, blocks of a few
tokens so that prompts share some, prompts and answers of a few tokens so that a run costs milliseconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.simulation.model import VOCAB_SIZE
from tests.simulation.network import Path

from baton.config import ClusterConfig
from baton.engine.request import SamplingParams

__all__ = ["AMPLE_S", "Fault", "PlannedRequest", "Scenario"]

AMPLE_S = 40.0
"""A deadline that every fault of a run leaves time enough for."""

_FIRST_S, _LAST_S = 0.6, 2.2
_MODEL_LEN = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: a method of `faults.Faults`.
        target, other: processes concerned, by name.
        duration_s: until it is undone, where it can be.
        nth: which message or payload, counted from `time_s`.
        detail: see the kind.
    """

    time_s: float
    kind: str
    target: str = ""
    other: str = ""
    duration_s: float = 0.0
    nth: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One client's request, one answer each.

    Attributes:
        timeout_s: its deadline.
        leave_s: the client goes after so long; infinite: it stays.
        leave_tokens: the client goes after so many tokens; 0: it stays.
        read_s: pause between reading one piece of the answer and the next.
        uses_sink: plain tokens go the short way.
    """

    name: str
    time_s: float
    prompt: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float
    leave_s: float = float("inf")
    leave_tokens: int = 0
    read_s: float = 0.0
    uses_sink: bool = False
    priority: int = 0

    @property
    def is_ample(self) -> bool:
        """Nothing but its client can keep it from being answered."""
        return self.timeout_s >= AMPLE_S


@dataclass(slots=True)
class Scenario:
    """Drawn by `draw`."""

    seed: int
    config: ClusterConfig
    has_lanes: bool
    transports: tuple[str, ...]
    arena_bytes: int
    payload_seconds_per_byte: float
    num_layers: int
    layers_per_group: int
    load_s: float
    step_base_s: float
    step_token_s: float
    copy_s: float
    spike: float
    jitter_s: float
    requests: list[PlannedRequest] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def random(self, name: str) -> random.Random:
        """See `World.random`."""
        return random.Random(f"{self.seed}/{name}")

    def make_path(self) -> Path:
        """The network between two processes."""
        return Path(jitter_s=self.jitter_s, spike=self.spike)

    @property
    def workers(self) -> list[str]:
        """Their names."""
        counts = {"decode": self.config.decode.replicas, "prefill": self.config.prefill.replicas}
        return [f"{role}-{index}" for role, count in counts.items() for index in range(count)]

    @property
    def routers(self) -> list[str]:
        """Their names."""
        return [f"router-{index}" for index in range(self.config.router.replicas)]

    @classmethod
    def draw(cls, seed: int) -> Scenario:
        """The scenario of a seed."""
        chance = random.Random(f"{seed}/scenario")
        scenario = cls(
            seed=seed,
            config=_draw_config(chance),
            has_lanes=chance.random() < 0.6,
            transports=chance.choice([("shm",), ("shm", "gloo"), ("gloo",)]),
            arena_bytes=chance.choice([2048, 8192]),
            payload_seconds_per_byte=chance.choice([0.0, 1e-6, 2e-5]),
            num_layers=chance.choice([1, 2, 3]),
            layers_per_group=chance.choice([1, 2]),
            load_s=chance.uniform(0.02, 0.3),
            step_base_s=chance.choice([0.01, 0.02, 0.04]),
            step_token_s=chance.choice([0.0002, 0.002]),
            copy_s=chance.choice([1e-5, 1e-3, 8e-3]),
            spike=chance.choice([0.0, 0.0, 0.01]),
            jitter_s=chance.choice([1e-4, 2e-3]),
        )
        scenario.requests = _draw_requests(chance)
        scenario.faults = _draw_faults(chance, scenario)
        return scenario

    def describe(self) -> str:
        """For people."""
        config = self.config
        lines = [
            f"seed {self.seed}: {config.decode.replicas} decode, {config.prefill.replicas} prefill,"
            f" {config.router.replicas} router; blocks of {config.kv.block_size}:"
            f" {config.decode.num_blocks} decode, {config.prefill.num_blocks} prefill;"
            f" batch {config.decode.max_batch_size}; transports {self.transports}, lanes {self.has_lanes};"
            f" lease {config.transfer.lease_s:g} s, handover {config.transfer.handover_timeout_s:g} s,"
            f" silence {config.router.silence_s:g} s"
        ]
        lines += [
            f"  {request.time_s:7.3f} {request.name}: {len(request.prompt)}+{request.sampling.max_tokens} tokens,"
            f" timeout {request.timeout_s:.2f} s, leaves {request.leave_s:.2f} s / {request.leave_tokens} tokens,"
            f" temperature {request.sampling.temperature:g}"
            for request in self.requests
        ]
        lines += [
            f"  {fault.time_s:7.3f} {fault.kind} {fault.target} {fault.other} {fault.detail}"
            f" nth {fault.nth} for {fault.duration_s:.2f} s"
            for fault in self.faults
        ]
        return "\n".join(lines)


def _draw_config(chance: random.Random) -> ClusterConfig:
    block_size = chance.choice([2, 4])
    least = -(-_MODEL_LEN // block_size)
    config = ClusterConfig.model_validate(
        {
            "model": {"max_model_len": _MODEL_LEN},
            "router": {
                "grpc": "127.0.0.1:0",
                "http": "127.0.0.1:0",
                "request_timeout_s": 60.0,
                "silence_s": chance.choice([0.5, 1.0]),
                "max_queued_requests": chance.choice([64, 64, 4]),
            },
            # Prompts are so short here that the router would seldom choose to hand one over.
            "routing": {"disaggregate": chance.choice(["always", "always", "always", "auto"])},
            "prefill": {
                "replicas": chance.choice([0, 1, 1, 2]),
                "max_batch_tokens": chance.choice([8, 64]),
                "max_batch_size": chance.choice([1, 4]),
                "num_blocks": int(least * chance.choice([1.0, 1.5, 3.0])),
                "block_size": chance.choice([block_size, block_size, 3]) if chance.random() < 0.3 else block_size,
                "port": chance.choice([0, 30_100]),
            },
            "decode": {
                "replicas": chance.choice([1, 2, 2, 3]),
                "max_batch_tokens": chance.choice([8, 64]),
                "max_batch_size": chance.choice([2, 4, 8]),
                "num_blocks": int(least * chance.choice([1.0, 1.2, 2.0])),
                "block_size": block_size,
                "max_prefill_tokens": chance.choice([4, 16]),
                "port": chance.choice([0, 30_200]),
            },
            "kv": {"block_size": block_size},
            "transfer": {
                "lease_s": chance.choice([1.0, 2.0]),
                "handover_timeout_s": chance.choice([1.0, 3.0]),
                "one_message_below_tokens": chance.choice([0, 16]),
            },
            "metrics": {"enabled": False},
            "launcher": "local",
            "step_timeout_s": 5.0,
            "stop_grace_s": chance.choice([0.5, 2.0]),
        }
    )
    prefill = config.prefill
    if prefill.block_size == 3:
        prefill = prefill.model_copy(update={"num_blocks": prefill.num_blocks * 2})
    router = config.router.model_copy(update={"replicas": chance.choice([1, 1, 1, 2])})
    is_shared = router.replicas > 1 or chance.random() < 0.2
    state = "simulated://" if is_shared else "memory://"
    return config.model_copy(update={"router": router, "prefill": prefill, "state": state})


def _draw_requests(chance: random.Random) -> list[PlannedRequest]:
    heads = [tuple(chance.randrange(2, VOCAB_SIZE) for _ in range(12)) for _ in range(2)]
    requests = []
    bursts = [chance.uniform(_FIRST_S, _LAST_S - 0.4) for _ in range(chance.randint(1, 3))]
    for number in range(chance.randint(3, 10)):
        head = chance.choice(heads)[: chance.choice([0, 4, 8, 12])]
        tail = tuple(chance.randrange(2, VOCAB_SIZE) for _ in range(chance.randint(1, 10)))
        prompt = head + tail
        sampling = SamplingParams(
            max_tokens=chance.choice([1, 4, 12, 24]),
            min_tokens=chance.choice([0, 0, 2]),
            temperature=chance.choice([0.0, 0.0, 0.7, 1.5]),
            top_k=chance.choice([0, 0, 5]),
            seed=chance.getrandbits(32),
            repetition_penalty=chance.choice([1.0, 1.0, 1.3]),
            ignore_eos=chance.random() < 0.3,
            stop_token_ids=(chance.randrange(2, VOCAB_SIZE),) if chance.random() < 0.2 else (),
            logprobs=chance.choice([None, None, None, 1]),
        )
        leaves = chance.random()
        requests.append(
            PlannedRequest(
                name=f"r{number}",
                time_s=chance.choice(bursts) + chance.choice([0.0, chance.uniform(0.0, 0.3)]),
                prompt=prompt,
                sampling=sampling,
                timeout_s=chance.uniform(0.05, 2.0) if chance.random() < 0.15 else AMPLE_S,
                leave_s=chance.uniform(0.0, 1.0) if leaves < 0.12 else float("inf"),
                leave_tokens=chance.randint(1, 5) if 0.12 <= leaves < 0.24 else 0,
                read_s=chance.choice([0.0, 0.0, 0.0, 0.05]),
                uses_sink=chance.random() < 0.4,
                priority=chance.choice([0, 0, 1]),
            )
        )
    return sorted(requests, key=lambda request: request.time_s)


# How often each kind of fault is drawn.
_WEIGHTS = {
    "crash": 5,
    "vanish": 2,
    "storm": 2,
    "pause": 4,
    "hiccup": 2,
    "cut": 3,
    "half_cut": 3,
    "break_connections": 4,
    "slow_link": 2,
    "slow_worker": 2,
    "handover_message": 4,
    "break_at_message": 4,
    "flip": 3,
    "fail_payload": 2,
    "registry_away": 2,
    "terminate": 2,
    "crash_router": 1,
    "crash_controller": 2,
    "state_away": 2,
    "state_lost": 1,
}


def _draw_faults(chance: random.Random, scenario: Scenario) -> list[Fault]:
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    workers, routers = scenario.workers, scenario.routers
    everyone = [*workers, *routers]
    faults = []
    for _ in range(chance.choice([0, 1, 1, 2, 2, 3, 4, 6])):
        kind = chance.choices(kinds, weights)[0]
        target, other = chance.choice(workers), chance.choice(everyone)
        if kind in ("crash_controller", "state_away", "state_lost"):
            target, other = "controller", ""
        elif kind == "registry_away":
            target, other = "controller", chance.choice(["pause", "cut"])
        elif kind == "crash_router":
            target = chance.choice(routers)
        elif other == target:
            other = chance.choice(routers)
        details = {
            "handover_message": ["drop", "duplicate"],
            "break_at_message": ["/baton.v1.Decode/Stream", "/baton.v1.Handover/Ship", "/baton.v1.Prefill/Prefill"],
        }
        duration_s = {"hiccup": chance.uniform(0.02, 0.3)}.get(kind, chance.uniform(0.1, 2.5))
        faults.append(
            Fault(
                time_s=chance.uniform(_FIRST_S - 0.1, _LAST_S),
                kind=kind,
                target=target,
                other=other,
                duration_s=duration_s,
                nth=chance.randint(1, 12),
                detail=chance.choice(details.get(kind, [""])),
            )
        )
    return sorted(faults, key=lambda fault: fault.time_s)
