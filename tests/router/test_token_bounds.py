"""What a request may take, known before its text is encoded: never more at the least than it is charged for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.router.harness import running_router

from baton.engine.tokenizer import Tokenizer
from baton.router.protocol.chat import ChatRequest
from baton.router.protocol.completions import CompletionRequest
from baton.router.token_bounds import TokenBounds


def test_of_ids_it_is_exact_and_of_text_a_guess() -> None:
    assert TokenBounds.of([[1, 2, 3], [4]], answers=2, max_tokens=10) == TokenBounds(48, 48)
    assert TokenBounds.of(["x" * 400], answers=1, max_tokens=10) == TokenBounds(11, 110)
    assert TokenBounds.of(["x", [1]], answers=1, max_tokens=None) == TokenBounds(4, 4)


@given(st.lists(st.one_of(st.text(max_size=80), st.lists(st.integers(0, 9), min_size=1, max_size=9)), min_size=1))
def test_the_least_is_no_more_than_what_is_likely(prompts: list[Any]) -> None:
    bounds = TokenBounds.of(prompts, answers=1, max_tokens=None)
    assert 2 * len(prompts) <= bounds.least <= bounds.likely


def test_requests_tell_their_bounds() -> None:
    completion = CompletionRequest.model_validate({"prompt": [[1, 2], [3]], "n": 2, "max_tokens": 5})
    assert completion.token_bounds() == TokenBounds(26, 26)
    messages = [
        {"role": "user", "content": "a" * 40},
        {"role": "user", "content": [{"type": "text", "text": "b" * 40}]},
    ]
    chat = ChatRequest.model_validate({"messages": messages, "max_tokens": 1, "max_completion_tokens": 7})
    assert chat.token_bounds() == TokenBounds(8, 27)


@pytest.mark.parametrize("is_chat", [False, True])
async def test_who_has_used_his_rate_is_refused_before_his_text_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_chat: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it was encoded")

    tenants = {"t": {"tokens_per_s": 1, "burst_tokens": 120}}
    text = "hello, who is there at this late an hour"
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    asks = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
    body, headers = {**asks, "max_tokens": 60}, {"X-Baton-Tenant": "t"}
    async with running_router(tmp_path, admission={"tenants": tenants}) as router:
        first = await router.post(path, body, headers={**headers, "Idempotency-Key": "one"})
        assert first.status_code == 200
        with monkeypatch.context() as patched:
            for name in ("encode", "apply_chat_template"):
                patched.setattr(Tokenizer, name, fail)
            refused = await router.post(path, {**body, "request_id": "mine"}, headers=headers)
        assert refused.status_code == 429
        assert "tenant t has used its 1 tokens per second (this request may take about 70)" in refused.text
        assert refused.headers["x-request-id"] == "mine"
        assert int(refused.headers["retry-after"]) >= 10
        # What was answered before is told again, and takes nothing.
        again = await router.post(path, body, headers={**headers, "Idempotency-Key": "one"})
        assert (again.status_code, again.headers["idempotency-replayed"]) == (200, "true")
        assert again.text == first.text
