"""Every family against transformers in fp32 and bf16: logits, and greedy tokens through odd chunks of a paged cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from model_factory import CASES, VOCAB_SIZE, write_checkpoint
from paged_session import PagedSequence, free_blocks, greedy, prefill

from baton.engine.runner import ModelRunner

_NUM_NEW_TOKENS = 20


def _prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _reference(path: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, case)
    reference = _reference(path)
    runner = ModelRunner(path, device="cpu", block_size=8, num_blocks=220, max_batch_tokens=128)
    blocks = free_blocks(runner)
    for length, chunk in ((1, 1), (70, 9), (131, 64)):
        prompt = _prompt(length)
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
            tokens = reference.generate(
                torch.tensor([prompt]), max_new_tokens=_NUM_NEW_TOKENS, do_sample=False, eos_token_id=None
            )[0, length:].tolist()
        sequence = PagedSequence(blocks, length + _NUM_NEW_TOKENS, 8)
        logits = prefill(runner, sequence, prompt, chunk)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert greedy(runner, sequence, int(logits[-1].argmax()), _NUM_NEW_TOKENS) == tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama-gqa-bias", "mistral-window", "qwen3"])
def test_half_precision_stays_close_to_transformers(case: str, dtype: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, case, dtype=dtype)
    runner = ModelRunner(path, device="cpu", block_size=16, num_blocks=110, max_batch_tokens=128)
    assert str(runner.dtype) == f"torch.{dtype}"
    prompt = _prompt(90)
    logits = prefill(runner, PagedSequence(free_blocks(runner), 90, 16), prompt, 31)
    with torch.inference_mode():
        exact = _reference(path)(torch.tensor([prompt])).logits[0]
        expected = _reference(path, runner.dtype)(torch.tensor([prompt])).logits[0].float()
    # Both round; Baton must be as near to the fp32 result of the same weights as transformers is.
    own_error, reference_error = (logits - exact).square().mean().sqrt(), (expected - exact).square().mean().sqrt()
    assert own_error < 1.25 * reference_error
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > (0.99 if dtype == "bfloat16" else 0.9999)


def test_positions_far_into_the_window_agree(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama-mqa-llama3", num_hidden_layers=2)
    prompt = _prompt(1500)
    runner = ModelRunner(path, device="cpu", num_blocks=100, max_batch_tokens=512)
    logits = prefill(runner, PagedSequence(free_blocks(runner), 1500, 16), prompt, 509)
    with torch.inference_mode():
        expected = _reference(path)(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
