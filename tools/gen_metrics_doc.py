"""Writes docs/metrics.md from the families that the code makes; `--check` only says whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from baton.metrics import Metrics
from baton.vllm_metrics import ALIASES

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
_HEAD = """# Metrics

Made by `tools/gen_metrics_doc.py` from the code; a test compares the two. How to scrape, and what the phases of the
time until the first token mean, is in [observability.md](observability.md).

Every family has the label `role`: `router`, `prefill` or `decode`. A process makes all families; those that are not its
business stay at zero. Names are stable: one that is replaced goes on being told beside its successor for a while.

| name | type | labels | meaning |
|---|---|---|---|
"""
_LABELS = """
Values of labels:

| label | values |
|---|---|
| `finish_reason` | `stop`, `length`, `abort` (the client left or asked to stop), `error` |
| `instance` | a worker's name, as `baton status` shows it |
| `outcome` of handovers | `attached`, `failed`, `cancelled` |
| `outcome` of idempotent requests | `claimed`, `replayed`, `busy`, `refused`, \
`unavailable` (served as if without a key), \
`not_kept` (the answer), `lost` (the claim, to another router) |
| `outcome` of prefill retries | `attached` and `failed`: tries of another prefill worker; `none`: there was no other |
| `phase` of the first token | see [observability.md](observability.md) |
| `phase` of resumes | `begun`, `streaming`: how far the attempt that broke had come |
| `pool` | `prefill`, `decode` |
| `rank` | of an instance of several ranks |
| `reason` | why pages, tickets or links were refused; what was refused is computed again |
| `state` | of KV blocks: `free`, `cached` (kept, may be taken), `owned` |
"""
_ALIASES = """
## Under the names of vLLM

`/metrics/vllm`, or `/metrics?format=vllm`, repeats these with the labels `model_name` and `engine` (always 0), unless
`metrics.vllm_aliases` is false. The first five are the model server protocol of the Gateway API Inference Extension.
On a worker they speak of that worker; on a router of the cluster as one engine: requests summed over both pools and the
router's own queue, KV cache over the decode pool. Latencies are on the router's page.

| name | here |
|---|---|
| `vllm:num_requests_waiting` | `baton_requests_waiting` |
| `vllm:num_requests_running` | `baton_requests_running` |
| `vllm:kv_cache_usage_perc` | `baton_kv_usage_ratio` |
| `vllm:cache_config_info{block_size,num_gpu_blocks}` | `baton_kv_cache_info` |
| `vllm:lora_requests_info` | `baton_lora_adapters_max`: no adapters are served |
"""


def page() -> str:
    """The page as it should be."""
    collectors = list(Metrics("router").registry._collector_to_names)
    rows = []
    for collector in collectors:
        suffix = "_total" if collector._type == "counter" else ""
        labels = ", ".join(f"`{name}`" for name in collector._labelnames if name != "role")
        rows.append(f"| `{collector._name}{suffix}` | {collector._type} | {labels} | {collector._documentation} |\n")
    counters = {collector._name for collector in collectors if collector._type == "counter"}
    aliases = []
    for own, alias in ALIASES.items():
        suffix = "_total" if own in counters else ""
        aliases.append(f"| `{alias}{suffix}` | `{own}{suffix}` |\n")
    return _HEAD + "".join(sorted(rows)) + _LABELS + _ALIASES + "".join(aliases)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is not what the code says; run tools/gen_metrics_doc.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
