"""What `baton chaos` and the soak can do to a cluster, and when. Pure.

    scenario = find("kill-decode")
    for strike in strikes_of(scenario, duration_s=20, seed=1): ...      one fault after another, of one kind
    for strike in drawn_strikes(scenarios, duration_s=1200, every_s=10, seed=1): ...      of every kind, drawn

A strike is one fault: it begins at its time and, unless it is a kill, is lifted after the scenario's `hold_s`. Rules
are in the words of BATON_FAULTS; `{seed}` in them becomes the strike's own seed, so that a run can be done again, and
`{victim}` the instance that is hit.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from baton.errors import ConfigError

__all__ = ["SCENARIOS", "Kill", "Leave", "Rules", "Scenario", "Stop", "Strike", "drawn_strikes", "find", "strikes_of"]

_FIRST_S = 1.0


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to a rank of an instance of `role`: prefill, decode, router or controller."""

    role: str


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGSTOP to all ranks of an instance of `role`, and SIGCONT when the strike is over."""

    role: str


@dataclass(frozen=True, slots=True)
class Rules:
    """These fault rules in every router and worker. `victim`: a role; one instance of it is `{victim}` in the rules."""

    rules: tuple[str, ...]
    victim: str = ""


@dataclass(frozen=True, slots=True)
class Leave:
    """So many clients that begin a request and vanish."""

    clients: int


Act = Kill | Stop | Rules | Leave


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A kind of fault.

    Attributes:
        description: for `--list`: what is done, and what may be expected.
        hold_s: how long a strike lasts; 0 for what cannot be lifted.
        every_s: from the beginning of one strike to the next.
    """

    name: str
    description: str
    act: Act
    hold_s: float = 0.0
    every_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One fault.

    Attributes:
        at_s: after the load began.
        turn: counts up.
        seed: of what is drawn in it.
    """

    at_s: float
    scenario: Scenario
    turn: int
    seed: int

    def rules(self, victim: str = "") -> tuple[str, ...]:
        """The rules of this strike, all filled in."""
        act = self.scenario.act
        rules = act.rules if isinstance(act, Rules) else ()
        return tuple(rule.replace("{seed}", str(self.seed)).replace("{victim}", victim) for rule in rules)


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            name="kill-decode",
            description="SIGKILL a decode worker, in turn: its streams go on elsewhere with the same tokens",
            act=Kill("decode"),
        ),
        Scenario(
            name="kill-prefill",
            description="SIGKILL a prefill worker, in turn: prompts go to another one, or to the decode worker",
            act=Kill("prefill"),
        ),
        Scenario(
            name="stop-decode",
            description="SIGSTOP a decode worker for 3 s: it is taken for lost, and welcome when it goes on",
            act=Stop("decode"),
            hold_s=3.0,
            every_s=6.0,
        ),
        Scenario(
            name="stop-prefill",
            description="SIGSTOP a prefill worker for 3 s: prompts that it holds are computed elsewhere",
            act=Stop("prefill"),
            hold_s=3.0,
            every_s=6.0,
        ),
        Scenario(
            name="kill-router",
            description="SIGKILL a router, in turn: clients come back through another one (router.replicas > 1)",
            act=Kill("router"),
        ),
        Scenario(
            name="kill-controller",
            description="SIGKILL the controller: what runs goes on, and everybody registers again when it is back",
            act=Kill("controller"),
            every_s=15.0,
        ),
        Scenario(
            name="vanish",
            description="100 clients leave before the answer, during the prefill, at the first token, in mid-stream",
            act=Leave(100),
            every_s=4.0,
        ),
        Scenario(
            name="slow-link",
            description="a prefill worker's links carry one byte a second for 3 s: its prompts are computed elsewhere",
            act=Rules(
                ("{victim} rpc.send method=Handover.Ship slow rate=1", "{victim} transfer.post slow rate=1"), "prefill"
            ),
            hold_s=3.0,
            every_s=6.0,
        ),
        Scenario(
            name="half-open",
            description="connections to a decode worker stay open for 3 s, and nothing comes from it any more",
            act=Rules(
                (
                    "router rpc.receive peer={victim} method=Decode.Stream blackhole",
                    "prefill rpc.receive peer={victim} method=Handover.Ship blackhole",
                ),
                "decode",
            ),
            hold_s=3.0,
            every_s=8.0,
        ),
        Scenario(
            name="flip-bit",
            description="a bit of every 3rd KV payload flips on its way: refused by its checksum, computed again",
            act=Rules(("prefill transfer.post every=3 flip",)),
            hold_s=4.0,
            every_s=5.0,
        ),
        Scenario(
            name="lose-messages",
            description="5 % of all messages inside the cluster fail for 4 s, and their calls and streams with them",
            act=Rules(
                ("any rpc.send chance=0.05 seed={seed} fail", "any rpc.receive chance=0.05 seed={seed} fail"),
            ),
            hold_s=4.0,
            every_s=5.0,
        ),
        Scenario(
            name="slow-worker",
            description="every step of a decode worker takes 50 ms more for 3 s: it is alive, and best left alone",
            act=Rules(("{victim} step delay for=0.05",), "decode"),
            hold_s=3.0,
            every_s=6.0,
        ),
    )
}


def find(name: str) -> Scenario:
    """The scenario of that name.

    Raises:
        ConfigError: there is none; the text names those that are near.
    """
    if name in SCENARIOS:
        return SCENARIOS[name]
    near = difflib.get_close_matches(name, SCENARIOS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SCENARIOS)}"
    raise ConfigError(f"no scenario {name!r}; {hint}")


def strikes_of(scenario: Scenario, *, duration_s: float, seed: int, is_steady: bool = False) -> list[Strike]:
    """Strikes of one kind that begin and are lifted within `duration_s`; or, if `is_steady`, one that lasts all along.

    Raises:
        ConfigError: there is no time for one, or it does not last.
    """
    if is_steady:
        if not scenario.hold_s:
            raise ConfigError(f"{scenario.name} does not last, so it cannot be steady")
        scenario = replace(scenario, hold_s=max(scenario.hold_s, duration_s - _FIRST_S))
    needed_s = _FIRST_S + scenario.hold_s
    if duration_s < needed_s:
        raise ConfigError(f"{scenario.name} needs --duration {needed_s:g} or more, got {duration_s:g}")
    count = int((duration_s - needed_s) // scenario.every_s) + 1
    return [
        Strike(at_s=_FIRST_S + turn * scenario.every_s, scenario=scenario, turn=turn, seed=seed + turn)
        for turn in range(count)
    ]


def drawn_strikes(scenarios: Sequence[Scenario], *, duration_s: float, every_s: float, seed: int) -> Iterator[Strike]:
    """A strike every `every_s`, each of a kind that is drawn; no kind comes again before all others have come."""
    draw = random.Random(seed)
    left: list[Scenario] = []
    turn = 0
    while (at_s := (turn + 0.5) * every_s) < duration_s:
        if not left:
            left = draw.sample(list(scenarios), len(scenarios))
        scenario = left.pop()
        if at_s + scenario.hold_s <= duration_s:
            yield Strike(at_s=at_s, scenario=scenario, turn=turn, seed=draw.randrange(1 << 31))
        turn += 1
