"""Which workers serve a request: pure. Filter -> score in [0, 1] -> pick, once for decode, once for prefill.

    decode profile  --> who writes the answer
    prefill profile --> who would read the prompt best
    handover choice --> whether it does, or the decode worker reads the prompt itself, by predicted times

The stages are in `routing/`; docs/routing.md tells them to users.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.costs import Costs, Prediction
from baton.router.routing.decision import Decision
from baton.router.routing.facts import InstanceView, RequestFacts
from baton.router.routing.filters import refusal
from baton.router.routing.handover_choice import choose_handover
from baton.router.routing.policies import Policy
from baton.router.routing.scene import Scene, cached_tokens

__all__ = ["choose"]


def choose(instances: Sequence[InstanceView], facts: RequestFacts, policy: Policy, costs: Costs) -> Decision:
    """The pair for one request.

    Raises:
        InvalidRequestError: no decode worker's KV memory can hold the prompt.
        UnavailableError: no decode worker is ready.
    """
    beside = [view for view in instances if view.role == "prefill" and view.usable]
    hosts = {view.host_id for view in beside if view.host_id}
    scene = Scene(facts, costs, partner_hosts=hosts, beside=beside)
    decode = policy.decode.run(instances, scene)
    if decode.chosen is None:
        raise refusal([view for view in instances if view.role == "decode"], facts)
    known: dict[str | None, Prediction] = {None: scene.prediction_of(decode.chosen)}
    scene = Scene(facts, costs, partner=decode.chosen)
    prefill = policy.prefill.run(instances, scene)
    best = []
    if prefill.chosen is not None:
        best = [prefill.chosen]
        known[prefill.chosen.instance_id] = scene.prediction_of(prefill.chosen)
    return Decision(
        policy=policy.name,
        mode=policy.mode,
        facts=facts,
        decode=decode,
        prefill=prefill,
        handover=choose_handover(decode.chosen, best, facts, costs, policy.mode, known),
        cached_tokens=cached_tokens(decode.chosen, facts),
    )
