"""The OpenAI interface as OpenAI's own client sees it, and byte by byte."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.router.fake_worker import expected
from tests.router.harness import MAX_MODEL_LEN, Harness, running_router

from baton.router.limits import MAX_BODY_BYTES

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello, world!"}], "max_tokens": 8}


def _chat_ids(router: Harness) -> list[int]:
    return router.tokenizer.apply_chat_template(CHAT["messages"])  # type: ignore[arg-type]


async def test_chat(router: Harness) -> None:
    answer = await router.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello, world!"}], max_tokens=8
    )
    prompt = _chat_ids(router)
    assert answer.choices[0].message.content == router.text(expected(prompt, 8))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 8)
    assert answer.usage.total_tokens == len(prompt) + 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == min(16, len(prompt) - 1)


async def test_chat_stream_equals_chat(router: Harness) -> None:
    stream = await router.openai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello, world!"}],
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == router.text(expected(_chat_ids(router), 8))
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


async def test_sse_framing(router: Harness) -> None:
    body = {**CHAT, "stream": True, "max_tokens": 3}
    async with router.http.stream("POST", router.http_url + "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-baton-decode-instance"] == "decode-0"
        raw = await response.aread()
    blocks = raw.split(b"\n\n")
    assert blocks[-1] == b""
    assert blocks[-2] == b"data: [DONE]"
    events = [json.loads(block.removeprefix(b"data: ")) for block in blocks[:-2]]
    assert all(block.startswith(b"data: {") for block in blocks[:-2])
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert all("usage" not in event for event in events)


async def test_usage_chunks(router: Harness) -> None:
    body = {**CHAT, "stream": True, "max_tokens": 4, "stream_options": {"include_usage": True}}
    events = [json.loads(event) for event in (await router.events("/v1/chat/completions", body))[:-1]]
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["usage"]["baton"] == {"prefill_instance": "decode-0", "decode_instance": "decode-0"}
    body["stream_options"]["continuous_usage_stats"] = True  # type: ignore[index]
    events = [json.loads(event) for event in (await router.events("/v1/chat/completions", body))[:-1]]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_completions_of_every_kind_of_prompt(router: Harness, stream: bool) -> None:
    ids = router.tokenizer.encode("The quick brown fox")
    prompts: list[Any] = ["The quick brown fox", ids, ["The quick brown fox", "Hello"], [ids, ids[:3]]]
    for prompt in prompts:
        many = prompt if isinstance(prompt[0], str | list) and not isinstance(prompt, str) else [prompt]
        encoded = [router.tokenizer.encode(one) if isinstance(one, str) else one for one in many]
        wanted = [router.text(expected(one, 5)) for one in encoded for _ in range(2)]
        texts = [""] * len(wanted)
        if stream:
            async for chunk in await router.openai.completions.create(
                model="tiny", prompt=prompt, max_tokens=5, n=2, stream=True
            ):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
        else:
            answer = await router.openai.completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2)
            for choice in answer.choices:
                texts[choice.index] = choice.text
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == sum(map(len, encoded))
            assert answer.usage.completion_tokens == 5 * len(wanted)
        assert texts == wanted


async def test_choices_have_their_own_seeds(router: Harness) -> None:
    await router.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "seed": 7, "max_tokens": 1})
    seeds = {submit.request.request_id[-1]: submit.request.sampling.seed for submit in router.decode.submits}
    assert seeds["0"] == seeds["2"] == 7
    assert seeds["1"] == seeds["3"] != 7
    await router.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    await router.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    drawn = [submit.request.sampling.seed for submit in router.decode.submits[-2:]]
    assert drawn[0] != drawn[1]


async def test_defaults_are_openais(router: Harness) -> None:
    await router.post("/v1/completions", {"prompt": "Hello"})
    await router.post("/v1/chat/completions", {"messages": CHAT["messages"]})
    completion, chat = (submit.request.sampling for submit in router.decode.submits)
    assert (completion.max_tokens, completion.temperature, completion.top_p, completion.top_k) == (16, 1, 1, 0)
    assert chat.max_tokens == MAX_MODEL_LEN - len(_chat_ids(router))


async def test_sampling_extras_reach_the_worker(router: Harness) -> None:
    body = {
        "prompt": "Hello",
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0,
        "top_k": -1,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "logit_bias": {"5": 1.5, "3": -100},
        "allowed_token_ids": [3, 5, 5],
        "bad_words": ["Hello"],
        "stop_token_ids": [9],
        "stop": ["<|im_end|>", "never"],
        "ignore_eos": True,
        "priority": -3,
        "cache_salt": "tenant",
        "some_unknown_field": {"a": 1},
        "user": None,
    }
    response = await router.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    request = router.decode.submits[0].request
    sampling = request.sampling
    assert (request.priority, request.cache_salt) == (-3, "tenant")
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.top_k) == (9, 2, 0, 0)
    assert (sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (0.5, 0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.ignore_eos) == (-1, 2, True)
    assert dict(sampling.logit_bias) == {5: 1.5, 3: -100}
    assert list(sampling.allowed_token_ids) == [3, 5]
    assert list(sampling.stop_token_ids) == [9, router.tokenizer.token_id("<|im_end|>")]
    encode = router.tokenizer.encode
    assert [list(sequence.ids) for sequence in sampling.bad_words_ids] == [encode("Hello"), encode(" Hello")]


async def test_logprobs_in_both_shapes(router: Harness) -> None:
    chat = await router.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 4
    assert [len(entry.top_logprobs) for entry in content] == [2] * 4
    assert content[0].logprob == -0.25
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode("utf-8", "replace") == (
        chat.choices[0].message.content
    )
    prompt = router.tokenizer.encode("Hello, world!")
    answer = await router.openai.completions.create(
        model="tiny", prompt="Hello, world!", max_tokens=3, logprobs=1, echo=True
    )
    choice = answer.choices[0]
    assert choice.text == "Hello, world!" + router.text(expected(prompt, 3))
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == len(prompt) + 3
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[len(prompt)] == len("Hello, world!")
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)


async def test_prompt_logprobs_and_token_ids(router: Harness) -> None:
    body = {"prompt": [20, 21, 22], "max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": True}
    choice = (await router.post("/v1/completions", body)).json()["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["21"]["logprob"] == -0.25
    assert choice["token_ids"] == expected([20, 21, 22], 2)
    assert not router.decode.submits[0].remote_prefill


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
@pytest.mark.parametrize("include", [False, True])
async def test_stop_strings_across_tokens(router: Harness, tokens_per_step: int, include: bool) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    ids = router.tokenizer.encode(text)
    router.decode.script = lambda request: ids * 3
    router.decode.tokens_per_step = tokens_per_step
    body = {"prompt": "x", "max_tokens": 60, "stop": ["zzz", "fox jumps"], "include_stop_str_in_output": include}
    answer = (await router.post("/v1/completions", body)).json()
    choice = answer["choices"][0]
    assert choice["text"] == ("The quick brown fox jumps" if include else "The quick brown ")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "fox jumps")
    needed = next(n for n in range(len(ids)) if "fox jumps" in router.text(ids[:n]))
    assert answer["usage"]["completion_tokens"] == needed
    events = await router.events("/v1/completions", {**body, "stream": True})
    texts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert "".join(texts) == choice["text"]
    if tokens_per_step == 1:
        await router.decode.until(lambda: len(router.decode.cancelled) == 2)


async def test_min_tokens_holds_stop_strings_off(router: Harness) -> None:
    ids = router.tokenizer.encode("stop stop stop")
    router.decode.script = lambda request: ids
    body = {"prompt": "x", "max_tokens": len(ids), "min_tokens": len(ids) - 1, "stop": "stop"}
    assert (await router.post("/v1/completions", body)).json()["choices"][0]["text"].startswith("stop")


async def test_the_end_token_is_not_text(router: Harness) -> None:
    router.decode.eos_after, router.decode.eos_id = 4, router.tokenizer.eos_token_id
    body = {"prompt": "x", "max_tokens": 9, "skip_special_tokens": False}
    answer = (await router.post("/v1/completions", body)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "<|im_end|>" not in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 4


async def test_disconnect_cancels_the_work(router: Harness) -> None:
    router.decode.gate.clear()
    for path, body, num_choices in (
        ("/v1/chat/completions", CHAT, 1),
        ("/v1/completions", {"prompt": "x", "n": 3}, 4),
        ("/v1/completions", {"prompt": "x", "stream": True}, 5),
    ):
        waiting = asyncio.create_task(router.post(path, body))
        await router.decode.until(lambda wanted=num_choices: len(router.decode.submits) == wanted)  # type: ignore[misc]
        waiting.cancel()
        await router.decode.until(lambda wanted=num_choices: len(router.decode.cancelled) == wanted)  # type: ignore[misc]
    router.decode.gate.set()
    router.decode.pause_after = 5
    body = {**CHAT, "max_tokens": 400, "stream": True}
    async with router.http.stream("POST", router.http_url + "/v1/chat/completions", json=body) as response:
        await anext(response.aiter_bytes())
    await router.decode.until(lambda: len(router.decode.cancelled) == 6)
    assert not router.decode.active
    metrics = (await router.http.get(router.http_url + "/metrics")).text
    assert 'baton_requests_running{role="router"} 0.0' in metrics


async def test_worker_errors_before_and_after_the_first_token(router: Harness) -> None:
    router.decode.fail_with = "out of paper"
    with pytest.raises(openai.InternalServerError, match="out of paper"):
        await router.openai.completions.create(model="tiny", prompt="x")
    with pytest.raises(openai.InternalServerError, match="out of paper"):
        await router.openai.completions.create(model="tiny", prompt="x", stream=True)


@pytest.mark.parametrize("lost_after", [0, 1, 3, 8])
async def test_a_lost_worker_is_not_felt(router: Harness, lost_after: int) -> None:
    # The only worker is back soon; the request waits for it and goes on where it was.
    router.decode.break_after = lost_after
    body = {"prompt": "Hello", "max_tokens": 9, "logprobs": 2, "echo": True}
    answer = (await router.post("/v1/completions", body)).json()
    untouched = (await router.post("/v1/completions", body)).json()
    assert answer["choices"] == untouched["choices"]
    assert answer["usage"] == untouched["usage"]
    first, second = router.decode.submits[:2]
    assert list(second.request.resumed_token_ids) == expected(router.tokenizer.encode("Hello"), 9)[:lost_after]
    assert second.request.attempt == first.request.attempt + 1
    assert first.request.sampling.HasField("prompt_logprobs")
    assert second.request.sampling.HasField("prompt_logprobs") == (not lost_after)
    phase = "streaming" if lost_after else "begun"
    metrics = (await router.http.get(router.http_url + "/metrics")).text
    assert f'baton_resumes_total{{phase="{phase}",role="router"}} 1.0' in metrics


async def test_a_silent_worker_is_lost(tmp_path: Path) -> None:
    async with running_router(tmp_path, router={"silence_s": 1.0}) as router:
        router.decode.gate.clear()
        waiting = asyncio.create_task(router.post("/v1/completions", {"prompt": "Hello", "max_tokens": 4}))
        await router.decode.until(lambda: len(router.decode.submits) == 1)
        await asyncio.sleep(1.5)
        assert len(router.decode.hellos) == 1, "a worker that only beats is alive"
        router.decode.beats = False
        await router.decode.until(lambda: len(router.decode.hellos) == 2)
        router.decode.beats = True
        router.decode.gate.set()
        response = await waiting
    assert response.json()["choices"][0]["text"] == router.text(expected(router.tokenizer.encode("Hello"), 4))


async def test_a_request_may_bring_its_own_deadline(router: Harness) -> None:
    router.decode.gate.clear()
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
    for text in ("0", "-1", "nan", "inf", "soon", ""):
        response = await router.http.post(
            router.http_url + "/v1/completions", json=body, headers={"X-Request-Timeout": text}
        )
        assert response.status_code == 400, text
        assert response.json()["error"]["param"] == "X-Request-Timeout"
    response = await router.http.post(
        router.http_url + "/v1/completions", json=body, headers={"X-Request-Timeout": "0.3"}
    )
    assert response.status_code == 504
    assert "after 0 tokens, while decode-0 had it in its queue" in response.json()["error"]["message"]
    await router.decode.until(lambda: len(router.decode.cancelled) == 1)


async def test_models_version_health(router: Harness) -> None:
    models = await router.openai.models.list()
    assert [model.id for model in models.data] == ["tiny"]
    assert (await router.openai.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await router.openai.models.retrieve("../../etc/passwd")
    get = router.http.get
    assert (await get(router.http_url + "/v1/models")).json()["data"][0]["max_model_len"] == MAX_MODEL_LEN
    assert (await get(router.http_url + "/version")).json() == {"version": "0.1.0"}
    for path in ("/health", "/livez", "/readyz", "/ping"):
        assert (await get(router.http_url + path)).status_code == 200, path
    missing = await get(router.http_url + "/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    for path in ("/v1/completions", "/tokenize"):
        wrong = await get(router.http_url + path)
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
        assert wrong.headers["allow"] == "POST"


async def test_tokenize_and_detokenize(router: Harness) -> None:
    text = "héllo <|im_end|>"
    ids = router.tokenizer.encode(text)
    answer = (await router.post("/tokenize", {"prompt": text, "return_token_strs": True})).json()
    assert answer["tokens"] == ids
    assert (answer["count"], answer["max_model_len"]) == (len(ids), MAX_MODEL_LEN)
    assert "".join(answer["token_strs"]).endswith("<|im_end|>")
    assert (await router.post("/detokenize", {"tokens": ids})).json() == {"prompt": text}
    chat = (await router.post("/tokenize", {"messages": CHAT["messages"]})).json()
    assert chat["tokens"] == _chat_ids(router)


async def test_request_ids(router: Harness) -> None:
    url = router.http_url + "/v1/completions"
    body = {"prompt": "x", "max_tokens": 1}
    given = await router.http.post(url, json=body, headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    assert given.json()["id"] == "cmpl-abc-1"
    assert router.decode.submits[0].request.request_id.startswith("abc-1-")
    for bad in ("a b", "x" * 200, "ä"):
        fresh = await router.http.post(url, json=body, headers={"X-Request-Id": bad.encode("latin-1")})
        assert fresh.status_code == 200
        assert fresh.headers["x-request-id"] not in (bad, "")
    own = await router.post("/v1/completions", {**body, "request_id": "mine"})
    assert own.headers["x-request-id"] == "mine"


async def test_api_key(tmp_path: Path) -> None:
    async with running_router(tmp_path, router={"api_key": "secret-key"}) as router:
        for path in ("/health", "/livez", "/readyz", "/metrics", "/ping"):
            assert (await router.http.get(router.http_url + path)).status_code == 200, path
        tries = ["/v1/models", "//v1/models", "/v1/../v1/models", "/version", "/nothing", "/health/", "/%76ersion"]
        for path in tries:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-key"}):
                refused = await router.http.get(httpx.URL(router.http_url + path), headers=headers)
                assert refused.status_code == 401, (path, headers)
                assert refused.json()["error"]["type"] == "authentication_error"
        allowed = await router.http.get(router.http_url + "/version", headers={"Authorization": "Bearer secret-key"})
        assert allowed.status_code == 200
        assert (await router.openai.models.list()).data[0].id == "tiny"
        for method in ("HEAD", "DELETE", "OPTIONS"):
            assert (await router.http.request(method, router.http_url + "/v1/models")).status_code == 401


async def test_overload_is_refused_early_with_a_hint(tmp_path: Path) -> None:
    async with running_router(tmp_path, router={"max_queued_requests": 2}) as router:
        router.decode.gate.clear()
        body = {"prompt": "x", "max_tokens": 2}
        running = [asyncio.create_task(router.post("/v1/completions", body)) for _ in range(2)]
        await router.decode.until(lambda: len(router.decode.submits) == 2)
        refused = await router.post("/v1/completions", body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        router.decode.gate.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
        assert (await router.post("/v1/completions", body)).status_code == 200


async def test_bodies_are_bounded_while_they_are_read(router: Harness) -> None:
    async def endless() -> Any:
        for _ in range(MAX_BODY_BYTES // 65536 + 100):
            yield b" " * 65536

    url = router.http_url + "/v1/completions"
    headers = {"Content-Type": "application/json"}
    declared = await router.http.post(url, content=b"x" * (MAX_BODY_BYTES + 1), headers=headers)
    assert declared.status_code == 413
    try:
        streamed = await router.http.post(url, content=endless(), headers=headers)
        assert streamed.status_code == 413
    except httpx.TransportError:
        pass  # the server may close before the client has sent it all
    assert (await router.post("/v1/completions", {"prompt": "x"})).status_code == 200


async def test_draining_finishes_what_runs_and_takes_nothing_new(router: Harness) -> None:
    router.decode.gate.clear()
    running = asyncio.create_task(router.post("/v1/completions", {"prompt": "x", "max_tokens": 3}))
    await router.decode.until(lambda: len(router.decode.submits) == 1)
    router.stop.set()
    await router.registry.until_announced(lambda status: status.state == "draining")
    refused = await router.post("/v1/completions", {"prompt": "x"})
    assert refused.status_code == 503
    assert (await router.http.get(router.http_url + "/readyz")).status_code == 503
    router.decode.gate.set()
    assert (await running).status_code == 200
    assert router.serving is not None
    await asyncio.wait_for(router.serving, 10)


async def test_objectives_are_counted_as_kept_or_missed(router: Harness) -> None:
    async def ask(slo: dict[str, float]) -> None:
        reply = await router.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4, "slo": slo})
        assert reply.status_code == 200, reply.text

    await ask({"ttft_ms": 60_000, "tpot_ms": 60_000})
    await ask({"tpot_ms": 1e-6})
    page = (await router.http.get(f"{router.http_url}/metrics")).text
    counts = {
        outcome: f'baton_slo_requests_total{{outcome="{outcome}",role="router"}} 1.0' in page
        for outcome in ("kept", "ttft_missed", "tpot_missed")
    }
    assert counts == {"kept": True, "ttft_missed": False, "tpot_missed": True}
