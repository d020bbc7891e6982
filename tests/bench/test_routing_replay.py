"""The replay of traces: on a small one of conversations, KV-aware routing finds what turns around the pool do not."""

from __future__ import annotations

import random

from baton.cluster.loadgen.trace import BLOCK_TOKENS, TraceRow
from baton.config_routing import RoutingConfig
from baton.router.routing.policies import make_policy
from routing_replay import Service, replay

WORKERS = 4
SERVICE = Service(cached_tokens=200 * BLOCK_TOKENS)


def _conversations(num_conversations: int, turns: int) -> list[TraceRow]:
    """Each turn's prompt is the last one and some blocks more; all begin with one system prompt."""
    chance, rows, fresh = random.Random(5), [], iter(range(1, 10**6))
    for _ in range(num_conversations):
        at_s, names = chance.uniform(0, 600), [0]
        for _ in range(turns):
            names = [*names, *(next(fresh) for _ in range(chance.randrange(1, 6)))]
            tokens = len(names) * BLOCK_TOKENS - chance.randrange(BLOCK_TOKENS)
            rows.append(TraceRow(at_s, tokens, chance.randrange(1, 300), tuple(names)))
            at_s += chance.uniform(5, 60)
    return sorted(rows, key=lambda row: row.at_s)


def _figures(policy: str) -> dict[str, float]:
    made = make_policy(RoutingConfig(policy=policy, disaggregate="never"))  # type: ignore[arg-type]
    return replay(_conversations(80, 6), made, workers=WORKERS, service=SERVICE).as_dict()


def test_kv_aware_routing_finds_far_more_and_loads_all_alike() -> None:
    aware, turns = _figures("kv_aware"), _figures("round_robin")
    assert aware["hit_rate"] > 1.6 * turns["hit_rate"]
    assert aware["imbalance"] < 1.1
    assert aware["ttft_mean_s"] < turns["ttft_mean_s"]


def test_a_replay_is_the_same_every_time() -> None:
    first, second = _figures("random"), _figures("random")
    assert {**first, "choose_us": 0} == {**second, "choose_us": 0}
