"""Both workers with engines that launch steps ahead, as on a GPU: pages travel and blocks come back all the same."""

from __future__ import annotations

import asyncio

import pytest
from harness import expected, request, workers


async def test_handovers_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"overlap": True, "max_batch_tokens": 64, "layers_per_group": 3}
    async with workers(
        monkeypatch, {"transfer.one_message_below_tokens": 0}, decode_fake={"block_size": 8}, **options
    ) as both:
        router = await both.router()
        prompts = {f"r{i}": [(7 * i + j) % 500 for j in range(1 + 37 * i)] for i in range(9)}
        calls = []
        for index, (name, prompt) in enumerate(prompts.items()):
            # Some need the host to sample them, and so hold the others up for a step.
            sampling = {"logprobs": 1} if index % 3 == 0 else {}
            await router.submit(request(name, prompt, 20, **sampling), remote=True)
            calls.append(router.start_prefill(request(name, prompt, 20, **sampling)))
        assert await router.collect(*prompts) == [expected(prompt, 20) for prompt in prompts.values()]
        for call, prompt in zip(calls, prompts.values(), strict=True):
            assert (await call).shipped_tokens == len(prompt)
        await router.wait_until_settled()
        await router.close()


async def test_preemption_under_handovers_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_blocks": 24, "block_size": 8, "max_model_len": 160, "max_batch_size": 8}
    fake = {"decode_fake": small, "prefill_fake": {"num_blocks": 16, "max_model_len": 160}}
    async with workers(monkeypatch, overlap=True, **fake) as both:
        router = await both.router()
        prompts = {f"r{i}": [(3 * i + j) % 500 for j in range(1 + (i * 17) % 60)] for i in range(40)}
        calls = []
        for index, (name, prompt) in enumerate(prompts.items()):
            await router.submit(request(name, prompt, 30), remote=index % 2 == 0)
            if index % 2 == 0:
                calls.append(asyncio.ensure_future(router.start_prefill(request(name, prompt, 30))))
        assert await router.collect(*prompts) == [expected(prompt, 30) for prompt in prompts.values()]
        await asyncio.gather(*calls)
        assert both.engines["decode"].scheduler.num_preemptions > 0
        await router.wait_until_settled()
        await router.close()
