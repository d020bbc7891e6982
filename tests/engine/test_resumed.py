"""A request that goes on elsewhere after k of its tokens: the rest is what would have come, for every k."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from model_factory import write_checkpoint

from baton.engine.engine import Engine
from baton.engine.fake import FakeEngine
from baton.engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from baton.engine.runner import ModelRunner

_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "seed": 5},
    "penalties": {
        "temperature": 0.6,
        "seed": 6,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
    },
    "limits": {"temperature": 0.8, "seed": 7, "min_tokens": 9, "logprobs": 2, "bad_words_ids": ((3, 4), (9,))},
}
_PROMPT = tuple((7 * i + 3) % 200 for i in range(21))


def _request(name: str, kind: str, resumed: tuple[int, ...] = ()) -> EngineRequest:
    sampling = SamplingParams(max_tokens=14, ignore_eos=True, **_KINDS[kind])
    return EngineRequest(request_id=name, prompt_token_ids=_PROMPT, sampling=sampling, resumed_token_ids=resumed)


def _run(engine: Engine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        engine.pool.check()
    assert engine.pool.counts().owned == 0
    return outputs


def _ids(outputs: list[RequestOutput]) -> tuple[int, ...]:
    return tuple(token_id for output in outputs for token_id in output.token_ids)


def _check(engine: Engine, kind: str) -> None:
    assert engine.add(_request("whole", kind)) == ""
    whole = _run(engine)["whole"]
    ids, logprobs = _ids(whole), [entry for output in whole for entry in output.logprobs]
    assert len(ids) == 14
    for k in range(1, 14):
        assert engine.add(_request(f"from {k}", kind, ids[:k])) == ""
    rest = _run(engine)
    for k in range(1, 14):
        outputs = rest[f"from {k}"]
        assert _ids(outputs) == ids[k:], k
        assert [entry for output in outputs for entry in output.logprobs] == logprobs[k:], k
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert outputs[0].cached_tokens > 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", _KINDS)
def test_the_rest_is_what_would_have_come(kind: str, overlap: bool) -> None:
    _check(FakeEngine(max_batch_tokens=48, max_batch_size=20, block_size=4, overlap=overlap), kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", _KINDS)
def test_the_rest_is_what_would_have_come_from_a_model(tmp_path: Path, kind: str, dtype: str) -> None:
    write_checkpoint(tmp_path, "llama-mqa-llama3")
    runner = ModelRunner(tmp_path, device="cpu", dtype=dtype, num_blocks=120, block_size=4, max_model_len=64)
    _check(Engine(runner, max_batch_tokens=24, max_batch_size=20), kind)


def test_what_does_not_fit_is_refused() -> None:
    engine = FakeEngine(max_batch_tokens=48, max_batch_size=8, block_size=4, num_blocks=16, max_model_len=32)
    whole = _request("r", "greedy")
    assert "32 tokens" in engine.add(dataclasses.replace(whole, resumed_token_ids=(1,) * 11))
    assert "vocabulary" in engine.add(dataclasses.replace(whole, resumed_token_ids=(10_000,)))
    assert engine.add(dataclasses.replace(whole, resumed_token_ids=(1,) * 10)) == ""
