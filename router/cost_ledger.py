"""Feeds the cost model from what passes through the dispatcher, and publishes how good it is: a thin shell.

steps that workers tell of --.
replies of prefill workers --+--> CostModel --> baton_predicted_ttft_error_ratio{option}
first tokens of requests ----'
choices -----------------------> baton_routing_choices_total{option, reason}
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.metrics import Metrics
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.costs.model import CostModel
from baton.router.costs.outcomes import Option
from baton.router.instances import Instance
from baton.router.routing.decision import Decision

__all__ = ["CostLedger"]


class CostLedger:
    """One router's."""

    def __init__(self, costs: CostModel, metrics: Metrics) -> None:
        self._costs = costs
        self._metrics = metrics

    def steps(self, instance: Instance, samples: Sequence[pb.StepSample]) -> None:
        """What some of a worker's steps did and took."""
        status = instance.status
        self._costs.learn_steps(instance.instance_id, status.incarnation, status.role, samples)

    def chosen(self, decision: Decision) -> None:
        """A request is about to be served so."""
        self._metrics.count_routing_choice(_option(decision), decision.handover.cause)

    def handed_over(self, prefill_id: str, decode_id: str, reply: pb.PrefillReply) -> None:
        """A prefill worker's pages have landed."""
        self._costs.learn_transfer(
            prefill_id, decode_id, tokens=reply.shipped_tokens, exposed_s=reply.exposed_transfer_s
        )

    def began(self, decision: Decision, reader_id: str, taken_s: float) -> None:
        """The first token came `taken_s` after the choice; `reader_id` computed the prompt in the end."""
        if reader_id != (decision.prefill_id or decision.decode_id):
            return
        self._costs.learn_outcome(decision.handover.chosen.prediction, taken_s)
        option = _option(decision)
        self._metrics.set_predicted_ttft_error(option, self._costs.error_ratio(option))


def _option(decision: Decision) -> Option:
    return "local" if decision.prefill_id is None else "handover"
