"""What no engine may be made to compute is refused, with the limit and the value given."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from baton.engine.fake import FakeEngine
from baton.engine.request import EngineRequest, SamplingParams
from baton.engine.request_check import why_unfit

VOCAB = 100
MAX_LEN = 10


def _why(prompt: tuple[int, ...] = (1, 2), resumed: tuple[int, ...] = (), **sampling: Any) -> str:
    params = SamplingParams(**{"max_tokens": 4, **sampling})
    request = EngineRequest(request_id="r", prompt_token_ids=prompt, resumed_token_ids=resumed, sampling=params)
    return why_unfit(request, max_model_len=MAX_LEN, vocab_size=VOCAB)


def test_the_edges_fit() -> None:
    assert _why() == ""
    assert _why(tuple(range(90, 95)), (99,) * 4, logprobs=100, prompt_logprobs=0) == ""
    assert _why(temperature=0.0, top_p=1.0, min_p=1.0, top_k=2**31 - 1, repetition_penalty=1e-6) == ""
    assert (
        _why(logit_bias=((99, -100.0),), allowed_token_ids=(99,), bad_words_ids=((99, 0),), stop_token_ids=(99,)) == ""
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": ()}, "prompt has no tokens; 1 to 9 fit"),
        ({"prompt": (), "resumed": (1, 2)}, "prompt has no tokens"),
        ({"prompt": (1,) * 10}, "prompt has 10 tokens; 1 to 9 fit this worker (max_model_len 10)"),
        ({"prompt": (1,) * 8, "resumed": (1, 1)}, "prompt has 10 tokens"),
        ({"prompt": (100,)}, "a token id beyond the vocabulary of 100"),
        ({"resumed": (100,)}, "a token id beyond the vocabulary of 100"),
        ({"logit_bias": ((100, 1.0),)}, "sampling parameters name a token id beyond"),
        ({"allowed_token_ids": (3, 100)}, "sampling parameters name a token id beyond"),
        ({"bad_words_ids": ((3, 100),)}, "sampling parameters name a token id beyond"),
        ({"stop_token_ids": (100,)}, "sampling parameters name a token id beyond"),
        ({"allowed_token_ids": ()}, "must name a token"),
        ({"bad_words_ids": ((1,), ())}, "must name a token"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty is -inf"),
        ({"logprobs": 101}, "logprobs is 101; it must be finite, and of 0 to 100"),
        ({"prompt_logprobs": 2**32 - 1}, "prompt_logprobs is 4294967295"),
        ({"logit_bias": ((1, math.nan),)}, "logit_bias has a value that is not finite"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], told: str) -> None:
    assert told in _why(**changes)


def test_an_engine_refuses_it_and_goes_on() -> None:
    engine = FakeEngine(max_model_len=64)
    good = EngineRequest(request_id="a", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=2))
    assert "no tokens" in engine.add(dataclasses.replace(good, request_id="b", prompt_token_ids=()))
    assert not engine.has_work
    assert engine.add(good) == ""
    assert engine.has_work
