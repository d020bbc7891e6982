"""What the dispatcher tells the cost model, and what of it is published."""

from __future__ import annotations

from tests.router.harness import Harness

from baton.metrics import Metrics
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.cost_ledger import CostLedger
from baton.router.costs.model import CostModel
from baton.router.instances import Instance


def test_steps_and_replies_reach_the_model_by_worker() -> None:
    costs = CostModel()
    ledger = CostLedger(costs, Metrics("router"))
    status = pb.WorkerStatus(instance_id="decode-0", role="decode", incarnation=b"1")
    sample = pb.StepSample(decode_rows=4, decode_context_tokens=400, step_s=0.004)
    ledger.steps(Instance(status=status), [sample] * 20)
    ledger.steps(Instance(status=pb.WorkerStatus(instance_id="router-0", role="router")), [sample] * 20)
    ledger.handed_over("prefill-0", "decode-0", pb.PrefillReply(shipped_tokens=100, exposed_transfer_s=0.02))
    report = costs.report()
    assert list(report["steps"]["instances"]) == ["decode-0"]
    assert report["steps"]["pools"]["decode"]["samples"] == 17
    assert report["transfers"]["links"]["prefill-0>decode-0"]["samples"] == 1


async def test_choices_and_errors_are_published(router: Harness) -> None:
    await router.post("/v1/completions", {"prompt": [20] * 200, "max_tokens": 2})
    await router.post("/v1/completions", {"prompt": [21] * 16, "max_tokens": 2})
    told = (await router.http.get(f"{router.http_url}/metrics")).text
    assert 'baton_routing_choices_total{option="handover",reason="cheapest",role="router"} 1.0' in told
    assert 'baton_routing_choices_total{option="local",reason="cheapest",role="router"} 1.0' in told
    # The worker that computed the prompt in the end says for which way the time speaks.
    assert 'baton_predicted_ttft_error_ratio{option="local",role="router"}' in told
